"""The autoencoder that both pipelines share: pictures of 64×64 to latents of 8×16×16."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .draw import SIDE, draw, mask
from .optim import Plan, fit
from .world import COLOURS, SHAPES, random_scene

LATENT_CHANNELS = 8
DOWNSCALE = 4
BATCH_SIZE = 32
KL_WEIGHT = 1e-6


def build(channels: tuple[int, ...] = (16, 32, 48)) -> Any:
    """A small `AutoencoderKL` with fresh weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
    )


def pixels(pictures: np.ndarray) -> Tensor:
    """uint8 pictures `(n, height, width, 3)` as floats in -1..1 `(n, 3, height, width)`."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def busy_picture(rng: random.Random) -> np.ndarray:
    """Figures strewn over a plain background: more edges to learn from than a scene has."""
    colours = rng.sample(list(COLOURS.values()), 6)
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = colours[0]
    for colour in colours[1 : rng.randint(2, 6)]:
        centre = (rng.uniform(4, 60), rng.uniform(4, 60))
        radius = rng.choice((rng.uniform(9, 12), rng.uniform(9, 24)))
        cover = mask(rng.choice(SHAPES), centre, (radius, radius))[..., None]
        picture += cover * (np.asarray(colour, np.float32) - picture)
    return np.rint(picture).astype(np.uint8)


def reconstruction_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """L1 on pixels, weighted towards edges, and L1 on differences of neighbouring pixels."""
    down, across = wanted.diff(dim=2), wanted.diff(dim=3)
    edges = functional.pad(down.abs(), (0, 0, 0, 1)) + functional.pad(down.abs(), (0, 0, 1, 0))
    edges = edges + functional.pad(across.abs(), (0, 1)) + functional.pad(across.abs(), (1, 0))
    weight = 1 + 4 * edges.amax(dim=1, keepdim=True).clamp(max=1)
    loss = (weight * (made - wanted).abs()).mean()
    return loss + (made.diff(dim=2) - down).abs().mean() + (made.diff(dim=3) - across).abs().mean()


def train(folder: Path, plan: Plan, *, seed: int, device: str, stop_at: int | None = None) -> Any:
    """Train an autoencoder from nothing; return it with averaged weights and unit latents."""
    torch.manual_seed(seed)
    model = build().to(device).to(memory_format=torch.channels_last)

    def loss_of_step(step: int) -> Tensor:
        rng = random.Random(f"vae {seed} {step}")
        batch = pixels(np.stack([busy_picture(rng) for _ in range(BATCH_SIZE)])).to(device)
        batch = batch.contiguous(memory_format=torch.channels_last)
        noise = torch.Generator("cpu").manual_seed(rng.randrange(2**60))
        posterior = model.encode(batch).latent_dist
        sample = torch.randn(posterior.mean.shape, generator=noise).to(device)
        latents = posterior.mean + posterior.std * sample
        made = model.decode(latents).sample
        return reconstruction_loss(made, batch) + KL_WEIGHT * posterior.kl().mean()

    model.load_state_dict(fit(model, loss_of_step, plan, folder, name="vae", stop_at=stop_at))
    return standardised(model.eval(), seed)


@torch.no_grad()
def standardised(model: Any, seed: int) -> Any:
    """The same autoencoder with latents of mean 0 and deviation 1 in every channel.

    The change of scale is folded into the 1×1 convolutions on both sides of the latents, so the
    pipelines need no factors. A channel that the training left unused stays as it is, near 0.
    """
    latents = encode(model, list(random_pictures(1024, f"latents {seed}")))
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    deviation = torch.where(deviation < 0.1, 1.0, deviation)
    mean, deviation = mean.to(model.device), deviation.to(model.device)
    into, out_of = model.quant_conv, model.post_quant_conv
    count = len(mean)
    into.weight[:count] /= deviation.view(-1, 1, 1, 1)
    into.bias[:count] = (into.bias[:count] - mean) / deviation
    into.bias[count:] -= 2 * deviation.log()
    out_of.bias += out_of.weight[:, :, 0, 0] @ mean
    out_of.weight *= deviation.view(1, -1, 1, 1)
    return model


def random_pictures(count: int, seed: str) -> Iterator[np.ndarray]:
    """Pictures of random training scenes; the same for the same seed."""
    rng = random.Random(seed)
    return (draw(random_scene(rng), rng) for _ in range(count))


@torch.no_grad()
def encode(model: Any, pictures: list[np.ndarray], batch_size: int = 64) -> Tensor:
    """The mean latents `(n, 8, 16, 16)` of pictures, on the CPU."""
    parts = []
    for start in range(0, len(pictures), batch_size):
        batch = pixels(np.stack(pictures[start : start + batch_size])).to(model.device)
        parts.append(model.encode(batch).latent_dist.mean.cpu())
    return torch.cat(parts)
