"""The rows of one opened file, made as they are asked for: JSON lines, tables and Parquet, compressed or not."""

import base64
import bz2
import csv
import gzip
import io
import json
import lzma
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow.parquet
import zstandard

from job.errors import DataError, JobError
from job.store import compression, reason, without_query
from job.turns import kind_of

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
BATCH = 256
"""Parquet's rows that are made at once."""
PIECE = 8 << 20
"""Bytes of a column of Parquet that are held at once."""


class Row(NamedTuple):
    """One example and where it stands (`file line 3`), for messages. The values are of JSON's types alone."""

    where: str
    fields: dict[str, Any]


class Outage(Exception):
    """A storage did not answer for as long as it was asked."""


def ending(name: str) -> str:
    """The file's kind by its name (`.jsonl`), whatever its compression; empty when it says none."""
    suffixes = [part for part in PurePosixPath(name).suffixes if part not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def refuse_unknown_kind(name: str) -> None:
    """Refuse a file whose name says no kind that has rows.

    Raises:
        DataError: it is unknown.
    """
    if ending(name) not in ENDINGS:
        raise DataError(f"{name}: unknown kind of file. Expected {', '.join(ENDINGS)}, compressed or not")


def file_rows(file: BinaryIO, name: str, skip: int = 0, lazy: bool = False) -> Iterator[Row]:
    """The rows of a file, read as far as they are asked for.

    Args:
        file: opened, not decompressed yet.
        name: what messages call it; its endings say kind and compression.
        skip: rows to pass over. Parquet does not read their row groups.
        lazy: refuse what is only had from the whole file in memory.

    Raises:
        DataError: the file or a row is broken, or it has fewer rows than are to be passed over; names file and line.
        JobError: the storage did not answer for too long.
    """
    given = 0
    try:
        for row in _rows(file, name, skip, lazy):
            given += 1
            yield row
    except JobError:
        raise
    except Exception as fault:  # every driver and decompressor has its own errors
        place = f"{name} behind row {skip + given}" if given else name
        if isinstance(fault, Outage):
            raise JobError(f"{place}: {fault}") from fault
        if isinstance(fault, UnicodeDecodeError):
            why = f"no UTF-8 text ({fault.reason} at byte {fault.start}). Convert it to UTF-8"
            raise DataError(f"{place}: {why}") from fault
        raise DataError(f"{place}: cannot be read: {without_query(reason(fault))}") from fault


def _rows(file: BinaryIO, name: str, skip: int, lazy: bool) -> Iterator[Row]:
    kind, packed = ending(name), compression(name)
    if kind == ".parquet":
        yield from _read_parquet(file, name, packed, skip, lazy)
        return
    table = kind in (".csv", ".tsv")
    with io.TextIOWrapper(cast(io.BufferedReader, unpacked(file, packed)), "utf-8", newline="" if table else None) as t:
        lines = _lines(t)
        yield from _read_table(lines, name, kind, skip) if table else _read_json(lines, name, skip, lazy)


def unpacked(file: BinaryIO, packed: str | None) -> BinaryIO:
    """The content of a compressed file, by fsspec's name of the compression; what ends too early is an EOFError."""
    openers: dict[str, Callable[[BinaryIO], Any]] = {
        "gzip": lambda file: gzip.GzipFile(fileobj=file),
        "bz2": bz2.BZ2File,
        "xz": lzma.LZMAFile,
        "zstd": lambda file: io.BufferedReader(_Zstd(file)),
        "zip": _first_of_zip,
    }
    return cast(BinaryIO, openers[packed](file)) if packed else file


def _first_of_zip(file: BinaryIO) -> Any:
    archive = zipfile.ZipFile(file)
    return archive.open(archive.namelist()[0])


class _Zstd(io.RawIOBase):
    """zstandard's own reader takes a file that was cut off for one that ends there."""

    def __init__(self, file: BinaryIO):
        self.file, self.packed, self.content = file, b"", b""
        self.frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.content:
            self.packed = self.packed or self.file.read(1 << 16)
            if not self.packed:
                if self.frame:
                    raise EOFError("Compressed file ended before the end of a frame")
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.content, self.packed = self.frame.decompress(self.packed), b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        count = min(len(buffer), len(self.content))
        buffer[:count], self.content = self.content[:count], self.content[count:]
        return count


def _read_parquet(file: BinaryIO, name: str, packed: str | None, skip: int, lazy: bool) -> Iterator[Row]:
    if packed and lazy:
        raise DataError(f"{name}: Parquet in a compressed file cannot be streamed. Unpack it: it is compressed inside")
    # Parquet is read from its end, which decompressors reach only through all before it
    source = io.BytesIO(unpacked(file, packed).read()) if packed else file
    content = pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=PIECE)
    about = content.metadata
    if skip > about.num_rows:
        raise shorter(name, about.num_rows, skip)
    number = 0
    for group in range(about.num_row_groups):
        count = about.row_group(group).num_rows
        if number + count <= skip:
            number += count
            continue
        for batch in content.iter_batches(BATCH, row_groups=[group]):
            if number + len(batch) <= skip:
                number += len(batch)
                continue
            for fields in batch.to_pylist():
                number += 1
                if number > skip:
                    yield Row(f"{name} row {number}", plain(fields))


def shorter(name: str, found: int, skip: int) -> DataError:
    """The refusal of a file that ends before the place where reading is to go on."""
    return DataError(
        f"{name}: has {found} rows, expected the {skip} that were read before the run stopped. "
        "Put the file back that the run began with, or begin a new run at another output.url"
    )


def plain(fields: Any) -> dict[str, Any]:
    """The row in JSON's types, as if it came from a JSON file: Parquet and the hub's sets have more."""
    return dict(json.loads(json.dumps(fields, default=_as_text)))


def _as_text(value: Any) -> Any:
    """Times and decimals as Python writes them, arrays as lists, bytes as the text that they are, else in base64."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _lines(file: Iterable[str]) -> Iterator[str]:
    """The file's lines, without the byte order mark that spreadsheets put in front."""
    for number, line in enumerate(file):
        yield line if number else line.removeprefix("\ufeff")


def _read_table(lines: Iterator[str], name: str, kind: str, skip: int) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # its 131072 characters are fewer than a long document has
    reader = csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",", strict=True)
    passed = 0
    try:
        names = [column for column in reader.fieldnames or () if column.strip()]
        repeated = next((column for column in names if names.count(column) > 1), None)
        if repeated is not None:
            raise DataError(
                f"{name} line {reader.line_num}: the column {repeated} is there twice. Rename or remove one"
            )
        for fields in reader:
            if passed < skip:
                passed += 1
                continue
            if None in fields:
                raise DataError(f"{name} line {reader.line_num}: more cells than the header's {len(fields) - 1}")
            yield Row(f"{name} line {reader.line_num}", dict(fields))
    except csv.Error as fault:
        raise DataError(f"{name} line {reader.line_num + 1}: broken CSV: {fault}") from fault  # where the row begins
    if passed < skip:
        raise shorter(name, passed, skip)


def _read_json(lines: Iterator[str], name: str, skip: int, lazy: bool) -> Iterator[Row]:
    """One object a line, or the whole file as one list of objects."""
    blank = passed = 0
    for number, text in enumerate(lines, 1):
        if not text.strip():
            blank += 1
        elif number == blank + 1 and text.lstrip().startswith("["):
            if lazy:
                raise DataError(f"{name}: one list of rows cannot be streamed. Write one object a line")
            yield from _read_list("\n" * blank + text + "".join(lines), name)
        elif passed < skip:
            passed += 1
        else:
            yield Row(f"{name} line {number}", _object(text, f"{name} line {number}"))
    if passed < skip:
        raise shorter(name, passed, skip)


def _read_list(text: str, name: str) -> Iterator[Row]:
    try:
        items = json.loads(text)
    except json.JSONDecodeError as fault:
        raise DataError(f"{name} line {fault.lineno}: broken JSON: {fault.msg} at column {fault.colno}") from fault
    for number, fields in enumerate(items, 1):
        if not isinstance(fields, dict):
            raise DataError(f"{name} row {number}: {kind_of(fields)}, expected an object with named fields")
        yield Row(f"{name} row {number}", fields)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as fault:
        raise DataError(
            f"{where}: broken JSON: {fault.msg} at column {fault.colno}. Expected one object a line"
        ) from fault
    if not isinstance(fields, dict):
        raise DataError(f"{where}: {kind_of(fields)}, expected an object with named fields")
    return fields
