"""What a text encoder has answered before, it need not compute again within a job.

The negative prompt of a job, the empty one, and a prompt that makes several images go through the
encoders once for each image. The answer to the very same call (the same input tensors bit for bit,
the same other arguments) is kept here and given again: the same tensors, so the same image.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ddinfer.models.adapters import active_loras
from ddinfer.parallel.tensor_tree import UnsupportedValueError, fingerprint, tensors_of

#: Answers that are kept, in bytes, wherever they lie: the negative prompt and a few neighbours.
KEPT_BYTES = 64 * 10**6
#: Inputs larger than this are no token ids, and are not compared.
_LARGEST_INPUT_BYTES = 10**6


class EncodingCache:
    """The answers of a pipeline's text encoders, the least recently used dropped first.

    Only for a pipeline of our own, whose weights nobody changes while this is in use. An answer
    that somebody wrote into is not given again, and neither training nor autograd is touched.

    Args:
        pipe: a diffusers pipeline. Its components named ``text_encoder…`` get a ``forward`` of
            their own, until `undo`.

    Attributes:
        num_calls: of the encoders; ``num_hits`` of these were answered from here.
    """

    def __init__(self, pipe: Any, max_bytes: int = KEPT_BYTES):
        self.max_bytes = max_bytes
        self.num_calls = self.num_hits = 0
        self._answers: OrderedDict[Any, _Answer] = OrderedDict()
        self._lock = threading.Lock()  # images of a continuous pipeline have threads of their own
        self._num_bytes = 0
        self._forwards: list[tuple[torch.nn.Module, Any]] = []
        for name, module in pipe.components.items():
            if name.startswith("text_encoder") and isinstance(module, torch.nn.Module):
                self._forwards.append((module, vars(module).get("forward")))
                wrapped = functools.partial(self._forward, name, module, module.forward)
                vars(module)["forward"] = functools.wraps(module.forward)(wrapped)

    def undo(self) -> None:
        """Give the encoders their own ``forward`` back."""
        for module, before in self._forwards:
            del vars(module)["forward"]
            if before is not None:
                vars(module)["forward"] = before
        self._forwards.clear()
        self.clear()

    def clear(self) -> None:
        """Forget every answer, where memory is short."""
        with self._lock:
            self._answers.clear()
            self._num_bytes = 0

    def _forward(
        self,
        name: str,
        module: torch.nn.Module,
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        self.num_calls += 1
        if module.training or torch.is_grad_enabled():
            return forward(*args, **kwargs)
        try:
            key = (name, active_loras(), _key(args), _key(kwargs))
        except _NotComparable:
            return forward(*args, **kwargs)
        with self._lock:
            answer = self._answers.get(key)
            if answer is not None and answer.is_untouched():
                self._answers.move_to_end(key)
                self.num_hits += 1
                return _new_outside(answer.value)
        value = forward(*args, **kwargs)
        # What cannot be given twice is not kept.
        with contextlib.suppress(_NotComparable):
            answer = _Answer(_without_caches(value))
            with self._lock:
                self._keep(key, answer)
        return value

    def _keep(self, key: Any, answer: _Answer) -> None:
        before = self._answers.pop(key, None)
        self._num_bytes -= 0 if before is None else before.num_bytes
        if answer.num_bytes > self.max_bytes:
            return
        self._answers[key] = answer
        self._num_bytes += answer.num_bytes
        while self._num_bytes > self.max_bytes:
            _, oldest = self._answers.popitem(last=False)
            self._num_bytes -= oldest.num_bytes


class _Answer:
    """An encoder's output, and the versions of its tensors when it was made."""

    def __init__(self, value: Any):
        self.value = value
        self._tensors = list(_tensors(value))
        self._versions = [tensor._version for tensor in self._tensors]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in self._tensors}
        self.num_bytes = sum(storage.nbytes() for storage in storages.values())

    def is_untouched(self) -> bool:
        """Nobody has written into it: every write in place counts up a tensor's version."""
        return self._versions == [tensor._version for tensor in self._tensors]


class _NotComparable(Exception):
    """A value that is not known to be one that can be compared, or given again."""


def _key(values: Any) -> str:
    """Equal for arguments that a forward cannot tell apart."""
    for tensor in tensors_of(values):
        is_plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided
        if not is_plain or tensor.is_meta or tensor.nbytes > _LARGEST_INPUT_BYTES:
            raise _NotComparable
    try:
        return fingerprint(values, contents=True)
    except UnsupportedValueError as error:
        raise _NotComparable from error


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.is_inference():  # its version is not counted
            raise _NotComparable
        yield value
    elif isinstance(value, (tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)
    elif value is not None:
        raise _NotComparable


def _without_caches(value: Any) -> Any:
    """An output object of its own, without keys and values that would be for the next token."""
    if isinstance(value, Mapping) and "past_key_values" in value:
        return type(value)(**{k: v for k, v in value.items() if k != "past_key_values"})
    return _new_outside(value)


def _new_outside(value: Any) -> Any:
    """The same tensors in an output object of its own, which the caller may take apart."""
    return copy.copy(value) if isinstance(value, Mapping) else value
