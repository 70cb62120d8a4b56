"""The `WholeEngine`: one rank holds the whole pipeline and runs its own ``__call__``."""

from __future__ import annotations

import contextlib
import gc
import inspect
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.engines.base import Batch, ProgressListener
from ddinfer.engines.encoding import EncodingCache
from ddinfer.engines.options import apply_to_denoiser, apply_to_pipeline
from ddinfer.errors import (
    ErrorRecord,
    InputError,
    RankError,
    StorageError,
    UsageError,
    describe_os_error,
    is_environment_error,
)
from ddinfer.inputs import load_input
from ddinfer.models.loading import denoisers, load_pipeline
from ddinfer.models.placement import Placement
from ddinfer.request import Request, Result


@dataclass(frozen=True)
class _Pictures:
    """What one pipeline call made: per request its frames (one for an image) and its flags."""

    frames: list[list[Image.Image]]
    flags: list[tuple[str, ...]]
    is_video: bool


@dataclass(frozen=True)
class _Failure:
    """Why a call made nothing. A value, so that the traceback's tensors are free again."""

    record: ErrorRecord
    out_of_memory: bool


class WholeEngine:
    """Runs batches through a diffusers pipeline, one CPU generator per image.

    Args:
        pipe: a diffusers pipeline on its device. It is called and otherwise left alone.
        rank: global rank, for the Results.
        call: arguments of the pipeline's ``__call__`` that hold for every Request, of any type.
        max_batch: batch key → most images that fitted in memory; shared by engines that share it.
        encodings: of this pipeline's text encoders; forgotten where memory is short.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        rank: int = 0,
        call: Mapping[str, Any] | None = None,
        max_batch: dict[str, int] | None = None,
        encodings: EncodingCache | None = None,
    ):
        self.pipe, self.rank, self.call = pipe, rank, dict(call or {})
        self._parameters = inspect.signature(pipe.__call__).parameters
        self._max_batch: dict[str, int] = {} if max_batch is None else max_batch
        self.encodings = encodings

    def run(self, batches: Iterable[Batch]) -> Iterator[Result]:
        for batch in batches:
            yield from self._run_batch(batch)

    def set_progress_listener(self, heartbeat: ProgressListener) -> None:
        """Let ``heartbeat`` hear every step of the pipeline's denoisers, and its VAE.

        A denoiser compiled as a whole is left alone: a hook that counts would compile it again
        with every step. There a batch is what moves.
        """
        try:
            found = denoisers(self.pipe)
        except UsageError:
            return
        heartbeat.listen_to(self.pipe)
        for denoiser in found.values():
            if getattr(denoiser, "_compiled_call_impl", None) is None:
                denoiser.register_forward_pre_hook(lambda *_: heartbeat.steps())

    def _run_batch(self, batch: Batch) -> Iterator[Result]:
        """The batch as planned; in smaller parts where it fails or does not fit."""
        key = batch[0].batch_key()
        parts = [list(batch)]
        while parts:
            part = parts.pop(0)
            fits = self._max_batch.get(key, len(part))
            if len(part) > fits:
                parts = [part[k : k + fits] for k in range(0, len(part), fits)] + parts
                continue
            started = time.perf_counter()
            made = self._call(part)
            seconds = (time.perf_counter() - started) / len(part)
            if isinstance(made, _Failure) and len(part) > 1:
                if made.out_of_memory:
                    self._max_batch[key] = len(part) // 2
                    if self.encodings is not None:
                        self.encodings.clear()
                    _free_memory()
                    parts.insert(0, part)
                else:  # find the prompt at fault; its neighbours are not
                    parts = [[request] for request in part] + parts
                continue
            yield from self._results(part, made, seconds, exact=len(part) == len(batch))

    def _results(
        self, part: list[Request], made: _Pictures | _Failure, seconds: float, *, exact: bool
    ) -> Iterator[Result]:
        shape = tuple(request.index for request in part)
        for k, request in enumerate(part):
            common: dict[str, Any] = {
                "seconds": seconds,
                "rank": self.rank,
                "exact": exact,
                "batch": shape,
            }
            if isinstance(made, _Failure):
                yield Result(request, error=made.record, **common)
            elif made.is_video:
                yield Result(request, frames=made.frames[k], flags=made.flags[k], **common)
            else:
                yield Result(request, image=made.frames[k][0], flags=made.flags[k], **common)

    def _call(self, part: list[Request]) -> _Pictures | _Failure:
        try:
            arguments = self._arguments(part)
            with _vae_types_restored(self.pipe):
                return _pictures(self.pipe, self.pipe(**arguments), len(part))
        except torch.AcceleratorError:
            raise  # sticky: no later call on this device can succeed
        except (torch.OutOfMemoryError, MemoryError) as error:
            return _Failure(ErrorRecord.of(error), out_of_memory=True)
        except Exception as error:  # recorded with its traceback and counted
            if isinstance(error, OSError) and is_environment_error(error):
                # No prompt is to blame, and the next would meet it, too.
                path = "" if error.filename is None else f"{error.filename}: "
                raise StorageError(f"the pipeline met {path}{describe_os_error(error)}") from error
            return _Failure(ErrorRecord.of(error), out_of_memory=_is_out_of_memory(error))

    def _arguments(self, part: list[Request]) -> dict[str, Any]:
        first, alone = part[0], len(part) == 1
        arguments = {**self.call, **first.parameters()}
        for name, expected in first.input_hashes.items():  # which is alone then
            arguments[name], digest = load_input(name, first.kwargs[name])
            if digest != expected:
                raise InputError(f"{name} has changed since the prompts were read")
        for name in first.texts():
            texts = [request.kwargs[name] for request in part]
            arguments[name] = texts[0] if alone else texts
        if first.negative_prompt is not None:
            negatives = [request.negative_prompt for request in part]
            arguments["negative_prompt"] = negatives[0] if alone else negatives
        prompts = [request.prompt for request in part]
        generators = [torch.Generator("cpu").manual_seed(request.seed) for request in part]
        arguments["prompt"] = prompts[0] if alone else prompts
        arguments["generator"] = generators[0] if alone else generators
        if "output_type" in self._parameters and _processor(self.pipe) is not None:
            arguments["output_type"] = "np"  # NaN is still visible there, in "pil" no longer
        return arguments


def load_whole_engine(
    model: str,
    config: JobConfig,
    *,
    world: World,
    placement: str | Placement | None = None,
) -> WholeEngine:
    """Load the pipeline of a job onto this rank's device, or spread over what this rank drives.

    Raises:
        UsageError: the pipeline lacks what an option asks for, or does not fit.
    """
    is_placed = placement is not None
    pipe = load_pipeline(
        model,
        dtype=config.dtype,
        device=None if is_placed else world.device,
        placement=placement,
        max_memory=config.max_memory,
        gpus=gpu_numbers(world) if is_placed else None,
        variant=config.variant,
        revision=config.revision,
        token=config.token,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )
    apply_to_pipeline(pipe, config)
    if config.attention_backend is not None or config.compile:
        for name, denoiser in denoisers(pipe).items():
            apply_to_denoiser(name, denoiser, config)
    return WholeEngine(pipe, rank=world.rank, encodings=EncodingCache(pipe))


def gpu_numbers(world: World) -> list[int]:
    """The GPUs that a rank drives; none on the CPU."""
    return [int(device.partition(":")[2]) for device in world.devices if device != "cpu"]


def check_call(
    name: str, parameters: Mapping[str, inspect.Parameter], given: Iterable[str], batch_size: int
) -> None:
    """Check, before weights are loaded, that a pipeline can be called as the job means to.

    Args:
        name: of the pipeline class, for messages.
        parameters: of its ``__call__``.
        given: names of all arguments that the job or any of its prompts sets.

    Raises:
        UsageError: the pipeline takes no prompt, no such argument, or no batches.
    """
    # Stable Diffusion's **kwargs is for two deprecated names; anything else it would ignore. Only
    # a wrapper that does not even name its prompt is believed to hand everything on.
    has_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    takes_anything = has_kwargs and "prompt" not in parameters
    for needed in ("prompt", "generator"):
        if needed not in parameters and not takes_anything:
            raise UsageError(
                f"{name} takes no {needed!r}; ddinfer runs pipelines whose __call__ takes a "
                "prompt and a generator"
            )
    unknown = sorted(n for n in given if n not in parameters and not takes_anything)
    if unknown:
        named = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and n != "self"]
        raise UsageError(f"{name} takes no argument {unknown[0]!r}; it takes: {', '.join(named)}")
    annotation = str(parameters["generator"].annotation) if "generator" in parameters else ""
    typed = annotation not in ("", str(inspect.Parameter.empty))
    if batch_size > 1 and typed and "list" not in annotation.lower():
        raise UsageError(
            f"{name} takes one generator for a whole batch, so the images of a batch would "
            f"depend on their neighbours: use --batch_size 1 (found {batch_size})"
        )


@contextlib.contextmanager
def _vae_types_restored(pipe: Any) -> Iterator[None]:
    """Casts the VAE back where a call ends early.

    Pipelines cast it to float32, decode, and cast it back; a failure in between, or the end of a
    stage, would leave it in a type in which every later call fails or makes another image.
    """
    vae = getattr(pipe, "vae", None)
    modules = list(vae.modules()) if isinstance(vae, torch.nn.Module) else []
    tables: list[dict[str, Any]] = [
        table for module in modules for table in (module._parameters, module._buffers)
    ]
    before = [
        (t, name, tensor.dtype) for t in tables for name, tensor in t.items() if tensor is not None
    ]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for table, name, dtype in before:
                tensor = table[name]
                if tensor.dtype == dtype:
                    continue
                if isinstance(tensor, torch.nn.Parameter):
                    tensor.data = tensor.to(dtype)
                else:
                    table[name] = tensor.to(dtype)
        raise


def _processor(pipe: Any) -> Any:
    """What turns the VAE's output into pictures, in image or in video pipelines."""
    for name in ("image_processor", "video_processor"):
        if hasattr(getattr(pipe, name, None), "numpy_to_pil"):
            return getattr(pipe, name)
    return None


def _pictures(pipe: Any, output: Any, num_requests: int) -> _Pictures:
    is_video = hasattr(output, "frames")
    made = output.frames if is_video else output.images
    if len(made) != num_requests:
        raise RuntimeError(
            f"{type(pipe).__name__} returned {len(made)} "
            f"{'videos' if is_video else 'images'} for {num_requests} prompts"
        )
    unsafe = getattr(output, "nsfw_content_detected", None) or [False] * num_requests
    frames, flags = [], []
    for item, nsfw in zip(made, unsafe, strict=True):
        found = ["nsfw"] if nsfw else []
        pictures = item if is_video else [item]
        if isinstance(item, np.ndarray):
            if np.isnan(item).any():
                found.append("nan")
            with np.errstate(invalid="ignore"):  # NaN becomes black, and is flagged
                pictures = _processor(pipe).numpy_to_pil(item)
        if all(_is_black(picture) for picture in pictures):
            found.append("black")
        frames.append(list(pictures))
        flags.append(tuple(found))
    return _Pictures(frames, flags, is_video)


def _is_black(picture: Image.Image) -> bool:
    return picture.convert("RGB").getbbox() is None


def _is_out_of_memory(error: Exception) -> bool:
    """Of the host's memory, or of the rank that holds another stage of the denoiser."""
    if isinstance(error, RankError):
        kinds = (torch.OutOfMemoryError.__name__, MemoryError.__name__)
        return error.record is not None and error.record.type in kinds
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
