"""A stage's own weights: from the model where it holds them, or read from a checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddinfer.errors import UsageError
from ddinfer.models.checkpoint import (
    StoredTensor,
    computing_dtype,
    read_checkpoint,
    read_header,
    read_tensors,
)
from ddinfer.models.meta_model import (
    load_transformers,
    match_checkpoint,
    tied_names,
)


class Weights:
    """Where to get every parameter and buffer of a model, by the `id` that it has in the model.

    Args:
        checkpoint: file or directory of safetensors; ``None`` takes the model's own tensors.

    Raises:
        UsageError: no such checkpoint, or its tensors are not this model's.
    """

    def __init__(self, model: nn.Module, checkpoint: str | os.PathLike[str] | None):
        self.model = model
        self._stored: dict[str, StoredTensor] = {}
        self._views: dict[str, torch.Tensor] = {}  # into the files, as transformers names them
        if checkpoint is not None:
            path = Path(checkpoint)
            table = _table(path)
            if _library_of(model) == "transformers":
                self._views = _transformers_views(model, table, path)
            else:
                self._stored = _match(model, table, path)
        self._held: dict[int, torch.Tensor] = {}
        self._names: dict[int, list[str]] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            self._held[id(tensor)] = tensor
            self._names.setdefault(id(tensor), []).append(name)

    def read(self, wanted: Collection[int], device: torch.device) -> dict[int, torch.Tensor]:
        """These tensors on ``device``, in the model's own dtypes.

        Raises:
            UsageError: one is neither in the checkpoint nor held by the model.
        """
        found: dict[int, torch.Tensor] = {}
        stored: list[tuple[int, StoredTensor]] = []
        for key in wanted:
            held, names = self._held[key], self._names[key]
            name = next((name for name in names if name in self._stored), None)
            view = next((self._views[name] for name in names if name in self._views), None)
            if name is not None:
                stored.append((key, self._stored[name]))
            elif view is not None:
                found[key] = self._copied(key, view, device)
            elif held.is_meta:
                raise UsageError(
                    f"{names[0]} is on the meta device and in no checkpoint; build the model with "
                    "only its parameters on meta (buffers are computed), or give a checkpoint that "
                    "has it"
                )
            else:
                found[key] = held.detach().to(device)
        stored.sort(key=lambda item: (str(item[1].file), item[1].key))
        for (key, _), tensor in zip(stored, read_tensors(s for _, s in stored), strict=True):
            found[key] = self._copied(key, tensor, device)
        return found

    def _copied(self, key: int, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A copy, even on the CPU: mapped weights lie unaligned, which can round differently."""
        tensor, dtype = tensor.detach(), self._held[key].dtype
        return torch.empty_like(tensor, dtype=dtype, device=device).copy_(tensor)

    def keep_only(self, kept: dict[int, torch.Tensor], device: torch.device) -> None:
        """The model holds these tensors from now on; its other parameters go to meta.

        Models ask the first parameter of a module for their device and dtype, so where that is one
        of the others it becomes NaN on ``device``, one element large.
        """
        asked = {id(next(m.parameters(), None)) for m in self.model.modules() if [*m.children()]}
        made: dict[int, torch.Tensor] = {}
        for key, held in self._held.items():
            tensor = kept.get(key)
            if not isinstance(held, nn.Parameter):
                made[key] = held if tensor is None else tensor
                continue
            if tensor is None and key in asked:
                value = math.nan if held.is_floating_point() else 0
                tensor = torch.full((), value, dtype=held.dtype, device=device).expand(held.shape)
            elif tensor is None:
                tensor = torch.empty_like(held, device="meta")
            made[key] = nn.Parameter(tensor, requires_grad=False)
        for module in self.model.modules():
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                table.update({n: made[id(held)] for n, held in table.items() if held is not None})
        self._held.clear()


def _table(path: Path) -> dict[str, StoredTensor]:
    if path.is_dir():
        return read_checkpoint(path)
    if path.is_file() and path.suffix == ".safetensors":
        return read_header(path)
    raise UsageError(f"no checkpoint: {path}; expected a .safetensors file or a folder of them")


def _transformers_views(
    model: Any, table: Mapping[str, StoredTensor], path: Path
) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors under the names that transformers' own loader gives them."""
    tensors = dict(zip(table, read_tensors(table.values()), strict=True))
    dtype = getattr(torch, computing_dtype(table, path))
    loaded = load_transformers(type(model), None, dtype, config=model.config, state_dict=tensors)
    return loaded.state_dict()


def _match(
    model: nn.Module, table: Mapping[str, StoredTensor], path: Path
) -> dict[str, StoredTensor]:
    if _library_of(model) == "diffusers":
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


def _library_of(model: Any) -> str | None:
    """``"diffusers"`` or ``"transformers"``, where the model's class comes from one of them."""
    names = [kind.__module__.split(".")[0] for kind in type(model).__mro__]
    return next((name for name in names if name in ("diffusers", "transformers")), None)
