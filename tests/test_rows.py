"""Rows from any source, and what is said when a source is missing or broken."""

import bz2
import csv
import gzip
import io
import json
import lzma
import threading
from collections.abc import Callable, Iterator
from datetime import date, datetime
from decimal import Decimal
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from job.config.running import Storage
from job.data.rows import read_rows
from job.errors import DataError

ROWS = [{"instruction": f"Say {n}, twice.", "output": f"{n}\n{n} 你好"} for n in range(6)]
EXPECTED = "Give a file, glob or folder of .json, .jsonl, .ndjson, .csv, .tsv, .parquet, or a hub id"


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


FILES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "rows.jsonl": lines,
    "rows.ndjson": lines,
    "rows.json": lambda rows: json.dumps(rows).encode(),
    "pretty.json": lambda rows: b"\n" + json.dumps(rows, indent=2, ensure_ascii=False).encode(),
    "lines.json": lines,
    "mark.jsonl": lambda rows: b"\xef\xbb\xbf" + lines(rows),
    "rows.csv": lambda rows: table(rows, ","),
    "excel.csv": lambda rows: b"\xef\xbb\xbf" + table(rows, ","),
    "rows.tsv": lambda rows: table(rows, "\t"),
    "rows.parquet": parquet,
    "rows.parquet.gz": lambda rows: gzip.compress(parquet(rows)),
    "rows.parquet.zst": lambda rows: zstandard.compress(parquet(rows)),
    "rows.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "rows.jsonl.bz2": lambda rows: bz2.compress(lines(rows)),
    "rows.v1.json.xz": lambda rows: lzma.compress(lines(rows)),
    "rows.csv.zst": lambda rows: zstandard.compress(table(rows, ",")),
}


def read(*sources: str | Path) -> list[dict[str, Any]]:
    return [row.fields for row in read_rows([str(source) for source in sources], Storage())]


def refusal(source: str | Path) -> str:
    with pytest.raises(DataError) as refused:
        read_rows(str(source), Storage())
    assert refused.value.exit_code == 2
    return str(refused.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "many").mkdir()
    (tmp_path / "many/b.jsonl").write_bytes(lines(ROWS[3:]))
    (tmp_path / "many/a.json.gz").write_bytes(gzip.compress(lines(ROWS[:3])))
    (tmp_path / "many/README.md").write_text("not data")
    return tmp_path


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def web(folder: Path) -> Iterator[str]:
    """The folder, over http on the loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, args=[0.05], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_kind_gives_its_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name](ROWS))
    assert read(tmp_path / name) == read(f"file://{tmp_path / name}") == ROWS


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet", "rows.csv.zst"])
def test_memory_and_http_give_the_same_rows(folder: Path, web: str, name: str) -> None:
    fsspec.filesystem("memory").pipe_file(f"/bucket/{name}", FILES[name](ROWS))
    (folder / name).write_bytes(FILES[name](ROWS))
    assert read(f"memory://bucket/{name}") == read(f"{web}/{name}") == ROWS
    assert read(f"memory://bucket/{name}:train[:2]") == read(f"{web}/{name}:train[:2]") == ROWS[:2]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.zst", "rows.parquet.gz"])
def test_kind_and_compression_are_those_of_the_path_before_an_addresss_query(folder: Path, web: str, name: str) -> None:
    (folder / name).write_bytes(FILES[name](ROWS))
    assert read(f"{web}/{name}?signature=a.zip&of=user:me#part") == ROWS
    assert read(f"{web}/{name}?signature=a.zip:train[:2]") == ROWS[:2]


def test_no_message_shows_the_query_of_an_address(folder: Path, web: str) -> None:
    (folder / "empty.jsonl").write_bytes(b"")
    (folder / "rows.txt").write_bytes(b"")
    kinds = ".json, .jsonl, .ndjson, .csv, .tsv, .parquet"
    for name, message in {
        "empty.jsonl": "no rows. Expected at least one",
        "rows.txt": f"unknown kind of file. Expected {kinds}, compressed or not",
        "none.jsonl": "cannot be read: not found",
    }.items():
        assert refusal(f"{web}/{name}?signature=secret") == f"{web}/{name}: {message}"
    assert "secret" not in refusal("http://127.0.0.1:1/rows.jsonl?signature=secret")


def test_parquets_own_types_come_as_json_has_them(tmp_path: Path) -> None:
    row = {
        "when": datetime(2024, 7, 26, 12, 30),
        "day": date(2024, 7, 26),
        "price": Decimal("1.50"),
        "text": "你好".encode(),
        "image": b"\xff\xd8",
        "turns": [{"at": date(2024, 7, 26), "n": 1}],
        "none": None,
        "share": 0.1,
    }
    (tmp_path / "rows.parquet").write_bytes(parquet([row]))
    assert read(tmp_path / "rows.parquet") == [
        {
            "when": "2024-07-26 12:30:00",
            "day": "2024-07-26",
            "price": "1.50",
            "text": "你好",
            "image": "/9g=",
            "turns": [{"at": "2024-07-26", "n": 1}],
            "none": None,
            "share": 0.1,
        }
    ]


def test_a_hub_sets_own_types_come_as_json_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def had(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_dict({"day": [date(2024, 7, 26)], "n": [1]})

    monkeypatch.setattr(datasets, "load_dataset", had)
    assert read("owner/rows:train[:1]") == [{"day": "2024-07-26", "n": 1}]
    assert asked == [("owner/rows", "train[:1]")]


def test_folders_globs_and_lists_are_read_in_the_order_of_their_names(folder: Path) -> None:
    assert read(folder / "many") == read(folder / "many/*.json*") == ROWS
    assert read(folder / "many/b.jsonl", folder / "many/a.json.gz") == ROWS[3:] + ROWS[:3]
    fsspec.filesystem("memory").pipe(
        {f"/set/{name}.jsonl": lines([row]) for name, row in zip("cba", ROWS, strict=False)}
    )
    assert read("memory://set") == read("memory://set/*.jsonl") == ROWS[2::-1]


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        ("train", slice(0, 200)),
        ("train[:1%]", slice(0, 2)),
        ("train[50%:]", slice(100, 200)),
        ("train[3:5]", slice(3, 5)),
        ("train[-1:]", slice(199, 200)),
    ],
)
def test_a_slice_behind_a_colon_takes_its_part(tmp_path: Path, part: str, rows: slice) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines([{"n": n} for n in range(200)]))
    assert read(f"{tmp_path}/rows.jsonl:{part}") == [{"n": n} for n in range(200)][rows]


def test_a_row_says_where_it_stands(folder: Path) -> None:
    (folder / "gaps.jsonl").write_bytes(b'\n{"a": 1}\n\n{"a": 2}\n')
    (folder / "list.json").write_bytes(b'[{"a": 1}, {"a": 2}]')
    (folder / "t.csv").write_bytes(b'a\n"1\n1"\n2\n')
    where = [
        row.where for name in ("gaps.jsonl", "list.json", "t.csv") for row in read_rows(f"{folder}/{name}", Storage())
    ]
    ends = [
        "gaps.jsonl line 2",
        "gaps.jsonl line 4",
        "list.json row 1",
        "list.json row 2",
        "t.csv line 3",
        "t.csv line 4",
    ]
    assert where == [f"{folder}/{end}" for end in ends]


def test_cells_behind_the_named_columns_may_be_left_over(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,,\n1,,\n")
    assert read(tmp_path / "a.csv")[0]["a"] == "1"


def test_a_long_document_in_a_table_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_bytes(table([{"text": "x" * 200_000}], ","))
    assert len(read(tmp_path / "long.csv")[0]["text"]) == 200_000


BROKEN = {
    "line 3: broken JSON: Expecting ',' delimiter at column 9. Expected one object a line": (
        "a.jsonl",
        b'\n{"a": 1}\n{"a": 1 "b": 2}\n',
    ),
    "line 2: broken JSON: Expecting property name enclosed in double quotes at column 2. Expected one object a line": (
        "a.jsonl",
        b'{"a": 1}\n{',
    ),
    "line 2: a list, expected an object with named fields": ("a.jsonl", b'{"a": 1}\n[1, 2]\n'),
    "line 1: a str, expected an object with named fields": ("a.jsonl", b'"a"\n'),
    "line 4: broken JSON: Expecting value at column 1": ("a.json", b'\n[\n{"a": 1},\n]\n'),
    "row 2: an int, expected an object with named fields": ("a.json", b'[{"a": 1}, 2]'),
    "line 1: the column b is there twice. Rename or remove one": ("a.csv", b"a,b,b\n1,2,3\n"),
    "line 1: the column a is there twice. Rename or remove one": ("a.tsv", b"a\ta\n1\t2\n"),
    "line 3: more cells than the header's 2": ("a.csv", b"a,b\n1,2\n1,2,3\n"),
    "line 2: broken CSV: unexpected end of data": ("a.csv", b'a,b\n"1,2'),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_file_names_the_place(tmp_path: Path, message: str) -> None:
    name, content = BROKEN[message]
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name) == f"{tmp_path}/{name} {message}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "no rows. Expected at least one"),
        ("a.json", b"[]", "no rows. Expected at least one"),
        ("a.csv", b"a,b\n", "no rows. Expected at least one"),
        ("a.jsonl", b"\n \n", "no rows. Expected at least one"),
        ("a.parquet", parquet([{"a": 1}])[:-1], "cannot be read: ArrowInvalid: "),
        ("a.jsonl.gz", b'{"a": 1}\n', "cannot be read: BadGzipFile: Not a gzipped file"),
        (
            "a.jsonl",
            '{"a": "你"}'.encode("gbk"),
            "no UTF-8 text (invalid continuation byte at byte 7). Convert it to UTF-8",
        ),
        (
            "a.txt",
            b"text",
            "unknown kind of file. Expected .json, .jsonl, .ndjson, .csv, .tsv, .parquet, compressed or not",
        ),
    ],
)
def test_a_file_without_usable_rows_says_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).startswith(f"{tmp_path}/{name}: {message}")


def test_a_source_that_is_not_there_says_so(tmp_path: Path, web: str) -> None:
    for missing in (tmp_path / "rows.jsonl", tmp_path / "*.jsonl", "memory://nowhere/rows.jsonl", "rows.jsonl"):
        assert refusal(missing) == f"{missing}: not found. {EXPECTED}"
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty") == f"{tmp_path}/empty: not found. {EXPECTED}"
    assert refusal(f"{web}/rows.jsonl") == f"{web}/rows.jsonl: cannot be read: not found"


def test_a_hub_id_that_cannot_be_had_names_both_cures() -> None:
    message = refusal("nobody/nothing:train[:1%]")
    assert message.startswith("nobody/nothing:train[:1%] is no file here and cannot be had from the hub (")
    assert message.endswith("). Check the path, or the id and HF_TOKEN")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("test", "is no split of a file (Unknown split \"test\". Should be one of ['train'].). "),
        ("train[:300%]", "is no split of a file (Percent slice boundaries must be > -100 and < 100.). "),
        ("train[a:b]", "is no split of a file (Unrecognized instruction format: train[a:b]). "),
    ],
)
def test_a_split_that_a_file_does_not_have_is_refused(folder: Path, part: str, message: str) -> None:
    source = f"{folder}/many/b.jsonl"
    assert refusal(f"{source}:{part}") == f"{source}:{part} {message}Use train or a slice such as train[:1%]"


def test_one_empty_source_of_a_list_is_not_passed_over(folder: Path) -> None:
    (folder / "empty.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.jsonl: no rows\. Expected at least one"):
        read(folder / "many", folder / "empty.jsonl")
