"""Nothing that somebody handed on makes its code run: trust is said on the command line."""

import gzip
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from ddinfer import load_pipeline
from ddinfer.cli import dispatch
from ddinfer.errors import UsageError
from tests.local_hub import local_hub
from tests.test_cli import HANG_SECONDS, MAIN, ROOT, run, status
from tests.tiny_pipelines import tiny_pipeline

HOSTILE = """
import os
from diffusers import StableDiffusionPipeline
open(os.environ["MARKER"], "a").write("ran")

class Hostile(StableDiffusionPipeline):
    pass
"""

SMALL = ["--num_inference_steps=1", "--height=32", "--width=32", "--num_threads=1", "--device=cpu"]


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    """A pipeline without code of its own."""
    return tiny_pipeline("sd", tmp_path_factory.mktemp("harmless"))


def made_hostile(model, folder):
    """A copy whose pipeline is code of its own, which leaves a mark when it runs."""
    shutil.copytree(model, folder)
    index = folder / "model_index.json"
    data = json.loads(index.read_text()) | {"_class_name": ["pipeline", "Hostile"]}
    index.write_text(json.dumps(data))
    (folder / "pipeline.py").write_text(HOSTILE)
    return folder


@pytest.fixture(scope="module")
def handed_on(harmless, tmp_path_factory):
    """A finished job of a model with code, all of whose files ask for trust → (model, folder)."""
    folder = tmp_path_factory.mktemp("handed-on")
    model = made_hostile(harmless, folder / "model")
    out = folder / "out"
    words = ["--model", model, "--output", out, "--prompt", "a", "--prompt", "b", *SMALL]
    done = run([*MAIN, *words, "--trust_remote_code"], MARKER=str(folder / "mark"))
    assert done.returncode == 0, done.stderr
    assert (folder / "mark").exists()
    job = json.loads((out / "job.json").read_text())
    job["config"].update(trust_remote_code=True, allow_pickle=True, overwrite=True)
    (out / "job.json").write_text(json.dumps(job))
    (out / "images/0000/00000001.png").unlink()  # something is left to do
    config = {"model": str(model), "prompt": ["c"], "trust_remote_code": True}
    (folder / "job.yaml").write_text(yaml.safe_dump(config))
    return folder


#: What is typed about the folder that was handed on, in it → the exit code, and what is said.
COMMANDS = {
    "run --config job.yaml --output new": (2, "give --trust_remote_code on the command line"),
    "run --config out/job.json --output new": (2, "give --trust_remote_code on the command line"),
    "run --model model --output out --prompt a --prompt b": (2, "pass --trust_remote_code"),
    "run --model model --output out --prompt a --dry_run": (2, "pass --trust_remote_code"),
    "retry-failed out": (2, "pass --trust_remote_code"),
    "replay out/images/0000/00000000.png": (2, "pass --trust_remote_code"),
    "status out": (0, ""),
    "report out": (0, ""),
    "verify out": (74, ""),
    "verify out --rebuild --repair": (74, ""),
    "merge out --output merged": (2, "images are in no given directory"),
    "plan model": (2, "pass --trust_remote_code"),
}


def test_no_command_runs_the_code_of_a_folder_that_was_handed_on(handed_on, tmp_path):
    """All in one process, which has never imported that code."""
    shutil.copytree(handed_on, tmp_path / "here")
    os.remove(tmp_path / "here/mark")
    code = (
        "import contextlib, io, json, sys\n"
        "from ddinfer.cli import dispatch\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    err = io.StringIO()\n"
        "    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):\n"
        "        code = dispatch(words.split())\n"
        "    print(json.dumps([words, code, err.getvalue()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(COMMANDS))],
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": str(ROOT), "MARKER": str(tmp_path / "here/mark")},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "here/mark").exists()
    for words, exit_code, err in map(json.loads, done.stdout.splitlines()):
        expected, message = COMMANDS[words]
        assert exit_code == expected, (words, err)
        assert message in err, words
    assert len(done.stdout.splitlines()) == len(COMMANDS)
    assert status(tmp_path / "here/out")["state"] == "finished"
    assert (tmp_path / "here/out/images/0000/00000000.png").exists()  # no file said --overwrite


def test_the_option_of_the_command_line_is_enough(handed_on, tmp_path):
    mark = tmp_path / "mark"
    out, words = tmp_path / "out", ["--trust_remote_code", "--allow_pickle", *SMALL]
    done = run(
        [*MAIN, "--config", handed_on / "job.yaml", "--output", out, *words], MARKER=str(mark)
    )
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    recorded = json.loads((out / "job.json").read_text())["config"]
    assert not {"trust_remote_code", "allow_pickle"} & set(recorded)


def test_replay_asks_the_hub_for_the_recorded_revision_and_trusts_nothing(harmless, tmp_path):
    hostile = made_hostile(harmless, tmp_path / "hostile")
    hub = {"HF_HUB_OFFLINE": "0", "MARKER": str(tmp_path / "mark"), "HF_HOME": str(tmp_path / "hf")}
    with local_hub("somebody/model", {"v1": harmless, "main": hostile}) as address:
        hub["HF_ENDPOINT"] = address
        words = ["--model=somebody/model", "--revision=v1", "--output", tmp_path / "out", *SMALL]
        done = run([*MAIN, *words, "--prompt", "a"], **hub)
        assert done.returncode == 0, done.stderr
        image = shutil.copy(tmp_path / "out/images/0000/00000000.png", tmp_path / "alone.png")
        done = run([*MAIN, "replay", image], **hub)
        assert done.returncode == 0, done.stderr + done.stdout
        assert (
            done.stdout == "bit-identical: every byte of the file is the same\n"
        )  # nor has a file changed
        assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("shard", ["shard.bin", "../evil.safetensors", "/evil.safetensors"])
def test_an_index_of_safetensors_names_no_pickle_and_no_file_elsewhere(shard, harmless, tmp_path):
    model, unet = tmp_path / "model", tmp_path / "model/unet"
    shutil.copytree(harmless, model)
    (unet / "diffusion_pytorch_model.safetensors").rename(model / "evil.safetensors")
    torch.save({"conv_in.bias": torch.zeros(32)}, unet / "shard.bin")
    name = str(model / shard[1:]) if shard.startswith("/") else shard
    index = json.dumps({"weight_map": {"conv_in.bias": name}})
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(UsageError, match=r"expected \.safetensors files in or below"):
        load_pipeline(model)


@pytest.mark.parametrize(
    "words",
    [
        "status out",
        "verify out",
        "verify out --rebuild --repair",
        "merge out --output merged",
        "retry-failed out --trust_remote_code",
        "replay out/images/0000/00000000.png --trust_remote_code",
    ],
)
@pytest.mark.parametrize("index", ["../../../../outside", "/outside", -1, 7, None])
def test_no_record_of_a_folder_decides_a_path(
    words, index, handed_on, tmp_path, monkeypatch, capsys
):
    shutil.copytree(handed_on / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with gzip.open("out/requests.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    rows[1]["index"] = index
    with gzip.open("out/requests.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    before = everything(tmp_path)
    assert dispatch(words.split()) == 74
    assert "requests.jsonl.gz:2: damaged" in capsys.readouterr().err
    assert everything(tmp_path) == before


WRONG = {"absent": None, "number": 1.5, "list": [], "text": "x", "object": {}}


@pytest.mark.parametrize("words", ["status out", "verify out", "merge out --output merged"])
@pytest.mark.parametrize("name", ["job.json", "status.json"])
def test_a_record_with_a_missing_or_wrong_value_never_ends_a_command_with_a_bug(
    name, words, handed_on, tmp_path, monkeypatch, capsys
):
    shutil.copytree(handed_on / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    whole = json.loads((tmp_path / "out" / name).read_text())
    for key in whole:
        for kind, value in WRONG.items():
            damaged = whole | {key: value}
            if kind == "absent":
                del damaged[key]
            (tmp_path / "out" / name).write_text(json.dumps(damaged))
            code = dispatch(words.split())  # raises whatever is not an error of ddinfer's
            shown = capsys.readouterr()
            # 0 and 74: the value was of no use here. 2: parts of the job are missing.
            assert code in (0, 2, 74), (key, kind, shown)
            if "is damaged" in shown.err:
                assert f"{tmp_path}/out/{name} is damaged" in shown.err


def test_a_configuration_that_is_no_object_is_an_error_of_its_file(handed_on, tmp_path, capsys):
    out = shutil.copytree(handed_on / "out", tmp_path / "out")
    job = json.loads((out / "job.json").read_text())
    (out / "job.json").write_text(json.dumps(job | {"config": "x"}))
    for words in (["retry-failed", out], ["replay", out / "images/0000/00000000.png"]):
        assert dispatch([str(word) for word in words]) == 74
        assert f"{out}/job.json is damaged: its config is 'x'" in capsys.readouterr().err


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
