"""Two small pipelines that really draw what a prompt says, so that nobody needs a download.

`shapes-sd` is a `StableDiffusionPipeline`, `shapes-flux` a `FluxPipeline`; both draw one coloured
shape, or two in a relation, on a plain background, 64×64 pixels. How they were made, and how
well they draw, is in docs/tiny-model.md. Importing this package imports neither torch nor
diffusers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .world import unknown_words

__all__ = ["DEFAULT", "DEMO_PROMPTS", "PIPELINES", "call_defaults", "path", "unknown_words"]

PIPELINES = ("shapes-sd", "shapes-flux")
DEFAULT = "shapes-sd"
"""The one that draws better."""

DEMO_PROMPTS = (
    "a red circle",
    "a small blue heart on a yellow background",
    "a large green triangle",
    "a large purple star on a pink background",
    "a white ring on a black background",
    "an orange diamond on a blue background",
    "a black cross on a white background",
    "a yellow square on a gray background",
    "a green triangle above a purple square",
    "a red heart to the left of a blue circle",
    "an orange triangle below a white ring on a black background",
    "a pink diamond to the right of a black cross on a yellow background",
)
"""A dozen prompts that show the range."""

_CALL_DEFAULTS: dict[str, dict[str, Any]] = {
    "shapes-sd": {
        "num_inference_steps": 12,
        "guidance_scale": 2.0,
        "height": 64,
        "width": 64,
    },
    "shapes-flux": {
        "num_inference_steps": 12,
        "true_cfg_scale": 2.0,
        "negative_prompt": "",
        "height": 64,
        "width": 64,
        "max_sequence_length": 20,
    },
}


def path(name: str = DEFAULT) -> Path:
    """The folder of an embedded pipeline, for `DiffusionPipeline.from_pretrained`."""
    return Path(__file__).parent / "weights" / _known(name)


def call_defaults(name: str = DEFAULT) -> dict[str, Any]:
    """What a call must say for the pipeline to draw well; a fresh dict."""
    return dict(_CALL_DEFAULTS[_known(name)])


def _known(name: str) -> str:
    if name not in PIPELINES:
        raise ValueError(f"no embedded pipeline is called {name!r}; there are {list(PIPELINES)}")
    return name
