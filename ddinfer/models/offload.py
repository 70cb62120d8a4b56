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
from ddinfer.models.fetch import DiskSource, Fetcher, FetchGroup, HostSource, Source, read
from ddinfer.models.meta_model import OpenModel, finish_weight_norm
from ddinfer.models.placement import Placement, check_covers
from ddinfer.models.stand_ins import as_cast, is_stand_in, make_stand_in
from ddinfer.models.tree import Node, Tensor, tree_of_model

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

#: Methods through which pipelines enter a component beside ``forward``.
ENTRY_METHODS = ("encode", "decode", "get_text_features", "get_image_features", "generate")


@dataclass
class OffloadHandle:
    """A model or pipeline that lies where its placement says; `undo` puts it back."""

    fetcher: Fetcher
    units: list[FetchGroup] = field(default_factory=list)
    folders: list[tempfile.TemporaryDirectory[str]] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def on_undo(self, action: Callable[[], None]) -> None:
        self._undo.append(action)

    def undo(self) -> None:
        """Leaves modules as they were: the same weights where they were, no hook, no stand-in."""
        self.fetcher.forget()
        while self._undo:
            self._undo.pop()()
        self._close()

    def discard(self) -> None:
        """Lets go of all weights instead of putting them back: nothing here can be used again."""
        self.fetcher.forget()
        self.units.clear()
        self._undo.clear()  # what else holds the originals
        self._close()

    def _close(self) -> None:
        while self.folders:
            self.folders.pop().cleanup()
        self.fetcher.close()

    def __enter__(self) -> OffloadHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def dispatch_model(
    model: torch.nn.Module,
    placement: Placement,
    *,
    opened: OpenModel | None = None,
    dispatched: OffloadHandle | None = None,
    offload_folder: Path | None = None,
) -> OffloadHandle:
    """Puts a model where ``placement`` says.

    Args:
        placement: of this model's own names; must cover every tensor.
        opened: where its weights are, when it is on meta: what lies on disk is read from its own
            checkpoint. Without it, weights for the disk are written to ``offload_folder``.
        dispatched: shares its fetcher and takes on the undoing (a pipeline's components do).
        offload_folder: where weights are written; default: a temporary one, removed by `undo`.

    Raises:
        PlacementError: the placement does not cover the model.
    """
    root = tree_of_model(model, dtypes=opened.dtypes if opened else None)
    check_covers(placement, root)
    if dispatched is None:
        dispatched = OffloadHandle(
            Fetcher(torch.device(placement.main), prefetch=placement.prefetch)
        )
    _ModelDispatcher(model, placement, opened, dispatched, offload_folder).apply(root)
    return dispatched


def dispatch_pipeline(
    pipe: DiffusionPipeline,
    placement: Placement,
    *,
    opened: Mapping[str, OpenModel] | None = None,
    offload_folder: Path | None = None,
) -> OffloadHandle:
    """Puts a pipeline's components where ``placement`` says; they share one fetcher.

    Args:
        opened: component → where its weights are, for those that are on meta.

    Raises:
        PlacementError: the placement does not cover the pipeline.
    """
    models = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    main = torch.device(placement.main)
    dispatched = OffloadHandle(Fetcher(main, prefetch=placement.prefetch))
    parts = {name: placement.below(name) for name in models}
    for name, model in models.items():  # all are checked before the first is moved
        known = (opened or {}).get(name)
        check_covers(parts[name], tree_of_model(model, dtypes=known.dtypes if known else None))
    seen: set[int] = set()
    for name, model in models.items():
        if id(model) in seen:
            continue  # one module under two names lies where the first says
        seen.add(id(model))
        folder = None if offload_folder is None else offload_folder / name
        dispatch_model(
            model,
            parts[name],
            opened=(opened or {}).get(name),
            dispatched=dispatched,
            offload_folder=folder,
        )
    _compute_on(pipe, main, dispatched)
    before: Any = getattr(pipe, "hf_device_map", None)
    setattr(pipe, "hf_device_map", placement.hf_device_map)  # noqa: B010 - declared as None
    dispatched.on_undo(lambda: setattr(pipe, "hf_device_map", before))
    return dispatched


def _compute_on(pipe: Any, main: torch.device, dispatched: OffloadHandle) -> None:
    """Latents and the like are made on the main device, wherever the first component lies."""
    if pipe._execution_device == canonical_device(main):
        return
    kind = type(pipe)
    there = property(lambda self: main)
    pipe.__class__ = type(
        kind.__name__, (kind,), {"_execution_device": there, "__module__": kind.__module__}
    )
    dispatched.on_undo(lambda: setattr(pipe, "__class__", kind))


class _ModelDispatcher:
    """Applies one model's placement."""

    def __init__(
        self,
        model: torch.nn.Module,
        placement: Placement,
        opened: OpenModel | None,
        dispatched: OffloadHandle,
        offload_folder: Path | None,
    ):
        self.model, self.placement, self.opened = model, placement, opened
        self.dispatched, self.offload_folder = dispatched, offload_folder
        self.main = torch.device(placement.main)
        gpus = {d for d in placement.devices.values() if d not in (CPU, DISK)}
        self.several = len(gpus | {placement.main}) > 1
        self.sources: dict[int, Source] = {}  # id of the original tensor → its bytes
        self.parked: dict[int, torch.Tensor] = {}
        self.made: dict[int, torch.Tensor] = {}
        self.unread: set[int] = set()  # ids of originals whose bytes are only in the checkpoint
        self.kept: list[torch.Tensor] = []  # originals, so that their ids stay theirs
        self.here: list[Callable[[], None]] = []  # put back what is fetched at the moment

    def apply(self, root: Node) -> None:
        items = list(self._largest_single_device_parts(root))
        away = [(item, d) for item, d in items if d in (CPU, DISK) and d != self.placement.main]
        here = [(item, d) for item, d in items if (item, d) not in away]
        self._load_resident({t.name: d for item, d in here for t in _tensors_of(item)})
        if away:
            self._write_for_disk(away)
        for item, device in away:
            self._park(item, device)
        if self.several:
            for item, device in here:
                if isinstance(item, Node):
                    self._follow(item, torch.device(device))
        if away or self.several:
            self._wrap_entry_methods()
        finish_weight_norm(self.model)

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

    # ---------------------------------------------------------------- what stays

    def _load_resident(self, where: Mapping[str, str]) -> None:
        """Fills (from the checkpoint) or moves what lies on a computing device."""
        before = {name: _home(self._get(name)) for name in where}
        if self.opened is not None and self.opened.stored:
            places = {name: torch.device(device) for name, device in where.items()}
            self.opened.fill(places.get)
        for name, device in where.items():
            self._move(self._get(name), torch.device(device), before[name])

    def _move(self, tensor: torch.Tensor, device: torch.device, before: torch.device) -> None:
        if before == canonical_device(device):
            return
        # The object stays the same, so that whoever holds it keeps holding the weight.
        tensor.data = tensor.data.to(device)
        self.dispatched.on_undo(lambda: setattr(tensor, "data", tensor.data.to(before)))

    def _get(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        found = module._parameters.get(leaf)
        return found if found is not None else module._buffers[leaf]  # type: ignore[return-value]

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        held: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
        held[leaf] = tensor

    # ---------------------------------------------------------------- what is away

    def _write_for_disk(self, away: list[tuple[Node | Tensor, str]]) -> None:
        """Weights that are in memory and belong on disk are written there, a file for all."""
        from safetensors.torch import save_file

        stored = self.opened.stored if self.opened else {}
        tensors: dict[str, torch.Tensor] = {}
        for item, device in away:
            for tensor in _tensors_of(item):
                real = self._get(tensor.name)
                # Buffers are small, and some are in no checkpoint: they stay on the host.
                written = device == DISK and isinstance(real, torch.nn.Parameter)
                if written and tensor.name not in stored and not real.is_meta:
                    tensors.setdefault(tensor.identity, real.detach().contiguous())
        if not tensors:
            return
        if self.offload_folder is None:
            made = tempfile.TemporaryDirectory(prefix="ddinfer-offload-")
            self.offload_folder = Path(made.name)
            self.dispatched.folders.append(made)
        self.offload_folder.mkdir(parents=True, exist_ok=True)
        file = self.offload_folder / "weights.safetensors"
        save_file(tensors, file)
        for name, saved in tensors.items():
            kind = str(saved.dtype).removeprefix("torch.")
            place = StoredTensor(file, name, kind, tuple(saved.shape))
            self.sources[id(self._get(name))] = DiskSource(place, saved.dtype, aligned=True)

    def _park(self, item: Node | Tensor, device: str) -> None:
        names = [tensor.name for tensor in _tensors_of(item)]
        sources = {name: self._source(name, device) for name in names}
        unit = FetchGroup(item.name, sources)
        self.dispatched.units.append(unit)
        stand_ins = {name: self._stand_in(name, source) for name, source in sources.items()}
        for name, stand_in in stand_ins.items():
            self._replace(name, stand_in)
        if isinstance(item, Node):
            self._fetch_around(self.model.get_submodule(item.name), unit, stand_ins)

    def _source(self, name: str, device: str) -> Source:
        original = self._get(name)
        known = self.sources.get(id(original))
        if known is not None:
            return known
        self.kept.append(original)
        source: Source = HostSource(original.detach())
        stored_name = self._stored_name(name)
        if self.opened is not None and stored_name is not None:
            self.unread.add(id(original))
            found = DiskSource(self.opened.stored[stored_name], self.opened.dtypes[stored_name])
            source = found
            if device == CPU:
                source = HostSource(self.opened.convert(stored_name, found.stored.read(), CPU))
        self.sources[id(original)] = source
        return source

    def _stored_name(self, name: str) -> str | None:
        """The name of the same tensor (it may be tied to others) that the checkpoint has."""
        stored = self.opened.stored if self.opened else {}
        if name in stored:
            return name
        wanted = self._get(name)
        names = self.model.named_parameters(remove_duplicate=False)
        return next((other for other, t in names if t is wanted and other in stored), None)

    def _stand_in(self, name: str, source: Source) -> torch.Tensor:
        original = self._get(name)
        made = self.parked.get(id(original))
        if made is None:
            dtype = source.tensor.dtype if isinstance(source, HostSource) else source.dtype
            made = make_stand_in(original, dtype, self.main, lambda: read([source], self.main)[0])
            self.parked[id(original)] = made
        return made

    def _replace(self, name: str, stand_in: torch.Tensor) -> None:
        original = self._get(name)
        source = self.sources[id(original)]
        unread = id(original) in self.unread
        self._set(name, stand_in)

        def restore() -> None:
            if unread:
                self._set(name, self._as_loaded(original, source))
                return
            if isinstance(source, DiskSource) and not original.numel():
                # Emptied when its bytes went to disk; a twin may have brought it back already.
                original.data = source.stored.read().clone()
            self._set(name, original)

        self.dispatched.on_undo(restore)
        if isinstance(source, DiskSource) and not unread and original.numel():
            original.data = torch.empty(0, dtype=original.dtype)

    def _as_loaded(self, original: torch.Tensor, source: Source) -> torch.Tensor:
        """What loading would have made of a tensor that was never read; one for tied names."""
        if id(original) not in self.made:
            tensor = (
                source.tensor
                if isinstance(source, HostSource)
                else source.stored.read().to(source.dtype)
            )
            self.made[id(original)] = _like(original, tensor)
        return self.made[id(original)]

    # ---------------------------------------------------------------- hooks

    def _fetch_around(
        self, module: torch.nn.Module, unit: FetchGroup, stand_ins: Mapping[str, torch.Tensor]
    ) -> None:
        fetcher, main = self.dispatched.fetcher, self.main
        places = [self._place(name) for name in unit.sources]
        depth = 0
        away: list[torch.Tensor] = []  # the stand-ins, while the bytes are here

        def before(_: Any, args: Any, kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            if depth == 1:
                seen: dict[int, torch.Tensor] = {}
                self.here.append(put_back)
                # A cast makes other stand-ins of buffers.
                away[:] = [
                    held[leaf] if is_stand_in(held[leaf]) else stand_ins[name]
                    for (held, leaf), name in zip(places, unit.sources, strict=True)
                ]
                for (held, leaf), stand_in, tensor in zip(
                    places, away, fetcher.take(unit), strict=True
                ):
                    if id(stand_in) not in seen:  # tied names stay one object
                        seen[id(stand_in)] = _like(stand_in, as_cast(tensor, stand_in))
                    held[leaf] = seen[id(stand_in)]

            return to_device(args, canonical_device(main)), to_device(
                kwargs, canonical_device(main)
            )

        def after(*_: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                put_back()

        def put_back() -> None:
            nonlocal depth
            depth = 0
            self.here.remove(put_back)
            for (held, leaf), name, stand_in in zip(places, unit.sources, away, strict=True):
                if held[leaf] is not stand_in:
                    _keep_changes(unit.sources[name], held[leaf], module.training)
                    held[leaf] = stand_in
            fetcher.give_back()

        self._hook(module, before, after)

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        held: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
        return held, leaf

    def _follow(self, item: Node, device: torch.device) -> None:
        """Inputs of a part come to its device."""
        there = canonical_device(device)
        self._hook(
            self.model.get_submodule(item.name),
            lambda _, args, kwargs: (to_device(args, there), to_device(kwargs, there)),
            None,
        )

    def _hook(self, module: torch.nn.Module, before: Any, after: Any) -> None:
        handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
        if after is not None:
            handles.append(module.register_forward_hook(after, always_call=True))
        for handle in handles:
            self.dispatched.on_undo(handle.remove)

    def _wrap_entry_methods(self) -> None:
        """Whatever enters the model: its results return to where its inputs came from."""
        for name in ("forward", *ENTRY_METHODS):
            method = getattr(self.model, name, None)
            if callable(method) and name not in vars(self.model):
                vars(self.model)[name] = self._returning(method)
                self.dispatched.on_undo(functools.partial(vars(self.model).pop, name))

    def _returning(self, method: Callable[..., Any]) -> Callable[..., Any]:
        several = self.several

        @functools.wraps(method)
        def enter(*args: Any, **kwargs: Any) -> Any:
            first = next((t.device for t in tensors_in((args, kwargs))), None)
            try:
                with OneDevice() if several else contextlib.nullcontext():
                    result = method(*args, **kwargs)
            except BaseException:
                # Hooks are called after an error, but not after Ctrl-C.
                while self.here:
                    self.here[-1]()
                raise
            if first is None or all(t.device == first for t in tensors_in(result)):
                return result
            return to_device(result, first)

        return enter


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
