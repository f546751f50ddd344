"""Readers: a JSONL, CSV or Parquet file -> a Table of rows that know their place in it, for errors that name it."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.errors import ConfigError

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows, and where each stands."""

    source: str
    """The file, or the name of the data set."""
    rows: list[Row]
    places: list[str]
    """One per row, as an editor or terminal understands it: "data.jsonl:3"."""


def table_of(source: str, rows: list[Row]) -> Table:
    """Rows that come from no text file: their place is a number, counted from 1."""
    return Table(source, rows, [f"{source}, row {number}" for number in range(1, len(rows) + 1)])


def read_table(path: str, key: str = "data.path") -> Table:
    """Reads a local file by its ending. `key` is the config key to name in errors. Raises ConfigError."""
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{key}: there is no file {path}")
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise ConfigError(f"{key}: {path} ends in '{file.suffix}', it must be one of {', '.join(readers)}")
    try:
        table = reader(file)
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read: {error}") from error
    if not table.rows:
        raise ConfigError(f"{key}: {path} is empty: it holds no rows")
    return table


def _read_jsonl(file: Path) -> Table:
    rows: list[Row] = []
    places: list[str] = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip():
                    continue
                row = json.loads(text)
            except UnicodeDecodeError as error:
                raise ConfigError(f"{place}: not UTF-8 text: {error}") from error
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{place}: not JSON: {error}") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{place}: a {type(row).__name__}, each line must be a JSON object {{...}}")
            rows.append(row)
            places.append(place)
    return Table(str(file), rows, places)


def _read_csv(file: Path) -> Table:
    rows: list[Row] = []
    places: list[str] = []
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        row_ends = 0
        try:
            wanted = len(reader.fieldnames or [])
            row_ends = reader.line_num
            for row in reader:
                place = f"{file}:{row_ends + 1}"  # Where the row starts: a quoted field can go on over many lines.
                row_ends = reader.line_num
                if None in row or None in row.values():
                    raise ConfigError(f"{place}: this row must have {wanted} fields, as the first line has")
                rows.append(row)
                places.append(place)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}:{row_ends + 1}: not UTF-8 text, here or soon after: {error}") from error
        except csv.Error as error:
            raise ConfigError(f"{file}:{row_ends + 1}: not CSV: {error}") from error
    return Table(str(file), rows, places)


def _read_parquet(file: Path) -> Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(f"{file}: Parquet files need pyarrow: pip install pyarrow") from error
    try:
        return table_of(str(file), pyarrow.parquet.read_table(file).to_pylist())
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{file}: not a Parquet file: {error}") from error
