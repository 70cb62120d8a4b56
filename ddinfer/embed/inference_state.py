"""Temporarily put a caller's pipeline into inference mode, then restore it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def inference_state(pipe: Any, device: torch.device) -> Iterator[None]:
    """Put ``pipe`` into inference mode; restore it on exit.

    Inside: eval mode, copies of its schedulers, no progress bar, and a model wrapped in
    ``DistributedDataParallel`` is replaced by the model itself, since the wrapper has no
    ``config`` and its forward would communicate with the other ranks. The states of torch's
    global random generators (of the CPU and of ``device``) are restored as well.
    """
    attributes = vars(pipe)
    modules = {n: value for n, value in attributes.items() if isinstance(value, torch.nn.Module)}
    schedulers = {n: value for n, value in attributes.items() if hasattr(value, "set_timesteps")}
    training = [m for module in modules.values() for m in module.modules() if m.training]
    before: dict[str, Any] = {**modules, **schedulers}
    if "_progress_bar_config" in attributes:
        before["_progress_bar_config"] = attributes["_progress_bar_config"]
    # Not by setattr: a pipeline's own __setattr__ would write every change into its config.
    attributes.update({name: without_ddp(module) for name, module in modules.items()})
    attributes.update({name: copy.deepcopy(scheduler) for name, scheduler in schedulers.items()})
    attributes["_progress_bar_config"] = {"disable": True}
    for module in modules.values():
        module.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for m in training:
            m.training = True
        del attributes["_progress_bar_config"]
        attributes.update(before)


def without_ddp(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside ``DistributedDataParallel``, also where the wrapper was compiled."""
    inner = getattr(module, "_orig_mod", module)  # what torch.compile(module) wraps
    if isinstance(inner, torch.nn.parallel.DistributedDataParallel):
        return without_ddp(inner.module)
    return module
