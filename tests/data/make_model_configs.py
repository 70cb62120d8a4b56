"""Makes model_configs.json: a tiny configuration of every exported diffusers model class.

    python tests/data/make_model_configs.py [CLASS …]

Each starts from the class's own defaults (from START where those do not build) and is scaled
down: all widths together, then one argument after the other, as long as the class still builds
and has no empty tensor. What cannot be built is listed with its reason under "left_out".
"""

from __future__ import annotations

import inspect
import json
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from ddinfer.models.meta_model import parameters_on_meta

TARGET = Path(__file__).with_name("model_configs.json")
SMALL = 60_000  # parameters; small enough to stop at
LARGE = 5_000_000  # parameters; too large for the test data
SECONDS = 90  # for one class

#: Arguments that some classes need beside (or instead of) their defaults.
FOUR = [8, 8, 16, 16]
GROUPED = {"block_out_channels": FOUR, "norm_num_groups": 4}
TEXT = {"cross_attention_dim": 16}
START: dict[str, dict[str, Any]] = {
    "AudioLDM2ProjectionModel": {
        "text_encoder_dim": 8, "text_encoder_1_dim": 16, "langauge_model_dim": 8,
    },
    "AudioLDM2UNet2DConditionModel": GROUPED | TEXT | {"attention_head_dim": 2},
    "AutoencoderKLAllegro": GROUPED,
    "AutoencoderKLCogVideoX": GROUPED,
    "AutoencoderKLFlux2": GROUPED,
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4,
        "block_out_channels": [32, 64, 64], "layers_per_block": 1,
        "spatial_compression_ratio": 4, "sample_size": 32,
    },
    "AutoencoderKLHunyuanVideo": GROUPED,
    "AutoencoderKLMagvit": GROUPED,
    "AutoencoderKLMiniMaxH3": {
        "block_out_channels": [8, 8, 8, 8, 16, 16], "norm_num_groups": 4,
        "decoder_num_layers": 1, "decoder_num_attention_heads": 2,
        "decoder_attention_head_dim": 16,
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": [32, 32, 32, 32],
        "decoder_block_out_channels": [32, 32, 32, 32], "layers_per_block": [1, 1, 1, 1, 1],
    },
    "ConsistencyDecoderVAE": {
        "encoder_block_out_channels": FOUR, "encoder_norm_num_groups": 4,
        "decoder_block_out_channels": FOUR, "decoder_norm_num_groups": 4,
    },
    "ControlNetModel": GROUPED | TEXT | {"attention_head_dim": 2},
    "ControlNetUnionModel": GROUPED | TEXT | {
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64, "attention_head_dim": 2,
        "num_trans_channel": 8, "num_proj_channel": 8, "num_trans_head": 2,
        "conditioning_embedding_out_channels": [8, 16],
    },
    "DreamLiteTransformer2DModel": {
        "in_channels": 8, "num_attention_heads": 2, "attention_head_dim": 4,
        "norm_num_groups": 4, "cross_attention_dim": 16,
    },
    "DreamLiteUNetModel": TEXT | {
        "block_out_channels": [8, 8, 16], "norm_num_groups": 4, "attention_head_dim": 4,
    },
    "EasyAnimateTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 8, "text_embed_dim": 16,
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1,
        "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "caption_channels": [16, 16], "text_emb_dim": 16, "axes_dims_rope": [8, 8],
        "max_resolution": [8, 8], "llama_layers": [0, 1],
    },
    "HunyuanDiT2DControlNetModel": {
        "in_channels": 4, "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8,
        "hidden_size": 16, "sample_size": 8, "text_len": 4, "text_len_t5": 4,
        "cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 8,
        "transformer_num_layers": 4,
    },
    "HunyuanDiT2DModel": {
        "in_channels": 4, "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8,
        "hidden_size": 16, "sample_size": 8, "text_len": 4, "text_len_t5": 4, "num_layers": 4,
        "cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 8,
    },
    "HunyuanVideo15Transformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
        "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 16,
        "image_embed_dim": 16, "rope_axes_dim": [4, 6, 6],
    },
    "I2VGenXLUNet": GROUPED | TEXT | {"attention_head_dim": 4},
    "Kandinsky3UNet": TEXT | {
        "block_out_channels": FOUR, "groups": 4, "time_embedding_dim": 16,
        "attention_head_dim": 4, "encoder_hid_dim": 16, "layers_per_block": 1,
    },
    "Krea2Transformer2DModel": {
        "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 32, "timestep_embed_dim": 8,
        "text_hidden_dim": 32, "num_text_layers": 2, "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2, "text_intermediate_size": 32, "in_channels": 8,
        "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": [4, 6, 6],
    },
    "LatteTransformer3DModel": {
        "in_channels": 4, "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8,
        "cross_attention_dim": 16, "sample_size": 8, "norm_type": "ada_norm_single",
        "caption_channels": 8, "video_length": 2, "num_embeds_ada_norm": 10, "out_channels": 8,
    },
    "LuminaNextDiT2DModel": {
        "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 2,
        "multiple_of": 8, "cross_attention_dim": 16,
    },
    "MotionAdapter": {
        "block_out_channels": FOUR, "motion_norm_num_groups": 4, "motion_num_attention_heads": 2,
        "motion_layers_per_block": 1,
    },
    "OmniGenTransformer2DModel": {
        "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32, "num_layers": 2, "vocab_size": 50, "pad_token_id": 0,
        "pos_embed_max_size": 8, "time_step_dim": 8, "max_position_embeddings": 64,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
    },
    "PRXTransformer2DModel": {
        "in_channels": 4, "context_in_dim": 16, "hidden_size": 32, "num_heads": 2, "depth": 2,
        "axes_dim": [8, 8],
    },
    "SparseControlNetModel": GROUPED | TEXT | {
        "attention_head_dim": 2, "motion_num_attention_heads": 2, "num_attention_heads": 2,
    },
    "StableAudioProjectionModel": {
        "text_encoder_dim": 8, "conditioning_dim": 16, "min_value": 0, "max_value": 32,
    },
    "Transformer2DModel": {
        "in_channels": 8, "norm_num_groups": 4, "num_attention_heads": 2, "attention_head_dim": 4,
    },
    "TransformerTemporalModel": {
        "in_channels": 8, "norm_num_groups": 4, "num_attention_heads": 2, "attention_head_dim": 4,
    },
    "UNet2DConditionModel": GROUPED | TEXT | {"attention_head_dim": 2},
    "UNet2DModel": GROUPED | {"attention_head_dim": 4},
    "UNet3DConditionModel": GROUPED | TEXT | {"attention_head_dim": 4},
    "UNetControlNetXSModel": GROUPED | TEXT | {
        "num_attention_heads": 2, "ctrl_num_attention_heads": 2, "ctrl_max_norm_num_groups": 4,
        "ctrl_conditioning_embedding_out_channels": [4, 8],
    },
    "UNetMotionModel": GROUPED | TEXT | {
        "num_attention_heads": 2, "motion_num_attention_heads": 2,
    },
    "UNetSpatioTemporalConditionModel": TEXT | {
        "block_out_channels": [32, 32, 32, 64], "num_attention_heads": [2, 2, 2, 4],
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24,
        "layers_per_block": 1,
    },
    "UniDiffuserModel": {
        "text_dim": 16, "clip_img_dim": 16, "num_text_tokens": 4, "num_attention_heads": 2,
        "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "norm_num_groups": 4, "sample_size": 8, "patch_size": 2,
    },
    "UniDiffuserTextDecoder": {
        "prefix_length": 4, "prefix_inner_dim": 16, "prefix_hidden_dim": 16, "vocab_size": 64,
        "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2,
    },
    "ZImageControlNetModel": {
        "control_layers_places": [0, 1], "control_in_dim": 4, "dim": 32, "n_refiner_layers": 1,
        "n_heads": 2, "n_kv_heads": 2,
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2,
        "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [16, 8, 8],
    },
}  # fmt: skip

#: Classes that no configuration alone can make.
_LIST = "made from a list of {}, saved as one folder each; load those"
REASONS: dict[str, str] = {
    **{
        f"{family}MultiControlNetModel": _LIST.format("control networks")
        for family in ("Flux", "QwenImage", "SD3")
    },
    "HunyuanDiT2DMultiControlNetModel": _LIST.format("control networks"),
    "MultiControlNetModel": _LIST.format("control networks"),
    "MultiAdapter": _LIST.format("adapters"),
    "UniDiffuserTextDecoder": "diffusers itself cannot save it: its tied weights share memory",
    "RFD4ProteinaAutoencoder": "takes tensors of protein atoms as arguments",
}


def classes() -> dict[str, type]:
    import diffusers

    found = {}
    for name in sorted(dir(diffusers)):
        kind = getattr(diffusers, name)
        if isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin):
            found[name] = kind
    found.pop("ModelMixin")
    return found


def defaults(kind: type) -> dict[str, Any]:
    return {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if parameter.default is not parameter.empty
    }


def size(kind: type, config: dict[str, Any]) -> int:
    """Parameters of the model; raises whatever the class raises when the arguments are wrong."""
    with parameters_on_meta():
        model = kind(**config)
    sizes = [p.numel() for p in model.parameters()]
    if not sizes or 0 in sizes or any(0 in b.shape for b in model.buffers()):
        raise ValueError("empty tensors")
    return sum(sizes)


def try_size(kind: type, config: dict[str, Any]) -> int | None:
    try:
        return size(kind, config)
    except TimeoutError:
        raise
    except Exception:  # noqa: BLE001 - the classes raise anything for arguments that do not fit
        return None


def scaled(value: Any, factor: int, floor: int) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(scaled(item, factor, floor) for item in value)
    if type(value) is int and value > floor:
        return max(floor, value // factor)
    return value


def shrink(kind: type, config: dict[str, Any]) -> tuple[dict[str, Any], int]:
    best = size(kind, config)
    for factor in (64, 32, 16, 8, 4, 2):  # widths together keep their ratios
        trial = {k: scaled(v, factor, 8) if wide(v) else v for k, v in config.items()}
        count = try_size(kind, trial)
        if count is not None and count < best:
            config, best = trial, count
            break
    for _ in range(3):
        before = best
        for name, value in list(config.items()):
            if best <= SMALL:
                break
            for trial_value in candidates(name, value):
                count = try_size(kind, config | {name: trial_value})
                if count is not None and count < best:
                    config, best = config | {name: trial_value}, count
                    break
        if best <= SMALL or best == before:
            break
    return config, best


def wide(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(wide(item) for item in value)
    return type(value) is int and value >= 64


def candidates(name: str, value: Any) -> list[Any]:
    if type(value) is bool or isinstance(value, (str, float)) or value is None:
        return []
    if type(value) is int:
        counts = any(word in name for word in ("layer", "block", "depth", "num_", "repeat"))
        return [n for n in ((1, 2, 4) if counts else (2, 4, 8, 16, 32, 64)) if n < value]
    if isinstance(value, (list, tuple)) and any(type(item) is int for item in value):
        out = [scaled(value, factor, 4) for factor in (64, 16, 8, 4, 2)]
        return [*out, type(value)(scaled(v, 100, 1) for v in value)]
    return []


def main(names: list[str]) -> None:
    import diffusers

    known = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    configs, left_out = known.get("configs", {}), known.get("left_out", {})
    signal.signal(signal.SIGALRM, _late)
    for name, kind in classes().items():
        if names and name not in names:
            continue
        configs.pop(name, None)
        left_out.pop(name, None)
        if name in REASONS:
            left_out[name] = REASONS[name]
            continue
        signal.alarm(SECONDS)
        try:
            start = defaults(kind) | START.get(name, {})
            config, count = shrink(kind, start)
            changed = {k: v for k, v in config.items() if k not in defaults(kind) or v != start[k]}
            changed |= START.get(name, {}) | {k: config[k] for k in START.get(name, {})}
            json.dumps(changed)
            if count > LARGE:
                left_out[name] = f"{count} parameters after scaling down"
            else:
                configs[name] = changed
            print(f"{name}: {count}", flush=True)
        except Exception as error:  # noqa: BLE001 - the reason goes into the file
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            print(f"{name}: {left_out[name]}", flush=True)
        finally:
            signal.alarm(0)
    data = {
        "source": (
            f"the defaults of diffusers {diffusers.__version__}'s own classes, scaled down by "
            "tests/data/make_model_configs.py"
        ),
        "configs": dict(sorted(configs.items())),
        "left_out": dict(sorted(left_out.items())),
    }
    TARGET.write_text(json.dumps(data, indent=1) + "\n")
    print(len(configs), "configurations,", len(left_out), "left out")


def _late(*_: Any) -> None:
    raise TimeoutError(f"not scaled down within {SECONDS} s")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
