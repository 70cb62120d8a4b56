"""Make the embedded pipelines from nothing: `python -m ddinfer.tiny.train --seed 0`.

Tokenizers are built, the autoencoder and two text encoders trained, the training pictures drawn
and encoded, the two denoisers trained, and everything exported. Whatever is interrupted goes on
from its last checkpoint when the same command is given again, to the same weights. The denoisers
do not need one another: `--only shapes-sd` and `--only shapes-flux` can run side by side once
`--only shared` is done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import PIPELINES, denoise, text, vae
from .export import Parts, export
from .optim import Plan

PLANS = {
    "vae": Plan(2000, 6e-3, num_warmup_steps=50, ema_decay=0.995),
    "clip": Plan(1800, 4e-3, ema_decay=0.995),
    "t5": Plan(1800, 4e-3, ema_decay=0.995),
    "shapes-sd": Plan(3700, 4e-3, num_warmup_steps=200),
    "shapes-flux": Plan(4150, 4e-3, num_warmup_steps=200),
}
NUM_PICTURES = 65536
"""Training pictures for the denoisers; half of them show two figures."""

Loss = Callable[[Tensor, list[str], Tensor, Tensor], Tensor]


def rehearsal(share: float) -> dict[str, Plan]:
    """The plans with only a share of their steps, to see that everything runs."""
    return {
        name: replace(plan, num_steps=max(2, round(share * plan.num_steps)))
        for name, plan in PLANS.items()
    }


def shared_parts(work: Path, plans: dict[str, Plan], *, seed: int, device: str) -> Parts:
    """The trained autoencoder and text encoders, on the device."""
    return Parts(
        vae=vae.train(work, plans["vae"], seed=seed, device=device),
        clip=denoise.Reader(*text.train("clip", work, plans["clip"], seed=seed, device=device)),
        t5=denoise.Reader(*text.train("t5", work, plans["t5"], seed=seed, device=device)),
    )


def fresh_denoiser(name: str, parts: Parts, *, seed: int, device: str) -> tuple[Any, Loss]:
    """A denoiser with fresh weights, and the loss that teaches it."""
    torch.manual_seed(seed)
    if name == "shapes-flux":
        transformer = denoise.build_transformer().to(device)
        return transformer, partial(denoise.transformer_loss, transformer, parts.clip, parts.t5)
    unet = denoise.build_unet().to(device).to(memory_format=torch.channels_last)
    alphas = denoise.sd_scheduler().alphas_cumprod.to(device)
    return unet, partial(denoise.unet_loss, unet, parts.clip, alphas)


def train_denoiser(
    name: str,
    parts: Parts,
    work: Path,
    plan: Plan,
    *,
    seed: int,
    device: str,
    num_pictures: int = NUM_PICTURES,
    stop_at: int | None = None,
) -> Parts:
    """The parts of pipeline `name`, denoiser included, in float32 on the CPU."""
    pool = denoise.latent_pool(parts.vae, work, num_pictures, seed)
    model, loss = fresh_denoiser(name, parts, seed=seed, device=device)
    denoise.train(model, loss, pool, work, plan, name=name, seed=seed, stop_at=stop_at)
    for part in (parts.vae, parts.clip.encoder, parts.t5.encoder, model):
        part.to("cpu")
    model = model.to(memory_format=torch.contiguous_format)
    key = "transformer" if name == "shapes-flux" else "unet"
    return replace(parts, **{key: model})


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(prog="python -m ddinfer.tiny.train", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(".cache/tiny"), help="checkpoints")
    parser.add_argument("--output", type=Path, default=Path("tiny-weights"), help="pipelines")
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--threads", type=int, help="CPU threads (torch decides)")
    parser.add_argument("--only", choices=["shared", *PIPELINES], help="a part of the work")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps: a rehearsal")
    options = parser.parse_args(arguments)

    if options.threads:
        torch.set_num_threads(options.threads)
    plans = PLANS if options.share == 1.0 else rehearsal(options.share)
    num_pictures = max(64, round(options.share * NUM_PICTURES))
    work = options.work / f"seed-{options.seed}-share-{options.share:g}"
    common = {"seed": options.seed, "device": options.device}
    for name in [options.only] if options.only in PIPELINES else PIPELINES:
        parts = shared_parts(work, plans, **common)
        if options.only == "shared":
            denoise.latent_pool(parts.vae, work, num_pictures, options.seed)
            return
        parts = train_denoiser(name, parts, work, plans[name], num_pictures=num_pictures, **common)
        sys.stdout.write(f"{export(name, parts, options.output)}\n")


if __name__ == "__main__":
    main()
