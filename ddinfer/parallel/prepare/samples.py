"""Runs of a model on samples of its arguments, by which it is settled what falls into rows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ddinfer.errors import UsageError
from ddinfer.parallel.blocks import faked
from ddinfer.parallel.flow import PlanError
from ddinfer.parallel.prepare.mixing import CannotRun, Run, settle_rows, unused_sizes
from ddinfer.parallel.prepare.row_flow import RowFlow
from ddinfer.parallel.prepare.rows import Inputs, Outputs
from ddinfer.parallel.prepare.trace import TraceFailed, quiet


def settle_inputs(
    model: nn.Module, inputs: Inputs, device: torch.device, *, is_given: bool = False
) -> tuple[Inputs, Outputs | TraceFailed]:
    """Which tensors fall into rows, and how the output does, found without computing anything.

    Args:
        is_given: the caller has said which tensors are cut (``batched=``), and answers for it.

    Returns:
        the inputs, and the outputs or (only if ``is_given``) why the model cannot be followed.

    Raises:
        UsageError: the output does not fall into rows, or one row may depend on others.
    """
    name, mode = type(model).__name__, fake_mode()

    def run(attempt: Inputs, rows: int, others: Mapping[int, int], watching: Any = None) -> Any:
        return _run_fake(model, attempt, rows, others, watching, mode, device)

    with faked(model, mode, device):
        try:
            if not is_given:
                inputs = settle_rows(inputs, name, run, unused_sizes(model, inputs))
            made = [run(inputs, rows, {}) for rows in (inputs.rows, inputs.rows + 1)]
        except CannotRun as failed:
            if is_given:
                return inputs, TraceFailed(str(failed))
            raise UsageError(
                f"{name} cannot be run on fake tensors ({failed}), so it cannot be shown that it "
                "keeps the rows of the batch apart. If it does, name the arguments that are cut "
                "along their first dim: batched=[...]"
            ) from failed
    return inputs, Outputs.of(made[0], made[1], inputs.rows, name)


def outputs_for_real(name: str, inputs: Inputs, run: Run) -> Outputs:
    """The outputs of a model that cannot be followed without its arguments' contents.

    Raises:
        PlanError: it does not run with another number of rows than the example's.
    """
    try:
        made = [run(inputs, rows, {}, None) for rows in (inputs.rows, inputs.rows + 1)]
    except CannotRun as error:
        raise PlanError(str(error)) from error
    return Outputs.of(made[0], made[1], inputs.rows, name)


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
        watching: a `Recorder` or `RowFlow` that sees every operation.
    """
    args, kwargs = fake_sample(inputs, rows, mode, device, others)
    if isinstance(watching, RowFlow):
        leaves = pytree.tree_leaves((args, kwargs))
        for k in inputs.batched:
            watching.mark(leaves[k])
    try:
        with quiet(), mode, watching or contextlib.nullcontext(), torch.no_grad():
            return model(*args, **kwargs)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise CannotRun(f"{type(error).__name__}: {first_line}") from error


def with_rows(
    inputs: Inputs,
    example: Sequence[Any],
    rows: int,
    device: torch.device,
) -> list[Any]:
    """The example's leaves with this many rows, taken from its own as often as needed."""
    found = []
    for k, leaf in enumerate(example):
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.to(device)
            if k in inputs.batched:
                index = torch.arange(rows, device=device) % inputs.example_rows
                leaf = leaf.index_select(0, index)
        found.append(leaf)
    return found


def rebuild(inputs: Inputs, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return pytree.tree_unflatten(list(leaves), inputs.spec)
