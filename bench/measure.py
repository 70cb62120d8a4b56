"""The harness: commands timed with all their processes, ways measured in turn, what ran them."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache" / "bench"
RESULTS = ROOT / "bench" / "results"
#: ddinfer's Python, and that of the environment where the competitors live.
PYTHON = sys.executable
COMPETITORS_PYTHON = str(ROOT / ".venv-bench" / "bin" / "python")

#: What is compared must be the same on both sides, or the comparison is about these.
SHARED_LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow", "safetensors")

T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """How much of a part is measured. ``quick`` shows that it works; its figures mean little."""

    name: str = "default"
    repetitions: int | None = None

    @property
    def is_quick(self) -> bool:
        return self.name == "quick"

    def pick(self, quick: T, default: T, full: T) -> T:
        return {"quick": quick, "default": default, "full": full}[self.name]

    def times(self, quick: int, default: int, full: int) -> int:
        """How often: as asked for on the command line, else by the size."""
        return self.repetitions or self.pick(quick, default, full)


# --- values and their spread --------------------------------------------------------------------


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest, highest, and how many."""
    return {
        "median": _rounded(statistics.median(values)),
        "low": _rounded(min(values)),
        "high": _rounded(max(values)),
        "n": len(values),
    }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Of values taken in turn: each round's own ratio, so that a busy minute hits both sides."""
    return summary([a / b for a, b in zip(ours, theirs, strict=True)])


def in_turn(
    ways: Mapping[str, Callable[[], T]], repetitions: int, note: str = ""
) -> dict[str, list[T]]:
    """A B C, A B C, …: ``repetitions`` results of each way."""
    made: dict[str, list[T]] = {name: [] for name in ways}
    for k in range(repetitions):
        for name, run in ways.items():
            progress(f"{note}{name}, {k + 1} of {repetitions}")
            made[name].append(run())
    return made


def progress(text: str) -> None:
    print(f"   {time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


# --- commands -----------------------------------------------------------------------------------


@dataclass
class Run:
    """One command, from its start until it and all processes below it have ended.

    Attributes:
        started: monotonic clock. ``started_at``: wall clock, to compare with files' times.
        seconds: until the command itself had ended.
        cpu_seconds: user and system time of all its processes.
        peak_bytes: highest memory of all processes together, where it was watched.
    """

    started: float
    started_at: float
    seconds: float
    cpu_seconds: float
    stdout: str
    peak_bytes: int = 0
    samples: list[tuple[float, int]] = field(default_factory=list, repr=False)


class CommandFailed(RuntimeError):
    """A measured command ended badly; its last lines are in the message."""


def run(
    command: Sequence[str],
    environ: Mapping[str, str] | None = None,
    *,
    cwd: Path = ROOT,
    memory_every_seconds: float | None = None,
    memory: Callable[[int], int] | None = None,
    expected: Sequence[int] = (0,),
    timeout_seconds: float = 1800,
) -> Run:
    """Run a command and account for everything that it started.

    Args:
        memory_every_seconds: how often to look at the memory of all its processes. A look costs
            milliseconds for each, so it is not for runs whose time counts.
        memory: process id → bytes of it and all processes below; `proportional_bytes` of each by
            default.

    Raises:
        CommandFailed: another exit code than ``expected``.
    """
    adopt_orphans()
    reap()
    cpu, at, started = _children_cpu_seconds(), time.time(), time.monotonic()
    with (
        subprocess.Popen(
            list(command),
            env=clean_environment(environ),
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as job,
        watching_memory(job.pid, memory_every_seconds, memory or tree_bytes) as samples,
    ):
        try:
            out, err = job.communicate(timeout=timeout_seconds)
        except BaseException:
            job.terminate()
            raise
        seconds = time.monotonic() - started
    reap()
    if job.returncode not in expected:
        raise CommandFailed(f"{' '.join(command)} ended with {job.returncode}:\n{err[-3000:]}")
    used = _children_cpu_seconds() - cpu
    peak = max((size for _, size in samples), default=0)
    return Run(started, at, seconds, used, out, peak, samples)


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment without what would steer threads or ranks, with nothing from the net."""
    dropped = ("OMP_", "MKL_", "KMP_", "GOMP_", "DDINFER_", "TORCHELASTIC_", "PYTHONPATH")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    return {**environ, "HF_HUB_OFFLINE": "1", **(more or {})}


def adopt_orphans() -> None:
    """Count processes too that outlive the one that started them (Linux)."""
    set_child_subreaper = 36  # prctl(2)
    ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)


def reap() -> None:
    """Wait for every adopted process, so that its CPU time is counted."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# --- memory -------------------------------------------------------------------------------------


def proportional_bytes(pid: int) -> int:
    """Proportional set size: shared pages are divided among the processes that have them."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0  # it has ended between two looks
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0  # a zombie has no memory


def descendants(pid: int) -> list[int]:
    """``pid`` and all processes below it."""
    found, todo = [], [pid]
    while todo:
        at = todo.pop()
        found.append(at)
        for task in Path("/proc", str(at), "task").glob("*"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                todo.extend(map(int, (task / "children").read_text().split()))
    return found


def tree_bytes(pid: int) -> int:
    """Proportional set size of ``pid`` and all processes below it."""
    return sum(map(proportional_bytes, descendants(pid)))


def anonymous_bytes(pid: int) -> int:
    """What ``pid`` and all processes below it hold that the kernel cannot read again from files.

    Pages that a forked process has in common with its parent count twice.
    """
    total = 0
    for process in descendants(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{process}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) * 1024
    return total


@contextlib.contextmanager
def watching_memory(
    pid: int, every_seconds: float | None, memory: Callable[[int], int]
) -> Iterator[list[tuple[float, int]]]:
    """Yields (monotonic seconds, bytes of the tree below ``pid``), growing until the block ends."""
    samples: list[tuple[float, int]] = []
    if every_seconds is None:
        yield samples
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(every_seconds):
            samples.append((time.monotonic(), memory(pid)))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


# --- what ran it --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What the figures were taken on."""

    processor: str
    cores: int
    memory_gb: float
    system: str

    @classmethod
    def here(cls) -> Machine:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls(
            _processor(),
            len(os.sched_getaffinity(0)),
            round(memory / 1e9, 1),
            platform.system(),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Others:
    """How many cores programs of others keep busy, from the making of this to `cores`."""

    def __init__(self) -> None:
        self.started, self.busy, self.ours = time.monotonic(), _busy_seconds(), _our_cpu_seconds()

    def cores(self) -> float:
        seconds = time.monotonic() - self.started
        used = _busy_seconds() - self.busy - (_our_cpu_seconds() - self.ours)
        return round(max(0.0, used / seconds), 2)


def _busy_seconds() -> float:
    """CPU seconds of all programs since the machine started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _idle, _waiting, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _our_cpu_seconds() -> float:
    mine = resource.getrusage(resource.RUSAGE_SELF)
    return mine.ru_utime + mine.ru_stime + _children_cpu_seconds()


def _processor() -> str:
    flags, name = "", platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = " ".join(value.split())
        if key.strip() == "flags":
            flags = value
            break
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({platform.machine()}; {', '.join(known) or 'no vector extensions known here'})"


def versions() -> dict[str, str]:
    """Of ddinfer's environment."""
    found = {"python": platform.python_version()}
    for name in ("ddinfer", *SHARED_LIBRARIES):
        found[name] = importlib.metadata.version(name)
    return found


def competitors_versions() -> dict[str, str]:
    """Of the competitors' environment.

    Raises:
        CommandFailed: it is not there, or its libraries are not ours.
    """
    if not Path(COMPETITORS_PYTHON).exists():
        raise CommandFailed("there is no .venv-bench; launch/bench makes it")
    code = (
        "import importlib.metadata as m, sys; "
        f"print(*[m.version(n) for n in {(*SHARED_LIBRARIES, 'accelerate')!r}])"
    )
    told = subprocess.run(
        [COMPETITORS_PYTHON, "-c", code], check=True, capture_output=True, text=True
    ).stdout.split()
    found = dict(zip((*SHARED_LIBRARIES, "accelerate"), told, strict=True))
    ours = versions()
    other = {n: (ours[n], found[n]) for n in SHARED_LIBRARIES if ours[n] != found[n]}
    if other:
        raise CommandFailed(
            f"the competitors' libraries differ from ddinfer's: {other}; delete .venv-bench and "
            "run launch/bench again"
        )
    return found
