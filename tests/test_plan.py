"""Who starts the ranks: the rules of nested launchers, without starting any."""

import os

import pytest

from ddinfer.distributed.devices import Gpus
from ddinfer.distributed.launch import plan_launch
from ddinfer.errors import UsageError
from tests.test_world import CPU_BUILD, FOUR, NONE, environment


def plan(nproc_per_node=None, device="auto", environ=None, gpus=NONE, **more):
    found = plan_launch(nproc_per_node, device, environ or {}, gpus=gpus, **more)
    return found.kind, found.num_ranks


OUTER_ONE = environment(GROUP_WORLD_SIZE="1")
OUTER_TWO = environment(0, 2, GROUP_WORLD_SIZE="1")


def test_alone_every_gpu_gets_a_rank_else_one_rank_runs():
    assert plan() == ("start", 1)
    assert plan(gpus=FOUR) == ("start", 4)
    assert plan(gpus=FOUR, device="cpu") == ("start", 1)
    assert plan(gpus=FOUR, device="cuda:2") == ("start", 1)
    assert plan(gpus=FOUR, gpus_per_rank=2) == ("start", 2)


@pytest.mark.parametrize("number", [2, "2"])
def test_a_number_is_a_number(number):
    assert plan(number) == ("start", 2)
    assert plan(number, gpus=FOUR) == ("start", 2)


def test_words_mean_what_torchrun_means_by_them():
    assert plan("auto", gpus=FOUR) == ("start", 4)
    assert plan("auto") == ("start", os.cpu_count())
    assert plan("gpu", gpus=FOUR) == ("start", 4)
    assert plan("cpu", device="cpu", gpus=FOUR) == ("start", os.cpu_count())
    with pytest.raises(UsageError, match="shows no GPU"):
        plan("gpu")
    for wrong in ("two", "0", "-1", "", "1.5"):
        with pytest.raises(UsageError, match="must be a number from 1, auto, gpu or cpu"):
            plan(wrong)


def test_inside_a_world_of_one_the_scripts_own_number_wins():
    assert plan(2, environ=OUTER_ONE) == ("start", 2)
    assert plan(1, environ=OUTER_ONE) == ("join", 1)


def test_inside_a_world_of_one_without_a_number_one_rank_runs_and_idle_gpus_are_named():
    found = plan_launch(None, "auto", OUTER_ONE, gpus=FOUR)
    assert (found.kind, found.num_ranks) == ("join", 1)
    assert "4 GPUs, so that 3 are idle; --nproc_per_node=4" in found.note
    assert plan_launch(None, "auto", OUTER_ONE, gpus=NONE).note == ""
    assert plan_launch(None, "cpu", OUTER_ONE, gpus=FOUR).note == ""
    assert plan_launch(None, "auto", OUTER_ONE, gpus=Gpus(usable=1, present=1)).note == ""


def test_several_outer_ranks_are_joined():
    assert plan(environ=OUTER_TWO) == ("join", 2)
    assert plan(2, environ=OUTER_TWO) == ("join", 2)


@pytest.mark.parametrize("inner", [1, 3])
def test_an_outer_and_an_inner_number_that_differ_are_an_error_with_both(inner):
    with pytest.raises(UsageError, match=f"torchrun started 2 ranks .* --nproc_per_node={inner}"):
        plan(inner, environ=OUTER_TWO)


def test_one_rank_on_each_of_two_machines_is_not_a_world_of_one():
    environ = environment(1, 2, 0, 1, GROUP_WORLD_SIZE="2", GROUP_RANK="1")
    assert plan(environ=environ) == ("join", 2)
    with pytest.raises(UsageError, match=r"torchrun started 1 rank on this machine \(2 in all\)"):
        plan(2, environ=environ)


def test_a_half_set_environment_is_an_error_before_anything_starts():
    with pytest.raises(UsageError, match=r"RANK=0; missing: WORLD_SIZE, LOCAL_RANK, "):
        plan(2, environ={"RANK": "0"})


def test_what_the_machine_cannot_give_is_found_before_anything_starts():
    with pytest.raises(UsageError, match="--nproc_per_node=5 needs 5 GPUs, this machine shows 4"):
        plan(5, gpus=FOUR)
    with pytest.raises(UsageError, match="build without CUDA"):
        plan(2, gpus=CPU_BUILD)
    assert plan(5, gpus=FOUR, device="cpu") == ("start", 5)
    assert plan(2, gpus=CPU_BUILD, device="cpu") == ("start", 2)
