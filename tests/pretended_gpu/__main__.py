"""``python -m tests.pretended_gpu LIBRARY FOLDER KIND…``: pipelines on pretended GPUs.

Draws with each kind of tiny pipeline as ddinfer loads it to the CPU, to one GPU, and spread over
two, host memory and disk. Prints a line of JSON a case: how far its picture is from the CPU's, or
the error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddinfer.distributed.process import exit_now
from ddinfer.models.loading import load_pipeline
from ddinfer.models.placement import Placement
from ddinfer.models.planner import plan_placement
from tests.pretended_gpu import FIRST, SECOND, register
from tests.tiny_pipelines import FROM_TEXT, call_arguments, tiny_pipeline


def draw(pipe: Any, kind: str) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(3)
    made = pipe("a red cat", generator=generator, output_type="np", **call_arguments(kind))
    return np.asarray(made.frames[0] if hasattr(made, "frames") else made.images[0])


def ways(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Way → arguments of `load_pipeline`."""
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))

    def planned(**shares: float) -> dict[str, Any]:
        devices = {"first": FIRST, "second": SECOND, "cpu": "cpu"}
        budgets = {devices[name]: int(share * size) for name, share in shares.items()}
        return {"placement": plan_placement(folder, budgets)}

    return {
        "one GPU, not the current one": lambda: {"device": SECOND},
        "two GPUs": lambda: planned(first=0.75, second=0.75, cpu=0),
        "two GPUs, host and disk": lambda: planned(first=0.5, second=0.3, cpu=0.2),
        "all on disk": lambda: {"placement": Placement({"": "disk"}, main=FIRST)},
    }


def cases(kind: str, folder: Path) -> Iterator[dict[str, Any]]:
    expected = draw(load_pipeline(folder), kind)
    for way, arguments in ways(folder).items():
        case: dict[str, Any] = {"kind": kind, "way": way, "error": None, "apart": None}
        try:
            pipe = load_pipeline(folder, **arguments())
            case["apart"] = float(np.abs(draw(pipe, kind) - expected).max())
        except RuntimeError as error:
            case["error"] = str(error)
        yield case


def bucket_case(folder: Path) -> dict[str, Any]:
    """Weights on the host travel in one piece per block, the same one each time."""
    pipe = load_pipeline(folder, placement=Placement({"": "cpu"}, main=FIRST))
    groups = pipe.ddinfer_dispatched.groups
    draw(pipe, "flux")
    before = {group.name: group.bucket for group in groups}
    draw(pipe, "flux")
    blocks = [group for group in groups if "transformer_blocks" in group.name]
    return {
        "way": "bucket",
        "num_blocks": len(blocks),
        "is_same": all(group.bucket is before[group.name] for group in blocks),
        "is_all": all(
            source.tensor.untyped_storage().data_ptr() == group.bucket.untyped_storage().data_ptr()
            for group in blocks
            for source in group.sources.values()
        ),
    }


def refused() -> list[str]:
    """Which of these operations are refused, as they should be."""
    here, there, host = (torch.ones(2, 2, device=d) for d in (FIRST, SECOND, "cpu"))
    operations = {
        "add": lambda: here + there,
        "matmul": lambda: here @ host,
        "cat": lambda: torch.cat([here, host]),
        "embedding": lambda: torch.nn.functional.embedding(torch.tensor([0]), here),
        "conv": lambda: torch.nn.functional.conv1d(here, there[None]),
    }
    found = []
    for name, operation in operations.items():
        try:
            operation()
        except RuntimeError:
            found.append(name)
    return found


if __name__ == "__main__":
    register(sys.argv[1])
    torch.set_num_threads(1)
    print(json.dumps({"refused": refused()}))
    for kind in sys.argv[3:] or FROM_TEXT:
        for case in cases(kind, tiny_pipeline(kind, sys.argv[2])):
            print(json.dumps(case), flush=True)
    if "flux" in sys.argv[3:]:
        print(json.dumps(bucket_case(tiny_pipeline("flux", sys.argv[2]))), flush=True)
    exit_now(0)
