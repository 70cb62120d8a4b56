"""A stage's own weights: from the model where it holds them, or read from a checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddinfer.errors import UsageError
from ddinfer.models.checkpoint import StoredTensor, read_checkpoint, read_header, read_tensors
from ddinfer.models.meta_model import match_checkpoint, tied_names


class Weights:
    """Where every parameter and buffer of a model is to be had, by any of its names.

    Args:
        checkpoint: folder or file of safetensors; ``None`` takes the model's own tensors.

    Raises:
        UsageError: no such checkpoint, or its tensors are not this model's.
    """

    def __init__(self, model: nn.Module, checkpoint: str | os.PathLike[str] | None):
        self.model = model
        self._held: dict[str, torch.Tensor] = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        self._ties = tied_names(model)
        self._stored = {} if checkpoint is None else _stored(model, Path(checkpoint))

    def read(self, names: Collection[str], device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors of these names on ``device``, in the model's own dtypes.

        Raises:
            UsageError: one is neither in the checkpoint nor held by the model.
        """
        found: dict[str, torch.Tensor] = {}
        wanted: list[tuple[str, StoredTensor]] = []
        for name in names:
            stored = self._find(name)
            if stored is not None:
                wanted.append((name, stored))
            elif name in self._held:
                held = self._held[name]
                if held.is_meta:
                    raise UsageError(
                        f"{name} is on the meta device and in no checkpoint; build the model with "
                        "only its parameters on meta (buffers are computed), or give a checkpoint "
                        "that has it"
                    )
                found[name] = held.detach().to(device)
        wanted.sort(key=lambda item: (str(item[1].file), item[1].key))
        for (name, _), tensor in zip(wanted, read_tensors(s for _, s in wanted), strict=True):
            # A copy, even on the CPU: mapped weights lie unaligned, which can round differently.
            held = self._held[name]
            found[name] = torch.empty_like(tensor, dtype=held.dtype, device=device).copy_(tensor)
        return found

    def by_identity(self, found: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
        """These tensors by the `id` of the model's own."""
        return {id(self._held[name]): tensor for name, tensor in found.items()}

    def keep_only(self, kept: dict[str, torch.Tensor], device: torch.device) -> None:
        """The model holds these tensors from now on; its other parameters go to meta.

        Models ask the first parameter of a module for their device and dtype, so where that is one
        of the others it becomes NaN on ``device``, one element large.
        """
        asked = {id(next(m.parameters(), None)) for m in self.model.modules() if [*m.children()]}
        by_name = {
            alias: tensor for name, tensor in kept.items() for alias in self._ties.get(name, ())
        }
        memo: dict[int, nn.Parameter] = {}  # tied ones stay one object; _held keeps ids unique
        for module_name, module in self.model.named_modules():
            prefix = f"{module_name}." if module_name else ""
            for leaf, held in module._parameters.items():
                if held is None:
                    continue
                if id(held) not in memo:
                    tensor = by_name.get(prefix + leaf)
                    if tensor is None:
                        tensor = torch.empty_like(held, device="meta")
                        if id(held) in asked:
                            value = math.nan if held.is_floating_point() else 0
                            tensor = torch.full((), value, dtype=held.dtype, device=device)
                            tensor = tensor.expand(held.shape)
                    memo[id(held)] = nn.Parameter(tensor.detach(), requires_grad=False)
                module._parameters[leaf] = memo[id(held)]
            for leaf in module._buffers:
                if prefix + leaf in kept:
                    module._buffers[leaf] = kept[prefix + leaf]
        self._held.clear()

    def _find(self, name: str) -> StoredTensor | None:
        for alias in self._ties.get(name, (name,)):
            if alias in self._stored:
                return self._stored[alias]
        return None


def _stored(model: nn.Module, path: Path) -> dict[str, StoredTensor]:
    if path.is_dir():
        table = read_checkpoint(path)
    elif path.is_file() and path.suffix == ".safetensors":
        table = read_header(path)
    else:
        raise UsageError(f"no checkpoint: {path}; expected a .safetensors file or a folder of them")
    if _is_library_model(model):
        return match_checkpoint(model, table, path)
    state = model.state_dict(keep_vars=True)
    wrong = [n for n in state if n in table and table[n].shape != tuple(state[n].shape)]
    ties = tied_names(model)
    missing = [n for n in state if not any(t in table for t in ties.get(n, (n,)))]
    if wrong or missing:
        what = f"{wrong[0]} has another shape" if wrong else f"{missing[0]} is not in it"
        raise UsageError(
            f"the weights in {path} are not those of {type(model).__name__}: {what} "
            f"({len(wrong) + len(missing)} of {len(state)} tensors)"
        )
    return {name: table[name] for name in state if name in table}


def _is_library_model(model: Any) -> bool:
    libraries = ("diffusers", "transformers")
    return any(kind.__module__.split(".")[0] in libraries for kind in type(model).__mro__)
