"""Importing once, and quickly, what a process and all that are forked from it will need."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence


def import_for_good(
    names: Sequence[str],
    further: Callable[[], object] | None = None,
    before_torch: Callable[[], object] = lambda: None,
) -> None:
    """Import modules for the life of this process, which must be one of our own.

    The garbage collector is off meanwhile: it would walk the modules again and again, which takes
    a fifth of their import, and find nothing. Afterwards it leaves alone what is there now, so
    that forked processes go on sharing it.

    torch's libraries are linked on a thread while the module in front of it in ``names`` is
    imported: that needs no interpreter. The linker does one thing at a time, so that module should
    have no libraries to load, or have them loaded by those before it.

    What fails here fails again where it is needed, and is told there.

    Args:
        further: imports what depends on the job. Neither it nor the modules may open a connection
            or a thread: processes are forked after it.
        before_torch: called once, before torch's libraries are loaded, perhaps on that thread.
    """
    torch_at = names.index("torch") if "torch" in names else 0
    beside_at = max(torch_at - 1, 0)
    was_on = gc.isenabled()
    gc.disable()
    try:
        _import(names[:beside_at])
        with _linking_torch(before_torch, beside=torch_at > 0):
            _import(names[beside_at:torch_at])
        _import(names[torch_at:])
        if further is not None:
            with contextlib.suppress(Exception):
                further()
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def _import(names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


@contextlib.contextmanager
def _linking_torch(first: Callable[[], object], *, beside: bool) -> Iterator[None]:
    """Inside, a thread brings torch's libraries into this process; it has ended afterwards.

    Args:
        first: called before that.
        beside: whether anything is done inside; else there is no thread, torch's import does it.
    """
    if not beside or sys.platform != "linux" or "torch" in sys.modules:
        first()
        yield
        return
    thread = threading.Thread(target=_link_torch, args=(first,), name="ddinfer-link-torch")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _link_torch(first: Callable[[], object]) -> None:
    first()
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return
    # Called as a C function it lets other threads run, as `ctypes.CDLL` does not. So it must be a
    # library that does not know Python. Importing torch finds it there, or says what is missing.
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    library = os.path.join(os.path.dirname(spec.origin), "lib", "libtorch.so")
    dlopen(os.fsencode(library), os.RTLD_NOW)
