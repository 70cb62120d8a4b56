"""A small job for tests of storage: requests, pictures, and the loop of run.py on one rank."""

from __future__ import annotations

from PIL import Image

from ddinfer.errors import ErrorRecord
from ddinfer.request import Request, Result
from ddinfer.storage.files import Files
from ddinfer.storage.job_folder import JobDescription, JobFolder, JobReport
from ddinfer.storage.journal import JournalHeader, JournalWriter
from ddinfer.storage.saving import save_as_made
from ddinfer.storage.writer import Writer

INFO = {"model": "tiny", "version": "1"}
IDENTITY = {"model": "tiny", "dtype": "float32", "batch_size": 2}


def make_requests(count, **changes):
    return [Request(k, f"{k:08d}", f"prompt {k}", 100 + k, **changes) for k in range(count)]


def picture(request):
    return Image.new("RGB", (4, 4), (request.seed % 256, request.index % 256, 0))


def failure(request):
    return Result(request, error=ErrorRecord("ValueError", "cannot be drawn"))


def draw(request):
    return {"image": picture(request)}


def engine(failing=(), answer=draw):
    def run(batches):
        for batch in batches:
            indices = tuple(request.index for request in batch)
            for request in batch:
                if request.index in failing:
                    yield failure(request)
                else:
                    yield Result(request, batch=indices, **answer(request))

    return run


def describe(requests, versions=None, **identity):
    return JobDescription(requests, {**IDENTITY, **identity}, versions or {"torch": "2"})


def run_job(
    out, requests, *, failing=(), stop_after=None, job=None, formats=None, answer=draw, **options
) -> JobReport:
    """Make the images of a job, or those of the first ``stop_after`` pending batches."""
    files, out = Files(), str(out)
    with JobFolder.open(files, out, job or describe(requests), **options) as folder:
        state = folder.read_state()
        batches = [range(k, min(k + 2, len(requests))) for k in range(0, len(requests), 2)]
        pending = folder.pending_batches(batches, state)[:stop_after]
        header = JournalHeader(folder.fingerprint, 0, folder.attempt)
        journal = JournalWriter(files, out, header)
        with Writer(files, out, journal, INFO, formats=formats, wanted=state.is_pending) as writer:
            for _ in save_as_made(
                engine(failing, answer), ([requests[k] for k in batch] for batch in pending), writer
            ):
                pass
        return folder.finish()
