"""Room for the images to come: estimated before a job starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddinfer.errors import StorageError
from ddinfer.request import Request
from ddinfer.storage.files import Files
from ddinfer.storage.journal import JournalState
from ddinfer.storage.media import Formats

#: Bytes of a file in those of its raw pixels, for photograph-like ones.
_RATIOS = {"png": 0.7, "zip": 0.7, "jpg": 0.25, "webp": 0.15, "mp4": 0.1, "webm": 0.05}
_OTHER_BYTES_PER_IMAGE = 1500  # text chunks, journal lines, metadata
_DEFAULT_PIXELS = 1024  # of a side that neither the Request nor the pipeline names


@dataclass(frozen=True)
class DiskEstimate:
    """Room that is needed and room that is free, in bytes.

    Attributes:
        is_measured: from the files of images that this job has made, not from width and height.
    """

    needed_bytes: int
    free_bytes: int
    num_images: int
    is_measured: bool = False

    def __str__(self) -> str:
        basis = "measured on this job's images" if self.is_measured else "estimated from their size"
        return (
            f"{self.num_images} images need about {_gigabytes(self.needed_bytes)} ({basis}), "
            f"{_gigabytes(self.free_bytes)} are free"
        )


def estimate_disk(
    files: Files,
    path: str,
    pending: Sequence[Request],
    *,
    call_defaults: Mapping[str, Any] | None = None,
    formats: Formats | None = None,
    state: JournalState | None = None,
) -> DiskEstimate:
    """The room that the images to come will take. Rank 0 and ``--dry_run`` call this.

    Args:
        path: the output directory, or where it will be.
        call_defaults: the pipeline's own width, height and num_frames, where it has them.
        formats: of the job.
    """
    at = os.path.abspath(path)
    while not files.exists(at) and at != os.path.dirname(at):
        at = os.path.dirname(at)
    free = files.free_bytes(at)
    if state is not None and state.num_done >= 8:
        each = state.total_bytes / state.num_done + _OTHER_BYTES_PER_IMAGE
        return DiskEstimate(round(each * len(pending)), free, len(pending), is_measured=True)
    image, video, _ = (formats or Formats()).endings
    sizes = {"width": _DEFAULT_PIXELS, "height": _DEFAULT_PIXELS, "num_frames": 1}
    sizes.update(call_defaults or {})
    needed = 0.0
    for request in pending:
        width, height = request.width or sizes["width"], request.height or sizes["height"]
        num_frames = request.kwargs.get("num_frames", sizes["num_frames"])
        ratio = _RATIOS[video if num_frames > 1 else image]
        needed += width * height * 3 * num_frames * ratio + _OTHER_BYTES_PER_IMAGE
    return DiskEstimate(round(needed), free, len(pending))


def check_room(estimate: DiskEstimate, path: str) -> None:
    """Raise `StorageError` where the images to come cannot fit.

    An estimate from sizes may be three times too large; only what cannot fit is refused.
    """
    least = estimate.needed_bytes if estimate.is_measured else estimate.needed_bytes / 10
    if least > estimate.free_bytes:
        raise StorageError(
            f"{path}: {estimate}; free some space or choose another --output, then run the same "
            "command again"
        )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
