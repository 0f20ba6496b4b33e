"""A file system with one file of 2^40 bytes, whose rows are made where they are read."""

import json
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

HUGE = "huge://rows.jsonl"
SIZE = 1 << 40
"""Its bytes."""
LINE = 128
"""Bytes of each row."""


class Huge(AbstractFileSystem):
    """Row n asks to count to n."""

    protocol = "huge"

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        if self._strip_protocol(path) != "rows.jsonl":
            raise FileNotFoundError(path)
        return {"name": "rows.jsonl", "size": SIZE, "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        assert start is not None
        assert end is not None
        first = start // LINE
        lines = b"".join(_line(number) for number in range(first, -(-end // LINE)))
        return lines[start - first * LINE : end - first * LINE]


def _line(number: int) -> bytes:
    row = {"instruction": f"Count to {number}.", "output": " ".join(["one"] * (number % 7 + 1))}
    return json.dumps(row).encode().ljust(LINE - 1) + b"\n"


fsspec.register_implementation("huge", Huge)
