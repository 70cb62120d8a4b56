"""The errors that ddinfer raises, each with the exit code of the command line.

Every message states what was found, what was expected, and how to fix it.
"""

from __future__ import annotations

import errno
import json
import signal
import traceback as traceback_module
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_FAILED_PROMPTS = 3
EXIT_BUG = 70
EXIT_IO = 74
EXIT_INTERRUPTED = 75
EXIT_CTRL_C = 130
EXIT_PIPE = 141

#: When a rank ends with one of these, no other rank can or should continue.
ENDS_THE_JOB = (EXIT_USAGE, EXIT_IO, EXIT_INTERRUPTED, EXIT_CTRL_C)


class DdinferError(Exception):
    """Base of every error that ddinfer raises on purpose."""

    exit_code = EXIT_BUG


class UsageError(DdinferError, ValueError):
    """An option, an argument or a combination of them that cannot be right."""

    exit_code = EXIT_USAGE


class InputError(UsageError):
    """Bad input data. The message starts with ``file:line`` where there is one."""

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None):
        self.file, self.line, self.detail = file, line, message
        where = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        super().__init__(where + message)

    def __reduce__(self):  # keeps file and line across processes
        return _input_error, (self.detail, self.file, self.line)


def _input_error(detail: str, file: str | None, line: int | None) -> InputError:
    return InputError(detail, file=file, line=line)


class StorageError(DdinferError):
    """An I/O operation failed. Names the path and the cause; the job can be resumed."""

    exit_code = EXIT_IO


def describe_os_error(error: OSError) -> str:
    """The system's message for an error, its name, and a hint where there is one."""
    code = errno.errorcode.get(error.errno or 0, "")
    return f"{error.strerror or error}{f' ({code})' if code else ''}{_HINTS.get(code, '')}"


def is_environment_error(error: OSError) -> bool:
    """Whether a full or broken disk or a resource limit is the cause, and not the request."""
    return error.errno in _ENVIRONMENT_ERRORS


_ENVIRONMENT_ERRORS = (
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
)
_HINTS = {
    "ENOSPC": "; free some space, then run the same command again: it resumes where it stopped",
    "EDQUOT": "; free some quota, then run the same command again: it resumes where it stopped",
    "EMFILE": "; raise the limit of open files (ulimit -n), then run the same command again",
    "EFBIG": "; raise the limit of a file's size (ulimit -f), then run the same command again",
    "EROFS": "; choose another --output, or remount it writable",
    "EACCES": "; choose another --output, or change its permissions",
}


def list_some(items: Sequence[object], limit: int = 10) -> str:
    """The first ``limit`` items for a message, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


class JoinError(DdinferError):
    """A rank could not join its process group."""


@dataclass(frozen=True)
class ErrorRecord:
    """An exception as data: it travels between ranks and into files."""

    type: str
    message: str
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException) -> ErrorRecord:
        lines = traceback_module.format_exception(type(error), error, error.__traceback__)
        return cls(type(error).__name__, str(error), "".join(lines))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.type}: {self.message}"


class RankError(DdinferError):
    """A rank failed. Raised on all other ranks and by the launcher.

    Attributes:
        rank: global rank that failed first.
        phase: what it was doing ("joining", "loading", "running", "saving", "gathering", …).
        record: the exception on that rank; ``None`` if its process died without one.
        exitcode: of its process, negative for a signal; ``None`` if it has not ended.
    """

    def __init__(
        self,
        rank: int,
        phase: str,
        record: ErrorRecord | None = None,
        *,
        exitcode: int | None = None,
        exit_code: int = EXIT_BUG,
    ):
        self.rank, self.phase, self.record, self.exitcode = rank, phase, record, exitcode
        self.exit_code = exit_code
        if record is not None:
            text = f"rank {rank} failed while {phase}: {record}"
            if record.traceback:
                text += f"\n\n--- traceback of rank {rank} ---\n{record.traceback}"
        elif exitcode is not None and exitcode < 0:
            text = f"rank {rank} was killed by {signal.Signals(-exitcode).name} while {phase}"
        else:
            text = (
                f"rank {rank} exited with status {exitcode} before its work was complete, "
                f"while {phase}"
            )
        super().__init__(text)

    def __reduce__(self):
        return RankError.from_json, (self.to_json(),)

    def to_json(self) -> str:
        record = None if self.record is None else self.record.to_dict()
        return json.dumps({**vars(self), "record": record})

    @classmethod
    def from_json(cls, text: str | bytes) -> RankError:
        data = json.loads(text)
        record = data.pop("record")
        return cls(**data, record=None if record is None else ErrorRecord(**record))


class PromptsFailed(DdinferError):
    """Everything ran; some prompts failed (``generate(errors="raise")``)."""

    exit_code = EXIT_FAILED_PROMPTS


class Stopped(BaseException):
    """A signal asked this process to end, and it has shut down in order.

    Like ``KeyboardInterrupt`` it is not an ``Exception``, so that no handler takes it for a failed
    prompt.
    """

    def __init__(self, signal_number: int):
        self.signal_number = signal_number
        name = signal.Signals(signal_number).name
        super().__init__(f"received {name}; run the same command again to resume")

    def __reduce__(self):
        return Stopped, (self.signal_number,)

    @property
    def exit_code(self) -> int:
        return EXIT_CTRL_C if self.signal_number == signal.SIGINT else EXIT_INTERRUPTED


def exit_code_of(error: BaseException) -> int:
    """The exit code that the command line ends with after ``error``."""
    if isinstance(error, DdinferError | Stopped):
        return error.exit_code
    if isinstance(error, OSError) and is_environment_error(error):
        return EXIT_IO
    return EXIT_CTRL_C if isinstance(error, KeyboardInterrupt) else EXIT_BUG
