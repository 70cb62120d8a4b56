"""`prepare_pipeline` against the uncut model, on real ranks."""

import os
import re
import subprocess
import sys
import textwrap
import time
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from ddinfer.errors import RankError, UsageError
from ddinfer.parallel.prepare import prepare_pipeline
from tests.ranks import run_ranks

ROOT = Path(__file__).parent.parent

# --- models, small enough to be made in the test ------------------------------------------------


def make_mlp():
    torch.manual_seed(0)
    pairs = [layer for _ in range(5) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(*pairs).eval()


def rows_of(batch, width=8, seed=0):
    return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))


class Outputs(nn.Module):
    """A tuple in a dict, an input passed through, a constant, and a batch that is dim 1."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x, table, *, factor=1.0, names=("a", "b")):
        first = x
        for layer in self.layers:
            x = torch.tanh(layer(x)) * factor + table.sum()
        return OrderedDict(y=(x, first), t=(x * self.scale).T, none=None, n=len(names))


class Undecided(nn.Module):
    """Control flow that reads an argument's contents."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
        self.head = nn.Linear(16, 4)

    def forward(self, x, flags):
        x = self.embed(x)
        chosen = flags.tolist()
        for k, block in enumerate(self.blocks):
            x = torch.relu(block(x)) if chosen[k % len(chosen)] else torch.tanh(block(x))
        return self.head(x)


class Hopeless(nn.Module):
    """Control flow that reads what a block made."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            if bool(x.sum() > 0):
                x = -x
        return x


class InPlace(nn.Module):
    """Writes into what a block made, which the next rank would do again."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x += 1
        return x


def make_model(kind):
    torch.manual_seed(0)
    if kind in ("classification", "lm"):
        from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

        config = GPT2Config(
            n_layer=4, n_embd=32, n_head=2, vocab_size=64, n_positions=32, num_labels=3,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        made = (GPT2ForSequenceClassification if kind == "classification" else GPT2LMHeadModel)(
            config
        )
    elif kind == "t5":
        from transformers import T5Config, T5EncoderModel

        made = T5EncoderModel(
            T5Config(d_model=32, d_ff=64, num_layers=4, num_heads=2, d_kv=16, vocab_size=64)
        )
    elif kind == "flux":
        from diffusers import FluxTransformer2DModel

        made = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2,
            attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
            pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
    elif kind == "unet":
        from diffusers import UNet2DConditionModel

        made = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            cross_attention_dim=16, attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )  # fmt: skip
    return made.eval()


def example_for(kind, batch):
    """Keyword arguments of one call."""
    generator = torch.Generator().manual_seed(batch)
    if kind == "flux":
        return {
            "hidden_states": torch.randn(batch, 12, 16, generator=generator),
            "encoder_hidden_states": torch.randn(batch, 6, 32, generator=generator),
            "pooled_projections": torch.randn(batch, 32, generator=generator),
            "timestep": torch.rand(batch, generator=generator),
            "img_ids": torch.zeros(12, 3),
            "txt_ids": torch.zeros(6, 3),
        }
    if kind == "unet":
        return {
            "sample": torch.randn(batch, 4, 8, 8, generator=generator),
            "timestep": torch.rand(batch, generator=generator),
            "encoder_hidden_states": torch.randn(batch, 6, 16, generator=generator),
        }
    ids = torch.randint(3, 64, (batch, 8), generator=generator)
    ids[0, 5:] = 0  # padding, which the classifier must find again on the last rank
    return {"input_ids": ids}


def first_tensor(output):
    return output if isinstance(output, torch.Tensor) else next(iter(output.values()))


# --- the grid -----------------------------------------------------------------------------------


def grid_on_ranks(group):
    wrong = []
    for batch in range(1, 10):
        for num_chunks in range(1, 6):
            x = rows_of(batch)
            pipe = prepare_pipeline(make_mlp(), (x,), num_chunks=num_chunks, gather_output=True)
            expected = in_microbatches(make_mlp(), x, -(-batch // num_chunks))
            if not torch.equal(pipe(x), expected):
                wrong.append((batch, num_chunks))
    return wrong


def in_microbatches(model, x, rows):
    """What the uncut model makes of equal microbatches, the last one filled with its last row."""
    made = []
    with torch.no_grad():
        for begin in range(0, len(x), rows):
            part = x[begin : begin + rows]
            fill = part[-1:].expand(rows - len(part), -1)
            made.append(model(torch.cat([part, fill]))[: len(part)])
        whole = model(x)
    assert torch.allclose(torch.cat(made), whole, atol=1e-6)
    return torch.cat(made)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_batch_in_every_number_of_chunks_is_that_of_the_uncut_model(num_ranks):
    assert run_ranks(grid_on_ranks, num_ranks) == [[]] * num_ranks


def perturbed_on_ranks(group):
    x = rows_of(5)
    pipe = prepare_pipeline(make_mlp(), (x,), num_chunks=2, gather_output=True)
    other = x.clone()
    other[4, 0] += 1e-3
    return torch.equal(pipe(x), pipe(other))


def test_the_comparison_notices_one_changed_number():
    assert run_ranks(perturbed_on_ranks, 2) == [False, False]


# --- models of the libraries --------------------------------------------------------------------


def points_on_ranks(group, kind, example_batch, num_chunks, batches):
    model, uncut = make_model(kind), make_model(kind)
    kwargs = example_for(kind, example_batch)
    pipe = prepare_pipeline(model, (), kwargs, num_chunks=num_chunks)
    differences, exact = [], []
    for batch in batches:
        kwargs = example_for(kind, batch)
        made = pipe(**kwargs)
        if group.group_rank < group.group_size - 1:
            assert made is None
            continue
        with torch.no_grad():
            expected = uncut(**kwargs)
        assert type(made) is type(expected)
        assert first_tensor(made).shape == first_tensor(expected).shape
        differences.append((first_tensor(made) - first_tensor(expected)).abs().max().item())
        rows = in_microbatches_of(uncut, kwargs, batch, -(-example_batch // num_chunks))
        exact.append(torch.equal(first_tensor(made), rows))
    assert all(exact), exact
    sizes = {name: p.nbytes for name, p in uncut.named_parameters()}
    return differences, sum(sizes[name] for name in held_names(model)) / sum(sizes.values())


def in_microbatches_of(uncut, kwargs, batch, rows):
    """The uncut model's rows from equal microbatches, the last one filled with its last row."""
    made = []
    for begin in range(0, batch, rows):
        index = torch.arange(begin, begin + rows).clamp(max=batch - 1)
        part = {k: v if k in ("img_ids", "txt_ids") else v[index] for k, v in kwargs.items()}
        with torch.no_grad():
            made.append(first_tensor(uncut(**part)))
    return torch.cat(made)[:batch]


def held_names(model):
    """Names of the parameters that a rank holds; one of another rank is on meta, or one element."""
    kept = dict(model.named_parameters())
    return {
        n for n, p in kept.items() if not p.is_meta and p.untyped_storage().nbytes() >= p.nbytes
    }


KINDS = ["classification", "lm", "t5", "flux", "unet"]


@pytest.mark.parametrize("kind", KINDS)
def test_library_models_are_cut_exactly(kind):
    # The example's five rows in three chunks; as many, fewer, one, more and just two chunks' rows.
    made = run_ranks(points_on_ranks, 2, kind, 5, 3, [5, 3, 1, 8, 4, 2])
    differences = made[-1][0]
    assert len(differences) == 6
    assert max(differences) <= 1e-5
    assert all(held < 0.75 for _, held in made), "each rank keeps its own stage only"


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4, 5])
def test_library_models_over_the_whole_grid(kind, num_ranks, num_chunks):
    made = run_ranks(points_on_ranks, num_ranks, kind, 6, num_chunks, range(1, 10))
    assert max(made[-1][0]) <= 1e-5


def page_on_ranks(world, code):
    torch.manual_seed(0)
    made = {}
    exec(code, made)
    if made["output"] is None:
        return None
    torch.manual_seed(0)
    uncut = type(made["model"])(made["config"]).eval()
    with torch.no_grad():
        expected = uncut(made["example"]).logits
    return torch.allclose(made["output"].logits, expected, atol=1e-5)


def test_the_example_on_the_page_is_right():
    page = (ROOT / "docs/pipeline-parallel.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert run_ranks(page_on_ranks, 2, code, join=False) == [None, True]


# --- where models can be cut --------------------------------------------------------------------


class Unusual(nn.Module):
    """A head that uses a table's weight, a layer that runs twice, the first weight's device."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, 8)
        self.twice = nn.Linear(8, 8)
        self.body = nn.ModuleDict(
            {"front": nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)),
             "tail": nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2))}
        )  # fmt: skip

    def forward(self, ids):
        device = next(self.parameters()).device
        x = self.twice(self.table(ids)) + torch.ones(8, device=device)
        for layer in (*self.body["front"], *self.body["tail"]):
            x = layer(x)
        return self.twice(x) @ self.table.weight.T


def unusual_on_ranks(group, points):
    ids = torch.arange(12).reshape(4, 3)
    model = Unusual().eval()
    pipe = prepare_pipeline(model, (ids,), num_chunks=2, split_points=points, gather_output=True)
    expected = torch.cat([Unusual().eval()(ids[k : k + 2]) for k in (0, 2)])
    return torch.equal(pipe(ids), expected), pipe.cuts, sorted(held_names(model))


def test_modules_that_run_twice_or_lend_their_weights_are_on_every_rank():
    (equal, cuts, first), (equal_there, _, second) = run_ranks(unusual_on_ranks, 2, "auto")
    assert equal
    assert equal_there
    assert cuts == ("body.tail.0",)
    shared = {"table.weight", "twice.weight", "twice.bias"}
    assert set(first) & set(second) == shared
    assert set(first) | set(second) == {name for name, _ in Unusual().named_parameters()}


def test_stages_begin_at_any_module_that_runs_once():
    for points, cuts in (
        (["body.tail"], ("body.tail.0",)),  # a list: its first
        (["body.front.1.0"], ("body.front.1.0",)),  # inside a block
        (["body.front.0.1"], ("body.front.0.1",)),  # without weights
    ):
        made = run_ranks(unusual_on_ranks, 2, points)
        assert [(equal, found) for equal, found, _ in made] == [(True, cuts)] * 2


class Repeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        for layer in (*self.layers, *self.layers):
            x = layer(x)
        return x


class Slow(nn.Linear):
    """As many bytes as a linear layer, two hundred times its work."""

    def forward(self, x):
        for _ in range(200):
            x = torch.tanh(super().forward(x))
        return x


def balanced_on_ranks(group, balance):
    torch.manual_seed(0)
    model = nn.Sequential(Slow(64, 64), *(nn.Linear(64, 64) for _ in range(5))).eval()
    x = rows_of(8, 64)
    expected = model(x)
    pipe = prepare_pipeline(model, (x,), num_chunks=1, balance=balance, gather_output=True)
    return pipe.cuts, torch.equal(pipe(x), expected)


def test_stages_are_balanced_by_bytes_or_by_measured_time_with_the_same_output():
    assert run_ranks(balanced_on_ranks, 2, "bytes") == [(("3",), True)] * 2
    assert run_ranks(balanced_on_ranks, 2, "time") == [(("1",), True)] * 2


# --- outputs, arguments, groups -----------------------------------------------------------------


def outputs_on_ranks(group, gather_output):
    model, uncut = Outputs().eval(), Outputs().eval()
    uncut.load_state_dict(model.state_dict()) if group.group_size == 1 else None
    torch.manual_seed(0)
    for a, b in zip(model.parameters(), uncut.parameters(), strict=True):
        a.data = b.data = torch.randn(a.shape)
    table = rows_of(3, seed=1)
    pipe = prepare_pipeline(
        model, (rows_of(4), table), {"factor": 0.5}, num_chunks=2, gather_output=gather_output
    )
    made = pipe(rows_of(7), table=table)  # by name or place, and the fixed factor left out
    if made is None:
        return None
    with torch.no_grad():
        expected = uncut(rows_of(7), table, factor=0.5)
    assert type(made) is OrderedDict
    assert list(made) == list(expected)
    assert isinstance(made["y"], tuple)
    assert torch.allclose(made["y"][0], expected["y"][0], atol=1e-6)
    assert torch.equal(made["y"][1], expected["y"][1])
    assert torch.allclose(made["t"], expected["t"], atol=1e-6)
    return made["none"], made["n"]


def test_nested_outputs_come_back_as_they_were():
    assert run_ranks(outputs_on_ranks, 3, False) == [None, None, (None, 2)]
    assert run_ranks(outputs_on_ranks, 2, True) == [(None, 2)] * 2
    assert run_ranks(outputs_on_ranks, 1, False) == [(None, 2)]


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

    def forward(self, x, table):
        return self.layers(x + table)


def positions_on_ranks(group):
    torch.manual_seed(0)
    model = Positions().eval()
    torch.manual_seed(0)
    uncut = Positions().eval()
    x, table = rows_of(36).reshape(6, 6, 8), rows_of(6, seed=1)
    pipe = prepare_pipeline(model, (x, table), num_chunks=3, gather_output=True)
    made = [torch.allclose(pipe(x[:n], table), uncut(x[:n], table), atol=1e-6) for n in (6, 5, 1)]
    return made


def test_a_table_with_as_many_rows_as_the_batch_is_not_cut():
    assert run_ranks(positions_on_ranks, 2) == [[True] * 3] * 2


def subgroup_on_ranks(group):
    members = dist.new_group([1, 3])
    x = rows_of(5)
    if group.group_rank not in (1, 3):
        with pytest.raises(UsageError, match="not in the group"):
            prepare_pipeline(make_mlp(), (x,), group=members)
        return None
    pipe = prepare_pipeline(make_mlp(), (x,), group=members, split_points=["6"])
    assert pipe.cuts == ("6",)
    made = pipe(x)
    return None if made is None else torch.allclose(made, make_mlp()(x), atol=1e-6)


def test_a_subgroup_of_a_larger_job_has_its_own_pipeline():
    assert run_ranks(subgroup_on_ranks, 4) == [None, None, None, True]


def blocks_on_ranks(group):
    torch.manual_seed(0)
    model = Undecided().eval()
    torch.manual_seed(0)
    uncut = Undecided().eval()
    flags = torch.tensor([1, 0, 1])
    pipe = prepare_pipeline(model, (rows_of(5), flags), num_chunks=2, batched=["x"])
    close = []
    for batch, chosen in ((5, flags), (2, flags), (4, 1 - flags), (7, flags)):
        made = pipe(rows_of(batch), chosen)
        if made is not None:
            close.append(torch.allclose(made, uncut(rows_of(batch), chosen), atol=1e-6))
    return close


def test_control_flow_that_reads_an_argument_is_followed():
    assert run_ranks(blocks_on_ranks, 3) == [[], [], [True] * 4]


# --- weights ------------------------------------------------------------------------------------


def checkpoint_on_ranks(group, path):
    from ddinfer.models.meta_model import parameters_on_meta

    with parameters_on_meta():
        model = make_mlp()
    x = rows_of(4)
    pipe = prepare_pipeline(model, (x,), checkpoint=path, gather_output=True)
    return torch.allclose(pipe(x), make_mlp()(x), atol=1e-6), sorted(held_names(model))


def test_each_rank_reads_its_own_weights_from_a_checkpoint(tmp_path):
    save_file(make_mlp().state_dict(), tmp_path / "model.safetensors")
    made = run_ranks(checkpoint_on_ranks, 2, str(tmp_path / "model.safetensors"))
    assert [equal for equal, _ in made] == [True, True]
    (_, first), (_, second) = made
    assert first
    assert second
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(make_mlp().state_dict())


def tied_checkpoint_on_ranks(group, folder, kind):
    from ddinfer.models.meta_model import open_model

    model = open_model(Path(folder)).model
    pipe = prepare_pipeline(model, (), example_for(kind, 4), checkpoint=folder)
    made = pipe(**example_for(kind, 4))
    if made is None:
        return None
    expected = type(model).from_pretrained(folder, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        wanted = expected(**example_for(kind, 4))
    return torch.allclose(first_tensor(made), first_tensor(wanted), atol=1e-5)


def test_tied_weights_are_read_wherever_a_stage_needs_them(tmp_path):
    make_model("lm").save_pretrained(tmp_path)
    assert run_ranks(tied_checkpoint_on_ranks, 2, str(tmp_path), "lm") == [None, True]


# --- refusals -----------------------------------------------------------------------------------


def refusals(group):
    x = rows_of(4)
    told = []

    def refused(match, model, args=(x,), **kwargs):
        with pytest.raises((UsageError, RankError), match=match):
            prepare_pipeline(model, args, **kwargs)
        told.append(match)

    refused("training mode", make_mlp().train())
    refused("expected a torch.nn.Module", torch.relu)
    refused("num_chunks must be at least 1, found 0", make_mlp(), num_chunks=0)
    refused("no tensor with rows", make_mlp(), (3.0,))
    refused('expected "bytes" or "time"', make_mlp(), balance="speed")
    refused("expected a tuple", make_mlp(), x)
    refused("do not fit forward", make_mlp(), (x, x))
    refused("no module named '11'", make_mlp(), split_points=["11"])
    refused("2 split_points make 3 stages for 2 ranks", make_mlp(), split_points=["2", "4"])
    refused("first stage would be empty", make_mlp(), split_points=["0"])
    refused("too few for 2 ranks", nn.Sequential(nn.Linear(8, 8)).eval())
    refused(r"0 modules that run once.*layers\.0 runs 2 times", Repeated().eval())
    ids = torch.ones(4, 3, dtype=torch.long)
    refused("expected a module that runs exactly", Unusual().eval(), (ids,), split_points=["twice"])
    refused("cannot be run on fake tensors", Hopeless().eval())
    refused("cannot be split", Hopeless().eval(), batched=["x"])
    refused("InPlace writes into the output of block", InPlace().eval())
    refused("say with checkpoint=", make_mlp().to("meta"))
    refused("no checkpoint", make_mlp(), checkpoint="nowhere")
    refused("has no batch dim", Mean().eval())
    pipe = prepare_pipeline(make_mlp(), (x,))
    for bad, match in ((rows_of(4, 9), "every dim but the batch"), (x[:0], "batch is empty")):
        with pytest.raises((UsageError, RankError), match=match):
            pipe(bad)
    pipe(x)  # a refused call leaves the pipeline usable
    return len(told)


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

    def forward(self, x):
        return self.layers(x).mean()


def test_what_cannot_be_right_is_refused_on_every_rank_before_anything_runs():
    assert run_ranks(refusals, 2) == [19, 19]


# --- failures -----------------------------------------------------------------------------------


def failing_stage_on_ranks(group):
    pipe = prepare_pipeline(make_mlp(), (rows_of(6),), num_chunks=3)
    if group.group_rank == 1:
        hook = pipe.stage.get_submodule(pipe.cuts[0]).register_forward_pre_hook(raise_boom)
    started = time.monotonic()
    try:
        pipe(rows_of(6))
        told = None
    except (ValueError, RankError) as error:
        told = (type(error).__name__, getattr(error, "rank", None), str(error).splitlines()[0])
    seconds = time.monotonic() - started
    if group.group_rank == 1:
        hook.remove()
    again = pipe(rows_of(6))
    return told, seconds, None if again is None else len(again)


def raise_boom(*args):
    raise ValueError("boom")


def test_a_failing_stage_fails_every_rank_by_name_and_the_next_call_works():
    made = run_ranks(failing_stage_on_ranks, 3)
    named = ("RankError", 1, "rank 1 failed while running a pipeline: ValueError: boom")
    assert [told for told, _, _ in made] == [named, ("ValueError", None, "boom"), named]
    assert max(seconds for _, seconds, _ in made) < 20
    assert [again for _, _, again in made] == [None, None, 6]


def test_a_killed_rank_is_named_long_before_any_timeout(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(k), str(tmp_path / "store")],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for k in range(3)
    ]  # fmt: skip
    said = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, -9]
    for text in said[:2]:
        assert "rank 2 failed while running a pipeline" in text
    assert time.monotonic() - started < 200  # the group's timeout is ten minutes


KILLED = """
    import datetime, os, signal, sys
    import torch
    import torch.distributed as dist
    from tests.test_prepare_pipeline import make_mlp, rows_of
    from ddinfer.errors import RankError
    from ddinfer.parallel.prepare import prepare_pipeline

    rank, path = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group(
        "gloo", store=dist.FileStore(path, 3), rank=rank, world_size=3,
        timeout=datetime.timedelta(seconds=600),
    )
    pipe = prepare_pipeline(make_mlp(), (rows_of(6),), num_chunks=3)
    pipe(rows_of(6))
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        pipe(rows_of(6))
    except RankError as error:
        print(error, flush=True)
        os._exit(0)
"""


# --- NCCL ---------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_over_nccl(tmp_path):
    import torch.multiprocessing as mp

    mp.spawn(two_gpus, (str(tmp_path / "store"),), nprocs=2)


def two_gpus(rank, path):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", store=dist.FileStore(path, 2), rank=rank, world_size=2)
    x = rows_of(5)
    pipe = prepare_pipeline(make_mlp(), (x,), num_chunks=3, gather_output=True)
    assert torch.allclose(pipe(x).cpu(), make_mlp()(x), atol=1e-5)
    dist.destroy_process_group()
