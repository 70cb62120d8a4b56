"""Shows that a model keeps the rows of its batch independent, or names the operation that may not.

A model runs twice on fake tensors, with two batch sizes. `Recorder` notes the first run; `RowFlow`
follows, in the second, which dim of every value is the batch's. Each operation on such values must
be one that is known to keep rows independent, and be used so; everything else counts as mixing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ddinfer.parallel.tensor_tree import storage_id, tensors_of


class Recorded(NamedTuple):
    """One operation: its name, its results' shapes, and its arguments that are no tensors."""

    name: str
    shapes: list[tuple[int, ...]]
    constants: list[Any]


class Recorder(TorchDispatchMode):
    """Notes every operation of a run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Recorded] = []
        self._alive: list[Any] = []  # what an address names only while it lives

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = pytree.tree_leaves((args, kwargs or {}))
        constants = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        if str(func).startswith("aten.lift_fresh"):  # a tensor that Python has made
            constants += [t.tolist() for t in tensors_of(args) if type(t) is torch.Tensor]
        made = func(*args, **(kwargs or {}))
        found = tensors_of(made)
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
        dim: counted from the end (negative), as broadcasting does; 0: where the sizes differ.
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


class RowFlow(Recorder):
    """Follows the second run.

    Args:
        first: of the run with ``batches[0]`` rows; this run has ``batches[1]``.
    """

    def __init__(self, first: Recorder, batches: tuple[int, int]):
        super().__init__()
        self.first, self.batches = first.operations, batches
        self._states: dict[int, Rows | str] = {}  # tensor → its rows, or what mixed them
        self._mixed_storages: dict[int, str] = {}
        self._diverged: str | None = None

    def mark(self, tensor: torch.Tensor) -> None:
        """The first dim of ``tensor`` is the batch."""
        self._alive.append(tensor)
        self._states[id(tensor)] = Rows(-tensor.dim())

    def offending_op(self, values: Any) -> str | None:
        """The operation that may have mixed rows in what ``values`` depend on, if there is one."""
        if self._diverged is None and len(self.operations) != len(self.first):
            return "the number of operations depends on the batch size"
        states = [self._diverged, *(self._state(tensor) for tensor in tensors_of(values))]
        return next((state for state in states if isinstance(state, str)), None)

    def _state(self, tensor: torch.Tensor) -> Rows | str | None:
        return self._mixed_storages.get(storage_id(tensor)) or self._states.get(id(tensor))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        states = {id(t): self._state(t) for t in tensors_of((args, kwargs))}
        written = [(t, states[id(t)]) for t in _written(func, args, kwargs)]
        made = super().__torch_dispatch__(func, types, args, kwargs)
        found, now, number = tensors_of(made), self.operations[-1], len(self.operations) - 1
        before = self.first[number] if number < len(self.first) else None
        if before is None or before.name != now.name or len(before.shapes) != len(found):
            self._diverged = (
                self._diverged or f"the operations depend on the batch size, from {func} on"
            )
        if self._diverged is not None or before is None:
            return made
        operation = _Operation(func, args, kwargs, states, before, now, self.batches)
        results = [operation.result(k) for k in range(len(found))]
        for tensor, state in zip(found, results, strict=True):
            if state is not None:
                self._states[id(tensor)] = state
            elif written:
                self._states.pop(id(tensor), None)
        for target, was in written:
            state = results[0] if found else str(func)
            is_unclear = isinstance(was, Rows) and was.inner is None
            if isinstance(state, str) or (isinstance(state, Rows) and is_unclear):
                self._alive.append(target.untyped_storage())
                mixed = state if isinstance(state, str) else str(func)
                self._mixed_storages[storage_id(target)] = mixed
        return made


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for k, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += tensors_of(args[k] if k < len(args) else kwargs.get(argument.name))
    return found


class _Operation:
    """One operation, and what it makes of the rows it is given.

    Attributes:
        given: the arguments that have rows, in order; ``dims`` and ``rows`` are theirs.
        shape, before: of the result, in this run and the first.
    """

    def __init__(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        states: dict[int, Rows | str | None],
        before: Recorded,
        now: Recorded,
        batches: tuple[int, int],
    ):
        self.func, self.batches, self._before, self._now = func, batches, before, now
        self.name = str(func).split(".")[1]
        self.tensors = tensors_of((args, kwargs))
        self.mixed = next((s for s in states.values() if isinstance(s, str)), None)
        self._states = {k: s for k, s in states.items() if isinstance(s, Rows)}
        self.given = [t for t in self.tensors if id(t) in self._states]
        self.rows = [self._states[id(t)] for t in self.given]
        self.has_equal_constants = now.constants == before.constants
        self.first_constants = before.constants
        self._arguments = {
            a.name: args[k] if k < len(args) else kwargs.get(a.name, a.default_value)
            for k, a in enumerate(func._schema.arguments)
        }
        self.shape: tuple[int, ...] = ()
        self.before: tuple[int, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def get(self, name: str) -> Any:
        return self._arguments.get(name)

    def __contains__(self, name: str) -> bool:
        return name in self._arguments

    def result(self, number: int) -> Rows | str | None:
        """What the operation's tensor is; ``None`` where it does not depend on the batch."""
        if self.mixed is not None:
            return self.mixed
        is_random = torch.Tag.nondeterministic_seeded in self.func.tags
        if is_random and not (self.name in ATTENTION.split() and not self.get("dropout_p")):
            return str(self.func)  # other numbers for each microbatch
        self.shape, self.before = self._now.shapes[number], self._before.shapes[number]
        if not self.given and self.shape == self.before and self.has_equal_constants:
            return None
        rule = RULES.get(self.name) or RULES.get(self.name.removesuffix("_"))
        if rule is None and torch.Tag.pointwise in self.func.tags:
            rule = RULES["pointwise"]
        try:
            require(rule is not None)
            expected = rule(self) if rule is not None else None
            return expected and self._checked(expected)
        except _Mixed:
            return str(self.func)

    def _checked(self, expected: Rows) -> Rows:
        """The rows where this run's sizes differ from the first's, which must be as expected."""
        dim = self.changed_dim()
        require(expected.dim in (0, dim - len(self.shape)))
        if expected.outer is not None and expected.inner is not None:
            rest = expected.outer * expected.inner
            sizes = tuple(rest * batch for batch in self.batches)
            require((self.before[dim], self.shape[dim]) == sizes)
        return replace(expected, dim=dim - len(self.shape))

    # --- what rules ask ---------------------------------------------------------------------

    def changed_dim(self) -> int:
        """The only dim whose size is not that of the first run."""
        require(len(self.before) == len(self.shape))
        changed = [d for d, n in enumerate(self.shape) if n != self.before[d]]
        require(len(changed) == 1)
        return changed[0]

    def state(self, tensor: Any) -> Rows | None:
        return self._states.get(id(tensor))

    def only(self, *names: str) -> bool:
        """Whether no other argument has rows."""
        return set(map(id, self.given)) <= {id(t) for n in names for t in tensors_of(self.get(n))}

    def is_first_dim(self) -> bool:
        return all(s.dim == -t.dim() for t, s in zip(self.given, self.rows, strict=True))

    def is_aligned(self) -> bool:
        """Whether all rows are at one place."""
        return len({s.dim for s in self.rows}) == 1

    def common(self) -> Rows:
        """What all given rows have in common, without a dim."""
        outer = {s.outer for s in self.rows} - {None}
        inner = {s.inner for s in self.rows} - {None}
        require(bool(self.rows) and len(outer) <= 1 and len(inner) <= 1)
        require(not any(s.is_index for s in self.rows))
        return Rows(0, next(iter(outer), None), next(iter(inner), None))


def require(condition: bool) -> None:
    if not condition:
        raise _Mixed


# --- rules: an operation that is known to keep rows independent → its result's rows ---------------

Result = Callable[[_Operation], Rows | None]
RULES: dict[str, Result] = {}
ATTENTION = """
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
    _scaled_dot_product_attention_math _scaled_dot_product_attention_math_for_mps
    _scaled_dot_product_fused_attention_overrideable
"""


def _rule(names: str) -> Callable[[Result], Result]:
    def register(rule: Result) -> Result:
        RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return register


def _keeps(names: str, condition: Callable[[_Operation], bool] = lambda op: True) -> None:
    """These keep rows as they are, where the condition is met and no constant has changed."""

    def rule(op: _Operation) -> Rows:
        require(bool(op.given) and op.has_equal_constants and condition(op))
        return op.common()

    _rule(names)(rule)


def _looks_elsewhere(op: _Operation) -> bool:
    """Looks along dims, of which none is the batch's."""
    name = next((name for name in ("dim", "dims", "dimension") if name in op), None)
    asked = op[name] if name else ()
    dims = asked if isinstance(asked, (list, tuple)) else [asked]
    if not dims or not all(isinstance(d, int) for d in dims):
        return False
    for tensor, rows in zip(op.given, op.rows, strict=True):
        if op.name != "stack" and rows.dim in (d if d < 0 else d - tensor.dim() for d in dims):
            return False
    return op.is_aligned()


def _is_not_padded(op: _Operation) -> bool:
    dim = -op.rows[0].dim
    return op.only("self") and not any(op["pad"][2 * dim - 2 : 2 * dim])


_keeps(
    "_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin flip sort "
    "argsort topk roll select split split_with_sizes unbind unfold glu squeeze",
    _looks_elsewhere,
)
_keeps(
    "cat stack gather scatter",
    lambda op: len(op.given) == len(op.tensors) and _looks_elsewhere(op),
)
_keeps("index_select", lambda op: op.only("self") and _looks_elsewhere(op))
_keeps(  # a reduction over the batch shows in the result's sizes
    "sum mean amax amin max min argmax argmin any all prod var std var_mean std_mean "
    "linalg_vector_norm logsumexp",
    lambda op: op.only("self"),
)
_keeps(
    "convolution avg_pool2d avg_pool3d max_pool2d_with_indices _adaptive_avg_pool2d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
    "upsample_bicubic2d pixel_shuffle pixel_unshuffle im2col reflection_pad2d replication_pad2d "
    "replication_pad3d",
    lambda op: op.only("input", "self") and op.is_first_dim() and op.given[0].dim() > 2,
)
_keeps(
    "_native_batch_norm_legit_no_training native_batch_norm",
    lambda op: op.only("input") and op.is_first_dim() and not (op.get("training")),
)
_keeps(
    "native_layer_norm _fused_rms_norm",
    lambda op: op.only("input") and -op.rows[0].dim > len(op["normalized_shape"]),
)
_keeps(
    ATTENTION,
    lambda op: op.is_first_dim() and all(op.state(op[n]) for n in ("query", "key", "value")),
)
_keeps("embedding", lambda op: op.only("indices"))
_keeps("tril triu", lambda op: op.rows[0].dim < -2)
_keeps("constant_pad_nd", _is_not_padded)


@_rule("native_group_norm")
def _group_norm(op: _Operation) -> Rows:
    require(op.only("input") and op.is_first_dim() and op.given[0].dim() > 2)
    return op.common()  # the batch is an argument of its own


@_rule("pointwise copy fill zero complex polar where masked_fill")
def _pointwise(op: _Operation) -> Rows:
    require(op.has_equal_constants and op.is_aligned())
    return replace(op.common(), dim=op.rows[0].dim)


@_rule(
    "t transpose permute unsqueeze squeeze_copy movedim alias detach clone _to_copy contiguous "
    "view_as_real view_as_complex lift_fresh lift_fresh_copy positive _conj _neg_view"
)
def _same(op: _Operation) -> Rows:
    """Another order of dims, or another dtype."""
    require(op.has_equal_constants and len(op.given) == 1)
    return replace(op.rows[0], dim=0)


@_rule("expand")
def _expand(op: _Operation) -> Rows:
    return replace(op.rows[0], dim=0) if op.given else Rows(0)


@_rule("view _unsafe_view reshape _reshape_alias")
def _view(op: _Operation) -> Rows:
    require(len(op.given) == 1 and "dtype" not in op)
    tensor, rows = op.given[0], op.rows[0]
    if rows.outer is None or rows.inner is None:
        return Rows(0, None, None)
    step = rows.inner * math.prod(tensor.shape[tensor.dim() + rows.dim + 1 :])
    dim = op.changed_dim()
    below, size = math.prod(op.shape[dim + 1 :]), op.shape[dim]
    require(below > 0 and step % below == 0)
    inner = step // below
    require(size % (inner * op.batches[1]) == 0)
    outer = size // (inner * op.batches[1])
    return Rows(0, outer, inner, rows.is_index and outer == inner == 1)


@_rule("slice")
def _slice(op: _Operation) -> Rows:
    tensor, rows = op["self"], op.state(op["self"])
    if rows is not None and op["dim"] % tensor.dim() - tensor.dim() == rows.dim:
        require(op["step"] == 1 and op.shape == tuple(tensor.shape))  # x[:len(x)], all of it
        return rows
    require(op.has_equal_constants and _looks_elsewhere(op))
    return op.common()


@_rule("mm addmm bmm baddbmm")
def _mm(op: _Operation) -> Rows:
    *_, left, right = (n for n in ("self", "mat1", "batch1", "mat2", "batch2") if n in op)
    a, b, is_batched = op.state(op[left]), op.state(op[right]), op.name in ("bmm", "baddbmm")
    if a is not None and b is not None:
        require(is_batched and a.dim == b.dim == -3)
    elif a is not None:
        require(a.dim == -2)  # with a batch of its own on both sides, both would have rows
    result = a or b
    require(op.has_equal_constants and result is not None)
    assert result is not None
    require(a is not None or result.dim == -1)
    bias = op.state(op["self"]) if left != "self" else None
    require(bias is None or bias.dim == result.dim)
    return replace(op.common(), dim=result.dim)


@_rule("repeat")
def _repeat(op: _Operation) -> Rows:
    tensor, repeats = op["self"], op["repeats"]
    if op.given:
        require(op.has_equal_constants and repeats[op.rows[0].dim] == 1)
        return op.common()
    dim = op.changed_dim() - len(op.shape)
    require(repeats[dim] == op.batches[1])
    return Rows(0, 1, tensor.shape[dim] if -dim <= tensor.dim() else 1)


@_rule(
    "zeros ones empty full new_zeros new_ones new_empty new_full zeros_like ones_like empty_like "
    "full_like"
)
def _filled(op: _Operation) -> Rows | None:
    """Equal elements, as many as there are rows."""
    if "size" not in op and op.given:  # like another tensor
        require(op.has_equal_constants)
        return replace(op.rows[0], is_index=False)
    require("size" in op)
    values = [op["fill_value"]] if "fill_value" in op else []
    require(op.first_constants[len(op["size"]) :][: len(values)] == values)
    if op.shape == op.before:
        return None
    is_batch = op.shape[op.changed_dim()] == op.batches[1]
    return Rows(0) if is_batch else Rows(0, None, None)


@_rule("arange")
def _arange(op: _Operation) -> Rows:
    is_from_zero = all(op[name] == n for name, n in (("start", 0), ("step", 1)) if name in op)
    require(is_from_zero and op.shape == (op.batches[1],))
    return Rows(0, is_index=True)


@_rule("index")
def _index(op: _Operation) -> Rows:
    tensor, indices = op["self"], op["indices"]
    require(op.has_equal_constants)
    rows, others = op.state(tensor), [op.state(t) for t in indices]
    require(len({s.dim for s in others if s is not None}) <= 1)
    require(all(t is None or t.dtype not in (torch.bool, torch.uint8) for t in indices))
    if rows is None:  # a table, looked up by what the rows say
        return op.common()
    place = tensor.dim() + rows.dim
    chosen = indices[place] if place < len(indices) else None
    if chosen is None:
        require(not any(others))
        return op.common()
    state = op.state(chosen)
    require(state is not None and state.is_index and rows.outer == rows.inner == 1)
    return Rows(0)
