"""Small pictures for the page, made once and kept in the folder.

``thumbnails/0000/00000042-0123456789ab.webp``: the image's index and the beginning of its SHA-256,
so that the thumbnail of an image that has been made anew is never taken for its own. A video's
name ends in its number of frames: ``00000042-0123456789ab-24.webp`` shows the first of them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from zipfile import BadZipFile

from PIL import Image, features

from ddinfer.errors import UsageError
from ddinfer.inputs import read_frames
from ddinfer.storage.files import Files, write_and_rename
from ddinfer.storage.images import image_path
from ddinfer.storage.report_files import (
    THUMBNAILS_FOLDER,
    parse_thumbnail_name,
    thumbnail_folder,
    thumbnail_name,
)

#: Longest edge of a thumbnail in pixels; a cell of the gallery shows up to half of it.
EDGE = 384

_AT_ONCE = 64  # images that the threads have before them


@dataclass
class Thumbnails:
    """Which images have a thumbnail, and which cannot.

    Attributes:
        frames: index → frames of the image, 1 for a still one.
        unreadable: index → why its file could not be opened.
    """

    frames: dict[int, int] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)


def list_thumbnails(files: Files, path: str, hashes: Mapping[int, str]) -> Thumbnails:
    """The thumbnails that are there and are those of the images of these hashes (index → hash)."""
    found = Thumbnails()
    top = os.path.join(path, THUMBNAILS_FOLDER)
    for folder in files.list(top):
        for name in files.list(os.path.join(top, folder)):
            parsed = parse_thumbnail_name(name)
            if parsed is not None and hashes.get(parsed.index) == parsed.hash:
                found.frames[parsed.index] = parsed.frames
    return found


def make_thumbnails(
    files: Files,
    path: str,
    hashes: Mapping[int, str],
    *,
    threads: int | None = None,
    path_of: Callable[[int], str] = image_path,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Thumbnails:
    """Make the thumbnails that are missing.

    Args:
        hashes: of the images that are there: index → the beginning of their SHA-256.
        threads: how many to make at once; default: one for each core.
        path_of: index → file of the image below ``path``.
        progress: called after each, with how many are made and how many will be.
    """
    done = list_thumbnails(files, path, hashes)
    missing = [index for index in hashes if index not in done.frames]
    if not missing:
        return done
    if not features.check("webp"):
        raise UsageError("this Pillow was built without WebP; pass --no_thumbnails")
    files.make_folder(os.path.join(path, THUMBNAILS_FOLDER))
    folders = sorted({os.path.join(path, thumbnail_folder(index)) for index in missing})
    for folder in folders:
        files.make_folder(folder)

    def make(index: int) -> tuple[int, int, str | None]:
        try:
            frames, data = thumbnail_of(os.path.join(path, path_of(index)))
        except (
            OSError,
            SyntaxError,
            ValueError,
            BadZipFile,
            Image.DecompressionBombError,
        ) as error:
            return index, 0, str(error) or type(error).__name__
        name = thumbnail_name(index, hashes[index], frames)
        write_and_rename(files, os.path.join(path, name), data)
        return index, frames, None

    count = os.cpu_count() or 1 if threads is None else threads
    with ThreadPoolExecutor(count, "thumbnails") as pool:
        for k, (index, frames, why) in enumerate(_in_order(pool, make, missing), 1):
            if why is None:
                done.frames[index] = frames
            else:
                done.unreadable[index] = why
            progress(k, len(missing))
    for folder in folders:
        files.sync_folder(folder)
    return done


def _in_order(
    pool: ThreadPoolExecutor,
    make: Callable[[int], tuple[int, int, str | None]],
    indices: list[int],
) -> Iterator[tuple[int, int, str | None]]:
    """``pool.map`` that starts a few at a time: Ctrl-C then waits only for those."""
    left = iter(indices)
    while some := list(islice(left, _AT_ONCE)):
        yield from pool.map(make, some)


def thumbnail_of(path: str) -> tuple[int, bytes]:
    """An image's or video's file → its number of frames, and its first as a small WebP."""
    if path.endswith((".mp4", ".webm", ".zip")):
        pictures = read_frames(path)
        picture = next(pictures)
        frames = 1 + sum(1 for _ in pictures)
    else:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            picture = _eight_bit(image)
    is_small = max(picture.size) <= EDGE
    picture.thumbnail((EDGE, EDGE), Image.Resampling.BOX, reducing_gap=2.0)
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=80, method=2, lossless=is_small)
    return frames, out.getvalue()


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        import numpy as np

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    has_alpha = image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info
    return image.convert("RGBA" if has_alpha else "RGB")
