"""The ways to cut a model into stages: by its traced graph, or by its lists of blocks."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ddinfer.errors import UsageError
from ddinfer.parallel.blocks import find_blocks, module_bytes, ring_blocks
from ddinfer.parallel.cut import balance
from ddinfer.parallel.flow import Plan, PlanError, StagedModel, call_key
from ddinfer.parallel.link import Link
from ddinfer.parallel.rows import Inputs, Outputs
from ddinfer.parallel.trace import TracedCut, TraceFailed, faked, give_weights, quiet, trace
from ddinfer.parallel.weights import Weights
from ddinfer.parallel.wire import Layout

#: Ways to tell batches from tensors that have as many rows by chance.
MAX_TRIES = 24

log = logging.getLogger(__name__)


class Cut(Protocol):
    """One rank's stage of a model, and what it must know of the others'.

    Microbatches come in *kinds*, numbered from 0: those of one kind flow alike.
    """

    how: str
    cuts: tuple[str, ...]
    module: nn.Module
    outputs: Outputs

    def inputs_of(self, leaves: Sequence[Any]) -> dict[Any, Any]:
        """A microbatch's leaves as named values."""
        ...

    def plan(self, chunks: Sequence[Sequence[Any]]) -> None:
        """On the first rank: settles the kinds of these microbatches."""
        ...

    def exchange_plans(self, link: Link) -> None:
        """Tells every rank what the first has settled."""
        ...

    def kinds(self, num_chunks: int) -> list[int]:
        """Kind of each microbatch, after `exchange_plans`."""
        ...

    def edge(self, kind: int, stage: int) -> Layout:
        """What travels from ``stage`` to the next."""
        ...

    def run(self, kind: int, values: dict[Any, Any]) -> dict[Any, Any]:
        """This stage on one microbatch: what it was given and what it made."""
        ...

    def output_leaves(self, values: dict[Any, Any]) -> dict[int, torch.Tensor]:
        """On the last rank: the tensors of the model's output by leaf number."""
        ...


def settle_inputs(
    model: nn.Module, inputs: Inputs, device: torch.device
) -> tuple[Inputs, Outputs | TraceFailed]:
    """Which tensors fall into rows, and how the output does, found without computing anything.

    A tensor may have as many rows as the batch by chance (position ids of as many tokens). Where
    the model does not run with all of them cut, it is tried with one or two left whole.

    Returns:
        the inputs, and the outputs or why the model cannot be followed.

    Raises:
        UsageError: the output does not fall into rows.
    """
    doubtful = sorted(inputs.batched - {min(inputs.batched)})
    tries = [frozenset[int]()]
    tries += [frozenset(left) for n in (1, 2) for left in itertools.combinations(doubtful, n)]
    first: TraceFailed | None = None
    for whole in tries[:MAX_TRIES]:
        attempt = replace(inputs, batched=inputs.batched - whole)
        try:
            return attempt, _probe(model, attempt, device)
        except TraceFailed as failed:
            first = first or failed
            if "DataDependent" in str(failed):  # no choice of rows helps
                break
    assert first is not None  # the first try failed
    return inputs, first


def cut_model(
    model: nn.Module,
    inputs: Inputs,
    outputs: Outputs | TraceFailed,
    example: Sequence[Any],
    split_points: list[str] | None,
    checkpoint: str | os.PathLike[str] | None,
    link: Link,
) -> Cut:
    """Cuts ``model`` and keeps this rank's part: by tracing, else by its lists of blocks.

    Args:
        inputs, outputs: from `settle_inputs`.
        example: the example arguments' leaves, real.

    Raises:
        UsageError: it cannot be cut into as many stages as there are ranks.
    """
    weights = Weights(model, checkpoint)
    if link.size == 1:
        return _Whole(model, inputs, outputs, example, weights, link)
    try:
        if isinstance(outputs, TraceFailed):
            raise outputs
        return _Traced(model, inputs, outputs, split_points, weights, link)
    except TraceFailed as reason:
        log.info("%s cannot be traced: %s", type(model).__name__, reason)
        try:
            return _Blocks(model, inputs, example, split_points, weights, link)
        except PlanError as other:
            raise UsageError(
                f"{type(model).__name__} cannot be cut. Tracing: {reason}. By its blocks: {other}"
            ) from other


class _Whole:
    """A world of one: the model itself, in microbatches."""

    how: str = "whole"
    cuts: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        outputs: Outputs | TraceFailed,
        example: Sequence[Any],
        weights: Weights,
        link: Link,
    ):
        self.module, self._inputs = model, inputs
        tensors = weights.read(_tensor_names(model), link.device)
        weights.keep_only(tensors)
        if isinstance(outputs, Outputs):
            self.outputs = outputs
        else:  # data decides its flow, so it is run for real
            made = []
            for rows in (inputs.rows, inputs.rows + 1):
                args, kwargs = _rebuild(inputs, _with_rows(inputs, example, rows, link.device))
                with torch.no_grad():
                    made.append(model(*args, **kwargs))
            self.outputs = Outputs.of(made[0], made[1], inputs.rows, type(model).__name__)

    def inputs_of(self, leaves: Sequence[Any]) -> dict[Any, Any]:
        return dict(enumerate(leaves))

    def plan(self, chunks: Sequence[Sequence[Any]]) -> None: ...

    def exchange_plans(self, link: Link) -> None: ...

    def kinds(self, num_chunks: int) -> list[int]:
        return [0] * num_chunks

    def edge(self, kind: int, stage: int) -> Layout:
        raise AssertionError("one stage has no edges")

    def run(self, kind: int, values: dict[Any, Any]) -> dict[Any, Any]:
        args, kwargs = _rebuild(self._inputs, list(values.values()))
        return dict(enumerate(pytree.tree_leaves(self.module(*args, **kwargs))))

    def output_leaves(self, values: dict[Any, Any]) -> dict[int, torch.Tensor]:
        return {k: values[k] for k in self.outputs.dims}


class _Traced:
    """One stage of the model's graph."""

    how = "trace"

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        outputs: Outputs,
        split_points: list[str] | None,
        weights: Weights,
        link: Link,
    ):
        self.outputs, mode = outputs, _fake_mode()
        with faked(model, mode, link.device):
            args, kwargs = _fake_sample(inputs, inputs.rows, mode, link.device)
            cut = trace(model, mode, args, kwargs, link.size, split_points)
        if len(cut.outputs) != len(self.outputs.leaves):
            raise TraceFailed(f"{len(self.outputs.leaves)} outputs became {len(cut.outputs)}")
        self._cut: TracedCut = cut
        self.cuts = cut.cuts
        self._stage = cut.stages[link.group_rank]
        self.module = self._stage.module
        tensors = weights.read(_tensor_names(self.module), link.device)
        give_weights(self.module, tensors, link.device)
        weights.keep_only({k: v for k, v in tensors.items() if k in _tensor_names(model)})
        self._constants = {
            name: leaf
            for name, leaf in zip(cut.inputs, inputs.leaves, strict=True)
            if not isinstance(leaf, torch.Tensor)
        }
        # The other stages' fake weights are no longer needed.
        self._cut = TracedCut((), cut.edges, cut.inputs, cut.outputs, cut.cuts)

    def inputs_of(self, leaves: Sequence[Any]) -> dict[Any, Any]:
        return dict(zip(self._cut.inputs, leaves, strict=True))

    def plan(self, chunks: Sequence[Sequence[Any]]) -> None: ...

    def exchange_plans(self, link: Link) -> None: ...

    def kinds(self, num_chunks: int) -> list[int]:
        return [0] * num_chunks

    def edge(self, kind: int, stage: int) -> Layout:
        return self._cut.edges[stage]

    def run(self, kind: int, values: dict[Any, Any]) -> dict[Any, Any]:
        known = self._constants | values
        return known | self._stage(known)

    def output_leaves(self, values: dict[Any, Any]) -> dict[int, torch.Tensor]:
        found = {}
        for k in self.outputs.dims:
            name = self._cut.outputs[k]
            assert name is not None  # a tensor that the graph makes
            found[k] = values[name]
        return found


class _Blocks:
    """One stage's blocks, real; the rest of the model outside its blocks is on every rank."""

    how = "blocks"

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        example: Sequence[Any],
        split_points: list[str] | None,
        weights: Weights,
        link: Link,
    ):
        self._inputs, self.module, self._link = inputs, model, link
        blocks = ring_blocks(model) or find_blocks(model)
        stages = block_stages(model, blocks, link.size, split_points)
        self.cuts = tuple(blocks[stage.start] for stage in stages[1:])
        foreign = {b for k, b in enumerate(blocks) if k not in stages[link.group_rank]}
        names = [n for n in _tensor_names(model) if not _inside(n, foreign)]
        weights.keep_only(weights.read(names, link.device))
        self._staged = StagedModel(model, blocks, stages, link.group_rank, link.device)
        self._plans: list[Plan] = []
        self._numbers: dict[str, int] = {}
        self._inspected: frozenset[int] = frozenset()
        self._kinds: list[int] = []
        self._fresh: list[Plan] = []
        made = []
        for rows in (inputs.rows, inputs.rows + 1):
            try:
                plan = self._learn(_with_rows(inputs, example, rows, link.device))
            except (PlanError, UsageError):
                raise
            except Exception as error:
                raise PlanError(
                    f"it fails for {rows} rows of the example ({type(error).__name__}: {error}). "
                    "Tensors whose first dim equals the first tensor's are taken for batches; use "
                    "an example batch that no other dim equals"
                ) from error
            made.append(plan.output.fill(plan.output.empty))
        self.outputs = Outputs.of(made[0], made[1], inputs.rows, type(model).__name__)
        self._fresh = []  # every rank has found these by itself

    def _learn(self, leaves: Sequence[Any]) -> Plan:
        args, kwargs = _rebuild(self._inputs, leaves)
        key = call_key(args, kwargs, self._inspected)
        if key not in self._numbers:
            plan, inspected = self._staged.plan(args, kwargs)
            self._inspected |= inspected
            self._numbers[call_key(args, kwargs, self._inspected)] = len(self._plans)
            self._plans.append(plan)
            self._fresh.append(plan)
            return plan
        return self._plans[self._numbers[key]]

    def inputs_of(self, leaves: Sequence[Any]) -> dict[Any, Any]:
        return {("input", k): t for k, t in enumerate(leaves) if isinstance(t, torch.Tensor)}

    def plan(self, chunks: Sequence[Sequence[Any]]) -> None:
        self._kinds = []
        if self._link.is_first:
            plans = [self._learn(chunk) for chunk in chunks]
            self._kinds = [next(k for k, p in enumerate(self._plans) if p is q) for q in plans]

    def exchange_plans(self, link: Link) -> None:
        fresh, self._fresh = self._fresh, []
        told = link.broadcast_object((self._kinds, fresh))
        if not link.is_first:
            self._kinds = told[0]
            self._plans.extend(told[1])

    def kinds(self, num_chunks: int) -> list[int]:
        return self._kinds

    def edge(self, kind: int, stage: int) -> Layout:
        return self._plans[kind].edges[stage]

    def run(self, kind: int, values: dict[Any, Any]) -> dict[Any, Any]:
        return self._staged.run(self._plans[kind], kind, values)

    def output_leaves(self, values: dict[Any, Any]) -> dict[int, torch.Tensor]:
        return {k: values[("output", k)] for k in self.outputs.dims}


def block_stages(
    model: nn.Module,
    blocks: Sequence[str],
    num_stages: int,
    split_points: list[str] | None = None,
    *,
    first: float = 0,
) -> list[range]:
    """Which blocks each stage has: balanced by bytes, or as the split points say.

    Args:
        first: bytes' worth of what the first stage does besides its blocks.

    Raises:
        PlanError: too few blocks, or a split point that is none of them.
    """
    if len(blocks) < num_stages:
        raise PlanError(
            f"{type(model).__name__} has {len(blocks)} blocks, too few for {num_stages} ranks"
        )
    if split_points is None:
        sizes = [module_bytes(model.get_submodule(block)) for block in blocks]
        return balance(sizes, num_stages, first=first)
    unknown = [p for p in split_points if p not in blocks[1:]]
    if unknown:
        raise PlanError(
            f"split point {unknown[0]!r} is not one of its blocks after the first: "
            f"{', '.join(blocks[1:4])}, …"
        )
    starts = [0, *sorted(blocks.index(p) for p in split_points), len(blocks)]
    return [range(a, b) for a, b in itertools.pairwise(starts)]


def _tensor_names(module: nn.Module) -> list[str]:
    return [
        *(name for name, _ in module.named_parameters(remove_duplicate=False)),
        *(name for name, _ in module.named_buffers(remove_duplicate=False)),
    ]


def _inside(name: str, blocks: set[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _fake_sample(
    inputs: Inputs, rows: int, mode: Any, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    with mode:
        return inputs.sample(rows, lambda shape, dtype: torch.zeros(shape, dtype=dtype).to(device))


def _probe(model: nn.Module, inputs: Inputs, device: torch.device) -> Outputs:
    mode = _fake_mode()
    with faked(model, mode, device):
        return _run_fake(model, inputs, mode, device)


def _run_fake(model: nn.Module, inputs: Inputs, mode: Any, device: torch.device) -> Outputs:
    """The output's structure and batch dims, found without computing anything."""
    made = []
    for rows in (inputs.rows, inputs.rows + 1):
        args, kwargs = _fake_sample(inputs, rows, mode, device)
        try:
            with quiet(), mode, torch.no_grad():
                made.append(model(*args, **kwargs))
        except Exception as error:
            raise TraceFailed(f"{type(error).__name__}: {str(error).splitlines()[:1]}") from error
    return Outputs.of(made[0], made[1], inputs.rows, type(model).__name__)


def _with_rows(
    inputs: Inputs, example: Sequence[Any], rows: int, device: torch.device
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


def _rebuild(inputs: Inputs, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return pytree.tree_unflatten(list(leaves), inputs.spec)
