"""The errors ddinfer raises, each with the exit code its command line ends with.

Every message says what was found, what was expected, and the way out.
"""

from __future__ import annotations

import errno
import signal
import traceback as traceback_module
from dataclasses import asdict, dataclass
from typing import Any

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_FAILED_PROMPTS = 3
EXIT_BUG = 70
EXIT_IO = 74
EXIT_INTERRUPTED = 75
EXIT_CTRL_C = 130

#: Whatever rank ends with one of these, no other can or should go on.
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
    """The disk said no. Names the path and the cause; the job can be resumed."""

    exit_code = EXIT_IO


def explained(error: OSError) -> str:
    """The system's word for an error, its name, and the way out where one is known."""
    code = errno.errorcode.get(error.errno or 0, "")
    return f"{error.strerror or error}{f' ({code})' if code else ''}{_WAYS_OUT.get(code, '')}"


def is_of_the_machine(error: OSError) -> bool:
    """Whether a full or broken disk, or a limit, is to blame and not what was asked for."""
    return error.errno in _MACHINES


_MACHINES = (
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.EROFS,
)
_WAYS_OUT = {
    "ENOSPC": "; free some space, then run the same command again: it goes on where it was",
    "EDQUOT": "; free some quota, then run the same command again: it goes on where it was",
    "EMFILE": "; raise the limit of open files (ulimit -n), then run the same command again",
    "EFBIG": "; raise the limit of a file's size (ulimit -f), then run the same command again",
    "EROFS": "; choose another --output, or remount it writable",
    "EACCES": "; choose another --output, or change its permissions",
}


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
    """A rank failed. Raised on every other rank and by the launcher.

    Attributes:
        rank: global rank that failed first.
        phase: what it was doing ("joining", "loading", "running", "saving", "gathering", …).
        record: the exception as it was on that rank, or ``None`` where the process just died.
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
                f"rank {rank} ended with exit status {exitcode} before its work was done, "
                f"while {phase}"
            )
        super().__init__(text)

    def __reduce__(self):
        return _rank_error, (self.rank, self.phase, self.record, self.exitcode, self.exit_code)


def _rank_error(
    rank: int, phase: str, record: ErrorRecord | None, exitcode: int | None, exit_code: int
) -> RankError:
    return RankError(rank, phase, record, exitcode=exitcode, exit_code=exit_code)


class PromptsFailed(DdinferError):
    """Everything ran; some prompts could not be made (``generate(errors="raise")``)."""

    exit_code = EXIT_FAILED_PROMPTS


class Stopped(BaseException):
    """A signal asked this process to end, and it did what was left to do.

    Like ``KeyboardInterrupt`` it is no ``Exception``: nobody may take it for a failed prompt.
    """

    def __init__(self, signal_number: int):
        self.signal_number = signal_number
        name = signal.Signals(signal_number).name
        super().__init__(f"{name} came; the same command again goes on from here")

    def __reduce__(self):
        return Stopped, (self.signal_number,)

    @property
    def exit_code(self) -> int:
        return EXIT_CTRL_C if self.signal_number == signal.SIGINT else EXIT_INTERRUPTED


def exit_code_of(error: BaseException) -> int:
    """The exit code that the command line ends with after ``error``."""
    if isinstance(error, DdinferError | Stopped):
        return error.exit_code
    if isinstance(error, OSError) and is_of_the_machine(error):
        return EXIT_IO
    return EXIT_CTRL_C if isinstance(error, KeyboardInterrupt) else EXIT_BUG
