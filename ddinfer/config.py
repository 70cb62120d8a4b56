"""`JobConfig`: everything a job can be told.

The command line's options are derived from it by tyro, as cli/options.py says.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ddinfer.errors import UsageError
from ddinfer.request import GIVEN_BY_DDINFER

#: Options that are not part of the job: the secret one, and switches of a single run.
_ONE_TIME = (
    "token",
    "config",
    "print_config",
    "dry_run",
    "json",
    "overwrite",
    "extend",
    "accept_versions",
)

#: What ``--placement`` knows by name; anything else is a file.
PLACEMENTS = ("auto", "balanced", "staged")

#: Call arguments that may not be set for all prompts at once, and what to do instead.
RESERVED_CALL_ARGUMENTS = {"prompt": "prompts come from --prompt or --prompts", **GIVEN_BY_DDINFER}


def parse_json_object(text: str) -> dict[str, Any]:
    """What an option says as JSON.

    Raises:
        ValueError: it is no JSON, or no object.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not JSON ({error}); expected an object like '{{\"eta\": 0.5}}'"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


# What follows is called when tyro asks for the annotations of JobConfig, which are strings until
# then: ranks, which parse nothing, do without tyro.


def _arg(metavar: str, *aliases: str, default: str = "") -> Any:
    """How an option shows in ``--help``; ``default`` is shown where the text does not say it."""
    import tyro

    hint = f"(default: {default})" if default else ""
    return tyro.conf.arg(metavar=metavar, aliases=aliases or None, help_behavior_hint=hint)


def _may_be_repeated() -> Any:
    import tyro

    return tyro.conf.UseAppendAction


def _json_object() -> Any:
    import tyro

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda args: parse_json_object(args[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    )


@dataclass(frozen=True)
class JobConfig:
    """Run a diffusers pipeline over many prompts on many GPUs."""

    # What to draw
    model: Annotated[str | None, _arg("MODEL", "-m")] = None
    """Folder or hub id of a diffusers pipeline. Default: the embedded demonstration model."""
    prompts: Annotated[str | None, _arg("FILE", "-p")] = None
    """Prompt file: .txt, .csv, .tsv, .json, .jsonl (.gz too); - reads standard input."""
    prompt: Annotated[tuple[str, ...], _may_be_repeated(), _arg("TEXT")] = ()
    """A prompt, repeatable. Default: a dozen that the embedded model knows."""
    output: Annotated[str, _arg("DIR", "-o", default="ddinfer-out")] = "ddinfer-out"
    """Folder for images and records. The same job in it is finished, another one refused."""
    limit: Annotated[int | None, _arg("N")] = None
    """Take only the first N prompts."""

    # How each image is made
    seed: Annotated[int, _arg("INT", default="0")] = 0
    """Image k has seed SEED + k where its prompt says nothing else."""
    num_inference_steps: Annotated[int | None, _arg("N", "--steps")] = None
    """Denoising steps. Default: the pipeline's own."""
    guidance_scale: Annotated[float | None, _arg("X")] = None
    """Guidance scale. Default: the pipeline's own."""
    height: Annotated[int | None, _arg("PIXELS")] = None
    """Height in pixels. Default: the pipeline's own."""
    width: Annotated[int | None, _arg("PIXELS")] = None
    """Width in pixels. Default: the pipeline's own."""
    negative_prompt: Annotated[str | None, _arg("TEXT")] = None
    """Negative prompt for prompts that have none of their own."""
    num_images_per_prompt: Annotated[int, _arg("N", default="1")] = 1
    """Images of each prompt, with seeds in sequence."""
    pipeline_kwargs: Annotated[dict[str, Any], _json_object()] = field(default_factory=dict)
    """Any further arguments of the pipeline's __call__, as a JSON object."""
    fps: Annotated[int, _arg("N", default="8")] = 8
    """Frames per second of the animated file that a video pipeline's frames go into."""

    # Who makes it
    nproc_per_node: Annotated[int | str | None, _arg("N|auto|gpu|cpu")] = None
    """Ranks on this machine. Default: one for each GPU, else one."""
    device: Annotated[str, _arg("auto|cpu|cuda", default="auto")] = "auto"
    """auto takes the GPUs where there are any and fails where this torch cannot use them."""
    num_threads: Annotated[int | None, _arg("N")] = None
    """CPU threads of each rank. Default: OMP_NUM_THREADS, else cores / ranks."""
    batch_size: Annotated[int, _arg("N", default="1")] = 1
    """Neighbouring prompts with equal parameters that share one pipeline call."""

    schedule: Literal["static", "dynamic"] = "static"
    """static: each rank has its share. dynamic: who is free takes the next batch. Same images."""
    shard: Annotated[str | None, _arg("K/N")] = None
    """Make the K-th of N parts of the job (1/8 … 8/8), on machines that share nothing."""

    # A model larger than a GPU
    placement: Annotated[str | None, _arg("auto|balanced|staged|FILE.json")] = None
    """Spread each rank's model over its GPUs, host memory and disk; staged: encode, denoise and
    decode one after another. Default: all on one device."""
    max_memory: Annotated[str | None, _arg("0=16GB,cpu=64GB")] = None
    """What --placement may use, per device of a rank. Default: what is free."""
    gpus_per_rank: Annotated[int, _arg("G", default="1")] = 1
    """GPUs that each rank drives, for --placement: those from local rank * G on."""
    pipeline_parallel: Annotated[int, _arg("S", default="1")] = 1
    """Cut the denoiser into S stages, held by S neighbouring ranks; several
    images are in flight."""

    # When something goes wrong
    max_restarts: Annotated[int, _arg("N", default="0")] = 0
    """Start the ranks again up to N times after one died. Under torchrun, torchrun does it."""
    grace_seconds: Annotated[float, _arg("SECONDS", default="20")] = 20.0
    """After SIGTERM or Ctrl-C the batch in hand may take this long; then it is abandoned."""

    stuck_timeout: Annotated[float | None, _arg("SECONDS")] = None
    """End a run of which a rank has not moved for so long, loading included. Default: warn only."""

    # How the model is loaded
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """auto: float32 on CPU, else the checkpoint's own."""
    variant: Annotated[str | None, _arg("NAME")] = None
    """Variant of the weight files, such as fp16."""
    revision: Annotated[str | None, _arg("REV")] = None
    """Branch, tag or commit of a hub repository."""
    token: Annotated[str | None, _arg("TOKEN")] = None
    """Hub token. Never saved; better set HF_TOKEN."""
    trust_remote_code: bool = False
    """Run pipeline code that the model's repository brings."""
    allow_pickle: bool = False
    """Load .bin weights, which can run code. Default: safetensors only."""
    attention_backend: Annotated[str | None, _arg("NAME")] = None
    """diffusers attention backend for the denoiser, such as native or flash."""
    vae_tiling: bool = False
    """Decode in tiles: less memory. Changes images slightly at tile borders."""
    vae_slicing: bool = False
    """Decode a batch image by image: less memory."""
    compile: bool = False
    """torch.compile the denoiser: its repeated blocks where it has them, else the whole."""

    # What to do with the folder and the output
    overwrite: bool = False
    """Delete the job in the output folder and start again; files of other origin stay."""
    extend: bool = False
    """Accept prompts that were appended since the job in the folder was begun."""
    accept_versions: bool = False
    """Go on with the job in the folder though library versions have changed."""
    dry_run: bool = False
    """Print slices, batches, disk estimate and the first requests; load and write nothing."""
    json: bool = False
    """Print the plan or the closing summary as JSON on standard output."""
    config: Annotated[str | None, _arg("FILE")] = None
    """YAML or JSON file with any of these options, or a job.json to run again."""
    print_config: bool = False
    """Print the resolved configuration as YAML and stop."""

    def __post_init__(self) -> None:
        check = _Checks()
        check.types(self)
        for name in ("limit", "num_inference_steps", "height", "width", "num_threads"):
            check.at_least_one(name, getattr(self, name))
        for name in ("batch_size", "num_images_per_prompt", "fps"):
            check.at_least_one(name, getattr(self, name))
        for name in ("gpus_per_rank", "pipeline_parallel"):
            check.at_least_one(name, getattr(self, name))
        check.holding_the_model(self)
        for name in ("max_restarts", "grace_seconds"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name} {getattr(self, name)} is negative")
        if self.stuck_timeout is not None and self.stuck_timeout <= 0:
            raise UsageError(f"--stuck_timeout {self.stuck_timeout} must be more than 0 seconds")
        _ = self.shard_of  # raises
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is negative; torch seeds are 0 … 2**63 - 1")
        if self.prompts is not None and self.prompt:
            raise UsageError(
                f"--prompts {self.prompts} and --prompt {self.prompt[0]!r} were both given; "
                "use one of them"
            )
        for name in self.pipeline_kwargs:
            if name in RESERVED_CALL_ARGUMENTS:
                raise UsageError(f"--pipeline_kwargs {name}: {RESERVED_CALL_ARGUMENTS[name]}")

    @property
    def shard_of(self) -> tuple[int, int] | None:
        """``--shard 3/8`` → (2, 8): which part, from 0, of how many; ``None`` for a whole job.

        Raises:
            UsageError: no such part.
        """
        if self.shard is None:
            return None
        found = re.fullmatch(r"(\d+)/(\d+)", self.shard.strip())
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise UsageError(
                f"--shard {self.shard} is no part of a job; expected K/N with 1 <= K <= N, such "
                "as 3/8 for the third of eight"
            )
        return int(found[1]) - 1, int(found[2])

    def call_defaults(self) -> dict[str, Any]:
        """Call arguments that hold for every prompt that does not say otherwise."""
        named = {
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
        }
        return {**self.pipeline_kwargs, **{k: v for k, v in named.items() if v is not None}}

    def to_dict(self) -> dict[str, Any]:
        """What is saved with the job: everything but the token and one-time switches."""
        data = asdict(self)
        for name in _ONE_TIME:
            del data[name]
        data["prompt"] = list(self.prompt)
        return data

    def with_absolute_paths(self) -> JobConfig:
        """Paths made absolute, so that ranks and reruns read the same files from anywhere."""
        changes: dict[str, Any] = {"output": os.path.abspath(self.output)}
        if self.prompts not in (None, "-"):
            changes["prompts"] = os.path.abspath(str(self.prompts))
        if self.model is not None and os.path.isdir(self.model):
            changes["model"] = os.path.abspath(self.model)
        if self.placement is not None and self.placement not in PLACEMENTS:
            changes["placement"] = os.path.abspath(self.placement)
        return replace(self, **changes)


class _Checks:
    def types(self, config: JobConfig) -> None:
        """What a program gives; files, the environment and options are converted before."""
        for name, expected in field_types().items():
            value = getattr(config, name)
            if isinstance(value, os.PathLike) and _fits("", expected):
                object.__setattr__(config, name, os.fspath(value))
            elif not _fits(value, expected):
                raise UsageError(
                    f"--{name} {value!r}: expected {inspect.formatannotation(expected)}"
                )

    def at_least_one(self, name: str, value: int | None) -> None:
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value} must be at least 1")

    def holding_the_model(self, config: JobConfig) -> None:
        """The options that say how a rank, or several, hold the model."""
        placement = config.placement
        if config.compile and config.pipeline_parallel > 1:
            raise UsageError(
                f"--compile does not go with --pipeline_parallel {config.pipeline_parallel}: a "
                "denoiser cut over ranks is followed block by block; leave one out"
            )
        if placement is None:
            for name in ("max_memory", "gpus_per_rank"):
                value = getattr(config, name)
                if value not in (None, 1):
                    raise UsageError(
                        f"--{name} {value} says what a placement may use, but there is no "
                        "--placement; add --placement balanced, auto or staged"
                    )
            return
        if placement not in PLACEMENTS and not placement.endswith(".json"):
            raise UsageError(
                f"--placement {placement} is none of {', '.join(PLACEMENTS)}, nor a FILE.json"
            )
        if placement not in PLACEMENTS and config.max_memory is not None:
            raise UsageError(
                f"--max_memory {config.max_memory} and --placement {placement}: a file says where "
                "everything goes; use one of them"
            )
        if config.pipeline_parallel > 1:
            raise UsageError(
                f"--placement {placement} and --pipeline_parallel {config.pipeline_parallel} are "
                "two ways to hold a large model; use one of them"
            )
        if config.compile:
            raise UsageError(
                "--compile does not go with --placement: weights that come and go would be "
                "compiled again; leave one out"
            )


@lru_cache(maxsize=1)
def field_types() -> dict[str, Any]:
    """Field → its type, without what tyro wants to know of it, and so without tyro."""
    of_tyro = (_arg, _may_be_repeated, _json_object)
    return get_type_hints(
        JobConfig, localns={function.__name__: lambda *_, **__: None for function in of_tyro}
    )


def _fits(value: Any, expected: Any) -> bool:
    """Whether a value has one of the types that `JobConfig` names; any sequence is a tuple."""
    origin, parts = get_origin(expected), get_args(expected)
    if origin is UnionType:
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin is tuple:
        is_one = isinstance(value, str) or not isinstance(value, Sequence)
        return not is_one and all(_fits(item, parts[0]) for item in value)
    if isinstance(value, bool):
        return expected is bool
    return isinstance(value, (int, float) if expected is float else origin or expected)
