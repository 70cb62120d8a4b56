"""The continuous pipeline as an engine: dp × pp replicas, each with its slice of the batches."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from ddinfer.config import JobConfig
from ddinfer.distributed.partition import Replica, slice_of_batches
from ddinfer.engines.continuous import ContinuousEngine, load_continuous_engine
from ddinfer.engines.encoding import EncodingCache
from ddinfer.engines.whole import WholeEngine
from ddinfer.errors import UsageError
from ddinfer.models.loading import load_pipeline
from ddinfer.parallel.continuous.pipeline import ContinuousPipeline
from ddinfer.request import Prompt, resolve_requests
from tests.ranks import run_ranks
from tests.tiny_pipelines import call_arguments, tiny_pipeline

ROOT = Path(__file__).parent.parent


def batches_for(kind, count, batch_size=1, **changes):
    rows = [
        Prompt({"prompt": f"a red cat {k}", **call_arguments(kind), **changes})
        for k in range(count)
    ]
    requests = resolve_requests(rows, base_seed=100)
    return [requests[k : k + batch_size] for k in range(0, count, batch_size)]


def replicas_on_ranks(group, folder, num_stages, batches):
    replica = Replica.of(group.group_rank, group.group_size, num_stages)
    engine = load_continuous_engine(
        folder, JobConfig(), replica, device="cpu", rank=group.group_rank,
        group=replica.process_group(),
    )  # fmt: skip
    held = sum(
        p.numel() for s in engine.pipeline._staged for p in s.model.parameters() if not p.is_meta
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


def test_encodings_are_forgotten_where_memory_is_short(tmp_path):
    class Counting(EncodingCache):
        num_clears = 0

        def clear(self):
            self.num_clears += 1
            super().clear()

    pipe = load_pipeline(tiny_pipeline("flux", tmp_path))
    encodings, pipeline = Counting(pipe), ContinuousPipeline(pipe)
    run = pipeline._staged[0].run

    def refuse_two_rows(plan, number, values):
        if values["input", 0].shape[0] == 2:
            raise torch.OutOfMemoryError("no room for two rows")
        return run(plan, number, values)

    pipeline._staged[0].run = refuse_two_rows
    results = list(ContinuousEngine(pipeline, encodings=encodings).run(batches_for("flux", 2, 2)))
    assert [result.error for result in results] == [None, None]
    assert encodings.num_clears == 1


def test_no_batches_are_no_results(tmp_path):
    folder = str(tiny_pipeline("flux", tmp_path))
    made = run_ranks(replicas_on_ranks, 4, folder, 2, batches_for("flux", 1))
    assert [len(results) for results, _ in made] == [1, 0, 0, 0]


def test_ranks_that_do_not_come_out_even_are_refused_with_the_numbers():
    with pytest.raises(UsageError, match=r"parallel 2 needs .* found 3: use --nproc_per_node 2"):
        Replica.of(0, 3, 2)
    assert Replica.of(5, 6, 3) == Replica(1, 2, 2, (3, 4, 5))


# --- nightly: what it holds, and who is to blame ------------------------------------------------

MEASURED = """
    import sys
    import torch
    import torch.distributed as dist
    from ddinfer.config import JobConfig
    from ddinfer.distributed.partition import Replica
    from ddinfer.engines.continuous import load_continuous_engine
    from tests.test_continuous_engine import batches_for, peak_and_now_bytes

    rank, path, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    from diffusers import FluxPipeline  # what any run holds, before a weight is read
    before = peak_and_now_bytes()[1]
    replica = Replica.of(rank, 2, 2)
    engine = load_continuous_engine(
        folder, JobConfig(), replica, device="cpu", rank=rank, group=replica.process_group()
    )
    errors = [r.error for r in engine.run(batches_for("flux", 2))]
    dist.barrier()
    print(errors, peak_and_now_bytes()[0] - before, flush=True)
    dist.destroy_process_group()
"""


def peak_and_now_bytes():
    """This process's highest and present resident memory, mapped files included."""
    with open("/proc/self/status", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS"))


def start_ranks(script, tmp_path, count, *arguments):
    (tmp_path / "rank.py").write_text(textwrap.dedent(script), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(tmp_path / "rank.py")]
    return [
        subprocess.Popen(
            [*command, str(k), str(tmp_path / "store"), *arguments],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for k in range(count)
    ]  # fmt: skip


@pytest.mark.nightly
def test_a_rank_of_a_large_model_holds_its_share_of_the_weights(tmp_path):
    from diffusers import FluxTransformer2DModel

    pipe = load_pipeline(tiny_pipeline("flux", tmp_path / "tiny"))
    pipe.transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=4, num_single_layers=8, attention_head_dim=64,
        num_attention_heads=20, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    weights = sum(p.numel() * 4 for p in pipe.transformer.parameters())
    assert weights > 1e9
    pipe.save_pretrained(tmp_path / "large")
    del pipe
    ranks = start_ranks(MEASURED, tmp_path, 2, str(tmp_path / "large"))
    for rank in ranks:
        said = rank.communicate(timeout=1800)[0]
        assert rank.returncode == 0
        errors, _, grown = said.strip().rpartition(" ")
        assert errors in ("[None, None]", "[]")
        assert int(grown) <= weights / 2 + 300e6, f"{int(grown) / 1e6:.0f} MB"


KILLED = """
    import datetime, os, signal, sys
    import torch.distributed as dist
    from ddinfer.config import JobConfig
    from ddinfer.distributed.partition import Replica
    from ddinfer.engines.continuous import load_continuous_engine
    from ddinfer.errors import RankError
    from tests.test_continuous_engine import batches_for

    rank, path, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", store=dist.FileStore(path, 3), rank=rank, world_size=3)
    replica = Replica.of(rank, 3, 3)
    engine = load_continuous_engine(
        folder, JobConfig(), replica, device="cpu", rank=rank, group=replica.process_group()
    )
    staged = engine.pipeline._staged[0]
    run, count = staged.run, iter(range(1000))
    def dying(*args):
        if next(count) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(*args)
    if rank == 1:
        staged.run = dying
    try:
        for result in engine.run(batches_for("flux", 6, num_inference_steps=4)):
            print(result.index, flush=True)
    except RankError as error:
        print("RankError", error.rank, flush=True)
        os._exit(3)
"""


@pytest.mark.nightly
def test_a_killed_rank_ends_the_run_on_the_others_at_once(tmp_path):
    folder = str(tiny_pipeline("flux", tmp_path))
    ranks = start_ranks(KILLED, tmp_path, 3, folder)
    said = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [3, -9, 3]
    assert "RankError" in said[0]
    assert "RankError 1" in said[2]
