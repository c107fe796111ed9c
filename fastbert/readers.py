"""Rows and texts out of .txt, .csv, .tsv, .jsonl and .parquet files, one at a time."""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

FORMATS = ("txt", "csv", "tsv", "jsonl", "parquet")

# A column with one of these names is taken before any other, in this order.
_USUAL_COLUMNS = ("text", "sentence", "content", "review", "document", "body")

_HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")  # what "\\ud83d" without its other half gives

_HOW_TO_GO_ON = "--errors replace puts U+FFFD in its place and goes on"


class RecordFile:
    """The rows of a table, in order: `records` gives where each is, "line 5", and its columns.

    path: a file, or "-" for standard input, a line a text. format: one of FORMATS; None goes by the
    name (.txt, .csv.gz, ...). errors: what bytes that are not UTF-8 do: "strict" refuses them,
    "replace" makes them U+FFFD.

    csv: RFC 4180 with a header line. tsv: a header line, split at tabs, no quoting. In both a
    record must have as many fields as the header. jsonl: an object a line. txt: a line a text, in
    the column "text". Raises ValueError with the file and the line for anything else.
    """

    def __init__(
        self, path: str | Path, *, format: str | None = None, errors: str = "strict"
    ) -> None:
        self.is_stdin = str(path) == "-"
        self.path = Path(path)
        self.name = "standard input" if self.is_stdin else str(path)
        self.errors = errors
        if not self.is_stdin and not self.path.is_file():
            what = "is not a file" if self.path.exists() else "does not exist"
            raise FileNotFoundError(f"{self.name} {what}")
        self.format = format or ("txt" if self.is_stdin else _format_of(self.path))
        self._file: IO[bytes] | None = None
        self._share: float | None = None
        if self.is_stdin and self.format != "txt":
            raise ValueError(f"standard input is read as txt, a line a text, not as {self.format}")

    def records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Where each row is, and its values by column: text, but in jsonl and parquet."""
        if self.format == "parquet":
            yield from self._parquet_records()
        elif self.format == "txt":
            for number, line in self.lines():
                yield f"line {number}", {"text": line.removesuffix("\n").removesuffix("\r")}
        else:
            for number, record in self._records():
                yield f"line {number}", record

    def _parquet_records(self) -> Iterator[tuple[str, dict[str, Any]]]:
        pa, parquet = import_pyarrow()
        row = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                for batch in file.iter_batches(8192):
                    for record in batch.to_pylist():
                        yield f"row {row} (the first is 0)", record
                        row += 1
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name}, row {row} or later: not UTF-8: {error}") from None
        except pa.ArrowException as error:
            raise ValueError(f"{self.name} cannot be read as parquet: {error}") from None

    def share_read(self) -> float | None:
        """How much of the file has been read, 0 to 1; None where that cannot be known."""
        if self._file is not None and not self._file.closed and not self.is_stdin:
            self._share = self._file.tell() / max(1, self.path.stat().st_size)
        return self._share

    def lines(self) -> Iterator[tuple[int, str]]:
        """Each line with its number from 1 and its line end. Only a line feed ends a line."""
        with nullcontext(sys.stdin.buffer) if self.is_stdin else self.path.open("rb") as raw:
            self._file = raw
            packed = self.path.suffix == ".gz" and not self.is_stdin
            lines = gzip.GzipFile(fileobj=raw) if packed else raw
            try:
                for number, line in enumerate(lines, 1):
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
                    yield number, self._decode(line, f"line {number}")
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{self.name} is not a whole gzip file: {error}") from None
        self._share = 1.0

    def _decode(self, data: bytes, where: str) -> str:
        try:
            return data.decode("utf-8", self.errors)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.name}, {where}: byte 0x{data[error.start]:02x} at position "
                f"{error.start + 1} is not UTF-8; {_HOW_TO_GO_ON}"
            ) from None

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of a csv, tsv or jsonl file with their line numbers."""
        if self.format == "jsonl":
            for number, line in self.lines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{self.name}, line {number}: not JSON: {error}") from None
                if not isinstance(record, dict):
                    raise ValueError(
                        f"{self.name}, line {number}: wanted a JSON object, "
                        f"got {type(record).__name__}"
                    )
                yield number, record
            return
        rows = self._csv_rows() if self.format == "csv" else self._tsv_rows()
        _, header = next(rows, (0, []))
        for number, fields in rows:
            if len(fields) != len(header):
                raise ValueError(
                    f"{self.name}, line {number}: wanted {len(header)} fields, as in the header, "
                    f"got {len(fields)}"
                )
            yield number, dict(zip(header, fields, strict=True))

    def _tsv_rows(self) -> Iterator[tuple[int, list[str]]]:
        for number, line in self.lines():
            yield number, line.removesuffix("\n").removesuffix("\r").split("\t")

    def _csv_rows(self) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(sys.maxsize)  # a text may be long; Python's limit is 131,072
        reader = csv.reader((line for _, line in self.lines()), strict=True)
        try:
            for fields in reader:
                yield reader.line_num, fields or [""]
        except csv.Error as error:
            raise ValueError(f"{self.name}, line {reader.line_num}: not CSV: {error}") from None


class TextSource(RecordFile):
    """The texts of a file, in order. Iterating again starts again, but not on standard input.

    path, format, errors: as RecordFile's. column: which column holds the text; None guesses.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        column: str | None = None,
        format: str | None = None,
        errors: str = "strict",
    ) -> None:
        super().__init__(path, format=format, errors=errors)
        self.guessed = column is None and self.format != "txt"
        self.column = column
        if self.format != "txt":
            self.column = self._choose_column()
        elif column is not None:
            raise ValueError(f"{self.name} is read as txt, which has no columns, so no {column!r}")

    def __iter__(self) -> Iterator[str]:
        if self.format == "parquet":
            yield from self._parquet_texts()
        elif self.format == "txt":
            for _, line in self.lines():
                yield line.removesuffix("\n").removesuffix("\r")
        else:
            for number, record in self._records():
                yield self._text(record, f"line {number}")

    def _text(self, record: dict[str, Any], where: str) -> str:
        value = record.get(self.column or "")
        if not isinstance(value, str):
            got = "is missing" if value is None else f"holds {type(value).__name__}, not text"
            raise ValueError(f"{self.name}, {where}: column {self.column!r} {got}")
        if self.format == "jsonl" and (half := _HALF_A_CHARACTER.search(value)):
            if self.errors == "strict":
                raise ValueError(
                    f"{self.name}, {where}: {half[0]!a} is half a character; {_HOW_TO_GO_ON}"
                )
            value = _HALF_A_CHARACTER.sub("\ufffd", value)
        return value

    def _parquet_texts(self) -> Iterator[str]:
        pa, parquet = import_pyarrow()
        if not self._columns()[str(self.column)]:
            raise ValueError(f"{self.name}: column {self.column!r} does not hold text")
        try:
            with parquet.ParquetFile(self.path) as file:
                row, n_rows = 0, file.metadata.num_rows
                for batch in file.iter_batches(8192, columns=[self.column]):
                    # As bytes, so that text that is not UTF-8 is met here, where the row is known.
                    values = batch.column(0).cast(pa.large_string()).cast(pa.large_binary())
                    for value in values.to_pylist():
                        where = f"row {row} (the first is 0)"
                        if value is None:
                            raise ValueError(
                                f"{self.name}, {where}: column {self.column!r} is missing"
                            )
                        yield self._decode(value, where)
                        row += 1
                        self._share = row / n_rows
        except pa.ArrowException as error:
            raise ValueError(f"{self.name} cannot be read as parquet: {error}") from None

    def _choose_column(self) -> str:
        """The column that was asked for, or the one that looks like the text."""
        columns = self._columns()
        found = f"it has {', '.join(columns)}"
        if self.column is not None:
            if self.column not in columns:
                raise ValueError(f"{self.name} has no column {self.column!r}; {found}")
            return self.column
        holds_text = [name for name, is_text in columns.items() if is_text]
        for usual in _USUAL_COLUMNS:
            for name in holds_text:
                if name.lower() == usual:
                    return name
        if len(holds_text) == 1:
            return holds_text[0]
        raise ValueError(f"which column of {self.name} is the text? Name it with --text; {found}")

    def _columns(self) -> dict[str, bool]:
        """The names of the columns, and whether each looks like text."""
        if self.format == "parquet":
            pa, parquet = import_pyarrow()
            try:
                schema = parquet.read_schema(self.path)
            except pa.ArrowException as error:
                raise ValueError(f"{self.name} cannot be read as parquet: {error}") from None
            return {field.name: _is_arrow_text(pa, field.type) for field in schema}
        _, record = next(self._records(), (0, None))
        if record is None:
            raise ValueError(f"{self.name} is empty: it has no rows")
        if self.format == "jsonl":
            return {name: isinstance(value, str) for name, value in record.items()}
        return {name: not _is_number(value) for name, value in record.items()}


def _is_arrow_text(pa: Any, type: Any) -> bool:
    if pa.types.is_dictionary(type):
        type = type.value_type
    return type in (pa.string(), pa.large_string(), pa.string_view())


def import_pyarrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet, or a ValueError that says how to install them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError("parquet files need pyarrow: pip install pyarrow") from None
    return pyarrow, pyarrow.parquet


def _format_of(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    name = {".ndjson": "jsonl"}.get("".join(suffix), "".join(suffix)[1:])
    if name not in FORMATS or (packed and name == "parquet"):
        raise ValueError(
            f"what {path} holds is not clear from its name: wanted .{', .'.join(FORMATS)} "
            f"(text ones also with .gz), or say it with --format"
        )
    return name


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
