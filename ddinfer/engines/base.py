"""The contract between a job and whatever makes its images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ddinfer.request import Request, Result

#: Requests that share one pipeline call, in call order.
Batch = Sequence[Request]


class ProgressListener(Protocol):
    """Who wants to hear that an engine moves; see `ddinfer.job.watchdog`."""

    def listen_to(self, pipe: Any) -> None: ...

    def steps(self) -> None: ...

    def waits(self) -> None: ...

    def awaiting(self) -> AbstractContextManager[None]: ...


class Engine(Protocol):
    """Makes images on one replica: one rank, or several that hold one model together.

    An engine pulls batches when it has room for them, so that whoever feeds it decides late
    which batch is next. It answers every Request of every batch with exactly one Result, in any
    order. A prompt that cannot be made is a Result with an ``error``; an exception means that
    this process can make nothing more.
    """

    def run(self, batches: Iterable[Batch]) -> Iterator[Result]:
        """Yield one Result per Request of ``batches``."""
        ...

    def set_progress_listener(self, heartbeat: ProgressListener) -> None:
        """From now on let ``heartbeat`` hear every step of the denoiser."""
        ...

    def close(self) -> None:
        """Ends what the engine has started. It is not run again."""
        ...
