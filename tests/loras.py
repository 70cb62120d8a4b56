"""LoRA files for the tiny pipelines, in the formats in which people have them: `make_lora`.

Needs neither ddinfer nor peft, so that the recorder runs it in an environment of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

#: Name → the pipeline it is for (see `tiny_pipelines`), its layers' names by component.
LORAS: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    # as diffusers' and peft's training scripts save it
    "sd-peft": ("sd", {"unet": ("to_q", "to_out.0", "conv1"), "text_encoder": ("q_proj", "fc1")}),
    # as kohya's scripts save it, with alphas
    "sd-kohya": (
        "sd",
        {"unet": ("to_k", "to_v", "proj_in", "conv2"), "text_encoder": ("v_proj", "out_proj")},
    ),
    "sdxl-peft": ("sdxl", {"unet": ("to_q", "to_v"), "text_encoder_2": ("k_proj",)}),
    "sd3-peft": ("sd3", {"transformer": ("to_q", "add_k_proj"), "text_encoder": ("out_proj",)}),
    "flux-peft": ("flux", {"transformer": ("to_q", "proj_mlp", "x_embedder")}),
    # with peft's own settings in the file's header
    "flux-metadata": ("flux", {"transformer": ("to_k", "to_v")}),
    # as kohya's and XLabs' scripts save it, with the names of the original code
    "flux-kohya": ("flux", {"transformer": ("to_q",)}),
    "flux-xlabs": ("flux", {"transformer": ("to_q",)}),
    "wan-peft": ("wan", {"transformer": ("to_q", "ffn.net.2")}),
}


def make_lora(name: str, pipe: Any, folder: str | Path, *, seed: int = 0) -> Path:
    """Write a LoRA for a loaded pipeline; the same name and seed give the same file."""
    _, components = LORAS[name]
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for component, endings in components.items():
        for layer, module in getattr(pipe, component).named_modules():
            if not layer.endswith(endings) or not hasattr(module, "weight"):
                continue
            shape = module.weight.shape
            rank = 2 if layer.endswith(endings[0]) else 4
            down = torch.randn(rank, *shape[1:], generator=generator) * 0.2
            up = torch.randn(shape[0], rank, *([1] * (len(shape) - 2)), generator=generator) * 0.2
            if name == "sd-kohya":
                prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[component]
                inside = f"text_model.{layer}" if component == "text_encoder" else layer
                inside = inside.removeprefix("text_model.text_model.").replace(".", "_")
                if component == "text_encoder" and not inside.startswith("text_model"):
                    inside = f"text_model_{inside}"
                key = f"{prefix}_{inside}"
                tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
                tensors[f"{key}.alpha"] = torch.tensor(
                    3.0 if component == "text_encoder" or rank == 2 else 4.0
                )
            else:
                key = f"{component}.{layer}"
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = down, up
    if name in ("flux-kohya", "flux-xlabs"):
        tensors = _original_flux(name, pipe.transformer, generator)
    path = Path(folder) / f"{name}-{seed}.safetensors"
    metadata = None
    if name.endswith("metadata"):
        metadata = {
            "format": "pt",
            "lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 5, '
            '"transformer.target_modules": ["to_k", "to_v"], "transformer.use_rslora": true, '
            '"transformer.rank_pattern": {"to_v": 4}, "transformer.alpha_pattern": {"to_v": 7}}',
        }
    save_file(tensors, path, metadata)
    return path


def _original_flux(name: str, model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Query, key and value in one, as the original code has them."""
    tensors = {}
    for k, block in enumerate(model.transformer_blocks):
        width = block.attn.to_q.in_features
        down = torch.randn(4, width, generator=generator) * 0.2
        up = torch.randn(3 * width, 4, generator=generator) * 0.2
        if name == "flux-kohya":
            key = f"lora_unet_double_blocks_{k}_img_attn_qkv"
            tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = down, up
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
        else:
            key = f"double_blocks.{k}.processor.qkv_lora1"
            tensors[f"{key}.down.weight"], tensors[f"{key}.up.weight"] = down, up
    return tensors
