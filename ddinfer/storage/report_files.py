"""Names of the files that ``ddinfer report`` keeps in a job's folder, and how they are deleted."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from ddinfer.storage.files import Files, is_temporary
from ddinfer.storage.images import IMAGES_PER_FOLDER

REPORT_FILE = "report.html"
THUMBNAILS_FOLDER = "thumbnails"

#: First bytes of a page that ddinfer has written; another `REPORT_FILE` is not ours.
REPORT_START = b"<!doctype html>\n<!-- written by ddinfer report -->\n"

_NAME = re.compile(r"(\d{8,})-([0-9a-f]{12})(?:-(\d+))?\.webp")


@dataclass(frozen=True)
class ThumbnailName:
    """The parts of a thumbnail's name.

    Attributes:
        hash: the first 12 hexadecimal digits of the image file's SHA-256.
        frames: of the image; 1 for a still one.
    """

    index: int
    hash: str
    frames: int


def thumbnail_folder(index: int) -> str:
    """Where the thumbnail of image ``index`` lies below the output folder."""
    return f"{THUMBNAILS_FOLDER}/{index // IMAGES_PER_FOLDER:04d}"


def thumbnail_name(index: int, digest: str, frames: int) -> str:
    """The thumbnail's file below the output folder."""
    number = "" if frames == 1 else f"-{frames}"
    return f"{thumbnail_folder(index)}/{index:08d}-{digest}{number}.webp"


def parse_thumbnail_name(name: str) -> ThumbnailName | None:
    """``None`` for a name that no thumbnail has."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return ThumbnailName(int(match[1]), match[2], int(match[3] or 1))


def is_own_report(files: Files, path: str) -> bool:
    """Whether the folder's ``report.html`` is one that ddinfer has written."""
    name = os.path.join(path, REPORT_FILE)
    if not files.exists(name):
        return False
    with files.reading(name) as file:
        return file.read(len(REPORT_START)) == REPORT_START


def delete_report(files: Files, path: str, num_images: int) -> None:
    """Delete the page and the thumbnails of a job with so many images, and nothing else."""
    if is_own_report(files, path):
        files.remove(os.path.join(path, REPORT_FILE))
    for first in range(0, num_images, IMAGES_PER_FOLDER):
        folder = os.path.join(path, thumbnail_folder(first))
        for name in files.list(folder):
            parsed = parse_thumbnail_name(name)
            is_own = parsed is not None and first <= parsed.index < min(
                first + IMAGES_PER_FOLDER, num_images
            )
            if is_own or is_temporary(name):
                files.remove(os.path.join(folder, name))
        files.remove_empty_folder(folder)
    files.remove_empty_folder(os.path.join(path, THUMBNAILS_FOLDER))
