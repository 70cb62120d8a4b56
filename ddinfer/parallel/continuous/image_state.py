"""Keeps the images in flight from seeing each other's state.

Diffusers pipelines keep state of one call on objects: schedulers and guiders count their steps, the
pipeline itself holds the guidance scale. Each image has a copy of those. The models are
shared, because of their weights, and the denoiser's blocks live on other ranks besides: a pipeline
whose call changes its denoiser cannot have several images in flight, and is refused by name.
"""

from __future__ import annotations

import copy
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ddinfer.errors import UsageError

_ADVICE = (
    "Images in flight share the denoiser, and the other ranks do not see the change; run this "
    "pipeline without pipeline parallelism"
)

#: Calls by which a pipeline's ``__call__`` replaces a model's attention or hooks into it.
_CHANGES_MODEL = re.compile(
    r"\b(set_attn_processor|_set_pag_attn_processor|register_forward_(?:pre_)?hook)\("
)


def check_pipeline_class(kind: type) -> None:
    """Refuses pipelines whose ``__call__`` changes the attention of a model.

    Others that change their denoiser are found when they do, by `refuse_changes`.

    Raises:
        UsageError: ``kind`` is one, such as a PAG pipeline.
    """
    try:
        source = inspect.getsource(kind.__call__)
    except (OSError, TypeError, AttributeError):  # no source: `refuse_changes` finds it
        return
    if found := _CHANGES_MODEL.search(source):
        raise UsageError(
            f"{kind.__name__} cannot have several images in flight: its call changes the model "
            f"with {found.group(1)}. {_ADVICE}"
        )


class PipelineCopies:
    """Makes each image's own pipeline: models and tokenizers shared, everything else copied.

    Raises:
        UsageError: an attribute of ``pipe`` cannot be copied.
    """

    def __init__(self, pipe: Any):
        self._pipe, self._shared = pipe, dict[int, Any]()
        for owner in (pipe, *(v for v in vars(pipe).values() if hasattr(v, "components"))):
            for component in owner.components.values():
                if isinstance(component, nn.Module):
                    self._shared |= {id(m): m for m in component.modules()}
                elif type(component).__module__.partition(".")[0] in ("transformers", "tokenizers"):
                    self._shared[id(component)] = component
        self.make()

    def make(self) -> Any:
        """A copy for one image. Nothing but weights, buffers and tokenizers is shared with others.

        Encoders and decoders run for one image at a time, so what they keep is not mixed up.
        """
        # Not by setattr: a pipeline's setattr would enter the copy into the shared config.
        pipe, shared = copy.copy(self._pipe), dict(self._shared)
        shared[id(self._pipe)] = pipe
        pipe.__dict__ = {k: self._copied(k, v, shared) for k, v in vars(self._pipe).items()}
        pipe.__dict__["_progress_bar_config"] = {"disable": True}
        return pipe

    def _copied(self, name: str, value: Any, shared: dict[int, Any]) -> Any:
        try:
            return copy.deepcopy(value, shared)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise UsageError(
                f"{type(self._pipe).__name__}.{name} cannot be copied ({error}), but each image "
                "in flight needs its own"
            ) from error


def converts_decoder(components: Mapping[str, Any]) -> bool:
    """Whether the pipeline converts its float16 VAE to float32 and back around each use (SDXL).

    Another image that looked at the VAE in between would take it for a float32 one.
    """
    return any(
        isinstance(component, nn.Module)
        and getattr(getattr(component, "config", None), "force_upcast", False)
        and any(p.dtype == torch.float16 for p in component.parameters())
        for component in components.values()
    )


#: nn.Module's methods by which state gets onto a module.
_METHODS = ("__setattr__", "__delattr__", "register_forward_hook", "register_forward_pre_hook")

#: Written by diffusers' `cache_context` also when there are no hooks; a hook replaces ``forward``.
_ALLOWED = frozenset({"_diffusers_hook"})

_lock = threading.Lock()
_watches: list[_Watch] = []


class _Watch:
    def __init__(self, models: Mapping[str, nn.Module], name: str, applies: Callable[[], bool]):
        self.name, self.applies = name, applies
        self.paths = {
            id(module): f"{name}.{path}" if path else name
            for name, model in models.items()
            for path, module in model.named_modules()
        }

    def check(self, module: nn.Module, method: str, args: tuple[Any, ...]) -> None:
        path = self.paths.get(id(module))
        if path is None or not self.applies():
            return
        what = args[0] if method.endswith("attr__") and args else method
        if what not in _ALLOWED:
            raise UsageError(
                f"{self.name} changes its denoiser during a call ({path}: {what}). {_ADVICE}"
            )


@contextmanager
def refuse_changes(
    models: Mapping[str, nn.Module], name: str, applies: Callable[[], bool]
) -> Iterator[None]:
    """While it lasts, a change of an attribute or a hook of ``models`` raises `UsageError`.

    Args:
        models: by component name.
        name: of the pipeline, for the message.
        applies: whether the current thread is not allowed to.
    """
    watch = _Watch(models, name, applies)
    with _lock:
        if not _watches:
            _ORIGINAL.update({method: getattr(nn.Module, method) for method in _METHODS})
            for method, function in _ORIGINAL.items():
                setattr(nn.Module, method, _checked(method, function))
        _watches.append(watch)
    try:
        yield
    finally:
        with _lock:
            _watches.remove(watch)
            if not _watches:
                for method, function in _ORIGINAL.items():
                    setattr(nn.Module, method, function)


_ORIGINAL: dict[str, Any] = {}


def _checked(method: str, function: Any) -> Any:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for watch in tuple(_watches):
            watch.check(self, method, args)
        return function(self, *args, **kwargs)

    return call
