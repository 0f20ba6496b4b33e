"""Streamed files: whole when the block ends, not there when it does not, on every kind of storage."""

import time
from pathlib import Path

import pytest

from job import whole_files
from job.config.running import Storage
from job.store import Store
from job.whole_files import PART, appearing
from tests.faults import proxied
from tests.s3 import S3
from tests.stores import KINDS, make_store


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_appears_whole_or_not_at_all(kind: str, request: pytest.FixtureRequest) -> None:
    store = make_store(kind, request)
    pieces = [bytes([number]) * (PART // 4) for number in range(6)]  # more than one part of an upload
    with appearing(store, "whole") as put:
        for piece in pieces:
            put(memoryview(piece))
        assert "whole" not in store.names()
    with pytest.raises(KeyError), appearing(store, "cut-off") as put:
        for piece in pieces:
            put(memoryview(piece))
        raise KeyError
    with appearing(store, "whole") as put:  # again, shorter
        put(memoryview(b"short"))
    assert store.read("whole") == b"short"
    with appearing(store, "whole") as put:
        for piece in pieces:
            put(memoryview(piece))
    assert store.read("whole") == b"".join(pieces)
    assert store.names() == ["whole"]


def test_an_upload_that_was_given_up_leaves_no_parts_behind(request: pytest.FixtureRequest) -> None:
    store = make_store("s3", request)
    with pytest.raises(KeyError), appearing(store, "cut-off") as put:
        put(memoryview(bytes(2 * PART)))
        raise KeyError
    begun = store.fs.list_multipart_uploads("bucket")  # other tests' on this server too, some of which are cut off
    assert [upload["Key"] for upload in begun if upload["Key"].endswith("folder/cut-off")] == []


def test_a_server_that_falls_silent_is_not_waited_for_without_end(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_files, "ANSWER_S", 1.0)
    monkeypatch.setattr(whole_files, "SLOWEST", PART)
    with proxied(s3) as (flaky, faults):
        store = Store("s3://bucket/silent", Storage(**flaky.storage))
        began = time.monotonic()
        with pytest.raises(TimeoutError), appearing(store, "file") as put:
            put(memoryview(bytes(PART)))
            faults.silent = True
            put(memoryview(bytes(PART)))
        assert time.monotonic() - began < 30
        faults.silent = False
        with appearing(store, "file") as put:
            put(memoryview(bytes(PART + 1)))
        assert store.size("file") == PART + 1


def test_a_folder_is_made_where_there_is_none(tmp_path: Path) -> None:
    with appearing(Store(str(tmp_path / "a/b")), "file") as put:
        put(memoryview(b"1"))
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["file"]
