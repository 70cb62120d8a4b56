"""What `--compile`, channels_last, bfloat16 and the attention backends bring, and cost in pixels.

One process with one thread, one image at a time and four, the variants in turn: the mid-size UNet,
and the embedded Flux for the attention backends, since diffusers' UNets do not choose theirs by the
dispatcher that the option speaks to. Each variant's images are held against those of the plain one:
the largest difference of any value, of 255, and the peak signal-to-noise ratio. `--compile`
compiles the repeated blocks where a model names them.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import inputs
from bench.measure import CACHE, PYTHON, Size, in_turn, progress, ratios, run, summary
from bench.report import spread, table

ABOUT = "--compile, channels_last, bfloat16, attention backends: speed, and what it does to images"
EXPECTED_SECONDS = 110
VARIANTS = {
    "mid": ("plain", "channels_last", "bfloat16", "compile", "fuse_qkv_projections"),
    "shapes-flux": ("plain", "bfloat16", "compile", "attention _native_math",
                    "attention _native_flash", "attention flex"),
}  # fmt: skip


def measure(size: Size) -> dict[str, Any]:
    """The work is done in a process of its own, which has one thread."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        out = Path(name) / "figures.json"
        environ = {"OMP_NUM_THREADS": "1"}
        environ["TORCHINDUCTOR_CACHE_DIR"] = name  # so that what compiling costs is seen
        batches = size.pick("1", "1", "1,4")
        found = {}
        for model in VARIANTS:
            folder = inputs.mid_model() if model == "mid" else _flux()
            words = [model, str(folder), str(size.times(1, 3, 5)), batches, str(out)]
            progress(f"{model}: loading, compiling")
            run([PYTHON, "-m", "bench.options", *words], environ)
            found[model] = json.loads(out.read_text())
        return found


def _flux() -> Path:
    from ddinfer import tiny

    return tiny.path("shapes-flux")


def in_process(kind: str, model: str, repetitions: int, batch_sizes: list[int]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {"variants": {}, "cannot": {}}
    pipes: dict[str, Any] = {}
    for name in VARIANTS[kind]:
        try:
            pipes[name], seconds = _ready(model, name)
        except (RuntimeError, ValueError, NotImplementedError, ImportError) as error:
            found["cannot"][name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            continue
        found["variants"][name] = {"first_call_seconds": round(seconds, 2), "batches": {}}
    for batch_size in batch_sizes:
        _warm(pipes, batch_size, found)
        ways = {name: _timed(pipe, batch_size) for name, pipe in pipes.items()}
        taken = in_turn(ways, repetitions, f"batch {batch_size}: ")
        images = {name: runs[0][1] for name, runs in taken.items()}
        for name, runs in taken.items():
            per_image = [s / batch_size for s, _ in runs]
            plain = [s / batch_size for s, _ in taken["plain"]]
            found["variants"][name]["batches"][str(batch_size)] = {
                "seconds_per_image": summary(per_image),
                "ratio": ratios(per_image, plain),
                **_apart(images[name], images["plain"]),
            }
    return found


def _ready(model: str, variant: str) -> tuple[Any, float]:
    """The pipeline so changed, and seconds of its first call (which compiles)."""
    import torch

    from ddinfer.config import JobConfig
    from ddinfer.engines.options import apply_to_denoiser, apply_to_pipeline
    from ddinfer.models.loading import denoisers, load_pipeline

    name, _, backend = variant.partition(" ")
    pipe = load_pipeline(model, dtype="bfloat16" if name == "bfloat16" else "float32", device="cpu")
    if name == "channels_last":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    elif name == "fuse_qkv_projections":
        pipe.unet.fuse_qkv_projections()
    # diffusers keeps the last backend that was set for all models of the process that have none.
    backend = backend or ("" if hasattr(pipe, "unet") else "native")
    config = JobConfig(compile=name == "compile", attention_backend=backend or None)
    apply_to_pipeline(pipe, config)
    for name, denoiser in denoisers(pipe).items():
        apply_to_denoiser(name, denoiser, config)
    started = time.perf_counter()
    _draw(pipe, 1)
    return pipe, time.perf_counter() - started


def _warm(pipes: Mapping[str, Any], batch_size: int, found: dict[str, Any]) -> None:
    """A compiled model compiles once more for another batch size."""
    for name, pipe in pipes.items():
        started = time.perf_counter()
        _draw(pipe, batch_size)
        told = found["variants"][name]
        told[f"first_batch_{batch_size}_seconds"] = round(time.perf_counter() - started, 2)


def _timed(pipe: Any, batch_size: int) -> Callable[[], tuple[float, Any]]:
    def draw() -> tuple[float, Any]:
        started = time.perf_counter()
        images = _draw(pipe, batch_size)
        return time.perf_counter() - started, images

    return draw


def _draw(pipe: Any, batch_size: int) -> Any:
    import numpy as np
    import torch

    from ddinfer import tiny

    prompts = inputs.parti_prompts()[:batch_size]
    generators = [torch.Generator("cpu").manual_seed(k) for k in range(batch_size)]
    call: dict[str, Any] = (
        inputs.MID_CALL if hasattr(pipe, "unet") else tiny.call_defaults("shapes-flux")
    )
    if "negative_prompt" in call:
        call["negative_prompt"] = [""] * batch_size
    images = pipe(prompts, generator=generators, **call).images
    return np.stack([np.asarray(image, np.float64) for image in images])


def _apart(images: Any, plain: Any) -> dict[str, float]:
    import numpy as np

    difference = np.abs(images - plain)
    error = float((difference**2).mean())
    told = {
        "largest_difference": int(difference.max()),
        "different_values": float(f"{(difference > 0).mean():.3g}"),
    }
    return told | ({"psnr_db": round(10 * float(np.log10(255**2 / error)), 1)} if error else {})


def tables(figures: Mapping[str, Any]) -> str:
    rows, cannot = [], []
    for model, of_model in figures.items():
        cannot += [f"\n{model}, {n}: not here ({why})." for n, why in of_model["cannot"].items()]
        for name, told in of_model["variants"].items():
            for batch_size, batch in told["batches"].items():
                rows.append(
                    [f"{model}, {name}, batch {batch_size}", spread(batch["seconds_per_image"]),
                     spread(batch["ratio"]), _pixels(batch),
                     f"{told['first_call_seconds']:.1f} s"]
                )  # fmt: skip
    return "\n".join([table(["", "s an image", "of plain", "images", "first call"], rows), *cannot])


def _pixels(batch: Mapping[str, Any]) -> str:
    if batch["largest_difference"] == 0:
        return "the same"
    return (
        f"≤ {batch['largest_difference']} of 255 on "
        f"{100 * batch['different_values']:.2g} % of values, {batch['psnr_db']:.0f} dB"
    )


if __name__ == "__main__":
    import sys

    kind, folder, repetitions, batches, target = sys.argv[1:]
    made = in_process(kind, folder, int(repetitions), [int(n) for n in batches.split(",")])
    Path(target).write_text(json.dumps(made))
