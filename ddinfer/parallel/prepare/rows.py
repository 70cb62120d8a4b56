"""Rows of a batch → equal microbatches, and back. The examples fix every dim but the batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ddinfer.errors import UsageError


@dataclass(frozen=True)
class Inputs:
    """What a model's calls look like, learned from the example arguments.

    A tensor whose first dim is the batch's is cut into microbatches; others go whole to each of
    them. The batch is the first dim of the first tensor.

    Attributes:
        signature: of the model's ``forward``.
        spec: structure of the bound ``(args, kwargs)``.
        leaves: the example's, flat; tensors are meta tensors here.
        batched: numbers of the leaves that are cut.
        example_rows: the example's batch.
        rows: per microbatch.
    """

    signature: inspect.Signature
    spec: Any
    leaves: tuple[Any, ...]
    batched: frozenset[int]
    example_rows: int
    rows: int

    @classmethod
    def of(
        cls, forward: Any, args: Sequence[Any], kwargs: Mapping[str, Any], num_chunks: int
    ) -> tuple[Inputs, list[Any]]:
        """Learns from the example; returns its leaves, too.

        Raises:
            UsageError: they do not fit ``forward``, or hold no tensor with rows.
        """
        signature = inspect.signature(forward)
        bound = _bind(signature, args, kwargs, "example arguments")
        leaves, spec = pytree.tree_flatten((bound.args, bound.kwargs))
        sizes = [t.shape[0] for t in leaves if isinstance(t, torch.Tensor) and t.dim()]
        if not sizes or not sizes[0]:
            raise UsageError(
                "example_args and example_kwargs hold no tensor with rows; they show what every "
                "call looks like: expected tensors whose first dim is the batch"
            )
        batched = frozenset(
            k
            for k, leaf in enumerate(leaves)
            if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == sizes[0]
        )
        light = tuple(
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            if isinstance(t, torch.Tensor)
            else t
            for t in leaves
        )
        return cls(signature, spec, light, batched, sizes[0], -(-sizes[0] // num_chunks)), leaves

    def cut_only(self, names: Sequence[str]) -> Inputs:
        """These inputs where just the tensors in the named arguments are cut.

        Raises:
            UsageError: an argument that is not in the example, or one without rows.
        """
        arguments, found, first = self._example_arguments(), set[int](), 0
        unknown = [name for name in names if name not in arguments]
        if unknown or isinstance(names, str) or not names:
            raise UsageError(
                f"batched is {names!r}; expected names out of {', '.join(arguments)}, which the "
                "example has"
            )
        for name, value in arguments.items():
            leaves = pytree.tree_leaves(value)
            if name in names:
                found |= {first + k for k, t in enumerate(leaves) if isinstance(t, torch.Tensor)}
            first += len(leaves)
        rows = self.leaves[min(found)].shape[:1] if found else ()
        if not rows or any(self.leaves[k].shape[:1] != rows for k in found):
            raise UsageError(
                f"batched names {', '.join(names)}; expected tensors whose first dim is the batch"
            )
        chunks = -(-self.example_rows // self.rows)
        return replace(
            self, batched=frozenset(found), example_rows=rows[0], rows=-(-rows[0] // chunks)
        )

    @property
    def tensors(self) -> tuple[int, ...]:
        return tuple(k for k, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor))

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], int]:
        """A call's leaves in the example's order, and its number of rows.

        Raises:
            UsageError: it differs from the example in more than its batch.
        """
        bound = _bind(self.signature, args, kwargs, "arguments")
        example = inspect.BoundArguments(self.signature, self._example_arguments())
        for name, value in example.arguments.items():
            if name not in bound.arguments and not _has_tensor(value):
                bound.arguments[name] = value  # fixed by the example, so it goes without saying
        order = [name for name in self.signature.parameters if name in bound.arguments]
        bound.arguments = {name: bound.arguments[name] for name in order}
        leaves, spec = pytree.tree_flatten((bound.args, bound.kwargs))
        if spec != self.spec:
            raise UsageError(
                f"a call takes what the example had: {_told(example.arguments)}; "
                f"found {_told(bound.arguments)}"
            )
        rows = leaves[min(self.batched)].shape[0] if self._are_tensors(leaves) else 0
        if rows < 1:
            raise UsageError("the batch is empty: expected at least one row")
        for k, (leaf, example_leaf) in enumerate(zip(leaves, self.leaves, strict=True)):
            self._check(k, leaf, example_leaf, rows)
        return leaves, rows

    def _example_arguments(self) -> dict[str, Any]:
        args, kwargs = pytree.tree_unflatten(list(self.leaves), self.spec)
        return dict(self.signature.bind(*args, **kwargs).arguments)

    def _are_tensors(self, leaves: Sequence[Any]) -> bool:
        for k in self.tensors:
            if not isinstance(leaves[k], torch.Tensor):
                found = type(leaves[k]).__name__
                raise UsageError(f"argument {k} was a tensor in the example, found {found}")
        first = leaves[min(self.batched)]
        if not first.dim():
            raise UsageError("the first tensor has no dims: expected rows")
        return True

    def _check(self, k: int, leaf: Any, example: Any, rows: int) -> None:
        if not isinstance(example, torch.Tensor):
            if isinstance(leaf, torch.Tensor) or leaf != example:
                raise UsageError(
                    f"argument {k} was {example!r} in the example and is fixed by it; found "
                    f"{leaf!r}. Prepare again with this value"
                )
            return
        expected = tuple(example.shape)
        if k in self.batched:
            shared = self.example_rows == 1 and leaf.dim() and leaf.shape[0] == 1
            expected = (1 if shared else rows, *expected[1:])
        if tuple(leaf.shape) != expected or leaf.dtype != example.dtype:
            raise UsageError(
                f"argument {k} has shape {tuple(leaf.shape)} and dtype {leaf.dtype}; a call with "
                f"{rows} rows needs {expected} and {example.dtype}, since the example fixes every "
                "dim but the batch"
            )

    def num_chunks(self, rows: int) -> int:
        """How many microbatches a call with this many rows takes."""
        return -(-rows // self.rows)

    def chunk(self, leaves: Sequence[Any], number: int, rows: int) -> list[Any]:
        """One microbatch's leaves. The last repeats its last row until it is full."""
        begin, end = number * self.rows, (number + 1) * self.rows
        cut = list(leaves)
        for k in self.batched:
            whole = leaves[k]
            if whole.shape[0] == 1 and rows > 1:
                continue  # one row for all
            if end <= rows:
                cut[k] = whole[begin:end]
            else:
                index = torch.arange(begin, end, device=whole.device).clamp_(max=rows - 1)
                cut[k] = whole.index_select(0, index)
        return cut

    def sample(
        self, rows: int, device: torch.device, others: Mapping[int, int]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of zeros like the example's, with this many rows.

        Args:
            others: leaf number → rows, for leaves that are not cut.
        """
        leaves = list(self.leaves)
        sizes = {**dict.fromkeys(self.batched, rows), **others}
        for k in self.tensors:
            shape = tuple(leaves[k].shape)
            if k in sizes:
                shape = (sizes[k], *shape[1:])
            leaves[k] = torch.zeros(shape, dtype=leaves[k].dtype, device=device)
        return self.rebuild(leaves)

    def with_rows(self, example: Sequence[Any], rows: int) -> list[Any]:
        """The example's leaves with this many rows, each taken as often as needed."""
        index = torch.arange(rows) % self.example_rows
        return [
            leaf.index_select(0, index.to(leaf.device)) if k in self.batched else leaf
            for k, leaf in enumerate(example)
        ]

    def rebuild(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` of these leaves."""
        return pytree.tree_unflatten(list(leaves), self.spec)


@dataclass(frozen=True)
class Outputs:
    """How a model's output is put together from microbatches.

    Attributes:
        spec: the output's structure.
        leaves: constants; meta tensors (of one microbatch) where there are tensors.
        dims: leaf number → which dim is the batch.
    """

    spec: Any
    leaves: tuple[Any, ...]
    dims: dict[int, int]

    @classmethod
    def of(cls, fewer: Any, more: Any, rows: tuple[int, int], name: str) -> Outputs:
        """Learns from the outputs for two numbers of rows which dims are batches.

        Raises:
            UsageError: something in the output does not fall into rows.
        """
        leaves, spec = pytree.tree_flatten(fewer)
        others, other_spec = pytree.tree_flatten(more)
        if spec != other_spec:
            raise UsageError(f"the structure of {name}'s output depends on the batch")
        dims: dict[int, int] = {}
        kept = []
        for k, (leaf, other) in enumerate(zip(leaves, others, strict=True)):
            if isinstance(leaf, torch.Tensor):
                dims[k] = _batch_dim(k, leaf, other, rows, name)
                leaf = torch.empty_strided(
                    leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta"
                )
            elif leaf is not None and not isinstance(leaf, (bool, int, float, str)):
                raise UsageError(
                    f"{name} returns a {type(leaf).__name__}, which cannot be put together from "
                    "microbatches; expected tensors in tuples, dicts or ModelOutputs (for a cache "
                    "of a language model: use_cache=False)"
                )
            elif leaf != other:
                raise UsageError(f"output {k} of {name} depends on the batch: {leaf!r}, {other!r}")
            kept.append(leaf)
        return cls(spec, tuple(kept), dims)

    def join(self, chunks: Sequence[Mapping[int, torch.Tensor]], rows: int) -> dict[int, Any]:
        """The chunks' leaves side by side, the padding cut off by index."""
        return {
            k: torch.cat([chunk[k] for chunk in chunks], dim).narrow(dim, 0, rows).contiguous()
            for k, dim in self.dims.items()
        }

    def shaped(self, rows: int) -> dict[int, torch.Tensor]:
        """Meta tensors of the joined output."""
        found = {}
        for k, dim in self.dims.items():
            shape = list(self.leaves[k].shape)
            shape[dim] = rows
            found[k] = torch.empty(shape, dtype=self.leaves[k].dtype, device="meta")
        return found

    def build(self, tensors: Mapping[int, torch.Tensor]) -> Any:
        """The output as the model would have returned it."""
        leaves = [tensors.get(k, leaf) for k, leaf in enumerate(self.leaves)]
        return pytree.tree_unflatten(leaves, self.spec)


def _batch_dim(
    k: int, fewer: torch.Tensor, more: torch.Tensor, rows: tuple[int, int], name: str
) -> int:
    sizes = list(zip(fewer.shape, more.shape, strict=False))
    grown = [d for d, (a, b) in enumerate(sizes) if a != b]
    if fewer.dim() == more.dim() and len(grown) == 1 and sizes[grown[0]] == rows:
        return grown[0]
    raise UsageError(
        f"output {k} of {name} does not fall into rows: its shape is {tuple(fewer.shape)} for "
        f"{rows[0]} rows and {tuple(more.shape)} for {rows[1]}; expected one dim that is the batch "
        "(a loss is a mean over the batch: compute it from the gathered output)"
    )


def _bind(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any], what: str
) -> inspect.BoundArguments:
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"{what} do not fit forward{signature}: {error}") from error


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _told(arguments: Mapping[str, Any]) -> str:
    def one(value: Any) -> str:
        return "tensor" if isinstance(value, torch.Tensor) else type(value).__name__

    return ", ".join(f"{name} ({one(value)})" for name, value in arguments.items()) or "nothing"
