"""What is asked and what is made: one `Request` is one image, one `Result` answers it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ddinfer.errors import ErrorRecord, InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

MAX_SEED = 2**63 - 1

#: Fields of a prompt that every pipeline names alike; anything else goes into ``kwargs``.
CALL_FIELDS = ("width", "height", "num_inference_steps", "guidance_scale")

#: Further texts of a prompt, for pipelines with several text encoders. A batch has a list of each.
TEXT_ARGUMENT = re.compile(r"(negative_)?prompt_\d+")

#: What a prompt may say that ddinfer sets on the pipeline, no arguments of its ``__call__``.
PIPELINE_SETTINGS = ("scheduler", "lora")

#: Arguments of ``__call__`` that ddinfer gives itself, so that no user may, and what to do instead.
GIVEN_BY_DDINFER = {
    "generator": "every image has its own generator; use seed",
    "output_type": "ddinfer decides how images come back",
    "return_dict": "ddinfer decides how images come back",
    "num_images_per_prompt": "use num_images in a prompt, --num_images_per_prompt for all",
    "num_videos_per_prompt": "use num_images in a prompt, --num_images_per_prompt for all",
    "num_waveforms_per_prompt": "use num_images in a prompt, --num_images_per_prompt for all",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a prompt file, before the job's defaults are applied.

    ``fields`` holds what the row says, already checked for its type: ``prompt`` always,
    and any of ``id``, ``negative_prompt``, ``seed``, ``num_images``, the `CALL_FIELDS`,
    and further arguments of the pipeline's ``__call__``.
    ``where`` is ``file:line``, for messages.
    """

    fields: Mapping[str, Any]
    where: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One image to be made. The image is a function of this value alone.

    There may be millions of them, so each is small.

    Attributes:
        index: place in the job, 0-based, over all ranks.
        id: the user's name for it, unique in the job (default: the index, 8 digits).
        seed: plain diffusers with ``torch.Generator("cpu").manual_seed(seed)`` makes the same.
        width, height: pixels. ``None`` leaves the pipeline's own default.
        kwargs: every other argument of the pipeline's ``__call__``, and `PIPELINE_SETTINGS`.
            Image inputs
            (``image``, ``mask_image`` …) are absolute paths here, or a program's objects.
        input_hashes: names of the image inputs and objects in ``kwargs`` → SHA-256 of the image
            file's bytes, or of the object's content.
    """

    index: int
    id: str
    prompt: str
    seed: int
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    input_hashes: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; fields at their defaults are left out."""
        out: dict[str, Any] = {
            "index": self.index,
            "id": self.id,
            "prompt": self.prompt,
            "seed": self.seed,
        }
        for name in _OPTIONAL_FIELDS:
            value = getattr(self, name)
            if value is not None:
                out[name] = value
        if self.kwargs:
            out["kwargs"] = dict(self.kwargs)
        if self.input_hashes:
            out["input_hashes"] = dict(self.input_hashes)
        return out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Request:
        """What `to_dict` wrote, read from a file that somebody may have edited.

        Raises:
            ValueError: a field is missing, not known or of a wrong type; says which.
        """
        try:
            request = cls(**data)
        except TypeError as error:  # names the field
            raise ValueError(str(error).replace("Request.__init__()", "the request")) from None
        for name, kinds in _FIELD_TYPES.items():
            value = getattr(request, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise ValueError(f"the request's {name} is {value!r:.60}")
        if request.index < 0 or not 0 <= request.seed <= MAX_SEED:
            raise ValueError(f"the request's index is {request.index}, its seed {request.seed}")
        return request

    def parameters(self) -> dict[str, Any]:
        """What the pipeline is called with beside prompt, negative prompt and generator."""
        named = {n: getattr(self, n) for n in CALL_FIELDS if getattr(self, n) is not None}
        others = {n: v for n, v in self.kwargs.items() if n not in PIPELINE_SETTINGS}
        return {**named, **others}

    def settings(self) -> dict[str, Any]:
        """What is set on the pipeline for this call: ``scheduler``, ``lora`` (name → weight)."""
        return {name: self.kwargs[name] for name in PIPELINE_SETTINGS if name in self.kwargs}

    def texts(self) -> dict[str, str]:
        """``prompt_2``, ``negative_prompt_2``, …: they vary within a batch as ``prompt`` does."""
        return {
            name: value
            for name, value in self.kwargs.items()
            if isinstance(value, str) and TEXT_ARGUMENT.fullmatch(name)
        }

    def batch_key(self) -> str:
        """Two neighbours share a batch only where this is equal.

        A Request with image inputs is alone in its batch: some pipelines take a list of images as
        one for each prompt, others as several references for every prompt.
        """
        named = tuple(getattr(self, name) for name in CALL_FIELDS)
        if not self.kwargs and not self.input_hashes:
            return _plain_batch_key(named, *map(type, named), self.negative_prompt is None)
        texts = self.texts()
        plain = {
            name: value
            for name, value in {**self.parameters(), **self.settings()}.items()
            if name not in texts and name not in self.input_hashes
        }
        shared: list[Any] = [plain, {}, self.negative_prompt is None]
        if texts:
            shared.append(sorted(texts))
        if self.input_hashes:
            shared.append(self.index)
        return canonical_json(shared)

    def content_hash(self) -> str:
        """SHA-256 of everything that decides the image, and of its place and id.

        Where an image input lies is left out: the hash of its bytes stands for it.
        """
        data = self.to_dict()
        if self.input_hashes:
            data["kwargs"] = {k: v for k, v in self.kwargs.items() if k not in self.input_hashes}
        return hashlib.sha256(canonical_json(data).encode()).hexdigest()


#: Fields of a Request that may be left out, in its order.
_OPTIONAL_FIELDS = ("negative_prompt", *CALL_FIELDS)

#: What each field of a Request is, for those that come from a file.
_FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    "index": (int,),
    "id": (str,),
    "prompt": (str,),
    "seed": (int,),
    "negative_prompt": (str, type(None)),
    **{name: (int, float, type(None)) for name in CALL_FIELDS},
    "kwargs": (Mapping,),
    "input_hashes": (Mapping,),
}


@lru_cache(maxsize=1024)
def _plain_batch_key(named: tuple[Any, ...], *types_and_negative: Any) -> str:
    """`Request.batch_key` where nothing beyond the `CALL_FIELDS` is set; 1 and 1.0 are two keys."""
    parameters = {n: v for n, v in zip(CALL_FIELDS, named, strict=True) if v is not None}
    return canonical_json([parameters, {}, types_and_negative[-1]])


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one `Request`.

    Attributes:
        image: the picture (PIL); ``None`` when it failed or is only recorded.
        frames: for video pipelines, the pictures in order; ``image`` is ``None`` then.
        audio: sound, alone or of the video: a float array of shape ``(channels, samples)``.
        sampling_rate: of the sound, in samples per second.
        fps: frames per second, where the pipeline was called with a number of them.
        path: of the file below the output folder, when one was written.
        error: why there is no image.
        seconds: pipeline time of its batch divided by the batch's images.
        rank: global rank that made it.
        exact: made in the batch the job planned for it, so bit-identical on any world size.
        batch: indices of the Requests that shared the pipeline call, in call order.
        flags: "nan", "black" (one flat black picture), "nsfw" (a safety checker blanked it).
    """

    request: Request
    image: Image | None = None
    frames: Sequence[Image] | None = None
    audio: np.ndarray | None = None
    sampling_rate: int | None = None
    fps: float | None = None
    path: str | None = None
    error: ErrorRecord | None = None
    seconds: float = 0.0
    rank: int = 0
    exact: bool = True
    batch: tuple[int, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def index(self) -> int:
        return self.request.index

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def prompt(self) -> str:
        return self.request.prompt

    @property
    def seed(self) -> int:
        return self.request.seed

    def without_pictures(self) -> Result:
        """The same, light enough to gather: pictures and sound dropped."""
        return replace(self, image=None, frames=None, audio=None)


_canonical = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
).encode


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, finite numbers only."""
    return _canonical(value)


def resolve_requests(
    prompts: Sequence[Prompt],
    *,
    base_seed: int = 0,
    num_images: int = 1,
    defaults: Mapping[str, Any] | None = None,
) -> list[Request]:
    """Prompts → Requests: each ``num_images: n`` becomes n neighbours, defaults filled in.

    The default seed of Request k is ``base_seed + k``. A given seed s becomes s, s+1, …;
    a given id becomes ``id-0``, ``id-1``, … where n > 1.

    Args:
        defaults: call arguments (and ``negative_prompt``) for prompts that do not say, with
            ``input_hashes`` of the images among them.

    Raises:
        InputError: an id used twice, or a seed beyond 2⁶³ − 1.
    """
    requests: list[Request] = []
    seen: dict[str, str] = {}
    has_ids = any("id" in prompt.fields for prompt in prompts)
    defaults = dict(defaults or {})
    shared_hashes = defaults.pop("input_hashes", {})
    nothing: dict[str, Any] = {}  # one for all
    for prompt in prompts:
        row = {**defaults, **prompt.fields}
        count = row.pop("num_images", num_images)
        given_id, given_seed = row.pop("id", None), row.pop("seed", None)
        hashes = {**shared_hashes, **row.pop("input_hashes", nothing)} or nothing
        text, negative = row.pop("prompt"), row.pop("negative_prompt", None)
        named = {name: row.pop(name, None) for name in CALL_FIELDS}
        kwargs = row or nothing
        for k in range(count):
            index = len(requests)
            seed = base_seed + index if given_seed is None else given_seed + k
            if not 0 <= seed <= MAX_SEED:
                raise InputError(f"{prompt.where}: seed {seed} is not within 0 … 2**63 - 1")
            name = f"{index:08d}" if given_id is None else given_id
            if given_id is not None and count > 1:
                name = f"{given_id}-{k}"
            if has_ids:  # the default ones differ by themselves
                where = prompt.where or f"prompt {index}"
                if name in seen:
                    raise InputError(
                        f"{where}: id {name!r} is already used by {seen[name]}; ids must be unique"
                    )
                seen[name] = where
            requests.append(
                Request(
                    index, name, text, seed, negative, **named, kwargs=kwargs, input_hashes=hashes
                )
            )
    return requests
