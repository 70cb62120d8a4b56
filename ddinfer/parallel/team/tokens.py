"""The tokens of a transformer over the ranks of a team: inside a block each has its share.

Every rank runs the model's own ``forward`` on the whole inputs. What lies between the blocks is
computed on every rank; a block returns `Deferred` tensors, of which the next block takes the rank's
own tokens, and which are gathered only where something else reads them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ddinfer.errors import UsageError
from ddinfer.parallel.team.attention import AttentionAxes, attend, gather
from ddinfer.parallel.team.deferred import Deferred, fetched
from ddinfer.parallel.team.exchange import Exchange
from ddinfer.parallel.team.probing import BlockPlan, plan_block
from ddinfer.parallel.team.rows import difference_beyond_rounding
from ddinfer.parallel.team.shares import Axis, Shares

#: Fewer rows of a matrix product take another kernel on a CPU, and no time is gained.
FEWEST_TOKENS = 4


class _Rows(NamedTuple):
    """What this rank has of a tensor."""

    shares: Shares
    dim: int
    axis: Axis
    tensor: torch.Tensor


class TokenBlocks:
    """Splits the calls of a model's blocks by tokens while `active` is set.

    The blocks' instances get a ``forward`` that asks this object; `detach` takes it off again.

    Args:
        name: of the model in its pipeline, for messages.
        blocks: names of the model's blocks.
        exchange: between the ranks of the team.
    """

    def __init__(self, name: str, model: nn.Module, blocks: list[str], exchange: Exchange):
        self.exchange, self.active = exchange, False
        self._plans: dict[Any, BlockPlan] = {}
        self._modules = [model.get_submodule(block) for block in blocks]
        self._before = [module.__dict__.get("forward") for module in self._modules]
        for block, module in zip(blocks, self._modules, strict=True):
            module.forward = _BlockForward(self, f"{name}.{block}", module)

    def detach(self) -> None:
        """Gives the blocks their own ``forward`` back."""
        for module, before in zip(self._modules, self._before, strict=True):
            module.__dict__.pop("forward", None)
            if before is not None:
                module.__dict__["forward"] = before

    def run(self, block: _BlockForward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call of a block, on every rank of the team."""
        key = (block.identity, call_signature(args, kwargs))
        plan = self._plans.get(key)
        if plan is not None:
            return self._own_tokens(block, plan, args, kwargs)
        plan = plan_block(block.name, block.module, block.forward, args, kwargs)
        try:
            made = self._own_tokens(block, plan, args, kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            if isinstance(error, UsageError) or not _is_of_shapes(error):
                raise
            raise UsageError(
                f"--sequence_parallel {self.exchange.size} cannot split {block.name} "
                f"({type(block.module).__name__}) by tokens: {error}. Leave the option out"
            ) from error
        self._check(block, made, args, kwargs)
        self._plans[key] = plan
        return made

    def _shares(self, name: str, plan: BlockPlan) -> Shares:
        size = self.exchange.size
        for segment, length in plan.lengths.items():
            fewest = FEWEST_TOKENS if segment == "image" else 1
            if length < fewest * size:
                raise UsageError(
                    f"--sequence_parallel {size}: {name} has {length} {segment} tokens, expected "
                    f"at least {fewest} for each rank: use fewer ranks or a larger image"
                )
        return Shares(plan.lengths, size, self.exchange.rank)

    def _own_tokens(self, block: _BlockForward, plan: BlockPlan, args: Any, kwargs: Any) -> Any:
        shares = self._shares(block.name, plan)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        for k, leaf in enumerate(leaves):
            if k in plan.inputs:
                leaves[k] = _own(leaf, shares, *plan.inputs[k])
            elif isinstance(leaf, Deferred):
                leaves[k] = leaf.fetch()
        own_args, own_kwargs = pytree.tree_unflatten(leaves, spec)
        with _SplitAttention(self.exchange, shares, plan, block.name):
            made = block.forward(*own_args, **own_kwargs)
        outputs, output_spec = pytree.tree_flatten(made)
        for k, (dim, axis) in plan.outputs.items():
            outputs[k] = self._deferred(outputs[k], shares, dim, axis)
        return pytree.tree_unflatten(outputs, output_spec)

    def _deferred(self, own: torch.Tensor, shares: Shares, dim: int, axis: Axis) -> Deferred:
        shape = list(own.shape)
        shape[dim] = shares.length(axis)
        like = torch.empty(shape, dtype=own.dtype, device="meta")
        rows = _Rows(shares, dim, axis, own)
        return Deferred(
            like, own.device, lambda: gather(self.exchange, shares, own, dim, axis), rows
        )

    def _check(self, block: _BlockForward, made: Any, args: Any, kwargs: Any) -> None:
        """Compares a first call with the whole block, on every rank.

        Raises:
            UsageError: they differ by more than rounding.
        """
        self.exchange.repeats = False
        args, kwargs = fetched((args, kwargs))
        whole = pytree.tree_leaves(block.forward(*args, **kwargs))
        for k, leaf in enumerate(pytree.tree_leaves(fetched(made))):
            if not isinstance(leaf, torch.Tensor):
                continue
            found = difference_beyond_rounding(leaf, whole[k])
            if found is None:
                continue
            raise UsageError(
                f"--sequence_parallel {self.exchange.size} cannot split {block.name} "
                f"({type(block.module).__name__}) by tokens: output {k} was compared with that of "
                f"the whole block, and it {found}. Leave the option out"
            )


class _BlockForward:
    """A block's ``forward`` while its model's tokens are split."""

    def __init__(self, owner: TokenBlocks, name: str, module: nn.Module):
        self.owner, self.name, self.module = owner, name, module
        self.forward = module.forward
        shapes = tuple((n, tuple(p.shape), p.dtype) for n, p in module.named_parameters())
        #: Equal for blocks that one plan serves.
        self.identity = (type(module), str(module), shapes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.owner.active:
            return self.forward(*args, **kwargs)
        return self.owner.run(self, args, kwargs)


class _SplitAttention(TorchFunctionMode):
    """Inside a block: its attention calls become exchanges, in the order of the plan."""

    def __init__(self, exchange: Exchange, shares: Shares, plan: BlockPlan, name: str):
        super().__init__()
        self.exchange, self.shares, self.name = exchange, shares, name
        self._axes = iter(plan.attention)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        axes: AttentionAxes | None = next(self._axes, None)
        if axes is None:
            raise UsageError(f"{self.name} has more attention calls than in the probe")
        return attend(self.exchange, self.shares, axes, func, *args, **kwargs)


def _own(leaf: torch.Tensor, shares: Shares, dim: int, axis: Axis) -> torch.Tensor:
    """This rank's tokens of an argument: as the last block left them, or cut from the whole."""
    rows = leaf.rows if isinstance(leaf, Deferred) else None
    if rows is not None and (rows.shares, rows.dim, rows.axis) == (shares, dim, axis):
        return rows.tensor
    whole = leaf.fetch() if isinstance(leaf, Deferred) else leaf
    return shares.cut(whole, dim, axis)


def _is_of_shapes(error: Exception) -> bool:
    """Whether a block failed because it does not run on a share of its tokens, not for memory."""
    is_of_device = isinstance(error, (torch.AcceleratorError, torch.OutOfMemoryError))
    return not is_of_device and "DefaultCPUAllocator" not in str(error)


def call_signature(args: Any, kwargs: Any) -> Any:
    """Equal for calls that one plan serves."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    parts: list[Any] = [str(spec)]
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            parts.append((tuple(leaf.shape), leaf.dtype))
        else:
            parts.append(leaf if isinstance(leaf, (bool, int, str, type(None))) else type(leaf))
    return tuple(parts)
