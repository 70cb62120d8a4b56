"""Where a `JobConfig` comes from: a config file < ``DDINFER_*`` in the environment < options.

The options are derived from the dataclass by tyro, which takes ``--batch_size`` and
``--batch-size`` alike.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes

from ddinfer.config import (
    TRUST_OPTIONS,
    ImageOptions,
    JobConfig,
    JobOptions,
    MemoryOptions,
    ModelOptions,
    OptionError,
    RankOptions,
    RecoveryOptions,
    RunOptions,
    TeamOptions,
    parse_json_object,
)
from ddinfer.errors import UsageError

ENVIRONMENT_PREFIX = "DDINFER_"


@dataclass(frozen=True)
class OptionGroups:
    """Run a diffusers pipeline over many prompts on many GPUs.

    Start with:  ddinfer --model MODEL --prompts FILE --output DIR   (again to resume)
                 ddinfer plan MODEL            what fits which GPUs, before anything is loaded
                 ddinfer report DIR            a page of the images and what they were made with
    """

    job: OmitArgPrefixes[JobOptions]
    image: OmitArgPrefixes[ImageOptions]
    rank: OmitArgPrefixes[RankOptions]
    memory: OmitArgPrefixes[MemoryOptions]
    team: OmitArgPrefixes[TeamOptions]
    recovery: OmitArgPrefixes[RecoveryOptions]
    model: OmitArgPrefixes[ModelOptions]
    run: OmitArgPrefixes[RunOptions]

    @classmethod
    def of(cls, config: JobConfig) -> OptionGroups:
        """The options of a job by group, as ``--help`` shows them."""
        return cls(
            **{
                name: group(**{f.name: getattr(config, f.name) for f in fields(group)})
                for name, group in option_groups().items()
            }
        )

    def config(self) -> JobConfig:
        """The job that the options describe."""
        values: dict[str, Any] = {}
        for group in vars(self).values():
            values |= vars(group)
        return JobConfig(**values)


def option_groups() -> dict[str, type]:
    """The dataclass of each group, in the order of ``--help``."""
    return get_type_hints(OptionGroups)


def parse_config(
    argv: Sequence[str], environ: Mapping[str, str] | None = None, *, prog: str = "ddinfer"
) -> JobConfig:
    """Resolve file < environment < command line.

    Raises:
        UsageError: an unknown key or variable, a value of the wrong type, or a file that asks for
            one of the `TRUST_OPTIONS`.
        SystemExit: from tyro, with code 2 for a bad option and 0 for ``--help``.
    """
    environ = os.environ if environ is None else environ
    path = _option_value(argv, "config") or environ.get(ENVIRONMENT_PREFIX + "CONFIG")
    layers, sources = _read_file(path) if path else ({}, {})
    wanted_by_file = {name: layers.pop(name) for name in TRUST_OPTIONS if name in layers}
    layers_above, variables = _read_environment(environ)
    layers = _overlay(layers, layers_above)
    sources.update(variables)
    prompts_below = {k: layers.pop(k) for k in ("prompt", "prompts") if k in layers}
    try:
        default = JobConfig(**layers)
    except OptionError as error:
        raise UsageError(f"{sources[error.option]}: {error}") from None
    given = tyro.cli(
        OptionGroups,
        prog=prog,
        args=list(argv),
        default=OptionGroups.of(default),
        use_underscores=True,
    ).config()
    for name, wanted in wanted_by_file.items():
        if wanted and not getattr(given, name):
            raise UsageError(
                f"{path}: {name} is set, which lets code run on this machine that comes with "
                f"{wanted_by_file[name] if name == 'setup' else given.model}. A file cannot "
                f"switch that on: give --{name} on the command line if you trust it, else delete "
                "the line"
            )
    if not given.prompt and given.prompts is None:
        given = replace(given, **prompts_below)
    return given


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` wins; naming prompts in one way drops the other way named below."""
    if "prompt" in above or "prompts" in above:
        below = {k: v for k, v in below.items() if k not in ("prompt", "prompts")}
    return {**below, **above}


def _option_value(argv: Sequence[str], name: str) -> str | None:
    found = None
    for k, word in enumerate(argv):
        if word == f"--{name}" and k + 1 < len(argv):
            found = argv[k + 1]
        elif word.startswith(f"--{name}="):
            found = word.split("=", 1)[1]
    return found


def _read_file(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """→ (option → value, option → where it was found)."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not YAML or JSON: {error}") from None
    if isinstance(data, dict) and "fingerprint" in data and "config" in data:
        data = data["config"]  # a job.json
    if not isinstance(data, dict):
        raise UsageError(
            f"--config {path}: expected a mapping of options, got {type(data).__name__}"
        )
    values = {_known(str(key), f"{path}: ", ""): value for key, value in data.items()}
    return values, dict.fromkeys(values, path)


def _read_environment(environ: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """→ (option → value, option → its variable)."""
    values: dict[str, Any] = {}
    sources = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        name = _known(name, "environment variable ", ENVIRONMENT_PREFIX)
        sources[name] = variable
        values[name] = [text] if name in ("prompt", "component", "lora", "quantize") else text
        if name == "pipeline_kwargs":
            try:
                values[name] = parse_json_object(text)
            except ValueError as error:
                raise UsageError(f"{variable}: {error}") from None
    return values, sources


def _known(name: str, where: str, prefix: str) -> str:
    plain = name.replace("-", "_")
    if plain in _option_names() and (prefix or plain != "config"):
        return plain
    close = difflib.get_close_matches(plain, _option_names(), n=1)
    spelt = (prefix + close[0].upper() if prefix else close[0]) if close else ""
    hint = f"; did you mean {spelt}?" if close else "; ddinfer --help lists the options"
    found = prefix + name.upper() if prefix else repr(name)
    raise UsageError(f"{where}{found} is not an option{hint}")


def _option_names() -> list[str]:
    """Names of all fields, as options and config files spell them."""
    return [f.name for f in fields(JobConfig)]
