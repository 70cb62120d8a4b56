"""How long it takes to read back the journals of a million images.

    python -m bench.journal [NUM_IMAGES [NUM_JOURNALS]]

Goal: a million lines in < 10 s and < 500 MB. CPU seconds and the peak of memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from bench.measure import PYTHON, Size, run
from bench.report import table, verdict
from ddinfer.storage.files import Files
from ddinfer.storage.journal import JournalHeader, JournalWriter, read_journals

ABOUT = "reading the journals of a million images back"
EXPECTED_SECONDS = 25
GOAL_SECONDS, GOAL_MB = 10, 500
BATCH_SIZE = 1  # the worst: a line for each batch's start beside each image's


def measure(size: Size) -> dict[str, Any]:
    """In a process of its own, whose peak of memory is this and nothing else."""
    num_images = size.pick(20_000, 1_000_000, 1_000_000)
    return json.loads(run([PYTHON, "-m", "bench.journal", str(num_images)]).stdout)


def tables(figures: Mapping[str, Any]) -> str:
    num, seconds, peak = (figures[k] for k in ("num_images", "read_cpu_seconds", "peak_mb"))
    met = verdict(seconds < GOAL_SECONDS and peak < GOAL_MB)
    return table(
        ["", "CPU s", "memory", "goal"],
        [
            [
                f"reading the journals of {num:,} images, {2 * num:,} lines, "
                f"{figures['megabytes']} MB",
                str(seconds),
                f"{peak} MB",
                f"< {GOAL_SECONDS} s, < {GOAL_MB} MB {met}",
            ]
        ],
    )


def main(num_images: int = 1_000_000, num_journals: int = 8) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = Files()
        os.mkdir(os.path.join(folder, "journal"))
        size = write(files, folder, num_images, num_journals)
        before = time.process_time()
        state = read_journals(files, folder, ["bench"], num_images)
        seconds = time.process_time() - before
        assert state.num_done == num_images
        told: dict[str, float] = {"num_images": num_images, "num_journals": num_journals}
        told |= {"megabytes": round(size / 1e6), "read_cpu_seconds": round(seconds, 2)}
        print(json.dumps(told | {"peak_mb": round(peak_megabytes())}))


def write(files: Files, folder: str, num_images: int, num_journals: int) -> int:
    size = 0
    for k in range(num_journals):
        journal = JournalWriter(files, folder, JournalHeader("bench", rank=k))
        first = num_images * k // num_journals
        last = num_images * (k + 1) // num_journals
        for start in range(first, last, BATCH_SIZE):
            batch = range(start, min(start + BATCH_SIZE, last))
            records = [{"kind": "start", "indices": list(batch)}]
            records += [image_line(index) for index in batch]
            journal.append(records, sync=False)
        journal.close()
        size += os.path.getsize(journal.path)
    return size


def image_line(index: int) -> dict:
    digest = hashlib.sha256(b"%d" % index).hexdigest()
    return {
        "kind": "image",
        "index": index,
        "sha256": digest,
        "bytes": 500_000 + index % 999,
        "seconds": 1.2345,
    }


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
