"""Inputs that a denoiser is given again and again (text embeddings, ids) are sent once.

The caller gives a tensor that it has sent before a *token*. The two ends of a connection keep the
same few tokens, so that the sender knows what the receiver still has.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ddinfer.parallel.tensor_tree import storage_id

#: Tensors kept per slot and input: a prompt's and a negative prompt's, and as much again.
NUM_KEPT = 4


class TensorTokens:
    """Gives tokens to tensors that one image's denoiser is given repeatedly.

    A tensor is the same when it is the same memory with nothing written to it in between. It
    gets a token when it is seen for the second time, since most (latents) are seen just once.
    """

    def __init__(self, numbers: Iterator[int]):
        self._numbers = numbers  # no two images share one
        self._seen: dict[Any, deque[tuple[Any, torch.Tensor, list[int]]]] = {}

    def of(self, inputs: Mapping[Any, torch.Tensor]) -> dict[Any, int]:
        """The tokens of those inputs of a call that have one."""
        tokens = {}
        for name, tensor in inputs.items():
            # An inference tensor's version, the number of writes to it, is not counted.
            if not tensor.is_inference() and (token := self._token(name, tensor)):
                tokens[name] = token
        return tokens

    def _token(self, name: Any, tensor: torch.Tensor) -> int | None:
        layout = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key = (storage_id(tensor), *layout, tensor._version)
        seen = self._seen.setdefault(name, deque(maxlen=NUM_KEPT))
        for known, _, token in seen:
            if known == key:
                if not token:
                    token.append(next(self._numbers))
                return token[0]
        seen.append((key, tensor, []))  # holding the tensor keeps its address its own
        return None


class TensorCache:
    """What the receiver of a connection keeps per slot, for the image ``serial`` that has it.

    The sender keeps the same, without values.

    Both `find` before a call travels and `put` after it, so that they always agree.
    """

    def __init__(self) -> None:
        self._slots: dict[int, tuple[int, dict[Any, OrderedDict[int, Any]]]] = {}

    def find(self, slot: int, serial: int, tokens: Mapping[Any, int]) -> dict[Any, Any]:
        """The inputs of a call that need not travel."""
        owner, kept = self._slots.get(slot, (None, {}))
        if owner != serial:
            return {}
        return {
            name: kept[name][token] for name, token in tokens.items() if token in kept.get(name, ())
        }

    def put(
        self, slot: int, serial: int, tokens: Mapping[Any, int], values: Mapping[Any, Any]
    ) -> None:
        """Keeps inputs that have travelled; the least recently used one of each is dropped."""
        if self._slots.get(slot, (None, {}))[0] != serial:
            self._slots[slot] = (serial, {})  # another image has taken the slot
        kept = self._slots[slot][1]
        for name, token in tokens.items():
            tensors = kept.setdefault(name, OrderedDict())
            if token not in tensors:
                tensors[token] = values.get(name)
            tensors.move_to_end(token)
            while len(tensors) > NUM_KEPT:
                tensors.popitem(last=False)
