"""Very many prompts with a pipeline that takes no time: what is left is ddinfer.

100,000 one-line prompts through the whole path (read, slice, journal, files, gather, metadata) on
two ranks, with the memory of all processes together; then, with ``--full`` 1,000,000 and else
200,000, for planning and for resuming a job of which all but a few are there, and for what rank 0
sends to 16 ranks.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from bench import inputs
from bench.journal import image_line
from bench.measure import (
    CACHE,
    PYTHON,
    ROOT,
    CommandFailed,
    Run,
    Size,
    clean_environment,
    progress,
    run,
)
from bench.report import table

ABOUT = "100,000 prompts with a pipeline that takes no time; planning and resuming more"
EXPECTED_SECONDS = 180
RANKS = 2
MANY_RANKS = 16
NUM_LEFT = 8


def measure(size: Size) -> dict[str, Any]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        model = inputs.custom_pipeline(folder, "instant", inputs.INSTANT, "InstantPipeline")
        many = size.pick(2_000, 100_000, 100_000)
        found = {"through": through(folder, model, many)}
        many = size.pick(20_000, 200_000, 1_000_000)
        prompts = write_prompts(folder, many)
        found["planning"] = planning(folder, model, prompts, many)
        found["resuming"] = resuming(folder, model, prompts, many)
        found["sending"] = sending(folder, prompts, many)
    return found


def write_prompts(folder: Path, num_prompts: int) -> Path:
    file = folder / f"prompts-{num_prompts}.txt"
    words = inputs.parti_prompts()
    with open(file, "w", encoding="utf-8") as out:
        out.writelines(f"{words[k % len(words)]} {k}\n" for k in range(num_prompts))
    return file


def command(model: Path, prompts: Path, output: Path, *more: str) -> list[str]:
    words = ["--model", str(model), "--trust_remote_code", "--prompts", str(prompts)]
    words += ["--output", str(output), "--device=cpu", f"--nproc_per_node={RANKS}"]
    return [PYTHON, "-m", "ddinfer", *words, "--num_threads=1", *more]


def through(folder: Path, model: Path, num_prompts: int) -> dict[str, Any]:
    progress(f"{num_prompts:,} prompts through the whole path")
    prompts = write_prompts(folder, num_prompts)
    done = run(command(model, prompts, folder / "out", "--json"), memory_every_seconds=2)
    report = json.loads(done.stdout)
    working = max(rank["working"] for rank in report["ranks"])
    pipeline = sum(rank["pipeline"] for rank in report["ranks"])
    return {
        "num_prompts": num_prompts,
        "seconds": round(done.seconds, 2),
        "cpu_seconds": round(done.cpu_seconds, 2),
        "working_seconds": round(working, 2),
        "pipeline_seconds": round(pipeline, 2),
        "per_second": round(num_prompts / done.seconds, 1),
        "per_second_working": round(num_prompts / working, 1),
        **_memory(done, working),
    }


def _memory(done: Run, working: float) -> dict[str, float]:
    """MB of all processes early and late in the work, and the highest of all."""
    # The work ends shortly before the samples do; a little less than all of it is looked at.
    end = done.samples[-1][0] if done.samples else 0.0
    inside = [size for at, size in done.samples if end - 0.9 * working <= at <= end] or [0]
    fifth = max(1, len(inside) // 5)
    return {
        "early_mb": round(max(inside[:fifth]) / 1e6, 1),
        "late_mb": round(max(inside[-fifth:]) / 1e6, 1),
        "peak_mb": round(done.peak_bytes / 1e6, 1),
    }


def planning(folder: Path, model: Path, prompts: Path, num_prompts: int) -> dict[str, Any]:
    """``--dry_run``: the prompts read and checked, batches and slices decided, nothing loaded."""
    progress(f"planning {num_prompts:,} prompts")
    done = run(command(model, prompts, folder / "plan", "--dry_run"), memory_every_seconds=0.5)
    return {
        "num_prompts": num_prompts,
        "seconds": round(done.seconds, 2),
        "peak_mb": round(done.peak_bytes / 1e6, 1),
    }


def resuming(folder: Path, model: Path, prompts: Path, num_prompts: int) -> dict[str, Any]:
    """A job that was stopped at its first image, given all others but a few, and run again."""
    output = folder / "resumed"
    first = stop_at_first_image(command(model, prompts, output), output)
    progress(f"pretending that {num_prompts - NUM_LEFT:,} images are there")
    pretend_done(output, num_prompts - NUM_LEFT)
    progress("resuming")
    done = run(command(model, prompts, output, "--json"), memory_every_seconds=0.5)
    report = json.loads(done.stdout)
    if report["num_new"] != NUM_LEFT or report["num_made"] != num_prompts:
        raise RuntimeError(f"resumed {report['num_new']} images instead of {NUM_LEFT}")
    return {
        "num_prompts": num_prompts,
        "first_image_seconds": round(first, 2),
        "seconds": round(done.seconds, 2),
        "cpu_seconds": round(done.cpu_seconds, 2),
        "peak_mb": round(done.peak_bytes / 1e6, 1),
    }


def sending(folder: Path, prompts: Path, num_prompts: int) -> dict[str, Any]:
    """What rank 0 sends to many ranks, and what one of them does with it; no rank is started."""
    progress(f"assigning {num_prompts:,} prompts to {MANY_RANKS} ranks")
    found: dict[str, Any] = {"num_prompts": num_prompts, "ranks": MANY_RANKS}
    for schedule in ("static", "dynamic"):
        done = run([PYTHON, "-m", "bench.instant", str(prompts), str(folder / schedule), schedule])
        found[schedule] = json.loads(done.stdout)
    return found


def assign(prompts: str, output: str, schedule: Literal["static", "dynamic"]) -> dict[str, Any]:
    """Open a job as rank 0 does, and measure what follows until every rank could load its model."""
    from ddinfer.config import JobConfig
    from ddinfer.distributed.world import World
    from ddinfer.job.leader import Leader
    from ddinfer.job.prepare import resolve_config
    from ddinfer.storage.files import Files
    from ddinfer.storage.metadata import read_request_rows

    config = JobConfig(prompts=prompts, output=output, schedule=schedule, device="cpu")
    leader = Leader(resolve_config(config), World())
    started = time.process_time()
    sent = [pickle.dumps(each) for each in leader.assignments(MANY_RANKS)]
    assigned = time.process_time()
    rows = read_request_rows(Files(), output, pickle.loads(sent[-1]).mask())
    received = time.process_time()
    leader.folder.close()
    return {
        "sent_bytes": sum(map(len, sent)),
        "rank0_cpu_seconds": round(assigned - started, 2),
        "rank_cpu_seconds": round(received - assigned, 2),
        "rank_rows": len(rows),
    }


def stop_at_first_image(words: list[str], output: Path) -> float:
    """→ seconds from the command to the first image; then the job is interrupted."""
    progress("starting, until its first image")
    started = time.monotonic()
    with subprocess.Popen(
        words, env=clean_environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as job:
        while not list(output.glob("images/*/*.png")):
            if job.poll() is not None:
                assert job.stderr is not None
                raise CommandFailed(job.stderr.read().decode()[-3000:])
            time.sleep(0.02)
        seconds = time.monotonic() - started
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=120)
    return seconds


def pretend_done(output: Path, num_images: int) -> None:
    """Journal lines and (empty) files for the first images, as ranks would have left them."""
    from ddinfer.storage.files import Files
    from ddinfer.storage.images import image_path
    from ddinfer.storage.journal import JournalHeader, JournalWriter

    fingerprint = json.loads((output / "job.json").read_text())["fingerprint"]
    for rank in range(RANKS):
        header = JournalHeader(fingerprint, rank=rank, attempt=1)
        journal = JournalWriter(Files(), str(output), header)
        mine = range(num_images * rank // RANKS, num_images * (rank + 1) // RANKS)
        for start in range(mine.start, mine.stop, 1000):
            some = range(start, min(start + 1000, mine.stop))
            journal.append([image_line(k) for k in some], sync=False)
        journal.close()
    for k in range(num_images):
        path = output / image_path(k)
        if k % 10_000 == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    for file in output.glob("images/*/*.png"):  # what the interrupted run made beyond these
        if int(file.stem) >= num_images:
            file.unlink()


def tables(figures: Mapping[str, Any]) -> str:
    whole, plan, again = (figures[k] for k in ("through", "planning", "resuming"))
    rows = [
        [f"{whole['num_prompts']:,} prompts, the whole path, {RANKS} ranks",
         f"{whole['seconds']:.1f} s: {whole['per_second']:,.0f} a second "
         f"({whole['per_second_working']:,.0f} once loaded; "
         f"{whole['cpu_seconds']:.0f} s of CPU)",
         f"{whole['early_mb']:.0f} MB early, {whole['late_mb']:.0f} late, "
         f"{whole['peak_mb']:.0f} at most"],
        [f"{plan['num_prompts']:,}: `--dry_run`", f"{plan['seconds']:.1f} s",
         f"{plan['peak_mb']:.0f} MB at most"],
        [f"{again['num_prompts']:,}: command to first image",
         f"{again['first_image_seconds']:.1f} s", ""],
        [f"{again['num_prompts']:,}: resumed with {NUM_LEFT} left, to the end, metadata included",
         f"{again['seconds']:.1f} s ({again['cpu_seconds']:.0f} s of CPU)",
         f"{again['peak_mb']:.0f} MB at most"],
    ]  # fmt: skip
    whole_path = table(["", "time", "memory of all processes"], rows)
    sent = figures.get("sending")
    if sent is None:  # figures from before this was measured
        return whole_path
    columns = ["", "rank 0 sends", "CPU of rank 0", "CPU of a rank that reads its requests"]
    words = [
        [f"{sent['num_prompts']:,} prompts over {sent['ranks']} ranks, {schedule}",
         f"{sent[schedule]['sent_bytes'] / 1e6:.1f} MB",
         f"{sent[schedule]['rank0_cpu_seconds']:.1f} s",
         f"{sent[schedule]['rank_cpu_seconds']:.1f} s for {sent[schedule]['rank_rows']:,}"]
        for schedule in ("static", "dynamic")
    ]  # fmt: skip
    return f"{whole_path}\n\n{table(columns, words)}"


if __name__ == "__main__":
    print(json.dumps(assign(sys.argv[1], sys.argv[2], sys.argv[3])))  # type: ignore[arg-type]
