"""A pipeline's folder, from which its components are loaded one at a time."""

from __future__ import annotations

import inspect
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ddinfer.errors import UsageError
from ddinfer.models import internals
from ddinfer.models.adapters import LoraFile, LowRank, add_lora, check_layers, read_lora
from ddinfer.models.checkpoint import (
    DTYPES,
    CheckpointError,
    computing_dtype,
    has_variant,
    read_checkpoint,
    weight_files,
    weight_names,
)
from ddinfer.models.component_roles import DENOISER_NAMES
from ddinfer.models.hub import fetch_pipeline, remote_dtypes
from ddinfer.models.index import (
    Entry,
    ModelIndex,
    configs_folder,
    custom_code_message,
    dynamic_class,
    index_folder,
    local_folder,
    pipeline_class,
    read_model_index,
)
from ddinfer.models.meta_model import (
    OpenModel,
    build_on_meta,
    import_class,
    open_model,
    outline,
    parse_dtype,
    read_config,
)

if TYPE_CHECKING:
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineSource:
    """A pipeline's folder, from which components are loaded one at a time.

    Attributes:
        weights_at: the Hub repository that has the weights, when the folder holds configs alone:
            enough to plan by. ``revision`` and ``token`` are for it.
        loras: added to the layers of every component that is opened.

    Raises:
        UsageError: not a pipeline, custom code that is not trusted, or no files of ``variant``.
    """

    folder: Path
    variant: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    weights_at: str | None = None
    revision: str | None = None
    token: str | None = None
    loras: tuple[LoraFile, ...] = ()

    @classmethod
    def for_planning(
        cls,
        path: str | os.PathLike[str],
        *,
        variant: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
    ) -> PipelineSource:
        """A source for `plan_placement`: of a Hub repository only the configs are fetched.

        Raises:
            UsageError, HubError: see `pipeline_folder`.
        """
        folder = configs_folder(path, revision=revision, token=token)
        is_here = local_folder(path) is not None or _holds_weights(folder, variant)
        repo = None if is_here else os.fspath(path)
        return cls(
            folder, variant, trust_remote_code, weights_at=repo, revision=revision, token=token
        )

    def __post_init__(self) -> None:
        if not self.trust_remote_code:
            for entry in self.index.entries:
                if (self.folder / entry.name / f"{entry.library}.py").is_file():
                    file = f"{entry.name}/{entry.library}.py"
                    raise UsageError(custom_code_message(self.folder, file))
        if (
            self.weights_at is None
            and self.variant is not None
            and not any(
                has_variant(self.folder / name, self.variant) for name in self.model_names()
            )
        ):
            raise UsageError(f"{self.folder} has no weights of variant {self.variant!r}")

    @cached_property
    def index(self) -> ModelIndex:
        """model_index.json, without the components that the pipeline's class does not take."""
        index = read_model_index(self.folder)
        parameters = inspect.signature(self.kind.__init__).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return index
        surplus = [entry.name for entry in index.entries if entry.name not in parameters]
        if surplus:
            log.warning(
                "%s: %s takes no %s, which model_index.json lists: not used",
                self.folder, self.kind.__name__, ", ".join(surplus),
            )  # fmt: skip
        return replace(
            index, entries=tuple(entry for entry in index.entries if entry.name in parameters)
        )

    @cached_property
    def kind(self) -> Any:
        return pipeline_class(self.folder, self.trust_remote_code)

    def names(self) -> list[str]:
        """Every component that the pipeline's constructor takes, there or not."""
        wanted = list(inspect.signature(self.kind.__init__).parameters)[1:]
        return [name for name in wanted if name not in self.index.settings]

    def model_names(self) -> list[str]:
        """The components that have weights, by their folders."""
        return [
            e.name for e in self.index.entries if (self.folder / e.name / "config.json").exists()
        ]

    def component_class(self, name: str) -> Any:
        """The class of a component.

        Raises:
            UsageError: a library that components cannot come from, or a class it does not have.
        """
        entry = self._entry(name)
        if (own := own_code(self.folder, entry)) is not None:
            return dynamic_class(self.folder / name, own.name, entry.class_name)
        return installed_class(self.folder, entry)

    def open(self, name: str, dtype: torch.dtype | None, *, read: bool = True) -> OpenModel:
        """A component that has weights (see `open_model`), with the job's LoRAs."""
        opened = open_model(
            self.folder / name,
            kind=self.component_class(name),
            dtype=dtype,
            variant=self.variant,
            allow_pickle=self.allow_pickle,
            read=read,
        )
        for lora, layers in self._low_ranks:
            if name in layers:
                add_lora(opened.model, lora, layers[name], opened.dtypes)
        return opened

    def outline(self, name: str, dtype: torch.dtype | None) -> OpenModel:
        """A component to measure: no weight is read, and of a Hub repository none is needed."""
        if self.weights_at is None:
            return self.open(name, dtype, read=False)
        import torch

        return outline(self.component_class(name), self.folder / name, dtype or torch.float32)

    @cached_property
    def _low_ranks(self) -> list[tuple[LoraFile, dict[str, dict[str, LowRank]]]]:
        unet = self.folder / "unet" / "config.json"
        config = SimpleNamespace(**read_config(unet.parent)) if unet.is_file() else None
        names = self.model_names()
        return [(lora, read_lora(self.kind, lora, names, config)) for lora in self.loras]

    def check_loras(self) -> None:
        """Check the LoRAs against the configs of the models that they are for.

        Raises:
            UsageError: a LoRA of another model, or in a format that cannot be applied.
        """
        for lora, components in self._low_ranks:
            for name, layers in components.items():
                model = build_on_meta(self.component_class(name), self.folder / name, None)
                check_layers(model, lora, layers)

    def is_model(self, name: str) -> bool:
        import torch

        return issubclass(self.component_class(name), torch.nn.Module)

    def load(self, name: str, dtype: torch.dtype | None, device: torch.device) -> Any:
        """A component as it will be used: a model on its device, or a tokenizer, scheduler, …"""
        if self.is_model(name):
            opened = self.open(name, dtype)
            return opened.fill(lambda _: device) if opened.stored else opened.model.to(device)
        inside = self.folder / name
        return self.component_class(name).from_pretrained(
            inside if inside.is_dir() else self.folder
        )

    def dtypes(
        self, dtype: str | torch.dtype | Mapping[str, str | torch.dtype], device: torch.device
    ) -> dict[str, torch.dtype | None]:
        """Component → type of its floating weights, as `load_pipeline` explains ``dtype``."""
        import torch

        given = dict(dtype) if isinstance(dtype, Mapping) else {"default": dtype}
        auto = torch.float32
        if device.type != "cpu" and "auto" in (*given.values(), given.get("default", "auto")):
            auto = self.stored_dtype()
        names = [entry.name for entry in self.index.entries]
        wrong = sorted(set(given) - {*names, "default"})
        if wrong:
            raise UsageError(
                f"dtype names {', '.join(wrong)}; the components are {', '.join(names)}"
            )
        fallback = given.get("default", "auto")
        return {name: parse_dtype(given.get(name, fallback)) or auto for name in names}

    def stored_dtype(self) -> torch.dtype:
        """The type in which the denoiser (else the largest model) is stored."""
        import torch

        names = self.model_names()
        if self.weights_at is not None:
            return self._remote_dtype(self.weights_at)
        tables = {
            name: read_checkpoint(
                self.folder / name, variant=self.variant, allow_pickle=self.allow_pickle
            )
            for name in names
        }
        chosen = next((name for name in DENOISER_NAMES if name in tables), None)
        if chosen is None and tables:
            chosen = max(tables, key=lambda n: sum(t.num_bytes for t in tables[n].values()))
        if chosen is None:
            return torch.float32
        return getattr(torch, computing_dtype(tables[chosen], self.folder / chosen))

    def _remote_dtype(self, repo: str) -> torch.dtype:
        import torch

        name = next((n for n in DENOISER_NAMES if n in self.model_names()), None)
        if name is None:
            return torch.float32
        files = []
        for file, _ in weight_names(self.variant):
            if not file.endswith(".json"):
                files.append(f"{name}/{file}")
            elif (self.folder / name / file).is_file():
                index = json.loads((self.folder / name / file).read_text(encoding="utf-8"))
                files.append(f"{name}/{min(index['weight_map'].values())}")
        counts = remote_dtypes(repo, files, revision=self.revision, token=self.token)
        if not counts:
            raise UsageError(
                f"{repo} has no safetensors weights under {name} to take the dtype from; "
                "pass --dtype"
            )
        return getattr(torch, DTYPES[max(counts, key=lambda kind: counts[kind])][0])

    def assemble(self, components: Mapping[str, Any]) -> DiffusionPipeline:
        """The pipeline of these components and the settings in model_index.json.

        Raises:
            UsageError: a component is missing that the pipeline cannot do without.
        """
        kind, index = self.kind, self.index
        check_connected(kind)
        parameters = dict(inspect.signature(kind.__init__).parameters)
        parameters.pop("self")
        arguments = {k: v for k, v in index.settings.items() if k in parameters} | dict(components)
        missing = []
        for name, parameter in parameters.items():
            if name in arguments or parameter.kind is parameter.VAR_KEYWORD:
                continue
            if parameter.default is not parameter.empty:
                continue
            if name in index.nulls or name in kind._optional_components:
                arguments[name] = None
            else:
                missing.append(name)
        if missing:
            raise UsageError(
                f"{self.folder}: {kind.__name__} needs {', '.join(missing)}, which "
                "model_index.json does not list"
            )
        return kind(**arguments)

    def _entry(self, name: str) -> Entry:
        for entry in self.index.entries:
            if entry.name == name:
                return entry
        raise UsageError(f"{self.folder} has no component {name}")


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
    return fetch_pipeline(
        os.fspath(path),
        variant=variant,
        revision=revision,
        token=token,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
    )


def _check_configs(folder: Path, index: ModelIndex) -> None:
    """What the configs alone can refuse, before gigabytes of weights are downloaded.

    Raises:
        UsageError: a model is quantised, or its config is broken.
    """
    for entry in index.entries:
        if (folder / entry.name / "config.json").is_file():
            read_config(folder / entry.name)


def check_connected(kind: Any) -> None:
    """
    Raises:
        UsageError: a pipeline whose components are in several repositories.
    """
    if getattr(kind, "_load_connected_pipes", False):
        raise UsageError(
            f"{kind.__name__} takes its parts from several repositories, which ddinfer does "
            "not follow; load the pipelines it is made of by themselves"
        )


def own_code(folder: Path, entry: Entry) -> Path | None:
    """The Python file in a component's folder that defines its class, where there is one."""
    import diffusers

    file = folder / entry.name / f"{entry.library}.py"
    return file if file.is_file() and not hasattr(diffusers.pipelines, entry.library) else None


def installed_class(folder: Path, entry: Entry) -> Any:
    """The class of a component in diffusers, transformers, or what the program has imported.

    Raises:
        UsageError: a library that components cannot come from, or a class it does not have.
    """
    import diffusers

    where = folder / entry.name
    if hasattr(diffusers.pipelines, entry.library):
        # Classes move from a pipeline's own module to a common one in newer versions.
        module = getattr(diffusers.pipelines, entry.library)
        found = getattr(module, entry.class_name, None)
        return import_class("diffusers", entry.class_name, where) if found is None else found
    if entry.library in ("diffusers", "transformers"):
        name = entry.class_name
        if entry.library == "transformers":
            name = internals.current_transformers_name(name)
        return import_class(entry.library, name, where)
    # Importing what a file names would run it; what the program imported itself is fine.
    found = getattr(sys.modules.get(entry.library), entry.class_name, None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise UsageError(
            f"{folder}: component {entry.name} is a {entry.class_name} of {entry.library}; "
            "expected diffusers, transformers, or code in the component's own folder. Give the "
            f"component itself: load_pipeline(…, components={{{entry.name!r}: …}})"
        )
    return found


def _holds_weights(folder: Path, variant: str | None) -> bool:
    """Whether the cached files of a Hub repository are enough to load every model."""
    parts = [folder / entry.name for entry in read_model_index(folder).entries]
    try:
        for part in parts:
            if (part / "config.json").is_file():
                weight_files(part, variant=variant)
    except CheckpointError:
        return False
    return True
