"""Stages of pipelines that go about it in ways of their own."""

import pytest
import torch

from ddinfer.engines.staged import StagedEngine
from ddinfer.engines.whole import WholeEngine
from ddinfer.models.loading import load_pipeline
from ddinfer.models.pipeline_folder import PipelineSource
from ddinfer.models.stages import StagedPipeline
from ddinfer.request import Prompt, resolve_requests
from tests.test_staged import pictures
from tests.tiny_pipelines import _t5, _vae, stable_diffusion, t5_tokenizer


def ltx():
    """A video pipeline that mixes noise into the latents before it decodes, with a timestep."""
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    t5 = t5_tokenizer()
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, patch_size=1, patch_size_t=1, num_attention_heads=4,
        attention_head_dim=8, cross_attention_dim=32, num_layers=1, caption_channels=32,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4, timestep_conditioning=True, patch_size=1, patch_size_t=1,
    )  # fmt: skip
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=_t5(t5),
        tokenizer=t5,
        transformer=transformer,
    )


def zimage():
    """Its embeddings are lists of tensors, one for each prompt, of unequal lengths."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        ZImagePipeline,
        ZImageTransformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = t5_tokenizer(512)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0,
            bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=2,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(
            latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


def ancestral():
    """A scheduler that draws from the generator in every step."""
    from diffusers import EulerAncestralDiscreteScheduler

    pipe = stable_diffusion()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def watched():
    """A safety checker looks at what was decoded; this one finds nothing."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    pipe = stable_diffusion()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = small | {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(
        text_config=small | {"num_attention_heads": 2}, vision_config=vision, projection_dim=16
    )
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(2.0)
        checker.special_care_embeds_weights.fill_(2.0)
    pipe.register_modules(
        safety_checker=checker,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
    )
    pipe.register_to_config(requires_safety_checker=True)
    return pipe


CASES = {
    "ltx": (ltx, {"num_frames": 9, "decode_timestep": 0.05, "decode_noise_scale": 0.025}),
    "zimage": (zimage, {"max_sequence_length": 16}),
    "ancestral": (ancestral, {}),
    "watched": (watched, {}),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("name", sorted(CASES))
def test_images_are_those_of_the_whole_engine(name, tmp_path):
    make, fields = CASES[name]
    torch.manual_seed(0)
    pipe = make()
    for model in pipe.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval()
    pipe.save_pretrained(tmp_path)
    common = {"negative_prompt": "a dog", "num_inference_steps": 2, "height": 32, "width": 32}
    texts = ("a cat", "two stones in a house", "a bird")
    requests = resolve_requests([Prompt({"prompt": t, **common, **fields}) for t in texts])

    def staged(requests):
        pipeline = StagedPipeline(PipelineSource(tmp_path), "auto", {"cpu": 10**10})
        return pictures(StagedEngine(pipeline).run([requests[:1], requests[1:]]))

    whole = load_pipeline(tmp_path)
    whole.set_progress_bar_config(disable=True)
    made = staged(requests)
    assert made == pictures(WholeEngine(whole).run([requests[:1], requests[1:]]))
    other = resolve_requests(
        [Prompt({"prompt": t, **common, **fields}) for t in texts], base_seed=9
    )
    assert all(picture != made[k] for k, picture in staged(other).items())
