"""The group of ranks: made for a job, or borrowed from a program that has one already."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ddinfer.distributed.peers import Failure, PeerStatus, StoreLost
from ddinfer.distributed.store import announce_address, network_interface, open_store
from ddinfer.distributed.store import loopback_store as loopback_store
from ddinfer.distributed.world import World, from_environment
from ddinfer.errors import DdinferError, JoinError, RankError, UsageError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Store

JOIN_TIMEOUT_SECONDS = 300.0
CONTROL_TIMEOUT_SECONDS = 600.0

#: How long a rank that hosts the store itself keeps it for the others at the end.
_HOST_LINGERS_SECONDS = 60.0

#: What gloo and NCCL say of a connection, as against an error of the program.
_CONNECTION_WORDS = ("onnection", "Broken pipe", "imed out", "NCCL", "socket")

#: Gloo groups made beside groups that cannot carry objects; they end with those.
_SIDE_GROUPS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Group:
    """Ranks that work together, and what they tell one another.

    Attributes:
        world: who this process is.
        device: where it computes.
        ranks: global ranks in the group's order.
        group_rank: this rank's place among them.
        store: shared by these ranks, for any keys of the caller's.
        device_group: the ``torch.distributed`` group; ``None`` for a process alone.
        object_group: gloo on the CPU, for objects; ``None`` for a process alone.
    """

    def __init__(
        self,
        world: World,
        store: Store,
        *,
        device: torch.device,
        ranks: Sequence[int] = (0,),
        group_rank: int = 0,
        device_group: ProcessGroup | None = None,
        object_group: ProcessGroup | None = None,
    ):
        from torch.distributed import PrefixStore

        self.world, self.device = world, device
        self.ranks, self.group_rank = tuple(ranks), group_rank
        self.device_group, self.object_group = device_group, object_group
        self.store = PrefixStore("shared", store)
        self._whole_store = store
        self.board = PeerStatus(PrefixStore("board", store), self.ranks, group_rank)

    @classmethod
    def alone(cls, world: World | None = None) -> Group:
        """A group of this process: the same methods, no connections, nothing listens."""
        import torch
        from torch.distributed import HashStore

        world = World() if world is None else world
        return cls(world, HashStore(), device=torch.device(world.device), ranks=(world.rank,))

    @classmethod
    def borrow(cls, group: ProcessGroup | None = None, world: World | None = None) -> Group:
        """The group of somebody's program, left as it is: never made again, never destroyed.

        Every rank of ``group`` (default: all ranks) calls this, in the same order as its other
        collectives. Where the group has no gloo backend, a gloo group is made beside it once.

        Raises:
            UsageError: this rank is not in ``group``; or a launcher started several ranks and
                there is no process group, so that each would do all the work.
        """
        import torch.distributed as dist

        if group is None and not (dist.is_available() and dist.is_initialized()):
            found = from_environment(os.environ) if world is None else world
            if found.world_size > 1:
                raise UsageError(
                    f"this is rank {found.rank} of {found.world_size}, but there is no process "
                    "group, so that every rank would do all the work; call "
                    "torch.distributed.init_process_group() first"
                )
            return cls.alone(world)
        return _borrowed(dist.group.WORLD if group is None else group, world)

    def second_board(self) -> PeerStatus:
        """The board through a connection of its own, for a thread that must not wait."""
        from torch.distributed import PrefixStore

        store = PrefixStore("board", self._whole_store.clone())  # type: ignore[attr-defined]
        return PeerStatus(store, self.ranks, self.group_rank)

    @property
    def group_size(self) -> int:
        return len(self.ranks)

    def global_rank(self, group_rank: int) -> int:
        """The global rank of a place in this group."""
        return self.ranks[group_rank]

    # Exchanges: everybody is waited for without a timeout, then the exchange itself has one.

    def all_gather_object(self, item: Any) -> list[Any]:
        """Every rank's ``item``, in rank order, on every rank. Pickled; keep tensors on the CPU."""
        if self.object_group is None:
            return [item]
        import torch.distributed as dist

        self.wait_for_peers(self.phase)
        gathered: list[Any] = [None] * self.group_size
        with self._attribute_error():
            dist.all_gather_object(gathered, item, group=self.object_group)
        return gathered

    def gather_object(self, item: Any, dst: int = 0) -> list[Any]:
        """Every rank's ``item``, in rank order, on group rank ``dst``; ``[]`` elsewhere."""
        if self.object_group is None:
            return [item]
        import torch.distributed as dist

        self.wait_for_peers(self.phase)
        here = self.group_rank == dst
        gathered: list[Any] | None = [None] * self.group_size if here else None
        with self._attribute_error():
            dist.gather_object(item, gathered, dst=self.ranks[dst], group=self.object_group)
        return gathered or []

    def broadcast_object(self, item: Any = None, src: int = 0) -> Any:
        """The ``item`` of group rank ``src``, on every rank."""
        if self.object_group is None:
            return item
        import torch.distributed as dist

        self.wait_for_peers(self.phase)
        box = [item if self.group_rank == src else None]
        with self._attribute_error():
            dist.broadcast_object_list(box, src=self.ranks[src], group=self.object_group)
        return box[0]

    def scatter_object(self, items: Sequence[Any] | None = None, src: int = 0) -> Any:
        """``items[k]`` of group rank ``src``, on group rank k."""
        if self.object_group is None:
            assert items is not None
            return items[0]
        import torch.distributed as dist

        self.wait_for_peers(self.phase)
        box: list[Any] = [None]
        given = list(items) if items is not None and self.group_rank == src else None
        with self._attribute_error():
            dist.scatter_object_list(box, given, src=self.ranks[src], group=self.object_group)
        return box[0]

    def wait_for_peers(self, phase: str) -> None:
        """Wait, without a timeout, until every rank is here.

        Raises:
            RankError: a rank failed, or died before it came.
        """
        if self.group_size > 1:
            self.board.barrier(phase)

    # Failures and progress

    def report_failure(self, error: BaseException) -> RankError:
        """Tell every rank and the launcher → the first failure of the job, this or another."""
        return self.board.post_failure(Failure.of(self.world.rank, self.phase, error)).to_error()

    def check_peers(self) -> None:
        """Raise if a rank has failed. One short question to the store; ask it between batches.

        Where the launcher lets the living finish (``on_failure="finish"``) it raises only what
        ends the job for all: a full disk, a signal.
        """
        if self.group_size > 1:
            failure = self.board.first_failure()
            if failure is not None and (failure.ends_the_job or not self.board.continue_on_failure):
                raise failure.to_error()

    @property
    def phase(self) -> str:
        """What this rank does now, as it said last."""
        return self.board.phase

    def enter(self, phase: str, detail: str = "") -> None:
        """Say what this rank does now: shown with its failure, and if it is killed."""
        self.board.enter(phase, detail)

    def add(self, key: str, number: int = 1) -> int:
        """Add to a counter that all ranks share → its new value. Two ranks never get the same."""
        return self.board.add(key, number)

    @contextlib.contextmanager
    def _attribute_error(self) -> Iterator[None]:
        """A broken connection is the symptom; raise the failure of the rank that caused it."""
        try:
            yield
        except RuntimeError as error:
            self.raise_root_cause(error)
            raise DdinferError(
                f"an exchange with {self.group_size} ranks failed on rank {self.world.rank} while "
                f"{self.phase}: {error}"
            ) from error

    def raise_root_cause(self, error: BaseException) -> None:
        """Raise the `RankError` behind a broken connection, if another rank failed or died."""
        try:
            self.board.wait_for_exit_report()
            self.board.raise_dead()
        except RankError as cause:
            raise cause from error


@contextlib.contextmanager
def process_group(
    world: World,
    *,
    join_timeout_seconds: float = JOIN_TIMEOUT_SECONDS,
    control_timeout_seconds: float = CONTROL_TIMEOUT_SECONDS,
) -> Iterator[Group]:
    """The group of ``world``: NCCL with gloo beside it on GPUs, gloo on CPUs.

    A group that exists is borrowed. A world of one needs none. Leaving the context meets the
    other ranks, so that the failure of one is raised on all: each raises the first failure, the
    failed rank its own error.

    Args:
        join_timeout_seconds: for all ranks to come.
        control_timeout_seconds: for one exchange of objects, once all ranks have arrived at it.

    Raises:
        JoinError: ranks are missing or cannot be connected to.
        RankError: another rank failed.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        with _propagate_failures(Group.borrow(world=world)) as group:
            yield group
        return
    if world.world_size == 1:
        with _propagate_failures(_alone(world, join_timeout_seconds)) as group:
            yield group
        return
    store = _own_store(world, join_timeout_seconds)
    group = _enrolled(world, store, join_timeout_seconds)
    with network_interface(world, store):
        _connect(group, store, control_timeout_seconds)
        try:
            with _propagate_failures(group):
                yield group
        finally:
            dist.destroy_process_group()
            if not world.launcher_hosts_store:
                _leave_store(group)


@contextlib.contextmanager
def _propagate_failures(group: Group) -> Iterator[Group]:
    """What fails inside on any rank is raised on every rank, at the latest on leaving."""
    try:
        yield group
        group.wait_for_peers("leaving")
    except GeneratorExit:
        raise
    except BaseException as error:
        _raise_first(group, error)
        raise


def _raise_first(group: Group, error: BaseException) -> None:
    """Raise another rank's failure instead, if that came first."""
    with contextlib.suppress(StoreLost):
        if isinstance(error, RuntimeError) and any(w in str(error) for w in _CONNECTION_WORDS):
            group.raise_root_cause(error)
        first = group.report_failure(error)
        if first.rank != group.world.rank and not isinstance(error, RankError):
            raise first from error


def _alone(world: World, join_seconds: float) -> Group:
    """Needs no peers, but a launcher that watches wants to know what its only rank does."""
    import torch

    _use_device(torch.device(world.device))
    if not world.launcher_hosts_store:
        return Group.alone(world)
    return Group(world, _own_store(world, join_seconds), device=torch.device(world.device))


def _own_store(world: World, join_seconds: float) -> Store:
    """The part of the launcher's store that belongs to this attempt of this run."""
    import torch.distributed as dist

    try:
        store = open_store(world, join_seconds)
    except (RuntimeError, OSError) as error:
        raise _join_error(
            world,
            f"no store answered within {join_seconds:g} s: {_first_line(error)}",
            "Check MASTER_ADDR and MASTER_PORT, and that rank 0 or torchrun runs there",
        ) from error
    # A store that the launcher keeps has seen the attempts before. One that rank 0 hosts is new,
    # and machines need not agree on how often they restarted: one that came back begins at 0.
    attempt = world.restart_count if world.launcher_hosts_store else 0
    return dist.PrefixStore(f"ddinfer/{world.run_id}/{attempt}", store)


def _backend(world: World) -> str:
    return "cpu:gloo,cuda:nccl" if world.device.startswith("cuda") else "gloo"


def _join_error(world: World, why: str, fix: str) -> JoinError:
    return JoinError(
        f"rank {world.rank} of {world.world_size} could not join its process group (backend "
        f"{_backend(world)}, store at {world.store_address}): {why}. {fix}"
    )


def _enrolled(world: World, store: Store, join_seconds: float) -> Group:
    """The group once all ranks have come; they are not connected yet."""
    import torch

    device = torch.device(world.device)
    group = Group(world, store, device=device, ranks=range(world.world_size), group_rank=world.rank)
    announce_address(world, store)
    missing = group.board.wait_for_all(join_seconds)
    if missing:
        raise _join_error(
            world,
            f"after {join_seconds:g} s {world.world_size - len(missing)} of {world.world_size} "
            f"ranks were there; missing: {', '.join(map(str, missing[:20]))}",
            "See whether those ranks started, or give them more time to start",
        )
    return group


def _connect(group: Group, store: Store, control_seconds: float) -> None:
    """Make the ``torch.distributed`` group."""
    import torch.distributed as dist

    world, device = group.world, group.device
    try:
        _use_device(device)
        dist.init_process_group(
            _backend(world),
            store=dist.PrefixStore("init", store),
            rank=world.rank,
            world_size=world.world_size,
            timeout=timedelta(seconds=control_seconds),
            # Only for an accelerator: a CPU device raises.
            device_id=None if device.type == "cpu" else device,
        )
    except (RuntimeError, ValueError) as error:
        raise _join_error(
            world,
            f"all ranks were there, but connecting them failed: {_first_line(error)}",
            "Check that these machines reach one another (GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME choose the network interface)",
        ) from error
    group.device_group = group.object_group = dist.group.WORLD


def _use_device(device: torch.device) -> None:
    """Make a GPU the current one, for kernels that do not ask where their tensors are."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)


def _leave_store(group: Group) -> None:
    """Whoever hosts the store ends last."""
    with contextlib.suppress(StoreLost):
        group.board.leave()
        if group.world.rank == 0:
            group.board.wait_until_left(_HOST_LINGERS_SECONDS)


def _borrowed(group: Any, world: World | None) -> Group:
    import torch
    import torch.distributed as dist

    if group is dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(group) < 0:
        raise UsageError(
            f"rank {dist.get_rank()} is not in the group: only its ranks may call this"
        )
    ranks, group_rank = dist.get_process_group_ranks(group), dist.get_rank(group)
    backends = _backends(group)
    if world is None:
        on_gpu = "cuda" in backends and torch.cuda.is_available()
        device = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
        world = replace(World.detect("cpu"), device=device)
    store = _store_of(group)
    # Every call gets keys of its own. Ranks call equally often, so that their numbers agree.
    number = store.add(f"calls/{group_rank}", 1)
    borrowed = Group(
        world,
        dist.PrefixStore(f"call/{number}", store),
        device=torch.device(world.device),
        ranks=ranks,
        group_rank=group_rank,
        device_group=group,
        object_group=group if backends.get("cpu") == "gloo" else _side_group(group, ranks),
    )
    if len(ranks) > 1:
        borrowed.board.announce()  # so that its death ends the others' waits
    return borrowed


def _side_group(group: Any, ranks: Sequence[int]) -> Any:
    import torch.distributed as dist

    side = _SIDE_GROUPS.get(group)
    if side is None:
        side = dist.new_group(list(ranks), backend="gloo", use_local_synchronization=True)
        _SIDE_GROUPS[group] = side
    return side


def _store_of(group: Any) -> Any:
    import torch.distributed as dist

    ask = getattr(group, "get_group_store", None)
    base = ask() if ask else dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"ddinfer/{group.group_name}", base)


def _backends(group: Any) -> dict[str, str]:
    """Device type → backend name."""
    import torch.distributed as dist

    pairs = (item.split(":", 1) for item in str(dist.get_backend_config(group)).split(","))
    return {device: backend for device, backend in pairs}


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
