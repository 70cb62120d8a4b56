"""A `Job`: everything that is decided before a weight is read. Needs no ranks and no GPU.

Requests, batches and the fingerprint are functions of the configuration and the prompt file
alone, so that every run of the same command, on any number of ranks, means the same images.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ddinfer import tiny
from ddinfer.config import RESERVED_CALL_ARGUMENTS, JobConfig
from ddinfer.distributed.partition import contiguous_slice, cut_batches
from ddinfer.errors import UsageError
from ddinfer.prompts.files import read_prompts
from ddinfer.request import Prompt, Request, resolve_requests

#: Libraries whose version can change an image.
VERSIONED = ("torch", "diffusers", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Job:
    """What is to be made.

    Attributes:
        model: folder or hub id of the pipeline.
        model_name: what picture metadata call it: no path, which may differ between machines.
        notes: what the user should know before the job runs, one sentence each.
    """

    config: JobConfig
    model: str
    model_name: str
    requests: Sequence[Request]
    notes: tuple[str, ...] = field(default=())

    def batches(self, segments: Sequence[int] = ()) -> list[range]:
        """Ranges of Request indices that share a pipeline call; they cover all in order.

        Args:
            segments: ends of the parts in which the job was given (`--extend`); no batch crosses
                one, so that what is added changes no batch of before.
        """
        ends = list(segments) or [len(self.requests)]
        cut: list[range] = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            keys = [request.batch_key() for request in self.requests[start:end]]
            for part in cut_batches(keys, self.config.batch_size):
                cut.append(range(start + part.start, start + part.stop))
        return cut

    def images(self) -> range:
        """Indices of the Requests that are asked for: all, or those of ``--shard K/N``.

        They are what the K-th of N neighbouring slices of the batches makes.

        Raises:
            UsageError: ``--shard`` together with ``--extend``.
        """
        if self.config.shard_of is None:
            return range(len(self.requests))
        if self.config.extend:
            raise UsageError(
                "--extend does not go with --shard: merge the parts of the job (ddinfer merge) and "
                "extend the joined folder"
            )
        part, num_parts = self.config.shard_of
        batches = self.batches()
        share = contiguous_slice(len(batches), num_parts, part)
        ends = [0, *(batch.stop for batch in batches)]
        return range(ends[share.start], ends[share.stop])

    def batch(self, indices: Sequence[int]) -> list[Request]:
        return [self.requests[k] for k in indices]

    def call_arguments(self) -> set[str]:
        """Names of all pipeline arguments that any Request sets."""
        names: set[str] = set()
        for request in self.requests:
            names.update(request.parameters())
            if request.negative_prompt is not None:
                names.add("negative_prompt")
        return names


def prepare_job(
    config: JobConfig,
    *,
    parameters: Mapping[str, inspect.Parameter],
    stdin: bytes | None = None,
) -> Job:
    """Read the prompts and resolve them to Requests.

    Args:
        parameters: of the pipeline's ``__call__``: what a prompt may set.
        stdin: what ``prompts="-"`` reads; default: this process's standard input.

    Raises:
        InputError: the prompt file, with file and line.
        UsageError: an option that does not fit the pipeline.
    """
    model, model_name, defaults = resolve_model(config)
    allowed = [n for n in parameters if n not in RESERVED_CALL_ARGUMENTS]
    prompts = _prompts(config, allowed, stdin)
    if config.limit is not None:
        prompts = prompts[: config.limit]
    requests = resolve_requests(
        prompts,
        base_seed=config.seed,
        num_images=config.num_images_per_prompt,
        defaults={**defaults, **config.call_defaults()},
    )
    notes = _demonstration_note(requests) if model_name in tiny.PIPELINES else []
    return Job(config, model, model_name, requests, tuple(notes))


def job_of_folder(config: JobConfig, requests: Sequence[Request]) -> Job:
    """A job that was begun before, from its Requests instead of its prompts."""
    model, model_name, _ = resolve_model(config)
    return Job(config, model, model_name, requests)


def settled(config: JobConfig) -> JobConfig:
    """The configuration with absolute paths and what follows from the model filled in."""
    config = config.with_absolute_paths()
    if config.dtype == "auto" and (config.model or tiny.DEFAULT) in tiny.PIPELINES:
        # Stored in mixed precision to be small; they are meant to compute in float32.
        config = replace(config, dtype="float32")
    return config


def resolve_model(config: JobConfig) -> tuple[str, str, dict[str, Any]]:
    """→ (folder or hub id, name, the call arguments that this model wants by default)."""
    model = config.model or tiny.DEFAULT
    if model in tiny.PIPELINES:
        return str(tiny.path(model)), model, tiny.call_defaults(model)
    name = os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model
    return model, name, {}


def _prompts(
    config: JobConfig, call_parameters: Sequence[str], stdin: bytes | None
) -> list[Prompt]:
    if config.prompts is not None:
        stream = None if stdin is None else io.BytesIO(stdin)
        return read_prompts(config.prompts, call_parameters=call_parameters, stdin=stream)
    if config.prompt:
        return [Prompt({"prompt": p}, f"--prompt {k}") for k, p in enumerate(config.prompt, 1)]
    if config.model is not None and config.model not in tiny.PIPELINES:
        raise UsageError(
            f"no prompts for {config.model}: give --prompts FILE or --prompt TEXT (the embedded "
            "model alone has prompts of its own)"
        )
    return [Prompt({"prompt": p}) for p in tiny.DEMO_PROMPTS]


def _demonstration_note(requests: Sequence[Request]) -> list[str]:
    unknown = Counter(word for r in requests for word in tiny.unknown_words(r.prompt))
    if not unknown:
        return []
    words = ", ".join(repr(word) for word, _ in unknown.most_common(5))
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    return [
        f"the embedded model is a demonstration: it draws coloured shapes and does not know "
        f"{words}{more}; use --model for anything else"
    ]


def job_identity(
    job: Job, *, model_hash: str, device_type: str, num_threads: int
) -> dict[str, Any]:
    """What makes two jobs the same: equal identities mean equal images.

    World size, schedule and output are not in it. The requests' hashes are kept apart, by
    index, in the job folder.
    """
    config = job.config
    dtype: str = config.dtype
    if dtype == "auto":
        dtype = "float32" if device_type == "cpu" else "checkpoint"
    return {
        "model": job.model_name,
        "revision": config.revision,
        "variant": config.variant,
        "model_hash": model_hash,
        "dtype": dtype,
        "device": device_type,
        "batch_size": config.batch_size,
        "num_threads": num_threads,
        "attention_backend": config.attention_backend,
        "vae_tiling": config.vae_tiling,
        "vae_slicing": config.vae_slicing,
        "compile": config.compile,
        "fps": config.fps,
    }


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that make images."""
    return {
        name: importlib.metadata.version(name) for name in ("ddinfer", *VERSIONED) if _has(name)
    }


def _has(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False  # ddinfer itself, run from a checkout that is not installed
    return True
