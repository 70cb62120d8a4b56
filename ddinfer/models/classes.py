"""Importing the classes of a model before there is anything to make of them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ddinfer.errors import UsageError
from ddinfer.models.repository import MODEL_INDEX, local_folder, read_model_index

#: What transformers' lazy modules are made from: needed backends → module → names in it.
Structure = Mapping[frozenset[str], Mapping[str, set[str]]]

#: Whose classes a model_index.json may have imported by its mere name.
TRUSTED = ("diffusers", "transformers")


def import_classes(model: str, revision: str | None = None) -> None:
    """Import what a pipeline's model_index.json names: the pipeline and its components.

    Only diffusers' and transformers' own classes, and only of a model that is on this machine:
    nothing is fetched, and nothing is said of what is missing. Whoever loads the model does.
    """
    folder = _folder_here(model, revision)
    if folder is None:
        return
    _import_transformers_models()
    index = read_model_index(folder)
    wanted = [(entry.library, entry.class_name) for entry in index.entries]
    if index.custom_module is None:
        wanted.insert(0, ("diffusers", index.class_name))
    for library, name in wanted:
        if library in TRUSTED:
            getattr(importlib.import_module(library), name, None)  # lazy: this imports it


def _import_transformers_models() -> None:
    """``import transformers.models``, a quarter of a second faster.

    transformers reads its 1,600 model files for the names in them, twice: once for
    ``transformers``, where the names begin with ``models.``, and once for ``transformers.models``.
    The first reading is kept by ``define_import_structure``, and the second follows from it.
    """
    import transformers

    import_utils: Any = importlib.import_module("transformers.utils.import_utils")
    define: Callable[..., Structure] = import_utils.define_import_structure
    folder = Path(transformers.__file__).parent / "models"

    def from_the_first(path: str, prefix: str | None = None) -> Structure:
        if (Path(path), prefix) != (folder / "__init__.py", None):
            return define(path, prefix)
        return {
            backends: {
                module.removeprefix("models."): names
                for module, names in modules.items()
                if module.startswith("models.")
            }
            for backends, modules in define(folder, prefix="models").items()
        }

    import_utils.define_import_structure = from_the_first
    try:
        importlib.import_module("transformers.models")
    finally:
        import_utils.define_import_structure = define


def _folder_here(model: str, revision: str | None) -> Path | None:
    try:
        folder = local_folder(model)
    except UsageError:
        return None
    if folder is not None:
        return folder
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(os.fspath(model), MODEL_INDEX, revision=revision)
    return Path(file).parent if isinstance(file, str) else None
