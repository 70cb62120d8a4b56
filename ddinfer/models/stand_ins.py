"""A parameter or buffer whose bytes are elsewhere, on the host or on disk.

It knows its shape and type and says the device where it will be computed. Any operation on it
fetches the bytes for that operation alone; so weights that are read outside their module's
``forward`` (tied heads, ``layer.weight`` in a parent) give the right result, only slowly.

A cast (``vae.to(dtype=torch.float32)``, which pipelines do around decoding) is remembered, and done
to the bytes whenever they are fetched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ddinfer.errors import UsageError

#: What can be answered from shape and type alone.
_KNOWN = {
    getattr(torch.Tensor, name)
    for name in (
        "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size",
        "is_floating_point", "is_complex", "is_contiguous", "storage_offset", "__len__",
        "requires_grad_", "is_signed",
    )
}  # fmt: skip
_KNOWN |= {
    getattr(torch.Tensor, name).__get__
    for name in (
        "shape", "dtype", "ndim", "layout", "requires_grad", "grad", "grad_fn", "is_leaf",
        "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes", "_version",
        "_backward_hooks", "is_mkldnn", "is_sparse_csr",
    )
    if hasattr(torch.Tensor, name)
}  # fmt: skip


class _StandIn:
    """What parked parameters and buffers have in common."""

    _fetch: Callable[[], torch.Tensor]
    _at: torch.device
    _dtypes: tuple[torch.dtype, ...]  # that of the bytes, then every type they are cast to

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is torch.Tensor.to and isinstance(args[0], _StandIn):
            dtype = _cast_alone(args[0], args[1:], kwargs)
            if dtype is not None:
                return _cast(args[0], dtype)
        if func == _SET_DATA and _is_cast_of(args[1], args[0]):
            args[0]._dtypes = args[1]._dtypes
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        name = getattr(func, "__name__", "")
        answer = _answer(func, name, args)
        if answer is not _UNANSWERED:
            return answer
        if args and isinstance(args[0], _StandIn) and _writes(name):
            raise UsageError(
                f"{name} would change a weight that is not in memory (it lies on the host or disk "
                "by a placement); undo the placement first"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*_fetched(args), **_fetched(kwargs))


_UNANSWERED = object()
_SET_DATA = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def _cast_alone(
    tensor: _StandIn, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> torch.dtype | None:
    """The type that ``tensor.to(*args, **kwargs)`` casts to, where it does nothing else."""
    given = [*args, *kwargs.values()]
    dtypes = [value for value in given if isinstance(value, torch.dtype)]
    others = [
        value
        for value in given
        if not isinstance(value, (torch.dtype, bool)) and value not in (None, tensor._at)
    ]
    return dtypes[0] if dtypes and not others and not kwargs.get("copy") else None


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    if tensor.dtype == dtype:
        return tensor
    dtypes = (*tensor._dtypes, dtype)
    if dtypes[-3:-2] == (dtype,) and torch.promote_types(dtype, dtypes[-2]) == dtypes[-2]:
        dtypes = dtypes[:-2]  # to a wider type and back changes no bit
    return make_stand_in(tensor, dtype, tensor._at, tensor._fetch, dtypes)


def _is_cast_of(value: Any, tensor: Any) -> bool:
    return isinstance(value, _StandIn) and value._fetch is tensor._fetch


def as_cast(tensor: torch.Tensor, stand_in: torch.Tensor) -> torch.Tensor:
    """The bytes that were fetched for a stand-in, cast as it was."""
    for dtype in stand_in._dtypes[1:]:  # type: ignore[attr-defined]
        tensor = tensor.to(dtype)
    return tensor


def _answer(func: Any, name: str, args: tuple[Any, ...]) -> Any:
    """Questions about where it is: where it will be computed."""
    if name != "__get__" or not args:
        return _UNANSWERED
    about = getattr(getattr(func, "__self__", None), "__name__", "")
    device = args[0]._at
    if about == "device":
        return device
    if about == "is_meta":
        return False
    if about.startswith("is_") and about[3:] in ("cuda", "cpu", "xpu", "mps"):
        return device.type == about[3:]
    return _UNANSWERED


def _writes(name: str) -> bool:
    return name in ("__set__", "__setitem__", "set_data") or (
        name.endswith("_") and not name.startswith("_") and name != "requires_grad_"
    )


def _fetched(value: Any) -> Any:
    if isinstance(value, _StandIn):
        return as_cast(value._fetch(), value)  # type: ignore[arg-type]
    if isinstance(value, (list, tuple)):
        items = [_fetched(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _fetched(item) for key, item in value.items()}
    return value


class StandInParameter(_StandIn, torch.nn.Parameter):
    """A parameter that is fetched when it is used."""


class StandInBuffer(_StandIn, torch.Tensor):
    """A buffer that is fetched when it is used."""


def is_stand_in(tensor: torch.Tensor) -> bool:
    """Whether it is a stand-in, whose bytes are elsewhere."""
    return isinstance(tensor, _StandIn)


def make_stand_in(
    like: torch.Tensor,
    dtype: torch.dtype,
    at: torch.device,
    fetch: Callable[[], torch.Tensor],
    dtypes: tuple[torch.dtype, ...] = (),
) -> torch.Tensor:
    """A stand-in for ``like``; ``fetch()`` gives its bytes on the device ``at``.

    Args:
        dtypes: the type of those bytes and all they are cast to; default: ``dtype`` alone.
    """
    with torch._C.DisableTorchFunctionSubclass():
        empty = torch.empty_like(like.detach(), device="meta", dtype=dtype)
    made: Any
    if isinstance(like, torch.nn.Parameter):
        made = torch.Tensor._make_subclass(StandInParameter, empty, like.requires_grad)
    else:
        made = torch.Tensor._make_subclass(StandInBuffer, empty, False)
    made._fetch, made._at, made._dtypes = fetch, at, dtypes or (dtype,)
    return made
