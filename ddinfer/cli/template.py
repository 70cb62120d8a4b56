"""``ddinfer template slurm|k8s|torchrun``: print a script that starts a job on a cluster."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Literal

import tyro

from ddinfer.cli.command import parse
from ddinfer.cli.options import parse_config
from ddinfer.config import JobConfig
from ddinfer.errors import EXIT_OK, UsageError

FILES = {"slurm": "slurm.sbatch", "k8s": "k8s.yaml", "torchrun": "torchrun.sh"}

#: Names that Kubernetes and Slurm accept.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,50}[a-z0-9])?")


@dataclass(frozen=True)
class TemplateOptions:
    """Print a script that starts a job on a cluster. The job's options follow after --."""

    kind: Annotated[Literal["slurm", "k8s", "torchrun"], tyro.conf.Positional]
    """What starts the job."""
    nodes: int = 1
    """Number of machines (pods)."""
    nproc_per_node: int = 8
    """Ranks on each machine: one per GPU."""
    name: str = "ddinfer"
    """Name of the job: lower-case letters, digits and -."""
    time: str = "24:00:00"
    """Slurm: time limit of an allocation."""
    host: str = "localhost"
    """torchrun: rendezvous host, if there are several machines."""
    max_restarts: int = 20
    """How many times an interrupted job is restarted."""
    image: str = "ddinfer:latest"
    """Kubernetes: container image with ddinfer installed."""
    claim: str = "shared"
    """Kubernetes: persistent volume claim with model, prompts and output."""
    mount: str = "/shared"
    """Kubernetes: where the claim is mounted."""


def main(argv: Sequence[str]) -> int:
    words = list(argv)
    ours, job = words, []
    if "--" in words:
        cut = words.index("--")
        ours, job = words[:cut], words[cut + 1 :]
    options = parse(TemplateOptions, "template", ours)
    sys.stdout.write(fill(options, job))
    return EXIT_OK


def fill(options: TemplateOptions, job: Sequence[str]) -> str:
    """The script of ``options.kind`` for ``ddinfer *job``.

    Raises:
        UsageError: an option with which the script would not work.
    """
    config = parse_config(job)
    _check(options, config, job)
    on_gpus = config.device != "cpu"
    rendezvous = "--standalone"
    if options.nodes > 1:
        rendezvous = (
            f"--nnodes={options.nodes} --rdzv_backend=c10d --rdzv_id={options.name} "
            f"--rdzv_endpoint={shlex.quote(options.host)}:29500"
        )
    limits = f'{{limits: {{"nvidia.com/gpu": {options.nproc_per_node}}}}}'
    values = {
        "nodes": options.nodes,
        "ranks": options.nproc_per_node,
        "name": options.name,
        "time": options.time,
        "max_restarts": options.max_restarts,
        "backoff": options.max_restarts * options.nodes,
        "image": options.image,
        "claim": options.claim,
        "mount": options.mount,
        "rendezvous": rendezvous,
        "gpu_line": f"#SBATCH --gpus-per-node={options.nproc_per_node}" if on_gpus else None,
        "resources": f"          resources: {limits}" if on_gpus else None,
        "status": shlex.quote(os.path.join(config.output, "status.json")),
        "command": shlex.join(job),
    }
    text = (files("ddinfer.cli") / "templates" / FILES[options.kind]).read_text(encoding="utf-8")
    for name, value in values.items():
        # A line whose value is None is removed.
        found = f"@{name}@\n" if value is None else f"@{name}@"
        text = text.replace(found, "" if value is None else str(value))
    return text


def _check(options: TemplateOptions, config: JobConfig, job: Sequence[str]) -> None:
    for name in ("nodes", "nproc_per_node"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)} must be at least 1")
    if options.max_restarts < 0:
        raise UsageError(f"--max_restarts {options.max_restarts} must be at least 0")
    if not _NAME.fullmatch(options.name):
        raise UsageError(
            f"--name {options.name!r} must be lower-case letters, digits and -, at most 52, "
            "starting with a letter"
        )
    for name in ("time", "host", "image", "claim", "mount"):
        value = getattr(options, name)
        if not re.fullmatch(r"[\w./:@-]+", value):
            raise UsageError(f"--{name} {value!r} has characters that a script cannot contain")
    if any("\n" in word for word in job):
        raise UsageError("a script cannot contain a line break; put the prompts into a file")
    if config.overwrite:
        raise UsageError(
            "--overwrite in a script would delete the images whenever the job is restarted; "
            "choose a new --output"
        )
    if config.nproc_per_node is not None:
        raise UsageError("pass --nproc_per_node before --, not after it")
    for name, path in (("output", config.output), ("prompts", config.prompts)):
        if path is not None and not os.path.isabs(path):
            raise UsageError(
                f"--{name} {path!r} must be an absolute path, since every machine and "
                "every restart must find it: ddinfer template … -- --output /shared/out …"
            )
