"""`launch/bench`: runs the parts, prints their tables, writes the figures and the page.

python -m bench [--list] [--only PART …] [--quick | --full] [--repetitions N]
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import jobs
from bench.measure import CACHE, PYTHON, RESULTS, ROOT, Machine, Others, Size, versions
from bench.report import PAGE, page_with_figures

#: In the order of the page, and of running.
PARTS = (
    *jobs.PARTS, "startup", "scaling", "overhead", "memory", "options", "instant",
    "launch", "loading", "offload", "journal", "png", "schedule", "continuous", "intra", "gpu",
)  # fmt: skip


def part(name: str) -> Any:
    """What measures it: a module of this package, or one kind of jobs."""
    return jobs.PARTS[name] if name in jobs.PARTS else importlib.import_module(f"bench.{name}")


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    if options.list:
        for name in PARTS:
            module = part(name)
            print(f"{name:10} about {module.EXPECTED_SECONDS:5} s   {module.ABOUT}")
        return 0
    if options.page:
        write_page()
        return 0
    if options.into:
        (name,) = options.only
        measure_part(name, options)
        return 0
    failed = [name for name in options.only or PARTS if not run_part(name, options)]
    if not options.quick:
        write_page()
        print(f"\nfigures: {RESULTS.relative_to(ROOT)}/, {PAGE.relative_to(ROOT)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="launch/bench", description=__doc__.splitlines()[0])
    made.add_argument("--list", action="store_true", help="the parts and how long they take")
    made.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="these parts")
    size = made.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="little of everything; writes nothing")
    size.add_argument("--full", action="store_true", help="more repetitions, all jobs")
    made.add_argument("--repetitions", type=int, default=None, metavar="N")
    made.add_argument("--page", action="store_true", help="write the page from the figures alone")
    made.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    return made


def run_part(name: str, options: argparse.Namespace) -> bool:
    """In a process of its own, so that what one part imports or breaks is not the next one's."""
    print(f"\n== {name}: {part(name).ABOUT}", flush=True)
    folder = CACHE / "quick" if options.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    if options.quick:
        file.unlink(missing_ok=True)
    words = [PYTHON, "-m", "bench", "--only", name, "--into", str(file)]
    words += [f"--{flag}" for flag in ("quick", "full") if getattr(options, flag)]
    words += ["--repetitions", str(options.repetitions)] if options.repetitions else []
    if subprocess.run(words, cwd=ROOT).returncode:
        return False
    if file.exists():
        print(part(name).tables(json.loads(file.read_text(encoding="utf-8"))["figures"]))
    return True


def measure_part(name: str, options: argparse.Namespace) -> None:
    """Measure one part here, and write its figures with all that they depend on.

    Raises:
        SystemExit: what was compared was not the same work.
    """
    size = "quick" if options.quick else "full" if options.full else "default"
    module, others, started = part(name), Others(), time.monotonic()
    figures = module.measure(Size(size, options.repetitions))
    if figures is None:
        print(f"{name}: not on this machine; nothing written")
        return
    result = {
        "part": name,
        "date": time.strftime("%Y-%m-%d"),
        "size": size,
        "repetitions": options.repetitions,
        "seconds": round(time.monotonic() - started, 1),
        "machine": Machine.here().to_dict(),
        "other_cores": others.cores(),
        "versions": versions(),
        "figures": figures,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    options.into.write_text(text, encoding="utf-8")
    wrong = module.problems(figures) if hasattr(module, "problems") else []
    if wrong:
        sys.exit("the work compared was not the same:\n" + "\n".join(wrong))


def write_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    made = page_with_figures(page, {name: part(name) for name in PARTS})
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
