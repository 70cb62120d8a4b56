"""Which pipeline a folder holds and what its ``__call__`` takes, before any weight is read."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ddinfer.errors import UsageError
from ddinfer.models.repository import custom_code_message, index_folder, read_model_index

if TYPE_CHECKING:
    from filelock import FileLock


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
