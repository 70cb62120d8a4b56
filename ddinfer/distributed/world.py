"""The state of the world as a value: detected once, passed on. Imports torch only for GPUs."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ddinfer.distributed.devices import Gpus
from ddinfer.errors import UsageError

#: What torchrun sets, and every rank needs. All of them or none.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

#: What MASTER_ADDR is where all ranks are on one machine, and only there.
LOOPBACK_NAMES = ("127.0.0.1", "localhost")

_SLURM_TASKS = "SLURM_STEP_TASKS_PER_NODE"

#: Launchers that start copies without torch's variables: their number of ranks → the launcher's
#: name, and the number of ranks on this machine.
_OTHER_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": ("srun", _SLURM_TASKS),
    "OMPI_COMM_WORLD_SIZE": ("mpirun", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "PMI_SIZE": ("mpiexec", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True)
class World:
    """Who this process is among the ranks of a job.

    Attributes:
        rank: global, 0-based; picks the share of the work.
        local_rank: among the ranks of this machine; picks the device.
        local_world_size: ranks on this machine.
        num_nodes: machines.
        device: ``cpu`` or ``cuda:N``, where this rank computes (the first of its `devices`).
        gpus_per_rank: a rank with local rank l drives GPUs l·g … l·g + g − 1.
        run_id: of the launch, equal on all ranks; keeps apart jobs that share a store.
        restart_count: how often the launcher has restarted its ranks.
        max_restarts: how often torchrun would restart them; 0 with our own launcher.
        is_launched: a launcher made this a rank, or a process group exists.
        store_address: ``host:port`` of the store; empty for a process alone.
        launcher_hosts_store: as torchrun and `launch` do; else rank 0 hosts it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    num_nodes: int = 1
    device: str = "cpu"
    gpus_per_rank: int = 1
    run_id: str = ""
    restart_count: int = 0
    max_restarts: int = 0
    is_launched: bool = False
    store_address: str = ""
    launcher_hosts_store: bool = False

    @classmethod
    def detect(
        cls,
        device: str = "auto",
        environ: Mapping[str, str] | None = None,
        *,
        gpus_per_rank: int = 1,
        gpus: Gpus | None = None,
    ) -> World:
        """Read the live process group, else the environment. Nothing else reads them.

        Args:
            device: ``auto`` (this rank's GPU where GPUs are usable, else the CPU), ``cpu``,
                ``cuda``, or ``cuda:N`` for a machine's only rank.
            environ: default ``os.environ``.
            gpus: what the machine has; default: looked up when ``device`` asks for it.

        Raises:
            UsageError: a half-set environment, fewer GPUs than ranks need, or a GPU that is
                there and that this torch cannot use.
        """
        environ = os.environ if environ is None else environ
        world = _from_live_group(environ) or from_environment(environ)
        chosen = pick_device(
            device, world.local_rank, world.local_world_size, gpus_per_rank, environ, gpus
        )
        return replace(world, device=chosen, gpus_per_rank=gpus_per_rank)

    @property
    def devices(self) -> tuple[str, ...]:
        """All devices that this rank drives, `device` first."""
        if not self.device.startswith("cuda:"):
            return (self.device,)
        first = int(self.device.removeprefix("cuda:"))
        return tuple(f"cuda:{first + k}" for k in range(self.gpus_per_rank))


def from_environment(environ: Mapping[str, str]) -> World:
    """The world that a launcher's variables describe; a world of one where there are none.

    Raises:
        UsageError: some are set and others are not, or they contradict one another.
    """
    given = {name: environ[name] for name in RANK_VARIABLES if environ.get(name)}
    missing = [name for name in RANK_VARIABLES if name not in given]
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & given.keys():
        _refuse_other_launchers(environ)
        return World()
    if missing:
        raise UsageError(
            f"incomplete distributed environment: found "
            f"{', '.join(f'{name}={value}' for name, value in given.items())}; missing: "
            f"{', '.join(missing)}. Start the ranks with torchrun (or with --nproc_per_node), set "
            f"all of {', '.join(RANK_VARIABLES)}, or unset {', '.join(given)} to run alone"
        )
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    local_rank = _number(environ, "LOCAL_RANK")
    local_world_size = _ranks_per_machine(environ, world_size)
    if local_world_size is None:
        raise UsageError(
            f"LOCAL_WORLD_SIZE is missing: WORLD_SIZE={world_size} and "
            f"MASTER_ADDR={environ['MASTER_ADDR']} do not determine the number of ranks on this "
            "machine. Set LOCAL_WORLD_SIZE to that number for each rank, as torchrun does"
        )
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise UsageError(
            f"contradictory distributed environment: RANK={rank} of WORLD_SIZE={world_size}, "
            f"LOCAL_RANK={local_rank} of LOCAL_WORLD_SIZE={local_world_size}; expected "
            "0 <= RANK < WORLD_SIZE and 0 <= LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE"
        )
    return replace(
        _launched(environ, rank, world_size, local_rank, local_world_size),
        store_address=f"{environ['MASTER_ADDR']}:{_number(environ, 'MASTER_PORT')}",
        launcher_hosts_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _launched(
    environ: Mapping[str, str], rank: int, world_size: int, local_rank: int, local_world_size: int
) -> World:
    num_nodes = 1 if local_world_size >= world_size else max(2, world_size // local_world_size)
    return World(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        num_nodes=_number(environ, "GROUP_WORLD_SIZE", num_nodes),
        run_id=environ.get("TORCHELASTIC_RUN_ID", ""),
        restart_count=_number(environ, "TORCHELASTIC_RESTART_COUNT", 0),
        max_restarts=_number(environ, "TORCHELASTIC_MAX_RESTARTS", 0),
        is_launched=True,
    )


def pick_device(
    device: str,
    local_rank: int,
    ranks_per_machine: int,
    gpus_per_rank: int = 1,
    environ: Mapping[str, str] | None = None,
    gpus: Gpus | None = None,
) -> str:
    """``auto|cpu|cuda|cuda:N`` → ``cpu`` or ``cuda:N`` for one rank of this machine.

    Raises:
        UsageError: the machine cannot give these ranks their devices.
    """
    kind, index = parse_device(device)
    if kind == "cpu":
        return "cpu"
    gpus = Gpus.probe(environ) if gpus is None else gpus
    unusable = gpus.why_unusable()
    if unusable:
        raise UsageError(unusable)
    if not gpus.usable:
        if kind == "auto":
            return "cpu"
        raise UsageError(
            f"--device {device} needs a GPU and this machine shows none"
            + (f" to torch {gpus.torch_version}" if gpus.torch_version else "")
            + "; use --device cpu"
        )
    if index is None:
        _check_gpus_suffice(ranks_per_machine, gpus_per_rank, gpus.usable)
        return f"cuda:{local_rank * gpus_per_rank}"
    if ranks_per_machine > 1 or gpus_per_rank > 1:
        raise UsageError(
            f"--device {device} is one GPU, but there are {ranks_per_machine} ranks with "
            f"{gpus_per_rank} each on this machine; use --device cuda, and CUDA_VISIBLE_DEVICES to "
            "choose GPUs"
        )
    if index >= gpus.usable:
        raise UsageError(
            f"--device {device} is not there: this machine shows {gpus.usable} GPUs, "
            f"cuda:0 … cuda:{gpus.usable - 1}"
        )
    return f"cuda:{index}"


def parse_device(device: str) -> tuple[str, int | None]:
    """``"cuda:1"`` → ``("cuda", 1)``; ``"auto"``, ``"cpu"`` and ``"cuda"`` without a number."""
    kind, colon, number = device.partition(":")
    if kind in ("auto", "cpu") and not colon:
        return kind, None
    if kind == "cuda" and (not colon or number.isdigit()):
        return kind, int(number) if colon else None
    raise UsageError(f"--device {device!r} must be auto, cpu, cuda or cuda:N")


def _check_gpus_suffice(ranks_per_machine: int, gpus_per_rank: int, usable: int) -> None:
    """Raise, with the largest number of ranks that fits, unless every rank has its own GPUs."""
    needed = ranks_per_machine * gpus_per_rank
    if needed <= usable:
        return
    each = "" if gpus_per_rank == 1 else f" with --gpus_per_rank={gpus_per_rank}"
    fitting = usable // gpus_per_rank
    fix = f"use --nproc_per_node={fitting}" if fitting else f"use --gpus_per_rank={usable}"
    raise UsageError(
        f"--nproc_per_node={ranks_per_machine}{each} needs {needed} GPU{'s' * (needed > 1)}, this "
        f"machine shows {usable}; {fix} or --device cpu"
    )


def _from_live_group(environ: Mapping[str, str]) -> World | None:
    """The caller's process group; the environment adds what it lacks."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_initialized():
        return None
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local_world_size = _ranks_per_machine(environ, world_size) or world_size
    local_rank = _number(environ, "LOCAL_RANK", rank % local_world_size)
    return _launched(environ, rank, world_size, local_rank, local_world_size)


def _ranks_per_machine(environ: Mapping[str, str], world_size: int) -> int | None:
    """Ranks on this machine, by torchrun, srun or mpirun; ``None`` if unknown."""
    if environ.get("LOCAL_WORLD_SIZE"):
        return _number(environ, "LOCAL_WORLD_SIZE")
    if environ.get("GROUP_WORLD_SIZE"):
        return max(1, world_size // max(1, _number(environ, "GROUP_WORLD_SIZE")))
    for total, (_, here) in _OTHER_LAUNCHERS.items():  # where it started exactly these ranks
        if environ.get(total) == str(world_size) and environ.get(here):
            return _slurm_tasks(environ) if here == _SLURM_TASKS else _number(environ, here)
    if world_size == 1 or environ.get("MASTER_ADDR") in LOOPBACK_NAMES:
        return world_size
    return None


def _slurm_tasks(environ: Mapping[str, str]) -> int:
    """``2(x3),1``: two tasks on each of three machines, one on the fourth."""
    counts: list[int] = []
    for part in environ[_SLURM_TASKS].split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise UsageError(f"environment variable {_SLURM_TASKS}={environ[_SLURM_TASKS]!r}")
        counts += [int(found[1])] * int(found[2] or 1)
    node = _number(environ, "SLURM_NODEID", 0)
    if node >= len(counts):
        raise UsageError(
            f"SLURM_NODEID={node}, but {_SLURM_TASKS}={environ[_SLURM_TASKS]} is about "
            f"{len(counts)} machines; set LOCAL_WORLD_SIZE to the number of ranks on this machine"
        )
    return counts[node]


def _refuse_other_launchers(environ: Mapping[str, str]) -> None:
    """srun and mpirun start N copies; without torch's variables each would do all the work."""
    for name, (launcher, _) in _OTHER_LAUNCHERS.items():
        copies = environ.get(name, "")
        if copies.isdigit() and int(copies) > 1:
            raise UsageError(
                f"{launcher} started {copies} copies of this program ({name}={copies}), but none "
                f"of {', '.join(RANK_VARIABLES)} is set, so that each would do all the work. "
                "Start one torchrun on each machine, or set these variables for each copy"
            )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if not text and default is not None:
        return default
    try:
        return int(str(text))
    except ValueError:
        raise UsageError(f"environment variable {name}={text!r} is not a number") from None
