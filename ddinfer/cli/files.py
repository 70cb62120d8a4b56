"""The files that a command is told to write."""

from __future__ import annotations

import os

from ddinfer.errors import UsageError


def check_can_write(option: str, path: str, ending: str) -> None:
    """Tell before time is spent why ``path`` cannot be written.

    Raises:
        UsageError: it ends otherwise, is a folder, or its folder is not there or not ours.
    """
    folder = os.path.dirname(path) or "."
    if not path.endswith(ending):
        raise UsageError(f"{option} {path} must end in {ending}")
    if os.path.isdir(path):
        raise UsageError(f"{option} {path} is a folder; a file's name was expected")
    if not os.path.isdir(folder):
        raise UsageError(f"{option} {path}: there is no folder {folder}; make it first")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UsageError(f"{option} {path} may not be written by this user")
