"""Kill a job again and again, then look whether anything was lost.

A chain is one job in one folder: it is started on a random number of ranks, a random process of
it is killed at a random moment, and the same command starts again on another number of ranks.
After the last kill it runs to its end, and every byte is compared with an undisturbed run.

    python -m tests.kill_matrix --kills 200      # prints a table; launch/nightly runs this
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ddinfer.storage.files import Files
from ddinfer.storage.job_folder import JobFolder
from ddinfer.storage.verify import verify
from tests.moody_pipeline import moody_pipeline
from tests.test_cli import HANG_SECONDS, MAIN, images, options, run, start

NUM_PROMPTS, BATCH_SIZE = 40, 2
#: Batches that a rank can lose: being computed, in the writer's queue, being written.
MOST_REPEATED = 3


@dataclass
class Kill:
    """One kill of a chain: who, of how many ranks, when, and how many images were there."""

    victim: str
    ranks: int
    moment: str
    images: int


def write_prompts(folder):
    """Prompts that take a moment, so that there is something to interrupt."""
    file = Path(folder) / "prompts.txt"
    file.write_text("".join("sleep 0.03\n" for _ in range(NUM_PROMPTS)))
    return file


def command(model, file, output, ranks, schedule):
    words = ["--prompts", file, f"--nproc_per_node={ranks}", f"--schedule={schedule}"]
    words += ["--num_threads=1", f"--batch_size={BATCH_SIZE}"]
    return [*MAIN, *options(model, output, *words)]


def reference_images(model, folder):
    """What an undisturbed run of one rank makes."""
    done = run(command(model, write_prompts(folder), folder / "reference", 1, "static"))
    assert done.returncode == 0, done.stderr
    return images(folder / "reference")


def chain(model, folder, reference, num_kills, seed):
    """Kill one job ``num_kills`` times, then finish it → (the kills, most batches lost by a rank).

    Raises:
        AssertionError: anything is lost, torn, doubled or not as in the undisturbed run.
    """
    rng = random.Random(seed)
    output, file = folder / "out", write_prompts(folder)
    kills = []
    for _ in range(num_kills):
        ranks, schedule = rng.randint(1, 4), rng.choice(["static", "dynamic"])
        process = start(command(model, file, output, ranks, schedule))
        kill = _kill_one(rng, process, output, ranks)
        process.communicate(timeout=HANG_SECONDS)
        if kill is not None:
            kills.append(kill)
    last = run(command(model, file, output, rng.randint(1, 4), "static"))
    assert last.returncode == 0, (seed, kills, last.stderr)
    report = verify(Files(), str(output))
    assert report.is_good, (seed, kills, report)
    assert report.num_good == NUM_PROMPTS
    assert images(output) == reference, (seed, kills)
    lost = max(len(attempt.in_flight) for attempt in _attempts(output))
    assert lost <= MOST_REPEATED, (seed, kills)
    return kills, lost


def _attempts(output):
    return JobFolder.look(Files(), str(output)).read_journals().attempts


def _kill_one(rng, process, output, ranks):
    """Kill a random process of a job at a random moment → what was done, None if it ended first."""
    before = len(images(output))
    if rng.random() < 0.4:  # before its first image: importing, joining, opening, loading
        moment, until = "early", time.monotonic() + rng.uniform(0, 6)
        while time.monotonic() < until and process.poll() is None and len(images(output)) == before:
            time.sleep(0.005)
    else:  # while images are made
        moment, wanted = "working", before + rng.randint(1, 6)
        while len(images(output)) < wanted and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.06))
    there = len(images(output))
    victims = [("launcher", process.pid)]
    found = ranks_of(process.pid)
    if found and rng.random() < 0.7:
        victims = [("rank", pid) for pid in found]
    victim, pid = rng.choice(victims)
    if process.poll() is not None:
        return None
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return None
    return Kill(victim, ranks, moment, there)


def ranks_of(launcher):
    """Process ids of the ranks: children of the launcher's only child."""
    return [rank for server in children(launcher) for rank in children(server)]


def children(pid):
    """Process ids of the children of a process; none where it has ended."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    kills, chains, most_lost = [], 0, 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = str(moody_pipeline(folder))
        reference = reference_images(model, folder)
        with contextlib.suppress(KeyboardInterrupt):  # what was done by then counts
            while len(kills) < given.kills and time.monotonic() - began < given.seconds:
                number = random.Random(given.seed + chains).randint(1, 6)
                here = folder / str(chains)
                here.mkdir()
                done, lost = chain(model, here, reference, number, given.seed + chains)
                kills, chains, most_lost = kills + done, chains + 1, max(most_lost, lost)
                print(f"{len(kills)} kills in {chains} chains", file=sys.stderr, flush=True)
    print_table(kills, chains, most_lost)


def print_table(kills, chains, most_lost):
    print(f"{len(kills)} kills in {chains} chains of {NUM_PROMPTS} images: all finished, verified,")
    print("and equal to the undisturbed run, byte for byte.")
    print(f"Most batches that a killed rank had begun and not journaled: {most_lost}")
    print()
    print("| victim | ranks | moment | kills |")
    print("|---|---|---|---|")
    table = Counter((kill.victim, kill.ranks, kill.moment) for kill in kills)
    for (victim, ranks, moment), count in sorted(table.items()):
        print(f"| {victim} | {ranks} | {moment} | {count} |")


if __name__ == "__main__":
    main()
