"""The entry of ``ddinfer``, ``python -m ddinfer``, ``python ddinfer/main.py`` and torchrun.

``torchrun ddinfer/main.py --nproc_per_node=2`` works as written: torchrun hands an option behind
the script to the script, which then starts the two ranks itself.
"""

from __future__ import annotations

import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code. Importing this loads neither torch nor diffusers."""
    from ddinfer.cli import dispatch

    return dispatch(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    # As a script, Python puts ddinfer/ itself in front of the path, where our request.py or
    # config.py would shadow anybody's. The folder above it belongs there.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or os.getcwd()) != here]
    sys.path.insert(0, os.path.dirname(here))
    from ddinfer.main import main as run_main

    sys.exit(run_main())
