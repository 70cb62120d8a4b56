"""`generate` where several ranks make each image: C × P neighbours of the caller's group."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ddinfer.distributed.partition import Replica, contiguous_slice
from ddinfer.distributed.process_group import Group
from ddinfer.embed.inference_state import inference_state
from ddinfer.engines.base import Batch
from ddinfer.engines.team import TeamEngine
from ddinfer.errors import UsageError
from ddinfer.models.loading import denoisers
from ddinfer.parallel.communicator import LONG_TIMEOUT, Communicator
from ddinfer.parallel.team.team import Team, check_models
from ddinfer.request import Result

#: The caller's group → ranks of a replica → their connections, which are made once: groups of the
#: same ranks that come and go would mix up their keys in the store.
_COMMUNICATORS: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Communicator]] = (
    weakref.WeakKeyDictionary()
)


def check_team(pipe: Any, ranks: Group, cfg_parallel: int, sequence_parallel: int) -> None:
    """Check, on every rank, that these ranks can make images of this pipeline together.

    Raises:
        UsageError: numbers that do not come out even, or a denoiser that cannot be split.
    """
    for name, value in (("cfg_parallel", cfg_parallel), ("sequence_parallel", sequence_parallel)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UsageError(f"{name}={value!r} must be an integer of at least 1")
    _replica(ranks, cfg_parallel, sequence_parallel)
    check_models(denoisers(pipe), sequence_parallel)


def run_team(
    ranks: Group,
    pipe: Any,
    batches: Sequence[Batch],
    call: Mapping[str, Any],
    cfg_parallel: int,
    sequence_parallel: int,
    group: Any = None,
) -> list[Result]:
    """This replica's contiguous slice of ``batches``: Results on its first rank, elsewhere none.

    Raises:
        RankError: a rank failed; on all ranks.
    """
    replica = _replica(ranks, cfg_parallel, sequence_parallel)
    share = contiguous_slice(len(batches), replica.num_replicas, replica.number)
    try:
        with inference_state(pipe, ranks.device):
            comm = _communicator(ranks, replica, group)
            team = Team(
                denoisers(pipe),
                comm,
                cfg_parallel=cfg_parallel,
                sequence_parallel=sequence_parallel,
            )
            try:
                if not team.is_leader:
                    ranks.enter("running", "denoiser calls")
                    team.serve()
                    return []
                engine = TeamEngine(pipe, team, rank=ranks.world.rank, call=call)
                return list(engine.run(_announced(ranks, [batches[k] for k in share])))
            finally:
                team.detach()
    except BaseException as error:
        first = ranks.report_failure(error)
        if isinstance(error, Exception):
            raise first from error
        raise  # Ctrl-C stays KeyboardInterrupt on this rank; the others get the RankError


def _announced(ranks: Group, batches: Sequence[Batch]) -> Iterator[Batch]:
    for batch in batches:
        ranks.check_peers()
        ranks.enter("running", f"prompt {batch[0].index} (id {batch[0].id})")
        yield batch


def _replica(ranks: Group, cfg_parallel: int, sequence_parallel: int) -> Replica:
    """One rank alone makes all guidance calls itself."""
    is_alone = ranks.group_size == 1 and sequence_parallel == 1
    size = 1 if is_alone else cfg_parallel * sequence_parallel
    if ranks.group_size % size:
        raise UsageError(
            f"cfg_parallel={cfg_parallel}, sequence_parallel={sequence_parallel} need a number of "
            f"ranks that {size} divides; the group has {ranks.group_size}"
        )
    return Replica.of(ranks.group_rank, ranks.group_size, size)


def _communicator(ranks: Group, replica: Replica, group: Any) -> Communicator:
    import torch.distributed as dist

    members = tuple(ranks.ranks[k] for k in replica.ranks)
    if len(members) == 1:
        return Communicator(members, 0, ranks.device)
    callers = dist.group.WORLD if group is None else group
    made = _COMMUNICATORS.setdefault(callers, {})
    if members not in made:
        backend = str(dist.get_backend_config(callers))
        own = dist.new_group(
            list(members),
            backend=backend,
            timeout=LONG_TIMEOUT if "nccl" not in backend else None,
            use_local_synchronization=True,
        )
        made[members] = Communicator.of(own, ranks.device)
    return made[members]
