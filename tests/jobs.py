"""Jobs of real processes, as the command line starts them, for tests that get in their way."""

import contextlib
import threading
import time

from ddinfer.config import JobConfig
from ddinfer.job.run import run_job
from ddinfer.storage.files import Files
from ddinfer.storage.verify import verify
from tests.kill_matrix import children
from tests.test_cli import HANG_SECONDS, MAIN, TORCHRUN, images, options

#: How a job is started → its command, to which `job` adds.
STARTS = {
    "one process": MAIN,
    "two ranks": [*MAIN, "--nproc_per_node=2"],
    "torchrun": [*TORCHRUN, "--nproc_per_node=2", "ddinfer/main.py"],
}


def job(model, folder, prompts, *more):
    """Options of a job with these prompts; its output is ``folder/out``."""
    file = folder / "prompts.txt"
    file.write_text("".join(f"{prompt}\n" for prompt in prompts))
    words = ["--prompts", file, "--num_threads=1", *more]
    return options(model, folder / "out", *words)


def undisturbed(model, folder, prompts, **more):
    """The images of the same prompts, made in this process, which nobody disturbs."""
    run_job(
        JobConfig(
            model=model,
            output=str(folder / "undisturbed"),
            prompt=tuple(prompts),
            trust_remote_code=True,
            device="cpu",
            num_threads=1,
            **more,
        )
    )
    return images(folder / "undisturbed")


def made(folder):
    """Indices of the images in ``folder/out``."""
    return sorted(int(name[:8]) for name in images(folder / "out"))


def is_whole(folder):
    """Whether every prompt of ``folder/out`` is made or listed as failed, and no more."""
    return verify(Files(), str(folder / "out")).is_good


def family(pid):
    """A process and all that came of it."""
    return [pid, *(member for child in children(pid) for member in family(child))]


def wait_until(process, condition):
    """Wait for what the process brings about."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextlib.contextmanager
def _killed_when_it_hangs(process):
    """What is read from it inside ends in time."""
    timer = threading.Timer(HANG_SECONDS, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def wait_for_words(process, *words):
    """Read what it says until a line has all of these → the lines; `end` gives the rest."""
    lines = []
    with _killed_when_it_hangs(process):
        for line in process.stderr:
            lines.append(line)
            if all(word in line for word in words):
                return "".join(lines)
    raise AssertionError(f"{words} were never said, but: {''.join(lines)}")


def end(process):
    """Wait for its end → (exit code, what it said and nobody has read yet)."""
    with _killed_when_it_hangs(process):
        err = process.stderr.read()
        return process.wait(), err
