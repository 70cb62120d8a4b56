"""A model as a tree of sizes (`Node`), and the units in which it is placed (`units_of`). Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace


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
class Unit:
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


def units_of(root: Node) -> list[Unit]:
    """The units of a tree; those that share a tensor (tied weights) are joined."""
    joined: list[Unit] = []
    owner: dict[str, int] = {}  # identity → index in joined
    for item in root.units():
        tensors = [item] if isinstance(item, Tensor) else list(item.every_tensor())
        sizes = {t.identity: t.num_bytes for t in tensors}
        names: tuple[str, ...] = (item.name,)
        places = sorted({owner[identity] for identity in sizes if identity in owner})
        if not places:
            places = [len(joined)]
            joined.append(Unit((), {}))
        for place in places:
            names = (*joined[place].names, *names) if place == places[0] else names
        first = places[0]
        for place in places[1:]:  # this one ties two earlier ones together
            names = (*names[:-1], *joined[place].names, names[-1])
            sizes = {**joined[place].identities, **sizes}
            joined[place] = Unit((), {})
        sizes = {**joined[first].identities, **sizes}
        joined[first] = Unit(names, sizes)
        owner.update(dict.fromkeys(sizes, first))
    named = [unit for unit in joined if unit.names]
    if not root.pipeline:
        return named
    return [replace(unit, component=unit.names[0].partition(".")[0]) for unit in named]
