"""How busy the continuous pipeline keeps its stages, against the ideal and a flushed schedule.

    launch/bench --only continuous
    python -m bench.continuous [--stages 2] [--in_flight M] [--images N] [--steps 8] [--svg FILE]
    python -m bench.continuous --write     writes the figures of docs/pipeline-parallel.md

Starts one gloo rank of one thread per stage, with a random SD3-shaped pipeline whose denoiser
dwarfs the rest. Utilisation is the time that stages worked on calls / (wall × stages), from the
first call to the last; the whole run, with encoding and decoding, is told beside it. The flushed
schedule is the same pipeline, held back so that a step begins when all images have ended the one
before. Run it on an idle machine with a core for each stage.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench.measure import PYTHON, ROOT, Machine, Others, Size, run, versions
from bench.report import table

ABOUT = (
    "how busy the continuous pipeline keeps its stages, against the ideal and a flushed schedule"
)
EXPECTED_SECONDS = 40

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")


#: What stands on the page: its cases (stages, in flight, images, steps), and how often each ran.
PAGE, TIMELINE = (
    ROOT / "docs" / "pipeline-parallel.md",
    ROOT / "docs/images/continuous-timeline.svg",
)
CASES, REPETITIONS = ((2, 2, 4, 4), (2, 2, 4, 8), (2, 4, 8, 8)), 3
FIGURES = re.compile(
    r"(<!-- figures of bench.continuous -->\n).*?(<!-- end of figures -->\n)", re.DOTALL
)


def write_page() -> None:
    """Measure all cases and put table and timeline into the page."""
    others, began, rows = Others(), time.monotonic(), []
    for number, (stages, in_flight, images, steps) in enumerate(CASES):
        words = ["--stages", stages, "--in_flight", in_flight, "--images", images]
        words += ["--steps", steps, "--json", *(["--svg", TIMELINE] if number == 0 else [])]
        command = [PYTHON, "-m", "bench.continuous", *map(str, words)]
        runs = [json.loads(run(command).stdout)["schedules"] for _ in range(REPETITIONS)]
        for name in ("continuous", "flushed"):
            told = [schedules[name] for schedules in runs]
            how = "continuous, transfers overlap" if in_flight >= 2 * stages else "continuous"
            rows.append(
                [
                    str(stages),
                    str(in_flight),
                    f"{images} × {steps}",
                    how if name == "continuous" else name,
                    *(_middle([t[k] for t in told], 3) for k in ("utilisation", "ideal", "share")),
                    _middle([t["denoising_seconds"] for t in told], 2),
                ]
            )
            print(" ".join(rows[-1]), flush=True)
    header = ["stages", "in flight", "images × steps", "schedule", "utilisation", "ideal"]
    header += ["share of ideal", "seconds of denoising"]
    made, machine, taken = versions(), Machine.here(), others.cores()
    busy = "" if taken <= 0.1 else f"; **other programs used {taken} of them**"
    under = (
        f"<sub>`python -m bench.continuous --write`, {time.monotonic() - began:.0f} s: "
        f"{machine.processor}, {machine.cores} cores{busy}. "
        f"torch {made['torch']}, diffusers {made['diffusers']}. Median of {REPETITIONS} runs "
        "(lowest … highest).</sub>"
    )
    text = PAGE.read_text(encoding="utf-8")
    body = f"\n{table(header, rows)}\n\n{under}\n\n"
    made_page, count = FIGURES.subn(lambda match: match[1] + body + match[2], text)
    if count != 1:
        sys.exit(f"{PAGE} has {count} sections for these figures; expected one")
    PAGE.write_text(made_page, encoding="utf-8")


def _middle(values: list[float], digits: int) -> str:
    middle, low, high = statistics.median(values), min(values), max(values)
    if low == high:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def measure(size: Size) -> dict[str, Any]:
    """In a process of its own, from which the ranks are started."""
    images, steps = size.pick(("2", "3"), ("4", "8"), ("8", "12"))
    words = ["--images", images, "--steps", steps, "--json"]
    return json.loads(run([PYTHON, "-m", "bench.continuous", *words]).stdout)


def tables(figures: Mapping[str, Any]) -> str:
    rows = [
        [name, *(f"{told[k]:.3f}" for k in ("utilisation", "ideal", "share"))]
        for name, told in figures["schedules"].items()
    ]
    return table([text(figures), "utilisation", "ideal", "share of the ideal"], rows)


def text(figures: Mapping[str, Any]) -> str:
    return (
        f"{figures['stages']} stages, {figures['in_flight']} images in flight, "
        f"{figures['images']} images of {figures['steps']} steps"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--in_flight", type=int, default=None, help="default: the stages")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--svg", default=None, help="draw the timeline of both schedules")
    parser.add_argument("--json", action="store_true", help="print figures as JSON")
    parser.add_argument("--write", action="store_true", help="make the page's figures anew")
    asked = parser.parse_args()
    if asked.write:
        write_page()
        return
    from ddinfer.distributed.launch import launch

    in_flight = asked.in_flight or asked.stages
    told = launch(
        both_schedules,
        in_flight,
        asked.images,
        asked.steps,
        nproc_per_node=asked.stages,
        device="cpu",
    )
    figures = {
        "stages": asked.stages,
        "in_flight": in_flight,
        "images": asked.images,
        "steps": asked.steps,
        "schedules": utilisations(told, in_flight, asked),
    }
    print(json.dumps(figures) if asked.json else tables(figures))
    if asked.svg:
        draw(
            asked.svg,
            {name: [rank[name][0] for rank in told] for name in ("continuous", "flushed")},
        )


def utilisations(told: list[dict], in_flight: int, asked: argparse.Namespace) -> dict[str, Any]:
    """→ schedule → how busy its stages were, what was possible, and the seconds behind that."""
    calls = [asked.steps] * asked.images
    latency = asked.stages * (2 if in_flight >= 2 * asked.stages else 1)
    ideal = ideal_utilisation(calls, latency, in_flight)
    flushed = asked.images * asked.steps / flushed_ticks(asked.images, in_flight, asked)
    found = {}
    for name, limit in (("continuous", ideal), ("flushed", flushed)):
        spans = [rank[name][0] for rank in told]
        begin = min(s[0] for rank in spans for s in rank)
        wall = max(s[1] for rank in spans for s in rank) - begin
        work = [sum(s[1] - s[0] for s in rank) for rank in spans]
        used = sum(work) / (wall * asked.stages)
        found[name] = {
            "utilisation": round(used, 4),
            "ideal": round(limit, 4),
            "share": round(used / limit, 4),
            "denoising_seconds": round(wall, 3),
            "whole_seconds": round(told[0][name][1], 3),
            "stages_seconds": [round(seconds, 3) for seconds in work],
        }
    return found


def ideal_utilisation(calls: Sequence[int], latency: int, limit: int) -> float:
    """Useful stage time / (ticks × stages) for images with this many calls each."""
    from ddinfer.parallel.continuous.admission import best_limit, count_ticks

    ticks = count_ticks([], calls, latency, best_limit([], calls, latency, limit))
    return sum(calls) / ticks


def flushed_ticks(images: int, in_flight: int, asked: argparse.Namespace) -> int:
    groups = [min(in_flight, images - k) for k in range(0, images, in_flight)]
    return sum(asked.steps * (group + asked.stages - 1) for group in groups)


def both_schedules(world, in_flight: int, images: int, steps: int) -> dict:
    """Both schedules on one rank: their spans, and the seconds of the whole run."""
    import torch

    from ddinfer.distributed.process_group import process_group
    from ddinfer.parallel.continuous import pipeline
    from ddinfer.patched import patched

    torch.set_num_threads(1)
    found = {}
    queues = {"continuous": pipeline.AdmissionQueue, "flushed": flushed_queue()}
    with process_group(world):
        timed = timed_pipeline()(make_pipe(), num_in_flight=in_flight)
        list(timed.run([job(0, 1)] * timed.comm.size))  # plans are made, memory is warm
        for name, queue in queues.items():
            timed.spans.clear()
            started = time.monotonic()
            with patched(pipeline, "AdmissionQueue", queue):
                for outcome in timed.run([job(k, steps) for k in range(images)]):
                    if outcome.error is not None:
                        raise outcome.error
            found[name] = (list(timed.spans), time.monotonic() - started)
    return found


def timed_pipeline():
    from ddinfer.parallel.continuous.pipeline import ContinuousPipeline

    class TimedPipeline(ContinuousPipeline):
        """Keeps when its stage worked on a call: start, end (`time.monotonic`), serial."""

        def __init__(self, *args, **kwargs):
            self.spans = []
            super().__init__(*args, **kwargs)

        def _run_stage(self, message):
            started = time.monotonic()
            values = super()._run_stage(message)
            self.spans.append((started, time.monotonic(), message.serial))
            return values

    return TimedPipeline


def flushed_queue():
    from ddinfer.parallel.continuous.admission import AdmissionQueue

    class FlushedQueue(AdmissionQueue):
        """Holds every image back until all have ended the step."""

        def __init__(self, *args):
            super().__init__(*args)
            self.held = []

        def current_limit(self):
            return self._limit if not self.active else len(self.active)

        def resume(self, task, output=None, error=None):
            super().resume(task, output, error)
            if task in self.ready:
                self.ready.remove(task)
                self.held.append(task)
            if not self.ready and not self.in_flight:
                self.ready.extend(self.held)
                self.held.clear()

    return FlushedQueue


def make_pipe():
    import torch
    from diffusers import SD3Transformer2DModel

    from tests.tiny_pipelines import stable_diffusion_3

    torch.manual_seed(0)
    pipe = stable_diffusion_3()
    pipe.transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_layers=8, attention_head_dim=64,
        num_attention_heads=8, caption_projection_dim=512, joint_attention_dim=32,
        pooled_projection_dim=64, out_channels=4, pos_embed_max_size=32,
    )  # fmt: skip
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def job(number: int, steps: int):
    import torch

    def make(pipe):
        return pipe(
            "a red cat", num_inference_steps=steps, height=64, width=64, guidance_scale=1.0,
            max_sequence_length=16, generator=torch.Generator("cpu").manual_seed(number),
            output_type="np",
        ).images[0]  # fmt: skip

    return make


def draw(path: str, schedules: dict) -> None:
    """The timeline as SVG: a row per stage, a bar per call, a colour per image."""
    width, row, left = 960, 22, 150
    seconds = {
        name: (min(s[0] for r in ranks for s in r), max(s[1] for r in ranks for s in r))
        for name, ranks in schedules.items()
    }
    longest = max(end - begin for begin, end in seconds.values())
    parts, y = [], 24
    for name, ranks in schedules.items():
        begin, end = seconds[name]
        first = min(s[2] for r in ranks for s in r)
        parts.append(f'<text x="4" y="{y - 6}">{name}: {end - begin:.2f} s</text>')
        for stage, spans in enumerate(ranks):
            parts.append(f'<text x="4" y="{y + 15}">rank {stage}, stage {stage}</text>')
            for start, stop, serial in spans:
                x = left + (start - begin) / longest * (width - left - 8)
                w = (stop - start) / longest * (width - left - 8)
                colour = COLOURS[(serial - first) % len(COLOURS)]
                parts.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{max(w - 0.6, 0.4):.1f}" '
                    f'height="{row - 4}" fill="{colour}"/>'
                )
            y += row
        y += 30
    with open(path, "w", encoding="utf-8") as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y - 10}" '
            f'font-family="sans-serif" font-size="13">\n<rect width="100%" height="100%" '
            f'fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
        )


if __name__ == "__main__":
    main()
