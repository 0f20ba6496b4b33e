"""Rows as tokens, kept under a hash of all that these depend on, so that no start makes them twice.

A file is `HASH.parquet`, the table of `Encoder.table`. What cannot be read or kept is said and costs the time alone.
"""

import io
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

import job
from job.config import RunConfig
from job.data.encode import Encoder
from job.data.rows import Row
from job.errors import DataError
from job.store import Store, without_query
from job.telling import telling
from job.uploads import why
from job.whole_files import Write, appearing

FROM_ROWS = 10_000
"""Rows from which on the run's own folder keeps their tokens: fewer are made about as fast as asked for."""
LIBRARIES = ("transformers", "tokenizers", "jinja2")
"""Those that make tokens."""


class Kept:
    """Tokens where `data.cache` keeps them; on a rank that does not read rows, nothing.

    Attributes:
        said: sentences on what was found, and what could not be read.

    Raises:
        DataError: data.cache is no URL of a kind that is known here.
    """

    def __init__(self, config: RunConfig):
        where = config.data.cache
        own = where == "auto"
        self.store: Store | None = None
        if own:
            self.store = Store(config.output.url, config.storage).child("tokens")
        elif where is not None:
            with telling(DataError, "data.cache", "Name a folder at a URL whose driver is installed"):
                self.store = Store(where, config.storage)
        self.least = FROM_ROWS if own else 0
        self.said: list[str] = []
        self._new: list[tuple[str, pyarrow.Table]] = []

    def table(self, encoder: Encoder, rows: Sequence[Row]) -> pyarrow.Table:
        """The rows' `Encoder.table`, as it was kept or made now.

        Raises:
            DataError: a row cannot be used.
        """
        if self.store is None or len(rows) < self.least:
            return encoder.table(rows)
        name = name_of(encoder, rows)
        found = self._read(self.store, name) if name else None
        if found is not None:
            self.said.append(f"the tokens of {len(rows)} rows were there already")
            return found
        made = encoder.table(rows)
        if name:
            self._new.append((name, made))
        return made

    def keep(self, say: Callable[[str], None]) -> threading.Thread:
        """Have what was made written by a thread that nobody needs to wait for, neither checkpoints nor the end of the
        run. `say` hears why it cannot be."""
        thread = threading.Thread(target=self._write, args=(self._new, say), name="tokens", daemon=True)
        self._new = []
        thread.start()
        return thread

    def _read(self, store: Store, name: str) -> pyarrow.Table | None:
        try:
            content = pyarrow.BufferReader(store.read(name))
            return pyarrow.parquet.read_table(content, page_checksum_verification=True)
        except FileNotFoundError:
            return None
        except Exception as fault:  # every driver has its own errors
            where = without_query(f"{store.url}/{name}")
            self.said.append(f"{where} cannot be read ({why(fault)}): the tokens are made anew")
            return None

    def _write(self, new: Sequence[tuple[str, pyarrow.Table]], say: Callable[[str], None]) -> None:
        for name, table in new:
            assert self.store is not None
            try:
                with appearing(self.store, name) as write:
                    plain = table.replace_schema_metadata(None)  # datasets writes its own view of it there
                    pyarrow.parquet.write_table(plain, _Sink(write), compression="zstd", write_page_checksum=True)
            except Exception as fault:  # every driver has its own errors
                where = without_query(self.store.url)
                with suppress(OSError):  # a terminal that is closed
                    say(f"the tokens are not kept in {where} ({why(fault)}): the next start makes them again")


def name_of(encoder: Encoder, rows: Sequence[Row]) -> str | None:
    """The file of these rows' tokens, by all that decides them: rows, tokenizer, settings, libraries, this package.

    None where a program decides them that is not ours: a format or a tokenizer of the user's own.
    """
    identity = encoder.identity()
    if identity is None:
        return None
    whole = sha256("".join([_program(), identity]).encode())
    for row in rows:
        whole.update(json.dumps(row.fields).encode() + b"\n")
    return f"{whole.hexdigest()}.parquet"


@cache
def _program() -> str:
    """This package's code and the versions of the libraries that make tokens."""
    sources = sorted(Path(job.__file__).parent.rglob("*.py"))
    code = sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return " ".join([job.__version__, code, *map(version, LIBRARIES), ""])


class _Sink(io.RawIOBase):
    """What Arrow takes for a file."""

    def __init__(self, write: Write):
        self._write, self._place = write, 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def write(self, content: Any) -> int:
        part = memoryview(content).cast("B")
        self._write(part)
        self._place += len(part)
        return len(part)
