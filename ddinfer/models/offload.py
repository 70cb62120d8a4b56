"""Applies a `Placement` inside one process.

Parts on a GPU stay there; tensors follow them from GPU to GPU. Blocks on host or disk are brought
to the main device just before their ``forward`` and let go of after it, the next one being fetched
meanwhile. Between times a stand-in (`ddinfer.models.stand_ins`) takes each weight's place.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from ddinfer.models.checkpoint import StoredTensor
from ddinfer.models.devices import CPU, DISK
from ddinfer.models.fetch import (
    DiskSource,
    Fetcher,
    FetchGroup,
    HostSource,
    LateSource,
    Source,
    read,
)
from ddinfer.models.meta_model import OpenModel, finish_weight_norm, tied_names
from ddinfer.models.placement import Placement, check_covers
from ddinfer.models.stand_ins import as_cast, is_stand_in, make_stand_in
from ddinfer.models.tree import Node, Tensor, tree_of, tree_of_model

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

#: Methods through which pipelines enter a component besides ``forward``.
ENTRY_METHODS = ("encode", "decode", "get_text_features", "get_image_features", "generate")


@dataclass
class OffloadHandle:
    """A model or pipeline that lies where its placement says; `undo` puts it back."""

    fetcher: Fetcher
    groups: list[FetchGroup] = field(default_factory=list)
    folders: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def on_undo(self, action: Callable[[], None]) -> None:
        self._undo.append(action)

    def undo(self) -> None:
        """Leaves modules as they were: the same weights where they were, nothing wrapped."""
        self.fetcher.forget()
        while self._undo:
            self._undo.pop()()
        self._close()

    def discard(self) -> None:
        """Lets go of all weights instead of putting them back: nothing here can be used again."""
        self.fetcher.forget()
        self.groups.clear()
        self._undo.clear()  # what else holds the originals
        self._close()

    def _close(self) -> None:
        while self.folders:
            self.folders.pop().cleanup()
        self.fetcher.close()


def dispatch_model(
    model: torch.nn.Module, placement: Placement, *, opened: OpenModel | None = None
) -> OffloadHandle:
    """Puts a model where ``placement`` says.

    Args:
        placement: of this model's own names; must cover every tensor.
        opened: where its weights are, when it is on meta: what lies on disk is read from its own
            checkpoint. Without it, weights for the disk are written to a temporary folder.

    Raises:
        PlacementError: the placement does not cover the model.
    """
    root = tree_of_model(model, dtypes=opened.dtypes if opened else None)
    return _dispatch({"": model}, root, placement, {"": opened} if opened else {})


def dispatch_pipeline(
    pipe: DiffusionPipeline,
    placement: Placement,
    *,
    root: Node | None = None,
    opened: Mapping[str, OpenModel] | None = None,
) -> OffloadHandle:
    """Puts a pipeline's components where ``placement`` says.

    Args:
        root: the pipeline's sizes, where they are known.
        opened: component → where its weights are, for those that are on meta.

    Raises:
        PlacementError: the placement does not cover the pipeline.
    """
    models = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    handle = _dispatch(models, root or tree_of(pipe), placement, opened or {})
    _compute_on(pipe, torch.device(placement.main), handle)
    before: Any = getattr(pipe, "hf_device_map", None)
    setattr(pipe, "hf_device_map", placement.hf_device_map)  # noqa: B010 - declared as None
    handle.on_undo(lambda: setattr(pipe, "hf_device_map", before))
    return handle


def _dispatch(
    models: Mapping[str, torch.nn.Module],
    root: Node,
    placement: Placement,
    opened: Mapping[str, OpenModel],
) -> OffloadHandle:
    check_covers(placement, root)  # all of it, before anything is moved
    handle = OffloadHandle(Fetcher(torch.device(placement.main), prefetch=placement.prefetch))
    _Dispatcher(models, placement, opened, handle).apply(root)
    return handle


def _compute_on(pipe: Any, main: torch.device, handle: OffloadHandle) -> None:
    """Latents and the like are made on the main device, wherever the first component lies."""
    if pipe._execution_device == canonical_device(main):
        return
    kind = type(pipe)
    there = property(lambda self: main)
    pipe.__class__ = type(
        kind.__name__, (kind,), {"_execution_device": there, "__module__": kind.__module__}
    )
    handle.on_undo(lambda: setattr(pipe, "__class__", kind))


@dataclass(eq=False)
class _Weight:
    """A tensor that is away, under all of its names.

    Attributes:
        is_unread: its bytes are only in the checkpoint; the original is on meta.
        restored: what took the original's place again.
    """

    original: torch.Tensor
    source: Source
    stand_in: torch.Tensor
    is_unread: bool
    restored: torch.Tensor | None = None

    def restore_in(self, held: dict[str, Any], leaf: str) -> None:
        if self.restored is None:
            self.restored = self.original
            if self.is_unread:
                tensor = read([self.source], torch.device(CPU))[0]
                self.restored = _like(self.original, tensor)
            elif isinstance(self.source, DiskSource):
                self.original.data = self.source.stored.read().clone()
        held[leaf] = self.restored


class _Dispatcher:
    """Applies one placement, of a model or of a pipeline's components.

    Names are the tree's: a component's name, then the module's path in it.
    """

    def __init__(
        self,
        models: Mapping[str, torch.nn.Module],
        placement: Placement,
        opened: Mapping[str, OpenModel],
        handle: OffloadHandle,
    ):
        self.placement, self.opened, self.handle = placement, opened, handle
        self.main = torch.device(placement.main)
        self.models: dict[str, torch.nn.Module] = {}
        for name, model in models.items():  # one under two names lies where the first says
            if all(model is not other for other in self.models.values()):
                self.models[name] = model
        self.root = self.models[""] if "" in models else torch.nn.ModuleDict(self.models)
        self.ties = tied_names(self.root)
        self.stored = {
            f"{component}.{name}".lstrip("."): (part, name)
            for component, part in opened.items()
            for name in part.stored
        }
        self.late = {name: functools.cache(p.load) for name, p in opened.items() if p.load}
        self.weights: dict[int, _Weight] = {}  # id of the original, which the weight keeps
        self.written: dict[int, DiskSource] = {}

    def apply(self, root: Node) -> None:
        items = [
            (item, device)
            for item, device in self._largest_single_device_parts(root)
            if "" in self.models or item.name.partition(".")[0] in self.models
        ]
        away = [(item, d) for item, d in items if d in (CPU, DISK) and d != self.placement.main]
        here = [(item, d) for item, d in items if (item, d) not in away]
        self._load_resident({t.name: d for item, d in here for t in _tensors_of(item)})
        self._write_for_disk([t for item, d in away if d == DISK for t in _tensors_of(item)])
        for item, device in away:
            self._take_away(item, device)
        for name, model in self.models.items():
            self._let_inputs_follow(name, model, away, here)
            finish_weight_norm(model)

    def _largest_single_device_parts(self, node: Node) -> Iterator[tuple[Node | Tensor, str]]:
        """Units as large as possible that lie on one device, in order."""
        devices = {self.placement.device_of(t.name) for t in node.every_tensor()}
        if not devices:
            return
        if len(devices) == 1 and (node.whole or not node.children):
            yield node, next(iter(devices))
            return
        for tensor in node.tensors:
            yield tensor, self.placement.device_of(tensor.name)
        for child in node.children:
            yield from self._largest_single_device_parts(child)

    def _held(self, name: str) -> tuple[dict[str, Any], str]:
        """The dict of a module that holds a tensor, and the tensor's key in it."""
        path, _, leaf = name.rpartition(".")
        module = self.root.get_submodule(path)
        return (module._parameters if leaf in module._parameters else module._buffers), leaf

    def _get(self, name: str) -> torch.Tensor:
        held, leaf = self._held(name)
        return held[leaf]

    # ---------------------------------------------------------------- what stays

    def _load_resident(self, where: Mapping[str, str]) -> None:
        """Fills (from the checkpoint) or moves what lies on a computing device."""
        before = {name: _home(self._get(name)) for name in where}
        for component, opened in self.opened.items():
            if opened.stored and component in self.models:
                places = {
                    name[len(component) :].lstrip("."): torch.device(device)
                    for name, device in where.items()
                    if not component or name.startswith(f"{component}.")
                }
                opened.fill(places.get)
        for name, device in where.items():
            self._move(self._get(name), torch.device(device), before[name])

    def _move(self, tensor: torch.Tensor, device: torch.device, before: torch.device) -> None:
        if before == canonical_device(device):
            return
        _move_in_place(tensor, device)
        self.handle.on_undo(functools.partial(_move_in_place, tensor, before))

    # ---------------------------------------------------------------- what is away

    def _write_for_disk(self, wanted: list[Tensor]) -> None:
        """Weights that are in memory and belong on disk are written there, a file for all.

        Buffers are small, and some are in no checkpoint: they stay on the host. So does what is a
        view into a mapped file: that is its place on the disk.
        """
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        for name in (tensor.name for tensor in wanted):
            real = self._get(name)
            opened = self.opened.get(name.partition(".")[0]) or self.opened.get("")
            is_mapped = opened is not None and opened.is_mapped
            if isinstance(real, torch.nn.Parameter) and not real.is_meta and not is_mapped:
                first = self.ties[name][0]
                tensors.setdefault(first, real.detach().contiguous())
        if not tensors:
            return
        folder = tempfile.TemporaryDirectory(prefix="ddinfer-offload-")
        self.handle.folders.append(folder)
        file = Path(folder.name) / "weights.safetensors"
        save_file(tensors, file)
        for name, saved in tensors.items():
            kind = str(saved.dtype).removeprefix("torch.")
            place = StoredTensor(file, name, kind, tuple(saved.shape))
            self.written[id(self._get(name))] = DiskSource(place, saved.dtype, aligned=True)

    def _take_away(self, item: Node | Tensor, device: str) -> None:
        weights = {t.name: self._weight(t.name, device) for t in _tensors_of(item)}
        group = FetchGroup(item.name, {name: weight.source for name, weight in weights.items()})
        self.handle.groups.append(group)
        for name, weight in weights.items():
            held, leaf = self._held(name)
            held[leaf] = weight.stand_in
            self.handle.on_undo(functools.partial(weight.restore_in, held, leaf))
        if isinstance(item, Node):
            self._fetch_around(self.root.get_submodule(item.name), group, weights)

    def _weight(self, name: str, device: str) -> _Weight:
        original = self._get(name)
        if id(original) in self.weights:
            return self.weights[id(original)]
        stored = next((n for n in self.ties.get(name, (name,)) if n in self.stored), None)
        component, _, inside = name.partition(".")
        source: Source = self.written.get(id(original)) or HostSource(original)
        if stored is not None:
            part, key = self.stored[stored]
            source = found = DiskSource(part.stored[key], part.dtypes[key])
            if device == CPU:
                source = HostSource(part.convert(key, found.stored.read(), CPU))
        elif original.is_meta and component in self.late:
            source = LateSource(self.late[component], inside, original.dtype)
        stand_in = make_stand_in(
            original, source.dtype, self.main, lambda: read([source], self.main)[0]
        )
        is_unread = stored is not None or isinstance(source, LateSource)
        self.weights[id(original)] = _Weight(original, source, stand_in, is_unread)
        if isinstance(source, DiskSource) and not is_unread:
            original.data = torch.empty(0, dtype=original.dtype)
        return self.weights[id(original)]

    # ---------------------------------------------------------------- around methods

    def _fetch_around(
        self, module: torch.nn.Module, group: FetchGroup, weights: Mapping[str, _Weight]
    ) -> None:
        """The bytes are there while the module's ``forward`` runs."""
        fetcher, main = self.handle.fetcher, canonical_device(self.main)
        places = [self._held(name) for name in weights]
        sources = [weight.source for weight in weights.values()]
        depth = 0

        @contextlib.contextmanager
        def fetched() -> Iterator[None]:
            # A cast makes other stand-ins of buffers.
            away = [
                held[leaf] if is_stand_in(held[leaf]) else weight.stand_in
                for (held, leaf), weight in zip(places, weights.values(), strict=True)
            ]
            seen: dict[int, torch.Tensor] = {}
            for (held, leaf), stand_in, tensor in zip(
                places, away, fetcher.take(group), strict=True
            ):
                if id(stand_in) not in seen:  # tied names stay one object
                    seen[id(stand_in)] = _like(stand_in, as_cast(tensor, stand_in))
                held[leaf] = seen[id(stand_in)]
            try:
                yield
            finally:
                for (held, leaf), source, stand_in in zip(places, sources, away, strict=True):
                    if held[leaf] is not stand_in:
                        _keep_changes(source, held[leaf], module.training)
                        held[leaf] = stand_in
                fetcher.give_back()

        def around(forward: Callable[..., Any]) -> Callable[..., Any]:
            def compute(*args: Any, **kwargs: Any) -> Any:
                nonlocal depth
                depth += 1
                try:
                    with fetched() if depth == 1 else contextlib.nullcontext():
                        return forward(*to_device(args, main), **to_device(kwargs, main))
                finally:
                    depth -= 1

            return compute

        self._wrap(module, "forward", around)

    def _let_inputs_follow(
        self,
        component: str,
        model: torch.nn.Module,
        away: list[tuple[Node | Tensor, str]],
        here: list[tuple[Node | Tensor, str]],
    ) -> None:
        """Inputs of a part come to its device; results return to where the model's came from."""
        mine, resident = (
            [(i, d) for i, d in items if not component or i.name.startswith(f"{component}.")
             or i.name == component]
            for items in (away, here)
        )  # fmt: skip
        gpus = {d for _, d in [*mine, *resident] if d not in (CPU, DISK)}
        is_on_several = len(gpus | {self.placement.main}) > 1
        if is_on_several:
            for item, device in resident:
                if isinstance(item, Node):
                    self._follow(self.root.get_submodule(item.name), torch.device(device))
        if not mine and not is_on_several:
            return

        def returning(method: Callable[..., Any]) -> Callable[..., Any]:
            def enter(*args: Any, **kwargs: Any) -> Any:
                first = next((t.device for t in tensors_in((args, kwargs))), None)
                with OneDevice() if is_on_several else contextlib.nullcontext():
                    result = method(*args, **kwargs)
                if first is None or all(t.device == first for t in tensors_in(result)):
                    return result
                return to_device(result, first)

            return enter

        for name in ("forward", *ENTRY_METHODS):
            if callable(getattr(model, name, None)):
                self._wrap(model, name, returning)

    def _follow(self, module: torch.nn.Module, device: torch.device) -> None:
        there = canonical_device(device)

        def around(forward: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **kwargs: forward(
                *to_device(args, there), **to_device(kwargs, there)
            )

        self._wrap(module, "forward", around)

    def _wrap(
        self,
        module: torch.nn.Module,
        name: str,
        wrapper: Callable[[Callable[..., Any]], Callable[..., Any]],
    ) -> None:
        method, own = getattr(module, name), vars(module)
        before = {name: own[name]} if name in own else {}
        own[name] = functools.wraps(method)(wrapper(method))

        def unwrap() -> None:
            del own[name]
            own.update(before)

        self.handle.on_undo(unwrap)


def _move_in_place(tensor: torch.Tensor, device: torch.device) -> None:
    """The object stays the same, so that references to it stay valid."""
    moved = tensor.data.to(device)
    try:
        tensor.data = moved
    except RuntimeError:  # torch has another kind of tensor for this device than for the host
        torch.utils.swap_tensors(tensor, _like(tensor, moved))


def _home(tensor: torch.Tensor) -> torch.device:
    """What was never in memory counts as having been on the host."""
    return torch.device(CPU) if tensor.is_meta else tensor.device


def _like(stand_in: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(stand_in, torch.nn.Parameter):
        return tensor
    return torch.nn.Parameter(tensor, requires_grad=stand_in.requires_grad)


def _keep_changes(source: Source, tensor: torch.Tensor, training: bool) -> None:
    """A buffer that forward changed in place is carried back.

    Running statistics, which only training changes, do so without a new version.
    """
    if isinstance(tensor, torch.nn.Parameter) or not isinstance(source, HostSource):
        return
    if training or tensor._version > 0:
        source.tensor.copy_(tensor)


def _tensors_of(item: Node | Tensor) -> list[Tensor]:
    return [item] if isinstance(item, Tensor) else list(item.every_tensor())


class OneDevice(TorchFunctionMode):
    """Where an operation's tensors lie on several GPUs, they follow its first one.

    Code between blocks (a sum of a block's output and an embedding) then needs to know nothing.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tensors_in((args, kwargs)) if t.dim()]
        if len({t.device for t in tensors}) > 1 and getattr(func, "__name__", "") not in (
            "__get__", "__set__", "to", "copy_",
        ):  # fmt: skip
            first = tensors[0].device
            args, kwargs = to_device((args, kwargs), first)
        return func(*args, **kwargs)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def to_device(value: Any, device: torch.device) -> Any:
    """The same structure with its tensors on ``device``.

    Lists and dicts are changed in place: some models pass a cache through their blocks.
    """
    if isinstance(value, torch.Tensor):
        return value if value.device == device else value.to(device)
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        changed = {key: to_device(item, device) for key, item in list(items)}
        for key, item in changed.items():
            if item is not value[key]:
                value[key] = item  # a ModelOutput keeps its attribute in step
        return value
    if isinstance(value, tuple):
        moved = [to_device(item, device) for item in value]
        if all(one is other for one, other in zip(moved, value, strict=True)):
            return value
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def canonical_device(device: torch.device) -> torch.device:
    """As tensors on it name it: ``cpu:0`` makes tensors that say ``cpu``."""
    return torch.empty(0, device=device).device
