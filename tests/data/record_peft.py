"""Records what peft computes for the LoRAs of tests/loras.py: peft_loras.json.

    python -m tests.data.record_peft [FILE]     (in an environment that has peft and accelerate)

Each case is an image of a tiny pipeline, loaded by diffusers itself, as SHA-256 of its float32
values and sixteen of them. The picture without a LoRA stands beside: where another processor
rounds that one differently, the others cannot be compared bit for bit either.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.loras import LORAS, make_lora
from tests.tiny_pipelines import call_arguments, tiny_pipeline

TARGET = Path(__file__).with_name("peft_loras.json")

#: What is set, by name: LoRA (with its seed) → weight.
SETS: dict[str, dict[str, dict[tuple[str, int], float]]] = {
    name: {
        "none": {},
        "one": {(name, 0): 1.0},
        "weighted": {(name, 0): 0.7},
        "two": {(name, 0): 0.7, (name, 1): -0.4},
    }
    for name in LORAS
}


def picture(pipe: Any, kind: str) -> np.ndarray:
    """One image (or the frames of a video) as float32 values."""
    pipe.set_progress_bar_config(disable=True)
    call = {**call_arguments(kind), "num_inference_steps": 2}
    generator = torch.Generator("cpu").manual_seed(0)
    with torch.no_grad():
        output = pipe("a red cat", generator=generator, output_type="np", **call)
    made = output.frames if hasattr(output, "frames") else output.images
    return np.ascontiguousarray(made[0], dtype=np.float32)


def figures(values: np.ndarray) -> dict[str, Any]:
    flat = values.reshape(-1)
    some = flat[:: max(len(flat) // 16, 1)][:16]
    return {
        "sha256": hashlib.sha256(values.tobytes()).hexdigest(),
        "values": [round(float(v), 7) for v in some],
    }


def adapter_name(lora: tuple[str, int]) -> str:
    return f"{lora[0].replace('-', '_')}_{lora[1]}"


def record() -> dict[str, Any]:
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    packages = ("torch", "diffusers", "transformers", "peft")
    found: dict[str, Any] = {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, _) in LORAS.items():
            model = tiny_pipeline(kind, folder)
            for what, loras in SETS[name].items():
                pipe: Any = DiffusionPipeline.from_pretrained(model)
                files = {lora: make_lora(lora[0], pipe, folder, seed=lora[1]) for lora in loras}
                for lora, file in files.items():
                    pipe.load_lora_weights(str(file), adapter_name=adapter_name(lora))
                if loras:
                    pipe.set_adapters([adapter_name(x) for x in loras], list(loras.values()))
                found["cases"][f"{name} {what}"] = figures(picture(pipe, kind))
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else TARGET
    target.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
