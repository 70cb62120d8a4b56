"""Deaths by signal: which batch a process had in hand, and what that says of its prompts."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ddinfer.errors import ErrorRecord
from ddinfer.request import Request
from ddinfer.storage.files import Files
from ddinfer.storage.journal import (
    JOURNAL_FOLDER,
    JournalHeader,
    JournalState,
    JournalWriter,
    decode_line,
)

#: So many deaths in a batch, and its prompts run one by one; so many alone, and one has failed.
MOST_DEATHS = 2

B = TypeVar("B", bound=Sequence[int])


def record_deaths(
    files: Files, folder: str, run_id: str, signals: Mapping[int, int] | None = None
) -> int:
    """Journal what ranks had in hand when they were killed → how many batches.

    Args:
        run_id: in the journals' headers: of that one attempt.
        signals: rank → what killed it; default: every rank that ended without a word was, by a
            signal that nobody knows.
    """
    count = 0
    journal = os.path.join(folder, JOURNAL_FOLDER)
    for name in files.list(journal):
        header, in_hand = _last_words(files, os.path.join(journal, name), run_id)
        if header is None or (signals is not None and header.rank not in signals):
            continue
        lines = [
            {
                "kind": "death",
                "indices": start["indices"],
                "signal": 0 if signals is None else signals[header.rank],
                "alone": start.get("size", 1) == 1,
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


def _last_words(
    files: Files, path: str, run_id: str
) -> tuple[JournalHeader | None, list[dict[str, Any]]]:
    """Header and starts in hand of a journal that did not end; (None, []) for any other.

    A start that is older was computed, and what it made was only not written yet.
    """
    header: JournalHeader | None = None
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
                    return None, []
                names = JournalHeader.__dataclass_fields__
                header = JournalHeader(**{name: record[name] for name in names})
            elif kind == "start":
                num_before = record.get("open", 1) - 1
                starts = [*starts[len(starts) - num_before :], record]
                answered.intersection_update(k for s in starts for k in s["indices"])
            elif kind in ("image", "failed"):
                answered.add(record["index"])
            elif kind in ("end", "death"):
                return None, []
    return header, [s for s in starts if not answered.issuperset(s["indices"])]


def split_suspects(batches: Sequence[B], state: JournalState) -> list[Sequence[int]]:
    """The pending batches, those in which processes have died twice as batches of one."""
    died = Counter(k for death in state.deaths for k in death["indices"])
    out: list[Sequence[int]] = []
    for batch in batches:
        wanted = [k for k in batch if state.is_pending(k)]
        if len(batch) > 1 and any(died[k] >= MOST_DEATHS for k in wanted):
            out += [[k] for k in wanted]
        else:
            out.append(batch)
    return out


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
