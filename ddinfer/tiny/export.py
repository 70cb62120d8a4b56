"""Put trained parts together as pipelines and write them in the standard format.

The autoencoder and the denoisers are written in half precision, the text encoders in single:
loaded without a dtype diffusers computes in single precision whatever is in its files, while
transformers keeps the precision that it finds. So a plain load has one dtype throughout.
"""

from __future__ import annotations

import copy
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .denoise import Reader, flux_scheduler, sd_scheduler


@dataclass(frozen=True)
class Parts:
    """What both pipelines are made of, in float32 on the CPU; a denoiser may be missing yet."""

    vae: Any
    clip: Reader
    t5: Reader
    unet: Any = None
    transformer: Any = None


def pipeline(name: str, parts: Parts) -> Any:
    """A pipeline of the parts, ready to be called."""
    from diffusers import FluxPipeline, StableDiffusionPipeline

    if name == "shapes-flux":
        return FluxPipeline(
            scheduler=flux_scheduler(),
            vae=parts.vae,
            text_encoder=parts.clip.encoder,
            tokenizer=parts.clip.tokenizer,
            text_encoder_2=parts.t5.encoder,
            tokenizer_2=parts.t5.tokenizer,
            transformer=parts.transformer,
        )
    return StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.clip.encoder,
        tokenizer=parts.clip.tokenizer,
        unet=parts.unet,
        scheduler=sd_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export(name: str, parts: Parts, folder: Path) -> Path:
    """Write a pipeline to `folder/name`, in place of one that is there; return that path."""
    target, unfinished = folder / name, folder / f".{name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    halved = Parts(
        vae=_half(parts.vae),
        clip=parts.clip,
        t5=parts.t5,
        unet=_half(parts.unet),
        transformer=_half(parts.transformer),
    )
    pipeline(name, halved).save_pretrained(unfinished, safe_serialization=True)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(unfinished, target)
    return target


def _half(model: Any) -> Any:
    return None if model is None else copy.deepcopy(model).half()
