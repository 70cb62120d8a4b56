"""The status of peers, exchanged through the store, outside of any collective.

A collective has a timeout and breaks for everybody when one rank is late. Here ranks poll: a slow
rank makes nobody time out, and a failed or dead one ends the wait of the others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.errors import (
    ENDS_THE_JOB,
    EXIT_BUG,
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

#: The type in the record of a rank that a peer found dead.
GONE = "ProcessDied"
#: And of one whose connection broke: that peer cannot know how it ended, either.
LOST = "ConnectionLost"


class StoreLost(DdinferError):
    """The store is gone, and with it the launcher or the machine that held it. Resumable."""

    exit_code = EXIT_INTERRUPTED


@dataclass(frozen=True)
class Failure:
    """A rank's failure as data. ``exitcode`` is that of the process, negative for a signal."""

    rank: int
    phase: str
    record: ErrorRecord | None = None
    exitcode: int | None = None
    exit_code: int = EXIT_BUG

    @classmethod
    def of(cls, rank: int, phase: str, error: BaseException) -> Failure:
        """What became of ``rank``; a `RankError` stays the failure of the rank that it names."""
        if isinstance(error, RankError):
            return cls(error.rank, error.phase, error.record, error.exitcode, error.exit_code)
        return cls(rank, phase, ErrorRecord.of(error), exit_code=exit_code_of(error))

    @property
    def is_guess(self) -> bool:
        """A peer found the process gone, without knowing how it ended."""
        return self.record is not None and self.record.type in (GONE, LOST)

    @property
    def ends_the_job(self) -> bool:
        """Whether the other ranks should not finish their own work either."""
        return self.exit_code in ENDS_THE_JOB

    def to_error(self) -> RankError:
        return RankError(
            self.rank, self.phase, self.record, exitcode=self.exitcode, exit_code=self.exit_code
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Failure:
        data = json.loads(text)
        record = data.pop("record")
        return cls(**data, record=ErrorRecord(**record) if record else None)


class PeerStatus:
    """The keys of one group of ranks in their store.

    Args:
        store: shared by these ranks alone (a prefix of its own).
        ranks: global ranks in the group's order, for messages.
        group_rank: this process's place among them; ``None`` for a launcher, which only looks on.
    """

    def __init__(self, store: Store, ranks: Sequence[int], group_rank: int | None = None):
        self.store, self.ranks, self.group_rank = store, tuple(ranks), group_rank
        self.phase = self.activity = "starting"
        self._num_meetings = 0
        self._continue_on_failure: bool | None = None

    # Who is there

    def wait_for_all(self, timeout_seconds: float) -> list[int]:
        """Wait for all ranks for the first time → global ranks that did not come in time."""
        self.announce()
        with self._reaching():
            self.store.add("enrolled", 1)
        deadline = time.monotonic() + timeout_seconds
        for _ in _pauses():
            with self._reaching():
                if self.store.add("enrolled", 0) >= len(self.ranks):
                    return []
            self.raise_failure()
            if time.monotonic() > deadline:
                break
        with self._reaching():
            return [
                rank for k, rank in enumerate(self.ranks) if not self.store.check([f"process/{k}"])
            ]

    def announce(self) -> None:
        """Say which process this rank is, so that peers on this machine see when it has ended."""
        assert self.group_rank is not None
        with self._reaching():
            self.store.set(f"process/{self.group_rank}", json.dumps(_this_process()))

    def barrier(self, phase: str) -> None:
        """Wait until every rank has come here as often as this one. No timeout.

        Raises:
            RankError: a rank failed, or is dead and will never come.
        """
        assert self.group_rank is not None
        self._num_meetings += 1
        number = self._num_meetings
        with self._reaching():
            self.store.set(f"arrived/{self.group_rank}", str(number))
            self.store.add(f"meeting/{number}", 1)
        started = time.monotonic()
        look, report = started + LIVENESS_CHECK_SECONDS, started + REPORT_SECONDS
        for _ in _pauses():
            with self._reaching():
                if self.store.add(f"meeting/{number}", 0) >= len(self.ranks):
                    break
            self.raise_failure()
            if time.monotonic() > look:
                self.raise_dead(number, phase)
                look = time.monotonic() + LIVENESS_CHECK_SECONDS
            if time.monotonic() > report:
                self._report_missing(number, phase, time.monotonic() - started)
                report = time.monotonic() + REPORT_SECONDS
        if self.group_rank == 0 and number > 2:
            with self._reaching():  # everybody has left that one: all have come to the next
                self.store.delete_key(f"meeting/{number - 2}")

    def _report_missing(self, number: int, phase: str, seconds: float) -> None:
        """Name the ranks that have not come here as often as this one."""
        arrived = {k: int(self._get(f"arrived/{k}") or 0) for k in range(len(self.ranks))}
        missing = [self.ranks[k] for k, count in arrived.items() if count < number]
        log.warning(
            "rank %d has waited %.0f s (%s) for ranks %s, which have not reached this point; every "
            "rank must make the same calls",
            self.ranks[self.group_rank or 0],
            seconds,
            phase,
            ", ".join(map(str, missing)),
        )

    def raise_dead(self, number: int | None = None, phase: str = "") -> None:
        """Raise if a process of this machine is gone that has not arrived at meeting ``number``.

        Processes on other machines are watched by whoever started them there.
        """
        for k, rank in enumerate(self.ranks):
            if k == self.group_rank or not self._is_gone(k):
                continue
            arrived = self._get(f"arrived/{k}")
            if number is not None and arrived is not None and int(arrived) >= number:
                continue
            self.wait_for_exit_report()
            activity = self.activity_of(rank) or phase or self.phase
            record = ErrorRecord(GONE, f"the process of rank {rank} is gone")
            raise RankError(rank, activity, record)

    def _is_gone(self, k: int) -> bool:
        text = self._get(f"process/{k}")
        return text is not None and _has_ended(json.loads(text))

    def wait_for_exit_report(self) -> None:
        deadline = time.monotonic() + EXIT_REPORT_SECONDS
        for _ in _pauses():
            self.raise_failure()
            if time.monotonic() > deadline:
                return

    # What failed

    def post_failure(self, failure: Failure) -> Failure:
        """Post a failure for all ranks; the first one stays → that first one."""
        with self._reaching():
            return Failure.from_json(self.store.compare_set("failure", "", failure.to_json()))

    def first_failure(self) -> Failure | None:
        text = self._get("failure")
        return None if text is None else Failure.from_json(text)

    def raise_failure(self) -> None:
        failure = self.first_failure()
        if failure is not None:
            raise failure.to_error()

    def set_continue_on_failure(self) -> None:
        """Called by the launcher before the ranks start: other ranks continue after a failure."""
        with self._reaching():
            self.store.set("carry_on", "1")

    @property
    def continue_on_failure(self) -> bool:
        """Whether ranks go on with their own work when another has failed."""
        if self._continue_on_failure is None:
            self._continue_on_failure = self._get("carry_on") is not None
        return self._continue_on_failure

    # What is going on

    def enter(self, phase: str, detail: str = "") -> None:
        """Publish what this rank is doing."""
        assert self.group_rank is not None
        self.phase = phase
        self.activity = f"{phase} {detail}".strip()
        with self._reaching():
            self.store.set(f"activity/{self.ranks[self.group_rank]}", self.activity)

    def activity_of(self, rank: int) -> str | None:
        """What global ``rank`` last said that it was doing."""
        text = self._get(f"activity/{rank}")
        return None if text is None else text.decode()

    def add(self, key: str, number: int = 1) -> int:
        """Add to a counter that all ranks share → its new value."""
        with self._reaching():
            return self.store.add(f"count/{key}", number)

    def set(self, key: str, text: str) -> None:
        """Leave a word for whoever `read`s it."""
        with self._reaching():
            self.store.set(f"word/{key}", text)

    def read(self, key: str) -> bytes | None:
        return self._get(f"word/{key}")

    def process_here(self, k: int) -> int | None:
        """Process id of the rank at place ``k``, if it is another one, on this machine, alive."""
        text = None if k == self.group_rank else self._get(f"process/{k}")
        if text is None:
            return None
        process = json.loads(text)
        is_here = process["host"] == _host() and bool(process["host"])
        return process["pid"] if is_here and not _has_ended(process) else None

    def leave(self) -> None:
        with self._reaching():
            self.store.add("left", 1)

    def wait_until_left(self, timeout_seconds: float) -> None:
        """For the rank that holds the store: keep it until the others need it no more."""
        deadline = time.monotonic() + timeout_seconds
        for _ in _pauses():
            with self._reaching():
                if self.store.add("left", 0) >= len(self.ranks) or time.monotonic() > deadline:
                    return

    def _get(self, key: str) -> bytes | None:
        with self._reaching():
            return self.store.get(key) if self.store.check([key]) else None

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        from torch.distributed import DistError

        try:
            yield
        except DistError as error:
            raise StoreLost(
                "the connection to the store is lost: the launcher, or the machine "
                f"that hosted it, has ended ({str(error).splitlines()[0]}). Run the same command "
                "again to resume"
            ) from error


def _pauses() -> Iterator[None]:
    """Yields, and sleeps before it yields again: a little, then a little longer."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        yield
        time.sleep(pause)
        pause = min(pause * 1.4, LONGEST_PAUSE_SECONDS)


def _this_process() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "start": start_time(os.getpid())}


def _host() -> str:
    """This machine since its last boot, and whose process numbers these are (containers)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_time(pid: int) -> str | None:
    """Clock ticks since boot at which ``pid`` started; ``None`` if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _has_ended(process: dict[str, Any]) -> bool:
    """Only a process of this machine can be known to have ended."""
    if not process["host"] or process["host"] != _host():
        return False
    return start_time(process["pid"]) != process["start"]
