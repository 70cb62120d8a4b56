"""A pipeline's own call, run once in each stage: what it computed before is answered from records.

Encoding ends when the denoiser is first called; denoising when the VAE is about to decode;
decoding runs the call to its end, with zeros for what the denoiser returned and the recorded
latents for those that came of the zeros. So no pipeline is rewritten here, and whatever it does
between its models (scaling, packing, resizing, a safety checker) is done by its own code.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ddinfer.engines.encoding import EncodingCache
from ddinfer.engines.records import (
    CannotKeep,
    Records,
    Ticket,
    digest,
    take_apart,
    zeros_like,
)
from ddinfer.request import Request


class EndOfStage(BaseException):
    """Ends a pipeline's call where the next stage begins.

    Like ``KeyboardInterrupt`` it is no ``Exception``: nobody may take it for a failure.
    """


class CannotStage(BaseException):
    """A pipeline that turns out not to work in stages. No prompt is at fault."""

    def __init__(self, pipe: Any, why: str):
        super().__init__(
            f"{type(pipe).__name__} cannot run in stages: {why}; use --placement balanced, which "
            "holds the whole pipeline at once"
        )


@dataclass
class Part:
    """Requests that share a pipeline call, and what is known of it so far.

    Attributes:
        num_planned: how many the batch had that they come from.
        encoded: per call of ``encode_prompt``, in order: hash of its arguments, and its answer.
        denoised: per denoising component, in order of its calls: what its answer looked like.
        latents: the arguments of ``vae.decode``.
        seconds: over all stages.
    """

    requests: Sequence[Request]
    num_planned: int
    encoded: list[tuple[str | None, Ticket]] = field(default_factory=list)
    denoised: dict[str, list[Any]] = field(default_factory=dict)
    latents: Ticket | None = None
    seconds: float = 0.0


class Encoding:
    """The encode stage of a loaded pipeline.

    Args:
        later: components that belong to the denoise stage.

    Attributes:
        encodings: what the text encoders answered; identical calls are not made again.
    """

    def __init__(self, pipe: Any, later: Sequence[str], records: Records):
        self.pipe, self.records = pipe, records
        self.encodings = EncodingCache(pipe)
        self._known: dict[str, Ticket] = {}
        self._part: Part | None = None
        self._encode = pipe.encode_prompt
        vars(pipe)["encode_prompt"] = self._recorded
        for name in later:
            getattr(pipe, name).register_forward_pre_hook(_end_of_stage, prepend=True)

    def run(self, part: Part, call: Callable[[], Any]) -> Any:
        """``call()``, which is `EndOfStage` by then, or what it returned instead."""
        self._part = part
        with contextlib.suppress(EndOfStage):
            return call()
        return None

    def _recorded(self, *args: Any, **kwargs: Any) -> Any:
        assert self._part is not None
        key = digest(args, kwargs)
        # What decides a prompt's embeddings beside the arguments is in the Request.
        texts = [request.texts() for request in self._part.requests]
        shared = self._part.requests[0].batch_key()
        known = None if key is None else f"{key} {shared} {texts}"
        if known is not None and known in self._known:
            self._part.encoded.append((key, self._known[known]))
            return self.records.get(self._known[known])
        answer = self._encode(*args, **kwargs)
        try:
            ticket = self.records.put(answer)
        except CannotKeep as error:
            raise CannotStage(self.pipe, f"its encode_prompt returns {error}") from error
        if known is not None:
            self._known[known] = ticket
        self._part.encoded.append((key, ticket))
        return answer


def _end_of_stage(*_: Any) -> None:
    raise EndOfStage


class _Replaying:
    """What the later stages share: prompts are answered from records."""

    def __init__(self, pipe: Any, records: Records):
        self.pipe, self.records = pipe, records
        self._encode = pipe.encode_prompt
        self._num_encoded = 0
        vars(pipe)["encode_prompt"] = self._replayed

    def _replayed(self, *args: Any, **kwargs: Any) -> Any:
        assert self.part is not None
        number, self._num_encoded = self._num_encoded, self._num_encoded + 1
        if number >= len(self.part.encoded):  # it encodes more while it denoises: from disk
            return self._encode(*args, **kwargs)
        before, ticket = self.part.encoded[number]
        if digest(args, kwargs) != before:
            raise CannotStage(self.pipe, "it calls encode_prompt with other arguments each time")
        return self.records.get(ticket)

    part: Part | None = None

    def _begin(self, part: Part) -> None:
        self.part, self._num_encoded = part, 0


class Denoising(_Replaying):
    """The denoise stage of a loaded pipeline.

    Args:
        components: that belong to this stage.
    """

    def __init__(self, pipe: Any, components: Sequence[str], records: Records):
        super().__init__(pipe, records)
        vars(pipe.vae)["decode"] = self._stop
        for name in components:
            getattr(pipe, name).register_forward_hook(functools.partial(self._note, name))

    def run(self, part: Part, call: Callable[[], Any]) -> Any:
        """``call()``, which is `EndOfStage` once the latents are kept, or what it returned."""
        self._begin(part)
        part.denoised.clear()
        with contextlib.suppress(EndOfStage):
            return call()
        return None

    def _note(self, name: str, model: Any, args: Any, answer: Any) -> None:
        """Remember what an answer looks like; equal ones are one object."""
        assert self.part is not None
        seen = self.part.denoised.setdefault(name, [])
        try:
            shape, _ = take_apart(answer)
        except CannotKeep as error:
            raise CannotStage(self.pipe, f"its {name} returns {error}") from error
        seen.append(next((other for other in seen[-4:] if other == shape), shape))

    def _stop(self, *args: Any, **kwargs: Any) -> Any:
        assert self.part is not None
        self.part.latents = self.records.put(_tensors_among(args, kwargs))
        raise EndOfStage


class Decoding(_Replaying):
    """The decode stage of a loaded pipeline.

    Args:
        denoisers: components of the denoise stage, which now answer with zeros.
    """

    def __init__(self, pipe: Any, denoisers: Sequence[str], records: Records):
        super().__init__(pipe, records)
        self._decode = pipe.vae.decode
        self._num_decoded = 0
        self._num_called: dict[str, int] = {}
        vars(pipe.vae)["decode"] = self._recorded
        for name in denoisers:
            vars(getattr(pipe, name))["forward"] = functools.partial(self._zeros, name)

    def run(self, part: Part, call: Callable[[], Any]) -> Any:
        """What ``call()`` returns, with the latents that were recorded."""
        self._begin(part)
        self._num_decoded = 0
        self._num_called.clear()
        return call()

    def _zeros(self, name: str, *args: Any, **kwargs: Any) -> Any:
        assert self.part is not None
        number = self._num_called[name] = self._num_called.get(name, -1) + 1
        shapes = self.part.denoised[name]
        return zeros_like(shapes[min(number, len(shapes) - 1)])

    def _recorded(self, *args: Any, **kwargs: Any) -> Any:
        assert self.part is not None
        assert self.part.latents is not None
        self._num_decoded += 1
        latents = self.records.get(self.part.latents)
        shapes = [tensor.shape for tensor in _tensors_among(args, kwargs)]
        if self._num_decoded > 1 or shapes != [tensor.shape for tensor in latents]:
            raise CannotStage(self.pipe, "it decodes in several pieces")
        changed, named = _exchanged(args, kwargs, latents)
        return self._decode(*changed, **named)


def _tensors_among(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]


def _exchanged(
    args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[torch.Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments with other tensors; what is none (a generator, a flag) stays."""
    left = iter(tensors)
    changed = [next(left) if isinstance(v, torch.Tensor) else v for v in args]
    named = {k: next(left) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return changed, named
