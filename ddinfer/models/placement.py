"""A placement: which part of a model lies on which device. A value, checked against a model.

A model is a tree of modules with sizes (`ddinfer.models.tree.Node`). Units of host and disk are
brought to the first GPU (without one: into host memory) just before use.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ddinfer.errors import UsageError, list_some
from ddinfer.models.devices import CPU, DISK, PlacementError, format_bytes, on_gpu, parse_device
from ddinfer.models.tree import Node, Tensor


@dataclass(frozen=True)
class Placement:
    """Dotted names of modules or tensors → ``"cuda:0"``, ``"cpu"`` or ``"disk"``.

    The longest name that leads to a tensor decides; ``""`` leads to all.

    Attributes:
        main: where units of host and disk are computed (default: the first GPU, else the host).
        prefetch: whether there is room to fetch a unit while the one before it computes.
        sizes: name → bytes, where the placement was planned (or checked against a model).
        budgets: device → bytes it may hold; weights, headroom and room for fetching together.
        reserved: device → bytes of its budget kept for activations and for fetched units.
    """

    devices: Mapping[str, str]
    main: str = ""
    prefetch: bool = True
    sizes: Mapping[str, int] = field(default_factory=dict, compare=False)
    budgets: Mapping[str, int] = field(default_factory=dict, compare=False)
    reserved: Mapping[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        parsed = {name: parse_device(device) for name, device in self.devices.items()}
        object.__setattr__(self, "devices", parsed)
        gpus = sorted({d for d in parsed.values() if d not in (CPU, DISK)}, key=_device_order)
        object.__setattr__(self, "main", self.main or next(iter(gpus), CPU))

    @property
    def hf_device_map(self) -> dict[str, str]:
        """The same as a plain dict, as the rest of the 🤗 libraries have it."""
        return dict(self.devices)

    def device_of(self, name: str) -> str:
        """The device of a tensor or module.

        Raises:
            PlacementError: nothing leads to it.
        """
        path = name
        while path not in self.devices:
            if not path:
                raise PlacementError(
                    f"the placement does not cover {name}; it names {list_some(list(self.devices))}"
                )
            path = path.rpartition(".")[0]
        return self.devices[path]

    def below(self, name: str) -> Placement:
        """The part for one component, its names without the component's."""
        inside = {
            path.removeprefix(name).removeprefix("."): device
            for path, device in self.devices.items()
            if path == name or path.startswith(f"{name}.")
        }
        if not inside or ("" not in inside and "" in self.devices):
            inside = {"": self.device_of(name), **inside} if "" in self.devices else inside
        if not inside:
            raise PlacementError(f"the placement says nothing about {name}")
        return Placement(inside, self.main, self.prefetch)

    def only(self, components: Collection[str]) -> Placement:
        """The part for some of a pipeline's components; their names stay as they are."""
        kept = {
            path: device
            for path, device in self.devices.items()
            if not path or path.partition(".")[0] in components
        }
        return replace(self, devices=kept, sizes={n: b for n, b in self.sizes.items() if n in kept})

    def on_gpus(self, gpus: Sequence[int]) -> Placement:
        """The same for a process that drives other GPUs: cuda:0 becomes the first of ``gpus``, …

        Raises:
            PlacementError: it names more GPUs than those.
        """
        return Placement(
            {name: on_gpu(device, gpus) for name, device in self.devices.items()},
            on_gpu(self.main, gpus),
            self.prefetch,
            self.sizes,
            {on_gpu(device, gpus): size for device, size in self.budgets.items()},
            {on_gpu(device, gpus): size for device, size in self.reserved.items()},
        )

    def bytes_on(self) -> dict[str, int]:
        """Device → bytes of weights."""
        totals: dict[str, int] = {}
        for name, size in self.sizes.items():
            totals[self.devices[name]] = totals.get(self.devices[name], 0) + size
        return totals

    def to_json(self) -> str:
        data = {"version": 1, "devices": dict(self.devices), "main": self.main}
        return json.dumps(data if self.prefetch else data | {"prefetch": False}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Placement:
        """
        Raises:
            UsageError: not what `to_json` writes.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"a placement must be JSON: {error}") from error
        if not isinstance(data, dict) or data.get("version") != 1:
            raise UsageError('a placement must be {"version": 1, "devices": {NAME: DEVICE, …}}')
        devices = data.get("devices")
        if not isinstance(devices, dict) or not devices:
            raise UsageError('a placement needs "devices": {NAME: DEVICE, …}')
        return cls(devices, str(data.get("main", "")), bool(data.get("prefetch", True)))

    def explain(self) -> str:
        """The plan as a table for people: what lies where, and how full each device is."""
        lines = []
        totals = self.bytes_on()
        for device in dict.fromkeys([*self.budgets, *self.devices.values()]):
            held, kept = totals.get(device, 0), self.reserved.get(device, 0)
            line = f"{device:<8}{format_bytes(held):>10}"
            if device in self.budgets:
                line += f" of {format_bytes(self.budgets[device])}"
            if kept:
                line += f", {format_bytes(kept)} kept for activations and fetched blocks"
            lines.append(line)
            for text, size in _runs(self, device):
                lines.append(f"  {text:<60}{format_bytes(size) if size else '':>10}")
        return "\n".join(lines)


def _device_order(device: str) -> tuple[str, int]:
    kind, _, index = device.partition(":")
    return kind, int(index or 0)


def _runs(placement: Placement, device: str) -> Iterator[tuple[str, int]]:
    """Neighbouring blocks of one list as one line: ``transformer.blocks.0 … 18``."""
    names = [name for name, where in placement.devices.items() if where == device]

    def key(name: str) -> str:
        head, _, last = name.rpartition(".")
        return f"{head}." if last.isdigit() else name

    for _, group in itertools.groupby(names, key):
        run = list(group)
        size = sum(placement.sizes.get(name, 0) for name in run)
        first, last = run[0] or "everything", run[-1].rpartition(".")[2]
        yield (first if len(run) == 1 else f"{first} … {last}"), size


def check_covers(placement: Placement, root: Node) -> Placement:
    """A user's placement, with sizes, after checking that it fits the model.

    Raises:
        PlacementError: a tensor without a device, a name that leads to nothing, or tied tensors
            on different devices.
    """
    tensors = list(root.every_tensor())
    uncovered, where, sizes = [], {}, dict.fromkeys(placement.devices, 0)
    seen: dict[str, Tensor] = {}
    used = set()
    for tensor in tensors:
        path = tensor.name
        while path and path not in placement.devices:
            path = path.rpartition(".")[0]
        if path not in placement.devices:
            uncovered.append(tensor.name)
            continue
        used.add(path)
        where[tensor.name] = placement.devices[path]
        twin = seen.setdefault(tensor.identity, tensor)
        if twin is tensor:
            sizes[path] += tensor.num_bytes
        elif where[twin.name] != where[tensor.name]:
            raise PlacementError(
                f"{twin.name} (on {where[twin.name]}) and {tensor.name} (on {where[tensor.name]}) "
                "are one tensor; put them on one device"
            )
    if uncovered:
        raise PlacementError(
            f"the placement leaves {len(uncovered)} of {len(tensors)} tensors without a device: "
            f'{list_some(uncovered)}; name them, or give a default with "": DEVICE'
        )
    modules = {"", *(name for name in _module_names(root))}
    lost = [n for n in placement.devices if n not in used and n not in modules]
    if lost:
        raise PlacementError(f"the placement names what the model does not have: {list_some(lost)}")
    return replace(placement, sizes=sizes)


def _module_names(node: Node) -> Iterator[str]:
    yield node.name
    for child in node.children:
        yield from _module_names(child)
