"""Every program under docs/examples and every row of the migration table is run."""

import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import ddinfer
from ddinfer.embed.splitting import split_between_processes
from ddinfer.models.loading import load_pipeline
from tests.moody_pipeline import colour, moody_pipeline
from tests.ranks import HANG_SECONDS, run_ranks
from tests.tiny_pipelines import tiny_pipeline

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs/examples"
GUIDE = (ROOT / "docs/migrating-from-accelerate.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny_sd(tmp_path_factory):
    return str(tiny_pipeline("sd", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_pipeline(tmp_path_factory.mktemp("model")))


def torchrun(folder, example, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(EXAMPLES / example), *options]
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "CUDA_VISIBLE_DEVICES": "",
    }
    ended = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_every_example_is_run_here():
    source = Path(__file__).read_text(encoding="utf-8")
    for example in EXAMPLES.iterdir():
        assert f'"{example.name}"' in source


def test_two_prompts_on_two_ranks(tiny_sd, tmp_path):
    torchrun(tmp_path, "two_prompts.py", "--model", tiny_sd, "--steps", "2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["result_0.png", "result_1.png"]
    assert [Image.open(p).size for p in tmp_path.iterdir()] == [(32, 32)] * 2


def test_training_with_validation_images_and_the_same_losses_without(tiny_sd, tmp_path):
    options = ["--model", tiny_sd, "--train_steps", "4", "--inference_steps", "2", "--size", "32"]
    losses = []
    for every in ("2", "0"):
        told = torchrun(tmp_path, "validation_images.py", *options, "--validate_every", every)
        losses.append([line for line in told.splitlines() if line.startswith("step ")])
        assert len(losses[-1]) == 4
    assert losses[0] == losses[1]
    files = sorted((tmp_path / "validation").iterdir())
    assert [p.stem for p in files] == [f"step-{s}-prompt-{k}" for s in (2, 4) for k in range(3)]
    before, after = (np.asarray(Image.open(files[k])) for k in (0, 3))
    assert not np.array_equal(before, after)  # the model has learnt in between


def test_the_notebook_s_cells_run_in_one_process(tiny_sd, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook.py", tiny_sd])
    shown = io.StringIO()
    with redirect_stdout(shown):
        left = runpy.run_path(str(EXAMPLES / "notebook.py"))
    assert [r.seed for r in left["results"]] == [0, 7, 8]
    assert len(shown.getvalue().splitlines()) == 6


def test_the_guide_shows_the_example_as_it_is():
    block = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)[1]
    assert block in (EXAMPLES / "two_prompts.py").read_text(encoding="utf-8")


# The migration table


def rows():
    """Accelerate's code → ddinfer's code, for all rows of both tables."""
    found = re.findall(r"^\| (.+?) \| `(.+)` \|$", GUIDE, flags=re.MULTILINE)
    assert len(found) == len(dict(found)) == 28
    return dict(found)


PROMPTS = ["a", "b", "c"]

#: Accelerate's code, without `…` → what ddinfer's gives on (rank 0, rank 1).
EXPECTED = {
    "state = PartialState()": [("rank 0 of 2"), ("rank 1 of 2")],
    "state.device": ["cpu", "cpu"],
    "state.process_index": [0, 1],
    "state.local_process_index": [0, 1],
    "state.num_processes": [2, 2],
    "state.is_main_process": [True, False],
    "state.is_local_main_process": [True, False],
    "state.is_last_process": [False, True],
    "state.wait_for_everyone()": [None, None],
    "state.split_between_processes(prompts)": [["a", "b"], ["c"]],
    "state.split_between_processes(prompts, apply_padding=True)": [["a", "b"], ["c", "c"]],
    "gather_object(mine)": [PROMPTS] * 2,
    "state.gather(tensor)": [[0.0, 1.0]] * 2,
    "state.pad_across_processes(tensor)": [[0, 1, 1]] * 2,
    "gather_object(padded)[:len(prompts)]": [PROMPTS] * 2,
    "state.gather_for_metrics(padded)": [PROMPTS] * 2,
    "broadcast_object_list(box)": [["of rank 0"]] * 2,
    "state.main_process_first()": [0, 1],
    "state.on_main_process(work)()": ["worked", None],
    'state.print("made")': ["made\n", ""],
    "set_seed(7) before the loop": [[colour(7), colour(8), colour(9)]] * 2,
    "the loop with its split and gather_object": [[colour(0), colour(1), colour(2)], []],
    "state.unwrap_model(ddp) before sampling": [3, 3],
    "state.destroy_process_group()": [False, False],
}


def plain(text):
    return text.replace("`", "")


def run_row(world, code, moody, tiny_sd):
    """A row in a program that has what the page says, and what came of it."""
    rank = world.rank
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
    store = dist.PrefixStore(world.run_id, store)  # the pool's store outlives this group
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world.world_size)
    names = {
        "ddinfer": ddinfer,
        "dist": dist,
        "world": ddinfer.World.detect("cpu"),
        "prompts": PROMPTS,
        "mine": ddinfer.split(PROMPTS),
        "padded": ddinfer.split(PROMPTS, pad=True),
        "tensor": torch.tensor(float(rank)),
        "uneven": torch.full((1 + rank,), rank),
        "box": [f"of rank {rank}"],
        "work": lambda: "worked",
    }
    if "pipe_with_ddp" in code:
        pipe = load_pipeline(tiny_sd, device="cpu")
        pipe.unet = torch.nn.parallel.DistributedDataParallel(pipe.unet)
        names["pipe_with_ddp"] = pipe
    elif "pipe" in code:
        names["pipe"] = load_pipeline(moody, device="cpu", trust_remote_code=True)
    shown = io.StringIO()
    with redirect_stdout(shown):
        if code.startswith("world = "):
            exec(code, names)
            return f"rank {names['world'].rank} of {names['world'].world_size}"
        value = eval(code, names)
    if "print(" in code:
        return shown.getvalue()
    if "broadcast" in code:
        return names["box"]
    if "destroy" in code:
        return dist.is_initialized()
    if "first_rank_first" in code:
        with value:
            counter = dist.distributed_c10d._get_default_store()
            return counter.add("been", 1) - 1
    if isinstance(value, split_between_processes_type):
        with value as part:
            return part
    if "pipe_with_ddp" in code:
        return len(value)
    if "pipe" in code:
        return [result.image.getpixel((0, 0)) for result in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


split_between_processes_type = type(split_between_processes([]))


@pytest.mark.parametrize("row", EXPECTED, ids=lambda row: row[:40])
def test_the_row_does_what_the_page_says(row, moody, tiny_sd):
    code = {plain(accelerate): ours for accelerate, ours in rows().items()}[row]
    assert run_ranks(run_row, 2, code, moody, tiny_sd, join=False) == EXPECTED[row]


def test_no_row_is_left_out():
    outside = [row for row in map(plain, rows()) if row not in EXPECTED]
    assert outside == [
        "accelerate launch --num_processes 2 script.py",  # torchrun(), above
        "notebook_launcher(work, args, num_processes=2)",
        "infer_auto_device_map(model, max_memory)",
        'from_pretrained(path, device_map="balanced")',
    ]
    assert rows()["`accelerate launch --num_processes 2 script.py`"] == (
        "torchrun --nproc_per_node=2 script.py"
    )


def work(world, word):
    return world.rank, word


def test_the_rows_outside_of_a_group(tiny_sd, monkeypatch):
    ours = {plain(accelerate): code for accelerate, code in rows().items()}
    names = {"ddinfer": ddinfer, "work": work, "args": ["x"], "path": tiny_sd}
    code = ours["notebook_launcher(work, args, num_processes=2)"]
    assert eval(code, names) == [(0, "x"), (1, "x")]
    names |= {"model": load_pipeline(tiny_sd).unet, "max_memory": {"cpu": "1GB"}}
    placement = eval(ours["infer_auto_device_map(model, max_memory)"], names)
    assert set(placement.devices.values()) == {"cpu"}
    pipe = eval(ours['from_pretrained(path, device_map="balanced")'], names)
    assert pipe("a cat", num_inference_steps=1, height=32, width=32).images[0].size == (32, 32)
