"""What the jobs work on: models made here, prompt files cut from PartiPrompts."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.measure import CACHE, PYTHON, ROOT, progress, run

PARTI = ROOT / "bench" / "prompts" / "parti.txt.gz"

#: What a call must say, for the competitors; ddinfer is given the same as options.
TINY_CALL = {"num_inference_steps": 12, "guidance_scale": 2.0, "height": 64, "width": 64}
#: About a second an image on one core: three steps of 0.2 s, and the decoder.
MID_CALL = {"num_inference_steps": 3, "guidance_scale": 7.5, "height": 256, "width": 256}


def parti_prompts() -> list[str]:
    return gzip.decompress(PARTI.read_bytes()).decode().split("\n")[:-1]


def prompt_file(folder: Path, num_prompts: int, steps: Sequence[int] = ()) -> Path:
    """The first prompts of PartiPrompts; with ``steps`` a JSONL file that says them for each."""
    prompts = parti_prompts()[:num_prompts]
    assert len(prompts) == num_prompts
    file = folder / ("prompts.jsonl" if steps else "prompts.txt")
    if steps:
        lines = [
            json.dumps({"prompt": prompt, "num_inference_steps": n})
            for prompt, n in zip(prompts, steps, strict=True)
        ]
    else:
        lines = prompts
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def mixed_steps(num_prompts: int, lowest: int = 2, highest: int = 24) -> list[int]:
    generator = random.Random(0)
    return [generator.randint(lowest, highest) for _ in range(num_prompts)]


def tiny_model() -> Path:
    from ddinfer import tiny

    return tiny.path()


def mid_model() -> Path:
    """A Stable Diffusion 1.5 scaled to about a second an image: same blocks, narrower.

    34 M parameters in the UNet, 256² pixels, random weights; the text side of the embedded model.
    """
    folder = CACHE / "mid-sd"
    if not (folder / "model_index.json").is_file():
        progress("making the mid-size model")
        run([PYTHON, "-m", "bench.inputs", "mid", str(folder)])
    return folder


def make_mid_model(folder: str) -> None:
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    tiny = StableDiffusionPipeline.from_pretrained(tiny_model(), dtype=torch.float32)
    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 256, 256),  # Stable Diffusion 1.5: 320, 640, 1280, 1280
        down_block_types=(cross, cross, cross, plain),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
        layers_per_block=2,
        attention_head_dim=8,
        cross_attention_dim=tiny.text_encoder.config.hidden_size,
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 64, 128, 128),  # 128, 256, 512, 512
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    )
    pipe: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=tiny.text_encoder,
        tokenizer=tiny.tokenizer,
        unet=unet,
        scheduler=tiny.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


WIDE_FLUX_CALL = {"num_inference_steps": 2, "guidance_scale": 3.5, "height": 128, "width": 128,
                  "max_sequence_length": 16}  # fmt: skip


def wide_flux() -> Path:
    """The embedded Flux with a wider and deeper transformer of random weights, in bfloat16.

    250 M parameters, 0.5 GB: large beside the process that loads it, small beside a machine.
    """
    folder = CACHE / "wide-flux"
    if not (folder / "model_index.json").is_file():
        progress("making the wide Flux")
        run([PYTHON, "-m", "bench.inputs", "wide-flux", str(folder)])
    return folder


def make_wide_flux(folder: str) -> None:
    import torch
    from diffusers import FluxPipeline, FluxTransformer2DModel

    from ddinfer import tiny

    torch.manual_seed(0)
    pipe: Any = FluxPipeline.from_pretrained(tiny.path("shapes-flux"), dtype=torch.bfloat16)
    wider = {"num_attention_heads": 16, "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28),
             "num_layers": 2, "num_single_layers": 12}  # fmt: skip
    config = {**pipe.transformer.config, **wider}
    pipe.transformer = FluxTransformer2DModel.from_config(config).to(torch.bfloat16)
    pipe.save_pretrained(folder)


#: A pipeline whose call takes no time; whatever a job costs then is ddinfer's.
INSTANT = """
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image


class InstantPipeline(DiffusionPipeline):
    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def __call__(
        self, prompt: str, height=8, width=8, generator: torch.Generator | None = None
    ):
        colour = (generator.initial_seed() % 255 + 1,) * 3
        return ImagePipelineOutput([Image.new("RGB", (width, height), colour)])
"""


def custom_pipeline(folder: Path, name: str, source: str, kind: str) -> Path:
    """A model folder that brings its own pipeline class; needs ``--trust_remote_code``."""
    target = folder / name
    scheduler: dict[str, Any] = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.36.0"}
    (target / "scheduler").mkdir(parents=True, exist_ok=True)
    (target / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (target / f"{name}.py").write_text(source)
    index = {
        "_class_name": [name, kind],
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (target / "model_index.json").write_text(json.dumps(index))
    return target


if __name__ == "__main__":
    import sys

    {"mid": make_mid_model, "wide-flux": make_wide_flux}[sys.argv[1]](sys.argv[2])
