"""Plans a `Placement`: units and budgets in, a device for each unit out. Arithmetic only.

Units (blocks, leaf modules, and tensors that a divided module holds itself) are placed whole. GPUs
are tried before the host, the host before the disk. Room for two of the largest units that are
fetched is kept free where they are computed: the one that computes and the one being fetched.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, cast, get_args

from ddinfer.errors import UsageError
from ddinfer.models.component_roles import STEP_COMPONENTS
from ddinfer.models.devices import (
    CPU,
    DISK,
    MaxMemory,
    PlacementError,
    format_bytes,
    memory_budgets,
    parse_bytes,
)
from ddinfer.models.placement import Placement
from ddinfer.models.tree import Node, PlacementUnit, tree_of, units_of

Strategy = Literal["balanced", "auto"]

#: Share of each GPU's budget that is kept for activations by default.
HEADROOM = Fraction(1, 10)

#: A component of at most this part of a pipeline's bytes is small.
SMALL_PARTS = 50

#: PlacementUnit's index → device.
Assignment = dict[int, str]


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
        no_split: class names of modules that are never divided, besides the model's own list.
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
    check_strategy(strategy)
    budgets = memory_budgets(max_memory, gpus)
    gpu = any(device not in (CPU, DISK) for device in budgets)
    root = tree_of(model_or_pipeline_or_path, no_split=no_split, dtype=dtype, gpu=gpu)
    kept = headroom if headroom is None or isinstance(headroom, Fraction) else parse_bytes(headroom)
    return plan(root, budgets, strategy, kept)


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


def plan(
    root: Node,
    budgets: Mapping[str, int],
    strategy: Strategy = "balanced",
    headroom: int | Fraction | None = None,
    *,
    prefetch: bool = True,
) -> Placement:
    """Places a tree of modules.

    Args:
        budgets: device → bytes. A missing "disk" holds anything, a missing "cpu" nothing.
        headroom: bytes (or share) kept for activations of each budget where it is computed.
        prefetch: keeps room to fetch a unit while the one before it computes, where there is any.

    Raises:
        PlacementError: it does not fit.
    """
    # A folder and a pipeline list the same components in other orders.
    units = sorted(units_of(root), key=lambda unit: unit.component)
    gpus = [device for device in budgets if device not in (CPU, DISK)]
    computing = gpus or [device for device in budgets if device == CPU]
    kept = {device: _headroom(budgets[device], headroom) for device in computing}
    usable = {device: size - kept.get(device, 0) for device, size in budgets.items()}
    free = {device: usable[device] for device in gpus}
    main, room, ahead = next(iter(gpus), CPU), 0, True
    if gpus and (placed := _on_gpus(units, free, strategy)) is not None:
        assignment = placed
    elif not gpus and sum(u.num_bytes for u in units) <= usable.get(CPU, 0):
        assignment = dict.fromkeys(range(len(units)), CPU)
    else:
        found = _with_fetching(units, free, usable, prefetch)
        if found is None:
            raise PlacementError(_does_not_fit(units, budgets, kept))
        assignment, main, room, ahead = found
    reserved = dict(kept)
    if room:
        reserved[main] = reserved.get(main, 0) + room
    devices = {name: assignment[n] for n, unit in enumerate(units) for name in unit.names}
    names = collapse_to_modules(root, devices, main)
    return Placement(names, main, ahead, _sizes(root, names), dict(budgets), reserved)


def _headroom(budget: int, headroom: int | Fraction | None) -> int:
    if headroom is None:
        headroom = HEADROOM
    return min(budget, int(budget * headroom) if isinstance(headroom, Fraction) else headroom)


def _sizes(root: Node, names: Mapping[str, str]) -> dict[str, int]:
    """Name → bytes below it; a tensor with several names counts under the first."""
    sizes = dict.fromkeys(names, 0)
    seen = set()
    for tensor in root.every_tensor():
        path = tensor.name
        while path not in sizes:
            path = path.rpartition(".")[0]
        if tensor.identity not in seen:
            sizes[path] += tensor.num_bytes
            seen.add(tensor.identity)
    return sizes


def _on_gpus(
    units: Sequence[PlacementUnit], free: Mapping[str, int], strategy: Strategy
) -> Assignment | None:
    """Everything on GPUs, or ``None`` when it does not fit there."""
    if sum(u.num_bytes for u in units) > sum(free.values()):
        return None
    everything = range(len(units))
    found: Assignment | None = None
    if strategy == "balanced":
        components = _components(units)
        if len(components) > 1:
            found = _whole_components(units, components, free)
            found = found or _one_divided(units, components, free)
        found = found or _balance(units, everything, free)
    found = found or _in_order(units, everything, free)
    return found if len(found) == len(units) else None


def _components(units: Sequence[PlacementUnit]) -> dict[str, list[int]]:
    """Component → its units, where the tree is a pipeline (several first parts of names)."""
    found: dict[str, list[int]] = {}
    for n, unit in enumerate(units):
        found.setdefault(unit.component, []).append(n)
    return found


def _whole_components(
    units: Sequence[PlacementUnit], components: Mapping[str, list[int]], free: Mapping[str, int]
) -> Assignment | None:
    """Each component on one GPU, the fullest GPU as empty as possible; ``None``: impossible."""
    sizes = {c: sum(units[n].num_bytes for n in inside) for c, inside in components.items()}
    order = sorted(sizes, key=lambda c: -sizes[c])
    chosen = _arrange(order, sizes, free)
    if chosen is None:
        return None
    return {n: chosen[c] for c, inside in components.items() for n in inside}


def _arrange(
    order: Sequence[str], sizes: Mapping[str, int], free: Mapping[str, int]
) -> dict[str, str] | None:
    """Components (largest first) → GPUs, each where most room is left; ``None``: no room."""
    left = dict(free)
    chosen = {}
    for component in order:
        device = max(left, key=lambda d: left[d])
        left[device] -= sizes[component]
        if left[device] < 0:
            return None
        chosen[component] = device
    return chosen


def _one_divided(
    units: Sequence[PlacementUnit], components: Mapping[str, list[int]], free: Mapping[str, int]
) -> Assignment | None:
    """All components but one whole, that one divided over the room left; the largest first."""
    sizes = {c: sum(units[n].num_bytes for n in inside) for c, inside in components.items()}
    order = sorted(sizes, key=lambda c: -sizes[c])
    for divided in order:
        others = [c for c in order if c != divided]
        chosen = _arrange(others, sizes, free)
        if chosen is None:
            continue
        left = dict(free)
        for component, device in chosen.items():
            left[device] -= sizes[component]
        found = _balance(units, components[divided], left, {d: free[d] - left[d] for d in free})
        if found is not None:
            whole = {n: chosen[c] for c in others for n in components[c]}
            return {**whole, **found}
    return None


def _balance(
    units: Sequence[PlacementUnit],
    members: Sequence[int],
    free: Mapping[str, int],
    loads: Mapping[str, int] | None = None,
) -> Assignment | None:
    """Neighbours together, in order over the GPUs, the most loaded one as little as possible."""
    loads = loads or {}
    sizes = [units[n].num_bytes for n in members]
    low, high = max(sizes, default=0), sum(sizes) + max(loads.values(), default=0)
    found: Assignment | None = None
    while low <= high:
        limit = (low + high) // 2
        room = {d: min(free[d], max(0, limit - loads.get(d, 0))) for d in free}
        trial = _in_order(units, members, room, back=False)
        if len(trial) == len(members):
            found, high = trial, limit - 1
        else:
            low = limit + 1
    return found


def _in_order(
    units: Sequence[PlacementUnit],
    members: Iterable[int],
    free: Mapping[str, int],
    *,
    back: bool = True,
) -> Assignment:
    """Units onto devices in both orders, as far as they fit.

    A unit that does not fit goes to a later device, else (``back``) to an earlier one.
    """
    devices, left = list(free), dict(free)
    now = 0
    found: Assignment = {}
    for n in members:
        size = units[n].num_bytes
        later = (d for d in range(now, len(devices)) if size <= left[devices[d]])
        earlier = (d for d in range(now) if back and size <= left[devices[d]])
        place = next(later, None)
        if place is not None:
            now = place
        else:
            place = next(earlier, None)
        if place is None:
            continue
        found[n] = devices[place]
        left[devices[place]] -= size
    return found


def _with_fetching(
    units: Sequence[PlacementUnit],
    free: Mapping[str, int],
    usable: Mapping[str, int],
    prefetch: bool,
) -> tuple[Assignment, str, int, bool] | None:
    """Some units on host or disk: who lies where, what they are fetched into, and whether two fit.

    Room is kept for a fetched unit and the next one (where that does not fit: for one alone).
    Which units are fetched depends on the room and the room on them, so every size is tried.
    """
    sizes = [u.num_bytes for u in units]
    order = _first_to_last(units)
    # Neighbours stay together, unless the largest first spare a slower tier a twentieth of all.
    orders = list(enumerate((order, sorted(order, key=lambda n: -sizes[n]))))
    twentieth = max(1, sum(sizes) // 20)
    pairs = {one + other for one, other in itertools.pairwise([*sizes, *sizes[:1]])}
    for ahead, rooms in ((True, {*sizes, *pairs, *(2 * n for n in sizes)}), (False, set(sizes))):
        if ahead and not prefetch:
            continue
        best: tuple[tuple[int, ...], Assignment, str, int] | None = None
        for main, room, (k, order) in itertools.product(free or (CPU,), sorted(rooms), orders):
            found = _place_with_room(units, order, free, usable, main, room)
            if found is None:
                continue
            fetched = sorted(n for n, d in found.items() if d in (CPU, DISK) and d != main)
            if room < _staging_needed([sizes[n] for n in fetched], ahead):
                continue
            on_disk = sum(sizes[n] for n in fetched if found[n] == DISK)
            away = sum(sizes[n] for n in fetched)
            score = (on_disk // twentieth, away // twentieth, k, on_disk, away, room)
            if best is None or score < best[0]:
                best = score, found, main, room
        if best:
            return *best[1:], ahead
    return None


def _staging_needed(fetched: Sequence[int], ahead: bool) -> int:
    """Bytes for the largest fetched unit, or (``ahead``) the largest pair of neighbours.

    The first follows the last: the next step begins where this one ended.
    """
    if not ahead or len(fetched) < 2:
        return max(fetched, default=0)
    return max(a + b for a, b in itertools.pairwise([*fetched, fetched[0]]))


def _first_to_last(units: Sequence[PlacementUnit]) -> list[int]:
    """Who has the first claim on a GPU: small components (whole, they cost next to nothing), then
    those that run every step, then those that run once an image (text encoders)."""
    totals: dict[str, int] = {}
    for unit in units:
        totals[unit.component] = totals.get(unit.component, 0) + unit.num_bytes
    small = {c for c, size in totals.items() if size * SMALL_PARTS <= sum(totals.values())}

    def claim(n: int) -> tuple[bool, bool, int]:
        component = units[n].component
        return component not in small, component not in STEP_COMPONENTS, n

    return sorted(range(len(units)), key=claim)


def _place_with_room(
    units: Sequence[PlacementUnit],
    order: Sequence[int],
    free: Mapping[str, int],
    usable: Mapping[str, int],
    main: str,
    room: int,
) -> Assignment | None:
    """GPUs first, then the host, the rest on disk, with ``room`` bytes kept free on ``main``."""
    tiers = {**free, CPU: usable.get(CPU, 0)}
    tiers[main] -= room
    if any(size < 0 for size in tiers.values()):
        return None
    host = tiers.pop(CPU)
    found = _in_order(units, order, tiers)
    found |= _in_order(units, [n for n in order if n not in found], {CPU: host})
    last = [n for n in order if n not in found]
    if DISK in usable and sum(units[n].num_bytes for n in last) > usable[DISK]:
        return None
    return {**found, **dict.fromkeys(last, DISK)}


def _does_not_fit(
    units: Sequence[PlacementUnit], budgets: Mapping[str, int], kept: Mapping[str, int]
) -> str:
    largest = max(units, key=lambda u: u.num_bytes)
    total = sum(u.num_bytes for u in units)
    lines = [f"the model does not fit: {format_bytes(total)} of weights"]
    for device, budget in budgets.items():
        share = f", {format_bytes(kept[device])} of it for activations" if device in kept else ""
        lines.append(f"  {device}: {format_bytes(budget)}{share}")
    if not kept:
        lines.append("no device that computes has a budget: name a GPU or cpu in max_memory")
        return "\n".join(lines)
    main = max(kept, key=lambda device: budgets[device] - kept[device])
    room = budgets[main] - kept[main]
    if largest.num_bytes > room:
        lines.append(
            f"{largest.names[0]} alone is {format_bytes(largest.num_bytes)} and is not divided; "
            f"{main} has room for {format_bytes(room)}. Raise its budget, or lower the dtype"
        )
    else:
        lines.append(
            f"the largest block, {largest.names[0]}, is {format_bytes(largest.num_bytes)}; a "
            f"fetched block needs that much of {main} beside what stays. Raise a budget "
            "(max_memory), allow disk, or lower the dtype"
        )
    return "\n".join(lines)


def collapse_to_modules(root: Node, devices: Mapping[str, str], main: str) -> dict[str, str]:
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
