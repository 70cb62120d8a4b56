"""Inputs that stay the same over an image's steps (text embeddings, ids) travel once a hop.

The first rank recognises a tensor that it has given before and gives it a *token*. Each hop's
two ends keep the same small memory of tokens per slot, so that the sender knows what the
receiver still has.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch

#: What a value without a token has: it travels every time.
NO_TOKEN = -1

#: Tokens remembered per slot and input: a prompt and a negative prompt, and as much again.
REMEMBERED = 4


class Repeated:
    """Recognises, for one image, tensors that its denoiser was given before.

    A tensor is the same when it is the same memory with nothing written to it in between. It
    gets a token when it is seen for the second time, since most (latents) are seen just once.
    """

    def __init__(self, tokens: Iterable[int]):
        self._fresh = iter(tokens)
        self._seen: dict[Any, deque[tuple[Any, torch.Tensor, list[int]]]] = {}

    def token(self, label: Any, tensor: torch.Tensor) -> int:
        if tensor.is_inference():
            return NO_TOKEN  # its writes are not counted
        storage = tensor.untyped_storage()
        key = (
            storage._cdata,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor._version,
        )
        seen = self._seen.setdefault(label, deque(maxlen=REMEMBERED))
        for known, _, token in seen:
            if known == key:
                if not token:
                    token.append(next(self._fresh))
                return token[0]
        seen.append((key, tensor, []))  # holding the tensor keeps its address its own
        return NO_TOKEN


class Memory:
    """What one end of a hop remembers, per slot. Both ends call `remember` alike."""

    def __init__(self) -> None:
        self._slots: dict[int, tuple[int, dict[Any, OrderedDict[int, Any]]]] = {}

    def _of(self, slot: int, serial: int) -> dict[Any, OrderedDict[int, Any]]:
        if slot not in self._slots or self._slots[slot][0] != serial:
            self._slots[slot] = (serial, {})  # another image has taken the slot
        return self._slots[slot][1]

    def knows(self, slot: int, serial: int, label: Any, token: int) -> bool:
        return token != NO_TOKEN and token in self._of(slot, serial).get(label, ())

    def recall(self, slot: int, serial: int, label: Any, token: int) -> Any:
        return self._of(slot, serial)[label][token]

    def remember(
        self, slot: int, serial: int, tokens: Mapping[Any, int], values: Mapping[Any, Any]
    ) -> None:
        """After a message: ``values`` are those that travelled (none on the sender's end)."""
        memory = self._of(slot, serial)
        for label, token in tokens.items():
            if token == NO_TOKEN:
                continue
            kept = memory.setdefault(label, OrderedDict())
            if token not in kept:
                kept[token] = values.get(label)
            kept.move_to_end(token)
            while len(kept) > REMEMBERED:
                kept.popitem(last=False)
