"""Plans are arithmetic: swept over thousands of trees and budgets without a device."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddinfer.errors import UsageError
from ddinfer.models.devices import (
    CPU,
    DISK,
    PlacementError,
    memory_budgets,
    parse_bytes,
    parse_device,
    parse_max_memory,
)
from ddinfer.models.placement import Placement, check_covers
from ddinfer.models.planner import plan, plan_placement
from ddinfer.models.stages import plan_stages
from ddinfer.models.tree import Node, Tensor, tree_of, tree_of_model, units_of
from tests.data.record_accelerate import CASES, build
from tests.tiny_pipelines import tiny_pipeline

RECORDED = json.loads((Path(__file__).parent / "data" / "accelerate_placements.json").read_text())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (16, 16),
        ("16GB", 16 * 10**9),
        ("16GiB", 16 * 2**30),
        ("1.5 MB", 1_500_000),
        ("0.5gib", 2**29),
        ("512kB", 512_000),
        ("7", 7),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_are_read_exactly(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1", "16 apples", "1e9", -1, True, "1.2.3GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


def test_devices_have_one_spelling():
    spelt = {0: "cuda:0", "1": "cuda:1", "cuda": "cuda:0", "cuda:3": "cuda:3", "cpu": "cpu"}
    assert {k: parse_device(k) for k in spelt} == spelt
    with pytest.raises(UsageError, match="is not a device"):
        parse_device("GPU 0")


def test_budgets_are_read_from_text_and_refused_twice():
    text = "0=16GB,1=16GiB,cpu=64GB"
    assert parse_max_memory(text) == {"cuda:0": 16 * 10**9, "cuda:1": 16 * 2**30, "cpu": 64 * 10**9}
    with pytest.raises(UsageError, match="names cuda:0 twice"):
        parse_max_memory({0: "1GB", "cuda:0": "2GB"})
    with pytest.raises(UsageError, match="expected DEVICE=SIZE"):
        parse_max_memory("16GB")


# ------------------------------------------------------------- trees of every shape


@st.composite
def trees(draw):
    """A root with up to five children (perhaps components), lists of blocks, tied tensors."""
    count = 0
    known: list[str] = []

    def tensor(path: str) -> Tensor:
        nonlocal count
        count += 1
        name = f"{path}.t{count}".lstrip(".")
        if known and draw(st.integers(0, 9)) == 0:
            twin = draw(st.sampled_from(known))
            return Tensor(name, sizes[twin], twin)
        known.append(name)
        sizes[name] = draw(st.integers(0, 60))
        return Tensor(name, sizes[name], name)

    sizes: dict[str, int] = {}

    def node(path: str, depth: int) -> Node:
        tensors = tuple(tensor(path) for _ in range(draw(st.integers(0, 2))))
        children = ()
        if depth:
            names = [f"{path}.m{n}".lstrip(".") for n in range(draw(st.integers(0, 4)))]
            children = tuple(node(name, depth - 1) for name in names)
        return Node(path, tensors, children, whole=bool(path) and draw(st.integers(0, 3)) == 0)

    root = node("", 3)
    pipeline = draw(st.booleans()) and not root.tensors
    return Node("", root.tensors, root.children, pipeline=pipeline)


BUDGETS = st.fixed_dictionaries(
    {},
    optional={
        "cuda:0": st.integers(0, 600),
        "cuda:1": st.integers(0, 600),
        "cuda:2": st.integers(0, 600),
        CPU: st.integers(0, 600),
        DISK: st.integers(0, 2000),
    },
)


def where_everything_is(placement: Placement, root: Node) -> dict[str, str]:
    return {tensor.name: placement.device_of(tensor.name) for tensor in root.every_tensor()}


@settings(max_examples=1500, deadline=None)
@given(trees(), BUDGETS, st.sampled_from(["balanced", "auto"]), st.booleans())
def test_every_tensor_is_placed_once_and_no_budget_is_exceeded(root, budgets, strategy, prefetch):
    try:
        placement = plan(root, budgets, strategy, Fraction(1, 10), prefetch=prefetch)
    except PlacementError:
        # Said rightly: not even each tier filled to the brim would have held it, or some unit is
        # too large for the room that fetching leaves.
        total, units = root.num_bytes(), units_of(root)
        largest = max((unit.num_bytes for unit in units), default=0)
        gpus = [size - size // 10 for d, size in budgets.items() if d not in (CPU, DISK)]
        host = budgets.get(CPU, 0)
        main = max(gpus) if gpus else host - host // 10
        assert DISK in budgets or largest > main - largest or total > sum(budgets.values())
        return
    tensors = list(root.every_tensor())
    where = where_everything_is(placement, root)
    assert set(where) == {t.name for t in tensors}
    by_identity: dict[str, set[str]] = {}
    for tensor in tensors:
        by_identity.setdefault(tensor.identity, set()).add(where[tensor.name])
    assert all(len(devices) == 1 for devices in by_identity.values())
    held: Counter[str] = Counter()
    for identity, size in {t.identity: t.num_bytes for t in tensors}.items():
        held[next(iter(by_identity[identity]))] += size
    assert {d: n for d, n in held.items() if n} == {
        d: n for d, n in placement.bytes_on().items() if n
    }
    for device, budget in budgets.items():
        assert held[device] + placement.reserved.get(device, 0) <= budget
    assert {d for d, size in held.items() if size} <= {*budgets, DISK}


@settings(max_examples=600, deadline=None)
@given(trees(), BUDGETS, st.sampled_from(["balanced", "auto"]))
def test_a_unit_is_on_a_slower_tier_only_where_no_faster_one_has_room(root, budgets, strategy):
    try:
        placement = plan(root, budgets, strategy, 0)
    except PlacementError:
        return
    held = placement.bytes_on()
    free = {
        d: size - held.get(d, 0) - placement.reserved.get(d, 0)
        for d, size in budgets.items()
        if d != DISK
    }
    for unit in units_of(root):
        device = placement.device_of(unit.names[0])
        faster = [d for d in free if d != CPU] if device == CPU else list(free)
        if device in (CPU, DISK) and device != placement.main and unit.num_bytes:
            assert all(unit.num_bytes > free[d] for d in faster)


@settings(max_examples=400, deadline=None)
@given(trees(), BUDGETS)
def test_a_unit_is_never_divided(root, budgets):
    try:
        placement = plan(root, budgets, "balanced", 0)
    except PlacementError:
        return

    def whole(node: Node):
        if node.whole:
            yield node
        else:
            for child in node.children:
                yield from whole(child)

    for node in whole(root):
        devices = {placement.device_of(t.name) for t in node.every_tensor()}
        assert len(devices) <= 1


@settings(max_examples=400, deadline=None)
@given(trees(), st.lists(st.integers(1, 600), min_size=1, max_size=4))
def test_nothing_leaves_the_gpus_when_units_of_one_byte_fit(root, sizes):
    """With one unit as large as all the rest together, filling to the brim must still work."""
    total = root.num_bytes()
    budgets = {f"cuda:{n}": size + total for n, size in enumerate(sizes)}
    placement = plan(root, budgets, "auto", 0)
    assert set(placement.devices.values()) <= {"cuda:0"}
    balanced = plan(root, budgets, "balanced", 0)
    assert not set(balanced.devices.values()) & {CPU, DISK}


@settings(max_examples=300, deadline=None)
@given(trees(), BUDGETS)
def test_a_placement_survives_json(root, budgets):
    try:
        placement = plan(root, budgets)
    except PlacementError:
        return
    if placement.devices:
        again = Placement.from_json(placement.to_json())
        assert again == placement
        assert check_covers(again, root).bytes_on() == placement.bytes_on()


# ------------------------------------------------------------- beside Accelerate


def tier_bytes(devices: dict[str, str], root: Node) -> Counter[str]:
    """Bytes on "gpu", "cpu" and "disk"; what no name leads to counts as lost."""
    totals: Counter[str] = Counter()
    seen = set()
    for tensor in root.every_tensor():
        path = tensor.name
        while path and path not in devices:
            path = path.rpartition(".")[0]
        device = parse_device(devices[path]) if path in devices else "lost"
        if tensor.identity not in seen:
            tier = device if device in (CPU, DISK, "lost") else "gpu"
            totals[tier] += tensor.num_bytes
        seen.add(tensor.identity)
    return totals


def test_the_ten_recorded_cases_are_all_there():
    assert RECORDED["source"].startswith("accelerate ")
    assert set(RECORDED["placements"]) == set(CASES)
    assert len(CASES) == 10


@pytest.mark.parametrize("name", sorted(CASES))
def test_no_case_is_worse_than_accelerates(name):
    """On its terms: it keeps room for one fetched layer and none for activations."""
    case = CASES[name]
    root = tree_of_model(build(case), no_split=case.no_split)
    budgets = parse_max_memory(case.max_memory)
    ours = plan(root, budgets, case.strategy, 0, prefetch=False)
    theirs = tier_bytes(RECORDED["placements"][name], root)
    mine = tier_bytes(ours.hf_device_map, root)
    assert mine["lost"] == 0
    assert mine[DISK] <= theirs[DISK]
    assert mine[CPU] + mine[DISK] <= theirs[CPU] + theirs[DISK] + theirs["lost"]


# ------------------------------------------------------------- models and pipelines


def flux(budgets: str, tmp_path: Path, **arguments: object) -> Placement:
    return plan_placement(tiny_pipeline("flux", tmp_path), budgets, **arguments)  # type: ignore[arg-type]


def test_components_stay_whole_where_they_can(tmp_path):
    placement = flux("0=700kB,1=400kB,cpu=1GB", tmp_path)
    assert set(placement.devices) == {"text_encoder", "text_encoder_2", "transformer", "vae"}
    assert placement.devices["transformer"] == "cuda:0"
    assert {placement.devices[n] for n in ("text_encoder", "vae")} == {"cuda:1"}


def test_only_the_denoiser_is_divided_when_one_must_be(tmp_path):
    placement = flux("0=500kB,1=500kB,cpu=1GB", tmp_path)
    assert {"text_encoder", "text_encoder_2", "vae"} <= set(placement.devices)
    inside = {d for n, d in placement.devices.items() if n.startswith("transformer.")}
    assert inside == {"cuda:0", "cuda:1"}


def test_the_denoiser_is_the_last_to_leave_the_gpus(tmp_path):
    placement = flux("0=640kB,cpu=1GB", tmp_path, headroom=0)
    devices = {n: placement.device_of(n) for n in ("transformer.proj_out.weight",)}
    assert devices == {"transformer.proj_out.weight": "cuda:0"}
    assert placement.bytes_on()["cpu"] > 0


def test_auto_uses_as_few_gpus_as_possible(tmp_path):
    one = flux("0=1MB,1=1MB,cpu=1GB", tmp_path, strategy="auto")
    assert set(one.devices.values()) == {"cuda:0"}


def test_a_path_a_pipeline_and_its_placement_agree(tmp_path):
    from ddinfer.models.loading import load_pipeline

    folder = tiny_pipeline("flux", tmp_path)
    by_path = plan_placement(folder, "0=500kB,cpu=1GB")
    by_pipeline = plan_placement(load_pipeline(folder), "0=500kB,cpu=1GB")
    assert by_path.devices == by_pipeline.devices
    assert by_path.sizes == by_pipeline.sizes


def test_a_repository_is_planned_from_its_configs_alone(tmp_path, monkeypatch):
    import huggingface_hub

    whole = tiny_pipeline("flux", tmp_path)
    configs = tmp_path / "snapshot"
    for file in [whole / "model_index.json", *whole.glob("*/config.json")]:
        target = configs / file.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    asked = []

    class Api(huggingface_hub.HfApi):
        def parse_safetensors_file_metadata(self, repo, file, **_):  # type: ignore[override]
            asked.append(file)
            return type("Metadata", (), {"parameter_count": {"F32": 10, "I64": 1}})

    def snapshot(repo, **arguments):
        assert all(pattern.endswith(".json") for pattern in arguments["allow_patterns"])
        return str(configs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    planned = plan_placement("somebody/flux", "0=500kB,cpu=1GB")
    assert planned.devices == plan_placement(whole, "0=500kB,cpu=1GB").devices
    assert asked == ["transformer/diffusion_pytorch_model.safetensors"]
    half = plan_placement("somebody/flux", "0=500kB,cpu=1GB", dtype="bf16")
    assert sum(half.sizes.values()) < 0.52 * sum(planned.sizes.values())


def test_half_the_dtype_is_half_the_bytes(tmp_path):
    folder = tiny_pipeline("flux", tmp_path)
    full = tree_of(folder).num_bytes()
    half = tree_of(folder, dtype="bfloat16").num_bytes()
    assert half == pytest.approx(full / 2, rel=0.02)  # integer buffers stay as they are


def test_buffers_are_counted():
    model = torch.nn.Module()
    model.register_buffer("table", torch.zeros(1000), persistent=False)
    model.linear = torch.nn.Linear(2, 2)
    assert tree_of_model(model).num_bytes() == 4000 + 24


def test_unknown_strategies_and_impossible_budgets_are_errors(tmp_path):
    with pytest.raises(UsageError, match="unknown placement strategy 'best'"):
        flux("0=1GB", tmp_path, strategy="best")
    with pytest.raises(PlacementError) as caught:
        flux("0=100kB,cpu=1GB", tmp_path)
    text = str(caught.value)
    assert "787 kB of weights" in text
    assert "transformer.transformer_blocks.0 alone is 152 kB" in text
    assert "cuda:0 has room for 90 kB" in text


def test_a_user_placement_must_cover_every_tensor(tmp_path):
    root = tree_of(tiny_pipeline("flux", tmp_path))
    with pytest.raises(PlacementError, match=r"leaves \d+ of \d+ tensors without a device: vae"):
        check_covers(Placement({"text_encoder": 0, "text_encoder_2": 0, "transformer": 1}), root)
    with pytest.raises(PlacementError, match="does not have: transformr"):
        check_covers(Placement({"": "cpu", "transformr": 1}), root)
    with pytest.raises(PlacementError, match="are one tensor; put them on one device"):
        check_covers(Placement({"": "cpu", "text_encoder_2.shared": 1}), root)
    covered = check_covers(Placement({"": "cpu", "transformer.x_embedder": 1}), root)
    assert covered.device_of("transformer.x_embedder.weight") == "cuda:1"
    assert covered.bytes_on()["cuda:1"] == 32 * 16 * 4 + 32 * 4


def test_a_component_gets_its_part_of_a_placement():
    placement = Placement({"vae": "cpu", "transformer.a": 0, "transformer.b": "disk"})
    assert placement.below("vae").devices == {"": "cpu"}
    assert placement.below("transformer").devices == {"a": "cuda:0", "b": "disk"}
    assert Placement({"": "cpu", "vae.decoder": 0}).below("vae").devices == {
        "": "cpu",
        "decoder": "cuda:0",
    }
    with pytest.raises(PlacementError, match="says nothing about unet"):
        placement.below("unet")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"version": 2, "devices": {}}', '{"version": 1}']
)
def test_what_is_no_placement_file_is_refused(text):
    with pytest.raises(UsageError, match="placement"):
        Placement.from_json(text)


def test_explain_shows_runs_of_blocks_and_the_room_kept(tmp_path):
    text = flux("0=500kB,cpu=1GB", tmp_path).explain()
    assert "cuda:0" in text
    assert "of 500 kB" in text
    assert "kept for activations and fetched blocks" in text
    assert "…" in text


def test_planning_needs_no_torch():
    code = "import sys; import ddinfer.models.planner; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60).returncode == 0


def test_planning_looks_at_no_device(tmp_path, monkeypatch):
    def touched(*_: object) -> None:
        raise AssertionError("a plan touched a device")

    root = tree_of(tiny_pipeline("flux", tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", touched)
    monkeypatch.setattr(torch.cuda, "mem_get_info", touched)
    plan(root, {"cuda:0": 500_000, CPU: 10**9})


def test_a_rank_asks_only_its_own_gpus_how_much_is_free(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda n: asked.append(n) or (10 + n, 99))
    budgets = memory_budgets(None, [2, 3])
    assert asked == [2, 3]
    assert {d: size for d, size in budgets.items() if d != CPU} == {"cuda:2": 12, "cuda:3": 13}
    assert set(memory_budgets(None)) == {"cuda:0", "cuda:1", "cuda:2", "cuda:3", CPU}


def test_the_guides_flux_lies_on_two_16_gb_gpus_and_its_encoder_mostly_on_the_host():
    """FLUX.1-dev at its real size: 23.8 GB of transformer, 9.5 GB of T5, on meta."""
    import diffusers
    import transformers

    from ddinfer.models.meta_model import parameters_on_meta

    with parameters_on_meta():
        transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        encoder = transformers.T5EncoderModel(
            transformers.T5Config(
                d_model=4096, d_ff=10240, num_layers=24, num_heads=64,
                feed_forward_proj="gated-gelu",
            )
        )  # fmt: skip
    parts = {"text_encoder_2": encoder, "transformer": transformer}
    trees = tuple(tree_of_model(m, n, dtype=torch.bfloat16) for n, m in parts.items())
    assert [round(tree.num_bytes() / 1e9, 1) for tree in trees] == [9.5, 23.8]
    root = Node("", (), trees, pipeline=True)
    placement = plan(root, parse_max_memory("0=16GB,1=16GB,cpu=64GB"))
    where = where_everything_is(placement, root)
    assert {d for n, d in where.items() if n.startswith("transformer.")} == {"cuda:0", "cuda:1"}
    assert {d for n, d in where.items() if n.startswith("text_encoder_2.")} >= {"cpu"}
    assert "disk" not in where.values()
    assert placement.prefetch
    alone = plan_placement(transformer, "0=16GB,1=16GB,cpu=64GB", dtype="bf16")
    held = alone.bytes_on()
    assert held["cuda:0"] + held["cuda:1"] == trees[1].num_bytes()
    assert max(held.values()) < 12.3e9


def test_small_components_stay_whole_when_large_ones_leave(tmp_path):
    sizes = {"text_encoder": 1, "text_encoder_2": 500, "transformer": 1000, "vae": 2}
    root = Node(
        "",
        (),
        tuple(
            Node(n, (), tuple(Node(f"{n}.{i}", (Tensor(f"{n}.{i}.w", size, f"{n}.{i}.w"),))
                              for i in range(10)))
            for n, size in sizes.items()
        ),
        pipeline=True,
    )  # fmt: skip
    placement = plan(root, {"cuda:0": 13_000, CPU: 10**6}, headroom=0)
    assert placement.devices["vae"] == placement.devices["text_encoder"] == "cuda:0"
    where = where_everything_is(placement, root)
    assert {d for n, d in where.items() if n.startswith("transformer")} == {"cuda:0"}
    assert {d for n, d in where.items() if n.startswith("text_encoder_2")} == {"cuda:0", "cpu"}


def test_a_stage_is_compared_with_the_first_gpu_whichever_budget_is_named_first():
    names = [f"unet.{n}" for n in range(10)]
    unet = Node("unet", (), tuple(Node(n, (Tensor(f"{n}.w", 2, f"{n}.w"),)) for n in names))
    stages = {"denoise": ("unet",)}
    gpus = {"cuda:0": 16, "cuda:1": 16}
    root = Node("", (), (unet,), pipeline=True)
    for budgets in ({**gpus, "cpu": 1000}, {"cpu": 1000, **gpus}):
        placement = plan_stages(root, stages, budgets)["denoise"]
        assert placement.bytes_on() == {"cuda:0": 10, "cuda:1": 10}
