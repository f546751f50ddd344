"""Readers of JSONL, CSV and Parquet files: rows with their places, so that errors can name them."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

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
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{key}: there is no file {path}")
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise ConfigError(f"{key}: {path} ends in '{file.suffix}', it must be one of {', '.join(readers)}")
    try:
        yield from reader(file, bad)
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error}") from error


def _read_jsonl(file: Path, bad: BadRows) -> Iterator[tuple[Row, str]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                bad.add(place, f"not UTF-8 text: {error}{bad.hint}", error)
                continue
            except json.JSONDecodeError as error:
                bad.add(place, f"not JSON: {error.msg.removesuffix(' at')} (column {error.colno}){bad.hint}", error)
                continue
            except (ValueError, RecursionError) as error:
                bad.add(place, f"not JSON: {error}{bad.hint}", error)
                continue
            if not isinstance(row, dict):
                bad.add(place, f"a {type(row).__name__}, each line must be a JSON object {{...}}{bad.hint}")
                continue
            yield row, place


def _read_csv(file: Path, bad: BadRows) -> Iterator[tuple[Row, str]]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        row_ends = 0
        try:
            wanted = len(reader.fieldnames or [])
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


def _read_parquet(file: Path, bad: BadRows) -> Iterator[tuple[Row, str]]:
    """Read batch by batch. Dates and times become ISO text, as in the other formats."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{file}: Parquet files need pyarrow: pip install pyarrow") from error
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                texts = {name: value.isoformat() for name, value in row.items() if isinstance(value, date)}
                yield row | texts, f"{file}, row {number}"
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{file}: not a Parquet file: {error}") from error
