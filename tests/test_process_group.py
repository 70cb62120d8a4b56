"""The group of ranks: joined, borrowed, and told the truth by whoever fails first."""

import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

import ddinfer.distributed.peers
from ddinfer.distributed.process_group import Group, loopback_store, process_group
from ddinfer.distributed.world import World
from ddinfer.errors import JoinError, RankError, UsageError
from tests.ranks import rank_environment, run_ranks


def test_a_world_of_one_has_the_same_methods_and_no_connections():
    with process_group(World()) as group:
        group.enter("running", "prompt 3")
        assert group.all_gather_object("mine") == ["mine"]
        assert group.broadcast_object("mine") == "mine"
        assert group.scatter_object(["mine"]) == "mine"
        assert [group.add("images", 2), group.add("images", 0), group.add("other")] == [2, 2, 1]
        group.wait_for_peers()
        group.check_peers()
        assert (group.group_rank, group.group_size, group.ranks) == (0, 1, (0,))
        assert not dist.is_initialized()


def exchange(group):
    rank = group.group_rank
    return (
        group.all_gather_object({"rank": rank}),
        group.broadcast_object(rank),
        group.scatter_object([10, 11, 12] if rank == 0 else None),
        dist.get_backend(group.object_group),
        str(group.device),
    )


def test_objects_are_exchanged_in_rank_order():
    told = run_ranks(exchange, 3)
    assert [t[0] for t in told] == [[{"rank": 0}, {"rank": 1}, {"rank": 2}]] * 3
    assert [t[1] for t in told] == [0, 0, 0]
    assert [t[2] for t in told] == [10, 11, 12]
    assert {t[3:] for t in told} == {("gloo", "cpu")}


def claim(group, num_items):
    mine = []
    while (number := group.add("next") - 1) < num_items:
        mine.append(number)
    return mine


def test_a_counter_gives_every_number_to_one_rank_alone():
    claimed = run_ranks(claim, 4, 100)
    assert sorted(itertools.chain(*claimed)) == list(range(100))


def arrive_late(world, late_seconds):
    with process_group(world, control_timeout_seconds=1) as group:
        if group.group_rank == 1:
            time.sleep(late_seconds)
        return group.all_gather_object(group.group_rank)


def test_a_slow_rank_makes_nobody_time_out():
    """The others wait three times as long as an exchange itself may take."""
    assert run_ranks(arrive_late, 3, 3.0, join=False) == [[0, 1, 2]] * 3


def fail_on_one_rank(world):
    try:
        with process_group(world) as group:
            group.enter("loading")
            if group.group_rank == 1:
                raise FileNotFoundError("no weights")
            group.enter("gathering")
            return group.all_gather_object(0)
    except Exception as error:  # noqa: BLE001 - what it is, is the test
        return type(error).__name__, str(error).split("\n")[0]


def call_once_more_than_rank_1(group):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("ddinfer.distributed.peers").addHandler(handler)
    ddinfer.distributed.peers.REPORT_SECONDS = 0.3
    try:
        group.enter("running", "prompt 3" if group.group_rank == 1 else "")
        if group.group_rank == 1:
            time.sleep(2)
        else:
            group.enter("gathering")
        group.wait_for_peers()
    finally:
        ddinfer.distributed.peers.REPORT_SECONDS = 60.0
    return records


def test_a_rank_that_makes_fewer_calls_is_named_by_those_that_wait():
    zero, one, two = run_ranks(call_once_more_than_rank_1, 3)
    for rank, records in ((0, zero), (2, two)):
        assert len(records) > 1
        assert all(f"rank {rank} has waited" in text for text in records)
        assert all("(gathering) for ranks that have not" in text for text in records)
        assert all("point: 1 (running prompt 3); every" in text for text in records)
    assert one == []


def test_the_first_failure_is_raised_on_every_rank():
    told = run_ranks(fail_on_one_rank, 3, join=False)
    for_others = ("RankError", "rank 1 failed while loading: FileNotFoundError: no weights")
    assert told == [for_others, ("FileNotFoundError", "no weights"), for_others]


def fail_between_batches(world):
    try:
        with process_group(world) as group:
            group.enter("running")
            group.wait_for_peers()
            if group.group_rank == 0:
                raise MemoryError("out of memory")
            while True:  # a rank in its own long work
                group.check_peers()
                time.sleep(0.01)
    except Exception as error:  # noqa: BLE001 - what it is, is the test
        return str(error).split("\n")[0]


def test_a_peers_failure_is_heard_between_batches():
    told = run_ranks(fail_between_batches, 2, join=False)
    assert told == ["out of memory", "rank 0 failed while running: MemoryError: out of memory"]


def break_a_plain_collective(world):
    """The victim of a broken connection must not be blamed for it."""
    try:
        with process_group(world) as group:
            if group.group_rank == 1:
                raise KeyError("mine")
            dist.all_reduce(torch.ones(1))
    except Exception as error:  # noqa: BLE001 - what it is, is the test
        return str(error).split("\n")[0]


def test_a_broken_connection_is_told_as_the_failure_that_broke_it():
    told = run_ranks(break_a_plain_collective, 2, join=False)
    assert told == ["rank 1 failed while starting: KeyError: 'mine'", "'mine'"]


# Joining


def join_with_one_missing(world):
    if world.rank == 1:
        return None
    try:
        with process_group(world, join_timeout_seconds=1):
            pass
    except JoinError as error:
        return str(error)


def test_a_missing_rank_is_a_join_error_with_numbers_and_never_a_world_of_one():
    message, _, _ = run_ranks(join_with_one_missing, 3, join=False)
    for words in (
        "rank 0 of 3 could not join",
        "backend gloo",
        "store at 127.0.0.1:",
        "after 1 s 2 of 3 ranks were there; missing: 1",
        "more time",
    ):
        assert words in message


def test_a_store_that_is_not_there_is_a_join_error(monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for name, value in rank_environment(1, 2, port, "run").items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(JoinError, match=rf"rank 1 of 2 .*127.0.0.1:{port}\): no store answered"),
        process_group(World.detect("cpu"), join_timeout_seconds=1),
    ):
        pass


def join_twice(world):
    """A launcher's restart finds the keys of the last attempt in the same store."""
    for attempt in range(2):
        again = replace(world, restart_count=attempt)
        with process_group(again) as group:
            total = group.add("images", 1)
            group.wait_for_peers()
            assert group.all_gather_object(attempt) == [attempt] * 2
            assert total <= 2
    return True


def test_a_restarted_run_starts_with_a_clean_store():
    assert run_ranks(join_twice, 2, join=False) == [True, True]


def create_two_groups(world):
    """As a program under torchrun that runs two jobs; nothing of the first may be left."""
    passed = []
    for number in range(2):
        with contextlib.suppress(RankError, ValueError), process_group(world) as group:
            assert group.all_gather_object(number) == [number] * 2
            if world.rank == 1:
                time.sleep(0.5)
                group.add("late")
            group.wait_for_peers()
            passed.append(group.add("late", 0))
            if number == 0 and world.rank == 1:
                raise ValueError("of the first group")
    return passed


def test_a_program_may_create_one_group_after_the_other():
    assert run_ranks(create_two_groups, 2, join=False, timeout_seconds=60) == [[1, 1], [1, 1]]


def test_ranks_without_a_launcher_meet_at_rank_zero(tmp_path):
    """RANK and its companions set by hand: rank 0 hosts the store, and ends last."""
    script = tmp_path / "rank.py"
    script.write_text(
        "from ddinfer.distributed.process_group import process_group\n"
        "from ddinfer.distributed.world import World\n"
        "with process_group(World.detect('cpu')) as group:\n"
        "    print(group.all_gather_object(group.world.rank))\n"
    )
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    ranks = []
    for rank in range(2):
        environ = {**os.environ, **rank_environment(rank, 2, port, "run")}
        environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "PYTHONPATH": os.getcwd()}
        ranks.append(subprocess.Popen([sys.executable, script], env=environ, stdout=-1, text=True))
    assert [rank.communicate(timeout=240)[0] for rank in ranks] == ["[0, 1]\n"] * 2
    assert [rank.returncode for rank in ranks] == [0, 0]


def test_the_store_listens_on_loopback_alone():
    store = loopback_store()
    with open("/proc/net/tcp") as four, open("/proc/net/tcp6") as six:
        rows = [line.split() for line in [*four, *six]]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{store.port:04X}")]
    assert listening == [f"0100007F:{store.port:04X}"]


# Borrowing


def borrow_the_whole_world(world):
    dist.init_process_group("gloo")
    mine = dist.group.WORLD
    with process_group(world) as group:
        gathered = group.all_gather_object(world.rank)
        same = group.object_group is mine
    still_works = torch.ones(1)
    dist.all_reduce(still_works)
    return gathered, same, dist.is_initialized(), still_works.item()


def test_a_group_that_exists_is_borrowed_and_left_as_it_was():
    told = run_ranks(borrow_the_whole_world, 2, join=False)
    assert told == [([0, 1], True, True, 2.0)] * 2


def borrow_part_of_the_world(group):
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine, other = pairs[group.group_rank % 2], pairs[1 - group.group_rank % 2]
    with pytest.raises(UsageError, match="is not in the group"):
        Group.borrow(other)
    told = []
    for _ in range(3):  # as a training loop does after every epoch
        ranks = Group.borrow(mine)
        told.append(ranks.all_gather_object(ranks.world.rank))
    assert list(ranks.ranks) == told[0]
    return told


def test_a_part_of_the_world_is_borrowed_with_its_own_numbering():
    assert run_ranks(borrow_part_of_the_world, 4) == [[[0, 2]] * 3, [[1, 3]] * 3] * 2


def borrow_a_failure(group):
    ranks = Group.borrow()
    if ranks.group_rank == 0:
        ranks.report_failure(ValueError("mine"))
    with pytest.raises(RankError, match="rank 0 failed while starting: ValueError: mine"):
        ranks.wait_for_peers() if ranks.group_rank else ranks.check_peers()
    Group.borrow().wait_for_peers()
    return True


def test_a_failure_in_a_borrowed_group_does_not_outlive_the_call():
    assert run_ranks(borrow_a_failure, 2) == [True, True]


def test_a_program_without_a_group_borrows_a_world_of_one(monkeypatch):
    for name in rank_environment(0, 1, 1, ""):
        monkeypatch.delenv(name, raising=False)
    group = Group.borrow()
    assert group.all_gather_object(1) == [1]


def test_ranks_without_a_group_are_an_error_instead_of_copies(monkeypatch):
    for name, value in rank_environment(1, 2, 1, "run").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=r"rank 1 of 2, .* every rank would do all the work"):
        Group.borrow()


def meet_while_a_thread_counts(group):
    """Progress is counted from threads while the main thread waits."""
    threads = [threading.Thread(target=group.add, args=("done",)) for _ in range(20)]
    for thread in threads:
        thread.start()
    group.wait_for_peers()
    for thread in threads:
        thread.join()
    group.wait_for_peers()
    return group.add("done", 0)


def test_counters_may_be_used_from_threads():
    assert run_ranks(meet_while_a_thread_counts, 3) == [60, 60, 60]
