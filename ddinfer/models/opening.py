"""One model, opened: modules built, weights found on disk and not yet read (`open_model`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.errors import UsageError
from ddinfer.models.building import (
    NeedsConversion,
    build_on_meta,
    folders_of_several,
    is_several_models,
    match_checkpoint,
    model_class,
    tied_names,
)
from ddinfer.models.checkpoint import (
    CheckpointError,
    StoredTensor,
    computing_dtype,
    read_checkpoint,
    read_tensors,
)

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


@dataclass
class OpenModel:
    """A model whose parameters are still on meta, and where to get them.

    Attributes:
        model: buffers are real; parameters have shapes only.
        stored: name → tensor on disk, for every tensor that the files hold. Of names tied to one
            parameter at least one is there. Empty where the library had to load it by itself.
        dtypes: name → type it has in the model; differs from the stored one where it is converted.
        heard: called with every tensor that was read.
    """

    model: torch.nn.Module
    stored: dict[str, StoredTensor]
    dtypes: dict[str, torch.dtype]
    heard: Callable[[], None] | None = None

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
        if len(order) == len(self.stored):
            finish_weight_norm(self.model)
            _assert_real(self.model)
        return self.model

    def convert(
        self, name: str, tensor: torch.Tensor, device: torch.device | str | None
    ) -> torch.Tensor:
        """One stored tensor as the model has it: moved first, converted there."""
        if self.heard is not None:
            self.heard()
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
