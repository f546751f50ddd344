"""Readers of JSON, JSONL, CSV and Parquet files: rows with their places, so that errors can name them."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import IO, Any

from grpo.errors import ConfigError

Row = dict[str, Any]


@dataclass
class BadRows:
    """Handling of rows that cannot be used: an error that names the row, or, with `skip`, a list of rejected rows."""

    skip: bool = False
    rejected: list[dict[str, str]] = field(default_factory=list)
    """{"place": "data.jsonl:3", "reason": "not JSON: ..."}, in the order of the file."""

    @property
    def hint(self) -> str:
        """Advice for the error about a single bad row; empty where it is left out."""
        return "" if self.skip else ": fix it, or leave such rows out with --data.bad_rows skip"

    def add(self, place: str, reason: str, cause: Exception | None = None) -> None:
        """Reject a row. Raises ConfigError unless `skip`."""
        if not self.skip:
            raise ConfigError(f"{place}: {reason}") from cause
        self.rejected.append({"place": place, "reason": reason})


@dataclass(frozen=True)
class Table:
    """Rows and their places."""

    source: str
    """The file, or the name of the data set."""
    rows: list[Row]
    places: list[str]
    """One per row, in the form of editors and compilers: "data.jsonl:3"."""


def table_of(source: str, rows: list[Row]) -> Table:
    """Return a Table of rows that are not from a text file: their place is a number, counted from 1."""
    return Table(source, rows, [f"{source}, row {number}" for number in range(1, len(rows) + 1)])


def read_table(path: str, key: str = "data.path", bad: BadRows | None = None) -> Table:
    """Read a local file by its ending.

    Args:
        key: Config key to name in errors.

    Raises:
        ConfigError: The file is missing, unreadable or empty, or a row is bad and `bad` does not skip it.
    """
    rows: list[Row] = []
    places: list[str] = []
    bad = bad or BadRows()
    for row, place in iterate_rows(path, key, bad):
        rows.append(row)
        places.append(place)
    if not rows:
        left_out = f" that can be used: the first of {len(bad.rejected)} is {bad.rejected[0]}" if bad.rejected else ""
        raise ConfigError(f"{key}: {path} is empty: it holds no rows{left_out}")
    return Table(str(Path(path).expanduser()), rows, places)


def iterate_rows(path: str, key: str, bad: BadRows) -> Iterator[tuple[Row, str]]:
    """Yield the rows with their places, one by one. Arguments and errors as in `read_table`."""
    readers: dict[str, Callable[[Path, BadRows], Iterator[tuple[Row, str]]]] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
    }
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{key}: there is no file {path}")
    reader = readers.get(ending_of(file))
    if reader is None or (reader is _read_parquet and is_compressed(file)):
        raise ConfigError(
            f"{key}: {path} ends in '{''.join(file.suffixes[-2:])}', it must be one of {', '.join(readers)}; text "
            f"files may be compressed ({', '.join(_OPENERS)})"
        )
    try:
        yield from reader(file, bad)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error}") from error


_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DATA_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", *_OPENERS)
"""Endings that tell a file from the name of a hub dataset."""


def ending_of(path: str | Path) -> str:
    """Return the ending that tells the format, in lower case: "TRAIN.JSONL.gz" -> ".jsonl"."""
    name = Path(path).name.lower()
    for compression in _OPENERS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def is_compressed(path: str | Path) -> bool:
    """Return whether the ending is one of a compressed file."""
    return Path(path).suffix.lower() in _OPENERS


def _open(file: Path) -> IO[bytes]:
    return _OPENERS.get(file.suffix.lower(), Path.open)(file, "rb")


def _read_jsonl(file: Path, bad: BadRows) -> Iterator[tuple[Row, str]]:
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text, object_pairs_hook=_without_duplicates)
            except UnicodeDecodeError as error:
                bad.add(place, f"not UTF-8 text: {error}{bad.hint}", error)
                continue
            except json.JSONDecodeError as error:
                bad.add(place, f"not JSON: {error.msg.removesuffix(' at')} (column {error.colno}){bad.hint}", error)
                continue
            except _DuplicateKey as error:
                bad.add(place, f"{error}{bad.hint}", error)
                continue
            except (ValueError, RecursionError) as error:
                bad.add(place, f"not JSON: {error}{bad.hint}", error)
                continue
            if not isinstance(row, dict):
                bad.add(place, f"a {type(row).__name__}, each line must be a JSON object {{...}}{bad.hint}")
                continue
            yield row, place


class _DuplicateKey(ValueError):
    """A JSON object with a key that is there twice: every reader would silently keep the last one."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise _DuplicateKey(f"the key '{twice}' is there twice")
    return row


def _read_json(file: Path, bad: BadRows) -> Iterator[tuple[Row, str]]:
    """Read an array of objects, one by one, or a file of JSON lines that is called .json."""
    with _open(file) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{file}:{line}: not UTF-8 text: {error}") from error
    if not text.lstrip().startswith("["):
        if text.lstrip().startswith("{") and not _is_json(text):
            yield from _read_jsonl(file, bad)
            return
        raise ConfigError(f"{file}: must hold a JSON array of objects, [{{...}}, ...], or one JSON object per line")
    decoder = json.JSONDecoder(object_pairs_hook=_without_duplicates)
    position, line, counted, first = text.index("[") + 1, 1, 0, True
    while True:
        position = _skip_space(text, position)
        if text[position : position + 1] == "]":
            if text[position + 1 :].strip():
                raise ConfigError(f"{file}: there is text after the array")
            return
        if not first:
            if text[position : position + 1] != ",":
                line += text.count("\n", counted, position)
                raise ConfigError(f"{file}:{line}: not JSON: expected ',' or ']' after an object")
            position = _skip_space(text, position + 1)
        line, counted, first = line + text.count("\n", counted, position), position, False
        try:
            row, position = decoder.raw_decode(text, position)
        except _DuplicateKey as error:
            bad.add(f"{file}:{line}", f"{error}{bad.hint}", error)
            row, position = json.JSONDecoder().raw_decode(text, position)
            continue
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file}:{line}: not JSON, in the object that begins here: {error}") from error
        if isinstance(row, dict):
            yield row, f"{file}:{line}"
        else:
            bad.add(f"{file}:{line}", f"a {type(row).__name__}, the array must hold JSON objects {{...}}{bad.hint}")


def _is_json(text: str) -> bool:
    """Return whether the whole text is one JSON value over several lines."""
    if "\n" not in text.strip():
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


_SPACE = re.compile(r"[ \t\r\n]*")


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _read_csv(file: Path, bad: BadRows) -> Iterator[tuple[Row, str]]:
    csv.field_size_limit(2**31 - 1)  # a worked solution may be longer than the default of 128 kB
    with io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline="") as lines:
        row_ends = 0
        try:
            reader = csv.DictReader(lines, strict=True, delimiter=_delimiter(lines, file))
            wanted = len(reader.fieldnames or [])
            twice = [name for name, count in Counter(reader.fieldnames or []).items() if count > 1]
            if twice:
                raise ConfigError(f"{file}:1: the column '{twice[0]}' is there twice: rename or remove one of them")
            row_ends = reader.line_num
            for row in reader:
                place = f"{file}:{row_ends + 1}"  # first line of the row: a quoted field may span lines
                row_ends = reader.line_num
                if None in row or None in row.values():
                    bad.add(place, f"this row must have {wanted} fields, as the first line has{bad.hint}")
                    continue
                yield row, place
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}:{row_ends + 1}: not UTF-8 text, here or soon after: {error}") from error
        except csv.Error as error:
            raise ConfigError(f"{file}:{row_ends + 1}: not CSV: {error}") from error


def _delimiter(lines: IO[str], file: Path) -> str:
    """Return the delimiter of the first line: a tab in a .tsv, else a comma unless only another one is there."""
    if ending_of(file) == ".tsv":
        return "\t"
    first = re.sub(r'"[^"]*"', "", lines.readline())
    lines.seek(0)
    return next((delimiter for delimiter in ",;\t|" if delimiter in first), ",")


def _read_parquet(file: Path, bad: BadRows) -> Iterator[tuple[Row, str]]:
    """Read batch by batch. Dates and times become ISO text, as in the other formats."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{file}: Parquet files need pyarrow: pip install pyarrow") from error
    try:
        number = 0
        table = pyarrow.parquet.ParquetFile(file)
        twice = [name for name, count in Counter(table.schema_arrow.names).items() if count > 1]
        if twice:
            raise ConfigError(f"{file}: the column '{twice[0]}' is there twice: rename or remove one of them")
        for batch in table.iter_batches():
            for row in batch.to_pylist():
                number += 1
                texts = {name: value.isoformat() for name, value in row.items() if isinstance(value, date)}
                yield row | texts, f"{file}, row {number}"
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{file}: not a Parquet file: {error}") from error
