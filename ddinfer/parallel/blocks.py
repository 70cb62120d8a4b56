"""Where a model can be cut: the modules that one rank has to keep whole."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from ddinfer.errors import UsageError

#: Class → why its blocks cannot be planned, so that it is known before a weight is read.
READS_CONTENTS = {
    "MochiTransformer3DModel": "its attention picks the tokens that a mask leaves, by its contents",
    "HiDreamImageTransformer2DModel": "its experts are given as many tokens as contents decide",
}


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, on whatever device (meta too)."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks of ``model``, none inside another, in the order of its children.

    The classes in the model's own ``_no_split_modules`` where it names any that occur more than
    once; else repeated modules (the elements of a list or a `torch.nn.Sequential`); else the
    children with parameters, looking inside as long as there is just one.
    """
    for found in (_unsplittable(model), list(_repeated(model)), _children(model)):
        if len(found) > 1:
            return found
    return []


def check_names(model: nn.Module, names: list[str]) -> None:
    """Raises `UsageError` where ``names`` holds something that is no module of ``model``."""
    modules = dict(model.named_modules())
    for name in names:
        if not name or name not in modules:
            close = difflib.get_close_matches(name, modules, n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise UsageError(f"{type(model).__name__} has no module named {name!r}{hint}")
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        raise UsageError(f"split point {doubled[0]!r} is given twice")


def _unsplittable(model: nn.Module) -> list[str]:
    classes = getattr(model, "_no_split_modules", None) or ()
    return list(_outermost(model, lambda m: type(m).__name__ in classes))


def _repeated(model: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            elements = [(n, m) for n, m in child.named_children() if module_bytes(m)]
            if len(elements) > 1 and len({type(m) for _, m in elements}) == 1:
                yield from (f"{path}.{n}" for n, _ in elements)
                continue
        yield from _repeated(child, f"{path}.")


def _children(model: nn.Module) -> list[str]:
    prefix, module = "", model
    while True:
        heavy = [(n, m) for n, m in module.named_children() if module_bytes(m)]
        if len(heavy) != 1:
            return [f"{prefix}{n}" for n, _ in heavy]
        prefix, module = f"{prefix}{heavy[0][0]}.", heavy[0][1]


def _outermost(model: nn.Module, wanted, prefix: str = "") -> Iterator[str]:
    for name, child in model.named_children():
        if wanted(child):
            yield f"{prefix}{name}"
        else:
            yield from _outermost(child, wanted, f"{prefix}{name}.")


def drop_weights(module: nn.Module) -> None:
    """Puts a module's parameters on the meta device: they keep shape and dtype, hold no memory."""
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None and not parameter.is_meta:
                empty = torch.empty_like(parameter, device="meta")
                inner._parameters[name] = nn.Parameter(empty, requires_grad=False)


@contextlib.contextmanager
def substituted(model: nn.Module, make: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """``model`` with ``make(tensor)`` in place of each of its parameters and buffers."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, torch.Tensor] = {}  # tied ones stay one object
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    kept.append((table, name, tensor))
                    if id(tensor) not in made:
                        new = make(tensor)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(new, False) if is_parameter else new
    try:
        for table, name, tensor in kept:
            table[name] = made[id(tensor)]
        yield
    finally:
        for table, name, tensor in kept:
            table[name] = tensor


def faked(model: nn.Module, mode: Any, device: torch.device) -> Any:
    """`substituted` by fake tensors on ``device``."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )

    return substituted(model, fake)


def find_units(model: nn.Module, split_points: Collection[str] = ()) -> list[str]:
    """Names of the modules that stages of any model are made of, in the order of registration.

    The blocks, and every other module with parameters that holds no block; none inside another.

    Args:
        split_points: modules that shall begin a stage: a block around one is taken apart.
    """
    blocks = {b for b in find_blocks(model) if not any(p.startswith(f"{b}.") for p in split_points)}
    found: list[str] = []
    seen: set[int] = set()

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            inner = f"{path}."
            has_forward = type(child).forward is not nn.Module.forward
            is_whole = not any(name.startswith(inner) for name in (*blocks, *split_points))
            if (path in blocks or path in split_points or has_forward) and is_whole:
                if id(child) not in seen and (module_bytes(child) or path in split_points):
                    found.append(path)
                seen.add(id(child))
            else:
                visit(child, inner)

    visit(model, "")
    return found


def denoiser_blocks(model: nn.Module) -> list[str]:
    """The blocks of a denoiser in the order they run; empty where it has none.

    A UNet's ``down_blocks``, ``mid_block`` and ``up_blocks``; of any other model the elements of
    its own lists that have at least two modules of one type. Lists run in the order in which the
    model's ``forward`` speaks of them, or in turns where it zips two of one length (a plan finds
    out if they do not, and refuses).

    Raises:
        UsageError: blocks of this class are known to read the contents of their inputs.
    """
    if reason := READS_CONTENTS.get(type(model).__name__):
        raise UsageError(
            f"{type(model).__name__} cannot be cut into stages: {reason}. Run the whole pipeline "
            "on each rank"
        )
    children: dict[str, Any] = dict(model.named_children())
    if "down_blocks" in children and "up_blocks" in children:
        names = [f"down_blocks.{k}" for k in range(len(children["down_blocks"]))]
        names += ["mid_block"] if "mid_block" in children else []
        return names + [f"up_blocks.{k}" for k in range(len(children["up_blocks"]))]
    lists = {
        name: child
        for name, child in children.items()
        if isinstance(child, nn.ModuleList)
        and len(child) > 1
        and len({type(element) for element in child}) == 1
    }
    zipped = _zipped(model)
    if zipped is not None and set(zipped) == set(lists):
        first, second = (lists[name] for name in zipped)
        if len(first) == len(second):
            return [f"{name}.{k}" for k in range(len(first)) for name in zipped]
    return [f"{n}.{k}" for n in _mentioned_first(model, list(lists)) for k in range(len(lists[n]))]


def _zipped(model: nn.Module) -> tuple[str, str] | None:
    """Two lists that ``forward`` goes through in turns (Latte: spatial, temporal, spatial …)."""
    try:
        source = inspect.getsource(type(model).forward)
    except (OSError, TypeError):
        return None
    found = re.search(r"\bzip\(\s*self\.(\w+),\s*self\.(\w+)\s*\)", source)
    return (found.group(1), found.group(2)) if found else None


def _mentioned_first(model: nn.Module, names: list[str]) -> list[str]:
    try:
        source = inspect.getsource(type(model).forward)
    except (OSError, TypeError):  # no source at hand: the order of registration
        return names
    found = {name: re.search(rf"\bself\.{name}\b", source) for name in names}
    places = {name: match.start() if match else len(source) for name, match in found.items()}
    return sorted(names, key=lambda name: places[name])
