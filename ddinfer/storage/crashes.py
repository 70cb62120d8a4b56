"""Deaths by signal: which batch a process had in hand, and what that says of its prompts."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ddinfer.errors import ErrorRecord, RankError
from ddinfer.request import Request
from ddinfer.storage.files import Files
from ddinfer.storage.journal import (
    JournalHeader,
    JournalState,
    JournalWriter,
    decode_line,
    journal_paths,
)

#: So many deaths in company, and prompts run one by one; so many alone, and one has failed.
MOST_DEATHS = 2

B = TypeVar("B", bound=Sequence[int])


def record_deaths(
    files: Files,
    folder: str,
    run_id: str,
    signals: Mapping[int, int] | None = None,
    num_stages: int = 1,
) -> int:
    """Journal what ranks had in hand when they were killed → how many batches.

    Args:
        run_id: in the journals' headers: of that one attempt.
        signals: rank → what killed it; default: every rank that ended without a word was, by a
            signal that nobody knows.
        num_stages: so many neighbouring ranks work on the batches of the first of them.
    """
    count = 0
    for path in journal_paths(files, folder):
        header, in_hand, reason = _last_words(files, path, run_id)
        if header is None:
            continue
        number = _what_killed(header.rank, reason, signals, num_stages)
        if number is None:
            continue
        lines = [
            {
                "kind": "death",
                "indices": start["indices"],
                "signal": number,
                "alone": len(in_hand) == 1 and start.get("size", 1) == 1,
            }
            for start in in_hand
        ]
        if lines:
            writer = JournalWriter(files, folder, header)
            try:
                writer.append(lines)
            finally:
                writer.close()
        count += len(lines)
    return count


def _what_killed(
    rank: int, reason: str | None, signals: Mapping[int, int] | None, num_stages: int
) -> int | None:
    """The signal that ended a rank's work, 0 for one that nobody knows; ``None``: none did.

    Args:
        reason: why the rank says that it ended, if it does.
    """
    if reason is None:
        number = 0 if signals is None else signals.get(rank)
        if number is not None:
            return number
    if signals is None or reason not in (None, RankError.__name__):
        return None
    # It ended, or was ended, because one died that held a later stage of the same model.
    stages = (signals.get(rank + stage) for stage in range(1, num_stages))
    return next((number for number in stages if number is not None), None)


def _last_words(
    files: Files, path: str, run_id: str
) -> tuple[JournalHeader | None, list[dict[str, Any]], str | None]:
    """Header, starts in hand, and the reason of the end where there is one; no header for a
    journal of another attempt or one that was dealt with.

    A start that is not beside the last was computed, and what it made was only not written yet.
    """
    header: JournalHeader | None = None
    reason: str | None = None
    starts: list[dict[str, Any]] = []
    answered: set[int] = set()
    with files.reading(path) as file:
        for line in file:
            record = decode_line(line)
            if record is None:
                break  # torn: the last
            kind = record["kind"]
            if header is None:
                if kind != "journal" or record["run_id"] != run_id:
                    return None, [], None
                names = JournalHeader.__dataclass_fields__
                header = JournalHeader(**{name: record[name] for name in names})
            elif kind == "start":
                beside = record.get("beside", ())
                starts = [*(s for s in starts if s["indices"][0] in beside), record]
                answered.intersection_update(k for s in starts for k in s["indices"])
            elif kind in ("image", "failed"):
                answered.add(record["index"])
            elif kind == "end":
                reason = record["reason"]
            elif kind == "death":
                return None, [], None
    return header, [s for s in starts if not answered.issuperset(s["indices"])], reason


def split_suspects(
    batches: Sequence[B], state: JournalState
) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """The pending batches that nothing is known against, and, as batches of one, the prompts of
    those in which processes have died twice."""
    died = Counter(k for death in state.deaths for k in death["indices"])
    good: list[Sequence[int]] = []
    suspects: list[Sequence[int]] = []
    for batch in batches:
        wanted = [k for k in batch if state.is_pending(k)]
        if any(died[k] >= MOST_DEATHS for k in wanted):
            suspects += [[k] for k in wanted]
        else:
            good.append(batch)
    return good, suspects


def hopeless_prompts(requests: Sequence[Request], state: JournalState) -> list[dict[str, Any]]:
    """``failed`` lines for pending prompts that have killed their process twice, alone."""
    alone = Counter(d["indices"][0] for d in state.deaths if d["alone"])
    return [
        {
            "kind": "failed",
            "index": request.index,
            "id": request.id,
            "error": _why(request.index, state).to_dict(),
        }
        for request in requests
        if alone[request.index] >= MOST_DEATHS and state.is_pending(request.index)
    ]


def _why(index: int, state: JournalState) -> ErrorRecord:
    numbers = [d["signal"] for d in state.deaths if d["alone"] and d["indices"] == [index]]
    names = sorted({signal.Signals(n).name if n else "an unknown signal" for n in numbers})
    return ErrorRecord(
        "ProcessDied",
        f"its process was killed {len(numbers)} times ({', '.join(names)}) while it made this "
        "prompt and no other",
    )
