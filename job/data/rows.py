"""Rows from any source: files at any URL, globs, folders, hub ids, with a split or slice behind a colon."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, cast

import fsspec

from job.config.running import Storage
from job.data.files import COMPRESSED, ENDINGS, Row, ending, file_rows, plain, refuse_unknown_kind
from job.errors import DataError
from job.store import Store, fs_options, reason, without_query
from job.telling import CHECK_BUCKET, telling

__all__ = ["Row", "files_of", "is_hub_id", "named", "parted", "read_rows", "rows_of"]

_SPLIT = re.compile(r"^(?P<source>.+?):(?P<split>[A-Za-z_][\w.-]*(\[[^\]]*\])?)$")


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
    source, split = parted(source)
    if is_hub_id(source):
        return _read_hub(source, split or "train")
    rows = [row for file in files_of(source, storage) for row in _read_file(file, storage)]
    return _slice(rows, split, source) if split else rows


def parted(source: str) -> tuple[str, str | None]:
    """The source, and the split or slice behind its colon."""
    match = _SPLIT.match(source)
    if match and without_query(source) != source and not match["split"].startswith("train"):
        match = None  # a colon in the address' query
    return (match["source"], match["split"]) if match else (source, None)


def is_hub_id(source: str) -> bool:
    """Whether it is owner/name and no file here."""
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.endswith(ENDINGS + COMPRESSED)
    return bool(named) and not Store(source).fs.exists(source)


def _read_hub(name: str, split: str) -> list[Row]:
    import datasets  # takes half a second, and rows in files need none of it

    try:
        found = datasets.load_dataset(name, split=split)
    except Exception as fault:  # the hub's client raises many kinds
        raise DataError(
            f"{name}:{split} is no file here and cannot be had from the hub ({reason(fault)}). "
            "Check the path, or the id and HF_TOKEN"
        ) from fault
    return [Row(f"{name}:{split} row {number}", plain(row)) for number, row in enumerate(found, 1)]


def _slice(rows: list[Row], split: str, source: str) -> list[Row]:
    """Apply `train[:1%]` by datasets' own rules; a file's rows are its split `train`."""
    import datasets

    try:
        (part,) = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError, KeyError) as fault:
        raise DataError(
            f"{without_query(source)}:{split} is no split of a file ({fault}). Use train or a slice such as train[:1%]"
        ) from fault
    return rows[slice(part.from_, part.to)]


def files_of(source: str, storage: Storage) -> list[str]:
    """The data files that a path, glob or folder stands for, as URLs, in order.

    Raises:
        DataError: there are none, or they cannot be listed.
    """
    if source.startswith(("http://", "https://")):
        return [source]
    with telling(DataError, source, CHECK_BUCKET):
        store = Store(source, storage)
        if any(sign in source for sign in "*?["):
            paths = sorted(str(path) for path in store.fs.glob(store.root))
        elif store.fs.isdir(store.root):
            paths = [store.path(name) for name in store.names() if ending(name) in ENDINGS]
        else:
            paths = [store.root] if store.fs.exists(store.root) else []
    if not paths:
        raise DataError(f"{source}: not found. Give a file, glob or folder of {', '.join(ENDINGS)}, or a hub id")
    return [store.fs.unstrip_protocol(path) for path in paths]


def named(url: str) -> str:
    """What messages call a file: its path or address, without a signature."""
    return without_query(url).removeprefix("file://")


def _read_file(url: str, storage: Storage) -> list[Row]:
    name = named(url)
    refuse_unknown_kind(name)
    try:
        opened = fsspec.open(url, "rb", **fs_options(url, storage)).open()
    except Exception as fault:  # every driver has its own errors
        raise DataError(f"{name}: cannot be read: {without_query(reason(fault))}") from fault
    with opened as file:
        return list(file_rows(cast(BinaryIO, file), name))
