"""The connections between the ranks of one model: whose error is whose."""

import datetime

import pytest
import torch
import torch.distributed as dist

from ddinfer.errors import RankError
from ddinfer.parallel.communicator import Communicator, ConnectionLost, losing
from ddinfer.parallel.continuous.exchange import Exchange
from ddinfer.parallel.plans import PlanCache
from tests.ranks import run_ranks


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("Timed out waiting 1000ms for recv operation to complete"),
        dist.DistBackendError("ncclUnhandledCudaError: Call to CUDA function failed"),
    ],
)
def test_an_error_of_this_rank_is_no_lost_neighbour(error):
    with pytest.raises(type(error)) as raised, losing(1):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Connection closed by peer [127.0.0.1]:1234"),
        RuntimeError("writev [127.0.0.1]:1234: Broken pipe"),
        dist.DistBackendError("ncclRemoteError: A call failed, possibly a network error"),
        dist.DistNetworkError("failed to recv"),
    ],
)
def test_a_broken_connection_is_a_lost_neighbour(error):
    with pytest.raises(ConnectionLost) as raised, losing(1):
        raise error
    assert raised.value.group_rank == 1


def timeout_on_ranks(group):
    short = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=1))
    if group.group_rank == 0:
        with pytest.raises(RuntimeError, match="Timed out"):
            Communicator.of(short).receive(torch.zeros(1), 1)
    dist.barrier()
    return True


def test_a_timeout_is_no_lost_neighbour():
    assert run_ranks(timeout_on_ranks, 2) == [True, True]


def leaving_on_ranks(world):
    dist.init_process_group("gloo")
    comm = Communicator.of()
    comm.agree(None, "cutting the denoiser")
    if world.rank == 1:
        dist.destroy_process_group()
        return None
    with pytest.raises(RankError) as raised:
        Exchange(comm, PlanCache())
    return raised.value.rank


def test_a_rank_that_leaves_before_the_first_message_is_named():
    assert run_ranks(leaving_on_ranks, 2, join=False)[0] == 1


def closing_on_ranks(group):
    own = dist.new_group(backend="gloo")
    Communicator.of(own).close()
    assert dist.get_world_size(own) == 2, "a group that somebody else made stays"
    comm = Communicator(
        (0, 1), group.group_rank, torch.device("cpu"), None, own, owns_cpu_group=True
    )
    comm.close()
    with pytest.raises(ValueError, match=r"Invalid process group|not initialized|not created"):
        dist.get_backend(own)
    return True


def test_a_communicator_ends_the_group_that_it_made():
    assert run_ranks(closing_on_ranks, 2) == [True, True]
