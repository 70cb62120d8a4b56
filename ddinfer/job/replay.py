"""An image of a job, to be generated again: what it was generated with, and the comparison."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

from ddinfer.errors import UsageError
from ddinfer.inputs import read_audio, read_frames
from ddinfer.request import Request
from ddinfer.storage.files import Files
from ddinfer.storage.images import ImageRecord
from ddinfer.storage.job_record import read_job
from ddinfer.storage.metadata import read_requests

if TYPE_CHECKING:
    import numpy as np


def batch_of(record: ImageRecord, image: str) -> tuple[list[Request], list[str]]:
    """The Requests that shared the image's call → them, and notes. Others are in the job folder."""
    own = Request.from_dict(record.request)
    out = _folder_of_job(image)
    found: dict[int, Request] = {}
    if os.path.isfile(os.path.join(out, "requests.jsonl.gz")):
        needed = {*record.batch, own.index}
        found = {r.index: r for r in read_requests(Files(), out) if r.index in needed}
    known = found.get(own.index)
    if known is not None and known.content_hash() != own.content_hash():
        found = {}  # the folder belongs to another job than the image
        known = None
    if own.input_hashes:
        if known is None:
            raise UsageError(
                f"{image} was generated from image inputs, and the job folder that records their "
                f"paths is not around it; expected requests.jsonl.gz in {out}"
            )
        own = known
    if all(k in found for k in record.batch):
        return [found[k] for k in record.batch], []
    if len(record.batch) == 1:
        return [own], []
    return [own], [
        f"it was generated in a batch of {len(record.batch)}, whose other requests are not in "
        f"{out}: generated alone here, which can differ in last bits"
    ]


def _folder_of_job(image: str) -> str:
    """The output folder around an image: ``out/images/0000/00000000.png``."""
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(image))))


def options_of_job(record: ImageRecord, image: str) -> dict[str, Any]:
    """The options of the job around an image, which say where its model is; empty without it."""
    job = read_job(Files(), _folder_of_job(image))
    if job is None or job.identity.get("model_hash") != record.model_hash:
        return {}
    return job.config


def compare(data: bytes, path: str) -> tuple[bool, str]:
    """Compare the bytes of two files; where they differ, what they show or let hear."""
    import numpy as np

    with open(path, "rb") as file:
        if file.read() == data:
            return True, "bit-identical: every byte of the file is the same"
    with tempfile.TemporaryDirectory() as folder:
        new = os.path.join(folder, f"new{os.path.splitext(path)[1]}")
        with open(new, "wb") as file:
            file.write(data)
        before, now = _decoded(path), _decoded(new)
    if [part.shape for part in before] != [part.shape for part in now]:
        return False, (
            f"different: {len(before)} images of shape {before[0].shape} in the file, "
            f"{len(now)} of shape {now[0].shape} now"
        )
    off = np.concatenate([np.abs(a - b).ravel() for a, b in zip(before, now, strict=True)])
    if not off.any():
        return True, "bit-identical: every pixel is the same"
    return False, (
        f"different: the largest difference is {off.max():g} of 255, in {np.count_nonzero(off)} "
        f"of {off.size} values"
    )


def _decoded(path: str) -> list[np.ndarray]:
    """What a file shows and lets hear: pictures in 0 to 255, and sound on the same scale."""
    import numpy as np

    ending = os.path.splitext(path)[1]
    if ending in (".wav", ".flac"):
        return [127.5 * read_audio(path)[0]]
    return [np.asarray(frame, dtype=float) for frame in read_frames(path)]
