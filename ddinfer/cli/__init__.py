"""The command line: one file per command. The library never imports this package."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from ddinfer.cli.logging import quiet_libraries
from ddinfer.errors import (
    ENDS_THE_JOB,
    EXIT_CTRL_C,
    EXIT_IO,
    EXIT_OK,
    EXIT_PIPE,
    DdinferError,
    RankError,
    Stopped,
    describe_os_error,
    is_environment_error,
)

#: Command → what it does, in one line. Each is a module of this package with ``main(argv)``.
COMMANDS = {
    "run": "generate the images of a prompt file (the default command)",
    "plan": "what memory a model needs and where it would be placed; reads no weights",
    "status": "progress of a job, while it runs and afterwards",
    "report": "write a page of the job's images, failures and times",
    "verify": "check that every image is present with the bytes that were written",
    "retry-failed": "generate the failed prompts of a job again, from what its folder records",
    "merge": "join the parts of a job that was split with --shard",
    "template": "print the script that starts a job under Slurm, Kubernetes or torchrun",
    "replay": "generate one image again from its own metadata and compare",
}


def dispatch(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` names and return its exit code; errors go to stderr."""
    name, rest = _split(list(argv))
    if name is None:
        return 2
    if name == "help":
        print(_usage())
        return EXIT_OK
    quiet_libraries()
    try:
        code = importlib.import_module(f"ddinfer.cli.{name.replace('-', '_')}").main(rest)
        sys.stdout.flush()  # here, where a reader that has ended is no surprise
        return code
    except DdinferError as error:
        print(f"ddinfer: error: {_message(error)}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has ended, as `head` does. Python flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_PIPE
    except OSError as error:
        if not is_environment_error(error):
            raise
        path = "" if error.filename is None else f"{error.filename2 or error.filename}: "
        print(f"ddinfer: error: {path}{describe_os_error(error)}", file=sys.stderr)
        return EXIT_IO
    except Stopped as stopped:
        print(f"ddinfer: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("ddinfer: interrupted; run the same command again to resume", file=sys.stderr)
        return EXIT_CTRL_C


def _split(argv: list[str]) -> tuple[str | None, list[str]]:
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-V", "--version"):
            return "version", argv[1:]
        return "run", argv
    name = argv[0]
    if name in (*COMMANDS, "help", "version"):
        return name, argv[1:]
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    print(
        f"ddinfer: error: no command {name!r}{hint} The commands are: {', '.join(COMMANDS)}. "
        "Pass a prompt with --prompt.",
        file=sys.stderr,
    )
    return None, []


def _usage() -> str:
    lines = [f"  {name:<14}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        ["ddinfer COMMAND [options]", "", *lines, "", "ddinfer COMMAND --help lists its options."]
    )


def _message(error: DdinferError) -> str:
    """For a user's mistake its own message, without the traceback of the rank that found it."""
    is_usage = isinstance(error, RankError) and error.exit_code in ENDS_THE_JOB
    if is_usage and isinstance(error, RankError) and error.record is not None:
        return f"{error.record.message} (found by rank {error.rank} while {error.phase})"
    return str(error)
