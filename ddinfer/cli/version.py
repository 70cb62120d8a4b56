"""``ddinfer --version``."""

from collections.abc import Sequence

from ddinfer._version import __version__
from ddinfer.errors import EXIT_OK


def main(argv: Sequence[str]) -> int:
    print(f"ddinfer {__version__}")
    return EXIT_OK
