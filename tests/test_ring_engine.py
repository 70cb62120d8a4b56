"""The ring as an engine: dp × pp replicas, each with its slice of the batches."""

import dataclasses

import numpy as np
import pytest

from ddinfer.config import JobConfig
from ddinfer.distributed.partition import slice_of_batches
from ddinfer.engines.ring import Replica, load_ring_engine
from ddinfer.engines.whole import WholeEngine
from ddinfer.errors import UsageError
from ddinfer.models.loading import load_pipeline
from ddinfer.request import Prompt, resolve_requests
from tests.ranks import run_ranks
from tests.tiny_pipelines import call_arguments, tiny_pipeline


def batches_for(kind, count, batch_size=1, **changes):
    rows = [
        Prompt({"prompt": f"a red cat {k}", **call_arguments(kind), **changes})
        for k in range(count)
    ]
    requests = resolve_requests(rows, base_seed=100)
    return [requests[k : k + batch_size] for k in range(0, count, batch_size)]


def replicas_on_ranks(group, folder, num_stages, batches):
    replica = Replica.of(group.group_rank, group.group_size, num_stages)
    engine = load_ring_engine(
        folder, JobConfig(), replica, device="cpu", rank=group.group_rank,
        group=replica.process_group(),
    )  # fmt: skip
    held = sum(
        p.numel() for s in engine.ring._staged for p in s.model.parameters() if not p.is_meta
    )
    mine = slice_of_batches(batches, replica.num_replicas, replica.number)
    return [dataclasses.replace(r, error=r.error) for r in engine.run(mine)], held


def same_as_whole(folder, batches, results):
    expected = {r.index: r for r in WholeEngine(load_pipeline(folder)).run(batches)}
    assert sorted(r.index for r in results) == sorted(expected)
    for result in results:
        assert result.error is None, result.error
        assert result.exact
        assert result.batch == expected[result.index].batch
        assert np.array_equal(np.asarray(result.image), np.asarray(expected[result.index].image))


def test_two_replicas_of_two_stages_make_the_images_of_the_whole_engine(tmp_path):
    folder = str(tiny_pipeline("flux", tmp_path))
    batches = batches_for("flux", 5)
    made = run_ranks(replicas_on_ranks, 4, folder, 2, batches)
    assert [len(results) for results, _ in made] == [3, 0, 2, 0]
    same_as_whole(folder, batches, [r for results, _ in made for r in results])
    assert {r.rank for results, _ in made for r in results} == {0, 2}
    whole = sum(p.numel() for p in load_pipeline(folder).transformer.parameters())
    assert all(held < 0.75 * whole for _, held in made)


def test_batches_are_one_call_each_also_for_a_unet(tmp_path):
    folder = str(tiny_pipeline("sd", tmp_path))
    batches = batches_for("sd", 5, batch_size=2)
    made = run_ranks(replicas_on_ranks, 2, folder, 2, batches)
    same_as_whole(folder, batches, made[0][0])


def test_a_failed_prompt_is_a_result_and_its_neighbours_are_made(tmp_path):
    folder = str(tiny_pipeline("flux", tmp_path))
    good, bad = batches_for("flux", 3), batches_for("flux", 1, max_sequence_length=999)
    broken = [[dataclasses.replace(bad[0][0], index=3, id="broken")]]
    (results, _), (none, _) = run_ranks(
        replicas_on_ranks, 2, folder, 2, good[:1] + broken + good[1:]
    )
    assert none == []
    failed = [r for r in results if r.error is not None]
    assert [r.id for r in failed] == ["broken"]
    assert failed[0].error.type == "ValueError"
    same_as_whole(folder, good, [r for r in results if r.error is None])


def test_no_batches_are_no_results(tmp_path):
    folder = str(tiny_pipeline("flux", tmp_path))
    made = run_ranks(replicas_on_ranks, 4, folder, 2, batches_for("flux", 1))
    assert [len(results) for results, _ in made] == [1, 0, 0, 0]


def test_ranks_that_do_not_come_out_even_are_refused_with_the_numbers():
    with pytest.raises(UsageError, match=r"--pipeline_parallel 2 needs .* found 3"):
        Replica.of(0, 3, 2)
    assert Replica.of(5, 6, 3) == Replica(1, 2, 2, (3, 4, 5))
