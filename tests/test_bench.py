"""The page of benchmarks says what the figures say; every script is a part of `launch/bench`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench import inputs, jobs, measure, report
from bench.__main__ import PARTS, part

ROOT = Path(__file__).parent.parent
#: What the parts share; anything else in bench/ is a part.
SHARED = {"__init__", "__main__", "measure", "report", "inputs"}


def test_the_page_says_what_the_figures_say():
    page = report.PAGE.read_text(encoding="utf-8")
    made = report.page_with_figures(page, {name: part(name) for name in PARTS})
    assert page == made, "run: launch/bench --page"


def test_a_figure_that_changes_changes_the_page(tmp_path, monkeypatch):
    told = {"a flat picture": {"ours": {"cpu_ms": 1.5, "kilobytes": 3}}}
    result = {
        "size": "default",
        "repetitions": None,
        "seconds": 3,
        "date": "2026-01-01",
        "other_cores": 0.0,
    }
    result |= {"machine": measure.Machine.here().to_dict(), "versions": measure.versions()}
    result["figures"] = told
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page = "<!-- bench: png -->\n<!-- end of png -->\n"

    def page_of(milliseconds: float) -> str:
        told["a flat picture"]["ours"]["cpu_ms"] = milliseconds
        (tmp_path / "png.json").write_text(json.dumps(result))
        return report.page_with_figures(page, {"png": part("png")})

    assert "1.5 ms" in page_of(1.5)
    assert "2.5 ms" in page_of(2.5)
    assert page_of(1.5) != page_of(2.5)
    with pytest.raises(ValueError, match="expected one for each of"):
        report.page_with_figures(page, {"png": part("png"), "continuous": part("continuous")})


def test_figures_of_a_busy_machine_are_marked():
    result = {
        "size": "full",
        "repetitions": 5,
        "seconds": 3,
        "date": "2026-01-01",
        "versions": measure.versions(),
    }
    result["machine"] = measure.Machine.here().to_dict()
    cores = result["machine"]["cores"]
    busy = report.conditions("png", result | {"other_cores": cores * 0.5})
    idle = report.conditions("png", result | {"other_cores": cores * 0.01})
    assert "absolute times are too long" in busy
    assert "absolute times are too long" not in idle
    assert "launch/bench --full --repetitions 5 --only png" in idle


def test_list_names_every_script():
    command = [sys.executable, "-m", "bench", "--list"]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    named = {line.split()[0] for line in told.splitlines()}
    scripts = {file.stem for file in (ROOT / "bench").glob("*.py")} - SHARED - {"jobs"}
    assert named == scripts | set(jobs.PARTS) == set(PARTS)


def test_a_command_is_accounted_for_with_all_its_processes():
    spin = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {spin!r}])"
    program = [sys.executable, "-c", f"import os, sys\nif os.fork(): os._exit(0)\n{code}"]
    # In a process of its own: the harness adopts and reaps whatever is left over.
    harness = (
        "import sys; from bench.measure import run; "
        "done = run(sys.argv[1:]); print(done.cpu_seconds)"
    )
    command = [sys.executable, "-c", harness, *program]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert float(told) > 0.3  # the grandchild's, though its parent had ended long before


def test_what_others_use_leaves_out_what_we_do():
    others = measure.Others()
    others.busy -= 50  # as if others had been busy for so long
    others.started -= 100
    assert others.cores() >= 0.49
    ours = measure.Others()
    ours.ours -= 1e9  # and as if we had used more than all
    assert ours.cores() == 0


def test_ways_are_measured_in_turn():
    order = []
    ways = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    taken = measure.in_turn(ways, 2)
    assert order == list("abcabc")
    assert measure.ratios(taken["a"], taken["b"]) == {
        "median": 0.65, "low": 0.5, "high": 0.8, "n": 2,
    }  # fmt: skip


def test_pictures_that_differ_are_told(tmp_path):
    for folder, value in (("a", 7), ("b", 9)):
        (tmp_path / folder).mkdir()
        pixels = np.full((4, 4, 3), 7, np.uint8)
        pixels[1, 2] = value
        Image.fromarray(pixels).save(tmp_path / folder / "00000000.png")
    told = jobs.compare(tmp_path / "b", tmp_path / "a")
    assert told == {"different_images": 1, "largest_difference": 2}
    same = jobs.compare(tmp_path / "a", tmp_path / "a")
    assert same == {"different_images": 0, "largest_difference": 0}
    figures = {"cells": {"x": {"ways": {"spawn": told, "ddinfer": same}}}}
    assert jobs.problems(figures) == [
        "x: 1 images of spawn differ from ddinfer's, by up to 2 of 255"
    ]


def test_the_prompts_are_all_of_them(tmp_path):
    prompts = inputs.parti_prompts()
    assert len(prompts) == 1632
    assert prompts[0] == "bond"
    assert any("G I G G L E" in prompt for prompt in prompts)
    file = inputs.prompt_file(tmp_path, 3, steps=[4, 5, 6])
    assert json.loads(file.read_text().splitlines()[2])["num_inference_steps"] == 6


def test_the_hook_notes_the_first_denoiser_call_and_then_steps_aside(tmp_path):
    code = (
        "import torch\nfrom diffusers import UNet2DConditionModel as U\n"
        "u = U(block_out_channels=(8,), down_block_types=('DownBlock2D',), norm_num_groups=4,\n"
        "      up_block_types=('UpBlock2D',), mid_block_type=None, cross_attention_dim=8)\n"
        "hooked = U.forward\n"
        "x = torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 2, 8)\n"
        "u(*x)\nprint(hooked is not U.forward, U.forward.__module__)\n"
    )
    environ = os.environ | {"PYTHONPATH": str(ROOT / "bench/hooks")}
    environ["BENCH_FIRST_STEP"] = str(tmp_path)
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout
    assert told.split() == ["True", "diffusers.models.unets.unet_2d_condition"]
    (note,) = tmp_path.iterdir()
    assert float(note.read_text()) > 0


def test_competitors_are_not_in_our_environment():
    assert importlib.util.find_spec("accelerate") is None


@pytest.mark.nightly
@pytest.mark.skipif(
    not Path(measure.COMPETITORS_PYTHON).exists(), reason="launch/bench makes .venv-bench"
)
def test_every_way_makes_the_same_pictures_as_ddinfer(tmp_path):
    # As many for each rank as fill batches: those that slice first would cut others from five.
    cell = jobs.Cell("small", "tiny", 4, (1, 1, 1), steps=2, batch_size=2)
    # In a process of its own: the harness adopts and reaps whatever is left over.
    code = (
        "import json; from bench import jobs; "
        f"print(json.dumps(jobs.measure_cell(jobs.{cell!r}, 1)))"
    )
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    figures = json.loads(told)
    assert set(figures["ways"]) == {"ddinfer", *jobs.COMPETITORS}
    for way in ("ddinfer", "spawn", "accelerate"):
        assert figures["ways"][way]["different_images"] == 0, way
    assert jobs.problems({"cells": {"small": figures}}) == []
    for told in figures["ways"].values():
        assert 0 < told["first_step"]["median"] < told["last_image"]["median"]
        assert told["last_image"]["median"] <= told["seconds"]["median"]
