"""The group of ranks: created for a job, or borrowed from a program that has one already."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ddinfer.distributed.peers import CONTINUE_ON_FAILURE, PeerStatus, StoreLost
from ddinfer.distributed.store import announce_address, network_interface, open_store
from ddinfer.distributed.store import loopback_store as loopback_store
from ddinfer.distributed.world import World, from_environment
from ddinfer.errors import DdinferError, JoinError, RankError, UsageError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Store

JOIN_TIMEOUT_SECONDS = 300.0
CONTROL_TIMEOUT_SECONDS = 600.0

#: How long a rank that hosts the store itself keeps it for the others at the end.
_HOST_WAIT_SECONDS = 60.0

#: In the messages of gloo and NCCL about connections, as against errors of the program.
_CONNECTION_WORDS = ("onnection", "Broken pipe", "imed out", "NCCL", "socket")

#: Group without a gloo backend → gloo group of the same ranks; it ends with that group.
_SIDE_GROUPS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class Group(PeerStatus):
    """Ranks that work together: their status, and exchanges of objects between them.

    Args:
        store: shared by these ranks alone (a prefix of its own).

    Attributes:
        world: who this process is.
        device: where it computes.
        ranks: global ranks in the group's order.
        group_rank: this rank's place among them.
        object_group: a ``torch.distributed`` group with gloo on the CPU, for objects; ``None``
            for a process alone.
    """

    def __init__(
        self,
        world: World,
        store: Store,
        ranks: Sequence[int],
        group_rank: int = 0,
        object_group: ProcessGroup | None = None,
    ):
        import torch
        from torch.distributed import PrefixStore

        super().__init__(PrefixStore("peers", store), ranks, group_rank)
        self.world, self.device = world, torch.device(world.device)
        self.group_rank, self.object_group = group_rank, object_group

    @classmethod
    def alone(cls, world: World | None = None) -> Group:
        """A group of this process: the same methods, no connections, nothing listens."""
        from torch.distributed import HashStore

        world = World() if world is None else world
        return cls(world, HashStore(), (world.rank,))

    @classmethod
    def borrow(cls, group: ProcessGroup | None = None, world: World | None = None) -> Group:
        """A group of the caller's program, which is neither changed nor destroyed.

        Every rank of ``group`` (default: all ranks) calls this, in the same order as its other
        collectives. Where the group has no gloo backend, a gloo group is created for it once.

        Raises:
            UsageError: this rank is not in ``group``; or a launcher started several ranks and
                there is no process group, so that each would do all the work.
        """
        import torch
        import torch.distributed as dist

        if group is None and not dist.is_initialized():
            found = from_environment(os.environ) if world is None else world
            if found.world_size > 1:
                raise UsageError(
                    f"this is rank {found.rank} of {found.world_size}, but there is no process "
                    "group, so that every rank would do all the work; call "
                    "torch.distributed.init_process_group() first"
                )
            return cls.alone(world)
        borrowed: Any = dist.group.WORLD if group is None else group
        if borrowed is dist.GroupMember.NON_GROUP_MEMBER or dist.get_rank(borrowed) < 0:
            raise UsageError(
                f"rank {dist.get_rank()} is not in the group: only its ranks may call this"
            )
        ranks, group_rank = dist.get_process_group_ranks(borrowed), dist.get_rank(borrowed)
        backends = backends_of(borrowed)
        if world is None:
            on_gpu = "cuda" in backends and torch.cuda.is_available()
            device = f"cuda:{torch.cuda.current_device()}" if on_gpu else "cpu"
            world = replace(World.detect("cpu"), device=device)
        store = _store_of(borrowed)
        # Every call gets keys of its own. Ranks call equally often, so that their numbers agree.
        number = store.add(f"calls/{group_rank}", 1)
        object_group = borrowed if backends.get("cpu") == "gloo" else _side_group(borrowed, ranks)
        made = cls(
            world, dist.PrefixStore(f"call/{number}", store), ranks, group_rank, object_group
        )
        made.announce()  # so that its death ends the others' waits
        return made

    @property
    def group_size(self) -> int:
        return len(self.ranks)

    # Exchanges of objects: pickled, so that tensors should be on the CPU. All ranks are waited
    # for without a timeout; the exchange itself has one.

    def all_gather_object(self, item: Any) -> list[Any]:
        """Every rank's ``item``, in rank order, on every rank."""
        import torch.distributed as dist

        gathered = [item] * self.group_size
        if self.object_group is not None:
            with self._exchanging():
                dist.all_gather_object(gathered, item, group=self.object_group)
        return gathered

    def gather_object(self, item: Any) -> list[Any]:
        """Every rank's ``item``, in rank order, on the first rank; ``[]`` elsewhere."""
        import torch.distributed as dist

        gathered = [item] * self.group_size if self.group_rank == 0 else None
        if self.object_group is not None:
            with self._exchanging():
                dist.gather_object(item, gathered, dst=self.ranks[0], group=self.object_group)
        return gathered or []

    def broadcast_object(self, item: Any = None) -> Any:
        """The ``item`` of the first rank, on every rank."""
        return self.scatter_object([item] * self.group_size if self.group_rank == 0 else None)

    def scatter_object(self, items: Sequence[Any] | None = None) -> Any:
        """``items[k]`` of the first rank, on group rank k."""
        import torch.distributed as dist

        given = None if items is None else list(items)
        if self.object_group is None:
            return given[0] if given else None
        box: list[Any] = [None]
        with self._exchanging():
            dist.scatter_object_list(box, given, src=self.ranks[0], group=self.object_group)
        return box[0]

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Wait for all ranks; a broken connection inside is raised as the failure behind it."""
        self.wait_for_peers()
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
            self.wait_for_exit_report()
            self.raise_dead(self.ranks)
        except RankError as cause:
            raise cause from error


@contextlib.contextmanager
def process_group(
    world: World,
    *,
    join_timeout_seconds: float = JOIN_TIMEOUT_SECONDS,
    control_timeout_seconds: float = CONTROL_TIMEOUT_SECONDS,
) -> Iterator[Group]:
    """The group of ``world``: NCCL and gloo on GPUs, gloo on CPUs. Every rank calls this.

    A group that exists is borrowed. A world of one needs none. Leaving the context waits for the
    other ranks, so that the failure of one is raised on all: each raises the first failure, the
    failed rank its own error.

    Args:
        join_timeout_seconds: until all ranks have joined.
        control_timeout_seconds: for one exchange of objects, once all ranks have arrived at it.

    Raises:
        JoinError: ranks are missing or cannot be connected to.
        RankError: another rank failed.
    """
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() and world.device.startswith("cuda"):
        torch.cuda.set_device(world.device)  # for kernels that do not ask where their tensors are
    with contextlib.ExitStack() as stack:
        if dist.is_initialized():
            group = Group.borrow(world=world)
        elif world.world_size > 1:
            joined = _joined(world, join_timeout_seconds, control_timeout_seconds)
            group = stack.enter_context(joined)
        elif world.launcher_hosts_store:  # it watches what its only rank does
            group, _ = _new_group(world, join_timeout_seconds)
        else:
            group = Group.alone(world)
        try:
            yield group
            group.wait_for_peers()
        except BaseException as error:
            _raise_first(group, error)
            raise


def _raise_first(group: Group, error: BaseException) -> None:
    """Raise another rank's failure instead, if that was first."""
    with contextlib.suppress(StoreLost):
        if isinstance(error, RuntimeError) and any(w in str(error) for w in _CONNECTION_WORDS):
            group.raise_root_cause(error)
        first = group.report_failure(error)
        if first.rank != group.world.rank and not isinstance(error, RankError):
            raise first from error


@contextlib.contextmanager
def _joined(world: World, join_seconds: float, control_seconds: float) -> Iterator[Group]:
    """A new ``torch.distributed`` group of all ranks."""
    import torch
    import torch.distributed as dist

    group, store = _new_group(world, join_seconds)
    announce_address(world, store)
    missing = group.wait_for_all(join_seconds)
    if missing:
        raise _join_error(
            world,
            f"after {join_seconds:g} s {world.world_size - len(missing)} of {world.world_size} "
            f"ranks were there; missing: {', '.join(map(str, missing[:20]))}",
            "See whether those ranks started, or give them more time to start",
        )
    with network_interface(world, store):
        try:
            dist.init_process_group(
                _backend(world),
                store=dist.PrefixStore("init", store),
                rank=world.rank,
                world_size=world.world_size,
                timeout=timedelta(seconds=control_seconds),
                # Only for an accelerator: a CPU device raises.
                device_id=None if world.device == "cpu" else torch.device(world.device),
            )
        except (RuntimeError, ValueError) as error:
            raise _join_error(
                world,
                f"all ranks were there, but connecting them failed: {_first_line(error)}",
                "Check that these machines reach one another (GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME choose the network interface)",
            ) from error
        group.object_group = dist.group.WORLD
        try:
            group.wait_for_peers()  # a rank that leaves now would break the connecting of others
            yield group
        finally:
            dist.destroy_process_group()
            if not world.launcher_hosts_store:  # the rank that hosts it ends last
                with contextlib.suppress(StoreLost):
                    group.leave(_HOST_WAIT_SECONDS if world.rank == 0 else 0.0)


def _new_group(world: World, join_seconds: float) -> tuple[Group, Store]:
    """A group whose ranks are not connected yet, and its part of the launcher's store."""
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
    # and machines need not agree on how often they restarted: one that was restarted begins at 0.
    attempt = world.restart_count if world.launcher_hosts_store else 0
    shared = dist.PrefixStore(f"ddinfer/{world.run_id}/{attempt}/{world.world_size}", store)
    # A program may create several groups, and torchrun starts ranks again with the same count when
    # machines come or go. Each rank counts its groups, so that their numbers agree.
    number = shared.add(f"groups/{world.rank}", 1)
    own = dist.PrefixStore(f"group/{number}", shared)
    group = Group(world, own, range(world.world_size), world.rank)
    group.continue_on_failure = shared.check([CONTINUE_ON_FAILURE])
    return group, own


def _backend(world: World) -> str:
    return "cpu:gloo,cuda:nccl" if world.device.startswith("cuda") else "gloo"


def _join_error(world: World, why: str, fix: str) -> JoinError:
    return JoinError(
        f"rank {world.rank} of {world.world_size} could not join its process group (backend "
        f"{_backend(world)}, store at {world.store_address}): {why}. {fix}"
    )


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


def backends_of(group: Any) -> dict[str, str]:
    """Device type → backend name."""
    import torch.distributed as dist

    pairs = (item.split(":", 1) for item in str(dist.get_backend_config(group)).split(","))
    return {device: backend for device, backend in pairs}


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
