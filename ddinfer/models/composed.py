"""A pipeline's folder composed of others: another class, and components from elsewhere.

The composed folder holds links to the files that it is made of and a model_index.json of its own,
so that whatever reads a pipeline's folder (loading, planning, the job's identity) needs to know
nothing of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddinfer.errors import UsageError
from ddinfer.models.checkpoint import STEMS
from ddinfer.models.hub import MODEL_INDEX, fetch_files
from ddinfer.models.index import HUB_ID, pipeline_class, read_model_index
from ddinfer.models.meta_model import is_several_models

#: What ``--pipeline`` knows by name → the table of diffusers' AutoPipelines.
TASKS = {
    "text2img": "AUTO_TEXT2IMAGE_PIPELINES_MAPPING",
    "img2img": "AUTO_IMAGE2IMAGE_PIPELINES_MAPPING",
    "inpaint": "AUTO_INPAINT_PIPELINES_MAPPING",
}

#: Files of a component other than its weights.
_SETTINGS = ("*.json", "*.txt", "*.model", "*.py")


def compose(
    folder: Path,
    pipeline: str | None,
    components: Mapping[str, Sequence[str]],
    *,
    variant: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    configs_only: bool = False,
) -> Path:
    """``folder`` itself, or a folder of links: its pipeline with another class and components.

    Args:
        pipeline: one of `TASKS`, or the name of a class in diffusers.
        components: name → where each comes from: a folder, a pipeline's folder that has the
            component, or a Hub id of either. Several make one of them all, as ControlNets do.
        configs_only: of the Hub's components only configs are fetched.

    Raises:
        UsageError: no such class or component, or the two do not go together.
        HubError: the Hub could not be reached.
    """
    if pipeline is None and not components:
        return folder
    index = json.loads((folder / MODEL_INDEX).read_text(encoding="utf-8"))
    found = {
        name: [_component(name, where, variant, token, configs_only) for where in places]
        for name, places in components.items()
    }
    if pipeline is not None:
        index["_class_name"] = _chosen_class(index["_class_name"], pipeline, found)
    files = dict(_files_of(folder, without=found))
    for name, folders in found.items():
        for number, part in enumerate(folders):
            inside = name if number == 0 else f"{name}_{number}"
            files |= {f"{inside}/{file}": place for file, place in _files_of(part)}
        index[name] = _entry(name, folders[0], index.get(name))
    composed = _linked(index, files)
    kind = pipeline_class(composed, trust_remote_code)
    _check_takes(kind, found)
    several = {name for name, folders in found.items() if len(folders) > 1}
    if not several:
        return composed
    for name in several:
        index[name] = _entry_of_several(kind, name)
    return _linked(index, files)


def _chosen_class(current: Any, wanted: str, components: Mapping[str, Any]) -> str:
    """The class that ``--pipeline`` asks for.

    Raises:
        UsageError: diffusers has no such class, or no sibling of the pipeline for the task.
    """
    import diffusers

    if wanted not in TASKS:
        kind = getattr(diffusers, wanted, None)
        if not isinstance(kind, type) or not hasattr(kind, "save_pretrained"):
            raise UsageError(
                f"--pipeline {wanted} is none of {', '.join(TASKS)}, nor a pipeline class of "
                f"diffusers {diffusers.__version__}"
            )
        return wanted
    found = _sibling(str(current), wanted, controlled="controlnet" in components)
    if found is None:
        raise UsageError(
            f"--pipeline {wanted}: diffusers {diffusers.__version__} has no {wanted} pipeline for "
            f"the checkpoint of a {current}; name the class if there is one"
        )
    return found


def _sibling(current: str, task: str, *, controlled: bool) -> str | None:
    """The class that diffusers' AutoPipelines use for this task with the same checkpoint."""
    from diffusers.pipelines import auto_pipeline

    tables = {name: getattr(auto_pipeline, table) for name, table in TASKS.items()}
    families = [
        family
        for table in tables.values()
        for family, kind in table.items()
        if kind.__name__ == current
    ]
    for family in families:
        wanted = f"{family.removesuffix('-controlnet')}-controlnet" if controlled else family
        if wanted in tables[task]:
            return tables[task][wanted].__name__
    return None


def _component(
    name: str, where: str, variant: str | None, token: str | None, configs_only: bool
) -> Path:
    """The folder of a component: given itself, or inside of a pipeline's."""
    folder = Path(where).expanduser()
    if not folder.is_dir():
        if not HUB_ID.fullmatch(where) or where.startswith("."):
            raise UsageError(
                f"--component {name}={where}: no such folder, and not a Hub id (owner/name)"
            )
        folder = fetch_files(where, [MODEL_INDEX, *_SETTINGS], token=token)
        inside = f"{name}/" if (folder / MODEL_INDEX).is_file() else ""
        if not configs_only:
            weights = [f"{inside}{stem}*.safetensors" for stem in STEMS]
            others = [] if variant else ["*.fp16*", "*.bf16*", "*.non_ema*"]
            fetch_files(where, [*_SETTINGS, *weights], ignore=others, token=token)
    if (folder / MODEL_INDEX).is_file():
        folder = folder / name
    if not folder.is_dir() or not any(folder.glob("*.json")):
        raise UsageError(
            f"--component {name}={where}: {folder} holds no component; expected its config.json"
        )
    return folder


def _entry(name: str, folder: Path, before: Any) -> list[str]:
    """A component's line of model_index.json: by its own config, else as it was."""
    for file in ("config.json", f"{name}_config.json"):
        if not (folder / file).is_file():
            continue
        config = json.loads((folder / file).read_text(encoding="utf-8"))
        if "_class_name" in config:
            return ["diffusers", config["_class_name"]]
        is_known = isinstance(before, list) and before[0] == "transformers"
        if not is_known and len(config.get("architectures") or ()) == 1:
            return ["transformers", config["architectures"][0]]
    if not isinstance(before, list) or before[0] is None:
        raise UsageError(
            f"--component {name}: {folder} does not say its class (config.json with _class_name "
            "or architectures), and the pipeline has no such component to take it from"
        )
    return before


def _check_takes(kind: Any, components: Mapping[str, Any]) -> None:
    """
    Raises:
        UsageError: the pipeline's class has no such component; names a class that has.
    """
    takes = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    for name in components:
        if name not in takes:
            sibling = _sibling(kind.__name__, "text2img", controlled=name == "controlnet")
            other = f"use --pipeline {sibling}, or " if name == "controlnet" and sibling else ""
            raise UsageError(
                f"--component {name}: {kind.__name__} has no such component; {other}name one of "
                f"{', '.join(takes)}"
            )


def _entry_of_several(kind: Any, name: str) -> list[str]:
    """The line of model_index.json for several models as one component.

    Raises:
        UsageError: the pipeline takes only one.
    """
    import diffusers

    models = [
        found
        for found in vars(sys.modules[kind.__module__]).values()
        if isinstance(found, type) and issubclass(found, diffusers.ModelMixin)
    ]
    for found in filter(is_several_models, models):
        if name in found.__name__.lower():
            package = kind.__module__.split(".")[2]
            library = "diffusers" if hasattr(diffusers, found.__name__) else package
            return [library, found.__name__]
    raise UsageError(f"--component {name}: {kind.__name__} takes only one {name}")


def _files_of(folder: Path, without: Mapping[str, Any] | None = None) -> Iterator[tuple[str, Path]]:
    """(relative name, absolute path) of a folder's files, but for those of some components."""
    left_out = re.compile("|".join(rf"{re.escape(name)}(_\d+)?" for name in without or ("",)))
    for root, _, names in os.walk(folder, followlinks=True):
        for name in sorted(names):
            file = Path(root, name)
            inside, *rest = file.relative_to(folder).parts
            is_replaced = rest and without and left_out.fullmatch(inside)
            if not inside.startswith(".") and not is_replaced and (rest or name != MODEL_INDEX):
                yield "/".join((inside, *rest)), file.absolute()


def _linked(index: Mapping[str, Any], files: Mapping[str, Path]) -> Path:
    """The folder with this model_index.json and links to these files; made once for each."""
    from huggingface_hub.constants import HF_HOME

    text = json.dumps(index, indent=2, sort_keys=True)
    content = json.dumps([text, {name: str(path) for name, path in sorted(files.items())}])
    parent = Path(HF_HOME) / "ddinfer"
    folder = parent / hashlib.sha256(content.encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder
    try:
        parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".", dir=parent))
    except OSError as error:
        raise UsageError(
            f"{parent} cannot be written ({error.strerror}), where links to the parts of this "
            "pipeline are kept; set HF_HOME to a directory that can"
        ) from None
    (building / MODEL_INDEX).write_text(text, encoding="utf-8")
    for name, path in files.items():
        (building / name).parent.mkdir(parents=True, exist_ok=True)
        (building / name).symlink_to(path)
    with contextlib.suppress(OSError):  # another rank was first
        os.rename(building, folder)
    shutil.rmtree(building, ignore_errors=True)
    read_model_index(folder)  # raises where it is not there
    return folder
