"""A model's modules from its config: parameters on meta (no memory), buffers real.

Building all of it under ``torch.device("meta")`` would lose the buffers that no checkpoint
holds (rotary tables, position ids), so only parameters are put there, as they are registered.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.errors import UsageError, list_some
from ddinfer.models.checkpoint import CheckpointError, StoredTensor

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"

log = logging.getLogger(__name__)

#: Tables that transformers once stored in every layer and computes today.
COMPUTED = ("position_ids", "rotary_emb.inv_freq")


class NeedsConversion(Exception):
    """transformers merges or splits this model's stored tensors: only its own loader can."""


def read_config(folder: Path) -> dict[str, Any]:
    """``folder/config.json``.

    Raises:
        UsageError: missing, broken, or of a quantised checkpoint.
    """
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder} holds no model: it has no {CONFIG}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{file} is not JSON: {error}") from error
    if config.get("quantization_config"):
        kind = config["quantization_config"].get("quant_method", "unknown")
        raise UsageError(
            f"{folder} is quantised ({kind}), which ddinfer does not load; use a checkpoint in "
            "float32, float16 or bfloat16"
        )
    return config


def build_on_meta(kind: Any, folder: Path, dtype: torch.dtype | None) -> torch.nn.Module:
    """An instance of a diffusers or transformers model class with the config in ``folder``.

    Args:
        dtype: default type while it is built, as ``from_pretrained`` has it; ``None``: float32.
    """
    import torch
    from diffusers import ModelMixin

    if is_several_models(kind):
        parts = folders_of_several(folder)
        return kind([build_on_meta(model_class(part), part, dtype) for part in parts]).eval()
    config = read_config(folder)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        with parameters_on_meta():
            if issubclass(kind, ModelMixin):
                model = _build_diffusers(kind, config)
            else:
                model = kind(_transformers_config(kind, folder, dtype or torch.float32))
                _read_generation_config(model, folder)
    finally:
        torch.set_default_dtype(previous)
    return model.eval()


def model_class(folder: Path, *, trust_remote_code: bool = False) -> type:
    """The class that a model folder's config.json names.

    Raises:
        UsageError: it names none, or one that the installed libraries do not have.
    """
    config = read_config(folder)
    if "_class_name" in config:
        return class_in("diffusers", config["_class_name"], folder)
    names = config.get("architectures") or []
    if len(names) != 1:
        raise UsageError(
            f"{folder}/config.json names no model class: expected _class_name (diffusers) or one "
            f"name under architectures (transformers), found {names!r}"
        )
    return class_in("transformers", names[0], folder)


def class_in(library: str, name: str, folder: Path) -> type:
    module = importlib.import_module(library)
    try:
        found = getattr(module, name, None)
    except ImportError as error:  # the lazy module tells what the class needs
        raise UsageError(f"{folder} is a {name}: {str(error).strip()}") from error
    if not isinstance(found, type) or "dummy" in found.__module__:
        why = f"needs {getattr(found, '_backends', 'a package')}" if found else "is not in"
        raise UsageError(
            f"{folder} is a {name}, which {why} {library} {module.__version__} as installed here"
        )
    return found


def is_several_models(kind: Any) -> bool:
    """Whether a class only holds models of one kind, in ``nets``, such as MultiControlNetModel."""
    from diffusers import ModelMixin

    return issubclass(kind, ModelMixin) and not hasattr(kind, "from_config")


def folders_of_several(folder: Path) -> list[Path]:
    """Where diffusers saves them: ``controlnet``, ``controlnet_1``, ``controlnet_2``, …"""
    found = [folder]
    while (following := folder.with_name(f"{folder.name}_{len(found)}")).is_dir():
        found.append(following)
    return found


def _transformers_config(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A transformers model's config in ``folder``, of type ``dtype`` as ``from_pretrained`` has it.

    Models inside others (the text model of a CLIPTextModelWithProjection, a vision tower) are built
    in the type that their own config says, whatever the default type is.
    """
    config = kind.config_class.from_pretrained(folder)
    config.dtype = dtype
    for name in config.sub_configs:
        if getattr(config, name) is not None:
            getattr(config, name).dtype = dtype
    return config


def _read_generation_config(model: Any, folder: Path) -> None:
    """How ``generate`` samples (some pipelines call it on their text encoder)."""
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = type(model.generation_config).from_pretrained(folder)


def _build_diffusers(kind: Any, config: dict[str, Any]) -> torch.nn.Module:
    from diffusers.models.modeling_utils import LegacyModelMixin

    if issubclass(kind, LegacyModelMixin):
        from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config

        kind = _fetch_remapped_cls_from_config(config, kind)
    return kind.from_config(config)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter that a module registers is on meta, and ``nn.init`` does nothing."""
    import torch

    register = torch.nn.Module.register_parameter
    names = [n for n in dir(torch.nn.init) if n.endswith("_") and not n.startswith("_")]
    inits = {name: getattr(torch.nn.init, name) for name in names}
    # transformers keeps torch's functions under its own; on meta each takes 2 ms for nothing.
    own_module = sys.modules.get("transformers.initialization")
    own_inits = {name: getattr(own_module, name) for name in names if hasattr(own_module, name)}

    def register_on_meta(self: Any, name: str, param: Any) -> None:
        # One that is on meta already keeps its identity: that is how tied weights stay tied.
        if param is not None and param.device.type != "meta":
            made = type(param) if isinstance(param, torch.nn.Parameter) else torch.nn.Parameter
            attributes = dict(param.__dict__)
            param = made(param.detach().to("meta"), requires_grad=param.requires_grad)
            param.__dict__.update(attributes)
        register(self, name, param)

    def leave(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    for name in inits:
        setattr(torch.nn.init, name, leave)
    for name, function in own_inits.items():
        setattr(own_module, name, _leaving_meta(function))
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
        for name, function in inits.items():
            setattr(torch.nn.init, name, function)
        for name, function in own_inits.items():
            setattr(own_module, name, function)


def _leaving_meta(init: Callable[..., Any]) -> Callable[..., Any]:
    def unless_on_meta(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return tensor if tensor.is_meta else init(tensor, *args, **kwargs)

    return unless_on_meta


def tied_names(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter's name → all names of the same parameter, in the model's order."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def match_checkpoint(
    model: torch.nn.Module, table: Mapping[str, StoredTensor], folder: Path
) -> dict[str, StoredTensor]:
    """The model's tensor names → where each is stored, after the renamings its library applies.

    Of names tied to one parameter only those that the checkpoint has appear.

    Raises:
        CheckpointError: tensors are missing or of another shape.
    """
    from diffusers import ModelMixin

    state = model.state_dict(keep_vars=True)
    if isinstance(model, ModelMixin):
        found = dict(table)
        fix = getattr(model, "_fix_state_dict_keys_on_load", None)
        if fix is not None:
            fix(found)  # it only renames; the values pass through
            state = model.state_dict(keep_vars=True)
    else:
        found = _renamed_for_transformers(model, table, state)
    # Older checkpoints hold buffers that are computed today (CLIP's position_ids).
    computed = {name for name, _ in model.named_buffers()} - set(state)
    surplus = [n for n in found if n not in state and n not in computed]
    if not isinstance(model, ModelMixin):
        surplus = [n for n in surplus if not n.endswith(COMPUTED)]
    surplus = [n for n in surplus if not _ignored(model, "_keys_to_ignore_on_load_unexpected", n)]
    ties = tied_names(model)
    missing = [n for n in state if not any(tied in found for tied in ties.get(n, (n,)))]
    missing = [n for n in missing if not _ignored(model, "_keys_to_ignore_on_load_missing", n)]
    shapes = {
        name: (stored.shape, tuple(state[name].shape))
        for name, stored in found.items()
        if name in state and stored.shape != tuple(state[name].shape)
    }
    if surplus and not missing and not shapes:
        log.warning(
            "%s: %d tensors that %s does not have are not used: %s",
            folder, len(surplus), type(model).__name__, list_some(surplus),
        )  # fmt: skip
    if missing or shapes:
        raise CheckpointError(
            _mismatch_message(model, folder, len(state), missing, surplus, shapes)
        )
    return {name: stored for name, stored in found.items() if name in state}


def _mismatch_message(
    model: torch.nn.Module,
    folder: Path,
    total: int,
    missing: list[str],
    surplus: list[str],
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> str:
    lines = [f"the weights in {folder} are not those of {type(model).__name__} ({total} tensors):"]
    if missing:
        lines.append(f"  missing from the files ({len(missing)}): {list_some(missing)}")
    if surplus:
        lines.append(f"  in the files but not in the model ({len(surplus)}): {list_some(surplus)}")
    if shapes:
        told = [f"{n} is {list(a)}, expected {list(b)}" for n, (a, b) in shapes.items()]
        lines.append(f"  of another shape ({len(shapes)}): {list_some(told)}")
    lines.append("config.json and the weights must come from the same model and library version")
    return "\n".join(lines)


def _ignored(model: torch.nn.Module, attribute: str, name: str) -> bool:
    patterns = getattr(model, attribute, None) or ()
    return any(re.search(pattern, name) for pattern in patterns)


def _renamed_for_transformers(
    model: Any, table: Mapping[str, StoredTensor], state: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Checkpoint names → the model's, by transformers' own rules (5.x) or its older mapping."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # transformers 4: one dict of patterns on the class
        return _renamed_for_transformers_4(model, table, state)
    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings: list[Any] = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    found: dict[str, StoredTensor] = {}
    for key in sorted(table):
        name, converter = rename_source_key(key, renamings, converters, prefix, dict(state))
        if name not in state and key in state:
            name, converter = rename_source_key(key, [], [], prefix, dict(state))
        if converter is not None:
            raise NeedsConversion(f"{type(model).__name__} converts stored tensors: {converter}")
        found[name] = table[key]
    return found


def _renamed_for_transformers_4(
    model: Any, table: Mapping[str, StoredTensor], state: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    prefix = f"{model.base_model_prefix}."
    found: dict[str, StoredTensor] = {}
    for key, stored in table.items():
        name = key
        if name not in state:
            for pattern, replacement in patterns.items():
                name, count = re.subn(pattern, replacement, name)
                if count:
                    break
        if name not in state and name.removeprefix(prefix) in state:
            name = name.removeprefix(prefix)
        elif name not in state and prefix + name in state:
            name = prefix + name
        found[name] = stored
    return found
