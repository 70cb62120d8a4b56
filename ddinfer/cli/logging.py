"""Logging of a process that the command line owns, and the output of other libraries."""

from __future__ import annotations

import logging
import os
import sys
import threading


def quiet_libraries() -> None:
    """Show only errors of diffusers and transformers, unless the environment asks for more.

    Called before they are imported.
    """
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(name, "error")


def configure_logging(rank: int) -> None:
    """Log to standard error: notes of rank 0 and warnings of all ranks."""
    import tqdm

    handler = logging.StreamHandler(sys.stderr)
    prefix = "ddinfer" if rank == 0 else f"ddinfer (rank {rank})"
    handler.setFormatter(logging.Formatter(f"{prefix}: %(message)s"))
    logger = logging.getLogger("ddinfer")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    # tqdm's own lock holds semaphores, which count as leaked when a rank exits without teardown.
    tqdm.tqdm.set_lock(threading.RLock())
