"""What ranks gain, loading left out: images a second on one rank and on two, a thread each.

The work is the mid-size model's. ``working`` is each rank's own clock, from the loaded model to its
last image, saved. Beside it how much longer the pipeline's own calls took with two ranks: what the
machine loses by itself (shared caches and memory), which no launcher can give back.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import inputs
from bench.measure import CACHE, PYTHON, Size, in_turn, ratios, run, summary
from bench.report import spread, table, verdict

ABOUT = "images a second on one and on two ranks, loading left out"
EXPECTED_SECONDS = 75
GOAL = 0.97
RANKS = (1, 2)


def measure(size: Size) -> dict[str, Any]:
    """→ per number of ranks; ``efficiency`` is throughput over ranks × one rank's."""
    num_prompts = size.pick(4, 10, 48)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        prompts = inputs.prompt_file(folder, num_prompts)
        ways = {
            str(ranks): lambda ranks=ranks: one_job(folder, prompts, ranks, num_prompts)
            for ranks in RANKS
        }
        taken = in_turn(ways, size.times(1, 3, 5), "ranks: ")
    one, two = ([r["working"] for r in taken[str(n)]] for n in RANKS)
    calls = [[r["pipeline_per_image"] for r in taken[str(n)]] for n in RANKS]
    return {
        "num_prompts": num_prompts,
        "working": {ranks: summary([r["working"] for r in runs]) for ranks, runs in taken.items()},
        "efficiency": ratios(one, [RANKS[1] * seconds for seconds in two]),
        "machine": ratios(*calls),
    }


def one_job(folder: Path, prompts: Path, ranks: int, num_prompts: int) -> dict[str, float]:
    call = [f"--{name}={value}" for name, value in inputs.MID_CALL.items()]
    words = ["--model", str(inputs.mid_model()), "--prompts", str(prompts), "--overwrite"]
    words += ["--output", str(folder / "out"), "--device=cpu", f"--nproc_per_node={ranks}"]
    done = run([PYTHON, "-m", "ddinfer", *words, *call, "--num_threads=1", "--json"])
    told = json.loads(done.stdout)["ranks"]
    return {
        "working": max(rank["working"] for rank in told),
        "pipeline_per_image": sum(rank["pipeline"] for rank in told) / num_prompts,
    }


def tables(figures: Mapping[str, Any]) -> str:
    rows = [
        [f"{ranks} rank{'s' * (ranks != '1')}: seconds for {figures['num_prompts']} images",
         spread(told), ""]
        for ranks, told in figures["working"].items()
    ]  # fmt: skip
    met = verdict(figures["efficiency"]["median"] >= GOAL)
    rows += [
        ["throughput of 2 ranks / (2 × one rank's)", spread(figures["efficiency"]),
         f"≥ {GOAL} {met}"],
        ["a pipeline call on one rank / one on two, the machine's own loss",
         spread(figures["machine"]), ""],
    ]  # fmt: skip
    return table(["", "", "goal"], rows)
