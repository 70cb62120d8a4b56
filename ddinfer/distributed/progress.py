"""One progress bar for the whole job, on rank 0, fed by counters in the group's store."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import TextIO

from ddinfer.distributed.peers import StoreLost
from ddinfer.distributed.process_group import Group

#: Seconds between two looks at the counters on a terminal.
BAR_SECONDS = 0.5
#: Seconds between two lines elsewhere: at first, and in a job that takes hours.
LINE_SECONDS, LONGEST_LINE_SECONDS = 10.0, 300.0


class Progress:
    """Counts what all ranks have made; rank 0 shows it while the context is open.

    Args:
        total: images of the whole job.
        finished: images that were there before this run, failed ones included.
        stream: where it is shown (default: standard error).
    """

    def __init__(
        self, group: Group, total: int, finished: int = 0, *, stream: TextIO | None = None
    ):
        self.group, self.total, self.finished = group, total, finished
        self.stream = sys.stderr if stream is None else stream
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def made(self, images: int, failed: int = 0) -> None:
        """This rank has finished ``images`` more, of which ``failed`` could not be made."""
        if images:
            self.group.add("finished", images)
        if failed:
            self.group.add("failed", failed)

    def __enter__(self) -> Progress:
        if self.group.group_rank == 0:
            self._thread = threading.Thread(target=self._show, name="ddinfer-progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _show(self) -> None:
        show = self._bar if self.stream.isatty() else self._lines
        # The main thread reports a lost store with more context.
        with contextlib.suppress(StoreLost):
            show()

    def _counts(self) -> tuple[int, int]:
        return self.finished + self.group.add("finished", 0), self.group.add("failed", 0)

    def _bar(self) -> None:
        from tqdm import tqdm

        with tqdm(
            total=self.total, initial=self.finished, unit="image", file=self.stream, smoothing=0.1
        ) as bar:
            over = False
            while not over:
                over = self._stop.wait(BAR_SECONDS)
                finished, failed = self._counts()
                bar.set_postfix_str(f"{failed} failed" if failed else "")
                bar.update(finished - bar.n)

    def _lines(self) -> None:
        started = time.monotonic()
        seconds = 0.0
        while not self._stop.wait(min(max(LINE_SECONDS, seconds / 20), LONGEST_LINE_SECONDS)):
            finished, failed = self._counts()
            seconds = time.monotonic() - started
            print(
                progress_line(finished, self.total, finished - self.finished, failed, seconds),
                file=self.stream,
                flush=True,
            )


def progress_line(finished: int, total: int, new: int, failed: int, seconds: float) -> str:
    """``12 of 40 images, 3.1 images/s, 1 failed, 9 s left``; ``new`` of them took ``seconds``."""
    rate = new / seconds if seconds > 0 else 0.0
    parts = [f"{finished} of {total} images", f"{rate:.3g} images/s"]
    if failed:
        parts.append(f"{failed} failed")
    if rate:
        parts.append(f"{duration((total - finished) / rate)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """``9 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
