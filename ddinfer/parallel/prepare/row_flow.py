"""Shows that a model keeps the rows of its batch apart, or names the operation that may not.

A model runs twice on fake tensors, with two batch sizes. `Recorder` notes the first run; `RowFlow`
follows, in the second, which dim of every value is the batch's. Each operation on such values must
be one that is known to keep rows apart, and be used so; everything else counts as mixing them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Recorded(NamedTuple):
    """One operation of the first run."""

    name: str
    shapes: list[tuple[int, ...]]
    constants: list[Any]


class Recorder(TorchDispatchMode):
    """Notes every operation of a run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Recorded] = []
        self._alive: list[Any] = []  # as `RowFlow` does: torch detaches what others hold

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        constants = _constants(func, args, kwargs or {})
        made = func(*args, **(kwargs or {}))
        found = _tensors(made)
        self._alive += found
        self.operations.append(Recorded(str(func), [tuple(t.shape) for t in found], constants))
        return made

    @property
    def names(self) -> list[str]:
        return [operation.name for operation in self.operations]


@dataclass(frozen=True)
class Rows:
    """A value that has one row (or block of rows) per row of the batch.

    Attributes:
        dim: counted from the end (negative), as broadcasting does.
        outer, inner: the dim has ``outer * batch * inner`` elements, in this order; ``None`` where
            every order is right, since all elements are equal.
        is_index: the values are the numbers of the rows.
    """

    dim: int
    outer: int | None = 1
    inner: int | None = 1
    is_index: bool = False


class _Mixed(Exception):
    """An operation may make a row of its result from several rows of the batch."""


class RowFlow(TorchDispatchMode):
    """Follows the second run.

    Args:
        first: of the run with ``batches[0]`` rows; this run has ``batches[1]``.
    """

    def __init__(self, first: Recorder, batches: tuple[int, int]):
        super().__init__()
        self._first = iter(first.operations)
        self.batches = batches
        self._states: dict[int, Rows | str] = {}  # tensor → its rows, or what mixed them
        self._mixed_storages: dict[int, str] = {}
        self._diverged: str | None = None
        self._alive: list[Any] = []  # what an address names only while it lives

    def mark(self, tensor: torch.Tensor) -> None:
        """``tensor`` is cut into rows along its first dim."""
        self._alive.append(tensor)
        self._states[id(tensor)] = Rows(-tensor.dim())

    def culprit(self, values: Any) -> str | None:
        """The operation that may have mixed rows in what ``values`` depend on, if there is one."""
        if self._diverged is None and next(self._first, None) is not None:
            self._diverged = "the number of operations depends on the batch size"
        if self._diverged is not None:
            return self._diverged
        states = (self.state(tensor) for tensor in _tensors(values))
        return next((state for state in states if isinstance(state, str)), None)

    def state(self, tensor: torch.Tensor) -> Rows | str | None:
        return self._mixed_storages.get(_storage(tensor)) or self._states.get(id(tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        constants = _constants(func, args, kwargs)
        given = [(t, self.state(t)) for t in _tensors((args, kwargs))]
        written = [(t, self.state(t)) for t in _written(func, args, kwargs)]
        made = func(*args, **kwargs)
        found = _tensors(made)
        self._alive += found
        before = next(self._first, None)
        if self._diverged is None and (
            before is None or before.name != str(func) or len(before.shapes) != len(found)
        ):
            self._diverged = f"the operations depend on the batch size, from {func} on"
        if self._diverged is not None or before is None:
            return made
        operation = _Operation(func, args, kwargs, given, found, before, constants, self.batches)
        for k, tensor in enumerate(found):
            state = operation.result(k)
            if state is not None:
                self._states[id(tensor)] = state
            elif id(tensor) in self._states and written:
                del self._states[id(tensor)]
        for target, was in written:
            state = operation.result(0) if found else str(func)
            is_unclear = isinstance(was, Rows) and was.inner is None
            if isinstance(state, str) or (isinstance(state, Rows) and is_unclear):
                self._alive.append(target.untyped_storage())
                self._mixed_storages[_storage(target)] = (
                    state if isinstance(state, str) else str(func)
                )
        return made


class _Operation:
    """One operation, and what it makes of the rows it is given."""

    def __init__(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        given: list[tuple[torch.Tensor, Rows | str | None]],
        made: list[torch.Tensor],
        before: Recorded,
        constants: list[Any],
        batches: tuple[int, int],
    ):
        self.func, self.made, self.before, self.batches = func, made, before, batches
        self.name = str(func).split(".")[1]
        self.states = {id(t): s for t, s in given}
        self.given = [(t, s) for t, s in given if isinstance(s, Rows)]
        self.all_given = [t for t, _ in given]
        self.mixed = next((s for _, s in given if isinstance(s, str)), None)
        self.has_equal_constants = constants == before.constants
        self.arguments = {
            a.name: args[k] if k < len(args) else kwargs.get(a.name, a.default_value)
            for k, a in enumerate(func._schema.arguments)
        }

    def result(self, number: int) -> Rows | str | None:
        """What the operation's tensor is; ``None`` where it does not depend on the batch."""
        if self.mixed is not None:
            return self.mixed
        if torch.Tag.nondeterministic_seeded in self.func.tags and not self._is_constant_random():
            return str(self.func)  # other numbers for each microbatch
        is_same = tuple(self.made[number].shape) == self.before.shapes[number]
        if not self.given and is_same and self.has_equal_constants:
            return None
        try:
            expected = self._rule()(self)
            return expected and self._checked(expected, self.made[number], number)
        except _Mixed:
            return str(self.func)

    def _is_constant_random(self) -> bool:
        """Attention without dropout has the tag, but draws nothing."""
        return self.name in ATTENTION and not self.arguments.get("dropout_p")

    def _rule(self) -> Callable[[_Operation], Rows | None]:
        name = self.name
        if name in RULES:
            return RULES[name]
        if name.removesuffix("_") in RULES and name.endswith("_"):
            return RULES[name.removesuffix("_")]
        if torch.Tag.pointwise in self.func.tags:
            return _pointwise
        raise _Mixed

    def _checked(self, expected: Rows, made: torch.Tensor, number: int) -> Rows:
        """The rows where this run's sizes differ from the first's, which must be as expected."""
        before, now = self.before.shapes[number], tuple(made.shape)
        if len(before) != len(now):
            raise _Mixed
        changed = [d for d, (a, b) in enumerate(zip(before, now, strict=True)) if a != b]
        if len(changed) != 1:
            raise _Mixed
        dim = changed[0]
        if expected.dim and expected.dim != dim - len(now):
            raise _Mixed
        if expected.outer is not None and expected.inner is not None:
            rest = expected.outer * expected.inner
            if (before[dim], now[dim]) != tuple(rest * batch for batch in self.batches):
                raise _Mixed
        return replace(expected, dim=dim - len(now))

    # --- what rules ask ---------------------------------------------------------------------

    def require(self, condition: bool) -> None:
        if not condition:
            raise _Mixed

    def state(self, tensor: Any) -> Rows | None:
        found = self.states.get(id(tensor)) if isinstance(tensor, torch.Tensor) else None
        return found if isinstance(found, Rows) else None

    def common(self) -> Rows:
        """What all given rows have in common, without a dim."""
        outer = {s.outer for _, s in self.given} - {None}
        inner = {s.inner for _, s in self.given} - {None}
        self.require(bool(self.given) and len(outer) <= 1 and len(inner) <= 1)
        self.require(not any(s.is_index for _, s in self.given))
        return Rows(0, next(iter(outer), None), next(iter(inner), None))

    def only(self, *names: str) -> None:
        """Requires that no other argument has rows."""
        allowed = {id(t) for name in names for t in _tensors(self.arguments.get(name))}
        self.require(all(id(t) in allowed for t, _ in self.given))


# --- rules: an operation → its result's rows (``dim`` 0: where the sizes differ) -----------------


def _pointwise(op: _Operation) -> Rows:
    op.require(op.has_equal_constants and len({s.dim for _, s in op.given}) == 1)
    return replace(op.common(), dim=op.given[0][1].dim)


def _same(op: _Operation) -> Rows:
    """Another order of dims, or another dtype."""
    op.require(op.has_equal_constants and len(op.given) == 1)
    return replace(op.given[0][1], dim=0)


def _expand(op: _Operation) -> Rows:
    return replace(op.given[0][1], dim=0) if op.given else Rows(0)


def _view(op: _Operation) -> Rows:
    op.require(len(op.given) == 1 and "dtype" not in op.arguments)
    tensor, rows = op.given[0]
    if rows.outer is None or rows.inner is None:
        return Rows(0, None, None)
    step = rows.inner * math.prod(tensor.shape[tensor.dim() + rows.dim + 1 :])
    made = tuple(op.made[0].shape)
    changed = [d for d, (a, b) in enumerate(zip(op.before.shapes[0], made, strict=False)) if a != b]
    op.require(len(changed) == 1)
    below, size = math.prod(made[changed[0] + 1 :]), made[changed[0]]
    op.require(below > 0 and step % below == 0)
    inner = step // below
    op.require(size % (inner * op.batches[1]) == 0)
    outer = size // (inner * op.batches[1])
    return Rows(0, outer, inner, rows.is_index and outer == inner == 1)


def _along(op: _Operation) -> Rows:
    """Looks along dims, of which none may be the batch's."""
    names = [name for name in ("dim", "dims", "dimension") if name in op.arguments]
    op.require(bool(names))
    asked = op.arguments[names[0]]
    dims = asked if isinstance(asked, (list, tuple)) else [asked]
    op.require(bool(dims) and all(isinstance(d, int) for d in dims))
    added = 1 if op.name == "stack" else 0
    for tensor, rows in op.given:
        along = [d if d < 0 else d - tensor.dim() - added for d in dims]
        op.require(op.name == "stack" or rows.dim not in along)
    op.require(op.has_equal_constants)
    return _aligned(op)


def _aligned(op: _Operation) -> Rows:
    """All tensors have the batch at one place."""
    op.require(len({s.dim for _, s in op.given}) == 1)
    return op.common()


def _slice(op: _Operation) -> Rows:
    rows = op.state(op.arguments["self"])
    if rows is not None:
        tensor = op.arguments["self"]
        dim = op.arguments["dim"]
        if (dim if dim < 0 else dim - tensor.dim()) == rows.dim:  # x[:len(x)], all of it
            op.require(op.arguments["step"] == 1 and op.made[0].shape == tensor.shape)
            return rows
    return _along(op)


def _join(op: _Operation) -> Rows:
    """``cat`` and ``stack``: every tensor has the batch, at one place."""
    op.require(len(op.given) == len(op.all_given))
    return _along(op)


def _pick(op: _Operation) -> Rows:
    """``gather`` and ``scatter``: every tensor has the batch, at one place."""
    op.require(len(op.given) == len(op.all_given))
    return _along(op)


def _index_select(op: _Operation) -> Rows:
    op.only("self")
    return _along(op)


def _reduce(op: _Operation) -> Rows:
    """Without the batch's dim in the result, that shows in its sizes."""
    op.require(op.has_equal_constants)
    op.only("self")
    return op.common()


def _mm(op: _Operation) -> Rows:
    left, right = ("mat1", "mat2") if "mat1" in op.arguments else ("self", "mat2")
    if "batch1" in op.arguments:
        left, right = "batch1", "batch2"
    a, b = op.state(op.arguments[left]), op.state(op.arguments[right])
    dims = 3 if op.name in ("bmm", "baddbmm") else 2
    if a is not None and b is not None:
        op.require(dims == 3 and a.dim == b.dim == -3)
    elif a is not None:
        op.require(a.dim == -2)  # with a batch of its own on both sides, both would have rows
    elif b is not None:
        op.require(b.dim == -1)
    bias = op.state(op.arguments["self"]) if "self" not in (left, right) else None
    op.require(op.has_equal_constants and (a or b) is not None)
    result = a or b
    assert result is not None
    op.require(bias is None or bias.dim == result.dim)
    return replace(op.common(), dim=result.dim)


def _batch_first(op: _Operation) -> Rows:
    """Convolution, pooling, normalization of channels: the batch is the first dim of the input."""
    op.only("input", "self")
    tensor, rows = op.given[0]
    op.require(rows.dim == -tensor.dim() and tensor.dim() > 2)
    op.require(op.has_equal_constants or op.name == "native_group_norm")
    return op.common()


def _batch_norm(op: _Operation) -> Rows:
    op.require(not op.arguments.get("training"))
    op.only("input")
    tensor, rows = op.given[0]
    op.require(rows.dim == -tensor.dim())
    return op.common()


def _attention(op: _Operation) -> Rows:
    op.require(op.has_equal_constants)
    for name in ("query", "key", "value"):
        op.require(op.state(op.arguments[name]) is not None)
    op.require(all(s.dim == -t.dim() for t, s in op.given))
    return op.common()


def _layer_norm(op: _Operation) -> Rows:
    op.require(op.has_equal_constants)
    op.only("input")
    op.require(-op.given[0][1].dim > len(op.arguments["normalized_shape"]))
    return op.common()


def _embedding(op: _Operation) -> Rows:
    op.require(op.has_equal_constants)
    op.only("indices")
    return op.common()


def _matrix_part(op: _Operation) -> Rows:
    op.require(op.has_equal_constants and op.given[0][1].dim < -2)
    return op.common()


def _pad(op: _Operation) -> Rows:
    op.only("self")
    pad, dim = op.arguments["pad"], -op.given[0][1].dim
    op.require(op.has_equal_constants and not any(pad[2 * dim - 2 : 2 * dim]))
    return op.common()


def _repeat(op: _Operation) -> Rows:
    tensor, repeats = op.arguments["self"], op.arguments["repeats"]
    if op.given:
        rows = op.given[0][1]
        op.require(op.has_equal_constants and repeats[rows.dim] == 1)
        return op.common()
    made, before = tuple(op.made[0].shape), op.before.shapes[0]
    dim = next(d - len(made) for d, (a, b) in enumerate(zip(before, made, strict=True)) if a != b)
    op.require(repeats[dim] == op.batches[1])
    return Rows(0, 1, tensor.shape[dim] if -dim <= tensor.dim() else 1)


def _filled(op: _Operation) -> Rows | None:
    """Equal elements, as many as there are rows."""
    if "size" not in op.arguments and op.given:  # like another tensor
        op.require(op.has_equal_constants)
        rows = op.given[0][1]
        return replace(rows, is_index=False)
    values = [a for a in pytree.tree_leaves(op.arguments.get("fill_value")) if a is not None]
    sizes = len(op.arguments["size"])
    op.require(op.before.constants[sizes:][: len(values)] == values)
    made = tuple(op.made[0].shape)
    grown = [b for a, b in zip(op.before.shapes[0], made, strict=True) if a != b]
    if not grown:
        return None
    return Rows(0) if grown == [op.batches[1]] else Rows(0, None, None)


def _arange(op: _Operation) -> Rows:
    start, step = op.arguments.get("start", 0), op.arguments.get("step", 1)
    op.require(start == 0 and step == 1 and tuple(op.made[0].shape) == (op.batches[1],))
    return Rows(0, 1, 1, is_index=True)


def _index(op: _Operation) -> Rows:
    tensor, indices = op.arguments["self"], op.arguments["indices"]
    op.require(op.has_equal_constants)
    rows, others = op.state(tensor), [op.state(t) for t in indices]
    op.require(len({s.dim for s in others if s is not None}) <= 1)
    op.require(all(t is None or t.dtype not in (torch.bool, torch.uint8) for t in indices))
    if rows is None:  # a table, looked up by what the rows say
        return op.common()
    place = tensor.dim() + rows.dim
    chosen = indices[place] if place < len(indices) else None
    if chosen is None:
        op.require(not any(others))
        return op.common()
    state = op.state(chosen)
    op.require(state is not None and state.is_index and rows.outer == rows.inner == 1)
    return Rows(0)


ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_fused_attention_overrideable",
)


def _rules(rule: Callable[[_Operation], Rows | None], names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), rule)


#: Operations that are known to keep rows apart, and when. Pointwise ones are known by their tag.
RULES: dict[str, Callable[[_Operation], Rows | None]] = {
    **_rules(
        _same,
        "t transpose permute unsqueeze squeeze_copy movedim alias detach clone _to_copy contiguous "
        "view_as_real view_as_complex lift_fresh lift_fresh_copy positive _conj _neg_view",
    ),
    **_rules(_expand, "expand"),
    **_rules(_view, "view _unsafe_view reshape _reshape_alias"),
    **_rules(
        _along,
        "_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin flip sort "
        "argsort topk roll select split split_with_sizes unbind unfold glu squeeze",
    ),
    **_rules(_slice, "slice"),
    **_rules(_join, "cat stack"),
    **_rules(_pick, "gather scatter"),
    **_rules(_index_select, "index_select"),
    **_rules(
        _reduce,
        "sum mean amax amin max min argmax argmin any all prod var std var_mean std_mean "
        "linalg_vector_norm logsumexp",
    ),
    **_rules(_mm, "mm addmm bmm baddbmm"),
    **_rules(
        _batch_first,
        "convolution native_group_norm avg_pool2d avg_pool3d max_pool2d_with_indices "
        "_adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d "
        "upsample_bilinear2d upsample_bicubic2d pixel_shuffle pixel_unshuffle im2col "
        "reflection_pad2d replication_pad2d replication_pad3d",
    ),
    **_rules(_batch_norm, "_native_batch_norm_legit_no_training native_batch_norm"),
    **_rules(_attention, " ".join(ATTENTION)),
    **_rules(_layer_norm, "native_layer_norm _fused_rms_norm"),
    **_rules(_embedding, "embedding"),
    **_rules(_matrix_part, "tril triu"),
    **_rules(_pad, "constant_pad_nd"),
    **_rules(_repeat, "repeat"),
    **_rules(
        _filled,
        "zeros ones empty full new_zeros new_ones new_empty new_full zeros_like ones_like "
        "empty_like full_like",
    ),
    **_rules(_arange, "arange"),
    **_rules(_index, "index"),
    **_rules(_pointwise, "copy fill zero complex polar where masked_fill"),
}


def _constants(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Arguments that are no tensors; the contents of a tensor that Python has made."""
    found: list[Any] = [
        leaf for leaf in pytree.tree_leaves((args, kwargs)) if not isinstance(leaf, torch.Tensor)
    ]
    if str(func).startswith("aten.lift_fresh"):
        found += [t.tolist() for t in _tensors(args) if type(t) is torch.Tensor]
    return found


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for k, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[k] if k < len(args) else kwargs.get(argument.name))
    return found


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
