"""Results → files, on a thread, while the next batch is running.

A batch is committed as one group. First every image: temporary file in the same directory, fsync,
rename into place, then one fsync of the directory; then one journal line each and one fsync of the
journal. So a journal line never refers to an image that a power failure could take away.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddinfer.errors import ErrorRecord, StorageError, describe_os_error
from ddinfer.request import Result
from ddinfer.storage.files import Files, write_and_rename
from ddinfer.storage.images import (
    IMAGES_FOLDER,
    image_path,
    image_text,
    sha256,
)
from ddinfer.storage.journal import JournalWriter
from ddinfer.storage.media import Formats


class Writer:
    """Writes this process's Results.

    Args:
        folder: the output directory.
        journal: this process's own.
        info: about the job, for the ``ddinfer`` chunk of every image; see `image_text`.
        formats: what images, videos and sound are saved as.
        wanted: whether the image of this index is to be written. A batch runs whole also where
            some of its images exist already; those are not written again.

    Attributes:
        num_written, num_failed: journaled so far.
    """

    def __init__(
        self,
        files: Files,
        folder: str,
        journal: JournalWriter,
        info: Mapping[str, Any],
        *,
        formats: Formats | None = None,
        wanted: Callable[[int], bool] = lambda index: True,
    ):
        self.files, self.folder, self.journal, self.info = files, folder, journal, info
        self.formats, self.wanted = formats or Formats(), wanted
        self.num_written = self.num_failed = 0
        self._made_folders: set[str] = set()
        self._in_flight: set[int] = set()  # the first index of each batch that is running
        self._error: BaseException | None = None
        self._queue: queue.Queue[Sequence[Result] | None] = queue.Queue(maxsize=1)
        self._thread: threading.Thread | None = threading.Thread(
            target=self._work, name="ddinfer-writer", daemon=True
        )
        self._thread.start()

    def started(self, indices: Sequence[int]) -> None:
        """Journal that a batch is about to run, and which others still do.

        Not fsynced: it matters where the process dies, and the kernel keeps what that wrote.
        """
        self._raise_error()
        line: dict[str, Any] = {"kind": "start", "indices": list(indices)}
        if self._in_flight:
            line["beside"] = sorted(self._in_flight)
        self._in_flight.add(indices[0])
        self.journal.append([line], sync=False)

    def put(self, results: Sequence[Result]) -> None:
        """Queue one batch for writing; blocks while the queue, of one batch, is full.

        Raises:
            StorageError: writing an earlier batch failed.
        """
        self._raise_error()
        self._in_flight.difference_update(result.index for result in results)
        self._queue.put(results)

    def flush(self) -> None:
        """Wait until everything put is durable, or raise what prevented it."""
        self._queue.join()
        self._raise_error()

    def close(self, reason: str = "done") -> None:
        """Flush, journal the reason of this process's end, and close the journal."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        self._queue.put(None)
        thread.join()
        try:
            self._raise_error()
            self.journal.append([{"kind": "end", "reason": reason}])
        finally:
            self.journal.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self.close()
            return
        try:  # batches in the queue are still written
            self.close(reason=kind.__name__)
        except StorageError:
            if not issubclass(kind, StorageError):
                raise

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (results := self._queue.get()) is not None:
            try:
                if self._error is None:  # else drain the queue, so that put() never blocks for ever
                    self.commit(results)
            except BaseException as error:  # noqa: BLE001  raised by the next call of the caller
                self._error = error
            finally:
                self._queue.task_done()

    # --- on the writer's thread ---------------------------------------------------------------

    def commit(self, results: Sequence[Result]) -> None:
        """Make a batch durable: images first, then their lines."""
        wanted = [result for result in results if self.wanted(result.index)]
        lines = self.store_images(wanted)
        self.journal_lines(lines)

    def store_images(self, results: Sequence[Result]) -> list[dict[str, Any]]:
        """Write every image durably → the journal lines that may now be appended."""
        lines = []
        folders = set()
        for result in results:
            try:
                data = None if result.error is not None else self._encode(result)
                error = result.error
            except (OSError, MemoryError, ImportError) as problem:  # not the prompt's
                why = describe_os_error(problem) if isinstance(problem, OSError) else problem
                raise StorageError(f"cannot encode image {result.index}: {why}") from problem
            except Exception as problem:  # noqa: BLE001  an image that cannot be encoded
                data, error = None, ErrorRecord.of(problem)
            if data is None:
                lines.append(_failure_line(result, error))
                continue
            ending = self.formats.ending(result)
            path = os.path.join(self.folder, image_path(result.index, ending))
            folder = os.path.dirname(path)
            self._ensure_folder(folder)
            write_and_rename(self.files, path, data)
            folders.add(folder)
            lines.append(_image_line(result, data, ending))
        for folder in sorted(folders):
            self.files.sync_folder(folder)
        return lines

    def journal_lines(self, lines: Sequence[dict[str, Any]]) -> None:
        if lines:
            self.journal.append(lines)
        failed = sum(line["kind"] == "failed" for line in lines)
        self.num_failed += failed
        self.num_written += len(lines) - failed

    def _ensure_folder(self, folder: str) -> None:
        if folder not in self._made_folders:
            if not self._made_folders:
                self.files.make_folder(os.path.join(self.folder, IMAGES_FOLDER))
            self.files.make_folder(folder)
            self._made_folders.add(folder)

    def _encode(self, result: Result) -> bytes:
        first = result.frames[0] if result.frames else result.image
        if first is None and result.audio is None:
            raise ValueError("a Result with neither image, frames, audio nor error")
        size = None if first is None else first.size
        text = image_text(
            result.request, self.info, size=size, batch=result.batch, exact=result.exact
        )
        return self.formats.encode(result, text)


def _image_line(result: Result, data: bytes, ending: str) -> dict[str, Any]:
    line: dict[str, Any] = {
        "kind": "image",
        "index": result.index,
        "sha256": sha256(data),
        "bytes": len(data),
        "seconds": round(result.seconds, 4),
    }
    if ending != "png":
        line["ending"] = ending
    if not result.exact:
        line.update(exact=False, batch=list(result.batch))
    if result.flags:
        line["flags"] = list(result.flags)
    return line


def _failure_line(result: Result, error: ErrorRecord | None) -> dict[str, Any]:
    record = error or ErrorRecord("Error", "no image and no reason")
    return {
        "kind": "failed",
        "index": result.index,
        "id": result.id,
        "error": record.to_dict(),
    }
