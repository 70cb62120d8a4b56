"""Two machines whose own names resolve to 127.0.1.1, as Debian and Ubuntu set them up.

Each is a network namespace with a host name and an /etc/hosts of its own.
"""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from tests.test_cli import HANG_SECONDS, MAIN, TORCHRUN, images, start, status

#: A small job of the embedded model.
JOB = ["--prompt=a red circle", "--prompt=a blue square", "--steps=1", "--device=cpu"]


@contextlib.contextmanager
def two_machines():
    """→ how to run a command on node1 and on node2."""
    spaces = {f"node{k}": f"ddinfer-{os.getpid()}-node{k}" for k in (1, 2)}
    address = {"node1": "10.213.8.1", "node2": "10.213.8.2"}
    with contextlib.ExitStack() as stack:
        for name, space in spaces.items():
            ip("netns", "add", space)
            stack.callback(subprocess.run, ["ip", "netns", "delete", space], check=False)
            others = [f"{address[other]} {other}" for other in spaces if other != name]
            hosts = Path("/etc/netns", space, "hosts")
            hosts.parent.mkdir(parents=True)
            stack.callback(hosts.parent.rmdir)
            hosts.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *others, ""]))
            stack.callback(hosts.unlink)
        first, second = spaces.values()
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "eth0", "netns", second)
        for name, space in spaces.items():
            ip("-n", space, "address", "add", f"{address[name]}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        named = 'hostname "$0" && exec "$@"'
        yield [
            ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", named, name]
            for name, space in spaces.items()
        ]


def ip(*arguments):
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("two machines need the command ip (package iproute2)")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"two machines need network namespaces: ip {arguments[0]}: {error.stderr}")


def check_job(processes, out):
    for process in processes:
        _, err = process.communicate(timeout=HANG_SECONDS)
        assert process.returncode == 0, err
    assert sorted(images(out)) == ["00000000.png", "00000001.png"]
    assert [rank["images"] for rank in status(out)["ranks"]] == [1, 1]


@pytest.mark.parametrize(
    "says_how_many",
    [
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
        pytest.param({"LOCAL_WORLD_SIZE": "1"}, marks=pytest.mark.nightly),
    ],
)
def test_the_usual_recipe_of_srun_works_with_the_first_machines_name(says_how_many, tmp_path):
    with two_machines() as machines:
        processes = []
        for rank, inside in enumerate(machines):
            recipe = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
            recipe |= {"MASTER_ADDR": "node1", "MASTER_PORT": "29517", "SLURM_NODEID": str(rank)}
            command = [*inside, *MAIN, *JOB, "--output", tmp_path / "out"]
            processes.append(start(command, **recipe, **says_how_many))
        check_job(processes, tmp_path / "out")


def test_torchrun_as_the_template_starts_it_needs_no_local_address(tmp_path):
    with two_machines() as machines:
        processes = []
        for inside in machines:
            launcher = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=a"]
            launcher += ["--rdzv_endpoint=node1:29400", "-m", "ddinfer"]
            command = [*inside, *TORCHRUN, *launcher, *JOB, "--output", tmp_path / "out"]
            processes.append(start(command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))
        check_job(processes, tmp_path / "out")


def test_ranks_of_one_machine_meet_at_another_loopback_address(tmp_path):
    processes = []
    for rank in "01":
        recipe = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        recipe |= {"MASTER_ADDR": "127.0.1.1", "MASTER_PORT": "29518"}
        processes.append(start([*MAIN, *JOB, "--output", tmp_path / "out"], **recipe))
    check_job(processes, tmp_path / "out")


def test_ranks_that_nobody_has_counted_are_an_error_that_names_the_variable(tmp_path):
    recipe = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "16", "MASTER_PORT": "29519"}
    command = [*MAIN, *JOB, "--output", tmp_path / "out"]
    process = start(command, **recipe, MASTER_ADDR="10.213.8.1")
    _, err = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 2
    assert "LOCAL_WORLD_SIZE is missing: WORLD_SIZE=16 and MASTER_ADDR=10.213.8.1" in err
