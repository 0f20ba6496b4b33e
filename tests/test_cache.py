"""The cache of downloaded weights: asked before the storage, never stale or broken, bounded, and never in the way."""

import errno
import multiprocessing
import os
import random
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from job import cache as module
from job.cache import CHECK, Cache
from job.config.running import Storage
from job.reading import Range, read_ahead
from job.store import Store
from tests import web
from tests.s3 import BUCKET, S3
from tests.test_reading import CONTENT, Watched

RANGES = [Range("a", 0, 1000), Range("a", 2000, 2500), Range("b", 0, 700)]
EXPECTED = [CONTENT[part.start : part.stop] for part in RANGES]


@pytest.fixture
def store() -> Watched:
    """A folder in memory with the same content in files a and b."""
    return filled(Watched(f"memory://{secrets.token_hex(4)}/model"))


@pytest.fixture
def server() -> Iterator[web.Web]:
    """A web server with the same content in files a and b."""
    with web.serve() as server:
        server.files = {"/a": CONTENT, "/b": CONTENT}
        yield server


def filled(store: Watched) -> Watched:
    for name in "ab":
        store.write(name, CONTENT)
    return store


def read(store: Store, cache: Cache, ranges: list[Range] = RANGES) -> list[bytes]:
    return [bytes(content) for content in read_ahead(store, ranges, cache=cache)]


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kept"))


def test_a_second_run_on_the_node_asks_a_bucket_for_nothing(s3: S3, tmp_path: Path) -> None:
    url, storage = f"s3://{BUCKET}/{secrets.token_hex(4)}", Storage(**s3.storage)
    first, second, heard = filled(Watched(url, storage)), Watched(url, storage), list[int]()
    assert read(first, Cache(tmp_path / "cache")) == EXPECTED
    again = read_ahead(second, RANGES, cache=Cache(tmp_path / "cache"), progress=heard.append)
    assert list(again) == EXPECTED
    assert len(first.reads) == 3 and second.reads == [] and heard == [1000, 500, 700]


def test_a_changed_object_is_fetched_again(s3: S3, tmp_path: Path, store: Watched, server: web.Web) -> None:
    bucket = filled(Watched(f"s3://{BUCKET}/{secrets.token_hex(4)}", Storage(**s3.storage)))
    cache = Cache(tmp_path)
    for each in (bucket, store, Watched(server.url)):
        assert read(each, cache) == EXPECTED
        if each.url == server.url:
            server.files["/a"] = CONTENT[::-1]
        else:
            each.write("a", CONTENT[::-1])  # of the same length
        each.reads.clear()
        assert read(each, cache) == [CONTENT[::-1][:1000], CONTENT[::-1][2000:2500], CONTENT[:700]]
        assert sorted(each.reads) == [("a", 0, 1000), ("a", 2000, 2500)]


def test_a_web_server_that_does_not_tell_versions_is_not_cached(tmp_path: Path, server: web.Web) -> None:
    server.knows_versions, said = False, list[str]()
    assert read(Store(server.url), Cache(tmp_path, say=said.append)) == EXPECTED
    assert kept(tmp_path) == []
    assert said == [f"{server.url} is read without the cache: the server does not tell whether a file has changed"]


def test_a_file_whose_version_cannot_be_asked_is_read_without_the_cache(
    tmp_path: Path, store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str) -> str:
        raise OSError("busy")

    said: list[str] = []
    monkeypatch.setattr(store.fs, "ukey", broken)
    assert read(store, Cache(tmp_path, say=said.append), RANGES[:1]) == EXPECTED[:1]
    assert said == [f"{store.url}/a is read without the cache: OSError: busy"] and kept(tmp_path) == []


def test_the_version_of_a_file_is_asked_once_a_reading(
    tmp_path: Path, store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    ukey = store.fs.ukey
    monkeypatch.setattr(store.fs, "ukey", lambda path: asked.append(path) or ukey(path))
    read(store, Cache(tmp_path), [Range(file, 10 * n, 10 * n + 5) for n in range(50) for file in "ab"])
    assert sorted(asked) == [store.path("a"), store.path("b")]


def test_local_files_are_not_cached(tmp_path: Path) -> None:
    store = filled(Watched(str(tmp_path / "model")))
    assert read(store, Cache(tmp_path / "cache")) == EXPECTED
    assert not (tmp_path / "cache").exists()


def test_the_same_path_at_another_endpoint_is_another_file(tmp_path: Path, store: Watched) -> None:
    cache = Cache(tmp_path)
    other = Store(store.url, Storage(endpoint="http://other"))
    assert cache.identity(store, "a") == cache.identity(Store(store.url), "a") != cache.identity(other, "a")
    assert cache.identity(store, "a") != cache.identity(store, "b")


@pytest.mark.parametrize("damage", ["longer", "shorter", "empty", "flipped", "zeroes"])
def test_a_damaged_file_is_fetched_again_and_mended(tmp_path: Path, store: Watched, damage: str) -> None:
    read(store, Cache(tmp_path), RANGES[:1])
    (file,) = kept(tmp_path)
    whole = file.read_bytes()
    assert len(whole) == 1000 + CHECK
    flipped = bytes([whole[0] ^ 1]) + whole[1:]
    damaged = {"longer": whole + b"x", "shorter": whole[:-1], "empty": b"", "flipped": flipped, "zeroes": bytes(1004)}
    file.write_bytes(damaged[damage])
    store.reads.clear()
    assert read(store, Cache(tmp_path), RANGES[:1]) == EXPECTED[:1]
    assert store.reads == [("a", 0, 1000)] and file.read_bytes() == whole


def limited(folder: Path, ranges: float) -> Cache:
    """Room for so many ranges of 996 bytes."""
    return Cache(folder, ranges * (996 + CHECK) / 2**30)


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache, content = limited(tmp_path, 3), CONTENT[:996]
    for age, name in enumerate("abc"):
        cache.put(name, 0, 996, content)
        os.utime(tmp_path / f"{name}-0-996.kept", (1e9 + age, 1e9 + age))
    assert cache.get("a", 0, 996) == content  # now the last used
    cache.put("d", 0, 996, content)
    assert [name for name in "abcd" if cache.get(name, 0, 996)] == ["a", "c", "d"]


def test_a_range_above_the_limit_is_not_kept_and_drives_nothing_out(tmp_path: Path) -> None:
    said: list[str] = []
    cache = Cache(tmp_path, 1000 / 2**30, said.append)
    cache.put("a", 0, 500, CONTENT[:500])
    cache.put("b", 0, 997, CONTENT[:997])
    assert cache.get("b", 0, 997) is None and cache.get("a", 0, 500) == CONTENT[:500] and said == []


def test_what_killed_processes_left_is_removed_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    for name in ("old.draft", "young.draft", "theirs.txt"):
        (tmp_path / name).write_bytes(bytes(5000))
        if name != "young.draft":
            os.utime(tmp_path / name, (1e9, 1e9))
    Cache(tmp_path).put("a", 0, 996, CONTENT[:996])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0-996.kept", "theirs.txt", "young.draft"]


def test_a_reader_goes_on_when_another_process_evicts_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, fstat = Cache(tmp_path), os.fstat
    cache.put("a", 0, 996, CONTENT[:996])

    def evicted(number: int) -> os.stat_result:
        (tmp_path / "a-0-996.kept").unlink()  # after the open, before the read
        return fstat(number)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fstat", evicted)
        assert cache.get("a", 0, 996) == CONTENT[:996]
    assert cache.get("a", 0, 996) is None


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path: Path, store: Watched) -> None:
    (tmp_path / "file").write_text("no folder")
    said: list[str] = []
    assert read(store, Cache(tmp_path / "file/cache", say=said.append)) == EXPECTED
    assert len(said) == 1 and said[0].startswith(f"the cache {tmp_path}/file/cache cannot be ")
    assert said[0].endswith(": Not a directory. Going on without it")


def test_a_full_disk_is_said_once_and_leaves_no_draft(
    tmp_path: Path, store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []

    def full(draft: Path, path: Path) -> None:
        tried.append(path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said: list[str] = []
    cache = Cache(tmp_path, say=said.append)
    read(store, cache, RANGES[:1])
    monkeypatch.setattr(module.os, "replace", full)
    assert read(store, cache) == EXPECTED
    failed = len(tried)
    assert read(store, cache) == EXPECTED and len(tried) == failed > 0  # not tried again
    assert said == [f"the cache {tmp_path} cannot be written: No space left on device. Going on without it"]
    assert len(list(tmp_path.iterdir())) == 1
    assert store.reads.count(("a", 0, 1000)) == 1  # what is kept is still used


def test_the_settings_make_the_cache(tmp_path: Path) -> None:
    assert Cache.of(Storage()) is None
    cache = Cache.of(Storage(cache_dir=str(tmp_path), cache_gib=1.5))
    assert cache and cache.folder == tmp_path and cache.limit == 1.5 * 2**30
    unlimited = Cache.of(Storage(cache_dir="~/weights"))
    assert unlimited and unlimited.folder == Path.home() / "weights" and unlimited.limit == float("inf")


def test_many_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_use, args=(tmp_path, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    names = [path.name for path in tmp_path.iterdir()]
    assert names and all(name.endswith(".kept") for name in names)
    assert len(names) <= 4  # the limit
    assert sum((tmp_path / name).stat().st_size for name in names) <= 4 * (50_000 + CHECK)


def _use(folder: Path, seed: int) -> None:
    """Keep and get 8 ranges where 4 have room: each that is found is whole, and nothing is complained of."""
    said: list[str] = []
    rng, cache, hits = random.Random(seed), Cache(folder, 4 * (50_000 + CHECK) / 2**30, said.append), 0
    for _ in range(400):
        start = 5_000 * rng.randrange(8)
        content = cache.get("a", start, start + 50_000)
        if content is None:
            cache.put("a", start, start + 50_000, CONTENT[start : start + 50_000])
        else:
            hits += 1
            assert content == CONTENT[start : start + 50_000]
    assert hits and not said, (hits, said)
