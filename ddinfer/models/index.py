"""Which pipeline a folder or Hub repository holds, before any weight is read or fetched.

Its model_index.json names the pipeline's class and its components' classes.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer import tiny
from ddinfer.errors import UsageError
from ddinfer.models.hub import MODEL_INDEX, fetch_file, fetch_files

if TYPE_CHECKING:
    from filelock import FileLock

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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


def scheduler_name(folder: str | os.PathLike[str]) -> str | None:
    """Class of a pipeline's scheduler, ``None`` where it has none."""
    entries = read_model_index(folder).entries
    return next((entry.class_name for entry in entries if entry.name == "scheduler"), None)


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
    raise UsageError(f"no such folder: {text}, and it is not a Hub id (owner/name)")


def index_folder(
    path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """A folder that holds at least ``path``'s model_index.json; weights are not fetched."""
    folder = local_folder(path)
    if folder is not None:
        return folder
    return fetch_file(os.fspath(path), MODEL_INDEX, revision=revision, token=token).parent


def configs_folder(
    path: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None
) -> Path:
    """The folder with a pipeline's configs; of a Hub repository they alone are fetched.

    Raises:
        UsageError, HubError: see `ddinfer.models.hub.fetch_file`.
    """
    folder = local_folder(path)
    if folder is not None:
        return folder
    patterns = [
        MODEL_INDEX,
        "*/config.json",
        "*/scheduler_config.json",
        "*/*.index.json",
        "*/*.index.*.json",
    ]
    return fetch_files(os.fspath(path), patterns, revision=revision, token=token)


def pipeline_class(
    path: str | os.PathLike[str],
    trust_remote_code: bool = False,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> type:
    """The pipeline class named by ``path``'s model_index.json. Only that file is read (or fetched).

    Raises:
        UsageError: no pipeline there, a class this diffusers does not have or cannot import, or
            custom code without ``trust_remote_code``.
    """
    folder = index_folder(path, revision=revision, token=token)
    index = read_model_index(folder)
    if index.custom_module is not None:
        file = f"{index.custom_module}.py"
        if not trust_remote_code:
            raise UsageError(custom_code_message(path, file))
        if (folder / file).is_file():
            return dynamic_class(folder, file, index.class_name)
        return dynamic_class(path, file, index.class_name, revision=revision, token=token)
    import diffusers

    found = getattr(diffusers, index.class_name, None)
    if not isinstance(found, type):
        raise UsageError(
            f"{os.fspath(path)} is a {index.class_name}, which diffusers {diffusers.__version__} "
            "does not have; use the diffusers version that made it (or a newer one)"
        )
    missing = getattr(found, "_backends", None)
    if missing is not None and not issubclass(found, diffusers.DiffusionPipeline):
        raise UsageError(
            f"{index.class_name} needs a package that is not installed here: one of "
            f"{', '.join(missing)}"
        )
    if not issubclass(found, diffusers.DiffusionPipeline):
        raise UsageError(
            f"{os.fspath(path)} names {index.class_name}, which is no PyTorch pipeline of diffusers"
        )
    return found


def custom_code_message(path: str | os.PathLike[str], file: str) -> str:
    return (
        f"{os.fspath(path)} brings its own code ({file}), which would run on this machine. "
        "Read it; if you trust it, pass --trust_remote_code (trust_remote_code=True)"
    )


def dynamic_class(
    source: str | os.PathLike[str], file: str, name: str, **remote: str | None
) -> type:
    """A class from a repository's own Python, which runs: only after it was trusted."""
    from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

    arguments: dict[str, Any] = {"module_file": file, "class_name": name, **remote}
    if "trust_remote_code" in inspect.signature(get_class_from_dynamic_module).parameters:
        arguments["trust_remote_code"] = True
    # It copies the file into a cache that all ranks share, and imports it from there.
    with _custom_code_lock():
        return get_class_from_dynamic_module(os.fspath(source), **arguments)


def _custom_code_lock() -> FileLock:
    from diffusers.utils.constants import HF_MODULES_CACHE
    from filelock import FileLock

    os.makedirs(HF_MODULES_CACHE, exist_ok=True)
    return FileLock(os.path.join(HF_MODULES_CACHE, "ddinfer.lock"))


def call_parameters(
    path: str | os.PathLike[str],
    trust_remote_code: bool = False,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Mapping[str, inspect.Parameter]:
    """What the pipeline's ``__call__`` takes, ``self`` left out, in order.

    Raises:
        UsageError: see `pipeline_class`.
    """
    found = pipeline_class(path, trust_remote_code, revision=revision, token=token)
    parameters = dict(inspect.signature(found.__call__).parameters)
    parameters.pop("self", None)
    return parameters
