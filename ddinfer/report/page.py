"""``report.html``: the data of a job and the page's own files, in one file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from ddinfer.errors import UsageError
from ddinfer.report.data import JobView, page_data
from ddinfer.report.thumbnails import Thumbnails, list_thumbnails, make_thumbnails
from ddinfer.storage.files import Files, atomic_stream
from ddinfer.storage.report_files import REPORT_FILE, REPORT_START, is_own_report

#: The page's scripts, in the order in which they are put together.
SCRIPTS = (
    "dom.js",
    "table.js",
    "query.js",
    "gallery.js",
    "picture.js",
    "failures.js",
    "charts.js",
    "app.js",
)


def write_report(
    files: Files,
    path: str,
    *,
    thumbnails: bool = True,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Write a job's ``report.html`` and the thumbnails that are missing → the page's data.

    Args:
        thumbnails: make those that are missing; else the page shows the images themselves where
            there is none.
        progress: called with how many thumbnails are made, and how many will be.

    Raises:
        UsageError: no job there, or a ``report.html`` that ddinfer did not write.
        StorageError: what is needed of the folder cannot be read, or the page not be written.
    """
    view = JobView(files, path)
    target = os.path.join(path, REPORT_FILE)
    if files.exists(target) and not is_own_report(files, path):
        raise UsageError(f"{target} was not written by ddinfer report; move it away")
    small = thumbnails_of(files, view, make=thumbnails, progress=progress)
    data = page_data(view, thumbnails=small.frames, unreadable=small.unreadable)
    with atomic_stream(files, target) as write:
        for part in page_parts(data):
            write(part)
    return data


def thumbnails_of(
    files: Files,
    view: JobView,
    *,
    make: bool,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Thumbnails:
    """The thumbnails of the images and videos that are there."""
    pictures = [k for k in view.made() if view.state.ending(k) not in ("wav", "flac")]
    hashes = {index: view.short_hash(index) for index in pictures}
    if make:
        return make_thumbnails(
            files, view.folder.path, hashes, path_of=view.state.path, progress=progress
        )
    return list_thumbnails(files, view.folder.path, hashes)


def page_parts(data: Mapping[str, Any]) -> list[bytes]:
    """The page in pieces.

    Nothing of ``data`` is HTML: it is one block of JSON in which ``<`` is escaped, and the scripts
    only ever make text of it. The page's own policy names the scripts by their hashes, so that
    no other runs, and nothing is loaded from the network.
    """
    style, script = _read("style.css"), "".join(map(_read, SCRIPTS))
    script = f'"use strict";\n(() => {{\n{script}}})();\n'
    parts = {
        "POLICY": _policy(style, script),
        "STYLE": style,
        "DATA": as_json(data),
        "SCRIPT": script,
    }
    template = _read("page.html")
    out = [REPORT_START]
    for name, content in parts.items():
        before, mark, template = template.partition(f"[[{name}]]")
        assert mark, f"page.html has no [[{name}]] after the one before"
        out += [before.encode(), content.encode("utf-8", "backslashreplace")]
    return [*out, template.encode()]


def as_json(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a ``script`` element, whatever it contains."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _policy(style: str, script: str) -> str:
    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {hashed(script)}; style-src {hashed(style)}; "
        "img-src 'self' file: data: blob:; media-src 'self' file:; connect-src 'self'"
    )


def _read(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")
