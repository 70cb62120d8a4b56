"""Images in flight do not see each other's state, or their pipeline is refused by name."""

import itertools
import time

import numpy as np
import pytest
import torch
from torch import nn

from ddinfer.config import JobConfig
from ddinfer.engines.select import check_stages
from ddinfer.errors import RankError, UsageError
from ddinfer.parallel.continuous.pipeline import ContinuousPipeline
from tests.ranks import run_ranks
from tests.test_continuous import equal_to_uncut, in_pipeline, job_for, make_pipe
from tests.tiny_pipelines import FROM_TEXT


def make_pag():
    from diffusers import StableDiffusionPAGPipeline

    return StableDiffusionPAGPipeline(**make_pipe("sd").components, pag_applied_layers="mid_block")


def make_hunyuan():
    from diffusers import (
        AdaptiveProjectedMixGuidance,
        AutoencoderKLHunyuanImage,
        FlowMatchEulerDiscreteScheduler,
        HunyuanImagePipeline,
        HunyuanImageTransformer2DModel,
    )

    torch.manual_seed(0)
    return HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKLHunyuanImage(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32),
            layers_per_block=1, spatial_compression_ratio=1, sample_size=8, scaling_factor=0.5,
        ).eval(),
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=HunyuanImageTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
            num_layers=2, num_single_layers=2, num_refiner_layers=1, patch_size=(1, 1),
            text_embed_dim=16, text_embed_2_dim=16, rope_axes_dim=(8, 8),
        ).eval(),
        guider=AdaptiveProjectedMixGuidance(
            guidance_scale=3.5, adaptive_projected_guidance_momentum=-0.5,
            adaptive_projected_guidance_start_step=1,
        ),
    )  # fmt: skip


def hunyuan_job(seed):
    def text(offset, length):
        generator = torch.Generator().manual_seed(seed + offset)
        return torch.randn(1, length, 16, generator=generator)

    def job(pipe):
        return pipe(
            prompt_embeds=text(0, 6), prompt_embeds_mask=torch.ones(1, 6),
            prompt_embeds_2=text(10, 4), prompt_embeds_mask_2=torch.ones(1, 4),
            negative_prompt_embeds=text(20, 6), negative_prompt_embeds_mask=torch.ones(1, 6),
            negative_prompt_embeds_2=text(30, 4), negative_prompt_embeds_mask_2=torch.ones(1, 4),
            num_inference_steps=2 + seed % 3, height=8, width=8, output_type="np",
            generator=torch.Generator().manual_seed(seed),
        ).images[0]  # fmt: skip

    return job


# --- refused -------------------------------------------------------------------------------------


def pag_on_ranks(group):
    pipe = make_pag()
    with pytest.raises((UsageError, RankError), match="StableDiffusionPAGPipeline cannot have"):
        ContinuousPipeline(pipe)
    return True


def test_a_pag_pipeline_is_refused_by_name_on_every_rank():
    assert run_ranks(pag_on_ranks, 2) == [True, True]


def test_a_pag_pipeline_is_refused_before_a_folder_is_made(tmp_path):
    make_pag().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="_set_pag_attn_processor"):
        check_stages(str(tmp_path), JobConfig(pipeline_parallel=2))


class Swapping:
    """A pipeline whose call replaces an attribute of its denoiser, as PAG does."""

    def __init__(self, model, change):
        self.components = {"transformer": model}
        self.transformer, self.change = model, change

    def __call__(self):
        self.change(self.transformer.blocks[1])
        return self.transformer(torch.ones(1, 4))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(4, 4), 1.0

    def forward(self, x):
        return self.linear(x) * self.scale


class TwoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Scaled() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def set_scale(block):
    block.scale = 2.0


def delete_scale(block):
    del block.scale


def add_hook(block):
    block.linear.register_forward_hook(lambda module, args, output: output * 2)


def swapping_on_ranks(group, changes):
    messages = []
    for change in changes:
        pipeline = ContinuousPipeline(Swapping(TwoBlocks().eval(), change))
        before = nn.Module.__setattr__
        messages += [str(outcome.error) for outcome in pipeline.run([lambda pipe: pipe()])]
        assert nn.Module.__setattr__ is before
    return messages


def test_a_call_that_changes_its_denoiser_fails_by_name():
    changes = [set_scale, delete_scale, add_hook]
    messages = run_ranks(swapping_on_ranks, 2, changes)[0]
    expected = ["transformer.blocks.1: scale", "transformer.blocks.1: scale"]
    expected += ["transformer.blocks.1.linear: register_forward_hook"]
    assert len(messages) == 3
    for message, what in zip(messages, expected, strict=True):
        assert f"Swapping changes its denoiser during a call ({what})" in message


def test_what_cannot_be_copied_for_each_image_is_refused():
    pipe = Swapping(TwoBlocks().eval(), set_scale)
    pipe.lines = (line for line in "abc")
    with pytest.raises(UsageError, match=r"Swapping\.lines cannot be copied"):
        ContinuousPipeline(pipe)


# --- each image has its own ----------------------------------------------------------------------


def hunyuan_on_ranks(group):
    jobs = [hunyuan_job(seed) for seed in range(6)]
    outcomes = in_pipeline(make_hunyuan(), jobs, num_in_flight=4)
    if outcomes is None:
        return None
    uncut = make_hunyuan()
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [
        np.array_equal(job(uncut), outcome.value)
        for job, outcome in zip(jobs, outcomes, strict=True)
    ]


def test_guiders_of_images_in_flight_are_apart():
    assert run_ranks(hunyuan_on_ranks, 2) == [[True] * 6, None]


def half_on_ranks(group):
    def make():
        return make_pipe("sdxl").to(torch.float16)

    pipe = make()
    # As slow as real decoding is next to a step: the others make theirs meanwhile.
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: time.sleep(0.2))
    jobs = [job_for("sdxl", k, num_inference_steps=1 + k % 3) for k in range(4)]
    outcomes = in_pipeline(pipe, jobs, num_in_flight=4)
    if outcomes is None:
        return None
    uncut = make()
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [np.array_equal(job(uncut), o.value) for job, o in zip(jobs, outcomes, strict=True)]


def test_a_vae_that_is_converted_to_decode_does_so_for_one_image_at_a_time():
    assert run_ranks(half_on_ranks, 2) == [[True] * 4, None]


# --- what a call changes, in every family --------------------------------------------------------


def state_of(pipe):
    """Everything that a call could leave on a pipeline, its components and their modules."""
    found = {}
    for name, value in vars(pipe).items():
        found["pipe", name] = id(value)
    for name, component in pipe.components.items():
        modules = dict(component.named_modules()) if isinstance(component, nn.Module) else {}
        for path, module in (modules or {"": component}).items():
            for attribute, value in getattr(module, "__dict__", {}).items():
                if attribute in ("_parameters", "_buffers"):
                    value = [(k, id(v), v is not None and v._version) for k, v in value.items()]
                elif isinstance(value, (dict, list, set)):
                    value = [id(value), *map(id, value)]
                elif not isinstance(value, (bool, int, float, str)):
                    value = id(value)
                found[name, path, attribute] = value
    return found


def changed_by_a_call(pipe, kind):
    """(component, module, attribute) of what differs between two denoiser calls, or before."""
    job_for(kind, 0, guidance_scale=2.0)(pipe)  # fills caches that do not depend on the image
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    seen = []
    denoiser.register_forward_pre_hook(lambda module, args: seen.append(state_of(pipe)))
    seen.append(state_of(pipe))
    job_for(kind, 1, guidance_scale=2.0)(pipe)
    seen.append(state_of(pipe))
    pairs = itertools.pairwise(seen)
    changed = {key for a, b in pairs for key in a | b if a.get(key) != b.get(key)}
    assert any(key[0] == "scheduler" for key in changed)
    return {key for key in changed if key[0] not in ("pipe", "scheduler")}  # each has a copy


@pytest.mark.parametrize("kind", FROM_TEXT)
def test_a_call_changes_nothing_that_images_share(kind):
    # Wan's VAEs keep these while they decode, which one image at a time does.
    decoding = {"_feat_map", "_conv_num", "_conv_idx", "_enc_feat_map", "_enc_conv_num"}
    decoding |= {"_enc_conv_idx"}
    changed = changed_by_a_call(make_pipe(kind), kind)
    assert {key for key in changed if key[-1] not in decoding} == set()


def test_the_comparison_of_states_notices_perturbed_attention():
    assert "processor" in {attribute for _, _, attribute in changed_by_a_call(make_pag(), "sd")}


def settings_on_ranks(group):
    found = {}
    for kind in ("sd", "qwen"):
        jobs = [
            job_for(kind, k, num_inference_steps=1 + k % 3, **guidance)
            for k, guidance in enumerate(
                [
                    {},
                    {"negative_prompt": "blue"},
                    {"num_images_per_prompt": 2},
                    {"height": 64},
                    {"negative_prompt": "a dog", "width": 64},
                ]
            )
        ]
        outcomes = in_pipeline(make_pipe(kind), jobs, num_in_flight=4)
        if outcomes is not None:
            found[kind] = equal_to_uncut(kind, jobs, outcomes)
    return found or None


def test_images_of_different_settings_are_apart():
    assert run_ranks(settings_on_ranks, 2) == [{"sd": [True] * 5, "qwen": [True] * 5}, None]
