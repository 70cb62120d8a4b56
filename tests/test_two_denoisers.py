"""Two experts that take turns (Wan 2.2: ``transformer_2`` for the later steps), in every mode."""

import numpy as np
import pytest
import torch

import ddinfer
from ddinfer.config import JobConfig
from ddinfer.distributed.partition import Replica
from ddinfer.engines.continuous import load_continuous_engine
from ddinfer.engines.staged import load_staged_engine
from ddinfer.engines.whole import WholeEngine, load_whole_engine
from ddinfer.models.loading import denoisers, load_pipeline
from ddinfer.models.tree import tree_of
from ddinfer.request import Prompt, resolve_requests
from tests.ranks import run_ranks
from tests.tiny_pipelines import call_arguments, wan

pytestmark = pytest.mark.usefixtures("one_thread")

CALL = {**call_arguments("wan"), "num_inference_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    pipe, other = wan(), wan()
    pipe.register_modules(transformer_2=other.transformer)
    pipe.register_to_config(boundary_ratio=0.8)
    path = tmp_path_factory.mktemp("model") / "wan-2.2"
    pipe.save_pretrained(path)
    return str(path)


def requests_of(count=2):
    return resolve_requests([Prompt({"prompt": f"a cat {k}", **CALL}) for k in range(count)])


def videos(results):
    found = {}
    for result in results:
        assert result.error is None, result.error.traceback
        found[result.index] = np.stack([np.asarray(frame) for frame in result.frames])
    return found


def same(one, other):
    return sorted(one) == sorted(other) and all(np.array_equal(one[k], other[k]) for k in one)


def expected_videos(folder):
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    calls = {name: [] for name in denoisers(pipe)}
    for name, model in denoisers(pipe).items():
        model.register_forward_pre_hook(lambda *_, name=name: calls[name].append(1))
    made = {}
    for request in requests_of():
        generator = torch.Generator("cpu").manual_seed(request.seed)
        frames = pipe(request.prompt, generator=generator, output_type="np", **CALL).frames[0]
        made[request.index] = (frames * 255).round().astype("uint8")
    assert all(calls.values()), "both take steps"
    assert list(calls) == ["transformer", "transformer_2"]
    return made


class Steps:
    """Counts what an engine reports."""

    def __init__(self):
        self.count = 0

    def listen_to(self, pipe):
        pass

    def steps(self):
        self.count += 1


@pytest.mark.parametrize("mode", ["whole", "staged", "placed"])
def test_one_rank_makes_the_videos_of_the_plain_pipeline(folder, mode, tmp_path):
    options = {"device": "cpu", "output": str(tmp_path / "out"), "attention_backend": "native"}
    if mode == "staged":
        options["placement"] = "staged"
    config = JobConfig(**options)
    world = ddinfer.World()
    if mode == "staged":
        engine = load_staged_engine(folder, config, world=world)
    elif mode == "whole":
        engine = load_whole_engine(folder, config, world=world)
    else:
        half = {"cpu": tree_of(folder).num_bytes() // 2}
        placed = load_pipeline(folder, placement="balanced", max_memory=half)
        engine = WholeEngine(placed)
    steps = Steps()
    engine.set_progress_listener(steps)
    assert same(videos(engine.run([[r] for r in requests_of()])), expected_videos(folder))
    assert steps.count >= 2 * 4 * 2, "every step of both denoisers, with and without the negative"


def continuous_on_ranks(group, folder):
    replica = Replica.of(group.group_rank, group.group_size, 2)
    engine = load_continuous_engine(
        folder, JobConfig(attention_backend="native"), replica, device="cpu",
        rank=group.group_rank, group=replica.process_group(),
    )  # fmt: skip
    chosen = [
        module.processor._attention_backend is not None
        for staged in engine.pipeline._staged
        for module in staged.model.modules()
        if hasattr(getattr(module, "processor", None), "_attention_backend")
    ]
    return videos(engine.run([[r] for r in requests_of()])), chosen


def test_continuous_stages_of_both_make_the_videos_of_the_plain_pipeline(folder):
    (made, *chosen), (none, *others) = run_ranks(continuous_on_ranks, 2, folder)
    assert same(made, expected_videos(folder))
    assert not none
    assert chosen == others
    assert chosen[0]
    assert all(chosen[0])


def generated_on_ranks(group, folder, is_sharded):
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    if is_sharded:
        from torch.distributed.fsdp import fully_shard

        for model in denoisers(pipe).values():
            fully_shard(model)
    made = ddinfer.generate(pipe, [r.prompt for r in requests_of()], seed=0, **CALL)
    return videos(made)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_generate_makes_the_videos_of_the_plain_pipeline(folder, is_sharded):
    found = run_ranks(generated_on_ranks, 2, folder, is_sharded)
    assert all(same(made, expected_videos(folder)) for made in found)


def test_each_is_compiled(folder):
    engine = load_whole_engine(folder, JobConfig(compile=True), world=ddinfer.World())
    for model in denoisers(engine.pipe).values():
        blocks = list(model.blocks)
        assert all(block._compiled_call_impl is not None for block in blocks)
