"""Measures how long a denoiser's blocks take, to balance stages by time (``--balance time``)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from ddinfer.engines.pipeline_call import CallFailure, call_pipeline
from ddinfer.parallel.blocks import denoiser_blocks
from ddinfer.parallel.flow import StagedModel
from ddinfer.patched import patched
from ddinfer.request import Request

log = logging.getLogger(__name__)


class _Measured(BaseException):
    """Ends the pipeline call. No `Exception`, so that no pipeline catches it."""


def measure_blocks(
    pipe: Any,
    denoisers: Mapping[str, torch.nn.Module],
    request: Request,
    arguments: Mapping[str, Any],
    device: torch.device,
) -> dict[str, list[float]]:
    """Seconds of each block, by denoiser and in run order, for the calls that a Request makes.

    The pipeline is called until each of its denoisers has run once, with blocks that return zeros.
    A block is measured with weights of zeros that exist only meanwhile, so that no rank has to hold
    all blocks. What the Request never reaches is left out.

    Args:
        denoisers: those of ``pipe``, by component name.
        arguments: further arguments of the pipeline's ``__call__``.
    """
    found: dict[str, list[float]] = {}

    def measuring(name: str, staged: StagedModel) -> Callable[..., Any]:
        @functools.wraps(staged.model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            order, output = staged.run_order(args, kwargs, is_timed=name not in found)
            if name not in found:
                seconds = dict(order)
                found[name] = [seconds.get(k, 0.0) for k in range(len(staged.blocks))]
            if len(found) == len(denoisers):
                raise _Measured
            return output

        return forward

    with ExitStack() as stack:
        for name, model in denoisers.items():
            blocks = denoiser_blocks(model)
            staged = StagedModel(model, blocks, [range(len(blocks))], 0, device)
            stack.callback(staged.detach)
            stack.enter_context(patched(model, "forward", measuring(name, staged)))
        try:
            made = call_pipeline(pipe, [request], arguments)
        except _Measured:
            return found
    if isinstance(made, CallFailure):
        log.warning(
            "--balance time: prompt %d failed before all blocks were measured (%s); the others are "
            "balanced by bytes",
            request.index, made.record.message,
        )  # fmt: skip
    return found
