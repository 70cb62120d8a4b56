"""One rank's stage of a model, and the plans by which microbatches flow through all stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ddinfer.errors import UsageError
from ddinfer.parallel.flow import StagedModel
from ddinfer.parallel.packing import Layout
from ddinfer.parallel.plans import PlanCache
from ddinfer.parallel.prepare.rows import Inputs, Outputs, Tensors
from ddinfer.parallel.prepare.stages import Stages
from ddinfer.parallel.prepare.weights import Weights


class Partition:
    """One rank's stage of a model; of a single rank the whole model.

    The rank keeps the weights of the modules in its stage and of what lies outside of all stages.

    Attributes:
        cuts: names of the modules that begin the stages after the first.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        weights: Weights,
        stages: Stages,
        stage: int,
        device: torch.device,
    ):
        self.module, self.inputs, self.cuts = model, inputs, stages.cuts
        weights.keep_only(weights.read(stages.tensor_ids(model, stage), device), device)
        self._plans = PlanCache()
        self._staged: StagedModel | None = None
        if len(stages.ranges) > 1:
            self._staged = StagedModel(model, stages.units, stages.ranges, stage, device)

    def outputs(self, example: Tensors) -> Outputs:
        """How outputs are put together, found by running the example, without a stage's modules.

        Raises:
            UsageError: it does not run with another number of rows, or an output has no batch dim.
        """
        name, rows = type(self.module).__name__, (self.inputs.rows, self.inputs.rows + 1)
        made = []
        for count in rows:
            args, kwargs = self.inputs.tree.unflatten(self.inputs.with_rows(example, count))
            try:
                made.append(self._output(args, kwargs))
            except Exception as error:
                raise UsageError(
                    f"{name} cannot be cut: it fails for {count} rows of the example "
                    f"({type(error).__name__}: {error})"
                ) from error
        return Outputs.of(made[0], made[1], rows, name)

    def _output(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._staged is None:
            with torch.no_grad():
                return self.module(*args, **kwargs)
        plan, _ = self._staged.plan(args, kwargs)
        return plan.output.unflatten(plan.output.empty)

    def plan(self, tensors: Tensors, in_use: Sequence[int]) -> int:
        """On the first rank: the number of the plan that a microbatch follows.

        Args:
            in_use: numbers of plans that must not be dropped.
        """
        if self._staged is None:
            return 0
        args, kwargs = self.inputs.tree.unflatten(tensors)
        return self._plans.number_of(self._staged, args, kwargs, in_use)

    def metadata(self, numbers: Sequence[int]) -> dict[int, bytes]:
        """What the other ranks must know of these plans."""
        if self._staged is None:
            return {}
        return {number: self._plans.metadata(number) for number in numbers}

    def update(self, metadata: dict[int, bytes]) -> None:
        """Keeps the plans that the first rank has sent."""
        for number, plan in metadata.items():
            if plan:
                self._plans.update(number, plan)

    def confirm(self, numbers: Sequence[int]) -> None:
        """Every rank has these plans."""
        for number in numbers:
            self._plans.mark_arrived(number)

    def edge(self, number: int, stage: int) -> Layout:
        """What travels from ``stage`` to the next."""
        return self._plans[number].edges[stage]

    def run(self, number: int, values: dict[Any, Any]) -> dict[Any, Any]:
        """This stage on one microbatch's values: what the next needs, or the output's leaves."""
        if self._staged is not None:
            return self._staged.run(self._plans[number], number, values)
        tensors = {k: values["input", k] for k in self.inputs.tree.empty}
        args, kwargs = self.inputs.tree.unflatten(tensors)
        leaves = pytree.tree_leaves(self.module(*args, **kwargs))
        return {("output", k): leaf for k, leaf in enumerate(leaves)}
