"""SIGTERM in every phase of a job: 75, and the same command finishes it, byte for byte.

Each phase is held by something that the job waits for, and the signal comes while it waits.
"""

import errno
import os
import signal

import pytest

from ddinfer.storage.files import Files
from ddinfer.storage.status import status_of
from tests.jobs import STARTS, end, is_whole, job, undisturbed, wait_for_words, wait_until
from tests.moody_continuous import moody_continuous
from tests.moody_pipeline import moody_pipeline
from tests.test_cli import images, run, start, status

HOLDS = {"preparing": "MOODY_HOLDS_IMPORT", "loading": "MOODY_HOLDS_LOADING"}
PHASES = ["preparing", "loading", "running", "decoding", "saving", "gathering"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    moody_pipeline(folder)
    moody_continuous(folder)
    return folder


def model_of(phase, folder):
    """One that has a denoiser, and so something to do behind it, where it is to wait there."""
    name = "moody_continuous" if phase == "decoding" else "moody"
    return str(folder / name)


class Held:
    """A job of four prompts that stands still in a phase until it is let go.

    What holds it is gone when the job is run again.
    """

    def __init__(self, name, phase, models, folder, *more):
        self.folder, self.name, self.model = folder, name, model_of(phase, models)
        self.gates = [folder / "gate", folder / "gate2"]
        self.pipe, self.writer = folder / "out/journal/999999-00000.jsonl", None
        words = {"running": "wait", "decoding": "decode", "saving": "save"}
        first = {phase: f"{word} {self.gates[0]}" for phase, word in words.items()}
        # A rank that saves its last image has nothing left to do; here another one has.
        third = {"saving": f"wait {self.gates[1]}"}
        self.prompts = [first.get(phase, "a"), "b", third.get(phase, "c"), "d"]
        self.command = [*STARTS[name], *job(self.model, folder, self.prompts, *more)]
        gate = str(self.gates[0])
        self.process = start(
            self.command,
            **{HOLDS.get(phase, "MOODY_HOLDS_LOADING"): gate} if phase not in first else {},
        )
        wait_until(self.process, (folder / "gate.waiting").exists)
        if phase == "gathering":  # when all is made, there is a journal that does not end
            os.mkfifo(self.pipe)
            self.gates[0].touch()
            wait_until(self.process, self._is_read)

    def _is_read(self):
        """Whether somebody has opened the pipe to read it; from then on he waits for us."""
        try:
            self.writer = os.open(self.pipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody does
                raise
        return self.writer is not None

    def let_go(self):
        for gate in self.gates:
            gate.touch()
        if self.writer is not None:
            self.pipe.unlink()
            os.close(self.writer)


def check_stopped_with_75(held, code, err):
    assert status(held.folder / "out")["exit_code"] == 75, err
    assert status(held.folder / "out")["state"] == "stopped"
    if held.name != "torchrun":  # which has an exit code of its own
        assert code == 75, err
    assert not is_whole(held.folder)


def check_finished_by_the_same_command(held):
    done = run(held.command)
    assert done.returncode == 0, done.stderr
    assert is_whole(held.folder)
    assert images(held.folder / "out") == undisturbed(held.model, held.folder, held.prompts)


def by_night(*values):
    return pytest.param(*values, marks=pytest.mark.nightly)


@pytest.mark.parametrize(
    ("name", "phase"),
    [("two ranks", "loading")]
    + [by_night(n, p) for n in STARTS for p in PHASES[:-1] if (n, p) != ("two ranks", "loading")],
)
def test_sigterm_in_a_phase_ends_with_75_and_the_same_command_finishes(
    models, tmp_path, name, phase
):
    held = Held(name, phase, models, tmp_path)
    held.process.send_signal(signal.SIGTERM)
    wait_for_words(held.process, "received SIGTERM; finishing the current batch")
    held.let_go()
    check_stopped_with_75(held, *end(held.process))
    check_finished_by_the_same_command(held)


@pytest.mark.nightly
@pytest.mark.parametrize("name", STARTS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_phase_that_takes_longer_than_the_grace_is_abandoned(models, tmp_path, name, phase):
    held = Held(name, phase, models, tmp_path, "--grace_seconds=0.5")
    held.process.send_signal(signal.SIGTERM)
    code, err = end(held.process)
    held.let_go()
    if phase == "preparing":  # no folder yet that could say it
        assert not (tmp_path / "out").exists()
        assert name == "torchrun" or code == 75, err
    elif (name, phase) == ("one process", "saving"):
        # What was handed to the writer is waited for a little longer; it hangs, and so nobody is
        # left to write down how the job ended.
        assert code == 75, err
        assert "run the same command again to resume" in err
        assert status_of(Files(), str(tmp_path / "out"))["state"] == "interrupted"
    else:
        check_stopped_with_75(held, code, err)
    check_finished_by_the_same_command(held)


def test_sigterm_when_all_is_made_lets_the_job_finish(models, tmp_path):
    held = Held("one process", "gathering", models, tmp_path)
    held.process.send_signal(signal.SIGTERM)
    wait_for_words(held.process, "received SIGTERM; finishing the current batch")
    held.let_go()
    code, err = end(held.process)
    assert code == 0, err
    assert is_whole(tmp_path)
    assert images(tmp_path / "out") == undisturbed(held.model, held.folder, held.prompts)
