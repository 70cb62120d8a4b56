"""The command as users type it: every launcher, in fresh processes; bad input; what is printed."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.moody_pipeline import moody_pipeline

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
MAIN = [sys.executable, "ddinfer/main.py"]
HANG_SECONDS = 180


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_pipeline(tmp_path_factory.mktemp("model")))


def start(command, cwd=ROOT, stdin=None, **environ):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DDINFER_")}
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env={**clean, "PYTHONPATH": str(ROOT) if cwd != ROOT else "", **environ},
        stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background ignores Ctrl-C, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(command, cwd=ROOT, stdin=None, **environ):
    process = start(command, cwd, stdin, **environ)
    out, err = process.communicate(stdin, timeout=HANG_SECONDS)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def options(model, output, *more):
    return ["--model", model, "--trust_remote_code", "--output", output, "--device", "cpu", *more]


def status(output):
    return json.loads((Path(output) / "status.json").read_text())


def images(output):
    return {f.name: f.read_bytes() for f in sorted(Path(output).glob("images/*/*.png"))}


# --- launching -------------------------------------------------------------------------------

LAUNCHERS = {
    "torchrun, option behind the script": [*TORCHRUN, "ddinfer/main.py", "--nproc_per_node=2"],
    "torchrun, option before the script": [*TORCHRUN, "--nproc_per_node=2", "ddinfer/main.py"],
    "torchrun, option on both sides": [
        *TORCHRUN,
        "--nproc_per_node=2",
        "ddinfer/main.py",
        "--nproc_per_node=2",
    ],
    "the script": [*MAIN, "--nproc_per_node=2"],
    "the module": [sys.executable, "-m", "ddinfer", "--nproc-per-node", "2"],
    "the command": [Path(sys.executable).parent / "ddinfer", "run", "--nproc_per_node=2"],
}


@pytest.fixture(scope="module")
def one_rank(moody, tmp_path_factory):
    """The images of the job that every launcher runs, made by one rank."""
    out = tmp_path_factory.mktemp("one") / "out"
    done = run([*MAIN, *options(moody, out, *PROMPTS)])
    assert done.returncode == 0, done.stderr
    assert status(out)["world_size"] == 1
    return images(out)


PROMPTS = ["--prompt", "a", "--prompt", "b", "--prompt", "c", "--num_threads=1"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launcher_runs_the_same_job_on_two_ranks(name, moody, tmp_path, one_rank):
    command = LAUNCHERS[name]
    if name == "the command" and not Path(command[0]).exists():
        pytest.skip("ddinfer is not installed in this environment (launch/test installs it)")
    done = run([*command, *options(moody, tmp_path / "out", *PROMPTS)])
    assert done.returncode == 0, done.stderr
    found = status(tmp_path / "out")
    assert [(r["rank"], r["images"]) for r in found["ranks"]] == [(0, 2), (1, 1)]
    assert images(tmp_path / "out") == one_rank
    assert "3 of 3 images" in done.stderr


def test_numbers_that_differ_are_an_error_with_both(moody, tmp_path):
    command = [*TORCHRUN, "--nproc_per_node=2", "ddinfer/main.py", "--nproc_per_node=3"]
    done = run([*command, *options(moody, tmp_path / "out", "--prompt", "a")])
    assert done.returncode != 0
    assert "torchrun started 2 ranks" in done.stderr
    assert "--nproc_per_node=3" in done.stderr
    assert not (tmp_path / "out").exists()


def test_from_another_folder_our_modules_shadow_nobody(moody, tmp_path):
    (tmp_path / "config.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "request.py").write_text("raise SystemExit('shadowed')")
    code = "import ddinfer.main, sys; sys.exit(ddinfer.main.main(sys.argv[1:]))"
    done = run([sys.executable, "-c", code, *options(moody, "out", "--prompt", "a")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    script = [sys.executable, str(ROOT / "ddinfer/main.py"), "--print_config"]
    assert run(script, cwd=tmp_path).returncode == 0


def test_more_ranks_than_gpus_and_half_an_environment_are_errors(moody, tmp_path):
    command = [*MAIN, *options(moody, tmp_path / "out", "--prompt", "a")]
    done = run(command, RANK="0", MASTER_ADDR="127.0.0.1")
    assert done.returncode == 2
    assert "incomplete distributed environment" in done.stderr
    assert "WORLD_SIZE" in done.stderr


# --- dying -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("kill", "rank 1 was killed by SIGKILL"), ("exit", "rank 1 exited with status 0")],
)
def test_a_rank_that_dies_is_named_and_the_same_command_goes_on(moody, tmp_path, prompt, message):
    file = tmp_path / "p.txt"
    file.write_text(f"a\nb\nc\n{prompt}\n")
    command = [*MAIN, *options(moody, tmp_path / "out", "--prompts", file, "--nproc_per_node=2")]
    done = run(command)
    assert done.returncode not in (0, 3), done.stderr
    assert message in done.stderr
    assert "prompt 3" in done.stderr, "the last activity is told"
    assert "00000003.png" not in images(tmp_path / "out")


def test_ctrl_c_ends_the_job_with_130_and_it_goes_on_later(moody, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a\nsleep 60\nb\nsleep 60\n")
    out = tmp_path / "out"
    command = [*MAIN, *options(moody, out, "--prompts", file, "--nproc_per_node=2", "--limit=4")]
    process = start(command)
    deadline = time.monotonic() + HANG_SECONDS
    while len(images(out)) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130, err
    assert sorted(images(out)) == ["00000000.png", "00000002.png"]


# --- what is read and printed -----------------------------------------------------------------


def test_prompts_come_from_standard_input(moody, tmp_path):
    command = [*MAIN, *options(moody, tmp_path / "out", "--prompts", "-", "--nproc_per_node=2")]
    done = run(command, stdin="a dog\n a cat \n")
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "out/metadata.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == ["a dog", " a cat "]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_prompts_come_from_a_command_whose_output_only_the_launcher_can_read(moody, tmp_path):
    words = [*MAIN, *options(moody, tmp_path / "out", "--nproc_per_node=2"), "--prompts"]
    line = f"{shlex.join(map(str, words))} <(printf 'a dog\\n a cat \\n')"
    done = run(["bash", "-c", line])
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "out/metadata.jsonl").read_text().splitlines()
    assert [json.loads(row)["prompt"] for row in rows] == ["a dog", " a cat "]


def test_json_summary_is_one_line_on_standard_output(moody, tmp_path):
    command = [*MAIN, *options(moody, tmp_path / "out", "--prompt", "fail it", "--json")]
    done = run(command)
    assert done.returncode == 3
    report = json.loads(done.stdout)
    assert (report["num_made"], report["num_failed"], report["exit_code"]) == (0, 1, 3)


def test_dry_run_prints_the_plan_and_writes_nothing(moody, tmp_path):
    out = tmp_path / "out"
    more = ["--prompt", "a", "--num_images_per_prompt=5", "--batch_size=2", "--width=8"]
    words = options(moody, out, *more, "--height=8", "--nproc_per_node=2", "--dry_run")
    done = run([*MAIN, *words])
    assert done.returncode == 0, done.stderr
    assert "5 images in 3 batches" in done.stdout
    assert "rank 0: 2 batches, images 0 to 3" in done.stdout
    assert "rank 1: 1 batches, images 4 to 4" in done.stdout
    assert not out.exists()
    plan = json.loads(run([*MAIN, *words, "--json"]).stdout)
    assert [part["images"] for part in plan["slices"]] == [4, 1]
    assert plan["first_requests"][1]["seed"] == 1


def test_printed_configuration_runs_again(moody, tmp_path):
    words = options(moody, tmp_path / "out", "--prompt", "a", "--seed", "4")
    printed = run([*MAIN, *words, "--print_config"]).stdout
    file = tmp_path / "again.yaml"
    file.write_text(printed)
    assert yaml.safe_load(printed)["seed"] == 4
    done = run([*MAIN, "--config", file, "--trust_remote_code", "--output", tmp_path / "a"])
    assert done.returncode == 0, done.stderr
    again = ["--config", tmp_path / "a/job.json", "--trust_remote_code"]
    done = run([*MAIN, *again, "--output", tmp_path / "b"])
    assert done.returncode == 0, done.stderr
    assert images(tmp_path / "a") == images(tmp_path / "b")


def test_replay_makes_the_same_image_again_with_its_batch_and_notices_another(moody, tmp_path):
    out = tmp_path / "out"
    run([*MAIN, *options(moody, out, *PROMPTS, "--batch_size=3")])
    image = out / "images/0000/00000001.png"
    replay = [*MAIN, "replay", image, "--trust_remote_code"]
    done = run(replay)
    assert (done.returncode, done.stdout.splitlines()[0]) == (
        0,
        "bit-identical: every byte of the file is the same",
    )
    from PIL import Image, PngImagePlugin

    with Image.open(image) as picture:
        text = PngImagePlugin.PngInfo()
        for name, value in picture.text.items():
            text.add_itxt(name, value)
        changed = picture.copy()
        changed.putpixel((0, 0), (1, 2, 3))
        changed.save(image, pnginfo=text)
    done = run(replay)
    assert done.returncode == 3
    assert "different: the largest difference is" in done.stdout
    assert "in 3 of" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["rum"], "did you mean run?"),
        (["frobnicate"], "no command 'frobnicate'. The commands are: run,"),
        (["--stepps", "3"], "--steps"),
        (["--model", "no/such/folder", "--prompt", "a"], "no such folder"),
        (["--nproc_per_node", "two"], "two"),
        (["--width", "63", "--prompt", "a", "--pipeline_kwargs", '{"x": 1}'], "takes no argument"),
        (["replay", "nowhere.png"], "nowhere.png"),
        (["replay", __file__, "--save", "nowhere/a.py"], "the directory nowhere does not exist"),
    ],
)
def test_bad_usage_ends_with_2_and_one_clear_message(words, message, tmp_path):
    is_run = words[0].startswith("-")
    done = run([*MAIN, *words, *(["-o", tmp_path / "o"] if is_run else [])])
    assert done.returncode == 2, done.stderr
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("words", [["--prompts=nowhere.txt"], ["--model=no/such/folder"]])
def test_a_mistyped_name_is_told_before_torch_is_imported(words, tmp_path):
    told = run([sys.executable, "-X", "importtime", *MAIN[1:], *words, "-o", tmp_path / "o"])
    assert told.returncode == 2
    imported = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines()}
    assert "ddinfer.prompts.files" in imported
    assert not {"torch", "diffusers", "transformers"} & imported


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("words", [["--limit=zero"], ["--nproc_per_node=1", "--prompts=none"]])
def test_what_began_to_import_is_gone_when_no_ranks_are_started(words, tmp_path):
    mark = f"TEST_MARK={tmp_path}"
    ended = run([*MAIN, "--nproc_per_node=2", *words], TEST_MARK=str(tmp_path))
    assert ended.returncode == 2, ended.stderr
    left = [p for p in Path("/proc").glob("[0-9]*/environ") if mark.encode() in _bytes(p)]
    assert not left


def _bytes(file):
    try:
        return file.read_bytes()
    except OSError:  # it ended meanwhile, or is not ours
        return b""


def test_version_and_help():
    assert run([*MAIN, "--version"]).stdout.startswith("ddinfer 0.")
    assert "replay" in run([*MAIN, "help"]).stdout
    assert "--nproc_per_node" in run([*MAIN, "--help"]).stdout


@pytest.mark.parametrize("words", ["--help", "plan --help", "--print_config", "--dry_run"])
def test_a_reader_that_ends_early_is_no_traceback(words):
    """As ``ddinfer --help | head``: here the pipe is closed before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ddinfer", *words.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
