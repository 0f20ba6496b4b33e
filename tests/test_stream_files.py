"""What a stream is read from: any kind of file, on a disk, over http and from S3; and files and storages that fail."""

import gzip
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from job.config.running import Storage
from job.data.files import ENDINGS
from job.data.shards import RangedFile, Shard, list_shards, shard_rows
from job.errors import DataError, JobError
from tests.s3 import BUCKET, S3
from tests.test_rows import FILES, lines, parquet
from tests.web import Web, serve

ROWS = [{"instruction": f"Say {n}, twice.", "output": f"{n}\n{n} 你好"} for n in range(60)]
MANY = [{"instruction": f"Say {n * 7919 % 1000}.", "output": f"{n * n}"} for n in range(5000)]
WHOLE = {"rows.json", "pretty.json", "rows.parquet.gz", "rows.parquet.zst"}
"""Files whose rows are only had from all of them."""
STREAMED = sorted(set(FILES) - WHOLE)
AT_ONCE = Storage(retry_minutes=0.0)


@pytest.fixture
def web() -> Iterator[Web]:
    with serve() as server:
        yield server


def read(source: str | Path, skip: int = 0, storage: Storage = AT_ONCE) -> list[dict[str, Any]]:
    """All rows of the source's files, but the first `skip` of the first one."""
    found = []
    for place, shard in enumerate(list_shards(str(source), storage)):
        found += [row.fields for row in shard_rows(shard, storage, 0 if place else skip, Event(), 1000)]
    return found


def refusal(act: Callable[[], Any], kind: type[JobError] = DataError) -> str:
    with pytest.raises(kind) as refused:
        act()
    assert type(refused.value) is kind
    return str(refused.value)


@pytest.mark.parametrize("name", STREAMED)
def test_a_file_of_any_kind_is_streamed_from_any_row_on(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name](ROWS))
    for skip in (0, 1, 59, 60):
        assert read(tmp_path / name, skip) == ROWS[skip:]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.csv.zst", "rows.parquet"])
def test_http_and_s3_give_the_same_rows(web: Web, s3: S3, name: str) -> None:
    content = FILES[name](ROWS)
    web.files[f"/{name}"] = content
    s3.fs().pipe_file(f"{BUCKET}/stream/{name}", content)
    assert read(f"{web.url}/{name}") == ROWS
    assert read(f"s3://{BUCKET}/stream/{name}", 7, Storage(**s3.storage)) == ROWS[7:]


def test_a_folder_in_a_bucket_is_listed_with_the_sizes_of_its_files(s3: S3) -> None:
    contents = {f"{BUCKET}/listed/{name}": lines(ROWS[: place + 1]) for place, name in enumerate(["a.jsonl", "b.json"])}
    s3.fs().pipe(contents | {f"{BUCKET}/listed/README.md": b"none"})
    wanted = tuple(Shard(f"s3://{name}", len(content)) for name, content in contents.items())
    assert list_shards(f"s3://{BUCKET}/listed", Storage(**s3.storage)) == wanted
    assert list_shards([f"s3://{BUCKET}/listed/*.js*"], Storage(**s3.storage)) == wanted


def test_parquet_reads_no_row_group_that_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"n": n, "text": f"{n} " * 500} for n in range(1000)])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100, compression="none")
    seen, content = [], RangedFile._read

    def noted(self: RangedFile, start: int, stop: int) -> bytes:
        seen.append(stop - start)
        return content(self, start, stop)

    monkeypatch.setattr(RangedFile, "_read", noted)
    (shard,) = list_shards(str(tmp_path / "a.parquet"), AT_ONCE)
    assert next(shard_rows(shard, AT_ONCE, 750, Event())).fields["n"] == 750
    assert sum(seen) < shard.size / 4
    assert [row.fields["n"] for row in shard_rows(shard, AT_ONCE, 199, Event())] == list(range(199, 1000))


def cut(content: bytes) -> bytes:
    return content[: len(content) * 3 // 4]


@pytest.mark.parametrize("name", [name for name in STREAMED if name.count(".") > 1 and "zip" not in name])
def test_a_compressed_file_that_was_cut_off_gives_no_rows_as_if_it_were_whole(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(cut(FILES[name](MANY)))
    said = refusal(lambda: read(tmp_path / name))
    assert said.startswith(f"{tmp_path}/{name}")
    assert "cannot be read: EOFError: Compressed file ended before the end" in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', " line 2: broken JSON: Expecting value at column 1. Expected one object a"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', " line 2: a list, expected an object with named fields"),
        ("a.jsonl.gz", b'{"a": 1}\n', ": cannot be read: BadGzipFile: Not a gzipped file"),
        ("a.jsonl", b'{"a": 1}\n\xff\n', ": no UTF-8 text (invalid start byte at byte 9). Convert it to UTF-8"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", " line 3: more cells than the header's 2"),
        ("a.parquet", parquet([{"a": 1}])[:-1], ": cannot be read: ArrowInvalid: "),
        ("a.json", b'[{"a": 1}]', ": one list of rows cannot be streamed. Write one object a line"),
        (
            "a.parquet.gz",
            gzip.compress(parquet([{"a": 1}])),
            ": Parquet in a compressed file cannot be streamed. Unpack it: it is compressed inside",
        ),
        ("a.txt", b"text", f": unknown kind of file. Expected {', '.join(ENDINGS)}, compressed or not"),
    ],
)
def test_a_broken_file_is_named_with_its_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(lambda: read(tmp_path / name)).startswith(f"{tmp_path}/{name}{message}")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_file_with_fewer_rows_than_were_read_before_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name](ROWS[:5]))
    assert refusal(lambda: read(tmp_path / name, 6)) == (
        f"{tmp_path}/{name}: has 5 rows, expected the 6 that were read before the run stopped. "
        "Put the file back that the run began with, or begin a new run at another output.url"
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{folder}/rows.jsonl:train[:1%]",
            "{folder}/rows.jsonl:train[:1%]: a slice cannot be streamed. Name whole files, or set data.streaming: "
            "false",
        ),
        (
            "owner/rows:train",
            "owner/rows: a hub id cannot be streamed. Name its files, such as hf://datasets/owner/rows/**/*.parquet, "
            "or set data.streaming: false",
        ),
        (
            "{folder}/none.jsonl",
            "{folder}/none.jsonl: not found. Give a file, glob or folder of .json, .jsonl, .ndjson, .csv, .tsv, "
            ".parquet, or a hub id",
        ),
    ],
)
def test_a_source_that_cannot_be_streamed_is_refused_with_the_cure(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    found = refusal(lambda: list_shards(source.format(folder=tmp_path), AT_ONCE))
    assert found == message.format(folder=tmp_path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(MANY))
    (shard,) = list_shards(str(path), AT_ONCE)
    rows = shard_rows(shard, AT_ONCE, 0, Event(), 20_000)
    next(rows)
    path.write_bytes(lines(MANY[:2500]))
    size = path.stat().st_size
    said = refusal(lambda: list(rows))
    assert said.startswith(f"{path} behind row ")
    assert said.endswith(f"EOFError: it ends at byte {size:,}, expected {shard.size:,}: it was changed meanwhile")
    path.unlink()
    assert refusal(lambda: list(shard_rows(shard, AT_ONCE, 0, Event()))) == f"{path}: cannot be read: not found"


def test_a_network_that_fails_for_a_while_costs_no_row(web: Web) -> None:
    web.files["/rows.jsonl"] = lines(MANY)
    patient = Storage(retry_minutes=1.0)
    (shard,) = list_shards(f"{web.url}/rows.jsonl", patient)
    found = []
    for place, row in enumerate(shard_rows(shard, patient, 0, Event(), 20_000)):
        found.append(row.fields)
        if place == 20:
            web.refusals += [(503, {"Retry-After": "0"}), (500, {}), (429, {"Retry-After": "0"})]
    assert found == MANY
    assert not web.refusals


def test_text_is_asked_for_in_large_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(MANY * 40))
    (shard,) = list_shards(str(tmp_path / "rows.jsonl"), AT_ONCE)
    asked, read = [], RangedFile._read
    monkeypatch.setattr(
        RangedFile, "_read", lambda self, start, stop: asked.append((start, stop)) or read(self, start, stop)
    )
    assert sum(1 for _ in shard_rows(shard, AT_ONCE, 0, Event())) == 200_000
    edges = [*range(0, shard.size, 8 << 20), shard.size]
    assert asked == list(pairwise(edges))


def test_a_storage_that_stays_away_is_named_with_the_row_and_may_be_asked_again(web: Web) -> None:
    web.files["/rows.jsonl"] = lines(MANY)
    (shard,) = list_shards(f"{web.url}/rows.jsonl", AT_ONCE)
    rows = shard_rows(shard, AT_ONCE, 0, Event(), 20_000)
    next(rows)
    web.refusals += [(503, {})] * 9
    said = refusal(lambda: list(rows), JobError)
    assert said.startswith(f"{web.url}/rows.jsonl behind row ")
    assert ": bytes 20,000 to 40,000 could not be read for 0 minutes (ClientResponseError: 503, " in said
    assert said.endswith("). Start the run again when the storage answers")
    assert len(web.refusals) == 8


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_second_try_mends_is_refused_at_once(web: Web, status: int) -> None:
    web.files["/rows.jsonl"] = lines(ROWS)
    patient = Storage(retry_minutes=1.0)
    (shard,) = list_shards(f"{web.url}/rows.jsonl", patient)
    web.refusals += [(status, {})] * 9
    said = refusal(lambda: list(shard_rows(shard, patient, 0, Event())))
    assert said.startswith(f"{web.url}/rows.jsonl: cannot be read: ")
    assert len(web.refusals) == 8


def test_a_server_without_ranges_is_refused_with_the_cure(web: Web) -> None:
    web.files["/rows.jsonl"], web.knows_ranges = lines(MANY), False
    (shard,) = list_shards(f"{web.url}/rows.jsonl", AT_ONCE)
    said = refusal(lambda: list(shard_rows(shard, AT_ONCE, 0, Event(), 20_000)))
    assert "the server sent " in said
    assert said.endswith("serve the file by one, or copy it to a disk or bucket")


def test_no_message_of_a_stream_shows_the_query_of_an_address(web: Web) -> None:
    name = "/rows.jsonl?signature=secret"
    web.files[name] = json.dumps({"a": 1}).encode() + b"\n{\n"
    (shard,) = list_shards(f"{web.url}{name}", AT_ONCE)
    assert refusal(lambda: list(shard_rows(shard, AT_ONCE, 0, Event()))).startswith(f"{web.url}/rows.jsonl line 2: br")
    web.refusals.append((500, {}))
    assert "secret" not in refusal(lambda: list(shard_rows(shard, AT_ONCE, 0, Event())), JobError)
