"""The two denoisers: a UNet with cross-attention and a Flux transformer, and how they learn.

Both learn from latents of drawn pictures, encoded once, with captions worded anew each time. The
text encoders and the autoencoder are frozen. A tenth of the captions is empty, for guidance.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .draw import draw
from .optim import Plan, fit
from .text import WIDTH
from .tokens import MAX_TOKENS, token_ids
from .vae import LATENT_CHANNELS, encode
from .world import Scene, caption, random_scene

GRID = 16
"""Height and width of the latents."""
BATCH_SIZE = 64
EMPTY_CAPTIONS = 0.1
NOISE_SHIFT = 2.0
"""Training times lean towards noise, where a caption decides what appears (arXiv 2403.03206)."""


def build_unet(channels: tuple[int, ...] = (48, 80, 96)) -> Any:
    """A `UNet2DConditionModel` that reads the caption in its time embedding and by attention."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=GRID,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_transformer(num_heads: int = 3, num_blocks: tuple[int, int] = (4, 4)) -> Any:
    """A `FluxTransformer2DModel` of double and single blocks, over 8×8 tokens of 2×2 latents."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=num_blocks[0],
        num_single_layers=num_blocks[1],
        attention_head_dim=32,
        num_attention_heads=num_heads,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )


def sd_scheduler() -> Any:
    """DDIM, v-prediction, from pure noise (arXiv 2305.08891)."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def flux_scheduler() -> Any:
    """Flow matching by Euler steps, denser near the noise."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=NOISE_SHIFT)


@dataclass(frozen=True)
class Pool:
    """Training scenes and the latents `(scenes, 8, 16, 16)` of one picture of each, float16."""

    scenes: list[Scene]
    latents: np.ndarray

    def batch(self, rng: random.Random) -> tuple[Tensor, list[str]]:
        """Latents `(batch, 8, 16, 16)` and captions; every tenth caption is empty."""
        chosen = [rng.randrange(len(self.scenes)) for _ in range(BATCH_SIZE)]
        captions = [
            "" if rng.random() < EMPTY_CAPTIONS else caption(self.scenes[k], rng) for k in chosen
        ]
        return torch.from_numpy(self.latents[chosen]).float(), captions


def latent_pool(vae: Any, folder: Path, count: int, seed: int) -> Pool:
    """Draw and encode the training pictures, or read them if that was done before."""
    rng = random.Random(f"pool {seed}")
    scenes = [random_scene(rng) for _ in range(count)]
    path = folder / f"latents-{seed}-{count}.npy"
    if not path.exists():
        latents = np.empty((count, LATENT_CHANNELS, GRID, GRID), np.float16)
        for start in range(0, count, 1024):
            some = scenes[start : start + 1024]
            latents[start : start + 1024] = encode(vae, [draw(s, rng) for s in some]).half()
        folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npy")
        np.save(temporary, latents)
        os.replace(temporary, path)
    return Pool(scenes, np.load(path, mmap_mode="r"))


@dataclass(frozen=True)
class Reader:
    """A frozen tokenizer and its text encoder."""

    tokenizer: Any
    encoder: Any

    @torch.no_grad()
    def __call__(self, captions: list[str]) -> Any:
        """The encoder's output for captions, as the pipelines ask for it."""
        return self.encoder(token_ids(self.tokenizer, captions).to(self.encoder.device))


def unet_loss(
    unet: Any, clip: Reader, alphas: Tensor, latents: Tensor, captions: list[str], noise: Tensor,
    times: Tensor,
) -> Tensor:  # fmt: skip
    """The mean squared error of v at uniform times in 0..1; `alphas` are cumulative products."""
    steps = (times * len(alphas)).long().clamp(max=len(alphas) - 1)
    signal = alphas[steps].sqrt().view(-1, 1, 1, 1)
    spread = (1 - alphas[steps]).sqrt().view(-1, 1, 1, 1)
    noisy = signal * latents + spread * noise
    words = clip(captions).last_hidden_state
    made = unet(noisy, steps, encoder_hidden_states=words).sample
    return functional.mse_loss(made, signal * noise - spread * latents)


def transformer_loss(
    transformer: Any, clip: Reader, t5: Reader, latents: Tensor, captions: list[str],
    noise: Tensor, times: Tensor,
) -> Tensor:  # fmt: skip
    """The mean squared error of the flow from picture to noise, at shifted times."""
    from diffusers import FluxPipeline

    times = NOISE_SHIFT * times / (1 + (NOISE_SHIFT - 1) * times)
    share = times.view(-1, 1, 1, 1)
    packing = (len(latents), LATENT_CHANNELS, GRID, GRID)
    places = FluxPipeline._prepare_latent_image_ids(
        len(latents), GRID // 2, GRID // 2, latents.device, latents.dtype
    )
    made = transformer(
        hidden_states=FluxPipeline._pack_latents(latents.lerp(noise, share), *packing),
        timestep=times,
        pooled_projections=clip(captions).pooler_output,
        encoder_hidden_states=t5(captions).last_hidden_state,
        txt_ids=torch.zeros(MAX_TOKENS, 3, device=latents.device),
        img_ids=places,
    ).sample
    return functional.mse_loss(made, FluxPipeline._pack_latents(noise - latents, *packing))


def train(
    model: Any,
    loss: Callable[[Tensor, list[str], Tensor, Tensor], Tensor],
    pool: Pool,
    folder: Path,
    plan: Plan,
    *,
    name: str,
    seed: int,
    stop_at: int | None = None,
) -> Any:
    """Train a denoiser with `loss(latents, captions, noise, times)`; return it averaged."""
    device = next(model.parameters()).device

    def loss_of_step(step: int) -> Tensor:
        rng = random.Random(f"{name} {seed} {step}")
        latents, captions = pool.batch(rng)
        generator = torch.Generator("cpu").manual_seed(rng.randrange(2**60))
        noise = torch.randn(latents.shape, generator=generator)
        # One time from each of as many equal intervals as there are pictures: less variance.
        times = (torch.arange(len(latents)) + torch.rand(len(latents), generator=generator)) / len(
            latents
        )
        return loss(latents.to(device), captions, noise.to(device), times.to(device))

    model.load_state_dict(fit(model, loss_of_step, plan, folder, name=name, stop_at=stop_at))
    return model.eval()
