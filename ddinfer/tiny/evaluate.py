"""Measure the embedded pipelines again: `python -m ddinfer.tiny.evaluate`.

Every prompt of evaluation.txt is drawn once, prompt k with seed k, one at a time on one core at
the default steps, and the picture is checked against its own prompt and against another's.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

from PIL import Image

from . import PIPELINES, call_defaults, path
from .check import describe
from .world import Scene, caption, parse, random_scene

EVALUATION_SET = Path(__file__).parent / "evaluation.txt"
_GROUPS = (  # pairs of figures?, held-out colour-shape pair?, how many prompts
    (False, False, 160),
    (False, True, 80),
    (True, False, 140),
    (True, True, 60),
)


def evaluation_prompts() -> list[str]:
    """The prompts that every training is judged by: 240 of one shape, 200 of two."""
    return EVALUATION_SET.read_text(encoding="utf-8").splitlines()


def make_evaluation_prompts(seed: int = 1) -> list[str]:
    """How the evaluation set was made: random scenes, random wordings, no prompt twice."""
    rng = random.Random(f"evaluation {seed}")
    prompts: dict[str, None] = {}
    for pairs, held_out, count in _GROUPS:
        wanted = len(prompts) + count
        while len(prompts) < wanted:
            scene = random_scene(rng, pairs=float(pairs), held_out=held_out)
            prompts[caption(scene, rng)] = None
    return list(prompts)


def asked_scene(prompt: str) -> Scene:
    """The scene that an evaluation prompt asks for."""
    scene = parse(prompt)
    assert scene is not None, prompt
    return scene


def score(prompts: list[str], seen: list[Scene | None]) -> dict[str, float]:
    """Shares of pictures, in percent, that show their prompt, by kind, and of swapped prompts.

    A swapped prompt is that of the next picture with as many figures which asks for another scene.
    """
    asked = [asked_scene(prompt) for prompt in prompts]
    right = [found is not None and found.satisfies(a) for found, a in zip(seen, asked, strict=True)]
    kinds: dict[str, list[bool]] = {}
    for scene, good in zip(asked, right, strict=True):
        kind = "two shapes" if scene.axis else "one shape"
        kinds.setdefault(kind, []).append(good)
        for shape in sorted({figure.shape for figure in scene.figures}):
            kinds.setdefault(f"with a {shape}", []).append(good)
        if scene.held_out:
            kinds.setdefault(f"{kind}, held-out pair", []).append(good)
    for k, found in enumerate(seen):
        later = [*asked[k + 1 :], *asked[:k]]
        other = next(a for a in later if a.axis == asked[k].axis and a.figures != asked[k].figures)
        good = found is not None and found.satisfies(other)
        kinds.setdefault("swapped prompts", []).append(good)
    return {kind: round(100 * sum(hits) / len(hits), 2) for kind, hits in sorted(kinds.items())}


def faults(prompts: list[str], seen: list[Scene | None]) -> dict[str, int]:
    """How many pictures are unclear, and how many show something else than was asked, by what."""
    counts = dict.fromkeys(("unclear", "number", "background", "colour", "shape", "size"), 0)
    for prompt, found in zip(prompts, seen, strict=True):
        asked = asked_scene(prompt)
        if found is None:
            counts["unclear"] += 1
        elif len(found.figures) != len(asked.figures):
            counts["number"] += 1
        else:
            counts["background"] += asked.background not in (None, found.background)
            for part in ("colour", "shape", "size"):
                counts[part] += any(
                    getattr(want, part) not in (None, getattr(figure, part))
                    for figure, want in zip(found.figures, asked.figures, strict=True)
                )
    return counts


def load(folder: Path, device: str = "cpu") -> Any:
    """The pipeline in a folder, loaded plainly, without its progress bar."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_with(pipe: Any, prompt: str, seed: int, **call: Any) -> Image.Image:
    """One picture from a pipeline."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(prompt, generator=generator, **call).images[0]


def evaluate(
    folder: Path, call: dict[str, Any], *, device: str = "cpu", every: int = 1
) -> dict[str, Any]:
    """All scores of the pipeline in a folder, with `every` > 1 on a part of the prompts."""
    import diffusers  # noqa: F401  (loading is timed after imports)
    from diffusers import FluxPipeline, StableDiffusionPipeline  # noqa: F401

    started = _clocks()
    pipe = load(folder, device)
    loading = _since(started)
    prompts = evaluation_prompts()
    chosen = range(0, len(prompts), every)
    draw_with(pipe, prompts[0], 0, **call)
    started = _clocks()
    pictures = [draw_with(pipe, prompts[k], k, **call) for k in chosen]
    drawing = _since(started)
    asked, seen = [prompts[k] for k in chosen], [describe(picture) for picture in pictures]
    return {
        "prompts": len(asked),
        "percent": score(asked, seen),
        "faults": faults(asked, seen),
        "load_seconds": {clock: round(took, 2) for clock, took in loading.items()},
        "seconds_per_image": {
            clock: round(took / len(pictures), 3) for clock, took in drawing.items()
        },
        "call": call,
    }


def _clocks() -> dict[str, float]:
    """Wall-clock seconds, and the CPU seconds of this process, which other work leaves alone."""
    return {"wall": time.perf_counter(), "cpu": time.process_time()}


def _since(started: dict[str, float]) -> dict[str, float]:
    now = _clocks()
    return {clock: now[clock] - started[clock] for clock in started}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ddinfer.tiny.evaluate", description=__doc__)
    parser.add_argument("--weights", type=Path, help="folder of the pipelines (the embedded ones)")
    parser.add_argument("--pipelines", nargs="+", default=list(PIPELINES))
    parser.add_argument("--every", type=int, default=1, help="judge every n-th prompt only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--call", type=json.loads, default={}, help="JSON over the call defaults")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(options.threads)
    for name in options.pipelines:
        folder = options.weights / name if options.weights else path(name)
        call = {**call_defaults(name), **options.call}
        result = evaluate(folder, call, device=options.device, every=options.every)
        print(json.dumps({"pipeline": name, **result}, indent=2), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
