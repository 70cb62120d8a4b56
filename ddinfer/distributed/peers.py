"""The status of peers, exchanged through the store, outside of any collective.

A collective has a timeout and fails on all ranks when one is late. Here ranks poll: a slow rank
does not make the others time out, and a failed or dead one ends their wait.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ddinfer.distributed.process import ProcessId
from ddinfer.errors import (
    ENDS_THE_JOB,
    EXIT_INTERRUPTED,
    DdinferError,
    ErrorRecord,
    RankError,
    exit_code_of,
)

if TYPE_CHECKING:
    from torch.distributed import Store

log = logging.getLogger(__name__)

#: Seconds between two reports of the ranks that are waited for.
REPORT_SECONDS = 60.0

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.002, 0.2
LIVENESS_CHECK_SECONDS = 1.0

#: The launcher posts how a rank ended, with its signal. Peers wait this long for its report.
EXIT_REPORT_SECONDS = 3.0

#: Key that the launcher sets where ranks continue after the failure of another.
CONTINUE_ON_FAILURE = "continue_on_failure"

#: Types in the record of a rank whose peer found it dead, or lost the connection to it. The peer
#: cannot see how it ended; its launcher can.
PROCESS_DIED, CONNECTION_LOST = "ProcessDied", "ConnectionLost"


class StoreLost(DdinferError):
    """The store is gone, and with it the launcher or the machine that held it. Resumable."""

    exit_code = EXIT_INTERRUPTED


class PeerStatus:
    """The keys of one group of ranks in their store.

    Args:
        store: shared by these ranks alone (a prefix of its own).
        ranks: global ranks in the group's order.
        group_rank: this process's place among them; ``None`` for a launcher, which only reads.

    Attributes:
        phase: what this rank is doing, such as "running".
        activity: the same with a detail, such as "running prompt 3".
        continue_on_failure: whether ranks continue with their own work after another failed.
    """

    def __init__(self, store: Store, ranks: Sequence[int], group_rank: int | None = None):
        self._store, self.ranks = store, tuple(ranks)
        self._group_rank = group_rank
        self.phase = self.activity = "starting"
        self.continue_on_failure = False
        self._num_barriers = 0

    # Processes

    def announce(self) -> None:
        """Write which process this rank is, so that peers on this machine see when it has ended."""
        self._set(f"process/{self._group_rank}", ProcessId.own().to_json())

    def wait_for_all(self, timeout_seconds: float) -> list[int]:
        """Wait until every rank has announced itself → global ranks that did not in time."""
        self.announce()
        keys = [f"process/{k}" for k in range(len(self.ranks))]
        for waited in _poll():
            if self._has(*keys):
                return []
            self.raise_failure()
            if waited > timeout_seconds:
                break
        return [rank for rank, key in zip(self.ranks, keys, strict=True) if not self._has(key)]

    def peers_here(self) -> dict[int, ProcessId]:
        """Global rank → process, of the other ranks whose processes run on this machine."""
        texts = {k: self._get(f"process/{k}") for k in range(len(self.ranks))}
        found = {k: ProcessId.from_json(t) for k, t in texts.items() if t is not None}
        return {
            self.ranks[k]: process
            for k, process in found.items()
            if k != self._group_rank and process.is_here
        }

    def wait_for_peers(self) -> None:
        """A barrier: wait until every rank has called this as often as this one. No timeout.

        Raises:
            RankError: a rank failed or died.
        """
        if len(self.ranks) == 1:
            return
        self._num_barriers += 1
        self._set(f"arrived/{self._group_rank}", str(self._num_barriers))
        self.add("arrived")
        check, report = LIVENESS_CHECK_SECONDS, REPORT_SECONDS
        for waited in _poll():
            # No rank arrives at the next barrier before all have arrived at this one.
            if self.add("arrived", 0) >= self._num_barriers * len(self.ranks):
                return
            self.raise_failure()
            if waited > check:
                self.raise_dead(self._missing())
                check = waited + LIVENESS_CHECK_SECONDS
            if waited > report:
                self._report(self._missing(), waited)
                report = waited + REPORT_SECONDS

    def _missing(self) -> list[int]:
        """Global ranks that have not reached the barrier at which this rank waits."""
        arrived = [int(self._get(f"arrived/{k}") or 0) for k in range(len(self.ranks))]
        return [r for r, n in zip(self.ranks, arrived, strict=True) if n < self._num_barriers]

    def _report(self, missing: Sequence[int], waited_seconds: float) -> None:
        log.warning(
            "rank %d has waited %.0f s (%s) for ranks that have not reached this point: %s; every "
            "rank must make the same calls",
            self.ranks[self._group_rank or 0],
            waited_seconds,
            self.phase,
            ", ".join(f"{rank} ({self.activity_of(rank) or 'starting'})" for rank in missing),
        )

    def raise_dead(self, ranks: Sequence[int]) -> None:
        """Raise if a process of ``ranks`` on this machine has ended.

        Processes on other machines are watched by their launcher there.
        """
        for rank, process in self.peers_here().items():
            if rank in ranks and process.has_ended:
                self.wait_for_exit_report()
                record = ErrorRecord(PROCESS_DIED, f"the process of rank {rank} has ended")
                raise RankError(rank, self.activity_of(rank) or self.phase, record)

    def wait_for_exit_report(self) -> None:
        for waited in _poll():
            self.raise_failure()
            if waited > EXIT_REPORT_SECONDS:
                return

    # Failures

    def report_failure(self, error: BaseException) -> RankError:
        """Post this rank's failure → the first failure of the group, this or another."""
        assert self._group_rank is not None
        return self.post_failure(rank_error(self.ranks[self._group_rank], self.phase, error))

    def post_failure(self, failure: RankError) -> RankError:
        """Post a failure for all ranks; the first one stays → that first one."""
        with _translating_store_errors():
            first = self._store.compare_set("failure", "", failure.to_json())
        return RankError.from_json(first)

    def first_failure(self) -> RankError | None:
        text = self._get("failure")
        return None if text is None else RankError.from_json(text)

    def raise_failure(self) -> None:
        failure = self.first_failure()
        if failure is not None:
            raise failure

    def check_peers(self) -> None:
        """Raise if a rank has failed; called between batches.

        With ``launch(on_failure="finish")`` only for what ends the job of every rank: a full
        disk, a signal.
        """
        if len(self.ranks) == 1:
            return
        failure = self.first_failure()
        if failure is not None and (ends_the_job(failure) or not self.continue_on_failure):
            raise failure

    # Activity

    def enter(self, phase: str, detail: str = "") -> None:
        """Publish what this rank is doing: shown with its failure, and if it is killed."""
        assert self._group_rank is not None
        self.phase, self.activity = phase, f"{phase} {detail}".strip()
        self._set(f"activity/{self.ranks[self._group_rank]}", self.activity)

    def activity_of(self, rank: int) -> str | None:
        """The last activity that global ``rank`` has published."""
        text = self._get(f"activity/{rank}")
        return None if text is None else text.decode()

    def add(self, key: str, number: int = 1) -> int:
        """Add to a counter that all ranks share → its new value. Two ranks never get the same."""
        with _translating_store_errors():
            return self._store.add(f"count/{key}", number)

    def leave(self, linger_seconds: float = 0.0) -> None:
        """Called when this rank needs the store no more; its host waits for the other ranks."""
        self.add("left")
        for waited in _poll():
            if waited >= linger_seconds or self.add("left", 0) >= len(self.ranks):
                return

    # The store

    def _set(self, key: str, text: str) -> None:
        with _translating_store_errors():
            self._store.set(key, text)

    def _has(self, *keys: str) -> bool:
        with _translating_store_errors():
            return self._store.check(list(keys))

    def _get(self, key: str) -> bytes | None:
        with _translating_store_errors():
            return self._store.get(key) if self._store.check([key]) else None


def rank_error(rank: int, phase: str, error: BaseException) -> RankError:
    """The failure of ``rank``; a `RankError` stays the failure of the rank that it names."""
    if isinstance(error, RankError):
        return error
    return RankError(rank, phase, ErrorRecord.of(error), exit_code=exit_code_of(error))


def is_reported_by_peer(failure: RankError) -> bool:
    """Whether a peer reported this failure, without knowing how the process ended."""
    return failure.record is not None and failure.record.type in (PROCESS_DIED, CONNECTION_LOST)


def ends_the_job(failure: RankError) -> bool:
    """Whether the other ranks should not finish their own work either."""
    return failure.exit_code in ENDS_THE_JOB


def _poll() -> Iterator[float]:
    """Yield the seconds waited so far, with short pauses that grow."""
    started, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    while True:
        yield time.monotonic() - started
        time.sleep(pause)
        pause = min(pause * 1.4, LONGEST_PAUSE_SECONDS)


@contextlib.contextmanager
def _translating_store_errors() -> Iterator[None]:
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise StoreLost(
            "the connection to the store is lost: the launcher, or the machine "
            f"that hosted it, has ended ({str(error).splitlines()[0]}). Run the same command "
            "again to resume"
        ) from error
