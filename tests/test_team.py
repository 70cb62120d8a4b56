"""One image on several ranks: bit for bit what one rank makes, whatever is split."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddinfer.errors import RankError, UsageError
from ddinfer.models.loading import denoisers
from ddinfer.parallel.communicator import Communicator
from ddinfer.parallel.team.attention import AttentionAxes, attend, gather
from ddinfer.parallel.team.deferred import Deferred
from ddinfer.parallel.team.exchange import CallAborted, Exchange
from ddinfer.parallel.team.rows import (
    cut_rows,
    difference_beyond_rounding,
    join_rows,
    num_rows,
)
from ddinfer.parallel.team.shares import Shares
from ddinfer.parallel.team.team import Team
from tests.ranks import run_ranks
from tests.tiny_pipelines import FROM_TEXT, KINDS, call_arguments

TRANSFORMERS = ["flux", "sd3", "pixart", "qwen", "wan"]
#: Two calls a step instead of a doubled batch.
TWO_CALLS = {"flux", "qwen", "wan"}


def make_pipe(kind):
    torch.manual_seed(0)
    pipe = KINDS[kind]()
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, kind, seed=0, **changes):
    """The final latents, with guidance."""
    arguments = {"prompt": "a red cat", **call_arguments(kind), "num_inference_steps": 3}
    if kind in ("flux", "qwen"):
        arguments |= {"negative_prompt": "a dog", "true_cfg_scale": 3.0}
    if kind == "wan":  # else a rank has fewer than four tokens
        arguments |= {"height": 64, "width": 64}
    generator = torch.Generator("cpu").manual_seed(seed)
    made = pipe(generator=generator, output_type="latent", **arguments | changes)
    return made.frames if hasattr(made, "frames") else made.images


def alone(group):
    return Communicator((group.group_rank,), 0, group.device)


def draw_in_team(group, pipe, kind, cfg, sequence, is_alone=False, **changes):
    """The latents on the leader, the split undone; ``None`` elsewhere."""
    comm = alone(group) if is_alone else Communicator.of()
    team = Team(denoisers(pipe), comm, cfg_parallel=cfg, sequence_parallel=sequence)
    try:
        if not team.is_leader:
            return team.serve()
        with team.leading():
            return draw(pipe, kind, **changes)
    finally:
        team.detach()


def differences(group, kinds, cfg, sequence):
    """Kind → difference from plain diffusers, and from the same option on one rank."""
    found = {}
    for kind in kinds:
        pipe = make_pipe(kind)
        team = draw_in_team(group, pipe, kind, cfg, sequence)
        if group.group_rank == 0:
            plain = draw(pipe, kind)
            split = draw_in_team(group, pipe, kind, cfg, 1, is_alone=True)
            other = draw(pipe, kind, seed=1)
            assert float((other - plain).abs().max()) > 0.1, "nothing could differ"
            found[kind] = tuple(float((team - base).abs().max()) for base in (plain, split))
    return found


# --- whole pipelines ----------------------------------------------------------------------------


def is_row_invariant():
    """Whether this CPU computes a row of a matrix product alike among 4 and among 16 rows."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(16, 32, generator=generator) for _ in range(2))
    return torch.equal(F.linear(x, w)[:4], F.linear(x[:4], w))


def bound(exact=0.0, rounding=2e-5):
    return exact if is_row_invariant() else rounding


def test_guidance_calls_on_two_ranks_are_those_of_one_rank():
    kinds = ["flux", "sd3", "sd"]
    found = run_ranks(differences, 2, kinds, 2, 1)[0]
    assert {kind: split for kind, (_, split) in found.items()} == dict.fromkeys(kinds, 0.0)
    for kind, (plain, _) in found.items():
        assert plain <= (0.0 if kind in TWO_CALLS else 5e-5), kind


def test_tokens_on_two_ranks_are_those_of_plain_diffusers():
    found = run_ranks(differences, 2, TRANSFORMERS, 1, 2)[0]
    assert all(plain <= bound() for plain, _ in found.values()), found


def test_both_on_four_ranks():
    found = run_ranks(differences, 4, ["flux"], 2, 2)[0]
    assert all(split <= bound() for _, split in found.values()), found


@pytest.mark.nightly
@pytest.mark.parametrize(("cfg", "sequence"), [(2, 1), (3, 1), (1, 3), (1, 4), (2, 2)])
def test_every_family_on_more_ranks(cfg, sequence):
    kinds = TRANSFORMERS if sequence > 1 else FROM_TEXT
    found = run_ranks(differences, cfg * sequence, kinds, cfg, sequence)[0]
    assert all(split <= bound(3e-6 if sequence == 3 else 0.0) for _, split in found.values()), found


def prompts_of_a_batch(group):
    pipe, more = make_pipe("sd3"), {"prompt": ["a cat", "two red birds"], "generator": None}

    def seeded(number):
        return torch.Generator("cpu").manual_seed(number)

    team = Team(denoisers(pipe), Communicator.of(), cfg_parallel=2)
    if not team.is_leader:
        return team.serve()
    arguments = {**call_arguments("sd3"), **more, "output_type": "latent"}
    with team.leading():
        made = pipe(**{**arguments, "generator": [seeded(1), seeded(2)]}).images
    team.detach()
    plain = pipe(**{**arguments, "generator": [seeded(1), seeded(2)]}).images
    return float((made - plain).abs().max())


def test_a_batch_of_prompts_is_split_by_rows_too():
    assert run_ranks(prompts_of_a_batch, 2)[0] < 5e-5


def what_is_refused(group, kind, cfg, sequence):
    pipe = make_pipe(kind)
    try:
        draw_in_team(group, pipe, kind, cfg, sequence)
    except (UsageError, RankError) as error:
        return type(error).__name__, str(error)


def test_a_block_that_tokens_cannot_be_split_in_is_refused_by_name_on_every_rank():
    leader, member = run_ranks(what_is_refused, 2, "sana", 1, 2)
    assert leader[0] == "UsageError"
    assert "cannot split transformer.transformer_blocks.0 (SanaTransformerBlock)" in leader[1]
    assert member[0] == "RankError"
    assert "rank 0 failed while running the denoiser" in member[1]


def test_a_unet_is_refused_before_its_first_call():
    told = run_ranks(what_is_refused, 2, "sd", 1, 2)
    assert all("is a UNet2DConditionModel, a UNet. Use --cfg_parallel" in text for _, text in told)


def test_another_number_of_ranks_is_refused_with_the_numbers():
    ((_, text), _) = run_ranks(what_is_refused, 2, "flux", 2, 2)
    assert "expected 4 ranks, found 2" in text


def few_tokens(group):
    pipe = make_pipe("wan")
    try:
        draw_in_team(group, pipe, "wan", 1, 2, height=16, width=16)
    except (UsageError, RankError) as error:
        return str(error)


def test_too_few_tokens_for_the_ranks_are_refused():
    told = run_ranks(few_tokens, 2)
    assert "has 2 image tokens, expected at least 4 for each rank" in told[0]


def families_on_ranks(group):
    from docs.make_exactness import measure

    return measure()


@pytest.mark.nightly
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_every_family_on_the_page_is_as_exact_as_it_says(num_ranks):
    """Never silently wrong: refused, or equal up to rounding; `== 0` where two ranks divide all."""
    found = run_ranks(families_on_ranks, num_ranks)[0]
    made = {family: float(told) for family, told in found.items() if "refused" not in told}
    assert len(made) >= 15
    assert max(made.values()) <= 1e-6
    if num_ranks == 2 and is_row_invariant():
        assert [made[family] for family in ("Flux", "SD3", "PixArt", "Wan", "LTX-Video")] == [0] * 5


def test_masks_and_unequal_lengths_in_two_more_families():
    found = run_ranks(two_families, 2)[0]
    assert found == {"Chroma": True, "LTX-Video": True}


def two_families(group):
    from tests.transformers import TRANSFORMERS

    found = {}
    for family in ("Chroma", "LTX-Video"):
        torch.manual_seed(0)
        model, arguments = TRANSFORMERS[family]()
        team = Team({"transformer": model.eval()}, Communicator.of(), sequence_parallel=2)
        if not team.is_leader:
            team.serve()
            continue
        with team.leading():
            made = model(**arguments, return_dict=False)[0]
        team.detach()
        with torch.no_grad():
            whole = model(**arguments, return_dict=False)[0]
        found[family] = float((made - whole).abs().max()) <= bound(rounding=1e-6)
    return found


# --- blocks of our own: what the comparison with the whole block finds --------------------------


class Block(nn.Module):
    def __init__(self, mixes=""):
        super().__init__()
        self.linear, self.mixes = nn.Linear(16, 48), mixes

    def forward(self, hidden_states, mask=None):
        shape = (*hidden_states.shape[:2], 2, 8)
        q, k, v = (
            t.reshape(shape).transpose(1, 2) for t in self.linear(hidden_states).chunk(3, -1)
        )
        if mask is not None:
            mask = mask[:, None, None, :]
        made = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        if self.mixes == "mean":
            made = made + made.mean(dim=1, keepdim=True)
        if self.mixes == "cumsum":
            made = made.cumsum(dim=1)
        if self.mixes == "in place":
            hidden_states.add_(made)
        if self.mixes == "order":
            made = made.flip(1)
        return hidden_states + made


class Model(nn.Module):
    def __init__(self, mixes=""):
        super().__init__()
        self.blocks = nn.ModuleList([Block(mixes) for _ in range(2)])

    def forward(self, hidden_states, mask=None):
        for block in self.blocks:
            hidden_states = block(hidden_states, mask=mask)
        return hidden_states


def model_in_team(group, mixes, with_mask):
    torch.manual_seed(0)
    model, x = Model(mixes), torch.randn(1, 19, 16)
    mask = torch.arange(19)[None] < 15 if with_mask else None
    team = Team({"transformer": model}, Communicator.of(), sequence_parallel=group.group_size)
    try:
        if not team.is_leader:
            return team.serve()
        with team.leading():
            made = model(x, mask=mask)
        team.detach()
        with torch.no_grad():
            return float((model(x, mask=mask) - made).abs().max())
    except (UsageError, RankError) as error:
        return str(error)


@pytest.mark.parametrize("mixes", ["mean", "cumsum", "order"])
def test_a_block_that_mixes_its_tokens_is_refused(mixes):
    told = run_ranks(model_in_team, 2, mixes, False)[0]
    assert "transformer.blocks.0 (Block) by tokens: output 0 was compared" in told


def test_a_block_that_writes_into_its_inputs_is_refused():
    told = run_ranks(model_in_team, 2, "in place", False)[0]
    assert "it changes its inputs in place" in told


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_mask_of_keys_and_heads_that_do_not_divide(num_ranks):
    assert run_ranks(model_in_team, num_ranks, "", True)[0] <= bound(1e-6)


# --- attention ----------------------------------------------------------------------------------


def attention_of(group, shape, mask_kind, joint):
    """Largest difference of this rank's rows from attention over all tokens."""
    batch, heads, key_heads, text, image, width = shape
    torch.manual_seed(0)
    length = text + image
    q = torch.randn(batch, heads, length, width)
    k, v = (torch.randn(batch, key_heads, length, width) for _ in range(2))
    mask = None
    if mask_kind != "none":
        sizes = {
            "keys": (batch, 1, 1, length),
            "pairs": (batch, 1, length, length),
            "heads": (batch, heads, length, length),
            "bias": (length, length),
        }
        mask = torch.rand(sizes[mask_kind]) > 0.3
        mask[..., 0] = True  # no row without a key
        mask = torch.randn(mask.shape) if mask_kind == "bias" else mask
    axis = ("text", "image") if joint else ("image",)
    lengths = {"text": text, "image": image} if joint else {"image": length}
    exchange = Exchange(Communicator.of(), range(group.group_size))
    shares = Shares(lengths, group.group_size, group.group_rank)
    options = {"enable_gqa": heads != key_heads}
    attention = F.scaled_dot_product_attention
    whole = attention(q, k, v, attn_mask=mask, **options)
    own = [shares.cut(t, 2, axis) for t in (q, k, v)]
    with exchange.call(0):
        axes = AttentionAxes(axis, axis)
        made = attend(exchange, shares, axes, attention, *own, attn_mask=mask, **options)
        joined = gather(exchange, shares, made, 2, axis)
    return float((joined - whole).abs().max())


SHAPES = [(1, 4, 4, 5, 11, 16), (2, 3, 3, 4, 9, 8), (2, 4, 2, 7, 8, 8)]


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from(["none", "keys", "pairs", "heads", "bias"]),
    st.booleans(),
    st.sampled_from([2, 3, 4]),
)
def test_attention_over_ranks_is_attention(shape, mask_kind, joint, num_ranks):
    found = run_ranks(attention_of, num_ranks, shape, mask_kind, joint)
    assert max(found) <= 1e-6


# --- deferred tensors ---------------------------------------------------------------------------


def deferred(value):
    fetches = []

    def fetch():
        fetches.append(1)
        return value

    like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return Deferred(like, value.device, fetch), fetches


@torch.no_grad()
def test_views_of_a_deferred_tensor_are_deferred_and_anything_else_reads_it_once():
    value = torch.arange(12.0).reshape(1, 4, 3)
    tensor, fetches = deferred(value)
    part = tensor[:, 1:].transpose(1, 2).unsqueeze(0)
    assert (part.shape, fetches) == ((1, 1, 3, 3), [])
    assert torch.equal(part + 0, value[:, 1:].transpose(1, 2).unsqueeze(0))
    assert torch.equal(tensor * 2, value * 2)
    assert np.array_equal((tensor - 1).numpy(), (value - 1).numpy())
    assert fetches == [1]
    assert type(tensor + tensor) is torch.Tensor


@torch.no_grad()
def test_what_is_written_into_a_deferred_tensor_is_read_from_it():
    value = torch.arange(4.0)
    tensor, _ = deferred(value.clone())
    tensor[1:3] += 10
    tensor.mul_(2)
    assert (tensor + 0).tolist() == [0.0, 22.0, 24.0, 6.0]
    assert tensor.sum().item() == 52.0


# --- rows ---------------------------------------------------------------------------------------


def test_rows_are_cut_where_there_are_rows():
    x, text = torch.arange(24.0).reshape(4, 2, 3), [torch.zeros(4, 1), torch.ones(4, 1)]
    kwargs = {"ids": torch.zeros(7, 3), "shapes": [[1], [2], [3], [4]], "text": text, "scale": 3.0}
    assert num_rows((x,), kwargs) == 4
    first, second = cut_rows((x,), kwargs, 4, 2)
    assert torch.equal(torch.cat([first[0][0], second[0][0]]), x)
    assert (first[1]["shapes"], second[1]["shapes"]) == ([[1], [2]], [[3], [4]])
    assert [t.shape for t in second[1]["text"]] == [(2, 1), (2, 1)]
    assert second[1]["ids"] is kwargs["ids"]
    assert torch.equal(join_rows([(first[0][0],), (second[0][0],)])[0], x)
    images = [torch.zeros(3, 1, 4, 4) for _ in range(3)]
    assert num_rows((images,), {}) == 3
    assert [len(args[0]) for args, _ in cut_rows((images,), {}, 3, 2)] == [2, 1]
    assert len(join_rows([images[:2], images[2:]])) == 3


# --- failures -----------------------------------------------------------------------------------


class _Fault(Exception):
    pass


def calls_with_a_fault(group, kind, cfg, sequence, who, at, in_image):
    """Three images, in the second of which one rank raises at its n-th exchange or call."""
    pipe = make_pipe(kind)
    team = Team(denoisers(pipe), Communicator.of(), cfg_parallel=cfg, sequence_parallel=sequence)
    swap, count = Exchange.swap, {"image": 0, "exchange": 0}

    def faulty(self, *args):
        count["exchange"] += 1
        if (count["image"], count["exchange"]) == (in_image, at):
            raise _Fault(f"at exchange {at}")
        return swap(self, *args)

    Exchange.swap = faulty if group.group_rank == who else swap
    run = Team._run

    def counted(self, number, args, kwargs):
        # The latents tell the members which image it is.
        mark = int(kwargs["joint_attention_kwargs"]["image"])
        if mark != count["image"]:
            count.update(image=mark, exchange=0)
        if at == 0 and group.group_rank == who and mark == in_image:
            raise _Fault("before the first exchange")
        return run(self, number, args, {**kwargs, "joint_attention_kwargs": None})

    Team._run = counted
    try:
        if not team.is_leader:
            return team.serve()
        made = []
        with team.leading():
            for image in range(3):
                more = {"joint_attention_kwargs": {"image": image}}
                try:
                    made.append(draw(pipe, kind, seed=image, **more))
                except (_Fault, RankError) as error:
                    made.append(f"{type(error).__name__}: {error}")
                team.drain()
    finally:
        Exchange.swap, Team._run = swap, run
        team.detach()
    plain = [draw(pipe, kind, seed=image) for image in range(3)]
    return [
        m if isinstance(m, str) else float((m - p).abs().max())
        for m, p in zip(made, plain, strict=True)
    ]


def run_faulty(num_ranks, *args):
    return run_ranks(calls_with_a_fault, num_ranks, *args, timeout_seconds=60)[0]


def fails_alone(made, in_image, who):
    """The image fails with the rank's own error, and the others are exact."""
    failed = made[in_image]
    assert isinstance(failed, str), made
    assert "_Fault" in failed
    assert who == 0 or f"rank {who} failed while running the denoiser" in failed
    assert [m for k, m in enumerate(made) if k != in_image] == [0.0, 0.0], made


@pytest.mark.parametrize(("who", "at"), [(0, 3), (1, 0), (1, 3)])
def test_an_image_that_fails_on_one_rank_fails_alone(who, at):
    made = run_faulty(2, "flux", 1, 2, who, at, 1)
    fails_alone(made, 1, who)


@pytest.mark.parametrize("who", [0, 1])
def test_a_fault_in_the_first_call_of_its_kind_ends_that_image_alone(who):
    made = run_faulty(2, "flux", 1, 2, who, 2, 0)
    fails_alone(made, 0, who)


@pytest.mark.nightly
@pytest.mark.parametrize("who", range(4))
@pytest.mark.parametrize("at", range(0, 22, 3))
def test_a_fault_at_any_exchange_of_four_ranks(who, at):
    made = run_faulty(4, "flux", 2, 2, who, at, 1)
    fails_alone(made, 1, who)


def aborted_first_call(group):
    exchange = Exchange(Communicator.of(), range(group.group_size))
    for kind, is_broken in ((0, True), (0, False), (1, True)):
        try:
            with exchange.call(kind):
                for number in range(3):
                    if is_broken and group.group_rank == 1 and number == 1:
                        raise _Fault
                    own = torch.full((2,), float(group.group_rank))
                    made = exchange.swap([own] * exchange.size, [(2,)] * exchange.size)
        except (_Fault, CallAborted) as error:
            made = type(error).__name__
        yield made if isinstance(made, str) else torch.stack(made).flatten().tolist()


def results_of_calls(group):
    return list(aborted_first_call(group))


def test_a_first_call_that_fails_is_aborted_on_all_ranks_and_the_next_goes_on():
    told = run_ranks(results_of_calls, 3)
    values = [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
    assert told[0] == told[2] == ["CallAborted", values, "CallAborted"]
    assert told[1] == ["_Fault", values, "_Fault"]


def test_outputs_that_are_equally_broken_are_equal():
    broken = torch.tensor([1.0, float("nan"), float("inf")])
    assert difference_beyond_rounding(broken, broken.clone()) is None
    other = torch.tensor([1.0, 2.0, float("inf")])
    assert "differs by nan" in difference_beyond_rounding(broken, other)
    assert "differs by 1, more than" in difference_beyond_rounding(other + 1, other)
