"""One call of a diffusers pipeline: the arguments of a batch, what it made, or why it failed."""

from __future__ import annotations

import contextlib
import gc
import inspect
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ddinfer.engines.base import Batch
from ddinfer.engines.encoding import EncodingCache
from ddinfer.engines.outputs import Output, outputs_of, sampling_rate, takes_output_type
from ddinfer.errors import (
    ErrorRecord,
    InputError,
    RankError,
    StorageError,
    UsageError,
    describe_os_error,
    is_environment_error,
)
from ddinfer.inputs import AUDIO_INPUTS, load_input
from ddinfer.models.adapters import loras_set
from ddinfer.models.schedulers import check_scheduler, scheduler_set
from ddinfer.request import PIPELINE_SETTINGS, Request, Result


@dataclass(frozen=True)
class CallFailure:
    """Why a call returned nothing. A value, so that the traceback's tensors are freed."""

    record: ErrorRecord
    is_out_of_memory: bool


def run_batch(
    pipe: Any,
    batch: Batch,
    *,
    arguments: Mapping[str, Any],
    rank: int,
    max_batch: dict[str, int],
    encodings: EncodingCache | None = None,
) -> Iterator[Result]:
    """Runs a batch as planned; in smaller parts where it fails or does not fit in memory.

    Args:
        arguments: further arguments of the pipeline's ``__call__``.
        rank: global rank, for the Results.
        max_batch: batch key → most images that fitted in memory; updated here.
        encodings: of this pipeline's text encoders; cleared where memory is short.
    """
    key = batch[0].batch_key()
    parts = [list(batch)]
    while parts:
        part = parts.pop(0)
        fits = max_batch.get(key, len(part))
        if len(part) > fits:
            parts = [part[k : k + fits] for k in range(0, len(part), fits)] + parts
            continue
        started = time.perf_counter()
        made = call_pipeline(pipe, part, arguments)
        seconds = (time.perf_counter() - started) / len(part)
        if isinstance(made, CallFailure) and len(part) > 1:
            if made.is_out_of_memory:
                max_batch[key] = len(part) // 2
                if encodings is not None:
                    encodings.clear()
                free_memory()
                parts.insert(0, part)
            else:  # find the prompt at fault; its neighbours are not
                parts = [[request] for request in part] + parts
            continue
        is_exact = len(part) == len(batch)
        yield from results_of(part, made, rank=rank, seconds=seconds, is_exact=is_exact)


def call_pipeline(
    pipe: Any, requests: Sequence[Request], arguments: Mapping[str, Any]
) -> list[Output] | CallFailure:
    """Runs one call for all of ``requests``, with one CPU generator per Request.

    Args:
        requests: of one batch key.
        arguments: further arguments of ``__call__`` and settings of the pipeline; those of the
            Requests replace them.

    Raises:
        torch.AcceleratorError: the device is lost.
        StorageError: the disk is full or a file cannot be read, whatever the prompt.
    """
    try:
        settings, arguments = split_settings(arguments)
        settings |= requests[0].settings()
        arguments |= _arguments(pipe, requests)
        with (
            _vae_types_restored(pipe),
            scheduler_set(pipe, settings.get("scheduler")),
            loras_set(settings.get("lora")),
        ):
            return outputs_of(pipe, pipe(**arguments), len(requests), arguments)
    except torch.AcceleratorError:
        raise  # sticky: no later call on this device can succeed
    except (torch.OutOfMemoryError, MemoryError) as error:
        return CallFailure(ErrorRecord.of(error), is_out_of_memory=True)
    except Exception as error:  # recorded with its traceback and counted
        if isinstance(error, OSError) and is_environment_error(error):
            # No prompt is to blame, and the next would meet it, too.
            path = "" if error.filename is None else f"{error.filename}: "
            raise StorageError(f"the pipeline met {path}{describe_os_error(error)}") from error
        return CallFailure(ErrorRecord.of(error), _is_out_of_memory(error))


def split_settings(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """→ (what is set on the pipeline for a call, arguments of its ``__call__``)."""
    settings = {n: v for n, v in arguments.items() if n in PIPELINE_SETTINGS}
    return settings, {n: v for n, v in arguments.items() if n not in PIPELINE_SETTINGS}


def check_settings(
    kind: type,
    scheduler: Any,
    loras: Collection[str],
    requests: Iterable[Request],
    shared: Mapping[str, Any],
) -> None:
    """Check what prompts set on the pipeline; each scheduler once.

    Args:
        kind: the pipeline's class.
        scheduler: its own.
        loras: names of those that are loaded.
        shared: settings for all prompts that say nothing else.

    Raises:
        UsageError: a scheduler that the pipeline cannot use, or a LoRA that is not loaded; names
            the first prompt.
    """
    seen: set[tuple[str, frozenset[str]]] = set()
    for request in requests:
        settings = {**shared, **request.settings()}
        for name in settings.get("lora") or ():
            if name not in loras:
                raise UsageError(
                    f"prompt {request.index} (id {request.id}): no LoRA is called {name!r}; "
                    f"loaded are {', '.join(sorted(loras)) or 'none (--lora PATH=NAME)'}"
                )
        for name, value in request.kwargs.items():
            if loras and name.endswith("attention_kwargs") and "scale" in (value or ()):
                raise UsageError(
                    f"prompt {request.index} (id {request.id}): {name} has a scale, which only "
                    'peft obeys; give the weight as "lora": {"' + sorted(loras)[0] + '": …}'
                )
        text = settings.get("scheduler")
        given = frozenset({"sigmas", "timesteps"}.intersection(request.kwargs))
        if text is None or (text, given) in seen:
            continue
        seen.add((text, given))
        try:
            check_scheduler(kind, scheduler, text, given)
        except UsageError as error:
            raise UsageError(f"prompt {request.index} (id {request.id}): {error}") from None


def results_of(
    requests: Sequence[Request],
    made: list[Output] | CallFailure,
    *,
    rank: int,
    seconds: float,
    is_exact: bool,
) -> Iterator[Result]:
    """One Result per Request of a call.

    Args:
        rank: global rank that ran the call.
        seconds: per Request.
        is_exact: the batch was run as planned, not in parts.
    """
    indices = tuple(request.index for request in requests)
    for k, request in enumerate(requests):
        result = Result(request, seconds=seconds, rank=rank, exact=is_exact, batch=indices)
        if isinstance(made, CallFailure):
            yield replace(result, error=made.record)
        else:
            yield replace(result, **vars(made[k]))


def _arguments(pipe: Any, requests: Sequence[Request]) -> dict[str, Any]:
    first, alone = requests[0], len(requests) == 1
    arguments: dict[str, Any] = dict(first.parameters())
    for name, expected in first.input_hashes.items():  # which is alone then
        rate = sampling_rate(pipe) if name in AUDIO_INPUTS else None
        arguments[name], digest = load_input(name, first.kwargs[name], rate)
        if digest != expected:
            raise InputError(f"{name} has changed since the prompts were read")
    for name in first.texts():
        texts = [request.kwargs[name] for request in requests]
        arguments[name] = texts[0] if alone else texts
    if first.negative_prompt is not None:
        negatives = [request.negative_prompt for request in requests]
        arguments["negative_prompt"] = negatives[0] if alone else negatives
    generators = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
    if takes_prompt(inspect.signature(pipe.__call__).parameters):
        prompts = [request.prompt for request in requests]
        arguments["prompt"] = prompts[0] if alone else prompts
    arguments["generator"] = generators[0] if alone else generators
    if takes_output_type(pipe):
        arguments["output_type"] = "np"  # NaN is still visible there, in "pil" no longer
    return arguments


def check_call(
    name: str, parameters: Mapping[str, inspect.Parameter], given: Iterable[str], batch_size: int
) -> None:
    """Check, before weights are loaded, that a pipeline can be called as the job means to.

    Args:
        name: of the pipeline class, for messages.
        parameters: of its ``__call__``.
        given: names of all arguments that the job or any of its prompts sets.

    Raises:
        UsageError: the pipeline takes no generator, no such argument, or no batches.
    """
    # Stable Diffusion's **kwargs is for two deprecated names; anything else it would ignore.
    takes_anything = takes_prompt(parameters) and "prompt" not in parameters
    if "generator" not in parameters and not takes_anything:
        raise UsageError(
            f"{name} takes no 'generator'; ddinfer runs pipelines whose __call__ takes one"
        )
    unknown = sorted(n for n in given if n not in parameters and not takes_anything)
    if unknown:
        named = [n for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD and n != "self"]
        raise UsageError(f"{name} takes no argument {unknown[0]!r}; it takes: {', '.join(named)}")
    if batch_size > 1 and not takes_prompt(parameters):
        raise UsageError(
            f"{name} takes no prompts, of which several could share a call: use --batch_size 1 "
            f"(found {batch_size})"
        )
    annotation = str(parameters["generator"].annotation) if "generator" in parameters else ""
    typed = annotation not in ("", str(inspect.Parameter.empty))
    if batch_size > 1 and typed and "list" not in annotation.lower():
        raise UsageError(
            f"{name} takes one generator for a whole batch, so the images of a batch would "
            f"depend on their neighbours: use --batch_size 1 (found {batch_size})"
        )


def takes_prompt(parameters: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a pipeline's ``__call__`` takes a prompt.

    A wrapper that names not even its generator is believed to hand on whatever it is given.
    """
    has_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return "prompt" in parameters or (has_kwargs and "generator" not in parameters)


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


def _is_out_of_memory(error: Exception) -> bool:
    """Of the host's memory, or of the rank that holds another stage of the denoiser."""
    if isinstance(error, RankError):
        kinds = (torch.OutOfMemoryError.__name__, MemoryError.__name__)
        return error.record is not None and error.record.type in kinds
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
