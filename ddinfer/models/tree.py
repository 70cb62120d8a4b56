"""A model as a tree of sizes (`Node`), and the units in which it is placed (`units_of`).

The sizes are of a module, a pipeline, or a folder whose weights are not read (`tree_of`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.models.meta_model import open_model, parse_dtype
from ddinfer.models.pipeline_folder import PipelineSource

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Tensor:
    """A tensor's size. Tensors of one ``identity`` are one tensor under several names."""

    name: str
    num_bytes: int
    identity: str


@dataclass(frozen=True)
class Node:
    """A module: its full dotted name, the tensors it holds itself, its children in order.

    Attributes:
        whole: never divided: a block, or a class that the caller named in ``no_split``.
        pipeline: the root of a pipeline; its children are components.
    """

    name: str
    tensors: tuple[Tensor, ...] = ()
    children: tuple[Node, ...] = ()
    whole: bool = False
    pipeline: bool = False

    def every_tensor(self) -> Iterator[Tensor]:
        yield from self.tensors
        for child in self.children:
            yield from child.every_tensor()

    def num_bytes(self) -> int:
        """Bytes of all tensors below, those with several names counted once."""
        return sum({t.identity: t.num_bytes for t in self.every_tensor()}.values())

    def units(self) -> Iterator[Node | Tensor]:
        """What is placed whole, in the model's order; empty modules are left out."""
        if self.whole or not self.children:
            if next(self.every_tensor(), None) is not None:
                yield self
            return
        yield from self.tensors
        for child in self.children:
            yield from child.units()


@dataclass(frozen=True)
class PlacementUnit:
    """One or more units that share tensors and so lie together.

    Attributes:
        names: dotted names, in the model's order.
        identities: tensor → bytes.
        component: of a pipeline, to which it belongs; ``""`` in a bare model.
    """

    names: tuple[str, ...]
    identities: Mapping[str, int]
    component: str = ""

    @property
    def num_bytes(self) -> int:
        return sum(self.identities.values())


def units_of(root: Node) -> list[PlacementUnit]:
    """The units of a tree; those that share a tensor (tied weights) are joined."""
    joined: list[PlacementUnit] = []
    owner: dict[str, int] = {}  # identity → index in joined
    for item in root.units():
        tensors = [item] if isinstance(item, Tensor) else list(item.every_tensor())
        sizes = {t.identity: t.num_bytes for t in tensors}
        names: tuple[str, ...] = (item.name,)
        places = sorted({owner[identity] for identity in sizes if identity in owner})
        if not places:
            places = [len(joined)]
            joined.append(PlacementUnit((), {}))
        for place in places:
            names = (*joined[place].names, *names) if place == places[0] else names
        first = places[0]
        for place in places[1:]:  # this one ties two earlier ones together
            names = (*names[:-1], *joined[place].names, names[-1])
            sizes = {**joined[place].identities, **sizes}
            joined[place] = PlacementUnit((), {})
        sizes = {**joined[first].identities, **sizes}
        joined[first] = PlacementUnit(names, sizes)
        owner.update(dict.fromkeys(sizes, first))
    named = [unit for unit in joined if unit.names]
    if not root.pipeline:
        return named
    return [replace(unit, component=unit.names[0].partition(".")[0]) for unit in named]


def tree_of(
    thing: Any, *, no_split: Sequence[str] | None = None, dtype: Any = None, gpu: bool = False
) -> Node:
    """The sizes of a module, a pipeline, the folder (or Hub id) of either, or a `PipelineSource`.

    Of a Hub repository only configs (and the header of one weight file) are fetched.

    Args:
        dtype: counted for floating tensors instead of their own.
        gpu: whether it will run on a GPU: decides the dtype of a path when none is given.

    Raises:
        UsageError: no such folder, or nothing in it that could be loaded.
    """
    import torch

    if isinstance(thing, torch.nn.Module):
        wanted = None if dtype is None else parse_dtype(dtype)
        return tree_of_model(thing, no_split=no_split, dtype=wanted)
    if isinstance(thing, PipelineSource):
        return _tree_of_source(thing, no_split, "auto" if dtype is None else dtype, gpu)
    if hasattr(thing, "components"):
        wanted = None if dtype is None else parse_dtype(dtype)
        models = {n: m for n, m in thing.components.items() if isinstance(m, torch.nn.Module)}
        return Node("", (), tuple(
            tree_of_model(model, name, no_split=no_split, dtype=wanted)
            for name, model in models.items()
        ), pipeline=True)  # fmt: skip
    folder = Path(thing)
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        wanted = None if dtype is None else parse_dtype(dtype)
        opened = open_model(folder, dtype=wanted, read=False)
        return tree_of_model(opened.model, no_split=no_split, dtypes=opened.dtypes)
    source = PipelineSource.for_planning(thing)
    return _tree_of_source(source, no_split, "auto" if dtype is None else dtype, gpu)


def _tree_of_source(
    source: PipelineSource, no_split: Sequence[str] | None, dtype: Any, gpu: bool
) -> Node:
    import torch

    types = source.dtypes(dtype, torch.device("cuda" if gpu else "cpu"))
    children = []
    for name in source.model_names():
        if source.is_model(name):
            measured = source.outline(name, types[name])
            children.append(
                tree_of_model(measured.model, name, no_split=no_split, dtypes=measured.dtypes)
            )
    return Node("", (), tuple(children), pipeline=True)


def tree_of_model(
    model: torch.nn.Module,
    name: str = "",
    *,
    no_split: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    dtypes: dict[str, torch.dtype] | None = None,
) -> Node:
    """The sizes of a module whose dotted name is ``name``; it may be on meta.

    Args:
        dtype: counted for floating tensors instead of their own.
        dtypes: tensor's name (within the model) → the type counted for it.
    """
    import torch

    known = dict(dtypes or {})
    identities: dict[int, str] = {}

    def measure(tensor: torch.Tensor, path: str) -> Tensor:
        inside = path.removeprefix(name).removeprefix(".")
        kind = known.get(inside, tensor.dtype)
        if dtype is not None and tensor.is_floating_point():
            kind = dtype
        size = tensor.numel() * torch.empty((), dtype=kind, device="meta").element_size()
        return Tensor(path, size, identities.setdefault(id(tensor), path))

    def walk(module: torch.nn.Module, path: str, blocks: set[str], is_block: bool) -> Node:
        own = getattr(module, "_no_split_modules", None)
        blocks = blocks | set(own or ())
        held = {**module._parameters, **module._buffers}
        tensors = tuple(
            measure(tensor, f"{path}.{leaf}".lstrip("."))
            for leaf, tensor in held.items()
            if tensor is not None
        )
        repeated = _repeated_classes(module)
        children = tuple(
            walk(child, f"{path}.{leaf}".lstrip("."), blocks, type(child) in repeated)
            for leaf, child in module.named_children()
        )
        whole = bool(path) and (is_block or type(module).__name__ in blocks)
        return Node(path, tensors, children, whole)

    root = walk(model, name, set(no_split or ()), False)
    return _small_modules_whole(root, _largest_block(root), _containers(model, name), top=True)


def _repeated_classes(module: torch.nn.Module) -> set[type]:
    """Classes that a ModuleList holds at least twice: its elements are blocks."""
    import torch

    if not isinstance(module, torch.nn.ModuleList):
        return set()
    kinds = [type(child) for child in module]
    return {kind for kind in kinds if kinds.count(kind) > 1}


def _largest_block(node: Node) -> int:
    if node.whole:
        return node.num_bytes()
    return max((_largest_block(child) for child in node.children), default=0)


def _containers(model: torch.nn.Module, name: str) -> set[str]:
    """Modules that are never called themselves: lists, dicts, and whatever has no forward."""
    import torch

    kinds = (torch.nn.ModuleList, torch.nn.ModuleDict)
    unused = getattr(torch.nn.modules.module, "_forward_unimplemented", None)
    return {
        f"{name}.{path}".strip(".")
        for path, module in model.named_modules()
        if isinstance(module, kinds) or getattr(type(module), "forward", None) is unused
    }


def _small_modules_whole(node: Node, limit: int, containers: set[str], *, top: bool) -> Node:
    """Modules no larger than the largest block are units too: fewer and larger fetches."""
    if node.whole or not node.children:
        return node
    if not top and node.name not in containers and 0 < node.num_bytes() <= limit:
        return replace(node, whole=True)
    return replace(
        node,
        children=tuple(
            _small_modules_whole(child, limit, containers, top=False) for child in node.children
        ),
    )
