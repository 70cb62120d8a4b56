"""The process group of a job, and the store beside it through which ranks speak during the work."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ddinfer.distributed.world import World
from ddinfer.errors import EXIT_BUG, ErrorRecord, JoinError, RankError, UsageError

#: How long ranks wait for the last one to join.
JOIN_TIMEOUT_SECONDS = 600.0
#: How long one exchange of small objects may take once all ranks have come to it.
CONTROL_TIMEOUT_SECONDS = 300.0
#: Exchanges in a borrowed group: ranks come to them after work of any length, and a peer that
#: died is noticed by its closed connection, so the timeout has nothing to tell.
BORROWED_TIMEOUT_SECONDS = 7 * 24 * 3600.0

#: How long the victim of a broken connection waits to be told whose fault it is.
DEAD_PEER_SECONDS = 3.0

FAILURE_KEY = "failure"


@dataclass
class Group:
    """Ranks that work together.

    Collectives take part before and after the work only. During the work ranks speak through
    the store: a failure, a counter, a finish line; no timeout runs while a peer is busy.

    Attributes:
        device_group: for tensors, of the device's backend; ``None`` in a world of one.
        object_group: for objects, always gloo; ``None`` in a world of one.
        group_rank: this rank's number in the group, which is ``world.rank`` unless borrowed.
    """

    world: World
    store: dist.Store
    device_group: dist.ProcessGroup | None = None
    object_group: dist.ProcessGroup | None = None
    group_rank: int = 0
    group_size: int = 1
    phase: str = "starting"
    _meetings: dict[str, int] = field(default_factory=dict)

    @classmethod
    def alone(cls, world: World | None = None) -> Group:
        """A world of one: the same methods, no sockets."""
        return cls(world or World(), dist.HashStore())

    @classmethod
    def borrow(cls, group: dist.ProcessGroup | None = None, world: World | None = None) -> Group:
        """The caller's group, or a world of one where there is none. Never destroyed by us.

        A gloo group for objects is made beside it on first use and kept with it, so that every
        rank of ``group`` must come here together the first time.

        Raises:
            UsageError: this rank is not in ``group``.
        """
        if not (dist.is_available() and dist.is_initialized()):
            if group is not None:
                raise UsageError("a group was given, but torch.distributed is not initialised")
            return cls.alone(world)
        members = dist.group.WORLD if group is None else group
        group_rank = dist.get_rank(members)
        if group_rank < 0:
            raise UsageError(
                f"rank {dist.get_rank()} is not in the group it was given; call this on the "
                "group's ranks only"
            )
        ranks = dist.get_process_group_ranks(members)
        store = dist.PrefixStore("ddinfer", dist.distributed_c10d._get_default_store())
        return cls(
            world or World.detect("cpu"),
            store,
            members,
            _object_group_beside(members, ranks),
            group_rank,
            len(ranks),
        )

    def global_rank(self, group_rank: int) -> int:
        if self.object_group is None:
            return self.world.rank
        return dist.get_global_rank(self.object_group, group_rank)

    # --- before and after the work: everybody comes -------------------------------------------

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, on every rank; pickled, over gloo."""
        if self.object_group is None:
            return [value]
        gathered: list[Any] = [None] * self.group_size
        dist.all_gather_object(gathered, value, group=self.object_group)
        return gathered

    def broadcast_object(self, value: Any = None) -> Any:
        """Rank 0's ``value`` on every rank."""
        if self.object_group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group_src=0, group=self.object_group)
        return box[0]

    def scatter_object(self, values: list[Any] | None) -> Any:
        """Rank 0's ``values[k]`` on rank k."""
        if self.object_group is None:
            assert values is not None
            return values[0]
        box: list[Any] = [None]
        dist.scatter_object_list(box, values, group_src=0, group=self.object_group)
        return box[0]

    # --- during the work: through the store ---------------------------------------------------

    def enter(self, phase: str, detail: str = "") -> None:
        """Say what this rank does now; shown when it fails or is killed."""
        self.phase = phase
        if self.group_size > 1:
            self.store.set(activity_key(self.world.rank), f"{phase} {detail}".strip())

    def add(self, key: str, amount: int) -> int:
        """Add to a counter of the group; returns its new value. ``amount=0`` reads it."""
        return self.store.add(f"count/{key}", amount)

    def report_failure(self, error: BaseException) -> None:
        """Tell the others that this rank failed. The first failure is kept."""
        exit_code = getattr(error, "exit_code", EXIT_BUG)
        record = ErrorRecord.of(error)
        write_failure(self.store, self.world.rank, self.phase, record=record, exit_code=exit_code)

    def check_peers(self) -> None:
        """Raise the group's first failure, if there is one. Cheap: one look into the store."""
        if self.group_size > 1:
            failure = read_failure(self.store)
            if failure is not None:
                raise failure

    def wait_for_peers(self, meeting: str, *, poll_seconds: float = 0.2) -> None:
        """Wait until every rank has come here, however long that takes.

        Raises:
            RankError: a peer failed meanwhile.
        """
        turn = self._meetings[meeting] = self._meetings.get(meeting, -1) + 1
        key = f"meeting/{meeting}/{turn}"
        pause = 0.002
        if self.store.add(key, 1) > self.group_size:
            raise RuntimeError(f"more than {self.group_size} ranks came to {key}")
        while self.store.add(key, 0) < self.group_size:
            self.check_peers()
            time.sleep(pause)
            pause = min(2 * pause, poll_seconds)


def activity_key(rank: int) -> str:
    return f"activity/{rank}"


def write_failure(
    store: dist.Store,
    rank: int,
    phase: str,
    *,
    record: ErrorRecord | None = None,
    exitcode: int | None = None,
    exit_code: int = EXIT_BUG,
) -> None:
    """Put a rank's failure into the store, unless one is there."""
    text = json.dumps(
        {
            "rank": rank,
            "phase": phase,
            "record": None if record is None else record.to_dict(),
            "exitcode": exitcode,
            "exit_code": exit_code,
        }
    )
    store.compare_set(FAILURE_KEY, "", text)


def read_failure(store: dist.Store) -> RankError | None:
    """The first failure that any rank, or the launcher on its behalf, has put into the store."""
    if not store.check([FAILURE_KEY]):
        return None
    data: Mapping[str, Any] = json.loads(store.get(FAILURE_KEY))
    record = None if data["record"] is None else ErrorRecord(**data["record"])
    return RankError(
        data["rank"],
        data["phase"],
        record,
        exitcode=data["exitcode"],
        exit_code=data["exit_code"],
    )


@contextlib.contextmanager
def process_group(
    world: World,
    *,
    join_timeout_seconds: float = JOIN_TIMEOUT_SECONDS,
    control_timeout_seconds: float = CONTROL_TIMEOUT_SECONDS,
) -> Iterator[Group]:
    """The group of ``world``: made and destroyed here, or the caller's, borrowed.

    ``init_process_group("nccl")`` with a gloo group beside it for objects where the device is a
    GPU; gloo alone on CPU. What fails inside is told to the other ranks before it is raised.

    Raises:
        JoinError: the ranks did not all come within ``join_timeout_seconds``.
    """
    if dist.is_available() and dist.is_initialized():
        with _failures_told(Group.borrow(world=world)) as group:
            yield group
        return
    if world.world_size == 1:
        with _failures_told(Group.alone(world)) as group:
            yield group
        return
    with contextlib.ExitStack() as undo:
        if world.num_nodes == 1:
            undo.enter_context(_loopback_only())
        store = join(world, join_timeout_seconds)
        timeout = datetime.timedelta(seconds=control_timeout_seconds)
        on_gpu = world.device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(world.device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.world_size,
            timeout=timeout,
            device_id=torch.device(world.device) if on_gpu else None,
        )
        device_group = dist.group.WORLD
        object_group = dist.new_group(backend="gloo", timeout=timeout) if on_gpu else device_group
        group = Group(world, store, device_group, object_group, world.rank, world.world_size)
        with _failures_told(group):
            yield group
        # Only after success: destroying an NCCL group whose peers are gone can wait for them.
        dist.destroy_process_group()


@contextlib.contextmanager
def _failures_told(group: Group) -> Iterator[Group]:
    try:
        yield group
    except RankError:
        raise  # a peer's, told by that peer
    except BaseException as error:
        culprit = _dead_peer(group, error)
        if culprit is not None:
            raise culprit from error
        group.report_failure(error)
        raise


def _dead_peer(group: Group, error: BaseException) -> RankError | None:
    """The peer behind a broken connection: its own error, or what the launcher saw of it.

    A rank that hears a connection break is the victim; whoever broke it is about to be reported.
    """
    if group.group_size == 1 or "onnection" not in str(error):
        return None
    deadline = time.monotonic() + DEAD_PEER_SECONDS
    while time.monotonic() < deadline:
        failure = read_failure(group.store)
        if failure is not None:
            return failure
        time.sleep(0.05)
    return None


def join(world: World, timeout_seconds: float = JOIN_TIMEOUT_SECONDS) -> dist.Store:
    """Connect to the launcher's store and wait there for all ranks of ``world``.

    Raises:
        JoinError: no store there, or some ranks did not come.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = datetime.timedelta(seconds=timeout_seconds)
    try:
        base = _connect(world, host, port, limit)
    except (dist.DistNetworkError, dist.DistStoreError, OSError) as error:
        raise JoinError(
            f"rank {world.rank} of {world.world_size} found no store at {host}:{port} within "
            f"{timeout_seconds:.0f} s: {_first_line(error)}. Is the launcher still running, and "
            "is MASTER_ADDR reachable from this machine?"
        ) from error
    # A restarted run finds the keys of its last attempt in the same store.
    store = dist.PrefixStore(f"ddinfer/{world.run_id}/{world.restart_count}", base)
    store.set(f"joined/{world.rank}", world.device)
    wanted = [f"joined/{rank}" for rank in range(world.world_size)]
    deadline = time.monotonic() + timeout_seconds
    while not store.check(wanted):
        failure = read_failure(store)
        if failure is not None:
            raise failure
        if time.monotonic() > deadline:
            missing = [r for r, key in enumerate(wanted) if not store.check([key])]
            raise JoinError(
                f"{len(missing)} of {world.world_size} ranks did not join within "
                f"{timeout_seconds:.0f} s: {_some(missing)}. Look at their own output for the "
                "reason; all ranks must be started with the same world size"
            )
        time.sleep(0.01)
    return store


def _connect(world: World, host: str, port: int, limit: datetime.timedelta) -> dist.Store:
    hosted_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host_it_here = world.rank == 0 and not hosted_by_launcher
    if host_it_here and world.num_nodes == 1 and host in ("127.0.0.1", "localhost"):
        return loopback_store(port)
    return dist.TCPStore(host, port, None, host_it_here, timeout=limit, wait_for_workers=False)


def loopback_store(port: int = 0) -> dist.TCPStore:
    """A store that this process hosts and that nobody outside this machine can reach.

    Given a host name TCPStore would listen on every address, so it is handed a socket instead.

    Args:
        port: 0 takes a free one.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(1024)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        "127.0.0.1",
        port,
        None,
        True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


@contextlib.contextmanager
def _loopback_only() -> Iterator[None]:
    """Keep gloo's and NCCL's own sockets on loopback, where the user has not chosen otherwise."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    ours = [n for n in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if n not in os.environ]
    os.environ.update(dict.fromkeys(ours, loopback))
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _object_group_beside(members: dist.ProcessGroup, ranks: list[int]) -> dist.ProcessGroup:
    """The gloo group that goes with a borrowed one: kept as its attribute, dying with it."""
    kept = getattr(members, "_ddinfer_object_group", None)
    if kept is None:
        kept = dist.new_group(
            ranks,
            backend="gloo",
            timeout=datetime.timedelta(seconds=BORROWED_TIMEOUT_SECONDS),
            use_local_synchronization=True,  # ranks outside a subgroup need not come
        )
        members._ddinfer_object_group = kept  # type: ignore[attr-defined]
    return kept


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _some(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}" + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
