"""Plans of a denoiser or model that is cut at its blocks: what decides them, what breaks them."""

import numpy as np
import pytest
import torch
from torch import nn

from ddinfer.errors import RankError, UsageError
from ddinfer.parallel.continuous.pipeline import ContinuousPipeline
from ddinfer.parallel.flow import PlanError, call_key
from ddinfer.parallel.prepare import prepare_pipeline
from tests.ranks import run_ranks
from tests.test_continuous import Loop


def test_two_large_arrays_are_two_kinds_of_call():
    arrays = [np.zeros(2000), np.zeros(2000)]
    arrays[1][1000] = 1  # within what repr leaves out
    assert call_key((arrays[0],), {}) != call_key((arrays[1],), {})
    assert call_key((arrays[0],), {}) == call_key((arrays[0].copy(),), {})


# --- contents that decide -----------------------------------------------------------------------


class Deciding(nn.Module):
    """Blocks, of which later ones run differently by what a float input holds."""

    def __init__(self, decide):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.decide = decide

    def forward(self, hidden_states, flag, timestep, return_dict=False):
        x = hidden_states
        for block in self.blocks:
            x = block(x) + self.decide(flag)
        return (x,)


DECISIONS = {
    "equal": lambda flag: 100.0 if torch.equal(flag, torch.ones(4)) else 0.0,
    "allclose": lambda flag: 100.0 if torch.allclose(flag, torch.ones(4)) else 0.0,
    "mask": lambda flag: float(len(flag[flag > 0])),
    "where": lambda flag: float(len(torch.where(flag > 0)[0])),
    "argwhere": lambda flag: float(len(torch.argwhere(flag > 0))),
    "repeat": lambda flag: float(len(torch.repeat_interleave(flag.long()))),
    "bincount": lambda flag: float(len(torch.bincount(flag.long()))),
    "tolist": lambda flag: flag.tolist()[0],
    "numpy": lambda flag: float(flag.numpy()[0]),
    "bool": lambda flag: 1.0 if flag.sum() > 3 else 0.0,
}


def decisions_on_ranks(group):
    found = {}
    flags = [torch.ones(4), torch.zeros(4), torch.tensor([1.0, 0.0, 0.0, 2.0])]
    for name, decide in DECISIONS.items():
        pipeline = ContinuousPipeline(Loop(Deciding(decide).eval()))
        jobs = [
            lambda pipe, k=k, flag=flag: pipe(
                2, hidden_states=torch.full((1, 8), 1.0 + k), flag=flag, timestep=torch.ones(1)
            )
            for k, flag in enumerate(flags)
        ]
        outcomes = {o.number: o for o in pipeline.run(jobs)}
        if not group.group_rank:
            uncut = Loop(Deciding(decide).eval())
            assert [o.error for o in outcomes.values()] == [None] * 3, name
            found[name] = [
                np.array_equal(job(uncut), outcomes[k].value) for k, job in enumerate(jobs)
            ]
    return found


def test_an_input_whose_contents_decide_reaches_every_stage():
    assert run_ranks(decisions_on_ranks, 2)[0] == {name: [True] * 3 for name in DECISIONS}


# --- failures between two ranks ------------------------------------------------------------------


class Growing(nn.Module):
    """A block that returns another shape than planned when its input is large."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        x = self.linear(x)
        is_large = type(x) is torch.Tensor and float(x.abs().max()) > 1000
        return torch.cat([x, x]) if is_large else x


class Stages(nn.Module):
    def __init__(self, growing):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Growing() if growing else nn.Linear(8, 8) for _ in range(6))

    def forward(self, hidden_states, timestep, return_dict=False):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (hidden_states,)


def unlike_the_plan_on_ranks(group, in_flight):
    pipeline = ContinuousPipeline(Loop(Stages(True).eval()), num_in_flight=in_flight)
    jobs = [
        lambda pipe, size=size: pipe(
            2, hidden_states=torch.full((1, 8), size), timestep=torch.ones(1)
        )
        for size in (1.0, 1e6, 2.0, 1e7, 3.0)
    ]
    outcomes = {o.number: o for o in pipeline.run(jobs)}
    return {n: str(o.error).splitlines()[0] for n, o in outcomes.items() if o.error is not None}


@pytest.mark.parametrize("in_flight", [3, 6])
def test_a_value_unlike_its_plan_fails_its_image_alone(in_flight):
    errors = run_ranks(unlike_the_plan_on_ranks, 3, in_flight)[0]
    assert sorted(errors) == [1, 3]
    for message in errors.values():
        assert "rank 0 failed while running its stage: ValueError" in message
        assert "has shape (4, 8)" in message


# --- models that read contents, and lists of blocks that take turns ------------------------------


def make_mochi():
    from diffusers import MochiTransformer3DModel

    return MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=3,
        pooled_projection_dim=16, in_channels=12, text_embed_dim=16, time_embed_dim=4,
        max_sequence_length=16,
    )  # fmt: skip


def make_hidream():
    from diffusers import HiDreamImageTransformer2DModel

    return HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=8, num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64,
        num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32), llama_layers=(0, 1),
    )  # fmt: skip


@pytest.mark.parametrize("make", [make_mochi, make_hidream])
def test_models_known_to_read_contents_are_refused_before_anything_runs(make):
    model = make().eval()
    with pytest.raises(UsageError, match=f"{type(model).__name__} cannot be cut into stages"):
        ContinuousPipeline(Loop(model))


class Selecting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x[x[:, 0] > 0])


class SelectingBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Selecting() for _ in range(2))

    def forward(self, hidden_states, timestep, return_dict=False):
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (hidden_states,)


def test_a_block_whose_output_depends_on_contents_is_named():
    pipeline = ContinuousPipeline(Loop(SelectingBlocks().eval()))
    job = lambda pipe: pipe(1, hidden_states=torch.ones(1, 8), timestep=torch.ones(1))  # noqa: E731
    (outcome,) = pipeline.run([job])
    assert isinstance(outcome.error, PlanError)
    assert "block blocks.0 of SelectingBlocks reads the contents of its inputs" in str(
        outcome.error
    )


def make_latte():
    from diffusers import LatteTransformer3DModel

    torch.manual_seed(0)
    return LatteTransformer3DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=4,
        attention_bias=True, num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, video_length=2,
    ).eval()  # fmt: skip


def latte_job(number):
    def job(pipe):
        generator = torch.Generator().manual_seed(number)
        return pipe(
            2, hidden_states=torch.randn(1, 4, 2, 8, 8, generator=generator),
            encoder_hidden_states=torch.randn(1, 8, 32, generator=generator),
            timestep=torch.ones(1),
        )  # fmt: skip

    return job


def latte_on_ranks(group):
    jobs = [latte_job(number) for number in range(3)]
    outcomes = {o.number: o for o in ContinuousPipeline(Loop(make_latte())).run(jobs)}
    if group.group_rank:
        return None
    assert [o.error for o in outcomes.values()] == [None] * 3
    uncut = Loop(make_latte())
    return [np.array_equal(job(uncut), outcomes[k].value) for k, job in enumerate(jobs)]


def test_lists_of_blocks_that_take_turns_are_cut_in_the_order_in_which_they_run():
    assert run_ranks(latte_on_ranks, 2)[0] == [True] * 3


# --- prepare_pipeline ---------------------------------------------------------------------------


class Flagged(nn.Module):
    """Runs its blocks by flags; with a 2 among them it looks at what a block made."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, flags):
        chosen = flags.tolist()
        for block, flag in zip(self.blocks, chosen, strict=True):
            x = torch.relu(block(x)) if flag else torch.tanh(block(x))
            if flag == 2 and bool(x.sum() > 0):
                x = -x
        return x


def flagged_on_ranks(group):
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    example = torch.tensor([group.group_rank, 1, 0, 1])  # each rank has another
    pipe = prepare_pipeline(Flagged().eval(), (x, example), batched=["x"], gather_output=True)
    equal = []
    for flags in ([0, 1, 0, 1], [1, 1, 0, 1], [1, 0, 0, 0], [2, 0, 0, 0], [0, 0, 1, 1]):
        flags = torch.tensor(flags)
        try:
            equal.append(torch.equal(pipe(x, flags), Flagged().eval()(x, flags)))
        except RankError as error:
            equal.append(f"rank {error.rank}")
        except PlanError as error:
            equal.append(type(error).__name__)
    return equal


def test_the_first_ranks_plan_counts_and_its_failure_has_its_name():
    first, second = run_ranks(flagged_on_ranks, 2)
    assert first == [True, True, True, "PlanError", True]
    assert second == [True, True, True, "rank 0", True]
