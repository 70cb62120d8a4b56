"""A model from its folder: diffusers' with its parameters on meta and its tensors found, unread.

Building all of it under ``torch.device("meta")`` would lose the buffers that no checkpoint
holds (rotary tables, position ids), so only parameters are put there, as they are registered.
transformers' models are loaded by transformers: their weights stay views into the mapped files.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.errors import UsageError, list_some
from ddinfer.models import internals
from ddinfer.models.checkpoint import (
    CheckpointError,
    StoredTensor,
    computing_dtype,
    has_variant,
    read_checkpoint,
    read_tensors,
)
from ddinfer.models.index import custom_code_message, dynamic_class

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"

#: Weight files of a model that are read at the same time.
MAX_READERS = 4

log = logging.getLogger(__name__)


@dataclass
class OpenModel:
    """A model, and where to get its parameters if they are still on meta.

    Attributes:
        model: buffers are real; parameters have shapes only, unless transformers loaded them.
        stored: name → tensor on disk, for every tensor that the files hold. Of names tied to one
            parameter at least one is there. Empty for a model of transformers.
        dtypes: name → type it has in the model; differs from the stored one where it is converted.
        load: loads a model of transformers that is on meta altogether, parameters and buffers.
        is_mapped: its weights are views into mapped files.
        on_progress: called with every tensor that was read.
    """

    model: torch.nn.Module
    stored: dict[str, StoredTensor]
    dtypes: dict[str, torch.dtype]
    load: Callable[[], torch.nn.Module] | None = None
    is_mapped: bool = False
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
        for name, made in self._read(order, device_of):
            group = ties.get(name, (name,))
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

    def _read(
        self, order: list[str], device_of: Callable[[str], torch.device | None]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors where they will live; several files are read at once."""

        def read_file(names: list[str]) -> list[tuple[str, torch.Tensor]]:
            tensors = read_tensors(self.stored[name] for name in names)
            return [
                (name, self.convert(name, tensor, device_of(name)))
                for name, tensor in zip(names, tensors, strict=True)
            ]

        files: dict[Path, list[str]] = {}
        for name in order:
            files.setdefault(self.stored[name].file, []).append(name)
        if len(files) < 2:
            yield from read_file(order)
            return
        with ThreadPoolExecutor(min(MAX_READERS, len(files)), "ddinfer-read") as pool:
            for tensors in pool.map(read_file, files.values()):
                yield from tensors

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
    """Whether a parameter was added to a layer by `ddinfer.models.adapters`."""
    return ".lora." in name


def finish_weight_norm(model: torch.nn.Module) -> None:
    """Computes the products that (old style) weight_norm keeps in addition to its parameters."""
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
    read: bool = True,
) -> OpenModel:
    """Builds a model of diffusers on meta and finds its tensors; loads one of transformers.

    Args:
        kind: its class; ``None``: the one that config.json names.
        read: ``False`` leaves a model of transformers on meta, too: enough to measure it.

    Raises:
        UsageError, CheckpointError: see `ddinfer.models.loading.load_model`.
    """
    import torch

    if not folder.is_dir():
        raise UsageError(f"no such folder: {folder}")
    kind = kind or model_class(folder, trust_remote_code=trust_remote_code)
    files: dict[str, Any] = {"variant": variant, "allow_pickle": allow_pickle}
    if is_several_models(kind):
        nets = [open_model(part, dtype=dtype, **files) for part in folders_of_several(folder)]
        return OpenModel(
            kind([net.model for net in nets]).eval(),
            {f"nets.{k}.{n}": t for k, net in enumerate(nets) for n, t in net.stored.items()},
            {f"nets.{k}.{n}": t for k, net in enumerate(nets) for n, t in net.dtypes.items()},
        )
    table = read_checkpoint(folder, **files)
    built_dtype = dtype or getattr(torch, computing_dtype(table, folder))
    if not is_diffusers(kind):
        read_config(folder)

        def load() -> torch.nn.Module:
            return load_transformers(kind, folder, built_dtype, **files)

        if not read:
            return outline(kind, folder, built_dtype, load)
        stored_dtypes = {tensor.dtype for tensor in table.values() if tensor.is_floating}
        is_mapped = stored_dtypes == {str(built_dtype).removeprefix("torch.")}
        return OpenModel(load(), {}, {}, is_mapped=is_mapped)
    model = build_on_meta(kind, folder, built_dtype)
    stored = match_checkpoint(model, table, folder)
    dtypes = {
        name: dtype_of(model, name, dtype)
        if dtype is not None and tensor.is_floating
        else getattr(torch, tensor.dtype)
        for name, tensor in stored.items()
    }
    return OpenModel(model, stored, dtypes)


def outline(
    kind: Any, folder: Path, dtype: torch.dtype, load: Callable[[], torch.nn.Module] | None = None
) -> OpenModel:
    """A model on meta by its config alone, with the types that its tensors would have."""
    model = build_on_meta(kind, folder, dtype)
    dtypes = {
        name: dtype_of(model, name, dtype) if is_diffusers(kind) else tensor.dtype
        for name, tensor in model.state_dict(keep_vars=True).items()
        if tensor.is_floating_point()
    }
    return OpenModel(model, {}, dtypes, load)


def load_transformers(
    kind: Any,
    folder: Path | None,
    dtype: torch.dtype,
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
    **options: Any,
) -> torch.nn.Module:
    """A model of transformers by its own ``from_pretrained``, on the CPU.

    Weights that are stored in ``dtype`` stay views into the mapped files.

    Raises:
        CheckpointError: tensors are missing or of another shape.
    """
    from transformers.utils import logging as library

    if folder is not None:
        options["variant"] = variant if variant and has_variant(folder, variant) else None
        options["use_safetensors"] = None if allow_pickle else True
    was_shown, verbosity = library.is_progress_bar_enabled(), library.get_verbosity()
    library.disable_progress_bar()
    library.set_verbosity_error()  # what it would report of the tensors is checked below
    try:
        model, found = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are an error below, with the others
            output_loading_info=True,
            **options,
        )
    finally:
        library.set_verbosity(verbosity)
        if was_shown:
            library.enable_progress_bar()
    shapes = {name: (tuple(a), tuple(b)) for name, a, b in found["mismatched_keys"]}
    _check_match(
        model, folder, sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), shapes
    )
    return model.eval()


def dtype_of(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a floating tensor of diffusers' when its model is loaded in ``dtype``."""
    import torch

    stay_float32 = getattr(model, "_keep_in_fp32_modules", None) or ()
    is_one = any(f".{module}." in f".{name}." for module in stay_float32)
    return torch.float32 if is_one else dtype


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

    if is_several_models(kind):
        parts = folders_of_several(folder)
        return kind([build_on_meta(model_class(part), part, dtype) for part in parts]).eval()
    config = read_config(folder)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        if is_diffusers(kind):
            with parameters_on_meta():
                model = internals.current_class(kind, config).from_config(config)
        else:  # buffers, too: it is measured, and loaded before it is used
            with torch.device("meta"), internals.no_init_weights():
                model = kind(_transformers_config(kind, folder, dtype or torch.float32))
    finally:
        torch.set_default_dtype(previous)
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    return model.eval()


def is_diffusers(kind: type) -> bool:
    """Whether a model's class is diffusers'; the others are transformers'."""
    from diffusers import ModelMixin

    return issubclass(kind, ModelMixin)


def model_class(folder: Path, *, trust_remote_code: bool = False) -> type:
    """The class that a model folder's config.json names.

    Raises:
        UsageError: it names none, one that the installed libraries do not have, or code in the
            folder that is not trusted.
    """
    config = read_config(folder)
    own = (config.get("auto_map") or {}).get("AutoModel")
    if own is not None:
        module, _, name = own.rpartition(".")
        if not trust_remote_code:
            raise UsageError(custom_code_message(folder, f"{module}.py"))
        return dynamic_class(folder, f"{module}.py", name)
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
    return is_diffusers(kind) and not hasattr(kind, "from_config")


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


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter that a module registers is on meta, and ``nn.init`` does nothing."""
    import torch

    register = torch.nn.Module.register_parameter
    names = [n for n in dir(torch.nn.init) if n.endswith("_") and not n.startswith("_")]
    inits = {name: getattr(torch.nn.init, name) for name in names}

    def register_on_meta(self: Any, name: str, param: Any) -> None:
        # One that is on meta already keeps its identity: that is how tied weights stay tied.
        if param is not None and param.device.type != "meta":
            made = type(param) if isinstance(param, torch.nn.Parameter) else torch.nn.Parameter
            attributes = dict(param.__dict__)
            param = made(param.detach().to("meta"), requires_grad=param.requires_grad)
            param.__dict__.update(attributes)
        register(self, name, param)

    def unless_on_meta(init: Callable[..., Any]) -> Callable[..., Any]:
        return lambda tensor, *args, **kwargs: (
            tensor if tensor.is_meta else init(tensor, *args, **kwargs)
        )

    torch.nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    for name, function in inits.items():
        setattr(torch.nn.init, name, unless_on_meta(function))
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
        for name, function in inits.items():
            setattr(torch.nn.init, name, function)


def tied_names(model: torch.nn.Module) -> dict[str, tuple[str, ...]]:
    """Every parameter's name → all names of the same parameter, in the model's order."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(group) for group in groups.values() for name in group}


def match_checkpoint(
    model: torch.nn.Module, table: Mapping[str, StoredTensor], folder: Path
) -> dict[str, StoredTensor]:
    """The tensor names of a diffusers model → where each is stored, after diffusers' renamings.

    Of names tied to one parameter only those that the checkpoint has appear.

    Raises:
        CheckpointError: tensors are missing or of another shape.
    """
    found = internals.current_names(model, table)
    state = model.state_dict(keep_vars=True)
    # Older checkpoints hold buffers that are computed today.
    computed = {name for name, _ in model.named_buffers()} - set(state)
    surplus = [n for n in found if n not in state and n not in computed]
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    surplus = [n for n in surplus if not any(re.search(pattern, n) for pattern in ignored)]
    ties = tied_names(model)
    missing = [n for n in state if not any(tied in found for tied in ties.get(n, (n,)))]
    shapes = {
        name: (stored.shape, tuple(state[name].shape))
        for name, stored in found.items()
        if name in state and stored.shape != tuple(state[name].shape)
    }
    _check_match(model, folder, missing, surplus, shapes)
    return {name: stored for name, stored in found.items() if name in state}


def _check_match(
    model: torch.nn.Module,
    folder: Path | None,
    missing: list[str],
    surplus: list[str],
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """
    Raises:
        CheckpointError: tensors are missing or of another shape; surplus ones are a warning.
    """
    where, kind = folder or "the checkpoint", type(model).__name__
    if surplus and not missing and not shapes:
        log.warning(
            "%s: %d tensors that %s does not have are not used: %s",
            where, len(surplus), kind, list_some(surplus),
        )  # fmt: skip
    if not missing and not shapes:
        return
    total = len(model.state_dict())
    lines = [f"the weights in {where} are not those of {kind} ({total} tensors):"]
    if missing:
        lines.append(f"  missing from the files ({len(missing)}): {list_some(missing)}")
    if surplus:
        lines.append(f"  in the files but not in the model ({len(surplus)}): {list_some(surplus)}")
    if shapes:
        differing = [f"{n} is {list(a)}, expected {list(b)}" for n, (a, b) in shapes.items()]
        lines.append(f"  of another shape ({len(shapes)}): {list_some(differing)}")
    lines.append("config.json and the weights must come from the same model and library version")
    raise CheckpointError("\n".join(lines))
