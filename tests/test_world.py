"""Who this process is: read once, from the environment or the live process group."""

import itertools
import subprocess
import sys

import pytest

from ddinfer.distributed.devices import Gpus, resolve_num_threads
from ddinfer.distributed.world import RANK_VARIABLES, World, from_environment
from ddinfer.errors import UsageError
from tests.ranks import run_ranks

NONE, FOUR = Gpus(), Gpus(usable=4, present=4, torch_version="2.13.0", cuda_version="12.8")
CPU_BUILD = Gpus(usable=0, present=2, torch_version="2.13.0+cpu")
OLD_DRIVER = Gpus(usable=0, present=1, torch_version="2.13.0", cuda_version="13.0")


def environment(rank=0, world_size=1, local_rank=0, local_world_size=None, **more):
    local_world_size = world_size if local_world_size is None else local_world_size
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        **more,
    }


def test_a_process_without_a_launcher_is_a_world_of_one():
    assert World.detect("cpu", {}) == World()
    assert not World.detect("cpu", {}).is_launched


def test_an_address_alone_is_what_clusters_export_everywhere():
    assert World.detect("cpu", {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}) == World()


def test_global_rank_and_local_rank_are_kept_apart():
    world = World.detect("auto", environment(6, 8, 2, 4, GROUP_RANK="1"), gpus=FOUR)
    assert (world.rank, world.local_rank, world.num_nodes) == (6, 2, 2)
    assert world.device == "cuda:2"


#: World size, what a launcher says → ranks on this machine, machines.
COUNTED = [
    (16, {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, (8, 2)),
    (5, {"SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}, (2, 2)),
    (
        5,
        {
            "SLURM_STEP_NUM_TASKS": "5",
            "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
            "SLURM_NODEID": "2",
        },
        (1, 5),
    ),
    (4, {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "4"}, (4, 1)),
    (3, {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (2, 2)),
    (4, {"PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}, (2, 2)),
    (4, {"GROUP_WORLD_SIZE": "2"}, (2, 2)),
    (4, {"LOCAL_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 4)),
    (4, {"MASTER_ADDR": "localhost"}, (4, 1)),
    (1, {}, (1, 1)),
]


@pytest.mark.parametrize(("world_size", "given", "expected"), COUNTED)
def test_launchers_say_how_many_ranks_a_machine_has(world_size, given, expected):
    whole = {**environment(0, world_size), "MASTER_ADDR": "node1"}
    del whole["LOCAL_WORLD_SIZE"]
    world = from_environment({**whole, **given})
    assert (world.local_world_size, world.num_nodes) == expected


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"MASTER_ADDR": "127.0.1.1"},  # the own name on Debian: other machines may be there
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"},  # of another launch
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    ],
)
def test_a_number_of_ranks_that_nothing_says_is_an_error_that_names_the_variable(given):
    whole = {**environment(0, 16), "MASTER_ADDR": "node1", **given}
    del whole["LOCAL_WORLD_SIZE"]
    with pytest.raises(UsageError, match="LOCAL_WORLD_SIZE is missing"):
        from_environment(whole)


def test_every_half_set_environment_names_what_is_set_and_what_is_missing():
    whole = environment(1, 2, 1)
    for size in range(1, len(RANK_VARIABLES)):
        for names in itertools.combinations(RANK_VARIABLES, size):
            if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(names):
                continue
            with pytest.raises(UsageError, match="incomplete distributed") as caught:
                World.detect("cpu", {name: whole[name] for name in names})
            found, missing = str(caught.value).split(". Start the ranks")[0].split("; missing: ")
            assert all(f"{name}={whole[name]}" in found for name in names)
            assert all(name in missing for name in RANK_VARIABLES if name not in names)


@pytest.mark.parametrize(
    "wrong", [{"RANK": "2"}, {"RANK": "-1"}, {"LOCAL_RANK": "2"}, {"LOCAL_WORLD_SIZE": "3"}]
)
def test_numbers_that_contradict_one_another_are_an_error(wrong):
    with pytest.raises(UsageError, match="contradictory distributed environment"):
        World.detect("cpu", {**environment(1, 2, 1), **wrong})


def test_a_variable_that_is_not_a_number_is_named():
    with pytest.raises(UsageError, match="WORLD_SIZE='two' is not a number"):
        World.detect("cpu", {**environment(), "WORLD_SIZE": "two"})


@pytest.mark.parametrize(
    ("variable", "launcher"), [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")]
)
def test_copies_that_do_not_know_of_one_another_are_an_error(variable, launcher):
    with pytest.raises(UsageError, match=f"{launcher} started 4 copies .* do all the work"):
        from_environment({variable: "4"})
    assert from_environment({variable: "4", **environment(3, 4, 3)}).rank == 3


def test_auto_takes_the_gpu_of_the_local_rank_where_there_are_any():
    assert World.detect("auto", environment(5, 8, 1, 4), gpus=FOUR).device == "cuda:1"
    assert World.detect("auto", environment(5, 8, 1, 4), gpus=NONE).device == "cpu"


def test_a_rank_may_drive_several_gpus():
    world = World.detect("cuda", environment(1, 2, 1), gpus=FOUR, gpus_per_rank=2)
    assert world.device == "cuda:2"
    assert world.devices == ("cuda:2", "cuda:3")


def test_more_ranks_than_gpus_says_how_many_fit():
    with pytest.raises(UsageError) as caught:
        World.detect("auto", environment(0, 6), gpus=FOUR)
    assert str(caught.value) == (
        "--nproc_per_node=6 needs 6 GPUs, this machine shows 4; "
        "use --nproc_per_node=4 or --device cpu"
    )
    with pytest.raises(UsageError, match=r"needs 6 GPUs, .* shows 4; use --nproc_per_node=1 or"):
        World.detect("auto", environment(0, 2), gpus=FOUR, gpus_per_rank=3)


def test_one_gpu_is_not_for_several_ranks():
    assert World.detect("cuda:3", {}, gpus=FOUR).device == "cuda:3"
    with pytest.raises(UsageError, match="cuda:3 is one GPU, but there are 2 ranks"):
        World.detect("cuda:3", environment(0, 2), gpus=FOUR)
    with pytest.raises(UsageError, match="cuda:4 is not there: this machine shows 4 GPUs"):
        World.detect("cuda:4", {}, gpus=FOUR)


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        (CPU_BUILD, "2 NVIDIA GPUs .* torch 2.13.0\\+cpu is a build without CUDA.*--device cpu"),
        (OLD_DRIVER, "1 NVIDIA GPU .* torch 2.13.0 .*CUDA 13.0.* driver .*--device cpu"),
    ],
)
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_a_gpu_that_torch_cannot_use_is_never_a_silent_cpu_job(gpus, words, device):
    with pytest.raises(UsageError, match=words):
        World.detect(device, {}, gpus=gpus)
    assert World.detect("cpu", {}, gpus=gpus).device == "cpu"


def test_asking_for_a_gpu_where_there_is_none_is_an_error():
    with pytest.raises(UsageError, match=r"--device cuda needs a GPU .* use --device cpu"):
        World.detect("cuda", {}, gpus=NONE)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", "mps", ""])
def test_a_device_of_another_name_is_an_error(device):
    with pytest.raises(UsageError, match="must be auto, cpu, cuda or cuda:N"):
        World.detect(device, {}, gpus=FOUR)


def test_threads_are_as_given_else_from_the_environment_else_cores_by_ranks():
    assert resolve_num_threads(3, 2, {"OMP_NUM_THREADS": "5"}) == 3
    assert resolve_num_threads(None, 2, {"OMP_NUM_THREADS": "5"}) == 5
    assert resolve_num_threads(None, 10_000, {}) == 1


def world_of_live_group(group):
    return World.detect("cpu", {})


def test_a_live_process_group_is_believed_without_any_environment():
    assert [(w.rank, w.world_size) for w in run_ranks(world_of_live_group, 3)] == [
        (0, 3),
        (1, 3),
        (2, 3),
    ]


def test_the_world_is_known_without_importing_torch():
    code = (
        "import sys; from ddinfer.distributed.world import World; World.detect('cpu', {});"
        "import ddinfer.distributed.launch, ddinfer.distributed.partition;"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
