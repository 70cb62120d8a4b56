"""How long it takes to resume a million images: write journals, read them back, rebuild metadata.

    python bench/journal.py [NUM_IMAGES [NUM_JOURNALS]]

Goal: a million lines in < 10 s and < 500 MB. Prints seconds of CPU time and the peak of memory.
"""

from __future__ import annotations

import hashlib
import os
import resource
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from ddinfer.storage.files import Files
from ddinfer.storage.journal import JournalHeader, JournalWriter, read_journals

BATCH_SIZE = 1  # the worst: a line for each batch's start beside each image's


def main(num_images: int = 1_000_000, num_journals: int = 8) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = Files()
        os.mkdir(os.path.join(folder, "journal"))
        before = time.process_time()
        size = write(files, folder, num_images, num_journals)
        print(f"written: {num_images:,} images in {num_journals} journals, {size / 1e6:.0f} MB, "
              f"{time.process_time() - before:.1f} s")  # fmt: skip
        floor = peak_megabytes()
        before = time.process_time()
        state = read_journals(files, folder, ["bench"], num_images)
        seconds = time.process_time() - before
        assert state.num_done == num_images
        print(f"read:    {seconds:.1f} s, peak {peak_megabytes():.0f} MB (before: {floor:.0f} MB)")


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
