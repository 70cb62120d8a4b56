"""The ways to cut a model into stages: by its traced graph, or by its lists of blocks."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ddinfer.errors import UsageError
from ddinfer.parallel.blocks import denoiser_blocks, faked, find_blocks
from ddinfer.parallel.communicator import Communicator
from ddinfer.parallel.cut import block_stages
from ddinfer.parallel.flow import PlanError, StagedModel, call_key
from ddinfer.parallel.packing import Layout
from ddinfer.parallel.plans import PlanCache
from ddinfer.parallel.prepare.mixing import CannotRun
from ddinfer.parallel.prepare.rows import Inputs, Outputs
from ddinfer.parallel.prepare.samples import (
    fake_mode,
    fake_sample,
    outputs_for_real,
    rebuild,
    with_rows,
)
from ddinfer.parallel.prepare.trace import TracedCut, TraceFailed, give_weights, trace
from ddinfer.parallel.prepare.weights import Weights

log = logging.getLogger(__name__)


class Cut(Protocol):
    """One rank's stage of a model, and what it must know of the others'.

    Microbatches come in *kinds*, numbered from 0: those of one kind flow alike.
    """

    how: str
    cuts: tuple[str, ...]
    module: nn.Module
    inputs: Inputs
    outputs: Outputs

    def inputs_of(self, leaves: Sequence[Any]) -> dict[Any, Any]:
        """A microbatch's leaves as named values."""
        ...

    def plan(self, chunks: Sequence[Sequence[Any]]) -> None:
        """On the first rank: settles the kinds of these microbatches."""
        ...

    def exchange_plans(self, link: Communicator) -> None:
        """Tells every rank what the first has settled."""
        ...

    def confirm(self) -> None:
        """Every rank has what `exchange_plans` sent."""
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


def cut_model(
    model: nn.Module,
    inputs: Inputs,
    outputs: Outputs | TraceFailed,
    example: Sequence[Any],
    split_points: list[str] | None,
    checkpoint: str | os.PathLike[str] | None,
    link: Communicator,
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
        link: Communicator,
    ):
        self.module, self.inputs = model, inputs
        tensors = weights.read(_tensor_names(model), link.device)
        weights.keep_only(tensors)
        if isinstance(outputs, Outputs):
            self.outputs = outputs
            return

        def run(attempt: Inputs, rows: int, others: Mapping[int, int], watching: Any) -> Any:
            leaves = with_rows(attempt, example, rows, link.device)
            args, kwargs = rebuild(attempt, leaves)
            try:
                with torch.no_grad():
                    return model(*args, **kwargs)
            except Exception as error:
                raise CannotRun(f"{type(error).__name__}: {error}") from error

        # Data decides its flow, so it is run for real.
        self.outputs = outputs_for_real(type(model).__name__, inputs, run)

    def inputs_of(self, leaves: Sequence[Any]) -> dict[Any, Any]:
        return dict(enumerate(leaves))

    def plan(self, chunks: Sequence[Sequence[Any]]) -> None: ...

    def exchange_plans(self, link: Communicator) -> None: ...

    def confirm(self) -> None: ...

    def kinds(self, num_chunks: int) -> list[int]:
        return [0] * num_chunks

    def edge(self, kind: int, stage: int) -> Layout:
        raise AssertionError("one stage has no edges")

    def run(self, kind: int, values: dict[Any, Any]) -> dict[Any, Any]:
        args, kwargs = rebuild(self.inputs, list(values.values()))
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
        link: Communicator,
    ):
        self.inputs, self.outputs, mode = inputs, outputs, fake_mode()
        with faked(model, mode, link.device):
            args, kwargs = fake_sample(inputs, inputs.rows, mode, link.device)
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

    def exchange_plans(self, link: Communicator) -> None: ...

    def confirm(self) -> None: ...

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
        link: Communicator,
    ):
        self.inputs, self.module, self._link = inputs, model, link
        blocks = denoiser_blocks(model) or find_blocks(model)
        stages = block_stages(model, blocks, link.size, split_points)
        self.cuts = tuple(blocks[stage.start] for stage in stages[1:])
        foreign = {b for k, b in enumerate(blocks) if k not in stages[link.group_rank]}
        names = [n for n in _tensor_names(model) if not _inside(n, foreign)]
        weights.keep_only(weights.read(names, link.device))
        self._staged = StagedModel(model, blocks, stages, link.group_rank, link.device)
        self._plans = PlanCache()
        self._inspected: frozenset[int] = frozenset()
        self._kinds: list[int] = []

        def run(attempt: Inputs, rows: int, others: Mapping[int, int], watching: Any) -> Any:
            leaves = with_rows(attempt, example, rows, link.device)
            try:
                plan = self._plans[self._number(leaves)]
            except PlanError:
                raise
            except Exception as error:
                raise CannotRun(
                    f"it fails for {rows} rows of the example ({type(error).__name__}: {error}). "
                    "Tensors whose first dim equals the first tensor's are taken for batches; use "
                    "an example batch that no other dim equals"
                ) from error
            return plan.output.fill(plan.output.empty)

        self.outputs = outputs_for_real(type(model).__name__, inputs, run)
        # Calls follow the first rank's plans: examples may differ in what their contents decide.
        self._plans = PlanCache()

    def _number(self, leaves: Sequence[Any]) -> int:
        args, kwargs = rebuild(self.inputs, leaves)
        number = self._plans.find(call_key(args, kwargs, self._inspected))
        if number is not None:
            return number
        plan, inspected = self._staged.plan(args, kwargs)
        self._inspected |= inspected
        return self._plans.add(call_key(args, kwargs, self._inspected), plan, self._kinds)

    def inputs_of(self, leaves: Sequence[Any]) -> dict[Any, Any]:
        return {("input", k): t for k, t in enumerate(leaves) if isinstance(t, torch.Tensor)}

    def plan(self, chunks: Sequence[Sequence[Any]]) -> None:
        self._kinds = []
        if self._link.is_first:
            for chunk in chunks:
                self._kinds.append(self._number(chunk))

    def exchange_plans(self, link: Communicator) -> None:
        headers = {number: self._plans.metadata(number) for number in self._kinds}
        told = link.broadcast_object((self._kinds, headers))
        for number, header in told[1].items():
            if header and not link.is_first:
                self._plans.update(number, header)
        self._kinds = told[0]

    def confirm(self) -> None:
        for number in self._kinds:
            self._plans.mark_arrived(number)

    def kinds(self, num_chunks: int) -> list[int]:
        return self._kinds

    def edge(self, kind: int, stage: int) -> Layout:
        return self._plans[kind].edges[stage]

    def run(self, kind: int, values: dict[Any, Any]) -> dict[Any, Any]:
        return self._staged.run(self._plans[kind], kind, values)

    def output_leaves(self, values: dict[Any, Any]) -> dict[int, torch.Tensor]:
        return {k: values[("output", k)] for k in self.outputs.dims}


def _tensor_names(module: nn.Module) -> list[str]:
    return [
        *(name for name, _ in module.named_parameters(remove_duplicate=False)),
        *(name for name, _ in module.named_buffers(remove_duplicate=False)),
    ]


def _inside(name: str, blocks: set[str]) -> bool:
    return any(name.startswith(f"{block}.") for block in blocks)
