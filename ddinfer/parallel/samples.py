"""Runs of a model on samples of its arguments, by which it is settled what falls into rows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ddinfer.parallel.flow import PlanError
from ddinfer.parallel.mixing import (
    CannotRun,
    Mixing,
    Run,
    settle_rows,
    settle_unwatched,
    unused_sizes,
)
from ddinfer.parallel.rows import Inputs, Outputs
from ddinfer.parallel.trace import TraceFailed, faked, quiet


def settle_inputs(
    model: nn.Module, inputs: Inputs, device: torch.device
) -> tuple[Inputs, Outputs | TraceFailed]:
    """Which tensors fall into rows, and how the output does, found without computing anything.

    Returns:
        the inputs, and the outputs or why the model cannot be followed.

    Raises:
        UsageError: the output does not fall into rows, or one row depends on others.
    """
    name, mode = type(model).__name__, fake_mode()

    def run(attempt: Inputs, rows: int, others: Mapping[int, int], watching: Any = None) -> Any:
        return _run_fake(model, attempt, rows, others, watching, mode, device)

    with faked(model, mode, device):
        try:
            settled = settle_rows(inputs, name, run, unused_sizes(model, inputs))
            made = [run(settled, rows, {}) for rows in (inputs.rows, inputs.rows + 1)]
        except CannotRun as failed:
            return inputs, TraceFailed(str(failed))
    return settled, Outputs.of(made[0], made[1], inputs.rows, name)


def settle_for_real(model: nn.Module, inputs: Inputs, run: Run) -> tuple[Inputs, Outputs]:
    """The inputs and outputs of a model that cannot be followed without its arguments' contents.

    Raises:
        PlanError: it does not run with another number of rows than the example's.
    """
    name = type(model).__name__
    try:
        settled = settle_unwatched(inputs, name, run, unused_sizes(model, inputs))
        made = [run(settled, rows, {}, None) for rows in (inputs.rows, inputs.rows + 1)]
    except CannotRun as error:
        raise PlanError(str(error)) from error
    return settled, Outputs.of(made[0], made[1], inputs.rows, name)


def fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_sample(
    inputs: Inputs,
    rows: int,
    mode: Any,
    device: torch.device,
    others: Mapping[int, int] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def make(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype).to(device)

    with mode:
        return inputs.sample(rows, make, others)


def _run_fake(
    model: nn.Module,
    inputs: Inputs,
    rows: int,
    others: Mapping[int, int],
    watching: Any,
    mode: Any,
    device: torch.device,
) -> Any:
    """The output of a model with fake weights.

    Args:
        watching: a `Recorder` or `Mixing` that sees every operation.
    """
    args, kwargs = fake_sample(inputs, rows, mode, device, others)
    if isinstance(watching, Mixing):
        leaves = pytree.tree_leaves((args, kwargs))
        for k in inputs.batched:
            watching.mark(leaves[k])
        for k in others:
            watching.mark_table(leaves[k])
    try:
        with quiet(), mode, watching or contextlib.nullcontext(), torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        raise CannotRun(f"{type(error).__name__}: {str(error).splitlines()[:1]}") from error


def with_rows(
    inputs: Inputs,
    example: Sequence[Any],
    rows: int,
    device: torch.device,
    others: Mapping[int, int] | None = None,
) -> list[Any]:
    """The example's leaves with this many rows, taken from its own as often as needed."""
    found = []
    sizes = {**dict.fromkeys(inputs.batched, rows), **(others or {})}
    for k, leaf in enumerate(example):
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.to(device)
            if k in sizes:
                index = torch.arange(sizes[k], device=device) % inputs.example_rows
                leaf = leaf.index_select(0, index)
        found.append(leaf)
    return found


def rebuild(inputs: Inputs, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return pytree.tree_unflatten(list(leaves), inputs.spec)
