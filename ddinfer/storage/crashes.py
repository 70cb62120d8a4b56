"""Processes killed by a signal: which prompts were in flight, and which of them to give up."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ddinfer.errors import ErrorRecord, RankError
from ddinfer.request import Request
from ddinfer.storage.files import Files
from ddinfer.storage.job_record import read_job
from ddinfer.storage.journal import JournalState, JournalWriter, read_journals

#: After so many deaths a prompt runs with nothing else in flight; after so many of those it fails.
MAX_DEATHS = 2

B = TypeVar("B", bound=Sequence[int])


def record_deaths(
    files: Files,
    folder: str,
    run_id: str,
    signals: Mapping[int, int] | None = None,
    num_stages: int = 1,
) -> None:
    """Journal which prompts ranks had in flight when they were killed.

    The launcher calls this before a restart; under torchrun rank 0 of the next attempt does.

    Args:
        run_id: in the journals' headers: of that one attempt.
        signals: rank → signal that killed it; default: every rank whose journal has no end was
            killed, by an unknown signal.
        num_stages: so many consecutive ranks run the batches of the first of them.
    """
    job = read_job(files, folder)
    if job is None:
        return
    for attempt in read_journals(files, folder, job.fingerprints, job.images.stop).attempts:
        # A batch that was only being written cannot have killed the process.
        indices = [k for batch in attempt.in_flight if batch[0] in attempt.running for k in batch]
        if attempt.header.run_id != run_id or not indices:
            continue
        number = _fatal_signal(attempt.header.rank, attempt.end, signals, num_stages)
        if number is None:
            continue
        line = {"kind": "death", "indices": indices, "signal": number, "alone": len(indices) == 1}
        writer = JournalWriter(files, folder, attempt.header)
        try:
            writer.append([line])
        finally:
            writer.close()


def _fatal_signal(
    rank: int, reason: str | None, signals: Mapping[int, int] | None, num_stages: int
) -> int | None:
    """The signal that ended a rank's work, 0 for an unknown one; ``None`` where it was not killed.

    Args:
        reason: of the end of its journal, if that has one.
    """
    if reason is None:
        number = 0 if signals is None else signals.get(rank)
        if number is not None:
            return number
    if signals is None or reason not in (None, RankError.__name__):
        return None
    # It ended because a rank with a later stage of the same model was killed.
    stages = (signals.get(rank + stage) for stage in range(1, num_stages))
    return next((number for number in stages if number is not None), None)


def quarantine(batches: Sequence[B], state: JournalState) -> tuple[list[B], list[list[int]]]:
    """Separate pending batches in which processes have died twice.

    Returns:
        the other batches, and each pending prompt of these as a batch of one.
    """
    deaths = Counter(index for death in state.deaths for index in death["indices"])
    others: list[B] = []
    solo: list[list[int]] = []
    for batch in batches:
        pending = [index for index in batch if state.is_pending(index)]
        if any(deaths[index] >= MAX_DEATHS for index in pending):
            solo += [[index] for index in pending]
        else:
            others.append(batch)
    return others, solo


def prompts_to_give_up(requests: Sequence[Request], state: JournalState) -> list[dict[str, Any]]:
    """``failed`` lines for pending prompts that have killed their process twice on their own."""
    signals: dict[int, list[int]] = {}
    for death in state.deaths:
        if death["alone"]:
            signals.setdefault(death["indices"][0], []).append(death["signal"])
    return [
        {
            "kind": "failed",
            "index": request.index,
            "id": request.id,
            "error": _killed(signals[request.index]).to_dict(),
        }
        for request in requests
        if len(signals.get(request.index, ())) >= MAX_DEATHS and state.is_pending(request.index)
    ]


def _killed(numbers: Sequence[int]) -> ErrorRecord:
    names = sorted({signal.Signals(n).name if n else "an unknown signal" for n in numbers})
    return ErrorRecord(
        "ProcessDied",
        f"its process was killed {len(numbers)} times ({', '.join(names)}) while this prompt was "
        "the only one in flight",
    )
