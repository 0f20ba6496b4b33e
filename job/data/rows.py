"""Rows from any source: files at any URL, globs, folders, hub ids, with a split or slice behind a colon."""

import base64
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import datasets
import fsspec
import pyarrow.parquet

from job.config.running import Storage
from job.errors import DataError
from job.store import Store, compression, fs_options, open_text, reason, without_query
from job.turns import kind_of

ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_SPLIT = re.compile(r"^(?P<source>.+?):(?P<split>[A-Za-z_][\w.-]*(\[[^\]]*\])?)$")


class Row(NamedTuple):
    """One example and where it stands (`file line 3`), for messages. The values are of JSON's types alone."""

    where: str
    fields: dict[str, Any]


def read_rows(sources: str | Sequence[str], storage: Storage) -> list[Row]:
    """All rows of one or several sources, in order, whatever they are read for.

    Raises:
        DataError: a source is missing, broken or empty; names file and line.
    """
    rows: list[Row] = []
    for source in [sources] if isinstance(sources, str) else sources:
        found = _read_source(source, storage)
        if not found:
            raise DataError(f"{without_query(source)}: no rows. Expected at least one")
        rows += found
    return rows


@contextmanager
def rows_of(setting: str) -> Iterator[None]:
    """Puts the setting that named the rows in front of what is wrong with them."""
    try:
        yield
    except DataError as fault:
        raise DataError(f"{setting}: {fault}") from fault


def _read_source(source: str, storage: Storage) -> list[Row]:
    match = _SPLIT.match(source)
    if match and without_query(source) != source and not match["split"].startswith("train"):
        match = None  # a colon in the address' query
    source, split = (match["source"], match["split"]) if match else (source, None)
    if _is_hub_id(source):
        return _read_hub(source, split or "train")
    rows = [row for file in _files(source, storage) for row in _read_file(file, storage)]
    return _slice(rows, split, source) if split else rows


def _is_hub_id(source: str) -> bool:
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.endswith(ENDINGS + COMPRESSED)
    return bool(named) and not Store(source).fs.exists(source)


def _read_hub(name: str, split: str) -> list[Row]:
    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as fault:  # the hub's client raises many kinds
        raise DataError(
            f"{name}:{split} is no file here and cannot be had from the hub ({reason(fault)}). "
            "Check the path, or the id and HF_TOKEN"
        ) from fault
    return [Row(f"{name}:{split} row {number}", _plain(row)) for number, row in enumerate(found, 1)]


def _slice(rows: list[Row], split: str, source: str) -> list[Row]:
    """Apply `train[:1%]` by datasets' own rules; a file's rows are its split `train`."""
    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError, KeyError) as fault:
        raise DataError(
            f"{without_query(source)}:{split} is no split of a file ({fault}). Use train or a slice such as train[:1%]"
        ) from fault
    return rows[slice(part.from_, part.to)]


def _files(source: str, storage: Storage) -> list[str]:
    """The data files that a path, glob or folder stands for, as URLs."""
    if source.startswith(("http://", "https://")):
        return [source]
    try:
        store = Store(source, storage)
        if any(sign in source for sign in "*?["):
            paths = sorted(str(path) for path in store.fs.glob(store.root))
        elif store.fs.isdir(store.root):
            paths = [store.path(name) for name in store.names() if _ending(name) in ENDINGS]
        else:
            paths = [store.root] if store.fs.exists(store.root) else []
    except Exception as fault:  # every driver has its own errors
        raise DataError(f"{source}: {reason(fault)}. Check the URL, the bucket and storage.endpoint") from fault
    if not paths:
        raise DataError(f"{source}: not found. Give a file, glob or folder of {', '.join(ENDINGS)}, or a hub id")
    return [store.fs.unstrip_protocol(path) for path in paths]


def _ending(name: str) -> str:
    suffixes = [part for part in PurePosixPath(name).suffixes if part not in COMPRESSED]
    return suffixes[-1] if suffixes else ""


def _read_file(url: str, storage: Storage) -> list[Row]:
    name = without_query(url).removeprefix("file://")
    kind = _ending(name)
    if kind not in ENDINGS:
        raise DataError(f"{name}: unknown kind of file. Expected {', '.join(ENDINGS)}, compressed or not")
    try:
        if kind == ".parquet":
            return _read_parquet(url, name, storage)
        with open_text(url, storage, newline="" if kind in (".csv", ".tsv") else None) as file:
            lines = _lines(file)
            return list(_read_table(lines, name, kind) if kind in (".csv", ".tsv") else _read_json(lines, name))
    except UnicodeDecodeError as fault:
        raise DataError(f"{name}: no UTF-8 text ({fault.reason} at byte {fault.start}). Convert it to UTF-8") from fault
    except DataError:
        raise
    except Exception as fault:  # every driver and decompressor has its own errors
        raise DataError(f"{name}: cannot be read: {without_query(reason(fault))}") from fault


def _read_parquet(url: str, name: str, storage: Storage) -> list[Row]:
    packed = compression(url)
    with fsspec.open(url, "rb", compression=packed, **fs_options(url, storage)) as file:
        # Parquet is read from its end, which decompressors reach only through all before it
        table = pyarrow.parquet.read_table(io.BytesIO(file.read()) if packed else file)
    return [Row(f"{name} row {number}", _plain(row)) for number, row in enumerate(table.to_pylist(), 1)]


def _plain(fields: Any) -> dict[str, Any]:
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


def _read_table(lines: Iterator[str], name: str, kind: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # its 131072 characters are fewer than a long document has
    reader = csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ",", strict=True)
    try:
        names = [column for column in reader.fieldnames or () if column.strip()]
        repeated = next((column for column in names if names.count(column) > 1), None)
        if repeated is not None:
            raise DataError(
                f"{name} line {reader.line_num}: the column {repeated} is there twice. Rename or remove one"
            )
        for fields in reader:
            if None in fields:
                raise DataError(f"{name} line {reader.line_num}: more cells than the header's {len(fields) - 1}")
            yield Row(f"{name} line {reader.line_num}", dict(fields))
    except csv.Error as fault:
        raise DataError(f"{name} line {reader.line_num + 1}: broken CSV: {fault}") from fault  # where the row begins


def _read_json(lines: Iterator[str], name: str) -> Iterator[Row]:
    """One object a line, or the whole file as one list of objects."""
    blank = 0
    for number, text in enumerate(lines, 1):
        if not text.strip():
            blank += 1
        elif number == blank + 1 and text.lstrip().startswith("["):
            yield from _read_list("\n" * blank + text + "".join(lines), name)
        else:
            yield Row(f"{name} line {number}", _object(text, f"{name} line {number}"))


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
