"""Jobs of every kind and size for tests of `ddinfer report`, written by storage's own writers."""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ddinfer.cli import dispatch
from ddinfer.errors import ErrorRecord
from ddinfer.request import Request, Result
from ddinfer.storage.files import Files
from ddinfer.storage.images import image_path
from ddinfer.storage.job_folder import JobFolder
from ddinfer.storage.journal import JournalHeader, JournalWriter
from ddinfer.storage.writer import Writer
from tests.storage_jobs import INFO, describe

#: Texts that would be HTML, script, or the end of either, if anything took them for it.
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    '<img src=x onerror="window.hacked = 3">',
    "<!--<script>",
    "--><svg onload=window.hacked=4>",
    "]]> ${window.hacked = 5} `\\` {{7*7}} [[DATA]] [[SCRIPT]]",
    "\"'><iframe srcdoc='<script>parent.hacked=6</script>'>",
    "&lt;b&gt; &amp; \u2028 \u2029 \x00 \x1b[31m \ufeff",
    "javascript:window.hacked=7",
    "中文 한국어 العربية \U0001f600 e\u0301\u202eright to left",
    "line one\nline two\ttab",
    "a" * 5000,
)


def report(out, *words):
    return dispatch(["report", str(out), *words])


def data_of(out):
    """The data inside the page of a job."""
    page = Path(out, "report.html").read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found)


def picture(request, size=(48, 32)):
    return Image.new("RGB", size, tuple(hashlib.sha256(str(request.seed).encode()).digest()[:3]))


def made(request, batch=(), **more):
    return Result(request, picture(request), batch=batch or (request.index,), seconds=0.5, **more)


def video(request):
    frames = [Image.new("RGB", (32, 32), (k * 60, 0, 255 - k * 60)) for k in range(4)]
    return Result(request, frames=frames, batch=(request.index,), seconds=2.0)


def sound(request):
    tone = 0.2 * np.sin(np.arange(8000) / 8).astype(np.float32)[None]
    return Result(request, audio=tone, sampling_rate=8000, batch=(request.index,), seconds=1.0)


def failed(request, text="no such thing"):
    error = ErrorRecord("ValueError", text, f"Traceback (most recent call last):\n  {text}\n")
    return Result(request, error=error)


def write_job(
    out, requests, results, *, ranks=2, batch_size=2, finish=True, formats=None, **options
):
    """A job whose ranks have written these results (a function of a Request, or None: pending)."""
    files, out = Files(), str(out)
    job = describe(requests, batch_size=batch_size)
    with JobFolder.open(files, out, job, **options) as folder:
        for rank in range(ranks):
            header = JournalHeader(folder.fingerprint, rank, folder.attempt)
            journal = JournalWriter(files, out, header)
            with Writer(files, out, journal, INFO, formats=formats) as writer:
                for start in range(0, len(requests), batch_size):
                    if start // batch_size % ranks != rank:
                        continue
                    batch = [results(r) for r in requests[start : start + batch_size]]
                    writer.started([r.index for r in requests[start : start + batch_size]])
                    if all(batch):
                        writer.put(batch)
        if finish:
            folder.finish()
    return out


def various_job(out):
    """Twelve images of six prompts: two failed, one flagged, one inexact, one a video."""
    prompts = ["a red circle", "a red circle", "a blue star", "a house <b>by</b> the sea"]
    requests = [
        Request(
            k,
            f"{k:08d}" if k % 3 else f"mine-{k}",
            prompts[k % 4],
            100 + k,
            width=48,
            height=32,
            num_inference_steps=10 + k // 6,
            kwargs={"eta": 0.5} if k == 8 else {},
        )
        for k in range(12)
    ]

    def results(request):
        if request.index in (3, 7):
            return failed(request)
        if request.index == 5:
            return made(request, flags=("nsfw",))
        if request.index == 6:
            return made(request, exact=False)
        return video(request) if request.index == 8 else made(request)

    return write_job(out, requests, results)


def large_job(out, count):
    """So many finished images, written without the care of the writer: files are links to few."""
    files, out = Files(), str(out)
    prompts = [f"a picture of thing {k % 5000} in the style of {k % 7}" for k in range(count)]
    requests = [
        Request(k, f"{k:08d}", prompts[k], k, width=512, height=512, num_inference_steps=20 + k % 3)
        for k in range(count)
    ]
    with JobFolder.open(files, out, describe(requests)) as folder:
        for rank in range(8):
            journal = JournalWriter(files, out, JournalHeader(folder.fingerprint, rank))
            lines = []
            for k in range(rank * count // 8, (rank + 1) * count // 8):
                digest = f"{k:064x}"
                lines.append({"kind": "start", "indices": [k]})
                if k % 1000 == 999:
                    error = ErrorRecord("ValueError", "no", "Traceback").to_dict()
                    lines.append({"kind": "failed", "index": k, "id": f"{k:08d}", "error": error})
                else:
                    lines.append(
                        {"kind": "image", "index": k, "sha256": digest, "bytes": 9, "seconds": 1.5}
                    )
            journal.append(lines)
            journal.close()
    source = Path(out, "source.png")
    for k in range(count):
        target = Path(out, image_path(k))
        if k % 10_000 == 0:  # a file has at most 65,000 links
            target.parent.mkdir(exist_ok=True)
            picture(requests[k], (256, 256)).save(source)
        os.link(source, target)
        if k % 10_000 == 9_999:
            source.unlink()
    return out


def real_job(out, *, ranks=1, limit=3):
    """The embedded model's demonstration, and its page."""
    words = ["--output", str(out), "--device", "cpu", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [sys.executable, "-m", "ddinfer", *words, *(["--limit", str(limit)] if limit else [])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert report(out) == 0
    return out
