"""Tiny pipelines with random weights, saved in standard diffusers format: `tiny_pipeline`.

Every kind is a few hundred kilobytes and makes a 32-pixel picture in well under a second on one
thread. Tokenizers are built by hand, so nothing is downloaded. The same kind and seed give the
same files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_TEXT = (
    "a an the red green blue yellow cat dog bird house tree car on in of and photo picture "
    "big small square circle two three water sky night day old new stone happy"
)
WORDS = _TEXT.split()


def tiny_pipeline(kind: str, folder: str | Path, *, seed: int = 0) -> Path:
    """Saves a pipeline of `kind` (one of `KINDS`) below ``folder`` and returns its folder."""
    target = Path(folder) / kind
    if not (target / "model_index.json").is_file():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = KINDS[kind]()
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()
        pipe.save_pretrained(target)
    return target


def call_arguments(kind: str) -> dict[str, Any]:
    """What to call a tiny pipeline with, beside the prompt, for a quick and small picture."""
    common: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32}
    if kind in ("flux", "sd3", "sana", "pixart", "wan", "qwen"):
        common["max_sequence_length"] = 16
    if kind == "pixart":
        common |= {"use_resolution_binning": False, "clean_caption": False}
    if kind == "sana":
        common |= {
            "use_resolution_binning": False,
            "clean_caption": False,
            "complex_human_instruction": None,
        }
    if kind in ("wan", "ltx2"):
        common["num_frames"] = 5
    if kind == "ltx2":
        common |= {"max_sequence_length": 16, "spatio_temporal_guidance_blocks": [1]}
    if kind in ("marigold", "unconditional"):
        return {"num_inference_steps": 2}
    if kind == "stable_audio":
        return {"num_inference_steps": 2, "audio_end_in_s": 0.25}
    return common


def clip_tokenizer(max_length: int = 16) -> Any:
    """A CLIP tokenizer that knows letters and `WORDS`."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = (parts[0], parts[1])
            if merge not in merges:
                merges.append(merge)
                pieces.append("".join(merge))
            parts = ["".join(merge), *parts[2:]]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def t5_tokenizer(max_length: int = 16) -> Any:
    """A T5 (unigram) tokenizer that knows letters and `WORDS`."""
    from transformers import T5Tokenizer

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -8.0)]
    vocab += [(chr(code), -12.0) for code in range(33, 127) if chr(code) not in "<>"]
    vocab += [(f"▁{word}", -3.0) for word in WORDS if len(word) > 1] + [("▁a", -2.0)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=max_length)


def _clip(tokenizer: Any, *, projection: bool = False, width: int = 32) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=37,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _t5(tokenizer: Any, *, multilingual: bool = False) -> Any:
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    arguments = {
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 37,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }
    if multilingual:
        return UMT5EncoderModel(UMT5Config(**arguments))
    return T5EncoderModel(T5Config(**arguments))


def _vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    arguments: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 32,
    }
    return AutoencoderKL(**(arguments | changes))


def _unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    arguments: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(arguments | changes))


def _ddim() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        steps_offset=1, set_alpha_to_one=False,
    )  # fmt: skip


def stable_diffusion() -> Any:
    from diffusers import StableDiffusionPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=_ddim(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    tokenizer = clip_tokenizer()
    unet = _unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=32 + 6 * 8,
        cross_attention_dim=64,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        text_encoder_2=_clip(tokenizer, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=_ddim(),
        add_watermarker=False,
    )


def stable_diffusion_3() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=_clip(tokenizer, projection=True, width=32),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, projection=True, width=32),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(t5),
        tokenizer_3=t5,
    )


def flux() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(t5),
        tokenizer_2=t5,
        transformer=transformer,
    )


def pixart() -> Any:
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    t5 = t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=3,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        norm_type="ada_norm_single",
    )
    return PixArtSigmaPipeline(
        tokenizer=t5,
        text_encoder=_t5(t5),
        vae=_vae(),
        transformer=transformer,
        scheduler=_ddim(),
    )


def wan() -> Any:
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )

    t5 = t5_tokenizer()
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000,
        flow_shift=3.0,
    )  # fmt: skip
    return WanPipeline(
        tokenizer=t5,
        text_encoder=_t5(t5, multilingual=True),
        vae=vae,
        transformer=transformer,
        scheduler=scheduler,
    )


def sana() -> Any:
    from diffusers import (
        AutoencoderDC,
        FlowMatchEulerDiscreteScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )

    tokenizer = t5_tokenizer()
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        attention_head_dim=8, num_cross_attention_heads=2, cross_attention_head_dim=8,
        cross_attention_dim=16, caption_channels=16, sample_size=16,
    )  # fmt: skip
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=_gemma(tokenizer),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def qwen() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = t5_tokenizer(max_length=2048)
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16,
                "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
                "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
                "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
                "rope_theta": 1e6,
            },
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                "out_hidden_size": 16, "patch_size": 14, "fullatt_block_indexes": [0],
            },
            vision_start_token_id=2, vision_end_token_id=2, vision_token_id=2, image_token_id=2,
            video_token_id=2,
        )
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _gemma(tokenizer: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
            pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip


def ltx2() -> Any:
    """Video with sound of 2 channels."""
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    tokenizer = t5_tokenizer()
    vae = AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
        patch_size=1, decoder_causal=False,
    )  # fmt: skip
    audio_vae = AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2,
        mel_bins=8,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=16, upsample_kernel_sizes=[20, 32],
        upsample_factors=[10, 16],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3]], output_sampling_rate=16_000,
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=3, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=16,
        rope_type="split",
    )  # fmt: skip
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8,
        cross_attention_dim=16, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8,
        num_layers=2, caption_channels=16, rope_type="split",
    )  # fmt: skip
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=_gemma(tokenizer),
        tokenizer=tokenizer,
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )


def stable_audio() -> Any:
    """Sound of 2 channels, at most 0.64 s at 800 Hz."""
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    t5 = t5_tokenizer()
    transformer = StableAudioDiTModel(
        sample_size=256, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, num_key_value_attention_heads=2, cross_attention_dim=16,
        time_proj_dim=8, global_states_input_dim=16, cross_attention_input_dim=8,
    )  # fmt: skip
    vae = AutoencoderOobleck(
        encoder_hidden_size=8, downsampling_ratios=[1, 2], decoder_channels=4,
        decoder_input_channels=4, channel_multiples=[1, 2], sampling_rate=800,
    )  # fmt: skip
    return StableAudioPipeline(
        vae=vae,
        text_encoder=_t5(t5),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=32, conditioning_dim=8, min_value=0, max_value=4
        ),
        tokenizer=t5,
        transformer=transformer,
        scheduler=EDMDPMSolverMultistepScheduler(
            solver_order=2, sigma_data=1.0, prediction_type="v_prediction"
        ),
    )


def stable_video() -> Any:
    """An image becomes a video; there is no prompt."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    unet = UNetSpatioTemporalConditionModel(
        sample_size=16, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=2, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
        num_frames=3,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=224, patch_size=112, intermediate_size=16,
    )  # fmt: skip
    return StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2
        ),
        image_encoder=CLIPVisionModelWithProjection(vision),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True,
            sigma_max=700.0, sigma_min=0.002, timestep_spacing="leading", steps_offset=1,
        ),
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224),
    )  # fmt: skip


def marigold() -> Any:
    """A picture's depth; there is no prompt."""
    from diffusers import MarigoldDepthPipeline

    tokenizer = clip_tokenizer()
    return MarigoldDepthPipeline(
        unet=_unet(in_channels=8),
        vae=_vae(),
        scheduler=_ddim(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        prediction_type="depth",
        scale_invariant=True,
        shift_invariant=True,
        default_denoising_steps=2,
        default_processing_resolution=32,
    )


def unconditional() -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    return DDPMPipeline(unet, DDPMScheduler())


def video_to_video() -> Any:
    """AnimateDiff on Stable Diffusion's components: a video becomes another."""
    from diffusers import AnimateDiffVideoToVideoPipeline, MotionAdapter

    tokenizer = clip_tokenizer()
    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=4,
        motion_num_attention_heads=2,
    )  # fmt: skip
    return AnimateDiffVideoToVideoPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(),
        motion_adapter=adapter,
        scheduler=_ddim(),
    )


#: kind → builder of a pipeline in memory.
KINDS: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "pixart": pixart,
    "wan": wan,
    "sana": sana,
    "qwen": qwen,
    "ltx2": ltx2,
    "stable_audio": stable_audio,
    "stable_video": stable_video,
    "video_to_video": video_to_video,
    "marigold": marigold,
    "unconditional": unconditional,
}

#: Those that make images or frames from a prompt alone.
FROM_TEXT = sorted(
    set(KINDS) - {"stable_audio", "stable_video", "video_to_video", "marigold", "unconditional"}
)

#: Those that `--placement staged` takes: of LTX-2 it refuses the sound's decoder by name.
IN_STAGES = [kind for kind in FROM_TEXT if kind != "ltx2"]
