"""Prompts from a pipe under torchrun: one rank reads, the others leave the pipe alone."""

import json
import os
import socket
import subprocess
import threading
import time

import pytest
import yaml

from tests.moody_pipeline import moody_pipeline
from tests.test_cli import HANG_SECONDS, MAIN, ROOT, TORCHRUN, options

#: More than a pipe holds (64 KiB), so that whoever reads gets it in many pieces.
PROMPTS = [f"{k} " + "word " * 2000 for k in range(24)]
OTHER_NAMES = ("/dev/fd/0", "/proc/self/fd/0")
TWO_RANKS = [*TORCHRUN, "--nproc_per_node=2", "ddinfer/main.py"]


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_pipeline(tmp_path_factory.mktemp("model")))


def start(command, stdin, **environ):
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def write_slowly(lines, descriptor):
    """Write in pieces that end within a line, as a slow program does."""
    data = "".join(f"{line}\n" for line in lines).encode()
    with open(descriptor, "wb", buffering=0) as pipe:
        for at in range(0, len(data), 30_001):
            pipe.write(data[at : at + 30_001])
            time.sleep(0.01)


def run(command, lines, **environ):
    reader, writer = os.pipe()
    thread = threading.Thread(target=write_slowly, args=(lines, writer))
    process = start(command, reader, **environ)
    os.close(reader)
    thread.start()
    out, err = process.communicate(timeout=HANG_SECONDS)
    thread.join()
    return subprocess.CompletedProcess(command, process.returncode, out.decode(), err.decode())


def prompts_made(folder):
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    return [json.loads(row)["prompt"] for row in rows]


@pytest.mark.parametrize(
    "name",
    ["-", "/dev/stdin", *(pytest.param(n, marks=pytest.mark.nightly) for n in OTHER_NAMES)],
)
def test_every_prompt_of_a_pipe_is_made_once_and_in_order_under_torchrun(name, moody, tmp_path):
    done = run([*TWO_RANKS, *options(moody, tmp_path / "out", "--prompts", name)], PROMPTS)
    assert done.returncode == 0, done.stderr
    assert prompts_made(tmp_path / "out") == PROMPTS


def test_a_machine_without_rank_0_does_not_read_its_standard_input(moody, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = options(moody, tmp_path / "out", "--prompts", "-")
    agents = []
    ends = [os.pipe(), os.pipe()]
    for node in (0, 1):
        launcher = [*TORCHRUN, "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1"]
        launcher += ["--master_addr=127.0.0.1", f"--master_port={port}", "ddinfer/main.py"]
        agents.append(start([*launcher, *words], ends[node][0]))
    os.close(ends[0][0])
    os.write(ends[1][1], b"not for you\n")
    os.close(ends[1][1])
    write_slowly(PROMPTS, ends[0][1])
    for agent in agents:
        _, err = agent.communicate(timeout=HANG_SECONDS)
        assert agent.returncode == 0, err.decode()
    with open(ends[1][0], "rb") as unread:
        assert unread.read() == b"not for you\n"
    assert prompts_made(tmp_path / "out") == PROMPTS


def test_the_plan_is_printed_once_under_torchrun_and_one_rank_reads_for_it(moody, tmp_path):
    words = options(moody, tmp_path / "out", "--prompts", "-", "--dry_run", "--json")
    done = run([*TWO_RANKS, *words], PROMPTS)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)  # a second plan would be "extra data"
    assert [part["images"] for part in plan["slices"]] == [12, 12]
    assert not (tmp_path / "out").exists()


def test_the_configuration_is_printed_once_under_torchrun(moody, tmp_path):
    done = run([*TWO_RANKS, *options(moody, tmp_path / "out", "--seed=7", "--print_config")], [])
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("seed:")] == ["seed: 7"]
    assert yaml.safe_load(done.stdout)["seed"] == 7


def test_a_regular_file_as_standard_input_needs_no_ending(moody, tmp_path):
    file = tmp_path / "prompts.of_mine"
    file.write_text("a\nb\n")
    with file.open("rb") as stdin:
        process = start(
            [*MAIN, *options(moody, tmp_path / "out", "--prompts", "/dev/stdin")], stdin
        )
        _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, err.decode()
    assert prompts_made(tmp_path / "out") == ["a", "b"]


def test_a_closed_standard_input_is_an_error_that_says_so(moody, tmp_path):
    words = [*MAIN, *options(moody, tmp_path / "out", "--prompts", "-")]
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *words]
    process = start(command, subprocess.DEVNULL)
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 2, err.decode()
    assert "standard input is closed" in err.decode()


def test_an_empty_standard_input_says_that_a_restarted_rank_cannot_read_it_again(moody, tmp_path):
    words = [*MAIN, *options(moody, tmp_path / "out", "--prompts", "-")]
    process = start(words, subprocess.DEVNULL)
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 2, err.decode()
    assert "<stdin>: contains no prompts; it can be read once, so use a file where" in err.decode()
