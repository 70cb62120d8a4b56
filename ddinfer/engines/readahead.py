"""Files read into the page cache by a thread, so that whoever maps them next does not wait."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from ddinfer.models.devices import free_host_bytes

CHUNK_BYTES = 8_000_000


class ReadAhead:
    """Reads files from their beginning to their end until it is stopped.

    Files that together take more than half of the free host memory are left alone: their first
    pages would be gone again before they are used.

    Args:
        on_progress: called with every few megabytes.
    """

    def __init__(self, files: Sequence[Path], on_progress: Callable[[], None] | None = None):
        self.num_bytes = sum(file.stat().st_size for file in files)
        self.num_read = 0
        self._files, self._on_progress = list(files), on_progress
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ddinfer-readahead", daemon=True)
        if self.num_bytes <= free_host_bytes() // 2:
            self._thread.start()

    def _work(self) -> None:
        chunk = bytearray(CHUNK_BYTES)
        # Whoever needs the file will meet the same error, and can say for what.
        with contextlib.suppress(OSError):
            for path in self._files:
                with path.open("rb", buffering=0) as file:
                    while count := file.readinto(chunk):
                        self.num_read += count
                        if self._on_progress is not None:
                            self._on_progress()
                        if self._stopped.is_set():
                            return

    def wait(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()

    def stop(self) -> None:
        self._stopped.set()
        self.wait()
