"""`prepare`: everything that is decided before a weight is read. Needs no ranks and no GPU.

Requests, batches and the fingerprint are functions of the configuration and the prompt file
alone, so that every run of the same command, on any number of ranks, generates the same images.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ddinfer import tiny
from ddinfer.config import JobConfig
from ddinfer.distributed.partition import contiguous_slice, cut_batches
from ddinfer.engines.setup_file import setup_identity
from ddinfer.errors import InputError, UsageError, list_some
from ddinfer.inputs import needed_images
from ddinfer.prompts.fields import FieldChecker
from ddinfer.prompts.files import read_prompts
from ddinfer.request import GIVEN_BY_DDINFER, Prompt, Request, resolve_requests

if TYPE_CHECKING:
    from ddinfer.engines.continuous import StagePlan

#: Libraries whose version can change an image.
VERSIONED = ("torch", "diffusers", "transformers", "numpy", "pillow", "av")


@dataclass(frozen=True)
class Job:
    """What a job generates, and with which pipeline.

    Attributes:
        model: folder or hub id of the pipeline.
        model_name: its name in image metadata: no path, which may differ between machines.
        pipeline: name of its class.
        parameters: of the class's ``__call__``.
        stages: how ``--pipeline_parallel`` cuts each denoiser, by its name; else empty.
        notes: for the user before the job runs, one sentence each.
    """

    config: JobConfig
    model: str
    model_name: str
    pipeline: str
    parameters: Mapping[str, inspect.Parameter]
    requests: Sequence[Request]
    stages: Mapping[str, Sequence[StagePlan]]
    notes: tuple[str, ...]

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

    def call_defaults(self, *names: str) -> dict[str, int | float]:
        """The pipeline's own defaults of these arguments, where they are numbers."""
        found = {name: self.parameters[name].default for name in names if name in self.parameters}
        return {name: value for name, value in found.items() if isinstance(value, (int, float))}

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


def prepare(
    config: JobConfig,
    *,
    stdin: bytes | None = None,
    requests: Sequence[Request] | None = None,
    gpus: Sequence[int] | None = None,
) -> Job:
    """Read and check all that can be known before a folder is made and a weight is read.

    Called by rank 0 of a job and by ``--dry_run``, so that both find the same errors. Of a hub
    model only configuration files are downloaded.

    Args:
        config: as `resolve_config` returns it.
        stdin: what ``prompts="-"`` reads; default: this process's standard input.
        requests: of a job that exists already; default: read from the prompts.
        gpus: the numbers of those that this rank drives; default: not known yet.

    Raises:
        InputError: the prompt file, with file and line.
        UsageError: an option that does not fit the pipeline or this machine.
    """
    # They import torch; names and prompt files are checked before that.
    from ddinfer.engines.options import configs_path
    from ddinfer.engines.pipeline_call import check_call, takes_prompt
    from ddinfer.engines.select import check_placement, check_stages
    from ddinfer.models.check import check_pipeline
    from ddinfer.models.index import call_parameters, pipeline_class

    model, model_name, defaults = resolve_model(config)
    hub = {"revision": config.revision, "token": config.token}
    configs = configs_path(model, config)
    kind = pipeline_class(configs, config.trust_remote_code, **hub)
    pipeline = kind.__name__
    parameters = call_parameters(configs, config.trust_remote_code, **hub)
    check_call(pipeline, parameters, (), config.batch_size)
    check_pipeline(configs, config.trust_remote_code, **hub)
    notes: list[str | None] = []
    check_dtypes(kind, config)
    check_quantize(kind, config)
    check_formats(kind, config)
    is_new = requests is None
    if requests is None:
        allowed = [name for name in parameters if name not in GIVEN_BY_DDINFER]
        allowed += ["prompt"] if takes_prompt(parameters) else []
        checker = FieldChecker("--pipeline_kwargs", os.getcwd())
        defaults = {**defaults, **checker.check_defaults(config.call_defaults())}
        prompts = _prompts(config, allowed, stdin)[: config.limit]
        check_images(kind, prompts, defaults)
        requests = resolve_requests(
            prompts,
            base_seed=config.seed,
            num_images=config.num_images_per_prompt,
            defaults=defaults,
        )
        notes += _demonstration_note(requests) if model_name in tiny.PIPELINES else []
        notes.append(checker.note_nulls())
    check_call(pipeline, parameters, call_arguments(requests), config.batch_size)
    check_requests(kind, configs, config, requests, is_new=is_new)
    setup_identity(config.setup)  # raises where there is no such function
    check_placement(config, gpus)
    stages = check_stages(model, config)
    return Job(
        config,
        model,
        model_name,
        pipeline,
        parameters,
        requests,
        stages,
        tuple(filter(None, notes)),
    )


def check_quantize(kind: Any, config: JobConfig) -> None:
    """
    Raises:
        UsageError: ``--quantize`` names a component that the pipeline's class does not take.
    """
    takes = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    for text in config.quantize:
        if text.partition("=")[0] not in takes:
            raise UsageError(
                f"--quantize {text}: {kind.__name__} has no such component; it has "
                f"{', '.join(takes)}"
            )


def check_requests(
    kind: type, path: str, config: JobConfig, requests: Sequence[Request], *, is_new: bool
) -> None:
    """Check what prompts ask of the pipeline and set on it, by its configs alone.

    Args:
        is_new: the requests come from a prompt file, which can be corrected.

    Raises:
        UsageError: the pipeline cannot use it.
        InputError: values that its ``check_inputs`` refuses.
    """
    import torch

    from ddinfer.engines.pipeline_call import check_settings
    from ddinfer.models.adapters import find_loras
    from ddinfer.models.check import check_values
    from ddinfer.models.pipeline_folder import PipelineSource

    hub = {"revision": config.revision, "token": config.token}
    source = PipelineSource.for_planning(path, trust_remote_code=config.trust_remote_code, **hub)
    if is_new:
        check_values(source, requests)
    if not config.loras and not any(request.settings() for request in requests):
        return
    own = None
    if any(entry.name == "scheduler" for entry in source.index.entries):
        own = source.load("scheduler", None, torch.device("cpu"))
    loras = find_loras(config.lora, token=config.token)
    replace(source, loras=loras).check_loras()
    check_settings(kind, own, {lora.name for lora in loras}, requests, {})


def check_dtypes(kind: Any, config: JobConfig) -> None:
    """
    Raises:
        UsageError: ``--dtype`` names a component that the pipeline's class does not take.
    """
    takes = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    for name in config.dtypes:
        if name != "default" and name not in takes:
            raise UsageError(
                f"--dtype {config.dtype}: {kind.__name__} has no component {name}; it has "
                f"{', '.join(takes)}"
            )


def check_formats(kind: Any, config: JobConfig) -> None:
    """
    Raises:
        UsageError: videos with sound in a format that has none.
    """
    makes_sound = {"audio_vae", "vocoder"} & set(inspect.signature(kind.__init__).parameters)
    if config.video_format == "apng" and len(makes_sound) == 2:
        raise UsageError(
            f"{kind.__name__} makes videos with sound, which --video_format apng cannot hold; use "
            "mp4, webm or frames"
        )


def check_images(kind: type, prompts: Sequence[Prompt], defaults: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: a prompt without an image that the pipeline cannot do without.
    """
    needed = [name for name in needed_images(kind) if name not in defaults]
    for number, prompt in enumerate(prompts):
        missing = [name for name in needed if name not in prompt.fields]
        if missing:
            where = prompt.where or f"prompt {number}"
            raise InputError(
                f"{where}: no {' and no '.join(missing)}; {kind.__name__} needs the path of an "
                "image in every prompt, or for all in --pipeline_kwargs"
            )


def call_arguments(requests: Sequence[Request]) -> set[str]:
    """Names of all pipeline arguments that any Request sets."""
    names: set[str] = set()
    for request in requests:
        names.update(request.parameters())
        if request.prompt:
            names.add("prompt")
        if request.negative_prompt is not None:
            names.add("negative_prompt")
    return names


def resolve_config(config: JobConfig) -> JobConfig:
    """The configuration with absolute paths and what follows from the model filled in."""
    config = config.with_absolute_paths()
    dtypes = config.dtypes
    if dtypes["default"] == "auto" and (config.model or tiny.DEFAULT) in tiny.PIPELINES:
        # Stored in mixed precision to be small; they are meant to compute in float32.
        dtypes["default"] = "float32"
        config = replace(config, dtype=_dtype_text(dtypes))
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
    if "prompt" not in call_parameters:
        return [Prompt({"prompt": ""})]  # --pipeline_kwargs says what the call needs
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
    words = list_some([repr(word) for word, _ in unknown.most_common()], 5)
    return [
        f"the embedded model is a demonstration: it draws coloured shapes and does not know "
        f"{words}; use --model for anything else"
    ]


def job_identity(
    job: Job,
    *,
    model_hash: str,
    loras: Mapping[str, Mapping[str, Any]],
    device_type: str,
    num_threads: int,
) -> dict[str, Any]:
    """What makes two jobs the same: equal identities mean equal images.

    World size, schedule and output are not in it. The requests' hashes are kept apart, by
    index, in the job folder.
    """
    config = job.config
    auto = "float32" if device_type == "cpu" else "checkpoint"
    dtypes = {name: auto if d == "auto" else d for name, d in config.dtypes.items()}
    return {
        "model": job.model_name,
        "revision": config.revision,
        "variant": config.variant,
        "model_hash": model_hash,
        "pipeline": job.pipeline,
        "components": {
            name: [os.path.basename(where) if os.path.isdir(where) else where for where in places]
            for name, places in config.components.items()
        },
        "setup": setup_identity(config.setup),
        "loras": {name: dict(said) for name, said in loras.items()},
        "dtype": _dtype_text(dtypes),
        "device": device_type,
        "batch_size": config.batch_size,
        "num_threads": num_threads,
        "attention_backend": config.attention_backend,
        "vae_tiling": config.vae_tiling,
        "vae_slicing": config.vae_slicing,
        "compile": config.compile,
        "quantize": sorted(config.quantize),
        "cfg_parallel": config.cfg_parallel,
        "sequence_parallel": config.sequence_parallel,
        "fps": config.fps,
        "image_format": config.image_format,
        "video_format": config.video_format,
        "audio_format": config.audio_format,
    }


def _dtype_text(dtypes: Mapping[str, str]) -> str:
    """As ``--dtype`` takes it, in one order."""
    own = (f"{name}={dtype}" for name, dtype in sorted(dtypes.items()) if name != "default")
    return ",".join((*own, dtypes["default"]))


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
