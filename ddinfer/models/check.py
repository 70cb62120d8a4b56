"""What a pipeline's model_index.json and class say, checked before any weight is fetched."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import os
import sys
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from ddinfer.errors import InputError, UsageError
from ddinfer.models.component_roles import DENOISER_NAMES
from ddinfer.models.hub import MODEL_INDEX
from ddinfer.models.index import (
    ModelIndex,
    index_folder,
    local_folder,
    pipeline_class,
    read_model_index,
)
from ddinfer.models.pipeline_folder import (
    PipelineSource,
    check_connected,
    installed_class,
    own_code,
)
from ddinfer.request import Request

log = logging.getLogger(__name__)

#: Fields of diffusers' output classes that are saved, by what they hold.
VIDEO_FIELDS = ("frames", "videos", "video")
IMAGE_FIELDS = ("images", "image", "prediction")
AUDIO_FIELDS = ("audios", "audio", "sound")
OUTPUT_FIELDS = (*VIDEO_FIELDS, *IMAGE_FIELDS, *AUDIO_FIELDS)


def check_pipeline(
    path: str | os.PathLike[str],
    trust_remote_code: bool = False,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> None:
    """Check that a pipeline can generate images, videos or sound here.

    Called on rank 0, for all ranks. Only model_index.json is read (or fetched).

    Raises:
        UsageError: a component that is null or has no class here, or another kind of output.
    """
    kind = pipeline_class(path, trust_remote_code, revision=revision, token=token)
    folder = index_folder(path, revision=revision, token=token)
    index = read_model_index(folder)
    check_connected(kind)
    _check_output(kind)
    if missing := _missing(kind, index):
        raise UsageError(
            f"{os.fspath(path)}: {MODEL_INDEX} has no {', '.join(missing)} (null or not listed), "
            f"without which {kind.__name__} cannot generate from prompts; expected [library, class]"
        )
    is_whole = local_folder(path) is not None  # else code in a component's folder is not here yet
    for entry in index.entries:
        is_ours = entry.library in ("diffusers", "transformers")
        if (is_ours or is_whole) and own_code(folder, entry) is None:
            installed_class(folder, entry)


def _missing(kind: Any, index: ModelIndex) -> list[str]:
    """Components without which every prompt would fail, in the constructor's order.

    A pipeline may go without a safety checker, or a third text encoder; `_optional_components`
    does not tell, since it also lists what only precomputed embeddings make superfluous.
    """
    there = {entry.name for entry in index.entries}
    given = there | {name for name, value in index.settings.items() if value is not None}
    optional = set(getattr(kind, "_optional_components", ()))
    absent = [
        name
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in (*given, "self")
    ]
    has_denoiser = not there.isdisjoint(DENOISER_NAMES)

    def is_needed(name: str) -> bool:
        if name not in (*index.nulls, *index.settings, *optional):
            return True
        if name.startswith("tokenizer"):
            return name.replace("tokenizer", "text_encoder") in there
        if name == "text_encoder":  # SDXL's refiner has the second alone
            return name not in optional or "text_encoder_2" not in there
        if name in DENOISER_NAMES:
            return name not in optional or not has_denoiser
        return name == "text_encoder_2" or (name in ("scheduler", "vae") and name not in optional)

    return [name for name in absent if is_needed(name)]


def _check_output(kind: Any) -> None:
    """
    Raises:
        UsageError: the pipeline returns neither pictures nor sound.
    """
    signature = inspect.signature(kind.__call__)
    fields = _fields(signature.return_annotation, kind)
    if fields and not set(OUTPUT_FIELDS) & set(fields):
        raise UsageError(
            f"{kind.__name__} returns {', '.join(fields)}; ddinfer runs pipelines that return "
            "images, videos or sound"
        )


def _fields(annotation: Any, kind: Any) -> list[str]:
    """Names of the fields of the output's dataclass, as far as the signature says."""
    kinds = typing.get_args(annotation) or (annotation,)
    if isinstance(annotation, str):
        module = sys.modules[kind.__module__]
        kinds = tuple(getattr(module, part.strip(), None) for part in annotation.split("|"))
    return [f.name for k in kinds if dataclasses.is_dataclass(k) for f in dataclasses.fields(k)]


def check_values(source: PipelineSource, requests: Iterable[Request]) -> None:
    """Let a pipeline of diffusers check what prompts ask for, before any weight is read.

    Its ``check_inputs`` is asked once for each set of arguments. What it cannot tell without the
    models is left to the call itself.

    Raises:
        InputError: sizes that do not divide, a strength beyond 1 and the like; names the prompt.
    """
    kind = source.kind
    is_own = kind.__module__.startswith("diffusers.") and hasattr(kind, "check_inputs")
    if not is_own or (pipe := _without_weights(source)) is None:
        return
    wanted = inspect.signature(kind.check_inputs).parameters
    defaults = {n: p.default for n, p in inspect.signature(kind.__call__).parameters.items()}
    seen: set[str] = set()
    for request in requests:
        plain = {n: v for n, v in request.parameters().items() if n not in request.input_hashes}
        key = repr((sorted(plain.items(), key=str), sorted(request.input_hashes)))
        if key in seen:
            continue
        seen.add(key)
        sizes = {n: 1024 for n in ("height", "width") if plain.get(n) is None}
        given: dict[str, Any] = {**defaults, **plain, **sizes, "prompt": request.prompt}
        given["negative_prompt"] = request.negative_prompt
        if set(request.input_hashes) & set(wanted):
            continue  # images are looked at when they are read
        arguments = {
            name: given.get(name)
            for name, parameter in wanted.items()
            if name != "self" and (name in given or parameter.default is parameter.empty)
        }
        if any(value is inspect.Parameter.empty for value in arguments.values()):
            continue  # something is missing, which the call says better
        try:
            pipe.check_inputs(**arguments)
        except ValueError as error:
            text = " ".join(str(error).split())
            raise InputError(f"prompt {request.index} (id {request.id}): {text}") from None
        except (TypeError, AttributeError, AssertionError, LookupError) as error:
            log.debug("%s.check_inputs needs the models: %s", kind.__name__, error)


class _Settings:
    """In place of a component: its config, also as attributes."""

    def __init__(self, config: Mapping[str, Any]):
        self.config = config

    def __getattr__(self, name: str) -> Any:
        try:
            return vars(self)["config"][name]
        except KeyError:
            raise AttributeError(name) from None


def _without_weights(source: PipelineSource) -> Any:
    """The pipeline with settings in place of its models; ``None`` where its class needs more."""
    from diffusers.configuration_utils import FrozenDict

    components: dict[str, Any] = {}
    for entry in source.index.entries:
        folder = source.folder / entry.name
        config: dict[str, Any] = {}
        for file in (folder / "config.json", folder / "scheduler_config.json"):
            if file.is_file():
                config = json.loads(file.read_text(encoding="utf-8"))
        if entry.name.startswith("tokenizer"):
            config.setdefault("model_max_length", 77)
        components[entry.name] = _Settings(FrozenDict(config))
    try:
        return source.assemble(components)
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        log.debug("%s cannot be made without its models: %s", source.kind.__name__, error)
        return None
