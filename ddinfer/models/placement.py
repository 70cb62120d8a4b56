"""Which part of a model lies where: planned over sizes alone, before any device is touched.

A model is a tree of modules with sizes (`Node`). Its *units* — blocks, leaf modules, and tensors
that a divided module holds itself — are what a plan puts on a device whole. GPUs are tried before
the host, the host before the disk. Units of host and disk are brought to the first GPU (without
one: into host memory) just before use, so room for two of the largest is kept free there: the one
that computes and the one being fetched.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Literal, cast, get_args

from ddinfer.errors import UsageError, list_some
from ddinfer.models.tree import Node, Tensor

Strategy = Literal["balanced", "auto"]
MaxMemory = Mapping[int | str, int | str]

CPU, DISK = "cpu", "disk"
#: Share of each GPU's budget that is kept for activations unless told otherwise.
HEADROOM = Fraction(1, 10)
#: Components of a pipeline that run once a step; they are the last to leave the GPUs.
STEP_COMPONENTS = ("transformer", "unet", "transformer_2", "unet_2", "controlnet", "prior")

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)},
    **{f"{letter}IB": 1024**n for n, letter in enumerate("KMGT", 1)},
}


class PlacementError(UsageError):
    """A model that does not fit, or a placement that does not cover it. Shows the arithmetic."""


def parse_bytes(value: int | str) -> int:
    """``16_000_000_000``, ``"16GB"`` (16·10⁹), ``"16GiB"`` (16·2³⁰), ``"1.5 MB"`` → bytes.

    Raises:
        UsageError: no size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value), re.IGNORECASE)
    if found is None or found[2].upper() not in _UNITS:
        raise UsageError(f"{value!r} is no size: expected bytes or a text such as 16GB or 16GiB")
    return int(Fraction(found[1]) * _UNITS[found[2].upper()])


def parse_device(name: int | str) -> str:
    """``0``, ``"0"``, ``"cuda"``, ``"cuda:0"`` → ``"cuda:0"``; ``"cpu"``, ``"disk"``, ``"xpu:1"``.

    Raises:
        UsageError: no device.
    """
    text = str(name).strip()
    if text.isdigit():
        return f"cuda:{int(text)}"
    if text in (CPU, DISK) or re.fullmatch(r"[a-z]+:\d+", text):
        return text
    if re.fullmatch(r"[a-z]+", text) and text not in ("auto", "balanced"):
        return f"{text}:0"
    raise UsageError(f"{name!r} is no device: expected 0, cuda:0, cpu or disk")


def parse_max_memory(max_memory: MaxMemory | str) -> dict[str, int]:
    """Device → bytes, in the given order; also from ``"0=16GB,1=16GB,cpu=64GB"``.

    Raises:
        UsageError: no device, no size, or a device named twice.
    """
    if isinstance(max_memory, str):
        pairs: list[tuple[int | str, int | str]] = []
        for part in max_memory.split(","):
            name, equals, size = part.partition("=")
            if not equals:
                raise UsageError(f"{part!r} is no budget: expected DEVICE=SIZE, such as 0=16GB")
            pairs.append((name, size))
    else:
        pairs = list(max_memory.items())
    budgets: dict[str, int] = {}
    for key, value in pairs:
        device = parse_device(key)
        if device in budgets:
            raise UsageError(f"max_memory names {device} twice")
        budgets[device] = parse_bytes(value)
    return budgets


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


def on_gpu(device: str, gpus: Sequence[int]) -> str:
    """``cuda:n`` → the n-th of the GPUs that a process drives; other devices stay.

    Raises:
        PlacementError: there is no n-th.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return device
    if int(index) >= len(gpus):
        found = f"{len(gpus)} GPUs ({', '.join(map(str, gpus))}); see --gpus_per_rank"
        raise PlacementError(
            f"the placement (or max_memory) names {device}, but this process drives "
            + (found if gpus else "no GPU; name cpu and disk, or see --device")
        )
    return f"cuda:{gpus[int(index)]}"


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


def format_bytes(count: int) -> str:
    """1234567890 → ``1.23 GB``."""
    for letter, unit in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= unit:
            return f"{count / unit:.3g} {letter}B" if count < 1000 * unit else f"{count // unit} TB"
    return f"{count} B"


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


def check_strategy(strategy: str) -> Strategy:
    """The strategy of that name.

    Raises:
        UsageError: no strategy of ours.
    """
    for known in get_args(Strategy):
        if strategy == known:
            return cast(Strategy, known)
    raise UsageError(
        f"unknown placement strategy {strategy!r}; expected {' or '.join(get_args(Strategy))}"
    )


def merged(root: Node, devices: Mapping[str, str], main: str) -> dict[str, str]:
    """Names joined upward where everything below a module lies on one device.

    Units of host and disk stay apart (each is fetched by itself), except where the host computes.
    """

    def walk(node: Node) -> tuple[set[str], dict[str, str]]:
        if node.name in devices:
            return {devices[node.name]}, {node.name: devices[node.name]}
        found: set[str] = set()
        names: dict[str, str] = {}
        for tensor in node.tensors:
            found.add(devices[tensor.name])
            names[tensor.name] = devices[tensor.name]
        for child in node.children:
            below, inside = walk(child)
            found |= below
            names |= inside
        if len(found) == 1 and node.name and not found & ({CPU, DISK} - {main}):
            names = {node.name: next(iter(found))}
        return found, names

    return walk(root)[1]


def plan_placement(
    model_or_pipeline_or_path: Any,
    max_memory: MaxMemory | str | None = None,
    strategy: Strategy = "balanced",
    no_split: Sequence[str] | None = None,
    dtype: Any = None,
    *,
    headroom: int | str | Fraction | None = None,
    gpus: Sequence[int] | None = None,
) -> Placement:
    """Where each part of a model or pipeline should lie. Nothing is moved and no weight is read.

    Args:
        model_or_pipeline_or_path: a module, a pipeline, the folder (or Hub id) of either, or a
            `PipelineSource`.
        max_memory: device → budget, such as ``{0: "16GB", "cpu": "64GB"}`` or
            ``"0=16GB,cpu=64GB"``. GB is 10⁹ bytes, GiB 2³⁰. ``None``: what is free here now.
            Without "cpu", what the host has free; without "disk", any amount.
        strategy: ``"balanced"`` fills the GPUs evenly, a pipeline's components whole where that
            is possible; ``"auto"`` uses as few GPUs as possible, in order.
        no_split: class names of modules that are never divided, beside those their model names.
        dtype: the type that floating weights will have; ``None``: the one they have (or, for a
            path, the one that `ddinfer.load_pipeline` would choose).
        headroom: bytes kept for activations of each GPU's budget, without GPUs of the host's
            (default: a tenth).
        gpus: the GPUs to use (default: all); numbers in ``max_memory`` count through them, so
            that ranks that drive different ones share one budget.

    Raises:
        PlacementError: it does not fit; the message has the sums.
        UsageError: a budget, strategy or path that cannot be right.
    """
    from ddinfer.models.memory import complete_budgets
    from ddinfer.models.planner import plan
    from ddinfer.models.sizes import tree_of

    check_strategy(strategy)
    budgets = complete_budgets(max_memory, gpus)
    gpu = any(device not in (CPU, DISK) for device in budgets)
    root = tree_of(model_or_pipeline_or_path, no_split=no_split, dtype=dtype, gpu=gpu)
    kept = headroom if headroom is None or isinstance(headroom, Fraction) else parse_bytes(headroom)
    return plan(root, budgets, strategy, kept)
