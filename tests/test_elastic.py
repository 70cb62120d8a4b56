"""Elastic torchrun: a machine is lost in the midst of a job and comes back. Two agents stand in."""

import os
import signal
import socket
import subprocess
import time

import pytest

from ddinfer.storage.files import Files
from ddinfer.storage.verify import verify
from tests.jobs import job, made
from tests.moody_pipeline import moody_pipeline
from tests.test_cli import MAIN, ROOT, TORCHRUN, images, run

#: A hang guard: a silent machine counts as lost after a minute, and each phase may wait for that.
HANG_SECONDS = 400


class Agents:
    """torchrun's agents, each as if on a machine of its own; the first one hosts the store."""

    def __init__(self, folder, words):
        self.folder, self.words, self.alive = folder, [str(word) for word in words], []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self, name, *, is_host=False):
        rendezvous = [
            "--nnodes=1:2",
            "--nproc_per_node=1",
            "--max-restarts=3",
            "--rdzv_backend=c10d",
            f"--rdzv_id={self.folder.name}",
            f"--rdzv_endpoint=127.0.0.1:{self.port}",
            f"--rdzv_conf=is_host={int(is_host)},last_call_timeout=10",
            "--local_addr=127.0.0.1",
        ]
        with (self.folder / f"{name}.log").open("w") as log:
            agent = subprocess.Popen(
                [*TORCHRUN, *rendezvous, "-m", "ddinfer", *self.words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "OMP_WAIT_POLICY": "PASSIVE",
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # as the templates do
                },
            )
        self.alive.append(agent)
        return agent

    def wait_until(self, condition, what):
        deadline = time.monotonic() + HANG_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"not seen: {what}\n{self.said()}"
            time.sleep(0.05)

    def said(self):
        return "\n".join(f"{p.name}:\n{p.read_text()}" for p in self.folder.glob("*.log"))

    def kill(self, agent):
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        self.alive.remove(agent)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for agent in list(self.alive):
            self.kill(agent)


@pytest.mark.nightly
@pytest.mark.parametrize("comes_back", ["while the other works", "after the other has failed"])
def test_a_machine_that_goes_and_comes_back_ends_with_a_whole_job(comes_back, tmp_path):
    moody, gate = moody_pipeline(tmp_path), tmp_path / "gate"
    prompts = ["a", f"wait {gate}", "b", "c", "d", f"wait {gate}", "e", "f"]
    with Agents(tmp_path, job(moody, tmp_path, prompts)) as agents:
        first = agents.start("first", is_host=True)
        second = agents.start("second")
        agents.wait_until(lambda: made(tmp_path) == [0, 4], "both ranks at their second prompt")
        agents.kill(second)
        if comes_back == "after the other has failed":
            gate.touch()
            log = tmp_path / "first.log"
            agents.wait_until(lambda: "rank 1 failed" in log.read_text(), "the loss")
        second = agents.start("second again")
        if not gate.exists():
            agents.wait_until(lambda: "received SIGTERM" in agents.said(), "the new round")
            gate.touch()
        codes = [agent.wait(HANG_SECONDS) for agent in (first, second)]
        assert codes == [0, 0], agents.said()
    assert made(tmp_path) == list(range(8))
    assert verify(Files(), str(tmp_path / "out")).is_good
    assert images(tmp_path / "out") == undisturbed(moody, tmp_path / "same", prompts, seed=0)
    assert images(tmp_path / "out") != undisturbed(moody, tmp_path / "other", prompts, seed=1)


def undisturbed(moody, folder, prompts, seed):
    """The images of the same job, made by one process."""
    folder.mkdir()
    words = job(moody, folder, prompts, "--seed", seed)
    done = run([*MAIN, *words])
    assert done.returncode == 0, done.stderr
    return images(folder / "out")
