"""Cutting any module by tracing it: `torch.distributed.pipelining` splits, nothing runs yet.

The model is traced with fake weights, so nothing is computed and no weight is touched; the graph
is cut where blocks begin, and each rank then gives real weights to its own stage only.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ddinfer.errors import UsageError
from ddinfer.parallel.blocks import find_blocks
from ddinfer.parallel.cut import balance, merge_weightless
from ddinfer.parallel.packing import Layout, layout_of


class TraceFailed(Exception):
    """The model cannot be captured as one graph. The message says why."""


@dataclass(frozen=True)
class TracedStage:
    """One stage of a traced model.

    Attributes:
        module: the stage; its parameters have the names they have in the model.
        inputs: names of the values it takes, in order.
        outputs: names of the values it makes, in order.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    returns_one: bool

    def __call__(self, values: dict[Any, Any]) -> dict[Any, Any]:
        made = self.module(*(values[name] for name in self.inputs))
        return dict(zip(self.outputs, (made,) if self.returns_one else made, strict=True))


@dataclass(frozen=True)
class TracedCut:
    """A model cut into stages by its graph.

    Attributes:
        stages: all of them; parameters are fake until somebody sets them.
        edges: what travels from stage k to k + 1.
        inputs: names of the model's flattened arguments, in order.
        outputs: per leaf of the model's output the name of a value, or ``None`` for a constant.
        cuts: where the stages after the first begin, for people.
    """

    stages: tuple[TracedStage, ...]
    edges: tuple[Layout, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str | None, ...]
    cuts: tuple[str, ...]


def trace(
    model: nn.Module,
    mode: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_stages: int,
    split_points: Sequence[str] | None,
) -> TracedCut:
    """Traces ``model`` (with fake weights of ``mode``) and cuts the graph.

    Args:
        args, kwargs: one microbatch of fake tensors.
        split_points: modules that begin the stages after the first; ``None`` balances by bytes.

    Raises:
        TraceFailed: the model cannot be captured.
        UsageError: it can, but not be cut as asked.
    """
    from torch.distributed.pipelining import pipeline

    policy = _Policy(model, num_stages, split_points)
    try:
        with quiet():
            pipe = pipeline(model, args, kwargs, split_policy=policy)
    except UsageError:
        raise
    except Exception as error:  # whatever torch.export meets in a foreign model
        reason = error.__cause__ if error.__cause__ is not None else error
        raise TraceFailed(f"{type(reason).__name__}: {_first_line(reason)}") from error
    found = _stages(pipe, num_stages)
    leaves = pytree.tree_leaves((args, kwargs))
    inputs = tuple(n.name for n in pipe.split_gm.graph.nodes if n.op == "placeholder")
    if len(inputs) != len(leaves):
        raise TraceFailed(f"{len(leaves)} arguments became {len(inputs)} graph inputs")
    values = dict(zip(inputs, leaves, strict=True))
    for stage in found:
        with mode:
            values.update(stage(values))
    outputs = _output_names(pipe)
    edges = tuple(_edge(k, found, inputs, outputs, values) for k in range(num_stages - 1))
    return TracedCut(found, edges, inputs, outputs, policy.cuts)


def give_weights(stage: nn.Module, weights: dict[str, torch.Tensor], device: torch.device) -> None:
    """Puts real tensors, by name, in the place of a stage's fake ones.

    Raises:
        TraceFailed: something in the stage would stay fake.
    """
    for module_name, module in stage.named_modules():
        prefix = f"{module_name}." if module_name else ""
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                real = weights.get(prefix + name)
                if real is None:
                    if _is_fake(tensor):
                        raise TraceFailed(f"{prefix}{name} is computed while tracing")
                    table[name] = tensor.to(device)
                elif isinstance(tensor, nn.Parameter):
                    table[name] = nn.Parameter(real.detach().to(device), requires_grad=False)
                else:
                    table[name] = real.to(device)
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and _is_fake(value):
                raise TraceFailed(f"{prefix}{name} is computed while tracing")


def _is_fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor) or isinstance(tensor.data, FakeTensor)


class _Policy:
    """Marks in the traced graph where a stage begins; called by `pipeline`."""

    def __init__(self, model: nn.Module, num_stages: int, split_points: Sequence[str] | None):
        self.model, self.num_stages, self.split_points = model, num_stages, split_points
        self.cuts: tuple[str, ...] = ()

    def __call__(self, graph_module: Any) -> Any:
        blocks = list(self.split_points or find_blocks(self.model))
        units = _units(graph_module.graph, blocks)
        if self.split_points is None:
            chosen = self._balanced(graph_module, units)
        else:
            chosen = self._given(units)
        self.cuts = tuple(name for name, _ in chosen)
        for _, node in chosen:
            with graph_module.graph.inserting_before(node):
                graph_module.graph.call_function(torch.ops.pippy._pipe_split.default)
        graph_module.recompile()
        return graph_module

    def _balanced(self, graph_module: Any, units: list[_Unit]) -> list[tuple[str, Any]]:
        sizes = _unit_bytes(graph_module, units)
        groups = merge_weightless(sizes)
        weights = [sum(sizes[i] for i in group) for group in groups]
        if len(groups) < self.num_stages:
            raise UsageError(
                f"{type(self.model).__name__} has {len(groups)} blocks that can be told apart, "
                f"too few for {self.num_stages} ranks; use at most {len(groups)} ranks, or name "
                "finer split_points"
            )
        starts = [stage.start for stage in balance(weights, self.num_stages)][1:]
        return [(units[groups[k].start].name, units[groups[k].start].first) for k in starts]

    def _given(self, units: list[_Unit]) -> list[tuple[str, Any]]:
        firsts = {unit.name: unit for unit in reversed(units)}
        chosen = []
        for name in self.split_points or ():
            unit = firsts.get(name)
            if unit is None:
                raise UsageError(f"split point {name!r} is never run with the example arguments")
            if unit is units[0]:
                raise UsageError(
                    f"nothing runs before split point {name!r}: the first stage would be empty"
                )
            chosen.append((units.index(unit), name, unit.first))
        return [(name, node) for _, name, node in sorted(chosen, key=lambda item: item[0])]


@dataclass(eq=False)
class _Unit:
    """A stretch of the graph that stays together, from its first node on."""

    name: str
    first: Any


def _units(graph: Any, blocks: list[str]) -> list[_Unit]:
    """The graph's stretches: what precedes the first block, each block, what follows the last."""
    units: list[_Unit] = []
    current: str | None = None  # key of the block that the node before belongs to
    tail: Any = None  # first node after the last block
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        key = name = None
        for stack_key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
            if path in blocks:
                key, name = stack_key, path
                break
        if key is None:
            if not units:
                units.append(_Unit("(before the blocks)", node))
            if current is not None:
                tail = node
        elif key != current:
            assert name is not None
            units.append(_Unit(name, node))
            tail = None
        current = key
    if tail is not None:
        units.append(_Unit("(after the blocks)", tail))
    return units


def _unit_bytes(graph_module: Any, units: list[_Unit]) -> list[int]:
    """Bytes of the parameters that each unit is the first to use."""
    starts = {unit.first: k for k, unit in enumerate(units)}
    sizes, current, seen = [0] * len(units), 0, set()
    for node in graph_module.graph.nodes:
        current = starts.get(node, current)
        for used in node.all_input_nodes:
            if used.op == "get_attr" and used.target not in seen:
                seen.add(used.target)
                tensor = operator.attrgetter(used.target)(graph_module)
                if isinstance(tensor, torch.Tensor):
                    sizes[current] += tensor.numel() * tensor.element_size()
    return sizes


def _stages(pipe: Any, num_stages: int) -> tuple[TracedStage, ...]:
    found = []
    for node in pipe.split_gm.graph.nodes:
        if node.op != "call_module":
            continue
        module = getattr(pipe.split_gm, node.target)
        # The first stage may have been given the model's own signature; here all take values.
        module.graph.set_codegen(torch.fx.graph.CodeGen())
        module.recompile()
        picked = {u.args[1]: u.name for u in node.users if u.target is operator.getitem}
        made = next(n for n in module.graph.nodes if n.op == "output").args[0]
        returns_one = not isinstance(made, (tuple, list))
        count = 1 if returns_one else len(made)
        names = [node.name] if returns_one else []
        names += [] if returns_one else [picked.get(k, f"{node.name}:{k}") for k in range(count)]
        inputs = tuple(arg.name for arg in node.args)
        found.append(TracedStage(module, inputs, tuple(names), returns_one))
    if len(found) != num_stages:
        raise TraceFailed(f"the graph fell into {len(found)} stages, expected {num_stages}")
    return tuple(found)


def _output_names(pipe: Any) -> tuple[str | None, ...]:
    made = next(n for n in pipe.split_gm.graph.nodes if n.op == "output").args[0]
    leaves = list(made) if isinstance(made, (tuple, list)) else [made]
    return tuple(leaf.name if isinstance(leaf, torch.fx.Node) else None for leaf in leaves)


def _edge(
    k: int,
    stages: Sequence[TracedStage],
    inputs: Sequence[str],
    outputs: Sequence[str | None],
    values: dict[str, Any],
) -> Layout:
    known = [*inputs, *(name for stage in stages[: k + 1] for name in stage.outputs)]
    needed = {name for stage in stages[k + 1 :] for name in stage.inputs} | set(outputs)
    return layout_of(
        {n: values[n] for n in known if n in needed and isinstance(values[n], torch.Tensor)}
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Export's own warnings and logs speak about code that the user did not write."""
    loggers = [logging.getLogger(n) for n in ("torch.export", "torch._subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
