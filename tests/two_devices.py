"""Denoisers and VAEs over two pretended GPUs, shapes and devices only: run by test_dispatch.py.

Fake tensors on a registered stand-in backend check, as CUDA would, that every operation's tensors
lie on one device. Prints a line of JSON a case: what was run and the error, if any. Every case runs
twice, the second time with following switched off.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration

from ddinfer.models import offload
from ddinfer.models.meta_model import set_tensor
from ddinfer.models.offload import dispatch_model
from ddinfer.models.placement import Placement
from ddinfer.models.planner import plan
from ddinfer.models.tree import Node, tree_of_model
from tests.tiny_pipelines import KINDS

FIRST, SECOND = "privateuseone:0", "privateuseone:1"


def inputs(kind: str) -> dict[str, Any]:
    """What the denoiser of a kind is called with, on the first device."""

    def t(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=FIRST)

    step = torch.ones(1, device=FIRST, dtype=torch.long)
    text, image = t(1, 4, 16 if kind == "sana" else 32), t(1, 4, 16, 16)
    common: dict[str, Any] = {"encoder_hidden_states": text, "timestep": step, "return_dict": False}
    return common | {
        "flux": {
            "hidden_states": t(1, 16, 16), "pooled_projections": t(1, 32), "timestep": t(1),
            "img_ids": t(16, 3), "txt_ids": t(4, 3),
        },
        "sd3": {"hidden_states": image, "pooled_projections": t(1, 64), "timestep": t(1)},
        "pixart": {
            "hidden_states": image,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        "wan": {"hidden_states": t(1, 16, 2, 4, 4)},
        "sd": {"sample": image},
        "sana": {"hidden_states": image},
    }[kind]  # fmt: skip


def placements(root: Node) -> Iterator[tuple[str, Placement]]:
    """As planned for two equal devices, and the units turn by turn, which crosses all the time."""
    share = int(root.num_bytes() * 0.8)
    yield "planned", plan(root, {FIRST: share, SECOND: share}, "balanced", 0)
    units = [unit.name for unit in root.units()]
    turns = dict(zip(units, itertools.cycle([FIRST, SECOND]), strict=False))
    yield "in turn", Placement(turns, main=FIRST)


def run(kind: str, part: str, following: bool) -> Iterator[dict[str, Any]]:
    pipe = KINDS[kind]()
    model = pipe.vae if part == "vae" else getattr(pipe, "transformer", None) or pipe.unet
    model.eval()
    for name, placement in placements(tree_of_model(model)):
        error = None
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            for path, real in [*model.named_parameters(), *model.named_buffers()]:
                place = placement.device_of(path)
                set_tensor(model, path, torch.empty(real.shape, dtype=real.dtype, device=place))
            handle = dispatch_model(model, placement)
            if not following:
                offload.OneDevice.__torch_function__ = _nothing  # type: ignore[method-assign,assignment]
            try:
                if part == "vae":
                    latents = torch.randn(1, 4, 8, 8, device=FIRST)
                    out = model.decode(latents, return_dict=False)[0]
                else:
                    out = model(**inputs(kind))[0]
                assert str(out.device) == FIRST, out.device
            except RuntimeError as problem:
                error = f"{type(problem).__name__}: {problem}"[:300]
            handle.undo()
        yield {"kind": kind, "part": part, "placement": name, "error": error}


def _nothing(
    self: Any,
    func: Any,
    types: Any,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    return func(*args, **(kwargs or {}))


if __name__ == "__main__":
    backend_registration._setup_privateuseone_for_python_backend()
    for following in (True, False):
        for kind in ("flux", "sd3", "pixart", "wan", "sd", "sana"):
            for part in ("denoiser", "vae") if kind == "sd" else ("denoiser",):
                for case in run(kind, part, following):
                    print(json.dumps(case | {"following": following}), flush=True)
