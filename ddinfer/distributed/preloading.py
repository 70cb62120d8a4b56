"""Importing once, and quickly, what a process and all that are forked from it will need."""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Callable, Sequence


def import_for_good(names: Sequence[str], further: Callable[[], object] | None = None) -> None:
    """Import modules for the life of this process, which must be one of our own.

    The garbage collector is off meanwhile: it would walk the modules again and again, which takes
    a fifth of their import, and find nothing. Afterwards it leaves alone what is there now, so
    that forked processes go on sharing it.

    What fails here fails again where it is needed, and is told there.

    Args:
        further: imports what depends on the job. Neither it nor the modules may open a GPU, a
            connection or a thread: processes are forked after it.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        for name in names:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        if further is not None:
            with contextlib.suppress(Exception):
                further()
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
