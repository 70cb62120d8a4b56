"""`ddinfer plan`, and the page about large models: its commands and figures are held against it."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from ddinfer.cli import dispatch
from ddinfer.models.loading import load_pipeline
from ddinfer.models.placement import Placement
from tests.test_cli import MAIN, ROOT, images, run
from tests.tiny_pipelines import IN_STAGES

PAGE = (ROOT / "docs/large-models.md").read_text(encoding="utf-8")
FLUX_DEV = str(ROOT / "tests/data/flux1_dev")


def plan(capsys, *words):
    """Exit status, and what was printed."""
    code = dispatch(["plan", *map(str, words)])
    return code, capsys.readouterr().out


def plan_json(capsys, *words):
    code, out = plan(capsys, *words, "--json")
    return code, json.loads(out)


def bytes_of(pipe):
    """Component → bytes of its tensors in memory, those with several names counted once."""
    models = {n: m for n, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    return {
        name: sum({id(t): t.nbytes for t in (*m.parameters(), *m.buffers())}.values())
        for name, m in models.items()
    }


@pytest.mark.parametrize("kind", IN_STAGES)
def test_every_component_is_counted_and_has_its_stage(kind, tiny, capsys):
    code, found = plan_json(capsys, tiny(kind), "--max_memory", "cpu=1GB")
    assert code == 0
    stages = {part["name"]: part["stage"] for part in found["components"]}
    expected = {"vae": "decode", "unet": "denoise", "transformer": "denoise"}
    assert all(stages[name] == expected.get(name, "encode") for name in stages)
    assert {"encode", "denoise", "decode"} == set(stages.values())
    for dtype in ("float32", "bfloat16"):
        counted = {part["name"]: part["bytes"][dtype] for part in found["components"]}
        assert counted == bytes_of(load_pipeline(tiny(kind), dtype=dtype))
    assert all(part["bytes"]["loaded"] == part["bytes"]["float32"] for part in found["components"])
    total = sum(part["bytes"]["loaded"] for part in found["components"])
    assert sum(found["balanced"]["bytes"].values()) == total
    held = [sum(s["bytes"].values()) for s in found["staged"]["stages"].values()]
    assert sum(held) == total


def test_what_fits_and_what_does_not_is_said_with_the_sums(tiny, capsys):
    whole = plan_json(capsys, tiny("flux"), "--max_memory", "cpu=1GB")[1]
    total = sum(whole["balanced"]["bytes"].values())
    largest = max(sum(s["bytes"].values()) for s in whole["staged"]["stages"].values())
    between = (total + largest) * 10 // 9 // 2
    code, found = plan_json(capsys, tiny("flux"), "--max_memory", f"cpu={between},disk=0")
    assert code == 0
    assert [found[k]["fits"] for k in ("whole", "auto", "balanced", "staged")] == [
        False, False, False, True,
    ]  # fmt: skip
    assert "does not fit" in found["balanced"]["why"]
    code, text = plan(capsys, tiny("flux"), "--max_memory", "cpu=9kB,disk=0")
    assert code == 2
    assert text.count("does not fit") >= 4
    assert "the encode stage (text_encoder" in text


def test_a_pipeline_without_stages_is_planned_all_the_same(tiny, capsys, tmp_path):
    for part in Path(tiny("sd")).iterdir():
        if part.is_dir():
            name = {"vae": "vqvae", "text_encoder": "bert"}.get(part.name, part.name)
            (tmp_path / name).symlink_to(part)
    index = json.loads((Path(tiny("sd")) / "model_index.json").read_text())
    index |= {"vqvae": index.pop("vae"), "bert": index.pop("text_encoder")}
    index["_class_name"] = "LDMTextToImagePipeline"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    code, found = plan_json(capsys, tmp_path, "--max_memory", "cpu=1GB")
    assert code == 0
    assert found["balanced"]["fits"]
    assert "cannot run in stages" in found["staged"]["why"]


def test_a_placement_is_written_as_the_job_takes_it(tiny, capsys, tmp_path):
    file = tmp_path / "p.json"
    total = sum(bytes_of(load_pipeline(tiny("sd"))).values())
    budgets = f"0={total * 6 // 10},cpu=1GB"
    code, text = plan(capsys, tiny("sd"), "--max_memory", budgets, "--dtype", "float32", "-o", file)
    assert code == 0
    assert str(file) in text
    placement = Placement.from_json(file.read_text())
    assert {"cuda:0", "cpu"} == set(placement.devices.values())
    assert (
        dispatch(["plan", str(tiny("sd")), "--max_memory", "cpu=9kB,disk=0", "-o", str(file)]) == 2
    )
    assert "does not fit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("p.txt", "must end in .json"),
        ("nowhere/p.json", "the directory"),
        ("folder.json", "is a directory"),
        ("locked/p.json", "is not writable"),
    ],
)
def test_where_a_placement_cannot_be_written_is_told_at_once(name, message, capsys, tmp_path):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "locked").mkdir(mode=0o500)
    if name.startswith("locked") and os.access(tmp_path / "locked", os.W_OK):
        pytest.skip("this user may write anywhere")
    assert dispatch(["plan", "no/such/model", "--output", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_without_budgets_it_is_what_this_machine_has_free(tiny, capsys):
    code, found = plan_json(capsys, tiny("sd"))
    assert code == 0
    assert found["budgets"]["cpu"] > 10**8
    assert found["whole"] == {"fits": True}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        (["shapes-sd", "--max_memory", "cpu=much"], "'much' is not a size"),
        ([FLUX_DEV], "configs but no weights.* --dtype"),
    ],
)
def test_what_is_wrong_is_named(words, message, capsys):
    assert dispatch(["plan", *words]) == 2
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


# -------------------------------------------------------------------- the page


def blocks(language):
    """The page's blocks: indented ones, or those fenced as a language."""
    if language:
        return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    found = re.findall(
        r"(?:^(?:    .*)?\n)+", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL), re.M
    )
    return [block for block in found if block.strip()]


def commands():
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            assert words[0] == "ddinfer"
            yield words[1:]


def assert_printed(block, out):
    """Every line of the page's block stands in the output, in order."""
    rest = iter(out.splitlines())
    for line in block.splitlines():
        if line.strip():
            assert any(line[4:].rstrip() == printed.rstrip() for printed in rest), line


def test_the_figures_of_the_flux_example_are_what_plan_counts(capsys):
    command, figures = blocks("")[:2]
    words = shlex.split(command)
    assert words[:3] == ["ddinfer", "plan", "black-forest-labs/FLUX.1-dev"]
    code, out = plan(capsys, FLUX_DEV, *words[3:], "--dtype", "bfloat16")
    assert code == 0
    assert_printed(figures, out)
    found = plan_json(capsys, FLUX_DEV, *words[3:], "--dtype", "bfloat16")[1]
    sizes = {part["name"]: part["bytes"]["bfloat16"] for part in found["components"]}
    assert 11.8e9 < sizes["transformer"] / 2 < 12.0e9  # parameters, as its authors say
    assert 4.7e9 < sizes["text_encoder_2"] / 2 < 4.8e9
    on_host = found["balanced"]["bytes"]["cpu"]
    assert f"{on_host / 1e9:.2f} GB wait in" in PAGE.replace("\n", " ")
    denoise = found["staged"]["stages"]["denoise"]["bytes"]
    assert set(denoise) == {"cuda:0", "cuda:1"}
    assert max(denoise.values()) < 14.4e9


def test_what_other_libraries_lack_is_no_news_of_a_plan():
    done = run([MAIN[0], str(ROOT / MAIN[1]), "plan", "shapes-sd"])
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_walk_with_the_embedded_model_works_as_the_page_says(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outputs, plans = [], []
    for words in commands():
        if "shapes-flux" not in words:
            continue
        if words[0] == "plan":
            code, out = plan(capsys, *words[1:])
            assert code == 0
            plans.append(out)
        else:
            command = [MAIN[0], str(ROOT / MAIN[1]), *words, "--limit=2", "--num_threads=1"]
            done = run(command, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            outputs.append(words[words.index("--output") + 1])
    assert_printed(blocks("")[2], plans[0])
    assert outputs == ["staged", "balanced", "from-file"]
    plain = ["--model", "shapes-flux", "--device", "cpu", "--limit=2", "--num_threads=1"]
    done = run([MAIN[0], str(ROOT / MAIN[1]), *plain, "--output", "plain"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = images(tmp_path / "plain")
    assert len(expected) == 2
    for output in outputs:
        assert images(tmp_path / output) == expected
    on_disk = Placement.from_json((tmp_path / "placement.json").read_text())
    assert set(on_disk.devices.values()) == {"cpu", "disk"}
