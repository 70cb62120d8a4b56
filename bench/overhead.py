"""What a rank does beside its pipeline: reading, waiting, PNG, fsync, journal, progress.

Measured in two ways, since a writer's thread takes time from the pipeline's calls where there is
no spare core. By the rank's own clocks: the part of its working time that is outside the calls. And
against a bare loop: plain diffusers in one process with the same thread and the same pictures, none
saved; how much longer ddinfer works on them. The second sees everything.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import inputs
from bench.jobs import SCRIPTS
from bench.measure import CACHE, COMPETITORS_PYTHON, PYTHON, Size, in_turn, run, summary
from bench.report import spread, table, verdict

ABOUT = "a rank's time outside its pipeline, at a second and at 50 ms an image"
EXPECTED_SECONDS = 115

#: name → model, call, images, goal
LOADS: dict[str, tuple[str, dict[str, Any], int, float]] = {
    "mid": ("mid", inputs.MID_CALL, 8, 0.02),
    "tiny": ("tiny", inputs.TINY_CALL | {"num_inference_steps": 4}, 128, 0.10),
}


def measure(size: Size) -> dict[str, Any]:
    found = {}
    for name, (model, call, num_images, goal) in LOADS.items():
        num_images = size.pick(num_images // 4, num_images, 4 * num_images)
        with tempfile.TemporaryDirectory(dir=_cache()) as at:
            folder = Path(at)
            prompts = inputs.prompt_file(folder, num_images)
            source = inputs.tiny_model() if model == "tiny" else inputs.mid_model()
            words = ["--model", str(source), "--prompts", str(prompts)]
            ways = {
                "ddinfer": lambda: _ours(folder, words, call, num_images),  # noqa: B023
                "bare loop": lambda: _bare(folder, words, call, num_images),  # noqa: B023
            }
            taken = in_turn(ways, size.times(1, 3, 5), f"{name}: ")
        ours, bare = taken["ddinfer"], taken["bare loop"]
        found[name] = {
            "num_images": num_images,
            "goal": goal,
            "seconds_per_image": summary([r["working"] for r in ours]),
            "bare_per_image": summary([r["working"] for r in bare]),
            "outside": summary([1 - r["pipeline"] / r["working"] for r in ours]),
            "over_bare": summary(
                [a["working"] / b["working"] - 1 for a, b in zip(ours, bare, strict=True)]
            ),
        }
    return found


def _cache() -> Path:
    CACHE.mkdir(parents=True, exist_ok=True)
    return CACHE


def _ours(folder: Path, words: list[str], call: dict[str, Any], num: int) -> dict[str, float]:
    options = [f"--{name}={value}" for name, value in call.items()]
    options += ["--output", str(folder / "out"), "--overwrite", "--json"]
    options += ["--device=cpu", "--nproc_per_node=1", "--num_threads=1"]
    done = run([PYTHON, "-m", "ddinfer", *words, *options])
    (rank,) = json.loads(done.stdout)["ranks"]
    return {"working": rank["working"] / num, "pipeline": rank["pipeline"] / num}


def _bare(folder: Path, words: list[str], call: dict[str, Any], num: int) -> dict[str, float]:
    times = folder / "times.json"
    options = ["--call", json.dumps(call), "--output", str(folder / "bare"), "--no_files"]
    environ = {"OMP_NUM_THREADS": "1"}
    script = [COMPETITORS_PYTHON, str(SCRIPTS / "plain.py")]
    run([*script, *words, *options, "--times", str(times)], environ)
    return {"working": json.loads(times.read_text())["loop_seconds"] / num}


def tables(figures: Mapping[str, Any]) -> str:
    rows = []
    for name, told in figures.items():
        goal = told["goal"]
        outside, over = told["outside"]["median"], told["over_bare"]["median"]
        rows.append(
            [f"{name}, {told['num_images']} images",
             f"{spread(told['seconds_per_image'])}", f"{spread(told['bare_per_image'])}",
             f"{spread(told['outside'], 100)} % {verdict(outside <= goal)}",
             f"{spread(told['over_bare'], 100)} % {verdict(over <= goal)}",
             f"≤ {goal:.0%}"]
        )  # fmt: skip
    header = ["model", "ddinfer, s an image", "bare loop, s an image", "outside the calls"]
    return table([*header, "longer than the bare loop", "goal"], rows)
