"""Rows of a batch → equal microbatches, and back. The example fixes every dim but the batch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ddinfer.errors import UsageError
from ddinfer.parallel.tensor_tree import TensorTree

#: Tensors by leaf number.
Tensors = dict[int, torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """What a model's calls look like, learned from the example arguments.

    Attributes:
        signature: of the model's ``forward``.
        tree: the example's bound ``(args, kwargs)``.
        batched: leaf numbers of the tensors that are cut into microbatches along their first dim;
            the others are replicated to each. At first all with as many rows as the first tensor.
        example_rows: the example's batch.
        rows: per microbatch.
    """

    signature: inspect.Signature
    tree: TensorTree
    batched: frozenset[int]
    example_rows: int
    rows: int

    @classmethod
    def of(
        cls, forward: Any, args: Sequence[Any], kwargs: Mapping[str, Any], num_chunks: int
    ) -> Inputs:
        """
        Raises:
            UsageError: the example does not fit ``forward``, or holds no tensor with rows.
        """
        signature = inspect.signature(forward)
        bound = _bind(signature, args, kwargs, "example arguments")
        tree = TensorTree.of((bound.args, bound.kwargs), torch.device("cpu"))
        sizes = {k: tensor.shape[0] for k, tensor in tree.empty.items() if tensor.dim()}
        rows = next(iter(sizes.values()), 0)
        if not rows:
            raise UsageError(
                "example_args and example_kwargs hold no tensor with rows; they show what every "
                "call looks like: expected tensors whose first dim is the batch"
            )
        batched = frozenset(k for k, size in sizes.items() if size == rows)
        return cls(signature, tree, batched, rows, -(-rows // num_chunks))

    def cut_only(self, names: Sequence[str]) -> Inputs:
        """These inputs where just the tensors in the named arguments are cut.

        Raises:
            UsageError: an argument that is not in the example, or one without rows.
        """
        numbers = self._leaf_numbers()
        if not names or isinstance(names, str) or any(name not in numbers for name in names):
            raise UsageError(
                f"batched is {names!r}; expected names out of {', '.join(numbers)}, which the "
                "example has"
            )
        batched = frozenset(k for n in names for k in numbers[n] if k in self.tree.empty)
        sizes = {self.tree.empty[k].shape[:1] for k in batched}
        if len(sizes) != 1 or not any(map(sum, sizes)):
            raise UsageError(
                f"batched names {', '.join(names)}; expected tensors whose first dim is the batch"
            )
        ((rows,),) = sizes
        chunks = self.num_chunks(self.example_rows)
        return replace(self, batched=batched, example_rows=rows, rows=-(-rows // chunks))

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensors, int]:
        """A call's tensors by the example's leaf numbers, and its number of rows.

        Raises:
            UsageError: it differs from the example in more than its batch.
        """
        bound = _bind(self.signature, args, kwargs, "arguments")
        example = inspect.BoundArguments(self.signature, self._arguments(self.tree.leaves))
        for name, numbers in self._leaf_numbers().items():
            if name not in bound.arguments and not self.tree.empty.keys() & set(numbers):
                bound.arguments[name] = example.arguments[name]  # fixed by the example
        order = [name for name in self.signature.parameters if name in bound.arguments]
        bound.arguments = {name: bound.arguments[name] for name in order}
        leaves, spec = pytree.tree_flatten((bound.args, bound.kwargs))
        if spec != pytree.tree_structure(self.tree.tree):
            raise UsageError(
                f"a call takes {', '.join(example.arguments)}, nested as in the example; found "
                f"{', '.join(bound.arguments) or 'nothing'}"
            )
        first = leaves[min(self.batched)]
        rows = first.shape[0] if isinstance(first, torch.Tensor) and first.dim() else 0
        if rows < 1:
            raise UsageError(
                f"the batch is empty: argument {min(self.batched)} needs at least one row"
            )
        for k, leaf in enumerate(leaves):
            self._check(k, leaf, rows)
        return {k: leaves[k] for k in self.tree.empty}, rows

    def _leaf_numbers(self) -> dict[str, list[int]]:
        """The leaf numbers of each of the example's arguments."""
        arguments = self._arguments(range(len(self.tree.leaves)))
        return {name: pytree.tree_leaves(value) for name, value in arguments.items()}

    def _arguments(self, leaves: Sequence[Any]) -> dict[str, Any]:
        args, kwargs = pytree.tree_map(lambda k: leaves[k], self.tree.tree)
        return dict(self.signature.bind(*args, **kwargs).arguments)

    def _check(self, k: int, leaf: Any, rows: int) -> None:
        example = self.tree.empty.get(k)
        if example is None:
            if isinstance(leaf, torch.Tensor) or leaf != self.tree.leaves[k]:
                raise UsageError(
                    f"argument {k} was {self.tree.leaves[k]!r} in the example and is fixed by it; "
                    f"found {leaf!r}. Prepare again with this value"
                )
            return
        if not isinstance(leaf, torch.Tensor):
            raise UsageError(
                f"argument {k} was a tensor in the example, found {type(leaf).__name__}"
            )
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

    def chunk(self, tensors: Tensors, number: int, rows: int) -> Tensors:
        """One microbatch's tensors. The last repeats its last row until it is full."""
        begin, end = number * self.rows, (number + 1) * self.rows
        cut = dict(tensors)
        for k in self.batched:
            whole = tensors[k]
            if whole.shape[0] == 1 and rows > 1:
                continue  # one row for all
            if end <= rows:
                cut[k] = whole[begin:end]
            else:
                index = torch.arange(begin, end, device=whole.device).clamp_(max=rows - 1)
                cut[k] = whole.index_select(0, index)
        return cut

    def zeros(self, rows: int, device: torch.device, others: Mapping[int, int]) -> Tensors:
        """Tensors like the example's with this many rows.

        Args:
            others: leaf number → rows, for tensors that are not cut.
        """
        sizes = {**dict.fromkeys(self.batched, rows), **others}
        shapes = {
            k: (sizes[k], *empty.shape[1:]) if k in sizes else empty.shape
            for k, empty in self.tree.empty.items()
        }
        return {
            k: torch.zeros(shape, dtype=self.tree.empty[k].dtype, device=device)
            for k, shape in shapes.items()
        }

    def with_rows(self, example: Tensors, rows: int) -> Tensors:
        """The example's tensors with this many rows, each taken as often as needed."""
        index = torch.arange(rows) % self.example_rows
        return {
            k: tensor.index_select(0, index.to(tensor.device)) if k in self.batched else tensor
            for k, tensor in example.items()
        }


@dataclass(frozen=True)
class Outputs:
    """How a model's output is put together from microbatches.

    Attributes:
        tree: the output of one microbatch.
        dims: leaf number → which dim is the batch.
    """

    tree: TensorTree
    dims: dict[int, int]

    @classmethod
    def of(cls, fewer: Any, more: Any, rows: tuple[int, int], name: str) -> Outputs:
        """Learns from the outputs for two numbers of rows which dims are batches.

        Raises:
            UsageError: an output has no batch dim.
        """
        tree, other = (TensorTree.of(value, torch.device("cpu")) for value in (fewer, more))
        specs = [pytree.tree_structure(found.tree) for found in (tree, other)]
        if specs[0] != specs[1] or tree.empty.keys() != other.empty.keys():
            raise UsageError(f"the structure of {name}'s output depends on the batch")
        for leaf, other_leaf in zip(tree.leaves, other.leaves, strict=True):
            if leaf is not None and not isinstance(leaf, (bool, int, float, str)):
                raise UsageError(
                    f"{name} returns a {type(leaf).__name__}, which cannot be put together from "
                    "microbatches; expected tensors in tuples, dicts or ModelOutputs (for a cache "
                    "of a language model: use_cache=False)"
                )
            if leaf != other_leaf:
                raise UsageError(
                    f"an output of {name} depends on the batch: {leaf!r}, {other_leaf!r}"
                )
        dims = {k: _batch_dim(k, t, other.empty[k], rows, name) for k, t in tree.empty.items()}
        return cls(tree, dims)

    def join(self, chunks: Sequence[Tensors], rows: int) -> Tensors:
        """The tensors of all chunks, the padding cut off by index."""
        return {
            k: torch.cat([chunk[k] for chunk in chunks], dim).narrow(dim, 0, rows).contiguous()
            for k, dim in self.dims.items()
        }

    def joined_shapes(self, rows: int) -> Tensors:
        """Meta tensors of the joined output."""
        found = {}
        for k, dim in self.dims.items():
            shape = list(self.tree.empty[k].shape)
            shape[dim] = rows
            found[k] = torch.empty(shape, dtype=self.tree.empty[k].dtype, device="meta")
        return found


def _batch_dim(
    k: int, fewer: torch.Tensor, more: torch.Tensor, rows: tuple[int, int], name: str
) -> int:
    sizes = list(zip(fewer.shape, more.shape, strict=False))
    grown = [d for d, (a, b) in enumerate(sizes) if a != b]
    if fewer.dim() == more.dim() and len(grown) == 1 and sizes[grown[0]] == rows:
        return grown[0]
    raise UsageError(
        f"output {k} of {name} has no batch dim: its shape is {tuple(fewer.shape)} for {rows[0]} "
        f"rows and {tuple(more.shape)} for {rows[1]}; expected one dim that is the batch (a loss "
        "is a mean over the batch: compute it from the gathered output)"
    )


def _bind(
    signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any], what: str
) -> inspect.BoundArguments:
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UsageError(f"{what} do not fit forward{signature}: {error}") from error
