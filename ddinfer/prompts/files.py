"""Prompt files: txt, csv, tsv, json and jsonl, each also as .gz, and standard input.

How a file is read:

- **Every kind** is UTF-8, with or without a byte order mark; lines end with LF or CRLF. A blank
  line is not a prompt: it is skipped, and a note in the log counts them. Nothing else is skipped:
  whatever cannot be a prompt is an `InputError` with file and line.
- **txt**: a line is a prompt, literally: nothing is interpreted, spaces at its edges stay.
- **tsv**: the first line names the columns; cells end at tabs, quotes are ordinary characters.
- **csv**: the same, with commas and standard quoting (``"a ""quoted"" cell"``, line breaks within).
  Columns are matched whatever their case (``Prompt``, ``Guidance Scale``). A column of an unknown
  name is listed in one note, unless it looks like a misspelt known one (``sede``), which is an
  error.
- **json**: a list of strings or objects; errors name an item by its number. **jsonl**: a string or
  an object per line. An unknown field is an error.
- An empty cell and ``null`` mean the default: the job's own (``--guidance_scale``, …) where there
  is one, else the pipeline's. One note in the log counts them by field. A prompt cannot be empty.
- ``-``: standard input; jsonl where its first line starts with ``{"``, else txt. The names of this
  process's open files (``/dev/stdin``, ``/dev/fd/63`` of ``<(command)``) and pipes without a known
  ending are read in the same way.
"""

from __future__ import annotations

import csv
import errno
import gzip
import io
import json
import logging
import math
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NoReturn

from ddinfer.errors import InputError
from ddinfer.inputs import MEDIA_INPUTS
from ddinfer.prompts.fields import FieldChecker, is_text_field, text_problem
from ddinfer.request import Prompt, Request, resolve_requests

_log = logging.getLogger(__name__)

#: Names that stand for an open file of the process that uses them.
_OPEN_FILE = re.compile(r"/dev/stdin|(?:/dev|/proc/self)/fd/(?P<descriptor>\d+)")

#: A line number or the number of an item in a JSON list (1-based), and what is there.
_Row = tuple[int, Any]


def read_prompts(
    path: str | os.PathLike[str],
    *,
    call_parameters: Collection[str] | None = None,
    stdin: BinaryIO | None = None,
) -> list[Prompt]:
    """Read a prompt file, checking every row before anything is done with one.

    Args:
        path: the file, or ``-`` for standard input.
        call_parameters: names that the pipeline's ``__call__`` takes; they may be fields.
            ``None`` where the pipeline is not known: the usual ones of diffusers may.
        stdin: what ``-`` reads (default: the process's standard input).

    Raises:
        InputError: with file and line, for anything that cannot be a prompt.
    """
    path = os.fspath(path)
    source = "<stdin>" if path == "-" else path
    data, kind = _read_bytes(path, source, stdin)
    text = _decode(data, source)
    if kind is None:
        kind = "jsonl" if re.match(r'\s*\{\s*"', text) else "txt"
    folder = os.getcwd() if path == "-" else os.path.dirname(os.path.abspath(path))
    checker = FieldChecker(source, folder, call_parameters)
    prompts = _READERS[kind](text, checker)
    if not prompts:
        once = "; it can be read once, so use a file where torchrun restarts ranks"
        raise InputError(f"contains no prompts{once * is_open_file(path)}", file=source)
    if (note := checker.note_nulls()) is not None:
        _log.warning("%s", note)
    return prompts


def is_open_file(path: str | None) -> bool:
    """Whether a path names an open file of this process: ``-``, ``/dev/stdin``, ``/dev/fd/N``.

    Exactly one process can read such a file, and only once.
    """
    return path == "-" or (path is not None and _OPEN_FILE.fullmatch(path) is not None)


def read_open_file(path: str) -> bytes:
    """All bytes of a file that `is_open_file` names, up to its end.

    Raises:
        InputError: the file is closed or cannot be read.
    """
    found = _OPEN_FILE.fullmatch(path)
    try:
        if found is not None:
            with open(int(found["descriptor"] or 0), "rb", closefd=False) as file:
                return file.read()
        if sys.stdin is None:
            raise InputError("standard input is closed; expected prompts", file="<stdin>")
        return sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(error.strerror or str(error), file=path) from None


def kind_of_prompt_file(path: str) -> str | None:
    """How a prompt file would be read, by its name; ``None``: its first line decides.

    Raises:
        InputError: it is not there, may not be read, is a folder, or has an unknown ending.
    """
    if is_open_file(path):
        return None
    kind: str | None = os.path.splitext(path.lower().removesuffix(".gz"))[1].lstrip(".")
    kind = {"ndjson": "jsonl"}.get(str(kind), kind)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise InputError(error.strerror or str(error), file=path) from None
    if stat.S_ISDIR(mode):
        raise InputError("is a folder; a prompt file was expected", file=path)
    if not os.access(path, os.R_OK):
        raise InputError(os.strerror(errno.EACCES), file=path)
    if kind in _READERS:
        return kind
    if stat.S_ISREG(mode):
        raise InputError(
            f"cannot tell its kind by the ending {'.' + kind if kind else '(none)'!r}; "
            f"expected .{', .'.join(_READERS)}, or any of them with .gz",
            file=path,
        )
    return None


def read_requests(
    path: str | os.PathLike[str], *, call_parameters: Collection[str] | None = None
) -> list[Request]:
    """Read a prompt file into Requests without any defaults of a job. Other tools call this."""
    return resolve_requests(read_prompts(path, call_parameters=call_parameters))


def prompt_from_fields(
    fields: Mapping[str, Any], where: str, *, call_parameters: Collection[str] | None = None
) -> Prompt:
    """Check a dict of a program like a row of a file.

    Image inputs may be objects rather than paths. Without ``call_parameters`` any argument is
    taken: whoever has the pipeline checks it against the signature.

    Args:
        where: what messages begin with, such as ``prompts[3]``.
    """
    checker = FieldChecker(where, os.getcwd(), call_parameters, in_program=True)
    _check_text(fields, "", None, checker)
    return checker.check(fields, None)


# --- bytes -----------------------------------------------------------------------------------


def _read_bytes(path: str, source: str, stdin: BinaryIO | None) -> tuple[bytes, str | None]:
    """The file's bytes, unpacked, and its kind (``None``: decide by its first line)."""
    if path == "-" and stdin is not None:
        return stdin.read(), None
    if is_open_file(path):
        return read_open_file(path), None
    kind = kind_of_prompt_file(path)
    try:
        with open(path, "rb") as file:
            data = _unpack(file, source) if path.lower().endswith(".gz") else file.read()
    except OSError as error:
        raise InputError(error.strerror or str(error), file=source) from None
    if not data:
        raise InputError("is empty", file=source)
    return data, kind


def _unpack(file: BinaryIO, source: str) -> bytes:
    chunks: list[bytes] = []
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            while chunk := unpacked.read1(1 << 20):
                chunks.append(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        line = 1 + sum(chunk.count(b"\n") for chunk in chunks)
        what = "the gzip data ends early" if isinstance(error, EOFError) else f"bad gzip: {error}"
        raise InputError(f"{what}; the file is damaged", file=source, line=line) from None
    return b"".join(chunks)


def _decode(data: bytes, source: str) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError("is UTF-16; save it as UTF-8", file=source, line=1)
    data = data.removeprefix(b"\xef\xbb\xbf")
    if (at := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, at) + 1
        raise InputError("contains a NUL character", file=source, line=line)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        packed = " (gzip data? then name it .gz)" if data.startswith(b"\x1f\x8b") else ""
        raise InputError(
            f"is not UTF-8: byte 0x{data[error.start]:02x}{packed}", file=source, line=line
        ) from None


# --- lines -----------------------------------------------------------------------------------


def _lines(text: str, source: str) -> Iterator[tuple[int, str]]:
    """Numbered lines that are not blank. Only LF and CRLF end a line."""
    blank = 0
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        if line.endswith("\r"):
            line = line[:-1]
        if not line or line.isspace():
            blank += 1
            continue
        if "\r" in line:
            raise InputError(
                "a carriage return within the line; end lines with LF or CRLF",
                file=source,
                line=number,
            )
        yield number, line
    _note_blank(blank, source)


def _note_blank(count: int, source: str) -> None:
    if count:
        _log.warning("%s: skipped %d blank line%s", source, count, "" if count == 1 else "s")


def _read_txt(text: str, checker: FieldChecker) -> list[Prompt]:
    source = checker.source
    return [Prompt({"prompt": line}, f"{source}:{n}") for n, line in _lines(text, source)]


# --- tables ----------------------------------------------------------------------------------


def _read_tsv(text: str, checker: FieldChecker) -> list[Prompt]:
    return _table(((n, line.split("\t")) for n, line in _lines(text, checker.source)), checker)


def _read_csv(text: str, checker: FieldChecker) -> list[Prompt]:
    return _table(_csv_rows(text, checker.source), checker)


def _csv_rows(text: str, source: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    blank = 0
    while True:
        line = reader.line_num + 1  # where the record starts; it may span several lines
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            raise InputError(f"broken csv: {error}", file=source, line=line) from None
        if not cells or (len(cells) == 1 and not cells[0].strip()):
            blank += 1
            continue
        yield line, cells
    _note_blank(blank, source)


def _table(rows: Iterator[tuple[int, list[str]]], checker: FieldChecker) -> list[Prompt]:
    line, header = next(rows, (1, []))
    if not header:
        return []
    columns = _columns(header, line, checker)
    prompts = []
    for line, cells in rows:
        if len(cells) != len(header):
            raise checker.error(
                f"has {len(cells)} cells, the header has {len(header)} columns", line
            )
        row = {}
        for at, name in columns:
            row[name] = _cell(name, cells[at], line, checker) if cells[at] else None
        if checker.takes_prompt and not (row["prompt"] or "").strip():
            raise checker.error("the prompt is empty", line)
        prompts.append(checker.check(row, line))
    return prompts


def _columns(header: list[str], line: int, checker: FieldChecker) -> list[tuple[int, str]]:
    """Number and field of each known column; others are logged, misspelt ones are errors."""
    columns: dict[str, int] = {}
    unused = []
    for at, title in enumerate(header):
        name = re.sub(r"[\s\-]+", "_", title.strip().lower())
        if name not in checker.known:
            if checker.is_refused(name) or checker.suggestion(title) is not None:
                raise checker.error(checker.unknown(name), line)
            unused.append(title.strip() or "(unnamed)")
        elif name in columns:
            raise checker.error(f"two columns are named {name}", line)
        else:
            columns[name] = at
    if checker.takes_prompt and "prompt" not in columns:
        raise checker.error(
            f"no column is named prompt; the first line must name the columns and is "
            f"{', '.join(repr(title) for title in header[:8])}",
            line,
        )
    if unused:
        _log.warning(
            "%s: not used: column%s %s",
            checker.source,
            "" if len(unused) == 1 else "s",
            ", ".join(unused),
        )
    return [(at, name) for name, at in columns.items()]


def _cell(name: str, text: str, line: int, checker: FieldChecker) -> Any:
    """A cell's value: text where the field is text, else a number or JSON where it is one."""
    if is_text_field(name) or (name in MEDIA_INPUTS and not text.startswith("[")):
        return text
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError) as error:
        raise checker.error(f"{name}: {error}", line) from None


# --- JSON ------------------------------------------------------------------------------------


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} appears twice in one object")
    return out


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _finite_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large a number")
    return number


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite_float
)


def _read_jsonl(text: str, checker: FieldChecker) -> list[Prompt]:
    def rows() -> Iterator[_Row]:
        for number, line in _lines(text, checker.source):
            try:
                yield number, _DECODER.decode(line)
            except json.JSONDecodeError as error:
                raise checker.error(
                    f"broken JSON: {error.msg} (column {error.colno})", number
                ) from None
            except (ValueError, RecursionError) as error:
                raise checker.error(f"broken JSON: {error}", number) from None

    return _objects(rows(), checker, check_text="\\u" in text)


def _read_json(text: str, checker: FieldChecker) -> list[Prompt]:
    try:
        items = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise checker.error(
            f"broken JSON: {error.msg} (column {error.colno})", error.lineno
        ) from None
    except (ValueError, RecursionError) as error:
        raise checker.error(f"broken JSON: {error}", None) from None
    if not isinstance(items, list):
        raise checker.error("expected a list of strings or objects", None)
    checker.counts_items = True  # the decoder does not report the line of an item
    return _objects(enumerate(items, 1), checker, check_text="\\u" in text)


def _objects(rows: Iterable[_Row], checker: FieldChecker, *, check_text: bool) -> list[Prompt]:
    """Strings and objects → Prompts.

    Args:
        check_text: look for NULs and lone surrogates. A file's text has none of its own; only
            where it has ``\\u`` escapes they can come out of them.
    """
    prompts = []
    for line, item in rows:
        row = {"prompt": item} if isinstance(item, str) else item
        if not isinstance(row, Mapping):
            raise checker.error(
                f"expected a string or an object, got {type(item).__name__}: {item!r:.60}", line
            )
        if check_text:
            _check_text(row, "", line, checker)
        prompts.append(checker.check(row, line))
    return prompts


def _check_text(value: Any, name: str, line: int | None, checker: FieldChecker) -> None:
    if isinstance(value, str):
        problem = text_problem(value)
        if problem is not None:
            raise checker.error(f"{name or 'prompt'} {problem}", line)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_text(key, "a field's name", line, checker)
            _check_text(item, name or key, line, checker)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _check_text(item, name, line, checker)


_READERS: dict[str, Callable[[str, FieldChecker], list[Prompt]]] = {
    "txt": _read_txt,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "json": _read_json,
    "jsonl": _read_jsonl,
}
