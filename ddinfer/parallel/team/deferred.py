"""`Deferred`: a tensor whose shape is known now and whose value is fetched when it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

aten = torch.ops.aten

#: Operations on a deferred tensor that stay deferred: they only look at a part of it.
_VIEWS = {
    aten.alias.default,
    aten.detach.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
}


class Deferred(torch.Tensor):
    """A tensor that another rank computes, or that lies in parts on several ranks.

    Views of it stay deferred. Any other operation calls ``fetch`` once and goes on with its value.

    Args:
        like: a tensor, also on meta, with the shape, strides and dtype of the value.
        device: of the value.
        fetch: returns the value. Where it lies in parts, every rank must call it.
        rows: what the rank of a sequence-parallel team holds of it; `None` once it is fetched.
    """

    # Without it, results would be wrapped in this class again.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        like: torch.Tensor,
        device: torch.device,
        fetch: Callable[[], torch.Tensor],
        rows: Any = None,
    ) -> Deferred:
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device
        )

    def __init__(
        self,
        like: torch.Tensor,
        device: torch.device,
        fetch: Callable[[], torch.Tensor],
        rows: Any = None,
    ):
        self._fetch: Callable[[], torch.Tensor] | None = fetch
        self._value: torch.Tensor | None = None
        self.rows = rows

    def fetch(self) -> torch.Tensor:
        """The value. From now on ``rows`` may be older than it, and are dropped."""
        if self._fetch is not None:
            self._value, self._fetch, self.rows = self._fetch(), None, None
        assert self._value is not None
        return self._value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        source = args[0] if args else None
        if func in _VIEWS and isinstance(source, Deferred) and source._fetch is not None:
            like = torch.empty_strided(
                source.shape, source.stride(), dtype=source.dtype, device="meta"
            )
            return Deferred(
                func(like, *args[1:], **(kwargs or {})),
                source.device,
                lambda: func(source.fetch(), *args[1:], **(kwargs or {})),
            )
        args, kwargs = fetched((args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Deferred(shape={tuple(self.shape)}, dtype={self.dtype})"


def fetched(tree: Any) -> Any:
    """The tree with the values of its deferred tensors, fetched in the tree's order."""
    return pytree.tree_map_only(Deferred, Deferred.fetch, tree)
