"""Launching through real processes: started, failed, killed, orphaned, side by side."""

import ast
import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

from ddinfer.distributed.devices import Gpus, num_cores
from ddinfer.distributed.launch import launch
from ddinfer.distributed.process_group import process_group
from ddinfer.errors import RankError, UsageError

ROOT = Path(__file__).parent.parent
PROGRAM = str(Path(__file__).parent / "launched.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

#: A hang guard, several times what a launch takes on a busy machine.
HANG_SECONDS = 240.0
#: What ddinfer promises: ranks are gone this long after their launcher.
ORPHANS_SECONDS = 5.0


# As a function


def look_around(world, word):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")  # as a user's own code would
    everyone = [None] * world.world_size
    dist.all_gather_object(everyone, world.rank)
    dist.destroy_process_group()
    return {
        "world": (world.rank, world.world_size, world.local_rank, world.num_nodes, world.device),
        "word": word,
        "everyone": everyone,
        "threads": torch.get_num_threads(),
        "openmp": os.environ["OMP_NUM_THREADS"],
        "environment": sorted(n for n in os.environ if n.startswith(("TORCHELASTIC", "GROUP"))),
        "stdin": sys.stdin.read(),
    }


def test_ranks_see_what_torchrun_would_show_them_and_return_in_order(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    told = launch(look_around, "hello", nproc_per_node=2, device="cpu", num_threads=1)
    assert [t["world"] for t in told] == [(0, 2, 0, 1, "cpu"), (1, 2, 1, 1, "cpu")]
    for each in told:
        assert each["word"] == "hello"
        assert each["everyone"] == [0, 1]
        assert (each["threads"], each["openmp"], each["stdin"]) == (1, "1", "")
        assert {"GROUP_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"} <= set(
            each["environment"]
        )
    assert dict(os.environ) == before


def wait_policy(world):
    return os.environ.get("OMP_WAIT_POLICY")


def test_waiting_threads_sleep_only_where_ranks_share_cores(monkeypatch):
    cores = num_cores()
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert launch(wait_policy, nproc_per_node=1, device="cpu", num_threads=cores) == [None]
    crowded = {"nproc_per_node": 2, "device": "cpu", "num_threads": cores}
    assert launch(wait_policy, **crowded) == ["PASSIVE", "PASSIVE"]
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert launch(wait_policy, **crowded) == ["ACTIVE", "ACTIVE"]


def own_number(world):
    return world.rank


def parent_of(world):
    return os.getppid()


def test_later_launches_fork_from_the_same_server_without_importing_again():
    first, second = launch(parent_of, nproc_per_node=2, device="cpu")
    assert first == second != os.getpid()
    assert launch(parent_of, nproc_per_node=1, device="cpu") == [first]


def test_spawned_ranks_are_new_interpreters():
    found = launch(parent_of, nproc_per_node=2, device="cpu", start_method="spawn")
    assert found == [os.getpid()] * 2


def in_new_program(function, **environ):
    """What a function of this module returns in a program that has launched nothing yet."""
    code = f"from tests.test_launch import {function.__name__} as f; print(repr(f()))"
    ended = run([sys.executable, "-c", code], **environ)
    assert ended.returncode == 0, ended.stderr
    return ast.literal_eval(ended.stdout), ended.stderr


def after_opening_cuda(world):
    import torch

    found = {
        "lost": torch.cuda._is_in_bad_fork(),
        "counts by nvml": os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK"),
        "counted by nvml": getattr(sys.modules.get("tests.opens_cuda"), "COUNTED_BY_NVML", None),
    }
    with process_group(world) as group:
        return group.all_gather_object((world.rank, world.device, found))


def launch_after_opening_cuda(device, start_method="auto"):
    Gpus.probe = lambda *_: Gpus(usable=2, present=2)  # only the launcher sees them
    preload = ("torch", "tests.opens_cuda")
    more = {"num_threads": 1, "preload": preload, "start_method": start_method}
    return launch(after_opening_cuda, nproc_per_node=2, device=device, **more)


def cuda_opened_before_a_job_on_the_cpu():
    return launch_after_opening_cuda("cpu")


def cuda_opened_before_a_job_on_gpus():
    return launch_after_opening_cuda("auto")


def cuda_opened_where_ranks_must_be_forked():
    try:
        launch_after_opening_cuda("auto", "forkserver")
    except UsageError as error:
        return str(error)


def test_what_is_imported_before_the_fork_counts_gpus_without_opening_cuda():
    told, err = in_new_program(cuda_opened_before_a_job_on_the_cpu)
    assert told[0] == told[1]
    (_, _, first), (_, _, second) = told[0]
    assert first == second
    assert (first["counted by nvml"], first["counts by nvml"]) == ("1", None)
    assert first["lost"]  # it was forked, as a job on the CPU may be
    assert "opened CUDA" not in err


def test_ranks_are_spawned_where_a_fork_has_lost_the_gpus():
    told, err = in_new_program(cuda_opened_before_a_job_on_gpus, PYTORCH_NVML_BASED_CUDA_CHECK="0")
    assert told[0] == told[1]
    (zero, device, first), (one, _, second) = told[0]
    assert (zero, one, device) == (0, 1, "cpu")
    assert first == second
    # The user's own choice of how to count stands.
    assert first == {"lost": False, "counts by nvml": "0", "counted by nvml": None}
    assert err.count("has opened CUDA (torch, tests.opens_cuda; is NVML missing?)") == 1


def test_an_explicit_forkserver_that_has_lost_the_gpus_is_an_error():
    told, _ = in_new_program(cuda_opened_where_ranks_must_be_forked)
    assert "has opened CUDA" in told
    assert "use --start_method spawn" in told


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_failures_of_ranks_are_reported_whatever_started_them(method):
    with pytest.raises(RankError, match=r"rank 1 .*SIGKILL"):
        launch(kill_the_second, nproc_per_node=2, device="cpu", start_method=method)
    with pytest.raises(RankError, match=r"rank 0 .*no such picture"):
        launch(raise_on_the_first, nproc_per_node=2, device="cpu", start_method=method)


def kill_the_second(world):
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def raise_on_the_first(world):
    if world.rank == 0:
        raise ValueError("no such picture")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_ranks_use_the_gpu_after_diffusers_was_imported_before_the_fork(capfd):
    preload = ("transformers", "torch", "torch.distributed", "diffusers", "ddinfer.job.run")
    forked, total = launch(add_on_the_gpu, nproc_per_node=1, device="cuda", preload=preload)[0]
    assert (forked, total) == (True, 3.0)
    assert "opened CUDA" not in capfd.readouterr().err


def add_on_the_gpu(world):
    is_forked = "diffusers" in sys.modules
    return is_forked, torch.ones(3, device=world.device).sum().item()


def own_number_late(world):
    time.sleep(1)  # until the launcher has learnt of both starts
    return world.rank


def test_a_launcher_that_learns_of_an_end_before_the_last_message_takes_both(monkeypatch):
    """As if it got a CPU late: much is ready at once, and the ends come first."""

    def wait_late(objects, timeout=None):
        wait(objects, timeout)
        time.sleep(0.3)
        return list(reversed(wait(objects, 0)))

    monkeypatch.setattr("ddinfer.distributed.supervise.wait", wait_late)
    assert launch(own_number_late, nproc_per_node=2, device="cpu", num_threads=1) == [0, 1]


def imported_before_fork(file):
    import colorsys  # nothing else imports it

    with open(file, "a") as log:
        log.write(f"{os.getpid()} {colorsys.__name__}\n")
    raise ImportError("what the ranks would meet again")


def who_imported(world):
    return os.getpid(), os.getppid(), "colorsys" in sys.modules, gc.isenabled()


def launch_with_more_imports():
    before_fork = functools.partial(imported_before_fork, os.environ["LOG"])
    return launch(who_imported, nproc_per_node=2, device="cpu", before_fork=before_fork)


def test_what_depends_on_the_job_is_imported_once_where_the_ranks_are_forked(tmp_path):
    told, _ = in_new_program(launch_with_more_imports, LOG=str(tmp_path / "log"))
    (server, _), *more = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert not more
    assert all(parent == int(server) != pid for pid, parent, _, _ in told)
    assert all(has_module and collects for _, _, has_module, collects in told)


def say(world, word):
    print(word, flush=True)


def test_ranks_print_where_the_launcher_prints_now(capfd):
    launch(say, "first", nproc_per_node=1, device="cpu")
    assert capfd.readouterr().out == "first\n"
    launch(say, "second", nproc_per_node=1, device="cpu")
    assert capfd.readouterr().out == "second\n"


def test_ranks_print_where_another_test_captures(capfd):
    launch(say, "third", nproc_per_node=1, device="cpu")
    assert capfd.readouterr().out == "third\n"


def leave_a_child_behind(world):
    child = subprocess.Popen(["sleep", "600"])
    return child.pid


def test_what_a_rank_has_started_ends_with_it():
    (child,) = launch(leave_a_child_behind, nproc_per_node=1, device="cpu")
    await_end([child])


def lose_the_server(world):
    if world.rank == 1:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def lose_the_server_and_launch_again():
    with pytest.raises(RankError, match="the process that forks the ranks was killed"):
        launch(lose_the_server, nproc_per_node=2, device="cpu")
    return launch(own_number, nproc_per_node=2, device="cpu")


def test_a_forkserver_that_is_killed_is_named_and_the_next_launch_has_another():
    assert in_new_program(lose_the_server_and_launch_again)[0] == [0, 1]


def children_of_the_program():
    """A program's own children come from the same server, and react to signals as ever."""
    launch(own_number, nproc_per_node=1, device="cpu")
    child = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(600,))
    child.start()
    child.terminate()
    child.join(30)
    return child.exitcode


def test_other_children_of_the_program_react_to_signals_as_ever():
    assert in_new_program(children_of_the_program)[0] == -signal.SIGTERM


def return_a_lot(world):
    return bytes([world.rank]) * 30_000_000


def test_large_results_come_back_whole():
    assert [set(data) for data in launch(return_a_lot, nproc_per_node=2, device="cpu")] == [
        {0},
        {1},
    ]


def return_a_lock(world):
    import threading

    return threading.Lock()


def test_what_cannot_be_pickled_is_told_on_both_ways():
    with pytest.raises(UsageError, match="must stand at the top level of a module"):
        launch(lambda world: None, nproc_per_node=2, device="cpu")
    with pytest.raises(RankError, match="must return what can be pickled, not this lock"):
        launch(return_a_lock, nproc_per_node=1, device="cpu")


def fail_and_hear(world, folder, how):
    try:
        with process_group(world) as group:
            group.enter("running", f"prompt {10 + world.rank}")
            group.wait_for_peers()
            if world.rank == 1 and how == "raise":
                raise ZeroDivisionError("mine")
            if world.rank == 1 and how == "exit":
                os._exit(0)
            if world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            group.wait_for_peers()
    except RankError as error:
        Path(folder, f"heard-{world.rank}").write_text(str(error))
        raise


@pytest.mark.parametrize(
    ("how", "first_line"),
    [
        ("raise", "rank 1 failed while running: ZeroDivisionError: mine"),
        ("exit", "rank 1 exited with status 0 before its work was complete, while running"),
        ("kill", "rank 1 was killed by SIGKILL while running prompt 11"),
    ],
)
def test_the_first_failure_is_raised_by_the_launcher_and_on_every_rank(tmp_path, how, first_line):
    with pytest.raises(RankError) as caught:
        launch(fail_and_hear, str(tmp_path), how, nproc_per_node=3, device="cpu")
    assert str(caught.value).startswith(first_line)
    assert caught.value.rank == 1
    if how == "raise":
        assert "in fail_and_hear" in caught.value.record.traceback
    for rank in (0, 2):
        assert (tmp_path / f"heard-{rank}").read_text() == str(caught.value)


def die_alone(world):
    with process_group(world) as group:
        group.enter("running", "prompt 3")
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_only_rank_is_watched_too():
    with pytest.raises(RankError, match="rank 0 was killed by SIGKILL while running prompt 3"):
        launch(die_alone, nproc_per_node=1, device="cpu")


def finish_alone(world, folder):
    with process_group(world) as group:
        group.wait_for_peers()
        if world.rank == 0:
            raise ValueError("mine")
        for k in range(20):  # its own share, longer than the other's death takes to be known
            group.check_peers()
            time.sleep(0.1)
            Path(folder, f"made-{k}").touch()


def test_the_living_may_finish_their_own_share(tmp_path):
    with pytest.raises(RankError, match="rank 0 failed while starting: ValueError: mine"):
        launch(finish_alone, str(tmp_path), nproc_per_node=2, device="cpu", on_failure="finish")
    assert len(list(tmp_path.glob("made-*"))) == 20


def never_look(world, folder):
    if world.rank == 0:
        raise ValueError("mine")
    Path(folder, "pid").write_text(str(os.getpid()))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3600)


def test_a_rank_that_hears_nothing_is_killed_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("ddinfer.distributed.supervise.FAILURE_GRACE_SECONDS", 0.5)
    with pytest.raises(RankError, match="rank 0 failed while starting: ValueError: mine"):
        launch(never_look, str(tmp_path), nproc_per_node=2, device="cpu")
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from ddinfer.distributed.launch import launch\n"
        "def work(world): return world.rank\n"
        "print(launch(work, nproc_per_node=2, device='cpu'))\n"
    )
    ended = run([sys.executable, str(script)])
    assert ended.returncode != 0
    assert "put the call under  if __name__ == '__main__':" in ended.stderr
    script.write_text(script.read_text().replace("print(", "if __name__ == '__main__':\n  print("))
    assert run([sys.executable, str(script)]).stdout == "[0, 1]\n"


# As a command


@pytest.mark.parametrize(
    "command",
    [
        pytest.param([sys.executable, PROGRAM, "--nproc_per_node=2"], id="python"),
        pytest.param([*TORCHRUN, PROGRAM, "--nproc_per_node=2"], id="torchrun-script-option"),
        pytest.param([*TORCHRUN, "--nproc_per_node=2", PROGRAM], id="torchrun-option-script"),
    ],
)
def test_every_launcher_starts_the_same_two_ranks(tmp_path, command):
    ended = run([*command, "gather", str(tmp_path)])
    assert ended.returncode == 0, ended.stderr
    assert result(tmp_path) == [(0, 0, 2, "cuda:0"), (1, 1, 2, "cuda:1")]


def test_torchruns_own_restart_goes_on_with_all_ranks(tmp_path):
    command = [*TORCHRUN, "--max-restarts=1", "--nproc_per_node=2", PROGRAM]
    ended = run([*command, "restart", str(tmp_path)])
    assert ended.returncode == 0, ended.stderr
    assert [rank for rank, *_ in result(tmp_path)] == [0, 1]


def test_an_outer_and_an_inner_number_that_differ_end_with_both(tmp_path):
    command = [*TORCHRUN, "--nproc_per_node=2", PROGRAM, "--nproc_per_node=3"]
    ended = run([*command, "gather", str(tmp_path)])
    assert ended.returncode != 0
    assert "torchrun started 2 ranks on this machine" in ended.stderr
    assert "--nproc_per_node=3" in ended.stderr
    assert not (tmp_path / "result").exists()


def test_a_half_set_environment_ends_before_any_work(tmp_path):
    ended = run([sys.executable, PROGRAM, "gather", str(tmp_path)], RANK="0", MASTER_PORT="1")
    assert ended.returncode == 2
    assert "found RANK=0, MASTER_PORT=1; missing: WORLD_SIZE, LOCAL_RANK, MASTER_ADDR. Start" in (
        ended.stderr
    )


def test_a_killed_rank_is_named_with_its_signal_and_its_last_activity(tmp_path):
    with started([sys.executable, PROGRAM, "sleep", str(tmp_path), "--nproc_per_node=2"]) as job:
        pids = ranks_of(tmp_path, 2)
        os.kill(pids[1], signal.SIGKILL)
        _, stderr = job.communicate(timeout=HANG_SECONDS)
    assert job.returncode == 70
    assert "rank 1 was killed by SIGKILL while running prompt 3" in stderr
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("what", ["sleep", "compute"])
def test_ranks_end_with_their_launcher_however_it_ends(tmp_path, what):
    with started([sys.executable, PROGRAM, what, str(tmp_path), "--nproc_per_node=2"]) as job:
        pids = ranks_of(tmp_path, 2)
        job.kill()
        job.wait()
        await_end(pids)


@pytest.mark.parametrize("nested", [True, False])
def test_ranks_end_with_an_outer_torchrun_however_it_ends(tmp_path, nested):
    option, work = ["--nproc_per_node=2"], [PROGRAM, "sleep", str(tmp_path)]
    command = [*TORCHRUN, *work, *option] if nested else [*TORCHRUN, *option, *work]
    with started(command) as job:
        pids = ranks_of(tmp_path, 2)
        job.kill()
        job.wait()
        await_end(pids)


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGTERM, 75), (signal.SIGINT, -signal.SIGINT)]
)
def test_a_signal_to_the_launcher_ends_and_reaps_the_ranks(tmp_path, number, exit_code):
    with started([sys.executable, PROGRAM, "sleep", str(tmp_path), "--nproc_per_node=2"]) as job:
        pids = ranks_of(tmp_path, 2)
        job.send_signal(number)
        _, stderr = job.communicate(timeout=HANG_SECONDS)
    assert job.returncode == exit_code, stderr
    assert not any(map(is_alive, pids))


def test_two_jobs_run_side_by_side_and_listen_on_loopback_alone(tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    with contextlib.ExitStack() as stack:
        jobs = []
        for folder in folders:
            folder.mkdir()
            command = [sys.executable, PROGRAM, "meet", str(folder), "--nproc_per_node=2"]
            jobs.append(stack.enter_context(started(command)))
        for job, folder in zip(jobs, folders, strict=True):
            ours = [job.pid, *ranks_of(folder, 2)]
            addresses = {address for pid in ours for address in listening(pid)}
            assert addresses, "the store and gloo listen somewhere"
            assert all(address.startswith("127.") for address in addresses), addresses
        for folder in folders:
            (folder / "go").touch()
        for job in jobs:
            assert job.wait(timeout=HANG_SECONDS) == 0
    for folder in folders:
        assert [rank for rank, *_ in result(folder)] == [0, 1]


def test_ranks_of_torchrun_on_one_machine_listen_on_loopback_alone(tmp_path):
    with started([*TORCHRUN, "--nproc_per_node=2", PROGRAM, "meet", str(tmp_path)]) as job:
        addresses = {address for pid in ranks_of(tmp_path, 2) for address in listening(pid)}
        assert addresses
        assert all(address.startswith("127.") for address in addresses), addresses
        (tmp_path / "go").touch()
        assert job.wait(timeout=HANG_SECONDS) == 0


# Two hosts


def test_two_hosts_local_rank_picks_the_device_and_global_rank_the_share(tmp_path):
    with two_hosts() as hosts:
        jobs = []
        with contextlib.ExitStack() as stack:
            for node, (inside, interface) in enumerate(hosts):
                command = [*inside, *TORCHRUN, "--nnodes=2", "--nproc_per_node=2"]
                command += [f"--node_rank={node}", "--rdzv_backend=c10d", "--rdzv_id=test"]
                command += ["--rdzv_endpoint=10.213.7.1:29400", f"--local_addr=10.213.7.{node + 1}"]
                command += [f"--rdzv_conf=is_host={1 - node}"]  # their host name is the same
                command += [PROGRAM, "gather", str(tmp_path)]
                # A real host finds its interface by its name; these two share one host name.
                jobs.append(stack.enter_context(started(command, GLOO_SOCKET_IFNAME=interface)))
            for job in jobs:
                _, stderr = job.communicate(timeout=HANG_SECONDS)
                assert job.returncode == 0, stderr
    told = result(tmp_path)
    assert [rank for rank, *_ in told] == [0, 1, 2, 3]
    assert {world_size for *_, world_size, _ in told} == {4}
    assert [(local, device) for _, local, _, device in told] == [(0, "cuda:0"), (1, "cuda:1")] * 2


@contextlib.contextmanager
def two_hosts():
    """Two network namespaces with a cable between them → how to run a command in each."""
    names = [f"ddinfer-{os.getpid()}-{k}" for k in range(2)]
    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        first, second = names
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "eth0", "netns", second)
        for k, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.213.7.{k + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [(["ip", "netns", "exec", name], "eth0") for name in names]
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def ip(*arguments):
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("two hosts need the command ip (package iproute2), which is not installed")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two hosts need network namespaces: ip {arguments[0]}: {error.stderr.strip()}")


# Helpers


def environment(**more):
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {**environ, "OMP_WAIT_POLICY": "PASSIVE", **more}


def run(command, **environ):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=HANG_SECONDS, env=environment(**environ)
    )


@contextlib.contextmanager
def started(command, **environ):
    job = subprocess.Popen(
        command, stdout=-1, stderr=-1, text=True, env=environment(**environ), cwd="/"
    )
    try:
        yield job
    finally:
        job.kill()
        job.communicate()


def result(folder):
    return ast.literal_eval((folder / "result").read_text())


def ranks_of(folder, num_ranks):
    """Process ids of the ranks, once all have said them."""
    paths = [folder / f"pid-{rank}" for rank in range(num_ranks)]
    deadline = time.monotonic() + HANG_SECONDS
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [int(path.read_text()) for path in paths]


def await_end(pids):
    deadline = time.monotonic() + ORPHANS_SECONDS
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"orphans {ORPHANS_SECONDS:g} s after their launcher"
        time.sleep(0.02)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def listening(pid):
    """Addresses on which a process listens for TCP."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(fd).removeprefix("socket:[").rstrip("]"))
    found = set()
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(readable(fields[1].split(":")[0]))
    return found


def readable(address):
    """``0100007F`` → ``127.0.0.1``; another IPv6 address as it is."""
    if len(address) == 32 and address.startswith("0000000000000000FFFF0000"):
        address = address[24:]
    if len(address) == 32:
        return address
    return ".".join(str(byte) for byte in reversed(bytes.fromhex(address)))
