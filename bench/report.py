"""Figures → the marked sections of docs/benchmarks.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.measure import RESULTS, ROOT

#: Part of a machine that others may use before its figures are marked.
BUSY = 0.05
PAGE = ROOT / "docs" / "benchmarks.md"
SECTION = re.compile(r"<!-- bench: (\w+) -->\n.*?<!-- end of (\w+) -->\n", re.DOTALL)


def spread(told: Mapping[str, Any], factor: float = 1) -> str:
    """A median with the lowest and the highest: ``5.1 (4.9 … 5.3)``."""
    low, middle, high = (f"{told[k] * factor:.3g}" for k in ("low", "median", "high"))
    return middle if told["n"] == 1 else f"{middle} ({low} … {high})"


def verdict(is_met: bool) -> str:
    return "✓" if is_met else "✗"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def result_file(name: str) -> Path:
    return RESULTS / f"{name}.json"


def section(name: str, tables: Any) -> str:
    """What stands on the page for a part: its tables, or that it has not run."""
    file = result_file(name)
    if not file.exists():
        return f"Not run yet: `launch/bench --only {name}`.\n"
    result = json.loads(file.read_text(encoding="utf-8"))
    return f"{tables(result['figures'])}\n\n{conditions(name, result)}\n"


def conditions(name: str, result: Mapping[str, Any]) -> str:
    """One line: the command, the machine and whether it was free, the versions."""
    machine, made, others = result["machine"], result["versions"], result["other_cores"]
    load = f"{others} of the cores used by other programs meanwhile"
    if others > BUSY * machine["cores"]:
        load = f"**{load}: absolute times are too long**"
    flag = {"default": "", "quick": " --quick", "full": " --full"}[result["size"]]
    if result["repetitions"]:
        flag += f" --repetitions {result['repetitions']}"
    return (
        f"<sub>`launch/bench{flag} --only {name}`, {result['seconds']:.0f} s, {result['date']}: "
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        f"{machine['system']}, {load}. Python {made['python']}, torch {made['torch']}, "
        f"diffusers {made['diffusers']}, transformers {made['transformers']}. "
        "Median (lowest … highest).</sub>"
    )


def page_with_figures(page: str, parts: Mapping[str, Any]) -> str:
    """The page's text with every marked section made anew.

    Raises:
        ValueError: a section names no part, or a part has no section.
    """
    found = [match[1] for match in SECTION.finditer(page)]
    if sorted(found) != sorted(parts) or any(m[1] != m[2] for m in SECTION.finditer(page)):
        raise ValueError(f"{PAGE.name} has sections {found}; expected one for each of {[*parts]}")

    def made(match: re.Match[str]) -> str:
        name = match[1]
        body = section(name, parts[name].tables)
        return f"<!-- bench: {name} -->\n\n{body}\n<!-- end of {name} -->\n"

    return SECTION.sub(made, page)
