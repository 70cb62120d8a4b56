"""The cluster scripts: filled in, run with stand-ins for the cluster, and their YAML checked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from ddinfer.cli import dispatch
from ddinfer.cli.template import TemplateOptions, fill
from ddinfer.errors import UsageError
from tests.moody_pipeline import moody_pipeline
from tests.test_launch import two_hosts

ROOT = Path(__file__).parent.parent
HANG_SECONDS = 240
JOB = ["--output", "/shared/out", "--steps", "3"]


@pytest.fixture(scope="module")
def moody(tmp_path_factory):
    return str(moody_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture
def bin_folder(tmp_path):
    """In front of the path: stand-ins for what a cluster has, and this environment's python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in(folder, "python", f'exec {sys.executable} "$@"')
    stand_in(folder, "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    return folder


def stand_in(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def bash(script, bin_folder, **environ):
    return subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        env={
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            **environ,
        },
    )


def moody_job(moody, output, *prompts):
    options = ["--model", moody, "--trust_remote_code", "--device", "cpu", "--num_threads", "1"]
    for prompt in prompts:
        options += ["--prompt", prompt]
    return [*options, "--output", str(output)]


def num_images(output):
    return len(list(output.glob("images/*/*.png")))


# The command


def test_the_command_prints_the_script(capsys):
    arguments = ["--nodes", "2", "--nproc-per-node", "4", "--name", "big-job", "--time", "1:00:00"]
    assert dispatch(["template", "slurm", *arguments, "--", *JOB, "--prompt", "a 'dog'"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --job-name=big-job\n#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in script
    assert "#SBATCH --gpus-per-node=4\n#SBATCH --time=1:00:00\n" in script
    assert "--steps 3 --prompt 'a '\"'\"'dog'\"'\"''" in script
    assert "@" not in script.replace("TERM@120", "")


@pytest.mark.parametrize("kind", ["slurm", "k8s", "torchrun"])
def test_nothing_is_left_to_fill_in_and_cpu_jobs_ask_for_no_gpu(kind):
    for job in (JOB, [*JOB, "--device", "cpu"]):
        script = fill(TemplateOptions(kind, nodes=2), job)
        assert "@" not in script.replace("TERM@120", "")
        if kind != "torchrun":
            assert ("gpu" in script) == ("cpu" not in job)


@pytest.mark.parametrize(
    ("options", "job", "message"),
    [
        ({"nodes": 0}, JOB, "--nodes 0 must be at least 1"),
        ({"nproc_per_node": 0}, JOB, "--nproc_per_node 0 must be at least 1"),
        ({"max_restarts": -1}, JOB, "--max_restarts -1 must be at least 0"),
        ({"name": "My Job"}, JOB, "--name 'My Job' must be lower-case letters"),
        ({"image": "a; rm"}, JOB, "--image 'a; rm' has characters that a script cannot contain"),
        ({}, ["--output", "out"], "--output 'out' must be an absolute path"),
        ({}, [*JOB, "--prompts", "p.txt"], "--prompts 'p.txt' must be an absolute path"),
        ({}, [*JOB, "--prompt", "a\nb"], "cannot contain a line break"),
        ({}, [*JOB, "--overwrite"], "--overwrite in a script would delete the images"),
        ({}, [*JOB, "--nproc_per_node", "2"], "pass --nproc_per_node before --"),
    ],
)
def test_what_a_script_could_not_work_with_is_told_now(options, job, message):
    with pytest.raises(UsageError) as caught:
        fill(TemplateOptions("slurm", **options), job)
    assert message in str(caught.value)


def test_a_misspelt_option_of_the_job_is_found_before_it_waits_in_a_queue(capsys):
    with pytest.raises(SystemExit):
        dispatch(["template", "slurm", "--", *JOB, "--guidence_scale", "3"])
    assert "guidance_scale" in capsys.readouterr().err


# Slurm


def slurm_cluster(bin_folder, hosts, log):
    """srun runs the command once on each host; scontrol knows them and writes down what it does."""
    stand_in(
        bin_folder,
        "scontrol",
        f'[ "$1 $2" = "show hostnames" ] && echo 10.213.7.1 || echo "$@" >> {log}',
    )
    lines = ['[ "$1" = --wait=300 ] || exit 9', "shift", "pids="]
    for node, (inside, interface) in enumerate(hosts):
        # Two namespaces share one host name; on real machines torchrun finds these by itself.
        environ = f"GLOO_SOCKET_IFNAME={interface} PET_LOCAL_ADDR=10.213.7.{node + 1} "
        environ += f"PET_NODE_RANK={node} PET_RDZV_CONF=is_host={1 - node}"
        lines += [f'env {environ} {" ".join(inside)} "$@" &', 'pids="$pids $!"']
    lines += ["code=0", 'for pid in $pids; do wait "$pid" || code=1; done', "exit $code"]
    stand_in(bin_folder, "srun", "\n".join(lines))


def test_the_slurm_script_runs_a_job_on_two_hosts(moody, bin_folder, tmp_path):
    output, log = tmp_path / "my out", tmp_path / "log"
    job = moody_job(moody, output, "x", "y", "z")
    script = fill(TemplateOptions("slurm", nodes=2, nproc_per_node=1), job)
    with two_hosts() as hosts:
        slurm_cluster(bin_folder, hosts, log)
        ended = bash(script, bin_folder, SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]")
    assert ended.returncode == 0, ended.stderr
    assert num_images(output) == 3
    status = json.loads((output / "status.json").read_text())
    assert (status["state"], status["world_size"]) == ("finished", 2)
    assert not log.exists()


@pytest.mark.parametrize(
    ("status", "restarts", "exit_code", "is_requeued"),
    [
        ({"state": "stopped", "exit_code": 75}, 0, 75, True),
        ({"state": "running"}, 0, 75, True),  # killed before it could say anything
        ({"state": "stopped", "exit_code": 75}, 20, 75, False),
        ({"state": "finished", "exit_code": 3}, 0, 3, False),
        ({"state": "stopped", "exit_code": 74}, 0, 74, False),
        (None, 0, 1, False),  # no job was opened: the options were wrong
    ],
)
def test_the_slurm_script_goes_back_into_the_queue_when_interrupted(
    bin_folder, tmp_path, status, restarts, exit_code, is_requeued
):
    if status is not None:
        (tmp_path / "status.json").write_text(json.dumps(status))
    log = tmp_path / "log"
    slurm_cluster(bin_folder, [], log)
    stand_in(bin_folder, "srun", "exit 1")
    script = fill(TemplateOptions("slurm"), ["--output", str(tmp_path)])
    environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
    ended = bash(script, bin_folder, SLURM_RESTART_COUNT=str(restarts), **environ)
    assert ended.returncode == exit_code, ended.stderr
    assert log.exists() == is_requeued
    if is_requeued:
        assert log.read_text() == "requeue 7\n"


# torchrun


def test_the_torchrun_script_tells_the_job_s_own_exit_code(moody, bin_folder, tmp_path):
    output = tmp_path / "out"
    job = moody_job(moody, output, "x", "fail it", "z")
    ended = bash(
        fill(TemplateOptions("torchrun", nproc_per_node=2, max_restarts=0), job), bin_folder
    )
    assert ended.returncode == 3, ended.stderr
    assert num_images(output) == 2


def test_on_several_machines_they_meet_at_the_named_host():
    script = fill(TemplateOptions("torchrun", nodes=2, host="first", name="mine"), JOB)
    assert "--nnodes=2 --rdzv_backend=c10d --rdzv_id=mine --rdzv_endpoint=first:29500" in script


# Kubernetes

#: The first in which podFailurePolicy is no beta.
OLDEST_KUBERNETES = "1.31"


def manifests(job, **options):
    return list(yaml.safe_load_all(fill(TemplateOptions("k8s", **options), job)))


def test_the_schema_would_find_a_misspelt_field():
    _, pods = manifests(JOB)
    pods["spec"]["podFailurePolicies"] = pods["spec"].pop("podFailurePolicy")
    with pytest.raises(kubernetes_validate.ValidationError, match="podFailurePolicies"):
        kubernetes_validate.validate(pods, OLDEST_KUBERNETES, strict=True)


@pytest.mark.parametrize("job", [JOB, [*JOB, "--device", "cpu", "--prompt", 'a "dog": #1']])
def test_the_manifests_keep_to_the_schema_and_fit_together(job):
    service, pods = manifests(job, nodes=3, nproc_per_node=4, name="mine", claim="data")
    for manifest in (service, pods):
        kubernetes_validate.validate(manifest, OLDEST_KUBERNETES, strict=True)
    spec, template = pods["spec"], pods["spec"]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 3, 3)
    # A policy on failures needs pods that are not restarted in place.
    assert template["restartPolicy"] == "Never"
    (container,) = template["containers"]
    (on_codes, on_conditions) = spec["podFailurePolicy"]["rules"]
    assert on_codes["onExitCodes"]["containerName"] == container["name"]
    assert set(on_codes["onExitCodes"]["values"]).isdisjoint({0, 70, 74, 75})
    assert on_conditions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    # The first pod's name, by which the others find it, is made of these three.
    assert service["spec"]["selector"] == {"job-name": pods["metadata"]["name"]}
    assert template["subdomain"] == service["metadata"]["name"]
    assert "--rdzv_endpoint=mine-0.mine:29500" in container["args"][0]
    assert service["spec"]["ports"][0]["port"] == 29500
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in template["volumes"]}
    assert template["volumes"][0]["persistentVolumeClaim"] == {"claimName": "data"}
    gpus = container.get("resources", {"limits": {"nvidia.com/gpu": 0}})["limits"]
    assert gpus == {"nvidia.com/gpu": 0 if "cpu" in job else 4}


@pytest.mark.parametrize(
    ("torchrun", "status", "exit_code"),
    [
        ("exit 0", None, 0),
        ("exit 1", {"exit_code": 3}, 3),
        ("exit 1", {"exit_code": 75}, 75),
        ("exit 1", {}, 75),
        ("exit 1", None, 1),
    ],
)
def test_the_pod_ends_with_the_job_s_own_exit_code(
    bin_folder, tmp_path, torchrun, status, exit_code
):
    if status is not None:
        (tmp_path / "status.json").write_text(json.dumps(status))
    stand_in(bin_folder, "torchrun", torchrun)
    _, pods = manifests(["--output", str(tmp_path)])
    (script,) = pods["spec"]["template"]["spec"]["containers"][0]["args"]
    ended = bash(script, bin_folder)
    assert ended.returncode == exit_code, ended.stderr


def test_the_pod_s_shell_passes_the_end_on_to_the_ranks(bin_folder, tmp_path):
    ready, heard = tmp_path / "ready", tmp_path / "heard"
    stand_in(
        bin_folder,
        "torchrun",
        f"trap 'touch {heard}; exit 1' TERM; touch {ready}\nwhile :; do sleep 0.05; done",
    )
    (tmp_path / "status.json").write_text('{"exit_code": 75}')
    _, pods = manifests(["--output", str(tmp_path)])
    (script,) = pods["spec"]["template"]["spec"]["containers"][0]["args"]
    drain = f"while [ ! -e {ready} ]; do sleep 0.05; done; kill -TERM $$"
    ended = bash(f"({drain}) &\n{script}", bin_folder)
    assert heard.exists()
    assert ended.returncode == 75


def test_the_shell_scripts_have_no_syntax_errors(bin_folder):
    for kind in ("slurm", "torchrun"):
        script = fill(TemplateOptions(kind, nodes=2), JOB)
        assert bash(f"bash -n <<'END'\n{script}\nEND", bin_folder).returncode == 0
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-s", "bash", "-"], input=script, text=True, check=True)
