"""Importing the classes of a model before there is anything to make of them."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from ddinfer.errors import UsageError
from ddinfer.models.hub import MODEL_INDEX
from ddinfer.models.index import local_folder, read_model_index

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
    index = read_model_index(folder)
    wanted = [(entry.library, entry.class_name) for entry in index.entries]
    if index.custom_module is None:
        wanted.insert(0, ("diffusers", index.class_name))
    for library, name in wanted:
        if library in TRUSTED:
            getattr(importlib.import_module(library), name, None)  # lazy: this imports it


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
