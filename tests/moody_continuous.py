"""A pipeline whose denoiser is cut into stages and that does what its prompt says, on any stage.

Like `tests.moody_pipeline`, with a denoiser of four tiny blocks. A word in the prompt says what
happens and where: ``kill`` and ``once FILE`` on the first rank, ``kill-last`` and
``once-last FILE`` in the last block, which is on another rank. ``wait FILE`` waits before the
first step, ``decode FILE`` behind the last one, ``wait-last FILE`` in the last block, which has no
room for more than N rows where they say ``many-last N``. The picture's colour is what the denoiser
made of a colour drawn from the generator, so it is right only if every stage ran.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

BLOCKS = """
import os, signal, time
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config

if os.environ.get("MOODY_BROKEN_RANK") == os.environ.get("RANK", "none"):
    raise OSError("the disk of this machine is gone")


class MoodyBlock(torch.nn.Module):
    def __init__(self, is_last: bool):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.ones(3))
        self.is_last = is_last

    def forward(self, x, note):
        if self.is_last and type(x) is torch.Tensor and bool(note.any()):
            word, _, path = bytes(note[0].tolist()).rstrip(b"\\0").decode().partition(" ")
            if word == "kill-last" or (word == "once-last" and not os.path.exists(path)):
                if path:
                    open(path, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            if word == "many-last" and len(x) > int(path):
                raise torch.OutOfMemoryError(f"no room for {len(x)}")
            while word == "wait-last" and not os.path.exists(path):
                open(path + ".waiting", "w").close()
                time.sleep(0.02)
        return x + self.shift


class MoodyBlocks(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, num_layers: int = 4):
        super().__init__()
        blocks = [MoodyBlock(is_last=k == num_layers - 1) for k in range(num_layers)]
        self.blocks = torch.nn.ModuleList(blocks)

    def forward(self, x, note):
        for block in self.blocks:
            x = block(x, note)
        return x
"""

PIPELINE = """
import os, signal, time
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image


def hold(gate):  # until somebody makes this file; ours says that we wait
    while not os.path.exists(gate):
        open(gate + ".waiting", "w").close()
        time.sleep(0.02)


class MoodyContinuous(DiffusionPipeline):
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
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ):
        prompts = [prompt] if isinstance(prompt, str) else prompt
        generators = generator if isinstance(generator, list) else [generator]
        note = torch.zeros(len(prompts), 200, dtype=torch.uint8)
        for row, text in enumerate(prompts):
            word, _, rest = text.partition(" ")
            if word == "fail":
                raise ValueError(f"cannot draw {rest}")
            if word.endswith("-last"):
                raw = text.encode()
                note[row, : len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
            if word == "wait":
                hold(rest)
        x = torch.stack([torch.randint(0, 200, (3,), generator=g).float() for g in generators])
        for step in range(num_inference_steps):
            x = self.transformer(x, note)
            for text in prompts:  # after a step, so that others are in flight
                word, _, rest = text.partition(" ")
                if word == "kill" or (word == "once" and not os.path.exists(rest)):
                    if rest:
                        open(rest, "w").close()
                    os.kill(os.getpid(), signal.SIGKILL)
        for text in prompts:
            word, _, rest = text.partition(" ")
            if word == "decode":
                hold(rest)
        colours = [tuple(int(v) % 256 for v in row) for row in x.tolist()]
        return ImagePipelineOutput([Image.new("RGB", (width, height), c) for c in colours])
"""


def moody_continuous(folder: str | Path) -> Path:
    """Write the pipeline to ``folder``/moody_continuous and return that."""
    from diffusers import DDIMScheduler

    target = Path(folder) / "moody_continuous"
    DDIMScheduler().save_pretrained(target / "scheduler")
    (target / "moody_continuous.py").write_text(PIPELINE)
    code = target / "transformer" / "moody_blocks.py"
    code.parent.mkdir()
    code.write_text(BLOCKS)
    spec = importlib.util.spec_from_file_location("moody_blocks", code)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.MoodyBlocks().save_pretrained(code.parent)
    index = {
        "_class_name": ["moody_continuous", "MoodyContinuous"],
        "_diffusers_version": "0.36.0",
        "transformer": ["moody_blocks", "MoodyBlocks"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def colour(seed: int, num_steps: int = 3, num_layers: int = 4) -> tuple[int, int, int]:
    """What it draws with this seed."""
    import torch

    drawn = torch.randint(0, 200, (3,), generator=torch.Generator("cpu").manual_seed(seed))
    return tuple((drawn + num_steps * num_layers).tolist())
