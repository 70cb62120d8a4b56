"""Where a pipeline's files are: a local folder, or a Hub repository brought into the cache.

Nothing here reads weights or imports torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddinfer import tiny
from ddinfer.errors import EXIT_IO, DdinferError, UsageError

MODEL_INDEX = "model_index.json"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class HubError(DdinferError):
    """The Hub could not be reached, or answered with a fault of its own."""

    exit_code = EXIT_IO


@dataclass(frozen=True)
class Entry:
    """A line of model_index.json, like ``"unet": ["diffusers", "UNet2DConditionModel"]``."""

    name: str
    library: str
    class_name: str


@dataclass(frozen=True)
class ModelIndex:
    """A pipeline's model_index.json.

    Attributes:
        class_name: of the pipeline; for a custom one the class inside ``custom_module``.
        custom_module: stem of the python file in the repository that defines the pipeline.
        entries: components that are there.
        nulls: names of those that are listed as null.
        settings: whatever else the pipeline's constructor takes.
    """

    class_name: str
    custom_module: str | None
    entries: tuple[Entry, ...]
    nulls: tuple[str, ...]
    settings: Mapping[str, Any]


def read_model_index(folder: str | os.PathLike[str]) -> ModelIndex:
    """Reads ``folder/model_index.json``.

    Raises:
        UsageError: it is missing, broken, or names no pipeline class.
    """
    file = Path(folder) / MODEL_INDEX
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(_no_index_message(Path(folder))) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{file} is not JSON: {error}") from error
    named = data.get("_class_name") if isinstance(data, dict) else None
    custom_module = None
    if isinstance(named, list) and len(named) == 2:
        custom_module, named = named
    if not isinstance(named, str):
        raise UsageError(f'{file} names no pipeline class ("_class_name"); found {named!r}')
    entries, nulls, settings = [], [], {}
    for key, value in data.items():
        if key.startswith("_"):
            continue
        if isinstance(value, list) and len(value) == 2 and all(_text_or_none(v) for v in value):
            if value[0] is not None and value[1] is not None:
                entries.append(Entry(key, value[0], value[1]))
            else:
                nulls.append(key)
        else:
            settings[key] = value
    return ModelIndex(named, custom_module, tuple(entries), tuple(nulls), settings)


def _text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _no_index_message(folder: Path) -> str:
    if (folder / "config.json").is_file():
        return (
            f"{folder} holds one model (config.json), not a pipeline: it has no {MODEL_INDEX}. "
            "Give the pipeline's folder, or load the model with ddinfer.models.loading.load_model"
        )
    inside = sorted(p.name for p in folder.iterdir())[:8]
    return (
        f"{folder} is not a diffusers pipeline: it has no {MODEL_INDEX} (it holds "
        f"{', '.join(inside) or 'nothing'}). Expected what DiffusionPipeline.save_pretrained writes"
    )


def local_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder that ``path`` names on this machine, or ``None`` when it is a Hub id.

    An embedded pipeline is known by its name; ``./NAME`` is a folder that is called the same.

    Raises:
        UsageError: a single file, or neither a folder nor a Hub id.
    """
    text = os.fspath(path)
    folder = tiny.path(text) if text in tiny.PIPELINES else Path(text).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        if folder.name == MODEL_INDEX:
            return folder.parent
        raise UsageError(
            f"{text} is a single file; expected a folder in diffusers format (with {MODEL_INDEX}). "
            "Convert a single-file checkpoint once: "
            f"diffusers.StableDiffusionPipeline.from_single_file({text!r}).save_pretrained(FOLDER) "
            "(with its own pipeline class), then give that folder"
        )
    if HUB_ID.fullmatch(text) and not text.startswith("."):
        return None
    raise UsageError(f"no such folder: {text}. It is no Hub id either (those look like owner/name)")


def index_folder(
    path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """A folder that holds at least ``path``'s model_index.json; weights are not fetched."""
    folder = local_folder(path)
    if folder is not None:
        return folder
    from huggingface_hub import hf_hub_download

    repo = os.fspath(path)
    with _hub_errors(repo, revision):
        file = hf_hub_download(repo, MODEL_INDEX, revision=revision, token=token)
    return Path(file).parent


def pipeline_folder(
    path: str | os.PathLike[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """The folder with the whole pipeline, downloaded when ``path`` is a Hub id.

    Safe to call from every rank at once: the Hub's own file locks let one download and the
    others wait. With ``HF_HUB_OFFLINE=1`` only the cache is looked at.

    Raises:
        UsageError: nothing there, access refused, no safetensors, or offline and not cached.
        HubError: the Hub could not be reached.
    """
    folder = local_folder(path)
    if folder is not None:
        read_model_index(folder)
        return folder
    index = read_model_index(index_folder(path, revision=revision, token=token))
    if index.custom_module is not None and not trust_remote_code:
        raise UsageError(custom_code_message(path, f"{index.custom_module}.py"))
    _check_configs(configs_folder(path, revision=revision, token=token), index)
    from diffusers import DiffusionPipeline

    repo = os.fspath(path)
    with _hub_errors(repo, revision):
        return Path(
            DiffusionPipeline.download(
                repo,
                variant=variant,
                revision=revision,
                token=token,
                use_safetensors=None if allow_pickle else True,
                trust_remote_code=trust_remote_code,
            )
        )


def _check_configs(folder: Path, index: ModelIndex) -> None:
    """What the configs alone can refuse, before gigabytes of weights are downloaded.

    Raises:
        UsageError: a model is quantised, or its config is broken.
    """
    from ddinfer.models.building import read_config  # it needs this module

    for entry in index.entries:
        if (folder / entry.name / "config.json").is_file():
            read_config(folder / entry.name)


def scheduler_name(folder: str | os.PathLike[str]) -> str | None:
    """Class of a pipeline's scheduler, ``None`` where it has none."""
    entries = read_model_index(folder).entries
    return next((entry.class_name for entry in entries if entry.name == "scheduler"), None)


def configs_folder(
    path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """The folder with a pipeline's configs; of a Hub repository they alone are fetched.

    Raises:
        UsageError, HubError: see `pipeline_folder`.
    """
    folder = local_folder(path)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    repo = os.fspath(path)
    with _hub_errors(repo, revision):
        patterns = [MODEL_INDEX, "*/config.json", "*/*.index.json", "*/*.index.*.json"]
        return Path(
            snapshot_download(repo, revision=revision, token=token, allow_patterns=patterns)
        )


def remote_dtypes(
    repo: str, files: Iterable[str], *, revision: str | None = None, token: str | None = None
) -> dict[str, int] | None:
    """safetensors' dtype names → elements, of the first of these files that the Hub has.

    Only its header is fetched. ``None``: it has none of them.

    Raises:
        UsageError, HubError: see `pipeline_folder`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    for file in files:
        try:
            with _hub_errors(repo, revision, missing_is_fine=True):
                found = HfApi(token=token).parse_safetensors_file_metadata(
                    repo, file, revision=revision
                )
        except EntryNotFoundError:
            continue
        return {str(kind): count for kind, count in found.parameter_count.items()}
    return None


def custom_code_message(path: str | os.PathLike[str], file: str) -> str:
    return (
        f"{os.fspath(path)} brings its own code ({file}), which would run on this machine. "
        "Read it; if you trust it, say --trust_remote_code (trust_remote_code=True)"
    )


class _hub_errors:
    """Turns what huggingface_hub and diffusers raise into errors that name the way out."""

    def __init__(self, repo: str, revision: str | None, *, missing_is_fine: bool = False):
        self.repo, self.revision, self.missing_is_fine = repo, revision, missing_is_fine

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            return
        from huggingface_hub import errors as hub

        at = f"{self.repo} at revision {self.revision}" if self.revision else self.repo
        if isinstance(error, hub.GatedRepoError):
            raise UsageError(
                f"{at} is gated: accept its terms on the Hub, then give --token "
                "(or run hf auth login)"
            ) from error
        if isinstance(error, (hub.RepositoryNotFoundError, hub.HFValidationError)):
            raise UsageError(
                f"{self.repo} is neither a folder on this machine nor a repository on the Hub "
                "(or it is private: give --token)"
            ) from error
        if isinstance(error, hub.RevisionNotFoundError):
            raise UsageError(f"{self.repo} has no revision {self.revision!r}") from error
        if isinstance(error, (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled)):
            offline = os.environ.get("HF_HUB_OFFLINE")
            why = f"HF_HUB_OFFLINE={offline} is set" if offline else "the Hub cannot be reached"
            raise UsageError(
                f"{at} is neither a folder on this machine nor complete in the Hub cache, and {why}"
            ) from error
        if isinstance(error, hub.EntryNotFoundError):
            if self.missing_is_fine:
                return
            raise UsageError(
                f"{at} has no {MODEL_INDEX}: not a diffusers pipeline (a single-file checkpoint "
                "must be converted first, see from_single_file and save_pretrained of diffusers)"
            ) from error
        if isinstance(error, hub.HfHubHTTPError):
            raise HubError(f"{at}: the Hub answered with an error: {error}") from error
        if isinstance(error, EnvironmentError) and "safetensors" in str(error):
            raise UsageError(
                f"{at} has no safetensors weights: {error}. Pickled weights can run code when "
                "read; if you trust them, say --allow_pickle"
            ) from error
        if isinstance(error, (ConnectionError, TimeoutError)):
            raise HubError(f"{at}: the Hub cannot be reached: {error}") from error
