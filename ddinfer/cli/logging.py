"""What only a process of our own may do to itself: logging, and other libraries' output."""

from __future__ import annotations

import logging
import os
import sys
import threading


def quiet_libraries() -> None:
    """Before diffusers and transformers are imported: their errors only, unless asked for more."""
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")


def own_process(rank: int) -> None:
    """Show the library's log: notes of rank 0 and warnings of every rank, on standard error."""
    import tqdm

    handler = logging.StreamHandler(sys.stderr)
    who = "ddinfer" if rank == 0 else f"ddinfer (rank {rank})"
    handler.setFormatter(logging.Formatter(f"{who}: %(message)s"))
    logger = logging.getLogger("ddinfer")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    # tqdm's own lock holds semaphores, which would count as leaked when a rank leaves at once.
    tqdm.tqdm.set_lock(threading.RLock())
