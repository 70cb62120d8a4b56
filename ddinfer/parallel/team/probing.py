"""Which dims of a block's arguments and outputs are token axes, found without a line per model.

The block runs on fake tensors whose token axes have lengths that nothing else has. A wrong guess
of what is an axis fails with a shape error, and the next one is tried; the right one shows the
lengths of each attention call and of the outputs. What a fake run cannot tell (a sum over tokens)
is found by `ddinfer.parallel.team.tokens`, which compares the first call with the whole block.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ddinfer.errors import UsageError
from ddinfer.parallel.blocks import faked
from ddinfer.parallel.team.attention import AttentionAxes
from ddinfer.parallel.team.shares import IMAGE, TEXT, Axis

#: Lengths in the fake run: primes that no model has as a width.
_PROBE = {IMAGE: 1009, TEXT: 211}
_JOINT = sum(_PROBE.values())
_MOST_TRIES = 200


@dataclass(frozen=True)
class BlockPlan:
    """How the tokens of one kind of block call are cut.

    Attributes:
        lengths: tokens of each segment that is cut.
        inputs: argument leaf → (dim, axis), for the tensors that are cut.
        outputs: output leaf → (dim, axis), for those that lie in parts.
        attention: axes of each attention call, in the order they run.
    """

    lengths: Mapping[str, int]
    inputs: Mapping[int, tuple[int, Axis]]
    outputs: Mapping[int, tuple[int, Axis]]
    attention: Sequence[AttentionAxes]


def plan_block(
    name: str, block: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> BlockPlan:
    """The plan of calls like this one.

    Args:
        name: of the block, for messages.
        forward: its own.

    Raises:
        UsageError: it cannot be found; the message says why the last try failed.
    """
    call = _Call(name, forward, args, kwargs)
    reason = ""
    for guess in call.guesses():
        try:
            return call.plan(guess, _run(block, forward, *call.arguments(guess)))
        except _WrongGuess as error:
            reason = reason or str(error)  # of the likeliest guess
    reason = reason or "none of its arguments is a tensor (batch, tokens, channels)"
    raise UsageError(
        f"--sequence_parallel cannot split {name} ({type(block).__name__}) by tokens: {reason}. "
        "Leave the option out"
    )


class _WrongGuess(Exception):
    """Why a guess cannot be right."""


class _Call:
    """One block call: which dims may be token axes."""

    def __init__(self, name: str, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.name = name
        self.leaves, self.spec = pytree.tree_flatten((args, kwargs))
        main, text = _tokens(forward, args, kwargs)
        self.main = next((k for k, leaf in enumerate(self.leaves) if leaf is main), None)
        self.text = next((k for k, leaf in enumerate(self.leaves) if leaf is text), None)
        if main is None or self.main is None:
            self.lengths: dict[str, int] = {}
            return
        self.lengths = {IMAGE: main.shape[1]}
        if text is not None and self.text is not None:
            self.lengths[TEXT] = text.shape[1]

    def guesses(self) -> Iterator[dict[tuple[int, int], Axis]]:
        """``(leaf, dim)`` → axis, likely ones first."""
        if not self.lengths:
            return
        sure: dict[tuple[int, int], Axis] = {}
        open_dims: list[tuple[tuple[int, int], list[Axis | None]]] = []
        for k, leaf in enumerate(self.leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            if k in (self.main, self.text):
                sure[k, 1] = (IMAGE,) if k == self.main else (TEXT,)
                continue
            for dim, size in enumerate(leaf.shape):
                if options := self._axes_of(size):
                    open_dims.append(((k, dim), [*options, None]))
        choices = itertools.product(*(options for _, options in open_dims))
        for choice in itertools.islice(choices, _MOST_TRIES):
            chosen = zip(open_dims, choice, strict=True)
            yield sure | {where: axis for (where, _), axis in chosen if axis is not None}

    def _axes_of(self, size: int) -> list[Axis]:
        axes: list[Axis] = [(name,) for name, length in self.lengths.items() if length == size]
        if len(self.lengths) == 2 and sum(self.lengths.values()) == size:
            axes.append((IMAGE, TEXT))
        return axes

    def arguments(self, guess: Mapping[tuple[int, int], Axis]) -> Any:
        """``(args, kwargs)`` of meta tensors with the probe's lengths."""
        leaves = []
        for k, leaf in enumerate(self.leaves):
            if isinstance(leaf, torch.Tensor):
                shape = list(leaf.shape)
                for dim in range(leaf.dim()):
                    if (k, dim) in guess:
                        shape[dim] = sum(_PROBE[segment] for segment in guess[k, dim])
                leaf = _Empty(tuple(shape), leaf.dtype, leaf.device)
            leaves.append(leaf)
        return pytree.tree_unflatten(leaves, self.spec)

    def plan(self, guess: Mapping[tuple[int, int], Axis], seen: _Seen) -> BlockPlan:
        joint = seen.joint
        outputs = {}
        for k, shape in seen.outputs.items():
            found = [
                (dim, axis) for dim, size in enumerate(shape) if (axis := _axis_of(size, joint))
            ]
            if len(found) > 1:
                raise _WrongGuess(f"output {k} has {len(found)} token axes")
            if found:
                outputs[k] = found[0]
        attention = [AttentionAxes(_axis_of(q, joint), _axis_of(k, joint)) for q, k in seen.lengths]
        for axes, (query, key) in zip(attention, seen.lengths, strict=True):
            if (axes.query is None and query > _PROBE[TEXT] and not self._is_batch(query)) or (
                axes.key is None and key > _JOINT
            ):
                raise _WrongGuess(f"its attention has {query} queries and {key} keys in the probe")
        used = {*itertools.chain(*(axis for _, axis in outputs.values()))}
        cuts_text = TEXT in used or any(
            axes.query is not None and TEXT in axes.query for axes in attention
        )
        segments = [IMAGE, TEXT] if cuts_text else [IMAGE]

        def cut(axis: Axis | None) -> Axis | None:
            if axis is None or not set(axis) <= set(segments):
                return None
            return joint if len(axis) == 2 else axis

        inputs: dict[int, tuple[int, Axis]] = {}
        for k in {leaf for leaf, _ in guess}:
            axes_of_leaf = [(dim, cut(axis)) for (leaf, dim), axis in guess.items() if leaf == k]
            found_axes = [(dim, axis) for dim, axis in axes_of_leaf if axis]
            is_mask = [dim for dim, _ in found_axes] == [self.leaves[k].dim() - 1]
            if is_mask and seen.has_pairs:
                continue  # the block makes a mask of pairs of it, and both stay whole
            if len(found_axes) == 1:  # a mask of pairs stays whole
                inputs[k] = found_axes[0]
        return BlockPlan(
            {segment: self.lengths[segment] for segment in segments},
            inputs,
            outputs,
            [AttentionAxes(cut(axes.query), cut(axes.key)) for axes in attention],
        )

    def _is_batch(self, size: int) -> bool:
        return any(isinstance(t, torch.Tensor) and size in t.shape for t in self.leaves)


def _tokens(forward: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The block's main tokens and its text tokens, where it has any."""
    bound = inspect.signature(forward).bind(*args, **kwargs).arguments

    def is_tokens(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() == 3 and value.is_floating_point()

    leaves = pytree.tree_leaves((args, kwargs))
    main = bound.get("hidden_states")
    if not is_tokens(main):
        main = next((leaf for leaf in leaves if is_tokens(leaf)), None)
    text = bound.get("encoder_hidden_states")
    return main, text if is_tokens(text) and text is not main else None


def _axis_of(size: int, joint: Axis | None) -> Axis | None:
    if size == _JOINT:
        if joint is None:
            raise _WrongGuess("it joins text and image tokens by something else than torch.cat")
        return joint
    return next(((name,) for name, length in _PROBE.items() if length == size), None)


@dataclass(frozen=True)
class _Empty:
    """A tensor of the fake run."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass
class _Seen:
    """What the fake run showed: the order of joint tokens, attention's lengths, output shapes.

    Attributes:
        has_pairs: an attention mask has a row for each query.
    """

    joint: Axis | None
    lengths: list[tuple[int, int]]
    has_pairs: bool
    outputs: dict[int, tuple[int, ...]]


class _Watch(TorchFunctionMode):
    """Notes how tokens are joined, and the lengths of each attention call."""

    def __init__(self) -> None:
        super().__init__()
        self.joints: set[Axis] = set()
        self.lengths: list[tuple[int, int]] = []
        self.has_pairs = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = _argument(args, kwargs, 0, "query"), _argument(args, kwargs, 1, "key")
            self.lengths.append((query.shape[-2], key.shape[-2]))
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if mask is not None and mask.dim() > 1 and mask.shape[-2] == query.shape[-2]:
                self.has_pairs |= mask.stride(-2) != 0
        elif func in (torch.cat, torch.concat, torch.concatenate):
            parts = _argument(args, kwargs, 0, "tensors")
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            sizes = [part.shape[dim] for part in parts if part.dim()]
            if sorted(sizes) == sorted(_PROBE.values()):
                names = {length: name for name, length in _PROBE.items()}
                self.joints.add(tuple(names[size] for size in sizes))
        return func(*args, **kwargs)


def _argument(args: Any, kwargs: Any, place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs[name]


def _run(block: nn.Module, forward: Any, args: Any, kwargs: Any) -> _Seen:
    """
    Raises:
        _WrongGuess: the block does not run on such shapes.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode, watch = FakeTensorMode(allow_non_fake_inputs=True), _Watch()

    def fake(empty: _Empty) -> torch.Tensor:
        with mode:
            return torch.empty(empty.shape, dtype=empty.dtype, device=empty.device)

    fakes = pytree.tree_map_only(_Empty, fake, (args, kwargs))
    given = [leaf for leaf in pytree.tree_leaves(fakes) if isinstance(leaf, torch.Tensor)]
    device = next((p.device for p in block.parameters()), torch.device("cpu"))
    before = [tensor._version for tensor in given]
    try:
        with _quiet(), torch.no_grad(), faked(block, mode, device), mode, watch:
            made = forward(*fakes[0], **fakes[1])
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _WrongGuess(first) from error
    if before != [tensor._version for tensor in given]:
        raise _WrongGuess("it changes its inputs in place")
    if len(watch.joints) > 1:
        raise _WrongGuess("it joins text and image tokens in two orders")
    outputs = {
        k: tuple(leaf.shape)
        for k, leaf in enumerate(pytree.tree_leaves(made))
        if isinstance(leaf, torch.Tensor)
    }
    return _Seen(next(iter(watch.joints), None), watch.lengths, watch.has_pairs, outputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch logs each shape that does not fit as an error; here it is a guess."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
