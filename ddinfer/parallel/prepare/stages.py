"""Which modules make up each stage of a model, in the order in which they run."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddinfer.errors import UsageError
from ddinfer.parallel.blocks import find_units, module_bytes, substituted
from ddinfer.parallel.cut import balance
from ddinfer.parallel.flow import StagedModel
from ddinfer.parallel.prepare.weights import Weights
from ddinfer.parallel.tensor_tree import storage_id, tensors_of


@dataclass(frozen=True)
class Stages:
    """A model's stages.

    Attributes:
        units: names of the modules that stages are made of, in the order in which they run. What
            is in none of them is on every rank.
        ranges: which of them each stage has.
    """

    units: list[str]
    ranges: list[range]

    @property
    def cuts(self) -> tuple[str, ...]:
        """The units that begin the stages after the first."""
        return tuple(self.units[stage.start] for stage in self.ranges[1:])

    def tensor_ids(self, model: nn.Module, stage: int) -> set[int]:
        """The `id` of each parameter and buffer that a stage's rank needs."""
        own = [self.units[k] for k in self.ranges[stage]]
        return ids_outside(model, [u for u in self.units if u not in own], own)


def plan_stages(
    model: nn.Module,
    weights: Weights,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    split_points: Sequence[str] | None,
    num_stages: int,
    balance_by: str,
    device: torch.device,
) -> Stages:
    """The stages of ``model``, found by running it without the weights of its units.

    Modules that run more than once in a call, or whose weights are used outside of them, are no
    units.

    Args:
        args, kwargs: an example.
        split_points: names of the modules that begin the stages after the first; ``None``
            balances the stages.
        balance_by: ``"bytes"`` of the weights, or measured ``"time"``.

    Raises:
        UsageError: the model cannot be cut so.
    """
    candidates = find_units(model, split_points or ())
    is_timed = balance_by == "time"
    order, lent = _record_order(model, candidates, weights, args, kwargs, is_timed, device)
    seconds, counts = dict(order), Counter(unit for unit, _ in order)
    units = [unit for unit, _ in order if counts[unit] == 1 and unit not in lent]
    if num_stages == 1:
        return Stages(units, [range(len(units))])
    if len(units) < num_stages:
        reasons = [f"{unit} runs {n} times" for unit, n in counts.items() if n > 1]
        reasons += [f"the weights of {unit} are used outside of it" for unit in lent]
        raise UsageError(
            f"{type(model).__name__} has {len(units)} modules that run once in a call, too few for "
            f"{num_stages} ranks{'; '.join(['', *reasons[:3]])}. Use at most {max(len(units), 1)} "
            "ranks, or name finer split_points"
        )
    if split_points is None:
        sizes = [
            seconds[unit] if is_timed else module_bytes(model.get_submodule(unit)) for unit in units
        ]
        return Stages(units, balance(sizes, num_stages))
    starts = sorted(_start(units, point) for point in split_points)
    return Stages(units, [range(a, b) for a, b in itertools.pairwise([0, *starts, len(units)])])


def _start(units: Sequence[str], point: str) -> int:
    """The number of the first unit at or inside of a split point."""
    start = next((k for k, unit in enumerate(units) if f"{unit}.".startswith(f"{point}.")), None)
    if start is None:
        raise UsageError(
            f"split point {point!r} cannot begin a stage: expected a module that runs exactly once "
            "with the example arguments and whose weights nothing else uses"
        )
    if start == 0:
        raise UsageError(
            f"nothing runs before split point {point!r}: the first stage would be empty"
        )
    return start


def _record_order(
    model: nn.Module,
    units: Sequence[str],
    weights: Weights,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_timed: bool,
    device: torch.device,
) -> tuple[list[tuple[str, float]], list[str]]:
    """The units and their seconds in run order, and those whose weights others use."""
    real = weights.read(ids_outside(model, units), device)

    def placeholder(tensor: torch.Tensor) -> torch.Tensor:
        empty = torch.zeros((), dtype=tensor.dtype, device=device).expand(tensor.shape)
        return real.get(id(tensor), empty)

    staged = StagedModel(model, units, [range(len(units))], 0, device)
    try:
        with substituted(model, placeholder):
            memory = {unit: _storages(model.get_submodule(unit)) for unit in units}
            with _UsedStorages() as used:
                order, _ = staged.run_order(args, kwargs, is_timed=is_timed)
    finally:
        staged.detach()
    return [(units[k], seconds) for k, seconds in order], [
        unit for unit in units if memory[unit] & used.found
    ]


class _UsedStorages(TorchDispatchMode):
    """Notes the memory of every operation's arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= {storage_id(tensor) for tensor in tensors_of((args, kwargs))}
        return func(*args, **(kwargs or {}))


def ids_outside(model: nn.Module, units: Sequence[str], own: Sequence[str] = ()) -> set[int]:
    """The `id` of each parameter and buffer that is not in ``units``, or is also in ``own``."""

    def modules(names: Sequence[str]) -> set[int]:
        return {id(module) for name in names for module in model.get_submodule(name).modules()}

    inside = modules(units) - modules(own)
    return {
        id(tensor)
        for module in model.modules()
        if id(module) not in inside
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }


def _storages(module: nn.Module) -> set[int]:
    return {storage_id(tensor) for tensor in (*module.parameters(), *module.buffers())}
