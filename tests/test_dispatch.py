"""A placed pipeline draws what an unplaced one draws, within its budgets, and can be put back.

"cpu:0" and "cpu:1" stand in for GPUs: tensors are copied to them as to any accelerator, though
they all say "cpu" afterwards. Host ("cpu") and disk tiers are then as they are with a GPU.
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import backend_registration

from ddinfer.errors import UsageError
from ddinfer.models.devices import PlacementError
from ddinfer.models.fetch import DiskSource, Fetcher, FetchGroup
from ddinfer.models.loading import load_model, load_pipeline
from ddinfer.models.offload import OffloadHandle, OneDevice, dispatch_model, dispatch_pipeline
from ddinfer.models.placement import Placement
from ddinfer.models.planner import plan, plan_placement
from ddinfer.models.stand_ins import StandInParameter, is_stand_in
from ddinfer.models.tree import tree_of, tree_of_model
from tests.mapped import mapped_file
from tests.tiny_pipelines import FROM_TEXT, KINDS, call_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def draw(pipe: Any, kind: str, seed: int = 1, device: str = "cpu") -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator(device).manual_seed(seed)
    made = pipe("a red cat", generator=generator, output_type="np", **call_arguments(kind))
    return torch.from_numpy(made.frames if hasattr(made, "frames") else made.images)


def in_memory(kind: str) -> Any:
    """A pipeline whose weights were never in a file."""
    torch.manual_seed(0)
    pipe = KINDS[kind]()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipe


#: Budgets as shares of all weights; "host" leaves nothing on disk, the others nearly everything.
TIERS = {
    "cpu and disk": {"cpu": 0.5},
    "device and host": {"cpu:0": 0.7, "cpu": 1.0},
    "device, host and disk": {"cpu:0": 0.6, "cpu": 0.2},
    "two devices, host and disk": {"cpu:0": 0.5, "cpu:1": 0.3, "cpu": 0.2},
}


@pytest.mark.parametrize("tiers", sorted(TIERS))
@pytest.mark.parametrize("kind", FROM_TEXT)
def test_a_placed_pipeline_draws_the_same(kind, tiers, tiny, monkeypatch):
    folder = tiny(kind)
    total = tree_of(folder).num_bytes()
    budgets = {device: int(share * total) for device, share in TIERS[tiers].items()}
    pipe = load_pipeline(folder, placement="balanced", max_memory=budgets)
    dispatched = pipe.ddinfer_dispatched
    assert dispatched.groups
    fetches = record_fetches(monkeypatch, dispatched.fetcher)
    expected = draw(load_pipeline(folder), kind)
    # Copies lie better aligned than views into a file, and kernels may round by alignment.
    exact = tiers == "cpu and disk"
    for _ in range(2):
        made = draw(pipe, kind)
        assert torch.equal(made, expected) if exact else True
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(draw(pipe, kind, seed=2), expected, rtol=0, atol=1e-3)
    ahead = sum(was_ahead for _, was_ahead in fetches)
    assert ahead > len(fetches) / 3


@pytest.mark.parametrize("kind", ["flux", "sdxl"])
def test_with_weights_in_memory_the_same_bits(kind, tiny):
    pipe = in_memory(kind)
    expected = draw(pipe, kind)
    placement = plan_placement(pipe, {"cpu:0": 500_000, "cpu": 100_000})
    assert {"cpu:0", "cpu", "disk"} == set(placement.devices.values())
    with undoing(dispatch_pipeline(pipe, placement)):
        assert torch.equal(draw(pipe, kind), expected)
        assert not torch.equal(draw(pipe, kind, seed=2), expected)
    assert torch.equal(draw(pipe, kind), expected)


@contextlib.contextmanager
def undoing(handle: OffloadHandle) -> Iterator[OffloadHandle]:
    yield handle
    handle.undo()


def record_fetches(monkeypatch: Any, fetcher: Fetcher) -> list[tuple[str, bool]]:
    """Fills with the name of each group that is fetched, and whether that was ahead of its use."""
    fetches: list[tuple[str, bool]] = []
    load, main = fetcher._load, threading.get_ident()

    def recorded(group: FetchGroup, after: Any = None) -> Any:
        fetches.append((group.name, threading.get_ident() != main))
        return load(group, after)

    monkeypatch.setattr(fetcher, "_load", recorded)
    return fetches


def snapshot(pipe: Any) -> dict[str, Any]:
    """Everything about a pipeline's modules that undoing must bring back."""
    out: dict[str, Any] = {"class": type(pipe), "map": pipe.hf_device_map}
    for part, model in pipe.components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        for path, module in model.named_modules():
            out[f"{part}/{path}/keys"] = sorted(vars(module))
            out[f"{part}/{path}/hooks"] = (
                len(module._forward_pre_hooks),
                len(module._forward_hooks),
            )
        for name, parameter in model.named_parameters(remove_duplicate=False):
            out[f"{part}.{name}"] = (id(parameter), type(parameter), parameter.device)
        for name, buffer in model.named_buffers():
            out[f"{part}.{name}"] = (type(buffer), buffer.device)
    return out


@pytest.mark.parametrize("budgets", [{"cpu:0": 500_000, "cpu": 100_000}, {"cpu": 400_000}])
def test_undoing_leaves_everything_as_it_was(budgets):
    pipe = in_memory("flux")
    draw(pipe, "flux")  # diffusers notes things on its modules as they first run
    before = snapshot(pipe)
    weights = {n: p.clone() for n, p in pipe.transformer.state_dict().items()}
    threads = threading.active_count()
    dispatched = dispatch_pipeline(pipe, plan_placement(pipe, budgets))
    assert snapshot(pipe) != before
    draw(pipe, "flux")
    dispatched.undo()
    assert snapshot(pipe) == before
    assert all(torch.equal(weights[n], p) for n, p in pipe.transformer.state_dict().items())
    assert threading.active_count() <= threads
    encoder = pipe.text_encoder_2
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_undoing_a_loaded_placement_brings_all_weights_to_the_host(tiny):
    pipe = load_pipeline(tiny("flux"), placement="balanced", max_memory={"cpu": 400_000})
    pipe.ddinfer_dispatched.undo()
    plain = load_pipeline(tiny("flux"))
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        there, here = plain.components[name].state_dict(), pipe.components[name].state_dict()
        assert there.keys() == here.keys()
        assert all(torch.equal(there[n], here[n]) for n in there)
    encoder = pipe.text_encoder_2
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


class Reader(torch.nn.Module):
    """Reads weights without calling their modules, as tied heads do; keeps running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.norm = torch.nn.BatchNorm1d(8)
        self.scale = torch.nn.Parameter(torch.randn(8))
        self.register_buffer("table", torch.randn(8), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale + self.table
        for layer in self.layers:
            x = x + layer(x)
        x = x + torch.nn.functional.linear(x, self.layers[0].weight, self.layers[1].bias)
        return self.norm(x) @ self.embed.weight.T


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_weights_read_outside_forward_are_right(tier):
    torch.manual_seed(0)
    model = Reader()
    ids = torch.tensor([1, 5, 7])
    model.train()
    twin = Reader()
    twin.load_state_dict(model.state_dict())
    twin.table.copy_(model.table)
    expected = [twin(ids) for _ in range(2)]
    with undoing(dispatch_model(model, Placement({"": tier}, main="cpu:0"))):
        assert isinstance(model.layers[0].weight, StandInParameter)
        assert model.layers[0].weight.shape == (8, 8)
        assert model.layers[0].weight.dtype == torch.float32
        assert not model.layers[0].weight.is_meta
        for there in expected:
            assert torch.equal(model(ids), there)
        assert torch.equal(model.embed.weight.sum(), twin.embed.weight.sum())
        assert torch.equal(model.state_dict()["layers.2.weight"], twin.layers[2].weight)
        # What forward changes in place is not lost.
        assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
        with pytest.raises(UsageError, match="undo the placement first"):
            model.scale.data = torch.zeros(8)
        with pytest.raises(UsageError, match="undo the placement first"), torch.no_grad():
            model.layers[0].weight.mul_(2)
    assert torch.equal(model(ids), twin(ids))
    assert torch.equal(model.norm.running_var, twin.norm.running_var)


def test_a_block_that_raises_leaves_its_stand_ins_in_place():
    model = Reader()
    with undoing(dispatch_model(model, Placement({"": "cpu"}, main="cpu:0"))) as dispatched:
        with pytest.raises(RuntimeError):
            model.layers[0](torch.zeros(3))  # wrong width
        assert all(isinstance(p, StandInParameter) for p in model.parameters())
        assert model.eval()(torch.tensor([1])).shape == (1, 10)
    assert dispatched.fetcher._guess is None


def test_an_interrupted_forward_leaves_its_stand_ins_in_place(tiny):
    pipe = load_pipeline(tiny("flux"), placement="balanced", max_memory={"cpu": 400_000})
    expected = draw(pipe, "flux")
    weight = "transformer_blocks.0.attn.to_q"

    def interrupt(*_: Any) -> None:
        assert not is_stand_in(pipe.transformer.get_parameter(f"{weight}.weight"))
        raise KeyboardInterrupt

    handle = pipe.transformer.get_submodule(weight).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, "flux")
    handle.remove()
    assert is_stand_in(pipe.transformer.get_parameter(f"{weight}.weight"))
    assert torch.equal(draw(pipe, "flux"), expected)
    assert is_stand_in(pipe.transformer.get_parameter(f"{weight}.weight"))


def test_the_devices_of_a_placed_model_are_told_truly(tiny):
    pipe = load_pipeline(
        tiny("flux"), placement=Placement({"": "cpu", "vae": "cpu:1"}, main="cpu:0")
    )
    assert pipe.transformer.device == torch.device("cpu:0")
    assert pipe._execution_device == torch.device("cpu:0")
    assert pipe.transformer.dtype == torch.float32
    assert pipe.hf_device_map == {"": "cpu", "vae": "cpu:1"}
    assert type(pipe).__name__ == "FluxPipeline"
    before = pipe.ddinfer_dispatched
    before.undo()
    assert pipe._execution_device == torch.device("cpu")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot register a stand-in backend",
)
def test_over_two_devices_no_operation_ever_mixes_them():
    """Without a GPU: fake tensors on a stand-in backend refuse what CUDA would refuse."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.two_devices"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    following = [case for case in cases if case["following"]]
    assert len(following) == 14
    assert [case for case in following if case["error"]] == []
    # The check does notice: when tensors do not follow, most of it breaks.
    assert sum(case["error"] is not None for case in cases if not case["following"]) >= 7


def test_operations_between_devices_follow_their_first_tensor():
    here, there = torch.ones(2, 2), torch.ones(2, 2, device="meta")
    with pytest.raises(RuntimeError):
        torch.cat([there, here], dim=1)
    with OneDevice():
        assert torch.cat([there, here], dim=1).device.type == "meta"
        assert (there * (1 + here[:1])).device.type == "meta"
        assert (here * torch.tensor(2.0)).device.type == "cpu"
        assert here.to("meta").device.type == "meta"


def test_blocks_are_fetched_one_after_the_other_and_no_more_than_two_are_held(tiny, monkeypatch):
    model = load_model(tiny("flux") / "transformer")
    held: list[int] = []
    alive: set[int] = set()
    lock = threading.Lock()
    load = Fetcher._load

    def counted(self: Fetcher, group: FetchGroup, after: Any = None) -> Any:
        tensors, event = load(self, group, after)
        storages = {t.untyped_storage()._cdata for t in tensors}

        class Token:
            def __del__(self) -> None:
                with lock:
                    alive.discard(id(self))

        token = Token()
        with lock:
            alive.add(id(token))
            held.append(len(alive))
        tensors[0]._token = token  # lives exactly as long as the fetched tensor
        assert storages
        return tensors, event

    monkeypatch.setattr(Fetcher, "_load", counted)
    devices = {"": "cpu"}
    with undoing(dispatch_model(model, Placement(devices, main="cpu:0"))) as dispatched:
        fetches = record_fetches(monkeypatch, dispatched.fetcher)
        arguments = flux_arguments()
        first = model(**arguments)[0]
        order = [name for name, _ in fetches]
        assert [n for n in order if "blocks" in n] == [
            "transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0",
            "single_transformer_blocks.1", "single_transformer_blocks.2",
        ]  # fmt: skip
        fetches.clear()
        assert torch.equal(model(**arguments)[0], first)
        assert [was_ahead for _, was_ahead in fetches].count(False) <= 1
        gc.collect()
        assert max(held) <= 2


def test_what_failed_ahead_of_time_fails_no_other_call(tiny, monkeypatch):
    pipe = load_pipeline(tiny("flux"), placement="balanced", max_memory={"cpu": 400_000})
    expected = draw(pipe, "flux")
    fetcher = pipe.ddinfer_dispatched.fetcher
    load, here = fetcher._load, threading.get_ident()
    failed = []

    def short(*args: Any) -> Any:
        if threading.get_ident() != here:
            failed.append(1)
            raise torch.OutOfMemoryError("ahead of time")
        return load(*args)

    monkeypatch.setattr(fetcher, "_load", short)
    assert torch.equal(draw(pipe, "flux"), expected)
    assert len(failed) > 5
    fetcher.forget()


def test_without_room_for_two_nothing_is_fetched_ahead(tiny, monkeypatch):
    model = load_model(tiny("flux") / "transformer")
    placement = Placement({"": "cpu"}, main="cpu:0", prefetch=False)
    with undoing(dispatch_model(model, placement)) as dispatched:
        fetches = record_fetches(monkeypatch, dispatched.fetcher)
        model(**flux_arguments())
        model(**flux_arguments())
        assert fetches
        assert not any(was_ahead for _, was_ahead in fetches)


def flux_arguments() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 16, 16, generator=generator),
        "encoder_hidden_states": torch.randn(1, 4, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(4, 3),
        "return_dict": False,
    }


def test_a_placement_that_leaves_something_out_is_refused_before_anything_moves(tiny):
    pipe = load_pipeline(tiny("sd"))
    before = snapshot(pipe)
    with pytest.raises(PlacementError, match=r"without a device|says nothing about"):
        dispatch_pipeline(pipe, Placement({"unet": "cpu", "vae": "cpu"}, main="cpu:0"))
    assert snapshot(pipe) == before
    with pytest.raises(PlacementError):
        load_pipeline(tiny("sd"), placement={"unet": "cpu", "vae": "disk"})
    with pytest.raises(UsageError, match="not both"):
        load_pipeline(tiny("sd"), placement="balanced", device="cpu")


def test_a_plan_saved_as_json_is_carried_out_alike(tiny):
    placement = plan_placement(tiny("sd3"), {"cpu:0": 500_000, "cpu": 200_000})
    again = Placement.from_json(placement.to_json())
    pipe = load_pipeline(tiny("sd3"), placement=again)
    names = {group.name for group in pipe.ddinfer_dispatched.groups}
    away = {n for n, d in placement.devices.items() if d in ("cpu", "disk")}
    assert names == away
    torch.testing.assert_close(
        draw(pipe, "sd3"), draw(load_pipeline(tiny("sd3")), "sd3"), rtol=0, atol=1e-5
    )


def test_a_strategy_without_budgets_takes_what_is_free(tiny):
    pipe = load_pipeline(tiny("sd"), placement="auto")
    if not torch.cuda.is_available():
        assert set(pipe.hf_device_map.values()) == {"cpu"}
        assert pipe.ddinfer_dispatched.groups == []
        assert torch.equal(draw(pipe, "sd"), draw(load_pipeline(tiny("sd")), "sd"))


def test_a_stage_loads_its_components_of_a_placement_that_names_all(tiny):
    placement = {
        "transformer": "disk",
        "vae": "cpu",
        "text_encoder": "cpu",
        "text_encoder_2": "cpu",
    }
    without = dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae"])
    pipe = load_pipeline(tiny("flux"), placement=placement, components=without)
    assert pipe.vae is None
    assert {u.name.split(".")[1] for u in pipe.ddinfer_dispatched.groups} >= {"transformer_blocks"}


def test_what_lies_on_disk_is_read_from_the_checkpoint_itself(tiny):
    pipe = load_pipeline(tiny("flux"), placement={"": "disk"})
    sources = [s for u in pipe.ddinfer_dispatched.groups for s in u.sources.values()]
    on_disk = [s for s in sources if isinstance(s, DiskSource)]
    assert on_disk
    assert all(tiny("flux") in s.stored.file.parents for s in on_disk)
    others = [s.tensor for s in sources if not isinstance(s, DiskSource)]
    mapped = [tensor for tensor in others if mapped_file(tensor) is not None]
    assert len(mapped) > 10  # transformers' models stay views into their files
    assert all(tiny("flux") in mapped_file(tensor).parents for tensor in mapped)
    assert len(others) - len(mapped) < 5  # position ids and the like


def test_converted_dtypes_hold_on_every_tier(tiny):
    plain = load_pipeline(tiny("wan"), dtype="bfloat16")
    pipe = load_pipeline(
        tiny("wan"), dtype="bfloat16",
        placement=Placement({"": "disk", "vae": "cpu", "transformer.blocks": "cpu:0"}),
    )  # fmt: skip
    kinds = [{n: p.dtype for n, p in one.transformer.named_parameters()} for one in (plain, pipe)]
    assert kinds[0] == kinds[1]
    assert torch.float32 in kinds[0].values()
    torch.testing.assert_close(draw(pipe, "wan"), draw(plain, "wan"), rtol=0, atol=2e-2)


BIG = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {root!r})
from ddinfer.models.loading import load_model
from ddinfer.models.meta_model import open_model
from ddinfer.models.offload import dispatch_model
from ddinfer.models.planner import plan
from ddinfer.models.tree import tree_of_model

def resident():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024

import diffusers
diffusers.FluxTransformer2DModel
opened = open_model(Path({folder!r}))
tree = tree_of_model(opened.model, dtypes=opened.dtypes)
weights = tree.num_bytes()
placement = plan(tree, {{"cpu": weights // 4}})
peak, stop = 0, False
base = resident()
def watch():
    global peak
    while not stop:
        peak = max(peak, resident() - base)
        time.sleep(0.02)
watcher = threading.Thread(target=watch); watcher.start()
dispatch_model(opened.model, placement, opened=opened)
arguments = dict(
    hidden_states=torch.randn(1, 16, 64), encoder_hidden_states=torch.randn(1, 8, 4096),
    pooled_projections=torch.randn(1, 768), timestep=torch.tensor([0.5]),
    img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3), return_dict=False,
)
with torch.no_grad():
    for _ in range(2):
        opened.model(**arguments)
stop = True; watcher.join()
print(weights, peak)
"""


@pytest.mark.nightly
def test_a_gigabyte_runs_under_a_quarter_of_it(tmp_path):
    import diffusers

    model = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=14,
        attention_head_dim=64, num_attention_heads=16, axes_dims_rope=(8, 28, 28))  # fmt: skip
    model.save_pretrained(tmp_path)
    code = BIG.format(root=str(Path(__file__).parents[1]), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    weights, peak = map(int, done.stdout.split())
    assert weights >= 1e9
    print(f"{weights / 1e6:.0f} MB of weights, peak {peak / 1e6:.0f} MB")
    assert peak <= weights / 4


@pytest.mark.cuda
@needs_gpu
@pytest.mark.parametrize("kind", FROM_TEXT)
def test_on_a_gpu_with_host_and_disk_the_picture_is_the_same(kind, tiny):
    total = tree_of(tiny(kind)).num_bytes()
    plain = load_pipeline(tiny(kind), device="cuda:0", dtype="float32")
    budgets = {0: int(0.6 * total), "cpu": int(0.2 * total)}
    pipe = load_pipeline(tiny(kind), dtype="float32", placement="balanced", max_memory=budgets)
    assert {"cuda:0", "cpu", "disk"} == set(pipe.hf_device_map.values())
    expected = draw(plain, kind)
    for _ in range(3):
        torch.testing.assert_close(draw(pipe, kind), expected, rtol=0, atol=1e-5)


@pytest.mark.cuda
@needs_gpu
def test_on_a_gpu_peak_memory_stays_within_the_budget(tmp_path):
    import diffusers

    model = diffusers.FluxTransformer2DModel(num_layers=2, num_single_layers=14,
        attention_head_dim=64, num_attention_heads=16, axes_dims_rope=(8, 28, 28))  # fmt: skip
    weights = sum(p.nbytes for p in model.parameters())
    placement = plan(tree_of_model(model), {"cuda:0": weights // 4, "cpu": 2 * weights})
    torch.cuda.reset_peak_memory_stats()
    with undoing(dispatch_model(model, placement)), torch.no_grad():
        for _ in range(3):
            model(
                hidden_states=torch.randn(1, 16, 64, device="cuda"),
                encoder_hidden_states=torch.randn(1, 8, 4096, device="cuda"),
                pooled_projections=torch.randn(1, 768, device="cuda"),
                timestep=torch.tensor([0.5], device="cuda"),
                img_ids=torch.zeros(16, 3, device="cuda"),
                txt_ids=torch.zeros(8, 3, device="cuda"),
            )
        torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() <= weights // 4


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_on_two_gpus_activations_follow_the_blocks(tiny):
    total = tree_of(tiny("flux")).num_bytes()
    budgets = {0: int(0.6 * total), 1: int(0.6 * total), "cpu": total}
    pipe = load_pipeline(tiny("flux"), dtype="float32", placement="balanced", max_memory=budgets)
    assert {"cuda:0", "cuda:1"} <= set(pipe.hf_device_map.values())
    plain = load_pipeline(tiny("flux"), device="cuda:0", dtype="float32")
    torch.testing.assert_close(draw(pipe, "flux"), draw(plain, "flux"), rtol=0, atol=1e-5)
