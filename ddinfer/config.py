"""`JobConfig`: all options of a job.

tyro derives the command line's options from it; pydantic validates every one of its values,
wherever they come from.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import pydantic
import tyro
from typing_extensions import TypedDict

from ddinfer.errors import UsageError
from ddinfer.request import GIVEN_BY_DDINFER, PIPELINE_SETTINGS

#: Options that let what a model brings run as code on this machine. No file can switch them on,
#: and none is written with them, since files are passed on to others.
TRUST_OPTIONS = ("trust_remote_code", "allow_pickle", "setup")

#: Options that are not part of the job: the secret one, those of trust, and switches of one run.
ONE_TIME_OPTIONS = (
    "token",
    *TRUST_OPTIONS,
    "config",
    "print_config",
    "dry_run",
    "json",
    "overwrite",
    "extend",
    "accept_versions",
)

#: What ``--dtype`` takes, for all components or by name.
DTYPES = ("auto", "float32", "float16", "bfloat16")

#: Names that ``--placement`` takes; anything else is a file.
PLACEMENTS = ("auto", "balanced", "staged")

#: Call arguments that may not be set for all prompts at once, and what to do instead.
RESERVED_CALL_ARGUMENTS = {"prompt": "prompts come from --prompt or --prompts", **GIVEN_BY_DDINFER}


def parse_json_object(text: str) -> dict[str, Any]:
    """The JSON object in an option's text.

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


class LoraOption(NamedTuple):
    """A ``--lora``: where its file is, its name, the denoiser it is for, its default weight."""

    where: str
    name: str
    component: str | None
    weight: float

    def text(self, where: str) -> str:
        """As the option, with everything said."""
        component = f"@{self.component}" if self.component else ""
        return f"{where}={self.name}{component}:{self.weight!r}"


def parse_lora(text: str) -> LoraOption:
    """``PATH_OR_ID[=NAME][@COMPONENT][:WEIGHT]``; the name is the file's by default.

    Raises:
        OptionError: no place, or a name that cannot be one.
    """
    found = re.fullmatch(
        r"(?P<where>.+?)(=(?P<name>[^=/]*?))?(@(?P<component>\w+))?(:(?P<weight>[-+.\de]+))?", text
    )
    weight = 1.0
    try:
        if found is not None and found["weight"] is not None:
            weight = float(found["weight"])
    except ValueError:
        found = None
    if found is None:
        raise OptionError("lora", f"--lora {text}: expected PATH_OR_ID[=NAME][@COMPONENT][:WEIGHT]")
    stem = os.path.basename(found["where"].rstrip("/")).removesuffix(".safetensors")
    name = re.sub(r"\W+", "_", stem) if found["name"] is None else found["name"]
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise OptionError(
            "lora", f"--lora {text}: the name {name!r} may have letters, digits, _ and - only"
        )
    return LoraOption(found["where"], name, found["component"], weight)


def _arg(metavar: str, *aliases: str, default: str = "") -> Any:
    """How an option shows in ``--help``; ``default`` is shown where the text does not say it."""
    hint = f"(default: {default})" if default else ""
    return tyro.conf.arg(metavar=metavar, aliases=aliases or None, help_behavior_hint=hint)


_JSON_OBJECT = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="JSON",
    instance_from_str=lambda args: parse_json_object(args[0]),
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda value: [json.dumps(value)],
)


def _from_path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, not true or false")
    return value


Path = Annotated[str, pydantic.BeforeValidator(_from_path)]
Int = Annotated[int, pydantic.BeforeValidator(_no_bool)]
Count = Annotated[Int, pydantic.Field(ge=1)]
Seconds = Annotated[float, pydantic.BeforeValidator(_no_bool), pydantic.Field(ge=0)]
FramesPerSecond = Annotated[
    float, pydantic.BeforeValidator(_no_bool), pydantic.Field(gt=0, le=1000)
]
Timeout = Annotated[Seconds, pydantic.Field(gt=0)]


class OptionError(UsageError):
    """A value that an option cannot have.

    Attributes:
        option: its name, a field of `JobConfig`.
    """

    def __init__(self, option: str, message: str):
        self.option = option
        super().__init__(message)

    def __reduce__(self):
        return OptionError, (self.option, str(self))


@dataclass(frozen=True)
class JobOptions:
    """What to generate, and where to write it."""

    model: Annotated[Path | None, _arg("MODEL", "-m")] = None
    """Directory or hub id of a diffusers pipeline. Default: the embedded demonstration model."""
    prompts: Annotated[Path | None, _arg("FILE", "-p")] = None
    """Prompt file: .txt, .csv, .tsv, .json, .jsonl (.gz too); - reads standard input."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, _arg("TEXT")] = ()
    """A prompt; may be repeated. Default: a dozen that the embedded model knows."""
    output: Annotated[Path, _arg("DIR", "-o", default="ddinfer-out")] = "ddinfer-out"
    """Directory for images and records. The same job in it is resumed, another job refused."""
    limit: Annotated[Count | None, _arg("N")] = None
    """Take only the first N prompts."""


@dataclass(frozen=True)
class ImageOptions:
    """How each image is generated, unless its prompt says otherwise."""

    seed: Annotated[Int, pydantic.Field(ge=0, lt=2**63), _arg("INT", default="0")] = 0
    """Image k has seed SEED + k unless its prompt sets one."""
    num_inference_steps: Annotated[Count | None, _arg("N", "--steps")] = None
    """Denoising steps. Default: the pipeline's own."""
    guidance_scale: Annotated[float | None, _arg("X")] = None
    """Guidance scale. Default: the pipeline's own."""
    scheduler: Annotated[str | None, _arg("CLASS[:JSON]")] = None
    """A diffusers scheduler, with settings of its own if any. Default: the pipeline's own."""
    height: Annotated[Count | None, _arg("PIXELS")] = None
    """Height in pixels. Default: the pipeline's own."""
    width: Annotated[Count | None, _arg("PIXELS")] = None
    """Width in pixels. Default: the pipeline's own."""
    negative_prompt: Annotated[str | None, _arg("TEXT")] = None
    """Negative prompt for prompts that set none."""
    num_images_per_prompt: Annotated[Count, _arg("N", default="1")] = 1
    """Images of each prompt, with seeds in sequence."""
    pipeline_kwargs: Annotated[dict[str, Any], _JSON_OBJECT] = field(default_factory=dict)
    """Any further arguments of the pipeline's __call__, as a JSON object."""
    fps: Annotated[FramesPerSecond | None, _arg("X")] = None
    """Frames per second of video files. Default: the pipeline's frame_rate or fps, else 8."""
    image_format: Literal["png", "jpg", "webp"] = "png"
    """What images are saved as; jpg and webp lose a little."""
    video_format: Literal["mp4", "webm", "apng", "frames"] = "mp4"
    """What videos are saved as, with their sound; frames: a zip of PNGs, lossless like apng."""
    audio_format: Literal["wav", "flac"] = "wav"
    """What sound without a video is saved as; both keep 16 bits."""


@dataclass(frozen=True)
class RankOptions:
    """Who generates which images."""

    nproc_per_node: Annotated[int | str | None, _arg("N|auto|gpu|cpu")] = None
    """Ranks on this machine. Default: one for each GPU, else one."""
    device: Annotated[str, _arg("auto|cpu|cuda", default="auto")] = "auto"
    """auto takes the GPUs where there are any and fails where this torch cannot use them."""
    num_threads: Annotated[Count | None, _arg("N")] = None
    """CPU threads of each rank. Default: OMP_NUM_THREADS, else cores / ranks."""
    start_method: Literal["auto", "forkserver", "spawn"] = "auto"
    """How ranks are started, as in Python's multiprocessing. auto: forkserver (imports once for
    all ranks) on Linux, spawn elsewhere or where imports have initialized CUDA."""
    batch_size: Annotated[Count, _arg("N", default="1")] = 1
    """Neighbouring prompts with equal parameters that share one pipeline call."""

    schedule: Literal["static", "dynamic"] = "static"
    """static: each rank has its slice. dynamic: idle ranks take the next batch from a shared queue.
    Same images."""
    shard: Annotated[str | None, _arg("K/N")] = None
    """Generate the K-th of N parts of the job (1/8 … 8/8), on machines that share nothing."""


@dataclass(frozen=True)
class MemoryOptions:
    """Models larger than a GPU."""

    placement: Annotated[Path | None, _arg("auto|balanced|staged|FILE.json")] = None
    """Place each rank's model on its GPUs, host memory and disk; staged: encode, denoise and decode
    one after another. Default: all on one device."""
    max_memory: Annotated[str | None, _arg("0=16GB,cpu=64GB")] = None
    """What --placement may use, per device of a rank. Default: what is free."""
    gpus_per_rank: Annotated[Count, _arg("G", default="1")] = 1
    """GPUs that each rank drives, for --placement: those from local rank * G on."""
    pipeline_parallel: Annotated[Count, _arg("S", default="1")] = 1
    """Cut the denoiser into S stages, held by S neighbouring ranks; several
    images are in flight."""
    balance: Literal["bytes", "time"] = "bytes"
    """What these stages are balanced by: bytes of weights, or time, measured with the first prompt.
    Same images."""


@dataclass(frozen=True)
class TeamOptions:
    """One image on several ranks."""

    cfg_parallel: Annotated[Count, _arg("C", default="1")] = 1
    """Distribute the guidance calls of a step over C teams of ranks. One rank alone makes the same
    images."""
    sequence_parallel: Annotated[Count, _arg("P", default="1")] = 1
    """Split the tokens of a transformer's calls over P neighbouring ranks."""


@dataclass(frozen=True)
class RecoveryOptions:
    """When something goes wrong."""

    max_restarts: Annotated[Int, pydantic.Field(ge=0), _arg("N", default="0")] = 0
    """Start the ranks again up to N times after one died. Under torchrun, torchrun does it."""
    grace_seconds: Annotated[Seconds, _arg("SECONDS", default="20")] = 20.0
    """After SIGTERM or Ctrl-C the current batch may take this long; then it is abandoned."""

    stuck_timeout: Annotated[Timeout | None, _arg("SECONDS")] = None
    """End a run when a rank makes no progress for so long, loading included. Default: warn only."""


@dataclass(frozen=True)
class ModelOptions:
    """How the model is loaded and run."""

    pipeline: Annotated[str | None, _arg("img2img|inpaint|text2img|CLASS")] = None
    """Another diffusers pipeline over the same checkpoint. Default: what model_index.json names."""
    component: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, _arg("NAME=FOLDER_OR_ID")] = ()
    """A component from elsewhere, such as controlnet=… or vae=…; a repeated NAME gives several."""
    lora: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction, _arg("PATH_OR_ID[=NAME][@COMPONENT][:WEIGHT]")
    ] = ()
    """A LoRA, added to the model's weights; repeat for several. A prompt's "lora" says which."""
    dtype: Annotated[str, _arg("auto|float32|float16|bfloat16", default="auto")] = "auto"
    """auto: float32 on CPU, else the checkpoint's own. By component: vae=float32,bfloat16."""
    quantize: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, _arg("COMPONENT=fp8")] = ()
    """Keep a component's weights in 8 bits and compute in its dtype. Changes images."""
    variant: Annotated[str | None, _arg("NAME")] = None
    """Variant of the weight files, such as fp16."""
    revision: Annotated[str | None, _arg("REV")] = None
    """Branch, tag or commit of a hub repository."""
    token: Annotated[str | None, _arg("TOKEN")] = None
    """Hub token. Never saved; setting HF_TOKEN is safer."""
    setup: Annotated[Path | None, _arg("FILE.py:FUNCTION")] = None
    """Call FUNCTION(pipe) once the pipeline is loaded, for whatever no option does. Never saved."""
    trust_remote_code: bool = False
    """Run the pipeline code in the model's repository."""
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


@dataclass(frozen=True)
class RunOptions:
    """This run alone: the directory, what is printed, where options come from."""

    overwrite: bool = False
    """Delete the job in the output directory and start again; other files stay."""
    extend: bool = False
    """Accept prompts that were appended since the job in the directory was started."""
    accept_versions: bool = False
    """Resume the job in the directory although library versions have changed."""
    dry_run: bool = False
    """Print slices, batches, disk estimate and the first requests; load and write nothing."""
    json: bool = False
    """Print the plan or the closing summary as JSON on standard output."""
    config: Annotated[Path | None, _arg("FILE")] = None
    """YAML or JSON file with any of these options, or a job.json to run again."""
    print_config: bool = False
    """Print the resolved configuration as YAML and stop."""


@dataclass(frozen=True)
class JobConfig(
    RunOptions,
    ModelOptions,
    RecoveryOptions,
    TeamOptions,
    MemoryOptions,
    RankOptions,
    ImageOptions,
    JobOptions,
):
    """Run a diffusers pipeline over many prompts on many GPUs: all options of a job, flat."""

    def __post_init__(self) -> None:
        for name, value in _validated(vars(self)).items():
            object.__setattr__(self, name, value)
        self._check_placement()
        self._check_team()
        _ = self.shard_of, self.dtypes, self.components, self.loras  # raise
        self._check_quantize()
        if self.compile and self.lora:
            raise UsageError("--compile does not go with --lora; leave one out")
        if self.setup is not None and self.placement == "staged":
            raise UsageError(
                "--setup does not go with --placement staged, which loads the pipeline again for "
                "each stage; use --placement balanced"
            )
        if self.prompts is not None and self.prompt:
            raise UsageError(
                f"--prompts {self.prompts} and --prompt {self.prompt[0]!r} were both given; "
                "use one of them"
            )
        for name in self.pipeline_kwargs:
            if name in PIPELINE_SETTINGS:
                raise UsageError(f"--pipeline_kwargs {name}: it is an option, --{name}")
            if name in RESERVED_CALL_ARGUMENTS:
                raise UsageError(f"--pipeline_kwargs {name}: {RESERVED_CALL_ARGUMENTS[name]}")

    def _check_quantize(self) -> None:
        for text in self.quantize:
            name, _, kind = text.partition("=")
            if not name.isidentifier() or kind != "fp8":
                raise OptionError(
                    "quantize",
                    f"--quantize {text}: expected COMPONENT=fp8, such as transformer=fp8",
                )
        others = {
            "placement": self.placement is not None,
            "pipeline_parallel": self.pipeline_parallel > 1,
            "lora": bool(self.lora),
            "compile": self.compile,
        }
        for option in (name for name, is_given in others.items() if is_given and self.quantize):
            raise UsageError(f"--quantize does not go with --{option}; leave one out")

    def _check_placement(self) -> None:
        """The options that say how a rank, or several, hold the model."""
        placement = self.placement
        if self.compile and self.pipeline_parallel > 1:
            raise UsageError(
                f"--compile does not go with --pipeline_parallel {self.pipeline_parallel}: a "
                "denoiser cut over ranks is followed block by block; leave one out"
            )
        if self.balance == "time" and self.pipeline_parallel == 1:
            raise UsageError(
                "--balance time says how stages are balanced, but there are none; add "
                "--pipeline_parallel S"
            )
        if placement is None:
            for name in ("max_memory", "gpus_per_rank"):
                value = getattr(self, name)
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
        if placement not in PLACEMENTS and self.max_memory is not None:
            raise UsageError(
                f"--max_memory {self.max_memory} and --placement {placement}: a file says where "
                "everything goes; use one of them"
            )
        if self.pipeline_parallel > 1:
            raise UsageError(
                f"--placement {placement} and --pipeline_parallel {self.pipeline_parallel} are "
                "two ways to hold a large model; use one of them"
            )
        if self.compile:
            raise UsageError(
                "--compile does not go with --placement: weights that come and go would be "
                "compiled again; leave one out"
            )

    def _check_team(self) -> None:
        """What does not go with several ranks for one image."""
        options = self.team_options
        if not options:
            return
        others = {
            f"--pipeline_parallel {self.pipeline_parallel}": self.pipeline_parallel > 1,
            f"--placement {self.placement}": self.placement is not None,
            "--compile": self.compile,
            "--quantize": bool(self.quantize),
        }
        for other, is_given in others.items():
            if is_given:
                raise UsageError(
                    f"{options} does not go with {other}: every rank of a replica runs the "
                    "denoiser's own code on its device; leave one out"
                )
        backend = self.attention_backend or "native"
        if self.sequence_parallel > 1 and "native" not in backend:
            raise UsageError(
                f"--sequence_parallel {self.sequence_parallel} exchanges what torch's own "
                f"attention is given; --attention_backend {backend} is another one: leave it out"
            )

    @property
    def team_options(self) -> str:
        """The options by which several ranks make one image, as they are spelt; or nothing."""
        names = ("cfg_parallel", "sequence_parallel")
        return " ".join(f"--{n} {getattr(self, n)}" for n in names if getattr(self, n) > 1)

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold one model together."""
        return self.pipeline_parallel * self.cfg_parallel * self.sequence_parallel

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

    @property
    def dtypes(self) -> dict[str, str]:
        """``--dtype vae=float32,bfloat16`` → ``{"vae": "float32", "default": "bfloat16"}``.

        Raises:
            UsageError: not a dtype.
        """
        found: dict[str, str] = {}
        for part in self.dtype.split(","):
            name, _, dtype = part.strip().rpartition("=")
            if dtype not in DTYPES:
                raise OptionError(
                    "dtype",
                    f"--dtype {self.dtype}: {dtype!r} is none of {', '.join(DTYPES)}; components "
                    "have their own as in vae=float32,bfloat16",
                )
            found[name or "default"] = dtype
        return {"default": "auto", **found}

    @property
    def components(self) -> dict[str, list[str]]:
        """``--component NAME=WHERE``: name → the folders or hub ids, in the order given.

        Raises:
            UsageError: no name or no place.
        """
        found: dict[str, list[str]] = {}
        for text in self.component:
            name, _, where = text.partition("=")
            if not name.isidentifier() or not where:
                raise OptionError(
                    "component",
                    f"--component {text}: expected NAME=FOLDER_OR_ID, such as controlnet=FOLDER",
                )
            found.setdefault(name, []).append(where)
        return found

    @property
    def loras(self) -> list[LoraOption]:
        """``--lora``, one after the other.

        Raises:
            UsageError: one that is none, or a name used twice.
        """
        found = [parse_lora(text) for text in self.lora]
        names = [lora.name for lora in found]
        for name in names:
            if names.count(name) > 1:
                raise OptionError("lora", f"--lora: {name} is given twice; name them: PATH=NAME")
        return found

    def call_defaults(self) -> dict[str, Any]:
        """Call arguments that hold for every prompt that does not say otherwise."""
        named = {
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "scheduler": self.scheduler,
            "lora": {lora.name: lora.weight for lora in self.loras} or None,
            "height": self.height,
            "width": self.width,
        }
        return {**self.pipeline_kwargs, **{k: v for k, v in named.items() if v is not None}}

    def to_dict(self) -> dict[str, Any]:
        """What is saved with the job: everything but `ONE_TIME_OPTIONS`."""
        data = asdict(self)
        for name in ONE_TIME_OPTIONS:
            del data[name]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in data.items()}

    def with_absolute_paths(self) -> JobConfig:
        """Paths made absolute, so that ranks and reruns read the same files from anywhere."""
        changes: dict[str, Any] = {"output": os.path.abspath(self.output)}
        if self.prompts not in (None, "-"):
            changes["prompts"] = os.path.abspath(str(self.prompts))
        if self.model is not None and os.path.isdir(self.model):
            changes["model"] = os.path.abspath(self.model)
        if self.placement is not None and self.placement not in PLACEMENTS:
            changes["placement"] = os.path.abspath(self.placement)
        if self.setup is not None:
            changes["setup"] = os.path.abspath(self.setup)
        parts = (part.partition("=") for part in self.component)
        changes["component"] = tuple(
            f"{name}={os.path.abspath(where) if os.path.isdir(where) else where}"
            for name, _, where in parts
        )
        changes["lora"] = tuple(
            lora.text(os.path.abspath(lora.where) if os.path.exists(lora.where) else lora.where)
            for lora in self.loras
        )
        return replace(self, **changes)


@cache
def _adapter() -> pydantic.TypeAdapter[Any]:
    """Validates the values of all fields, by their names."""
    types = get_type_hints(JobConfig, include_extras=True)
    return pydantic.TypeAdapter(TypedDict("Options", types))  # type: ignore[operator]


def _validated(values: dict[str, Any]) -> dict[str, Any]:
    try:
        return _adapter().validate_python(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        problem = first["msg"][0].lower() + first["msg"][1:]
        raise OptionError(name, f"--{name} {values[name]!r}: {problem}") from None
