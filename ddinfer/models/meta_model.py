"""A model with its parameters on meta (no memory), and where its tensors are (`open_model`).

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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.errors import UsageError, list_some
from ddinfer.models.checkpoint import (
    CheckpointError,
    StoredTensor,
    computing_dtype,
    read_checkpoint,
    read_tensors,
)

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"

log = logging.getLogger(__name__)

#: Tables that transformers once stored in every layer and computes today.
COMPUTED = ("position_ids", "rotary_emb.inv_freq")


class NeedsConversion(Exception):
    """transformers merges or splits this model's stored tensors: only its own loader can."""


@dataclass
class OpenModel:
    """A model whose parameters are still on meta, and where to get them.

    Attributes:
        model: buffers are real; parameters have shapes only.
        stored: name → tensor on disk, for every tensor that the files hold. Of names tied to one
            parameter at least one is there. Empty where the library had to load it by itself.
        dtypes: name → type it has in the model; differs from the stored one where it is converted.
        on_progress: called with every tensor that was read.
    """

    model: torch.nn.Module
    stored: dict[str, StoredTensor]
    dtypes: dict[str, torch.dtype]
    on_progress: Callable[[], None] | None = None

    def fill(self, device_of: Callable[[str], torch.device | None]) -> torch.nn.Module:
        """Reads every tensor to ``device_of(name)``; those for which it is ``None`` stay on meta.

        Buffers that no checkpoint holds go there, too.

        Raises:
            CheckpointError: something that should be real is not.
        """
        import torch

        ties = tied_names(self.model)
        order = sorted(self.stored, key=lambda n: (str(self.stored[n].file), n))
        order = [name for name in order if device_of(name) is not None]
        done: dict[str, torch.Tensor] = {}
        for name, tensor in zip(order, read_tensors(self.stored[n] for n in order), strict=True):
            group = ties.get(name, (name,))
            made = self.convert(name, tensor, device_of(name))
            first = next((done[other] for other in group if other in done), None)
            if first is not None and torch.equal(first, made):
                continue  # stored twice, kept once
            done[name] = made
            for other in group if first is None else (name,):
                set_tensor(self.model, other, made)
        self._retie(done, ties)
        moved: dict[int, torch.Tensor] = {}  # one buffer may have two names
        for name, buffer in list(self.model.named_buffers(remove_duplicate=False)):
            device = device_of(name)
            if name not in self.stored and device is not None and not buffer.is_meta:
                set_tensor(self.model, name, moved.setdefault(id(buffer), buffer.to(device)))
        for name, parameter in list(self.model.named_parameters()):
            device = device_of(name)
            if is_low_rank(name) and device is not None:  # of a LoRA, in memory already
                set_tensor(self.model, name, parameter.detach().to(device))
        if len(order) == len(self.stored):
            finish_weight_norm(self.model)
            _assert_real(self.model)
        return self.model

    def convert(
        self, name: str, tensor: torch.Tensor, device: torch.device | str | None
    ) -> torch.Tensor:
        """One stored tensor as the model has it: moved first, converted there."""
        if self.on_progress is not None:
            self.on_progress()
        return tensor.to(device).to(self.dtypes.get(name, tensor.dtype))

    def _retie(self, done: Mapping[str, torch.Tensor], ties: Mapping[str, tuple[str, ...]]) -> None:
        """One Parameter object again for the names that share one tensor."""
        for name in done:
            owners = [n for n in ties.get(name, ()) if n == name or n not in done]
            if len(owners) > 1:
                first = self.model.get_parameter(owners[0])
                for other in owners[1:]:
                    module, _, leaf = other.rpartition(".")
                    self.model.get_submodule(module)._parameters[leaf] = first


def is_low_rank(name: str) -> bool:
    """Whether a parameter was put beside a layer by `ddinfer.models.adapters`."""
    return ".lora." in name


def finish_weight_norm(model: torch.nn.Module) -> None:
    """Computes the products that (old style) weight_norm keeps beside its parameters."""
    from torch.nn.utils.weight_norm import WeightNorm

    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                setattr(module, hook.name, hook.compute_weight(module))


def _assert_real(model: torch.nn.Module) -> None:
    """A tensor forgotten on meta would compute silent nonsense.

    Raises:
        CheckpointError: some are; they are named.
    """
    import torch

    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{path}.{name}"] = value
    left = [name for name, tensor in tensors.items() if tensor.is_meta]
    if left:
        raise CheckpointError(
            f"{type(model).__name__} has {len(left)} tensors that no file filled: "
            f"{', '.join(left[:6])}"
        )


def set_tensor(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Puts a tensor in place of the parameter or buffer of that name, keeping its kind."""
    import torch

    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = module._parameters.get(leaf)
    if old is not None:
        new = torch.nn.Parameter(tensor, requires_grad=old.requires_grad)
        new.__dict__.update(old.__dict__)
        module._parameters[leaf] = new
    else:
        module._buffers[leaf] = tensor


def open_model(
    folder: Path,
    *,
    kind: type | None = None,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    convert: bool = True,
) -> OpenModel:
    """Builds a model on meta and finds its tensors, without reading one.

    Args:
        kind: its class; ``None``: the one that config.json names.
        convert: lets transformers load the model whole where only it can convert its tensors.

    Raises:
        UsageError, CheckpointError: see `ddinfer.models.loading.load_model`.
        NeedsConversion: it would have to, and may not.
    """
    import torch

    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}")
    kind = kind or model_class(folder, trust_remote_code=trust_remote_code)
    if is_several_models(kind):
        nets = [
            open_model(part, dtype=dtype, variant=variant, allow_pickle=allow_pickle)
            for part in folders_of_several(folder)
        ]
        return OpenModel(
            kind([net.model for net in nets]).eval(),
            {f"nets.{k}.{n}": t for k, net in enumerate(nets) for n, t in net.stored.items()},
            {f"nets.{k}.{n}": t for k, net in enumerate(nets) for n, t in net.dtypes.items()},
        )
    table = read_checkpoint(folder, variant=variant, allow_pickle=allow_pickle)
    stored_dtype = dtype or getattr(torch, computing_dtype(table, folder))
    model = build_on_meta(kind, folder, stored_dtype)
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    try:
        stored = match_checkpoint(model, table, folder)
    except NeedsConversion as reason:
        if not convert:
            raise
        log.info("%s is loaded by transformers itself: %s", folder, reason)
        whole = kind.from_pretrained(folder, dtype=stored_dtype)  # type: ignore[attr-defined]
        return OpenModel(whole.eval(), {}, {})
    state = model.state_dict(keep_vars=True)
    dtypes = {
        name: dtype_of(model, name, state[name], dtype)
        if dtype is not None and tensor.is_floating
        else getattr(torch, tensor.dtype)
        for name, tensor in stored.items()
    }
    return OpenModel(model, stored, dtypes)


def dtype_of(model: Any, name: str, built: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type of a floating tensor when a model that was built under ``dtype`` is loaded in it."""
    import torch
    from diffusers import ModelMixin

    if _stays_float32(model, name, dtype):
        return torch.float32
    # transformers leaves what a module declares in a type of its own in that type.
    return dtype if isinstance(model, ModelMixin) else built.dtype


def _stays_float32(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether the model's class wants this tensor in float32 when the rest is ``dtype``."""
    import torch
    from diffusers import ModelMixin

    wanted = list(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not isinstance(model, ModelMixin):
        # transformers: the plain list is about float16 alone, the strict one about both.
        wanted = wanted if dtype == torch.float16 else []
        if dtype in (torch.float16, torch.bfloat16):
            wanted += list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return any(f".{module}." in f".{name}." for module in wanted)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """``"bfloat16"``, ``"bf16"``, ``torch.bfloat16`` … → the dtype; ``"auto"`` → ``None``.

    Raises:
        UsageError: no such floating dtype.
    """
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    known = {
        "auto": None,
        **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
        **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
        **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    }
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise UsageError(f"unknown dtype {dtype!r}; expected one of {', '.join(known)}")
    return known[name]


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
        return import_class("diffusers", config["_class_name"], folder)
    names = config.get("architectures") or []
    if len(names) != 1:
        raise UsageError(
            f"{folder}/config.json names no model class: expected _class_name (diffusers) or one "
            f"name under architectures (transformers), found {names!r}"
        )
    return import_class("transformers", names[0], folder)


def import_class(library: str, name: str, folder: Path) -> type:
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
