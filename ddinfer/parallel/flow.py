"""What must travel between stages when every rank runs the model's own ``forward``.

Every rank runs the same code. Blocks before its own return what was received, its own run, and
after them a `Stop` ends the forward; what lies outside the blocks is on every rank. The *plan*
of a call says which of its inputs and block outputs the later stages need. It is found by running
the forward once with blocks that return zeros of the right shape, while a `Tracker` follows
each value to where it is used.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ddinfer.errors import DdinferError, UsageError
from ddinfer.parallel.blocks import faked, substituted
from ddinfer.parallel.labels import Tracker
from ddinfer.parallel.packing import Layout, layout_of
from ddinfer.parallel.tensor_tree import (
    TensorTree,
    UnsupportedValueError,
    empty_like,
    fingerprint,
    tensors_of,
)
from ddinfer.patched import patched

#: Runs of each block where stages are balanced by time; the shortest counts.
NUM_TIMED_RUNS = 5


class PlanError(DdinferError):
    """A call that cannot be cut into stages. The message says what stands in the way."""


class Stop(BaseException):
    """Ends a forward after this rank's last block. No `Exception`, so that no model catches it."""


@dataclass(frozen=True)
class Plan:
    """How one kind of call flows through the stages. Made on the first rank, sent to the others.

    Values are named ``("input", leaf)``, ``("block", block, leaf)`` and ``("output", leaf)``.

    Attributes:
        arguments: the call's ``(args, kwargs)``.
        blocks: block number → what it returns, for the blocks that the call runs.
        output: what the model returns.
        edges: what travels from stage k to k + 1; from the last stage to the caller.
    """

    arguments: TensorTree
    blocks: dict[int, TensorTree]
    output: TensorTree
    edges: tuple[Layout, ...]


class StagedModel:
    """One rank's part of a model: its own blocks are real, the other ranks' need no weights.

    The blocks' instances get a ``forward`` that asks this object; `detach` takes it off again.

    Args:
        blocks: names in the order they run.
        stages: one range of block numbers per stage.
        stage: this rank's.
        device: where this rank computes.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        stages: Sequence[range],
        stage: int,
        device: torch.device,
    ):
        self.model, self.blocks, self.stages = model, tuple(blocks), tuple(stages)
        self.stage, self.device = stage, device
        self.own = self.stages[stage]
        self._modules = [model.get_submodule(name) for name in blocks]
        self._forwards = [module.forward for module in self._modules]
        self._forward = model.forward
        self._call: Any = None  # what block calls are answered by, while the model runs
        self._shapes: dict[Any, TensorTree] = {}
        self._checked: set[int] = set()
        self._patches = ExitStack()
        for number, module in enumerate(self._modules):
            self._patches.enter_context(patched(module, "forward", self._block_forward(number)))

    @property
    def is_last(self) -> bool:
        return self.stage == len(self.stages) - 1

    def detach(self) -> None:
        """Gives the blocks their own ``forward`` back."""
        self._patches.close()

    def _block_forward(self, number: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._call is None:
                raise UsageError(
                    f"block {self.blocks[number]} was called outside of its model, which is cut "
                    "into stages"
                )
            return self._call.block(number, args, kwargs)

        return forward

    def plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Plan, frozenset[int]]:
        """The plan for calls like this one, and the input leaves whose contents it depends on.

        Raises:
            PlanError: the model does something between blocks that cannot be cut.
        """
        arguments = TensorTree.of((args, kwargs), self.device)
        call = _Planning(self)
        leaves = pytree.tree_leaves((args, kwargs))
        with torch.no_grad(), call.tracker:
            for k in arguments.empty:
                call.tracker.mark(leaves[k], ("input", k))
            try:
                output = self._run(call, args, kwargs)
            except AttributeError as error:
                raise PlanError(
                    f"{type(self.model).__name__} cannot be run with zeros in place of its blocks' "
                    f"outputs: {error}"
                ) from error
        tracker = call.tracker
        for label in tracker.inspected | tracker.written:
            if label[0] == "block" or label in tracker.written:
                what = "reads the contents of" if label in tracker.inspected else "writes into"
                where = f"the output of block {self.blocks[label[1]]}"
                where = where if label[0] == "block" else f"argument {label[1]}"
                raise PlanError(f"{type(self.model).__name__} {what} {where} between blocks")
        inspected = frozenset(label[1] for label in tracker.inspected)
        made = TensorTree.of(output, self.device)
        for leaf in made.leaves:
            if leaf is not None and not isinstance(leaf, (bool, int, float, str)):
                raise PlanError(f"{type(self.model).__name__} returns a {type(leaf).__name__}")
        back = layout_of({("output", k): empty for k, empty in made.empty.items()})
        edges = self._edges(call, arguments, tracker.labels(output), inspected)
        return Plan(arguments, call.made, made, (*edges, back)), inspected

    def run_order(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_timed: bool = False
    ) -> tuple[list[tuple[int, float]], Any]:
        """Numbers and seconds of the blocks in the order in which a call runs them, and its output.

        As for `plan`, blocks return zeros and need no weights.

        Args:
            is_timed: measure each block (else 0), with weights of zeros that it holds for that
                time only.
        """
        call = _Ordering(self, is_timed)
        with torch.no_grad():
            output = self._run(call, args, kwargs)
        return call.order, output

    def _edges(
        self, call: _Planning, arguments: TensorTree, in_output: Any, inspected: frozenset[int]
    ) -> tuple[Layout, ...]:
        # Integers have no NaN to give a forgotten label away, so they always travel.
        always = {
            ("input", k)
            for k, empty in arguments.empty.items()
            if k in inspected or not empty.dtype.is_floating_point
        }
        values: dict[Any, torch.Tensor] = {}
        values |= {("input", k): empty for k, empty in arguments.empty.items()}
        for block, made in call.made.items():
            values |= {("block", block, k): empty for k, empty in made.empty.items()}
        edges = []
        for stage in self.stages[:-1]:
            needed = set(in_output) | always
            for block, labels in call.used.items():
                if block >= stage.stop:
                    needed |= labels
            edges.append(
                layout_of(
                    {
                        label: empty
                        for label, empty in values.items()
                        if label in needed and (label[0] == "input" or label[1] < stage.stop)
                    }
                )
            )
        return tuple(edges)

    def run(self, plan: Plan, number: int, values: dict[Any, torch.Tensor]) -> dict[Any, Any]:
        """Runs this stage on what was received (or, on the first, on all inputs).

        Args:
            number: the plan's, among this model's: the first call of each is checked.
            values: emptied, so that each is freed after its last use.

        Returns:
            what the next stage needs, or on the last stage the output's leaves.

        Raises:
            PlanError: a value would be used that did not travel.
        """
        check = len(self.stages) > 1 and number not in self._checked
        call = _Running(self, plan, values, check)
        args, kwargs = plan.arguments.unflatten(self._inputs(plan, values))
        values.clear()
        with torch.no_grad():
            try:
                output = self._run(call, args, kwargs)
            except Stop:
                output = None
        if check:
            self._checked.add(number)
        if not self.is_last:
            return call.to_send
        leaves = pytree.tree_leaves(output)
        found = {("output", k): leaves[k] for k in plan.output.empty}
        if check and _has_nan(found.values()) and not call.received_nan:
            raise PlanError(f"{type(self.model).__name__}: NaN after the last block")
        return found

    def _run(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._call = call
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._call = None

    def _inputs(self, plan: Plan, values: dict[Any, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The call's tensor arguments, on the device type where the pipeline gave them."""
        inputs = {}
        for k, empty in plan.arguments.empty.items():
            device = torch.device("cpu") if k in plan.arguments.on_host else self.device
            value = values.get(("input", k))
            inputs[k] = _placeholder(empty, device) if value is None else value
            if k in plan.arguments.on_host:  # sent through device memory
                inputs[k] = inputs[k].cpu()
        return inputs

    def zeros(
        self, number: int, args: Any, kwargs: Any
    ) -> tuple[TensorTree, dict[int, torch.Tensor]]:
        """What a block returns for such arguments, and zeros to put into it."""
        with _paused():
            made = self.shapes(number, args, kwargs)
            return made, {k: empty_like(t, self.device).zero_() for k, t in made.empty.items()}

    def shapes(self, number: int, args: Any, kwargs: Any) -> TensorTree:
        """What a block returns for such arguments, found without its weights."""
        from torch._subclasses.fake_tensor import (
            DataDependentOutputException,
            DynamicOutputShapeException,
            FakeTensorMode,
        )

        module = self._modules[number]
        key = _shape_key(module, args, kwargs)
        if key is None or key not in self._shapes:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
            before = [t._version for t in tensors_of(fakes)]
            try:
                with faked(module, mode, self.device), mode:
                    made = self._forwards[number](*fakes[0], **fakes[1])
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise PlanError(
                    f"block {self.blocks[number]} of {type(self.model).__name__} reads the "
                    f"contents of its inputs ({error}), which are not known when the cut is planned"
                ) from error
            after = [t._version for t in tensors_of(fakes)]
            if before != after:
                raise PlanError(f"block {self.blocks[number]} changes its inputs in place")
            found = TensorTree.of(made, self.device)
            if key is None:
                return found
            self._shapes[key] = found
        return self._shapes[key]


class _Planning:
    """Answers block calls with zeros and notes what each block is given."""

    def __init__(self, owner: StagedModel):
        self.owner, self.tracker = owner, Tracker()
        self.made: dict[int, TensorTree] = {}
        self.used: dict[int, frozenset[Any]] = {}

    def block(self, number: int, args: Any, kwargs: Any) -> Any:
        last = max(self.made, default=-1)
        if number <= last:
            names = self.owner.blocks
            raise PlanError(
                f"block {names[number]} runs after {names[last]}; expected each block once, "
                "in order"
            )
        self.used[number] = self.tracker.labels((args, kwargs))
        made, zeros = self.owner.zeros(number, args, kwargs)
        for k, zero in zeros.items():
            self.tracker.mark(zero, ("block", number, k))
        self.made[number] = made
        return made.unflatten(zeros)


class _Ordering:
    """Answers block calls with zeros and notes their order and duration."""

    def __init__(self, owner: StagedModel, is_timed: bool):
        self.owner, self.is_timed = owner, is_timed
        self.order: list[tuple[int, float]] = []
        self._seconds: dict[Any, float] = {}

    def block(self, number: int, args: Any, kwargs: Any) -> Any:
        seconds = self._measured(number, args, kwargs) if self.is_timed else 0.0
        self.order.append((number, seconds))
        made, zeros = self.owner.zeros(number, args, kwargs)
        return made.unflatten(zeros)

    def _measured(self, number: int, args: Any, kwargs: Any) -> float:
        """The shortest of a few runs, measured once for blocks that are alike."""
        owner, module = self.owner, self.owner._modules[number]
        key = _shape_key(module, args, kwargs) or number
        if key not in self._seconds:
            runs = []
            with _paused(), substituted(module, lambda t: torch.zeros_like(t, device=owner.device)):
                for _ in range(NUM_TIMED_RUNS):
                    _synchronize(owner.device)
                    start = time.perf_counter()
                    owner._forwards[number](*args, **kwargs)
                    _synchronize(owner.device)
                    runs.append(time.perf_counter() - start)
            self._seconds[key] = min(runs)
        return self._seconds[key]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _Running:
    """Answers block calls on one stage: received before its own, computed, then `Stop`.

    Attributes:
        to_send: what the next stage needs, as far as it is known.
        received_nan: NaN came from outside of this stage; known where ``check`` is set.
    """

    def __init__(self, owner: StagedModel, plan: Plan, values: dict[Any, Any], check: bool):
        self.owner, self.plan, self.check = owner, plan, check
        self._names = frozenset() if owner.is_last else frozenset(plan.edges[owner.stage].names)
        self._received = {name: value for name, value in values.items() if name[0] == "block"}
        self.to_send = {name: value for name, value in values.items() if name in self._names}
        self.received_nan = check and _has_nan(values.values())

    def block(self, number: int, args: Any, kwargs: Any) -> Any:
        owner = self.owner
        if number in owner.own:
            return self._own(number, args, kwargs)
        if number >= owner.own.stop:
            raise Stop
        made = self.plan.blocks[number]
        values = {}
        for k, empty in made.empty.items():
            value = self._received.pop(("block", number, k), None)
            values[k] = _placeholder(empty, owner.device) if value is None else value
        return made.unflatten(values)

    def _own(self, number: int, args: Any, kwargs: Any) -> Any:
        owner = self.owner
        if self.check and not self.received_nan and _has_nan(tensors_of((args, kwargs))):
            raise PlanError(f"a value that block {owner.blocks[number]} needs did not travel")
        made = owner._forwards[number](*args, **kwargs)
        leaves = pytree.tree_leaves(made)
        for k in self.plan.blocks[number].empty:
            if ("block", number, k) in self._names:
                self.to_send["block", number, k] = leaves[k]
        if number == owner.own.stop - 1 and not owner.is_last:
            raise Stop
        return made


def _placeholder(empty: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor that must not be used: NaN, or zeros where there is no NaN; one element large."""
    return _scalar(empty.dtype, device).expand(empty.shape)


@functools.cache
def _scalar(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    value = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return torch.full((), value, dtype=dtype, device=device)


def call_key(
    args: tuple[Any, ...], kwargs: dict[str, Any], inspected: frozenset[int] = frozenset()
) -> str:
    """Equal for calls that one plan serves.

    Args:
        inspected: input leaves whose contents decide the flow.
    """
    try:
        return fingerprint((args, kwargs), contents=inspected, other_types=True)
    except UnsupportedValueError as error:
        raise PlanError(f"an argument is a {error}, which cannot be sent to other ranks") from error


def _shape_key(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Blocks of one class with equal parameters' shapes and arguments return equal shapes."""
    try:
        arguments = fingerprint((args, kwargs))
    except UnsupportedValueError:
        return None
    parameters = [(n, p.shape, p.dtype) for n, p in module.named_parameters()]
    return type(module), str(module), *parameters, arguments


def _has_nan(tensors: Any) -> bool:
    return any(bool(t.isnan().any()) for t in tensors if t.dtype.is_floating_point)


def _paused() -> Any:
    """Nothing inside is followed by a `Tracker`."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()
