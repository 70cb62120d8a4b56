"""Tiny transformers of many families with inputs for one call, random weights: `TRANSFORMERS`.

Lengths of text are odd, heads do not always divide, and a mask leaves some text out where the model
takes one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _mask(length: int, valid: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return (torch.arange(length)[None] < valid).to(dtype)


def flux() -> Any:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 60, 16), "encoder_hidden_states": _noise(1, 15, 32),
        "pooled_projections": _noise(1, 32), "timestep": torch.ones(1),
        "img_ids": _noise(60, 3).abs(), "txt_ids": torch.zeros(15, 3),
    }  # fmt: skip


def flux2() -> Any:
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 36, 16), "encoder_hidden_states": _noise(1, 17, 32),
        "timestep": torch.ones(1), "guidance": torch.ones(1),
        "img_ids": _noise(1, 36, 4).abs(), "txt_ids": torch.zeros(1, 17, 4),
    }  # fmt: skip


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=3, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 4, 8, 8), "encoder_hidden_states": _noise(1, 21, 32),
        "pooled_projections": _noise(1, 64), "timestep": torch.ones(1),
    }  # fmt: skip


def qwen_image() -> Any:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 16, 16), "encoder_hidden_states": _noise(1, 19, 16),
        "encoder_hidden_states_mask": _mask(19, 14), "timestep": torch.ones(1),
        "img_shapes": [(1, 4, 4)],
    }  # fmt: skip


def pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        sample_size=16, num_layers=3, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8,
        norm_type="ada_norm_single",
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 4, 16, 16), "encoder_hidden_states": _noise(1, 9, 32),
        "encoder_attention_mask": _mask(9, 6), "timestep": torch.ones(1),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def wan() -> Any:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
        out_channels=16, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=3,
        cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 16, 3, 8, 8), "encoder_hidden_states": _noise(1, 11, 32),
        "timestep": torch.ones(1),
    }  # fmt: skip


def ltx_video() -> Any:
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8,
        cross_attention_dim=32, num_layers=2, caption_channels=32,
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 2 * 4 * 4, 8), "encoder_hidden_states": _noise(1, 13, 32),
        "timestep": torch.ones(1), "encoder_attention_mask": _mask(13, 9),
        "num_frames": 2, "height": 4, "width": 4,
    }  # fmt: skip


def hunyuan_video() -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, patch_size=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 4, 2, 5, 5), "encoder_hidden_states": _noise(1, 12, 16),
        "encoder_attention_mask": _mask(12, 9), "pooled_projections": _noise(1, 8),
        "timestep": torch.ones(1, dtype=torch.int64), "guidance": torch.ones(1),
    }  # fmt: skip


def z_image() -> Any:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    for parameter in model.parameters():  # some are not initialized
        if parameter.dim() < 2:
            torch.nn.init.normal_(parameter, 0.5, 0.1)
    return model, {
        "x": [_noise(16, 1, 16, 16)], "t": torch.ones(1) * 0.5, "cap_feats": [_noise(13, 16)],
    }  # fmt: skip


def cogvideox() -> Any:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4,
        time_embed_dim=2, text_embed_dim=8, num_layers=2, sample_width=8, sample_height=8,
        sample_frames=5, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=9,
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 2, 4, 8, 8), "encoder_hidden_states": _noise(1, 9, 8),
        "timestep": torch.ones(1),
    }  # fmt: skip


def cogview4() -> Any:
    from diffusers import CogView4Transformer2DModel

    model = CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4,
        text_embed_dim=8, time_embed_dim=8, condition_dim=4, rope_axes_dim=(4, 4),
    )  # fmt: skip
    sizes = torch.tensor([[16.0, 16.0]])
    return model, {
        "hidden_states": _noise(1, 4, 12, 12), "encoder_hidden_states": _noise(1, 10, 8),
        "timestep": torch.ones(1), "original_size": sizes, "target_size": sizes,
        "crop_coords": sizes * 0,
    }  # fmt: skip


def lumina2() -> Any:
    from diffusers import Lumina2Transformer2DModel

    model = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=3,
        num_refiner_layers=2, num_attention_heads=3, num_kv_heads=1, multiple_of=2,
        scaling_factor=1.0, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128), cap_feat_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 4, 12, 12), "encoder_hidden_states": _noise(1, 20, 32),
        "encoder_attention_mask": _mask(20, 17, torch.bool), "timestep": torch.ones(1),
    }  # fmt: skip


def chroma() -> Any:
    from diffusers import ChromaTransformer2DModel

    model = ChromaTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 36, 4), "encoder_hidden_states": _noise(1, 14, 32),
        "timestep": torch.ones(1), "img_ids": _noise(36, 3).abs(), "txt_ids": torch.zeros(14, 3),
        "attention_mask": _mask(50, 47, torch.bool),
    }  # fmt: skip


def aura_flow() -> Any:
    from diffusers import AuraFlowTransformer2DModel

    model = AuraFlowTransformer2DModel(
        sample_size=12, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
        attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
        caption_projection_dim=32, pos_embed_max_size=256,
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 4, 12, 12), "encoder_hidden_states": _noise(1, 18, 32),
        "timestep": torch.ones(1),
    }  # fmt: skip


def allegro() -> Any:
    from diffusers import AllegroTransformer3DModel

    model = AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24,
        sample_width=8, sample_height=8, sample_frames=8, caption_channels=24,
    )  # fmt: skip
    t, h, w = torch.meshgrid(torch.arange(2), torch.arange(4), torch.arange(4), indexing="ij")
    grid = tuple(axis.flatten()[None] for axis in (t, h, w))
    return model, {
        "hidden_states": _noise(1, 4, 2, 8, 8), "encoder_hidden_states": _noise(1, 11, 24),
        "timestep": torch.ones(1), "attention_mask": torch.ones(1, 2, 8, 8),
        "encoder_attention_mask": _mask(11, 8),
        "image_rotary_emb": (tuple((_noise(4, 4), _noise(4, 4)) for _ in range(3)), grid),
    }  # fmt: skip


def latte() -> Any:
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=3, caption_channels=32, cross_attention_dim=24, out_channels=8,
        attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, video_length=12,
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 4, 12, 8, 8), "encoder_hidden_states": _noise(1, 9, 32),
        "timestep": torch.ones(1),
    }  # fmt: skip


def sana() -> Any:
    from diffusers import SanaTransformer2DModel

    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8,
        caption_channels=8, sample_size=8, patch_size=1,
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 4, 8, 8), "encoder_hidden_states": _noise(1, 7, 8),
        "timestep": torch.ones(1),
    }  # fmt: skip


def mochi() -> Any:
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    return model, {
        "hidden_states": _noise(1, 4, 2, 16, 16), "encoder_hidden_states": _noise(1, 16, 16),
        "timestep": torch.ones(1), "encoder_attention_mask": _mask(16, 12, torch.bool),
    }  # fmt: skip


#: Family → builder of ``(model, arguments of one call)``.
TRANSFORMERS: dict[str, Callable[[], Any]] = {
    "Flux": flux,
    "Flux 2": flux2,
    "Chroma": chroma,
    "SD3": sd3,
    "Qwen-Image": qwen_image,
    "Z-Image": z_image,
    "PixArt": pixart,
    "AuraFlow": aura_flow,
    "CogView4": cogview4,
    "Lumina 2": lumina2,
    "Wan": wan,
    "LTX-Video": ltx_video,
    "HunyuanVideo": hunyuan_video,
    "CogVideoX": cogvideox,
    "Allegro": allegro,
    "Latte": latte,
    "Sana": sana,
    "Mochi": mochi,
}
