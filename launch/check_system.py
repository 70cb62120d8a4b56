"""Says whether the Python that runs this has what ddinfer needs, in range; used by launch/demo."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
import sys
from pathlib import Path

SETUP = Path(__file__).parent.parent / "setup.cfg"


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])


def main() -> int:
    setup = configparser.ConfigParser()
    setup.read(SETUP)
    problems = []
    for line in setup["options"]["install_requires"].split("\n"):
        if not line.strip():
            continue
        name, minimum = (part.strip() for part in line.split(">="))
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{name} is not installed (needs >= {minimum})")
            continue
        print(f"  {name} {found}")
        if numbers(found) < numbers(minimum):
            problems.append(f"{name} is {found} (needs >= {minimum})")
    for problem in problems:
        print(f"  {problem}", file=sys.stderr)
    if problems:
        print("Install these, or run launch/demo without --system.", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
