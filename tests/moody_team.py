"""A pipeline for several ranks per image that does what its prompt says, on the rank it names.

Each step makes two guidance calls of a transformer with attention. A word in the prompt acts in the
last of three steps, on every rank of a replica but its first: ``raise``, ``kill``, ``once FILE``
(kills unless the file is there), ``wait FILE`` (until it is there), ``many N`` (no room for more
than N rows). ``fail`` raises in the pipeline's call. Start ranks with ``RANK`` in the environment.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

BLOCKS = """
import os, signal, time
import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config


class MoodyBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.out = torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, hidden_states):
        shape = (*hidden_states.shape[:2], 2, 8)
        q, k, v = (t.view(shape).transpose(1, 2) for t in self.linear(hidden_states).chunk(3, -1))
        made = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return hidden_states + self.out(made)


def act(text, rows):
    word, _, path = text.partition(" ")
    if int(os.environ.get("RANK", "0")) % 2 == 0:
        return
    if word == "raise":
        raise ValueError(f"cannot draw {path}")
    if word == "kill" or (word == "once" and not os.path.exists(path)):
        if path:
            open(path, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "many" and rows > int(path):
        raise torch.OutOfMemoryError(f"no room for {rows}")
    while word == "wait" and not os.path.exists(path):
        open(path + ".waiting", "w").close()
        time.sleep(0.02)


class MoodyTokens(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, num_layers: int = 3):
        super().__init__()
        self.blocks = torch.nn.ModuleList([MoodyBlock() for _ in range(num_layers)])

    def forward(self, hidden_states, note):
        for number, block in enumerate(self.blocks):
            if number == 1 and bool(note.any()):
                act(bytes(note[0].tolist()).rstrip(b"\\0").decode(), len(hidden_states))
            hidden_states = block(hidden_states)
        return hidden_states.tanh()
"""

PIPELINE = """
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image


class MoodyTeam(DiffusionPipeline):
    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        height: int = 8,
        width: int = 8,
        num_inference_steps: int = 3,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        generators = generator if isinstance(generator, list) else [generator]
        note = torch.zeros(len(prompts), 200, dtype=torch.uint8)
        for row, text in enumerate(prompts):
            if text.startswith("fail"):
                raise ValueError(f"cannot draw {text}")
            if " " in text or text in ("raise", "kill"):
                raw = text.encode()
                note[row, : len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        x = torch.stack([torch.randn(height * width // 4, 16, generator=g) for g in generators])
        for step in range(num_inference_steps):
            now = note if step == num_inference_steps - 1 else torch.zeros_like(note)
            with_prompt = self.transformer(x, now)
            without = self.transformer(-x, now)
            x = without + guidance_scale * (with_prompt - without)
        levels = (x[..., :12].sigmoid() * 255).round().to(torch.uint8)
        made = levels.reshape(len(prompts), height, width, 3).numpy()
        return ImagePipelineOutput([Image.fromarray(picture) for picture in made])
"""


def moody_team(folder: str | Path) -> Path:
    """Write the pipeline to ``folder``/moody_team and return that."""
    import torch
    from diffusers import DDIMScheduler

    target = Path(folder) / "moody_team"
    DDIMScheduler().save_pretrained(target / "scheduler")
    (target / "moody_team.py").write_text(PIPELINE)
    code = target / "transformer" / "moody_tokens.py"
    code.parent.mkdir()
    code.write_text(BLOCKS)
    spec = importlib.util.spec_from_file_location("moody_tokens", code)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    module.MoodyTokens().save_pretrained(code.parent)
    index = {
        "_class_name": ["moody_team", "MoodyTeam"],
        "_diffusers_version": "0.36.0",
        "transformer": ["moody_tokens", "MoodyTokens"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (target / "model_index.json").write_text(json.dumps(index))
    return target
