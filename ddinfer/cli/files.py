"""Checks of the files that a command writes."""

from __future__ import annotations

import os

from ddinfer.errors import UsageError


def check_can_write(option: str, path: str, ending: str) -> None:
    """Check before any work that ``path`` can be written.

    Raises:
        UsageError: another ending, a directory, or in a directory that is missing or not
            writable.
    """
    folder = os.path.dirname(path) or "."
    if not path.endswith(ending):
        raise UsageError(f"{option} {path} must end in {ending}")
    if os.path.isdir(path):
        raise UsageError(f"{option} {path} is a directory; expected the name of a file")
    if not os.path.isdir(folder):
        raise UsageError(f"{option} {path}: the directory {folder} does not exist; create it first")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UsageError(f"{option} {path} is not writable by this user")
