"""Jobs whose processes are killed, stopped or restarted: real processes, the command line's way."""

import contextlib
import faulthandler
import json
import os
import re
import signal
import time

import pytest

from ddinfer.cli.status import lines_of
from ddinfer.distributed.process import COPY_SECONDS
from ddinfer.distributed.process_group import Group
from ddinfer.job.watchdog import WARN_SECONDS, Watchdog
from ddinfer.storage.files import Files
from ddinfer.storage.lease import read_holder
from ddinfer.storage.status import status_of
from ddinfer.storage.verify import verify
from tests.jobs import STARTS, end, family, is_whole, job, made, wait_for_words, wait_until
from tests.kill_matrix import ranks_of
from tests.moody_pipeline import moody_pipeline
from tests.test_cli import MAIN, TORCHRUN, run, start, status
from tests.test_launch import await_end


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_pipeline(tmp_path_factory.mktemp("model")))


# --- restarts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["static", "dynamic"])
def test_a_dead_rank_stops_nobody_and_a_restart_makes_the_rest(moody, tmp_path, schedule):
    prompts = ["a", "b", f"once {tmp_path / 'died'}", *"cdefg"]
    more = ["--nproc_per_node=2", "--max_restarts=1", f"--schedule={schedule}"]
    done = run([*MAIN, *job(moody, tmp_path, prompts, *more)])
    assert done.returncode == 0, done.stderr
    assert "killed by SIGKILL" in done.stderr
    assert "restart 1 of 1" in done.stderr
    report = verify(Files(), str(tmp_path / "out"))
    assert (report.num_good, report.is_good) == (8, True)
    lines = [json.loads(x) for f in tmp_path.glob("out/journal/*") for x in f.open()]
    written = [x["index"] for x in lines if x["kind"] == "image"]
    assert sorted(written) == list(range(8)), "nothing was made twice"
    assert [x["indices"] for x in lines if x["kind"] == "death"] == [[2]]


def test_without_restarts_the_living_finish_their_slices(moody, tmp_path):
    prompts = [f"once {tmp_path / 'died'}", "a", "b", "c"]
    words = job(moody, tmp_path, prompts, "--nproc_per_node=2")
    done = run([*MAIN, *words])
    assert done.returncode == 70, done.stderr
    assert set(made(tmp_path)) >= {2, 3}
    assert run([*MAIN, *words]).returncode == 0
    assert made(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_leaves_with_exit_status_0_is_no_end_of_a_job(moody, tmp_path, restarts):
    prompts = ["a", "b", "c", "d", f"leave {tmp_path / 'left'}", "e"]
    command = [*MAIN, *job(moody, tmp_path, prompts, "--nproc_per_node=2")]
    done = run([*command, f"--max_restarts={restarts}"])
    assert "rank 1 exited with status 0 before its work was complete" in done.stderr
    if not restarts:
        assert done.returncode == 70, done.stderr
        assert set(made(tmp_path)) in ({0, 1, 2}, {0, 1, 2, 3}), "what it had written, and no more"
        assert status(tmp_path / "out")["state"] != "finished"
        assert not is_whole(tmp_path)
        done = run(command)
    assert done.returncode == 0, done.stderr
    assert made(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert is_whole(tmp_path)


def test_a_prompt_that_always_kills_is_failed_and_the_rest_is_made(moody, tmp_path):
    prompts = ["a", "b", "kill", "c", "d", "e"]
    more = ["--batch_size=3", "--nproc_per_node=2", "--max_restarts=6"]
    done = run([*MAIN, *job(moody, tmp_path, prompts, *more)])
    assert done.returncode == 3, done.stderr
    assert made(tmp_path) == [0, 1, 3, 4, 5]
    (failure,) = map(json.loads, (tmp_path / "out/failures.jsonl").open())
    assert (failure["index"], failure["type"]) == (2, "ProcessDied")
    assert "SIGKILL" in failure["message"]
    rows = [json.loads(x) for x in (tmp_path / "out/metadata.jsonl").open()]
    assert [row["exact"] for row in rows] == [False, False, True, True, True]
    assert verify(Files(), str(tmp_path / "out")).is_good
    deaths = [
        json.loads(x)
        for f in sorted(tmp_path.glob("out/journal/*"))
        for x in f.open()
        if '"kind":"death"' in x
    ]
    assert [(d["indices"], d["alone"]) for d in deaths] == [([0, 1, 2], False)] * 2 + [
        ([2], True)
    ] * 2


def test_torchruns_own_restarts_go_on_with_the_job(moody, tmp_path):
    prompts = ["a", f"once {tmp_path / 'died'}", "b", "c"]
    command = [*TORCHRUN, "--nproc_per_node=2", "--max-restarts=1", "ddinfer/main.py"]
    done = run([*command, *job(moody, tmp_path, prompts)])
    assert done.returncode == 0, done.stderr
    assert made(tmp_path) == [0, 1, 2, 3]
    assert verify(Files(), str(tmp_path / "out")).is_good


def test_nobody_reads_running_of_a_job_whose_first_rank_was_killed(moody, tmp_path):
    """Under plain torchrun nobody is left who could write it down."""
    command = [*STARTS["torchrun"], *job(moody, tmp_path, [f"wait {tmp_path / 'gate'}", "a"])]
    process = start(command)
    wait_until(process, (tmp_path / "gate.waiting").exists)
    assert status_says(tmp_path)["state"] == "running"
    os.kill(read_holder(Files(), str(tmp_path / "out")).pid, signal.SIGKILL)
    end(process)
    assert status(tmp_path / "out")["state"] == "running", "as it was left"
    said = status_says(tmp_path)
    assert (said["state"], said["holder"]) == ("interrupted", None)
    shown = "\n".join(lines_of(said))
    assert "no process holds the directory" in shown
    assert "run the same command again to resume" in shown


def status_says(folder):
    """What ``ddinfer status`` says of the job in ``folder/out``."""
    return status_of(Files(), str(folder / "out"))


#: The others of these pairs are run by launch/nightly.
BY_DAY = [
    ("one process", signal.SIGHUP),
    ("two ranks", signal.SIGTERM),
    ("torchrun", signal.SIGTERM),
    ("torchrun", signal.SIGINT),
]

# --- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STARTS)
def test_sigterm_lets_the_batch_in_hand_finish(moody, tmp_path, name):
    gate = tmp_path / "gate"
    words = job(moody, tmp_path, [f"wait {gate}", "a", "b", "c"])
    process = start([*STARTS[name], *words])
    wait_until(process, (tmp_path / "gate.waiting").exists)
    process.send_signal(signal.SIGTERM)
    wait_for_words(process, "received SIGTERM", "up to 20 s")
    gate.touch()
    code, err = end(process)
    assert 0 in made(tmp_path), "it was in hand"
    assert 1 not in made(tmp_path), "it was not"
    assert status(tmp_path / "out")["exit_code"] == 75, err
    if name != "torchrun":
        assert code == 75, err
    assert "same command" in err
    assert run([*STARTS[name], *words]).returncode == 0
    assert made(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(name, number, marks=() if (name, number) in BY_DAY else pytest.mark.nightly)
        for name in STARTS
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    ],
)
def test_a_signal_to_every_process_at_once_lets_the_batch_in_flight_finish(
    moody, tmp_path, name, number
):
    """As systemd, Slurm and a lost terminal send it; launchers forward it as well."""
    gate = tmp_path / "gate"
    words = job(moody, tmp_path, [f"wait {gate}", "a", "b", "c"])
    process = start([*STARTS[name], *words])
    wait_until(process, (tmp_path / "gate.waiting").exists)
    signal_all(process.pid, number)
    wait_for_words(process, f"received {number.name}", "up to 20 s")
    time.sleep(1)  # for the copies that launchers forward
    signal_all(process.pid, number)  # a service manager that signals again, in the same breath
    gate.touch()
    code, err = end(process)
    assert 0 in made(tmp_path), err
    assert 1 not in made(tmp_path), "it was not in flight"
    expected = 130 if number == signal.SIGINT else 75
    assert status(tmp_path / "out")["exit_code"] == expected, err
    assert "death" not in "".join(f.read_text() for f in tmp_path.glob("out/journal/*"))
    if name != "torchrun":  # which has an exit code of its own
        assert code == expected, err


def signal_all(pid, number):
    for member in family(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, number)


def test_a_signal_to_every_process_while_they_import_ends_all_with_75(moody, tmp_path):
    words = job(moody, tmp_path, ["a", "b"], "--nproc_per_node=2")
    process = start([*MAIN, *words])
    wait_until(process, lambda: len(family(process.pid)) > 1)
    time.sleep(0.5)  # the forkserver imports for some seconds
    pids = family(process.pid)
    signal_all(process.pid, signal.SIGTERM)
    code, err = end(process)
    assert code == 75, err
    await_end(pids)
    assert not made(tmp_path)


def test_nohup_keeps_a_job_when_its_terminal_is_lost(moody, tmp_path):
    gate = tmp_path / "gate"
    words = job(moody, tmp_path, [f"wait {gate}", "a"], "--nproc_per_node=2")
    process = start(["nohup", *MAIN, *words])
    wait_until(process, (tmp_path / "gate.waiting").exists)
    signal_all(process.pid, signal.SIGHUP)
    gate.touch()
    code, err = end(process)
    assert code == 0, err
    assert made(tmp_path) == [0, 1]


@pytest.mark.parametrize("name", ["one process", "two ranks"])
def test_a_batch_that_takes_longer_than_the_grace_is_abandoned(moody, tmp_path, name):
    words = job(moody, tmp_path, ["a", f"wait {tmp_path / 'gate'}", "b"], "--grace_seconds=0.2")
    process = start([*STARTS[name], *words])
    wait_until(process, (tmp_path / "gate.waiting").exists)
    process.send_signal(signal.SIGINT)
    code, err = end(process)
    assert code == 130, err
    assert made(tmp_path) in ([0], [0, 2])
    assert status(tmp_path / "out")["state"] == "stopped"
    assert not (tmp_path / "out/failures.jsonl").exists(), "nobody failed"


@pytest.mark.parametrize("name", ["one process", "two ranks"])
def test_a_second_signal_ends_at_once(moody, tmp_path, name):
    words = job(moody, tmp_path, [f"wait {tmp_path / 'gate'}", "a"], "--grace_seconds=3600")
    process = start([*STARTS[name], *words])
    wait_until(process, (tmp_path / "gate.waiting").exists)
    process.send_signal(signal.SIGTERM)
    wait_for_words(process, "Send it again to exit immediately")
    time.sleep(COPY_SECONDS + 0.5)  # sooner, it is taken for a copy of the first
    process.send_signal(signal.SIGTERM)
    code, err = end(process)
    assert code == 75, err


def test_library_functions_install_no_handlers(moody, tmp_path):
    from ddinfer.config import JobConfig
    from ddinfer.job.run import run_job

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    seen = []

    class Watching(JobConfig):
        def to_dict(self):
            seen.append([signal.getsignal(number) for number in numbers])
            return super().to_dict()

    config = Watching(
        model=moody, output=str(tmp_path), prompt=("a",), trust_remote_code=True, device="cpu"
    )
    run_job(config)
    assert seen == [before]
    assert [signal.getsignal(number) for number in numbers] == before


# --- stalls -------------------------------------------------------------------------------------


def rank_processes(launcher):
    """Process ids of the ranks, in rank order: they are forked one after the other."""
    return sorted(ranks_of(launcher.pid))


def test_a_frozen_rank_ends_the_attempt_and_the_next_one_makes_the_rest(moody, tmp_path):
    prompts = ["a", "b", f"wait {tmp_path / 'gate'}", "c"]
    more = ["--nproc_per_node=2", "--stuck_timeout=6", "--max_restarts=1"]
    process = start([*MAIN, *job(moody, tmp_path, prompts, *more)])
    wait_until(process, (tmp_path / "gate.waiting").exists)
    os.kill(rank_processes(process)[1], signal.SIGSTOP)
    (tmp_path / "gate").touch()
    code, err = end(process)
    assert code == 0, err
    assert "rank 1 failed while running prompt 2" in err
    assert "no progress for" in err
    assert verify(Files(), str(tmp_path / "out")).is_good
    assert "death" not in "".join(f.read_text() for f in tmp_path.glob("out/journal/*"))


def test_a_stalled_rank_shows_where_each_of_its_threads_is(moody, tmp_path):
    prompts = ["a", "b", f"wait {tmp_path / 'gate'}", "c"]
    more = ["--nproc_per_node=2", "--stuck_timeout=6", "--max_restarts=1"]
    process = start([*MAIN, *job(moody, tmp_path, prompts, *more)])
    said = wait_for_words(process, "restart 1 of 1")
    (tmp_path / "gate").touch()
    code, err = end(process)
    assert code == 0, said + err
    assert "rank 1 failed while running prompt 2" in said
    assert "most recent call first" in said
    assert re.search(r"line \d+ in hold\b", said), said
    assert verify(Files(), str(tmp_path / "out")).is_good


def test_a_rank_that_stalls_inside_a_c_call_ends_too(moody, tmp_path):
    """It holds the interpreter: no Python thread of that process can run."""
    prompts = ["a", "b", f"stall {tmp_path / 'held'}", "c"]
    more = ["--nproc_per_node=2", "--stuck_timeout=6", "--max_restarts=1"]
    done = run([*MAIN, *job(moody, tmp_path, prompts, *more)])
    assert done.returncode == 0, done.stderr
    assert "rank 1 failed while running prompt 2" in done.stderr
    assert "no progress for 6 s (--stuck_timeout), inside a C call; restart 1 of 1" in done.stderr
    assert re.search(r"line \d+ in hold_interpreter\b", done.stderr), "the stacks say where"
    assert verify(Files(), str(tmp_path / "out")).is_good


@pytest.mark.nightly
def test_a_rank_that_stalls_for_a_minute_is_named(moody, tmp_path):
    """Without options: a warning with the stacks and no more. The job ends well once it goes on."""
    prompts = ["a", f"wait {tmp_path / 'first'}", "b", f"wait {tmp_path / 'second'}"]
    process = start([*MAIN, *job(moody, tmp_path, prompts, "--nproc_per_node=2")])
    wait_until(process, (tmp_path / "second.waiting").exists)
    stalled = time.monotonic()
    said = wait_for_words(process, "rank 1 has been running prompt 3 ", "without a step", "in hold")
    assert time.monotonic() - stalled >= WARN_SECONDS - 2
    assert re.search(r"rank 1 has been running prompt 3 \(id \S+\) for 6\d s without a step", said)
    (tmp_path / "first").touch()
    (tmp_path / "second").touch()
    code, err = end(process)
    assert code == 0, said + err
    assert is_whole(tmp_path)


@pytest.mark.nightly
def test_a_rank_that_is_suspended_for_a_minute_is_named_by_the_others(moody, tmp_path):
    process = start(
        [*MAIN, *job(moody, tmp_path, ["a", f"wait {tmp_path / 'gate'}"], "--nproc_per_node=2")]
    )
    wait_until(process, (tmp_path / "gate.waiting").exists)
    rank = rank_processes(process)[1]
    os.kill(rank, signal.SIGSTOP)
    said = wait_for_words(
        process, "rank 1 has been running prompt 1 ", "(suspended by SIGSTOP) for 6"
    )
    os.kill(rank, signal.SIGCONT)
    (tmp_path / "gate").touch()
    code, err = end(process)
    assert code == 0, said + err


def test_a_slow_rank_alone_ends_no_job(moody, tmp_path):
    """Rank 0 is done and waits for longer than the timeout; rank 1 is slow, but moves."""
    prompts = ["a"] * 6 + ["sleep 1.5"] * 6
    more = ["--nproc_per_node=2", "--stuck_timeout=6"]
    done = run([*MAIN, *job(moody, tmp_path, prompts, *more)])
    assert done.returncode == 0, done.stderr


def test_a_denoiser_is_heard(tmp_path):
    from ddinfer.engines.whole import WholeEngine
    from ddinfer.models.loading import load_pipeline
    from tests.tiny_pipelines import call_arguments, tiny_pipeline

    pipe = load_pipeline(tiny_pipeline("sd", tmp_path))
    watchdog = Watchdog(Group.alone())
    WholeEngine(pipe).set_progress_listener(watchdog)
    pipe("a cat", **{**call_arguments("sd"), "num_inference_steps": 3})
    assert watchdog.count == 3 + 1, "three steps and one decoding"
    assert watchdog.is_decoding


def test_both_denoisers_of_a_pipeline_are_heard(tmp_path):
    from ddinfer.engines.whole import WholeEngine
    from ddinfer.models.loading import denoisers, load_pipeline
    from tests.tiny_pipelines import call_arguments, tiny_pipeline

    pipe = load_pipeline(tiny_pipeline("wan", tmp_path))
    pipe.register_modules(transformer_2=load_pipeline(tiny_pipeline("wan", tmp_path)).transformer)
    pipe.register_to_config(boundary_ratio=0.5)  # Wan 2.2: the second one takes the later steps
    assert list(denoisers(pipe)) == ["transformer", "transformer_2"]
    watchdog = Watchdog(Group.alone())
    WholeEngine(pipe).set_progress_listener(watchdog)
    steps = [0]
    pipe.transformer_2.register_forward_pre_hook(lambda *_: steps.append(1))
    pipe("a cat", output_type="latent", **{**call_arguments("wan"), "num_inference_steps": 8})
    assert sum(steps) > 0
    assert watchdog.count == 8 * 2, "every step, with and without the negative prompt"


def test_only_a_busy_rank_whose_state_does_not_change_is_stalled(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("ddinfer.job.watchdog.time.monotonic", lambda: now[0])
    ended = []
    monkeypatch.setattr("ddinfer.job.watchdog.exit_now", ended.append)
    group = Group.alone()
    watchdog = Watchdog(group, stuck_timeout=30)

    def is_stalled_after(seconds):
        now[0] += seconds
        watchdog._check_self()
        return bool(ended)

    group.enter("running", "prompt 3")
    try:
        assert not is_stalled_after(1)
        assert not is_stalled_after(29)
        watchdog.steps()
        assert not is_stalled_after(29)
        group.enter("gathering")
        assert not is_stalled_after(1000), "it waits for others"
        group.enter("saving")
        assert not is_stalled_after(1)
        watchdog.waits()
        assert not is_stalled_after(1000), "it waits for others"
        watchdog.decodes()
        with watchdog.awaiting():
            assert not is_stalled_after(1)
            assert not is_stalled_after(59), "the stage that it awaits is given up first"
            assert is_stalled_after(1)
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert group.first_failure().record.message == "no progress for 30 s (--stuck_timeout)"
