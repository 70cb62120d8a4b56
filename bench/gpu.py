"""What only a GPU can show: its share of time in kernels, saving beside computing, loading.

Per batch size: images a second of plain diffusers' best loop (load once, call, save nothing) and of
a ddinfer job's working time on the same GPU, goal ≥ 0.97; of the same loop the share of wall time
in kernels, by the profiler, goal ≥ 0.97; and how much of encoding and saving is hidden behind the
next batch. Loading: GB a second onto the device, against the disk's and the bus's.

Needs a CUDA device. The model is the mid-size one in float32; another one is named in the
environment, `BENCH_GPU_MODEL=FOLDER BENCH_GPU_DTYPE=float16`.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import inputs
from bench.measure import CACHE, PYTHON, Size, in_turn, progress, ratios, run, summary
from bench.report import spread, table, verdict

ABOUT = "on a CUDA GPU: share of time in kernels, saving beside computing, GB/s of loading"
EXPECTED_SECONDS = 300
GOAL = 0.97
DTYPE = os.environ.get("BENCH_GPU_DTYPE", "float32")
BATCH_SIZES = (1, 8)


def measure(size: Size) -> dict[str, Any] | None:
    """→ figures, or None where there is no CUDA device."""
    import torch

    if not torch.cuda.is_available():
        return None
    model = Path(os.environ.get("BENCH_GPU_MODEL") or inputs.mid_model())
    call = {} if "BENCH_GPU_MODEL" in os.environ else dict(inputs.MID_CALL)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(0), "dtype": DTYPE}
    found["model"] = model.name
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        num_images = size.pick(16, 64, 256)
        found["num_images"] = num_images
        prompts = inputs.prompt_file(folder, num_images)
        found["loading"] = loading(model)
        found["batches"] = {}
        for batch_size in BATCH_SIZES:
            ways = {
                "ddinfer": lambda b=batch_size: job(folder, model, prompts, call, b),
                "loop": lambda b=batch_size: loop(folder, model, call, num_images, b),
            }
            taken = in_turn(ways, size.times(1, 3, 5), f"batch {batch_size}: ")
            ours = [r["working"] for r in taken["ddinfer"]]
            bare = [r["loop"] for r in taken["loop"]]
            found["batches"][str(batch_size)] = {
                "images_per_second": summary([num_images / s for s in ours]),
                "of_the_loop": ratios(bare, ours),
                "kernels": summary([r["kernels"] for r in taken["loop"]]),
                "outside": summary([r["outside"] for r in taken["ddinfer"]]),
            }
    return found


def job(
    folder: Path, model: Path, prompts: Path, call: Mapping[str, Any], batch_size: int
) -> dict[str, float]:
    """A whole job on one GPU; its rank's clocks. ``outside``: share not inside pipeline calls."""
    words = ["--model", str(model), "--prompts", str(prompts), "--output", str(folder / "out")]
    words += ["--overwrite", "--json", "--device=cuda", "--nproc_per_node=1"]
    words += [f"--dtype={DTYPE}", f"--batch_size={batch_size}"]
    words += [*(f"--{name}={value}" for name, value in call.items())]
    (rank,) = json.loads(run([PYTHON, "-m", "ddinfer", *words]).stdout)["ranks"]
    return {"working": rank["working"], "outside": 1 - rank["pipeline"] / rank["working"]}


def loop(
    folder: Path, model: Path, call: Mapping[str, Any], num_images: int, batch_size: int
) -> dict[str, float]:
    """Plain diffusers' best loop, in a process of its own."""
    out = folder / "loop.json"
    words = [str(model), json.dumps(call), str(num_images), str(batch_size), str(out)]
    run([PYTHON, "-m", "bench.gpu", *words])
    return json.loads(out.read_text())


def loop_here(
    model: str, call: Mapping[str, Any], num_images: int, batch_size: int
) -> dict[str, float]:
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, DTYPE)).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    prompts = inputs.parti_prompts()[:num_images]

    def draw(start: int) -> None:
        batch = prompts[start : start + batch_size]
        generators = [torch.Generator("cpu").manual_seed(start + k) for k in range(len(batch))]
        pipe(batch, generator=generators, **call)

    draw(0)  # kernels are chosen, memory is there
    torch.cuda.synchronize()
    started = time.perf_counter()
    for start in range(0, num_images, batch_size):
        draw(start)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"loop": seconds, "kernels": _share_in_kernels(draw)}


def _share_in_kernels(draw: Any) -> float:
    """Of the wall time of one call; kernels that overlap count once."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        torch.cuda.synchronize()
        started = time.perf_counter()
        draw(0)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    )
    busy, reached = 0.0, float("-inf")
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return busy / 1e6 / seconds


def loading(model: Path) -> dict[str, float]:
    """GB/s of `load_pipeline` onto the device, of reading the same files (cached), of the bus."""
    progress("loading")
    code = """
import json, sys, time, torch
from pathlib import Path
from ddinfer.models.loading import load_pipeline
files = list(Path(sys.argv[1]).glob("*/*.safetensors"))
size = sum(f.stat().st_size for f in files)
for f in files: f.read_bytes()
torch.empty(1, device="cuda")
load_pipeline(sys.argv[1], device="cuda")
torch.cuda.synchronize()
start = time.perf_counter(); load_pipeline(sys.argv[1], device="cuda"); torch.cuda.synchronize()
load = time.perf_counter() - start
pinned = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
device = torch.empty_like(pinned, device="cuda"); device.copy_(pinned); torch.cuda.synchronize()
start = time.perf_counter(); device.copy_(pinned); torch.cuda.synchronize()
bus = time.perf_counter() - start
start = time.perf_counter(); [f.read_bytes() for f in files]
read = time.perf_counter() - start
print(json.dumps({"load": size / load / 1e9, "read": size / read / 1e9, "bus": 1.073741824 / bus}))
"""
    told = json.loads(run([PYTHON, "-c", code, str(model)]).stdout.splitlines()[-1])
    return {name: round(value, 3) for name, value in told.items()}


def tables(figures: Mapping[str, Any]) -> str:
    rows = []
    for batch_size, told in figures["batches"].items():
        of_loop, kernels = told["of_the_loop"]["median"], told["kernels"]["median"]
        rows.append(
            [f"batch {batch_size}", spread(told["images_per_second"]),
             f"{spread(told['of_the_loop'])} {verdict(of_loop >= GOAL)}",
             f"{spread(told['kernels'])} {verdict(kernels >= GOAL)}",
             f"{spread(told['outside'], 100)} %"]
        )  # fmt: skip
    what = f"{figures['device']}, {figures['model']}, {figures['dtype']}"
    what += f", {figures['num_images']} images"
    header = [what, "images/s", "of the bare loop, ≥ 0.97", "in kernels, ≥ 0.97"]
    load = figures["loading"]
    return table([*header, "outside the calls"], rows) + (
        f"\n\nLoading: {load['load']:.2f} GB/s onto the device; reading files "
        f"{load['read']:.2f}, the bus {load['bus']:.2f}."
    )


if __name__ == "__main__":
    import sys

    folder, call, num, batch, target = sys.argv[1:]
    made = loop_here(folder, json.loads(call), int(num), int(batch))
    Path(target).write_text(json.dumps(made))
