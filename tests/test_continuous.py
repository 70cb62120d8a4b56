"""the continuous pipeline against the uncut pipeline, bit for bit, on real ranks."""

import contextlib
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ddinfer.errors import RankError, UsageError
from ddinfer.parallel import plans
from ddinfer.parallel.continuous.pipeline import ContinuousPipeline
from ddinfer.parallel.flow import StagedModel
from ddinfer.parallel.packing import Layout
from tests.ranks import run_ranks
from tests.tiny_pipelines import KINDS, call_arguments

# --- pipelines and their pictures ---------------------------------------------------------------


def make_pipe(kind):
    torch.manual_seed(0)
    pipe = KINDS[kind]()
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def job_for(kind, number, **changes):
    """One image as a job: other prompts, steps and seeds for other numbers."""
    arguments = {"prompt": f"a red cat {'big ' * number}", **call_arguments(kind)}
    arguments |= {"num_inference_steps": 2 + number % 2} | changes
    seed = arguments.pop("seed", number)

    def job(pipe):
        generator = torch.Generator("cpu").manual_seed(seed)
        made = pipe(generator=generator, output_type="np", **arguments)
        return made.frames[0] if hasattr(made, "frames") else made.images[0]

    return job


def in_pipeline(pipe, jobs, **options):
    """What became of each job, in order; ``None`` on ranks other than the first."""
    pipeline = ContinuousPipeline(pipe, **options)
    outcomes = {outcome.number: outcome for outcome in pipeline.run(jobs)}
    pipeline.close()
    if not pipeline.comm.is_first:
        assert not outcomes
        return None
    assert sorted(outcomes) == list(range(len(jobs)))
    return [outcomes[number] for number in range(len(jobs))]


def equal_to_uncut(kind, jobs, outcomes):
    uncut = make_pipe(kind)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [np.array_equal(job(uncut), o.value) for job, o in zip(jobs, outcomes, strict=True)]


def kinds_on_ranks(group, cases):
    found = {}
    for kind, num_images, in_flight in cases:
        jobs = [job_for(kind, number) for number in range(num_images)]
        outcomes = in_pipeline(make_pipe(kind), jobs, num_in_flight=in_flight)
        if outcomes is not None:
            found[kind, num_images, in_flight] = equal_to_uncut(kind, jobs, outcomes)
    return found


def all_equal(found, cases):
    return found[0] == {case: [True] * case[1] for case in cases}


@pytest.mark.parametrize("num_stages", [2, 3])
def test_images_are_bit_identical_to_the_uncut_pipeline(num_stages):
    m = num_stages
    cases = [("flux", n, m) for n in (1, m, m + 1)]
    cases += [(kind, m + 1, m) for kind in ("sd", "sd3", "pixart", "wan", "sana", "qwen")]
    cases += [("sdxl", m, m + 1), ("flux", 2 * m + 1, 2 * m), ("sd", m, 2 * m)]
    assert all_equal(run_ranks(kinds_on_ranks, num_stages, cases), cases)


@pytest.mark.nightly
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["flux", "sd"])
def test_images_are_bit_identical_over_the_whole_grid(kind, num_stages):
    cases = [(kind, n, m) for m in range(num_stages, 9) for n in range(10)]
    assert all_equal(run_ranks(kinds_on_ranks, num_stages, cases), cases)


def mixed_on_ranks(group):
    jobs = [
        job_for("flux", 0, num_inference_steps=3),
        job_for("flux", 1, height=64, num_inference_steps=1),
        job_for("flux", 2, max_sequence_length=8),
        job_for("flux", 3, negative_prompt="blue", true_cfg_scale=3.0),  # two calls a step
        job_for("flux", 4, num_images_per_prompt=2, width=48),
    ]
    outcomes = in_pipeline(make_pipe("flux"), jobs, num_in_flight=3)
    return outcomes and equal_to_uncut("flux", jobs, outcomes)


def test_sizes_steps_text_lengths_and_guidance_may_differ_in_flight():
    assert run_ranks(mixed_on_ranks, 2) == [[True] * 5, None]


def seeds_on_ranks(group):
    jobs = [job_for("flux", 0, seed=7), job_for("flux", 0, seed=8)]
    outcomes = in_pipeline(make_pipe("flux"), jobs)
    return outcomes and equal_to_uncut("flux", [job_for("flux", 0, seed=7)] * 2, outcomes)


def test_the_comparison_notices_another_seed():
    assert run_ranks(seeds_on_ranks, 2) == [[True, False], None]


# --- models without a tiny pipeline of their own ------------------------------------------------


class Loop:
    """As little of a pipeline as is needed here: components, and a call that denoises."""

    def __init__(self, model):
        self.components = {"transformer": model}
        self.transformer = model
        self.scheduler = None

    def __call__(self, steps, **inputs):
        with torch.no_grad():
            for step in range(steps):
                inputs["timestep"] = torch.full_like(inputs["timestep"], 0.5 / (step + 1))
                made = self.transformer(**inputs, return_dict=False)[0]
                inputs["hidden_states"] = inputs["hidden_states"] + 0.1 * made
        return inputs["hidden_states"].numpy()


def tokens(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_sana(seed):
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(0)
    model = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=3, num_attention_heads=2,
        attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
        cross_attention_dim=8, caption_channels=8, sample_size=8, patch_size=1,
    )  # fmt: skip
    return model, {
        "hidden_states": tokens(seed, 1, 4, 8, 8),
        "encoder_hidden_states": tokens(seed + 1, 1, 4 + seed, 8),
        "timestep": torch.ones(1),
    }


def make_qwen_image(seed):
    from diffusers import QwenImageTransformer2DModel

    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": tokens(seed, 1, 16, 16),
        "encoder_hidden_states": tokens(seed + 1, 1, 5 + seed, 16),
        "encoder_hidden_states_mask": torch.ones(1, 5 + seed, dtype=torch.int64),
        "timestep": torch.ones(1),
        "img_shapes": [(1, 4, 4)],
    }


def make_lumina2(seed):
    from diffusers import Lumina2Transformer2DModel

    torch.manual_seed(0)
    model = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=3,
        num_refiner_layers=2, num_attention_heads=3, num_kv_heads=1, multiple_of=2,
        scaling_factor=1.0, axes_dim_rope=(4, 2, 2), axes_lens=(128, 128, 128), cap_feat_dim=32,
    )  # fmt: skip
    # The mask's contents, read by the model, are part of the plan.
    mask = torch.ones(1, 6, dtype=torch.bool)
    mask[0, 3 + seed % 3 :] = False
    return model, {
        "hidden_states": tokens(seed, 1, 4, 8, 8),
        "encoder_hidden_states": tokens(seed + 1, 1, 6, 32),
        "encoder_attention_mask": mask,
        "timestep": torch.ones(1),
    }


def make_lumina_next(seed):
    from diffusers import LuminaNextDiT2DModel
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    torch.manual_seed(0)
    model = LuminaNextDiT2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=32, num_layers=3,
        num_attention_heads=4, num_kv_heads=4, multiple_of=16, learn_sigma=False,
        cross_attention_dim=8,
    )  # fmt: skip
    torch.nn.init.normal_(model.norm_out.linear_2.weight)  # zeros would hide every block
    for block in model.layers:
        block.gate.data.fill_(0.5)
    return model, {
        "hidden_states": tokens(seed, 1, 4, 8, 8),
        "encoder_hidden_states": tokens(seed + 1, 1, 5 + seed, 8),
        "encoder_mask": torch.ones(1, 5 + seed),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 384, 384),
        "cross_attention_kwargs": {},
        "timestep": torch.ones(1),
    }


MODELS = {
    "sana": make_sana,
    "qwen-image": make_qwen_image,
    "lumina2": make_lumina2,
    "lumina-next": make_lumina_next,
}


def models_on_ranks(group, names):
    found = {}
    for name in names:
        jobs = [
            lambda pipe, k=k, name=name: pipe(2, **MODELS[name](k)[1])
            for k in range(group.group_size + 1)
        ]
        outcomes = in_pipeline(Loop(MODELS[name](0)[0].eval()), jobs)
        if outcomes is not None:
            uncut = Loop(MODELS[name](0)[0].eval())
            for outcome in outcomes:
                if outcome.error is not None:
                    raise outcome.error
            found[name] = [
                np.array_equal(job(uncut), o.value) for job, o in zip(jobs, outcomes, strict=True)
            ]
    return found


@pytest.mark.parametrize("num_stages", [2, 3])
def test_other_transformers_are_cut_exactly(num_stages):
    found = run_ranks(models_on_ranks, num_stages, list(MODELS))[0]
    assert found == {name: [True] * (num_stages + 1) for name in MODELS}


# --- what goes wrong ----------------------------------------------------------------------------


def failing_on_ranks(group):
    pipe = make_pipe("flux")
    pipeline = ContinuousPipeline(pipe, num_in_flight=2)
    if group.group_rank == 1:
        staged = pipeline._staged[0]
        run = staged.run
        staged.run = lambda plan, number, values: refuse_two_images(run, plan, number, values)
    jobs = [
        job_for("flux", 0),
        job_for("flux", 1, max_sequence_length=999),  # the pipeline itself refuses it
        job_for("flux", 2, num_images_per_prompt=2),  # fails on the second rank
        job_for("flux", 3),
        job_for("flux", 4),
    ]
    outcomes = {outcome.number: outcome for outcome in pipeline.run(jobs)}
    if group.group_rank:
        return None
    errors = {n: o.error for n, o in outcomes.items() if o.error is not None}
    uncut = make_pipe("flux")
    equal = [np.array_equal(jobs[n](uncut), outcomes[n].value) for n in (0, 3, 4)]
    return {n: (type(e).__name__, str(e).splitlines()[0]) for n, e in errors.items()}, equal


def refuse_two_images(run, plan, number, values):
    if any(value.dim() and value.shape[0] == 2 for value in values.values()):
        raise MemoryError("too large")
    return run(plan, number, values)


def test_a_failed_image_frees_its_slot_and_disturbs_nobody():
    (errors, equal), _ = run_ranks(failing_on_ranks, 2)
    assert equal == [True] * 3
    assert sorted(errors) == [1, 2]
    assert errors[1][0] == "ValueError"
    assert errors[2] == (
        "RankError",
        "rank 1 failed while running its stage: MemoryError: too large",
    )


def aborting_on_ranks(group, in_flight):
    pipe = make_pipe("flux")
    pipeline = ContinuousPipeline(pipe, num_in_flight=in_flight)
    if group.group_rank == 1:
        pipeline._staged[0].run = raise_sticky
    try:
        list(pipeline.run([job_for("flux", k) for k in range(3)]))
    except (RankError, torch.AcceleratorError) as error:
        return type(error).__name__, getattr(error, "rank", None)


def raise_sticky(plan, number, values):
    raise torch.AcceleratorError("device-side assert")


@pytest.mark.parametrize("in_flight", [3, 6])
def test_a_rank_whose_device_is_lost_ends_the_run_on_every_rank(in_flight):
    found = run_ranks(aborting_on_ranks, 3, in_flight)
    assert found == [("RankError", 1), ("AcceleratorError", None), ("RankError", 1)]


def broken_source_on_ranks(group):
    def jobs():
        yield job_for("flux", 0)
        yield job_for("flux", 1)
        raise RankError(7, "running", None, exitcode=1)  # as a look at other replicas may say

    try:
        list(ContinuousPipeline(make_pipe("flux")).run(jobs()))
    except RankError as error:
        return error.rank


def test_an_error_of_whoever_feeds_the_pipeline_ends_it_on_every_rank():
    assert run_ranks(broken_source_on_ranks, 3) == [7, 0, 0]


def early_end_on_ranks(group, in_flight):
    pipe = make_pipe("flux")
    pipeline = ContinuousPipeline(pipe, num_in_flight=in_flight)
    count = 0
    for _ in pipeline.run([job_for("flux", k) for k in range(6)]):
        count += 1
        break
    again = [o.error for o in pipeline.run([job_for("flux", k) for k in range(2)])]
    return count, again


@pytest.mark.parametrize("in_flight", [2, 4])
def test_a_caller_who_stops_early_leaves_a_usable_pipeline(in_flight):
    assert run_ranks(early_end_on_ranks, 2, in_flight) == [(1, [None, None]), (0, [])]


def refusals_on_ranks(group):
    def refused(match, *args, **kwargs):
        with pytest.raises((UsageError, RankError), match=match):
            ContinuousPipeline(*args, **kwargs)

    refused("2 stages need at least 2", make_pipe("flux"), num_in_flight=1)
    refused("no denoiser made of blocks", Loop(nn.Linear(2, 2).eval()))
    pipe = make_pipe("flux")
    pipe.transformer.train()
    refused("training mode", pipe)
    pipe = make_pipe("flux")
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    pipe.transformer.single_transformer_blocks = nn.ModuleList()
    refused("no denoiser made of blocks", pipe)
    pipe = make_pipe("flux")
    pipe.transformer.compile()
    refused("is compiled", pipe)
    pipe = make_pipe("flux")
    pipe.transformer.transformer_blocks[0].compile()
    refused("is compiled", pipe)
    from diffusers import FirstBlockCacheConfig

    pipe = make_pipe("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    refused("step cache", pipe)
    return True


def test_what_cannot_be_cut_is_refused_on_every_rank_before_it_starts():
    assert run_ranks(refusals_on_ranks, 2) == [True, True]


# --- the first stage, early stops and many kinds of call ----------------------------------------


class Linears(nn.Module):
    """A denoiser of linear blocks that takes a batch of any size."""

    def __init__(self, num_blocks=4, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(num_blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def linear_job(num_rows, steps=2):
    def job(pipe):
        x = tokens(0, num_rows, 4)
        for _ in range(steps):
            x = pipe.transformer(x)
        return x

    return job


def values_of(outcomes):
    """What each job made; the error of one that failed is raised."""
    outcomes = sorted(outcomes)
    for outcome in outcomes:
        if outcome.error is not None:
            raise outcome.error
    return [outcome.value for outcome in outcomes]


def run_uncut(jobs):
    pipe = Loop(Linears().eval())
    with torch.no_grad():
        return [job(pipe) for job in jobs]


def same(found, expected):
    return [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]


def first_stage_out_of_memory_on_ranks(group):
    pipeline = ContinuousPipeline(Loop(Linears().eval()))
    if group.group_rank == 0:
        run = pipeline._staged[0].run
        pipeline._staged[0].run = lambda plan, number, values: refuse_four_rows(
            run, plan, number, values
        )

    def halved(pipe):
        try:
            return linear_job(4)(pipe)
        except torch.OutOfMemoryError:
            return linear_job(2)(pipe)

    made = [values_of(pipeline.run([halved, linear_job(2), linear_job(3)])) for _ in range(2)]
    if group.group_rank:
        return None
    expected = run_uncut([linear_job(2), linear_job(2), linear_job(3)])
    return [same(found, expected) for found in made]


def refuse_four_rows(run, plan, number, values):
    if values["input", 0].shape[0] == 4:
        raise torch.OutOfMemoryError("no room for four rows")
    return run(plan, number, values)


@pytest.mark.parametrize("num_stages", [2, 3])
def test_a_first_stage_out_of_memory_at_a_new_kind_of_call_halves_its_batch(num_stages):
    found = run_ranks(first_stage_out_of_memory_on_ranks, num_stages)
    assert found[0] == [[True] * 3] * 2


def stop_with_plans_in_flight_on_ranks(group, in_flight):
    """The caller stops while the first call of a kind is on its way; then the kind comes again."""
    pipeline = ContinuousPipeline(Loop(Linears().eval()), num_in_flight=in_flight)

    def done(pipe):
        return None  # ends at once, so that the others are in flight

    jobs = [linear_job(1, steps=1), *(linear_job(rows, steps=9) for rows in range(2, 8)), done]
    for _ in pipeline.run(jobs):
        break
    found = values_of(pipeline.run(linear_job(rows) for rows in range(1, 8)))
    expected = run_uncut([linear_job(rows) for rows in range(1, 8)])
    return same(found, expected) if group.group_rank == 0 else None


@pytest.mark.parametrize(("num_stages", "in_flight"), [(2, 4), (3, 3), (3, 6)])
def test_a_caller_who_stops_while_plans_are_in_flight_leaves_a_usable_pipeline(
    num_stages, in_flight
):
    found = run_ranks(stop_with_plans_in_flight_on_ranks, num_stages, in_flight)
    assert found[0] == [True] * 7


def many_kinds_on_ranks(group, in_flight):
    plans.MAX_PLANS = 3
    pipeline = ContinuousPipeline(Loop(Linears().eval()), num_in_flight=in_flight)
    sizes = [*range(1, 8), *range(7, 0, -1), 1, 2, 1, 5]
    found = values_of(pipeline.run(linear_job(rows) for rows in sizes))
    plans.MAX_PLANS = 1000
    if group.group_rank:
        return len(pipeline._plans)
    return same(found, run_uncut([linear_job(rows) for rows in sizes])), len(pipeline._plans)


@pytest.mark.parametrize("in_flight", [2, 4])
def test_the_least_recently_used_kinds_of_call_are_forgotten_on_every_rank(in_flight):
    (equal, num_first), num_second = run_ranks(many_kinds_on_ranks, 2, in_flight)
    assert equal == [True] * 18
    assert num_first <= max(3, in_flight)
    assert num_second <= max(3, in_flight) + 1


# --- no room for what travels; two ends at once --------------------------------------------------


def no_room_for_a_message_on_ranks(group, rank, value, in_flight):
    """A buffer for four rows of block outputs or of the model's output does not fit on one rank."""
    pipeline = ContinuousPipeline(Loop(Linears().eval()), num_in_flight=in_flight)
    before = Layout.empty

    def refuse(layout, *args):
        if any(p.shape[0] == 4 and p.name[0] == value for p in layout.places):
            raise torch.OutOfMemoryError("no room for four rows")
        return before(layout, *args)

    errors = []

    def halved(pipe):
        try:
            return linear_job(4)(pipe)
        except RankError as error:
            errors.append((error.rank, error.record.type))
            return linear_job(2)(pipe)

    jobs = [linear_job(3), halved, linear_job(1), halved, linear_job(2), linear_job(1)]
    try:
        if group.group_rank == rank:
            Layout.empty = refuse
        made = values_of(pipeline.run(jobs))
    finally:
        Layout.empty = before
    rows = (3, 2, 1, 2, 2, 1)
    expected = run_uncut([linear_job(n) for n in rows])
    return None if group.group_rank else (same(made, expected), errors)


@pytest.mark.parametrize(
    ("num_stages", "rank", "value", "in_flight"),
    [
        (2, 0, "block", 4),  # to be sent by the first stage
        (2, 1, "block", 4),  # to be received by the last
        (2, 1, "output", 2),  # to be sent by the last
        (2, 0, "output", 2),  # to be received by the first
        (3, 1, "block", 3),
    ],
)
def test_a_message_without_room_fails_its_image_alone(num_stages, rank, value, in_flight):
    found = run_ranks(no_room_for_a_message_on_ranks, num_stages, rank, value, in_flight)
    assert found[0] == ([True] * 6, [(rank, "OutOfMemoryError")] * 2)


def two_ends_on_ranks(group, failing, in_flight):
    """The caller stops; a device is lost on another rank, once at each of its calls."""
    found = []
    for lost_at in range(16):
        pipeline = ContinuousPipeline(Loop(Linears().eval()), num_in_flight=in_flight)
        run, calls = pipeline._staged[0].run, itertools.count()

        def lose(plan, number, values, run=run, calls=calls, lost_at=lost_at):
            if next(calls) == lost_at:
                raise torch.AcceleratorError("device-side assert")
            return run(plan, number, values)

        if group.group_rank == failing:
            pipeline._staged[0].run = lose
        try:
            outcomes = pipeline.run(linear_job(1, steps=2 + k) for k in range(6))
            with contextlib.closing(outcomes):
                for _ in outcomes:
                    break
            found.append(None)
        except torch.AcceleratorError:
            found.append("lost")
        except RankError as error:
            found.append(error.rank)
    return found


@pytest.mark.parametrize(("failing", "in_flight"), [(1, 3), (2, 3), (1, 6), (2, 6)])
def test_a_device_lost_while_the_caller_stops_ends_the_run_on_every_rank(failing, in_flight):
    found = run_ranks(two_ends_on_ranks, 3, failing, in_flight)
    assert found[failing][0] == "lost"
    assert found[failing][-1] is None, "the caller stopped before"
    for k in range(3):
        for error, own in zip(found[k], found[failing], strict=True):
            assert error == own if k == failing else error in (None, failing)
            if own is None:
                assert error is None
    assert found[0][0] == failing, "an early loss is known to all"


# --- the memory that a stage takes ---------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside took at once."""

    def __init__(self):
        super().__init__()
        self.most, self._storages = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._storages.values()))
        return made


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale


class Wide(nn.Module):
    """What travels between its blocks is 256 times as large as its input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(4, 1024, bias=False)
        self.blocks = nn.ModuleList(Scale(1024) for _ in range(24))
        self.project_out = nn.Linear(1024, 4)

    def forward(self, x):
        x = self.project(x)
        for block in self.blocks:
            x = block(x)
        return self.project_out(x)


def live_bytes_on_ranks(group, in_flight):
    def job(pipe):
        x = tokens(0, 1, 256, 4)
        for _ in range(3):
            x = pipe.transformer(x)
        return x

    pipeline = ContinuousPipeline(Loop(Wide().eval()), num_in_flight=in_flight)
    with LiveBytes() as live:
        values_of(pipeline.run([job] * 8))
    return live.most


@pytest.mark.parametrize(("in_flight", "num_messages"), [(3, 3), (6, 4)])
def test_a_stage_holds_what_travels_and_not_every_blocks_output(in_flight, num_messages):
    """With overlap: one message each way and a block's input and output; else one less."""
    message_bytes = 256 * 1024 * 4
    for most in run_ranks(live_bytes_on_ranks, 3, in_flight):
        assert message_bytes <= most <= (num_messages + 0.1) * message_bytes


def test_placeholders_take_one_element():
    model = Wide().eval()
    blocks = [f"blocks.{k}" for k in range(24)]
    staged = StagedModel(model, blocks, [range(0, 12), range(12, 24)], 1, torch.device("cpu"))
    first = StagedModel(
        Wide().eval(), blocks, [range(0, 12), range(12, 24)], 0, torch.device("cpu")
    )
    x = tokens(0, 1, 256, 4)
    plan, _ = first.plan((x,), {})
    values = first.run(plan, 0, {("input", 0): x})
    values = {name: values[name] for name in plan.edges[0].names}
    given = []
    model.project.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    staged.run(plan, 0, values)
    assert given[0].shape == x.shape
    assert bool(given[0].isnan().all())
    assert given[0].untyped_storage().nbytes() == 4


# --- what it costs ------------------------------------------------------------------------------


def bytes_on_ranks(group, steps):
    pipeline = ContinuousPipeline(make_pipe("flux"))
    list(pipeline.run([job_for("flux", 0, num_inference_steps=steps)]))
    return pipeline._exchange.num_bytes


def test_per_image_constants_are_not_sent_again_every_step():
    sent = [run_ranks(bytes_on_ranks, 2, steps)[0] for steps in (1, 2, 3, 4, 9)]
    first, second, third, fourth, ninth = np.diff([0, *sent])
    assert second == first  # a tensor seen twice is known from then on
    assert fourth == third < first
    assert ninth == 5 * third


def weights_on_ranks(group):
    pipe = make_pipe("flux")
    pipeline = ContinuousPipeline(pipe)
    held = sum(p.numel() for p in pipe.transformer.parameters() if not p.is_meta)
    return held / sum(p.numel() for p in pipe.transformer.parameters()), pipeline.comm.size


def test_each_rank_keeps_its_own_blocks():
    shares = [share for share, _ in run_ranks(weights_on_ranks, 2)]
    assert all(share < 0.75 for share in shares)


# --- the plan, without other ranks --------------------------------------------------------------


class Skipping(nn.Module):
    """A block's output that is used only in the end, one that is never used, an unused input."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, unused, late):
        first = self.blocks[0](x)
        second = self.blocks[1](first)
        third = self.blocks[2](second)
        return self.blocks[3](third) + first * late


def test_only_what_later_stages_use_travels():
    model = Skipping().eval()
    blocks = [f"blocks.{k}" for k in range(4)]
    staged = StagedModel(model, blocks, [range(0, 2), range(2, 4)], 0, torch.device("cpu"))
    plan, inspected = staged.plan((torch.ones(1, 4), torch.ones(3), torch.ones(4)), {})
    assert set(plan.edges[0].names) == {("input", 2), ("block", 0, 0), ("block", 1, 0)}
    assert inspected == frozenset()
    staged.detach()
    assert "forward" not in model.blocks[0].__dict__


# --- NCCL ---------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("in_flight", [2, 4])
def test_two_gpus_over_nccl(tmp_path, in_flight):
    import torch.multiprocessing as mp

    mp.spawn(two_gpus, (str(tmp_path / "store"), in_flight), nprocs=2)


def two_gpus(rank, path, in_flight):
    import torch.distributed as dist

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    jobs = [job_for("flux", number) for number in range(5)]
    outcomes = in_pipeline(make_pipe("flux").to(f"cuda:{rank}"), jobs, num_in_flight=in_flight)
    if outcomes is not None:
        uncut = make_pipe("flux").to("cuda:0")
        for job, outcome in zip(jobs, outcomes, strict=True):
            if outcome.error is not None:
                raise outcome.error
            assert np.allclose(job(uncut), outcome.value, atol=1e-4)
    dist.destroy_process_group()
