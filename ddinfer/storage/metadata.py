"""The files next to the images: requests, metadata, failures and status."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, zip_longest
from typing import Any

from ddinfer.errors import StorageError
from ddinfer.request import CALL_FIELDS, Request
from ddinfer.storage.files import Files, atomic_stream
from ddinfer.storage.journal import JournalState

JOB_FILE = "job.json"
REQUESTS_FILE = "requests.jsonl.gz"
METADATA_FILE = "metadata.jsonl"
FAILURES_FILE = "failures.jsonl"
STATUS_FILE = "status.json"

_CHUNK_BYTES = 1 << 20


class DamagedFile(StorageError):
    """A file whose content is not JSON."""


# --- small JSON files --------------------------------------------------------------------------


def write_json(files: Files, path: str, value: Any) -> None:
    """Replace a JSON file atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_stream(files, path) as write:
        write(text.encode("utf-8", "backslashreplace") + b"\n")


def read_json(files: Files, path: str) -> dict[str, Any] | None:
    """A JSON object, or ``None`` where there is no such file."""
    data = files.read_or_none(path)
    if data is None:
        return None
    try:
        value = json.loads(data)
    except ValueError as error:
        raise DamagedFile(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise DamagedFile(f"{path} is damaged: not a JSON object")
    return value


def write_status(files: Files, folder: str, status: Mapping[str, Any]) -> None:
    """Replace ``status.json``."""
    write_json(files, os.path.join(folder, STATUS_FILE), dict(status))


def read_status(files: Files, folder: str) -> dict[str, Any] | None:
    return read_json(files, os.path.join(folder, STATUS_FILE))


# --- requests ----------------------------------------------------------------------------------


def write_requests(files: Files, folder: str, requests: Sequence[Request]) -> None:
    """``requests.jsonl.gz``: the same bytes for the same Requests."""
    with atomic_stream(files, os.path.join(folder, REQUESTS_FILE)) as write:
        # 16 + MAX_WBITS: the gzip container, without time and name.
        packer = zlib.compressobj(3, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        rows = (request.to_dict() for request in requests)
        _write_lines(lambda text: write(packer.compress(text)), rows)
        write(packer.flush())


def read_requests(files: Files, folder: str, limit: int | None = None) -> list[Request]:
    """The job's Requests as they were resolved (the first ``limit`` of them)."""
    path = os.path.join(folder, REQUESTS_FILE)
    lines = islice(_request_lines(files, path), limit)
    return [_parse_request(path, index, line) for index, line in enumerate(lines)]


class RequestRows:
    """Some of the job's Requests, kept as text and parsed when asked for: there may be millions."""

    def __init__(self, path: str):
        self._path = path
        self._text = bytearray()
        self._indices, self._ends = array("I"), array("Q", [0])

    def add(self, index: int, line: bytes) -> None:
        """Keep a row; indices ascend."""
        self._text += line
        self._indices.append(index)
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._indices)

    def first(self) -> Request | None:
        return self[self._indices[0]] if self._indices else None

    def __getitem__(self, index: int) -> Request:
        k = bisect_left(self._indices, index)
        if k == len(self) or self._indices[k] != index:
            raise KeyError(index)
        line = bytes(self._text[self._ends[k] : self._ends[k + 1]])
        return _parse_request(self._path, index, line)


def read_request_rows(files: Files, folder: str, mask: bytearray) -> RequestRows:
    """The Requests at whose indices ``mask`` is 1. Each rank calls this for its own.

    Raises:
        StorageError: the file is damaged, or does not contain all of them.
    """
    path = os.path.join(folder, REQUESTS_FILE)
    rows = RequestRows(path)
    num_lines = 0
    for index, line in enumerate(islice(_request_lines(files, path), len(mask))):
        num_lines += 1
        if mask[index]:
            rows.add(index, line)
    if num_lines < len(mask):
        raise StorageError(f"{path} contains {num_lines} requests, at least {len(mask)} expected")
    return rows


def _request_lines(files: Files, path: str) -> Iterator[bytes]:
    number = 0
    try:
        with files.reading(path) as file, gzip.GzipFile(fileobj=file) as unpacked:
            for number, line in enumerate(unpacked, 1):  # noqa: B007  the message needs it
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged_request(path, number + 1, error) from None


def _parse_request(path: str, index: int, line: bytes) -> Request:
    try:
        request = Request.from_dict(
            {"kwargs": _NOTHING, "input_hashes": _NOTHING, **json.loads(line)}
        )
    except (ValueError, TypeError) as error:
        raise _damaged_request(path, index + 1, error) from None
    if request.index != index:
        raise _damaged_request(path, index + 1, f"index {request.index}, expected {index}")
    return request


_NOTHING: dict[str, Any] = {}  # one for all: there may be millions


def _damaged_request(path: str, line: int, why: object) -> StorageError:
    return StorageError(
        f"{path}:{line}: damaged ({why}); run the job's own command again, which writes it from "
        "the prompts"
    )


def holds_requests(files: Files, folder: str, requests: Sequence[Request]) -> bool:
    """Whether ``requests.jsonl.gz`` is there and holds exactly these."""
    path = os.path.join(folder, REQUESTS_FILE)
    if not files.exists(path):
        return False
    try:
        with files.reading(path) as file, gzip.GzipFile(fileobj=file) as unpacked:
            expected = (_encode(request.to_dict()) for request in requests)
            return all(a == b for a, b in zip_longest(unpacked, expected))
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return False


# --- metadata.jsonl and failures.jsonl ---------------------------------------------------------


def write_metadata(
    files: Files, folder: str, requests: Sequence[Request], state: JournalState
) -> None:
    """``metadata.jsonl``: a line for each image in index order, as 🤗 datasets reads it.

    ``load_dataset("imagefolder", data_dir=folder)`` gives the images with these columns. Every
    line has the same ones, of one type each; nothing varies between runs of the same job.
    """
    with atomic_stream(files, os.path.join(folder, METADATA_FILE)) as write:
        _write_lines(write, metadata_rows(requests, state))


def metadata_rows(requests: Sequence[Request], state: JournalState) -> Iterator[dict[str, Any]]:
    """The rows of ``metadata.jsonl``."""
    made = [request for request in requests if state.is_done(request.index)]
    named = [
        name
        for name in ("negative_prompt", *CALL_FIELDS)
        if any(getattr(request, name) is not None for request in made)
    ]
    columns = _argument_columns(made)
    for request in made:
        index = request.index
        row: dict[str, Any] = {
            "file_name": state.path(index),
            "index": index,
            "id": request.id,
            "prompt": request.prompt,
            "seed": request.seed,
        }
        row.update((name, getattr(request, name)) for name in named)
        for column, value_of in columns.items():
            row[column] = value_of(request)
        note = state.notes.get(index, {})
        row["exact"] = note.get("exact", True)
        row["flags"] = " ".join(note.get("flags", ()))
        row["sha256"] = state.sha256(index)
        yield row


def _argument_columns(requests: Sequence[Request]) -> dict[str, Callable[[Request], Any]]:
    """Column → its value of a Request, for every further call argument that any Request has."""
    kinds: dict[str, set[str]] = {}
    inputs: set[str] = set()
    for request in requests:
        for name, value in request.kwargs.items():
            if name not in request.input_hashes and value is not None:
                kinds.setdefault(name, set()).add(type(value).__name__)
        inputs.update(request.input_hashes)
    columns: dict[str, Callable[[Request], Any]] = {}
    for name in sorted(kinds):
        # datasets reserves "image" for the image and "*file_name" for further files.
        clash = name in ("image", "label", *_OWN_COLUMNS) or name.endswith(
            ("file_name", "file_names")
        )
        column = f"argument_{name}" if clash else name
        columns[column] = partial(_argument, name, kinds[name] not in _PLAIN_KINDS)
    for name in sorted(inputs):
        columns[f"{name}_sha256"] = partial(_input_hash, name)
    return columns


_OWN_COLUMNS = frozenset(("index", "id", "prompt", "seed", "exact", "flags", "sha256"))
_PLAIN_KINDS: tuple[set[str], ...] = ({"bool"}, {"int"}, {"float"}, {"int", "float"}, {"str"})


def _argument(name: str, as_json: bool, request: Request) -> Any:
    """An argument in one type for the whole column: lists and mixtures as JSON text."""
    value = request.kwargs.get(name)
    if value is None or not as_json:
        return value
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _input_hash(name: str, request: Request) -> str | None:
    return request.input_hashes.get(name)


def write_failures(
    files: Files, folder: str, requests: Sequence[Request], state: JournalState
) -> None:
    """``failures.jsonl``: a line for each prompt that could not be made, in index order."""
    with atomic_stream(files, os.path.join(folder, FAILURES_FILE)) as write:
        _write_lines(write, failure_rows(requests, state))


def failure_rows(requests: Sequence[Request], state: JournalState) -> Iterator[dict[str, Any]]:
    """The rows of ``failures.jsonl``."""
    for request in requests:
        if state.is_failed(request.index):
            error = state.failures[request.index]["error"]
            yield {"id": request.id, "index": request.index, "prompt": request.prompt, **error}


_encode_row = json.JSONEncoder(ensure_ascii=False, separators=(", ", ": "), allow_nan=False).encode


def _encode(row: Mapping[str, Any]) -> bytes:
    # An error message may contain a lone surrogate; no other text can.
    return _encode_row(row).encode("utf-8", "backslashreplace") + b"\n"


def _write_lines(write: Callable[[bytes], Any], rows: Iterator[dict[str, Any]]) -> None:
    pending = bytearray()
    for row in rows:
        pending += _encode(row)
        if len(pending) >= _CHUNK_BYTES:
            write(bytes(pending))
            pending.clear()
    if pending:
        write(bytes(pending))
