"""The store's contract, the same over a local folder, memory and a real S3; and how S3 is reached."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import s3fs

from job.config.running import Storage
from job.store import Store, fs_options, is_url, open_text, reason
from tests.conftest import REPOSITORY
from tests.faults import proxied
from tests.s3 import BUCKET, KEY, S3, SECRET
from tests.stores import KINDS, make_store, store_at


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest) -> Store:
    """An empty folder of each kind."""
    return make_store(request.param, request)


@pytest.fixture(params=KINDS[1:])
def remote(request: pytest.FixtureRequest) -> Store:
    """An empty folder of each kind that is not local."""
    return make_store(request.param, request)


def test_what_is_written_is_read_back_whole_or_in_part(store: Store) -> None:
    content = bytes(range(256)) * 40
    store.write("a.bin", content)
    assert store.read("a.bin") == content
    assert store.read("a.bin", 3, 300) == content[3:300]
    assert store.read("a.bin", 10_000) == content[10_000:]
    assert store.size("a.bin") == len(content)


def test_a_read_behind_the_end_gives_what_is_there(store: Store) -> None:
    store.write("a.bin", b"12345")
    store.write("empty", b"")
    assert store.read("a.bin", 3, 100) == b"45"
    assert store.read("a.bin", 5, 100) == b""
    assert store.read("empty", 0, 100) == store.read("empty") == b""


def test_a_missing_file_is_not_found(store: Store) -> None:
    assert not store.exists("a")
    with pytest.raises(FileNotFoundError) as fault:
        store.read("a")
    assert reason(fault.value) == "not found"


def test_a_write_replaces_the_old_content_whole(store: Store) -> None:
    store.write("a", b"long old content")
    store.write("a", b"new")
    assert store.read("a") == b"new"
    assert store.names() == ["a"]


def test_names_are_the_files_directly_inside_sorted(store: Store) -> None:
    assert store.names() == []
    for name in ("b.txt", "a.txt"):
        store.write(name, b"x")
    store.child("sub").write("c.txt", b"x")
    assert store.names() == ["a.txt", "b.txt"]
    assert store.names(folders=True) == ["a.txt", "b.txt", "sub"]
    assert store.child("sub").names() == ["c.txt"]
    assert store.child("sub").url == f"{store.url}/sub"


def test_what_another_process_writes_is_seen_at_once(store: Store, request: pytest.FixtureRequest) -> None:
    store.write("a", b"old")
    assert store.names() == ["a"] and not store.exists("b")
    if store.url.startswith("s3://"):
        fs = request.getfixturevalue("s3").fs()
        fs.pipe_file(f"{store.root}/b", b"new")
    else:
        store.fs.pipe_file(store.path("b"), b"new")
    assert store.names() == ["a", "b"] and store.exists("b")


def test_a_removed_file_is_gone(store: Store) -> None:
    store.write("a", b"x")
    store.remove("a")
    assert not store.exists("a") and store.names() == []


def test_removing_a_missing_file_is_an_error_only_where_it_matters(store: Store) -> None:
    store.remove("a", missing_ok=True)
    store.write("a", b"x")
    store.remove("a", missing_ok=True)
    assert not store.exists("a")
    if not store.url.startswith("s3://"):  # S3 does not tell
        with pytest.raises(FileNotFoundError):
            store.remove("a")


def test_a_file_is_created_once_and_stays_what_it_was(store: Store) -> None:
    assert store.create("sub/a", b"first")
    assert not store.create("sub/a", b"second")
    assert store.read("sub/a") == b"first" and store.child("sub").names() == ["a"]
    store.write("sub/a", b"third")
    assert store.read("sub/a") == b"third"
    store.remove("sub/a")
    assert store.create("sub/a", b"fourth") and store.read("sub/a") == b"fourth"


def test_who_finds_the_own_content_has_created_it(store: Store) -> None:
    assert store.create("a", b"mine") and store.create("a", b"mine") and not store.create("a", b"theirs")


def test_of_racing_threads_one_creates_the_file(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        for turn in range(4):
            won = list(pool.map(lambda n, turn=turn: store.create(f"{turn}", b"%d" % n), range(8)))
            assert won.count(True) == 1 and store.read(f"{turn}") == b"%d" % won.index(True)
    assert store.names() == sorted(map(str, range(4)))


RACER = """
import sys
from job.config.running import Storage
from job.store import Store
url, storage, own = sys.argv[1:]
store = Store(url, Storage.model_validate_json(storage))
store.exists("0")
print("ready", flush=True)
for turn in sys.stdin:
    print(store.create(turn.strip(), own.encode()), flush=True)
"""


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_of_racing_processes_one_creates_the_file(kind: str, request: pytest.FixtureRequest) -> None:
    store = make_store(kind, request)
    words = [sys.executable, "-c", RACER, store.url, store.storage.model_dump_json()]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": REPOSITORY, "text": True}
    racers = [subprocess.Popen([*words, str(n)], **pipes) for n in range(8)]
    assert {racer.stdout.readline() for racer in racers} == {"ready\n"}
    for turn in range(3):
        for racer in racers:
            racer.stdin.write(f"{turn}\n")
            racer.stdin.flush()
        won = [racer.stdout.readline() == "True\n" for racer in racers]
        assert won.count(True) == 1 and store.read(f"{turn}") == b"%d" % won.index(True)
    for racer in racers:
        racer.communicate()
        assert racer.returncode == 0


def test_a_creation_whose_answer_is_lost_is_still_ours(s3: S3) -> None:
    with proxied(s3) as (flaky, faults):
        store = store_at(flaky)
        faults.lose_answer = 1
        assert store.create("a", b"mine")
        assert faults.lose_answer == 0 and faults.puts_of_new == 2  # the client asked again, and heard that it exists
        faults.lose_answer = 1
        assert not store.create("a", b"theirs")
        assert store.read("a") == b"mine" and faults.given["lose_answer"] == 2


@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
def test_a_conflict_between_creations_is_tried_again(s3: S3, code: str) -> None:
    with proxied(s3) as (flaky, faults):
        store = store_at(flaky)
        faults.refuse_new = [(409, code)] * 2
        assert store.create("a", b"mine") and store.read("a") == b"mine"
        faults.refuse_new = [(409, code)] * 2
        assert not store.create("a", b"theirs") and store.read("a") == b"mine"
        assert faults.given["refuse_new"] == 4
        faults.refuse_new = [(409, code)] * 100
        with pytest.raises(OSError, match=code):
            store.create("b", b"mine")


def test_a_creation_that_fails_says_so_and_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path))

    def refuse(number: int) -> Callable[..., None]:
        def link(*paths: str) -> None:
            raise OSError(number, os.strerror(number))

        return link

    for number in (errno.EPERM, errno.EOPNOTSUPP):  # exFAT, some network disks
        monkeypatch.setattr("os.link", refuse(number))
        with pytest.raises(OSError, match="has no hard links"):
            store.create("a", b"x")
    monkeypatch.setattr("os.link", refuse(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        store.create("a", b"x")
    assert store.names() == []


def test_a_file_ages_and_a_write_makes_it_young(store: Store) -> None:
    store.write("a", b"old")
    time.sleep(2.1)
    assert 1 < store.age_s("a") < 600
    store.write("b", b"new")
    assert store.age_s("b") <= store.age_s("a") - 1
    assert store.names() == ["a", "b"]
    with pytest.raises(FileNotFoundError):
        store.age_s("c")


@pytest.mark.parametrize("hours", [-5, 5])
def test_the_age_is_by_the_clock_of_the_storage(s3: S3, hours: int) -> None:
    with proxied(s3) as (flaky, faults):
        store = store_at(flaky)
        faults.ahead_s = 3600 * hours
        store.write("a", b"x")
        assert abs(store.fs.modified(store.path("a")).timestamp() - time.time()) > 4 * 3600
        assert store.age_s("a") < 600


def test_only_local_folders_append(request: pytest.FixtureRequest, remote: Store) -> None:
    local = make_store("file", request)
    local.append("rows", b"1\n")
    local.append("rows", b"2\n")
    assert local.is_local and local.read("rows") == b"1\n2\n"
    assert not remote.is_local
    with pytest.raises(NotImplementedError, match="cannot append"):
        remote.append("rows", b"1\n")


def test_a_failing_local_write_leaves_the_old_file_and_no_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path))
    store.write("a", b"old")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        store.write("a", b"new")
    assert store.names() == ["a"] and store.read("a") == b"old"


def test_text_is_decompressed_by_its_ending(store: Store) -> None:
    import gzip

    store.write("a.txt.gz", gzip.compress("第一行\n".encode()))
    with open_text(f"{store.url}/a.txt.gz", store.storage) as file:
        assert file.read() == "第一行\n"


def test_s3_options_come_from_the_settings_and_never_hold_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    storage = Storage(endpoint="https://minio:9000", region="cn-north-1", path_style=True, ca_bundle="/ca.pem")
    options = fs_options("s3://bucket/x", storage)
    assert options["client_kwargs"] == {
        "endpoint_url": "https://minio:9000",
        "region_name": "cn-north-1",
        "verify": "/ca.pem",
    }
    assert options["config_kwargs"] == {"s3": {"addressing_style": "path"}}
    assert SECRET not in repr(options)
    assert {"client_kwargs", "config_kwargs"}.isdisjoint(fs_options("s3://bucket/x", Storage()))
    assert fs_options("memory://x", storage) == {} == fs_options("https://host/x", storage)


def test_listings_of_object_stores_are_never_remembered() -> None:
    urls = ("s3://bucket/x", "gs://bucket/x", "gcs://bucket/x")
    assert {str(fs_options(url, Storage())["use_listings_cache"]) for url in urls} == {"False"}


def test_a_name_with_a_scheme_is_a_url() -> None:
    assert is_url("s3://bucket/x") and not is_url("runs/first") and not is_url("owner/name:train")


def test_a_missing_bucket_is_told_from_a_missing_file(s3: S3) -> None:
    there = Store(f"s3://{BUCKET}/nothing", Storage(**s3.storage))
    nowhere = Store("s3://no-such-bucket/nothing", Storage(**s3.storage))
    assert there.missing_bucket() is None and there.names() == []
    assert nowhere.missing_bucket() == "no-such-bucket" and nowhere.names() == []
    assert Store("memory://no/such").missing_bucket() is None
    with pytest.raises((FileNotFoundError, PermissionError)):  # AWS says the first, SeaweedFS the second
        nowhere.write("a", b"x")


ACTS: dict[str, Callable[[Store], object]] = {
    "read": lambda store: store.read("a"),
    "names": lambda store: store.names(),
    "exists": lambda store: store.exists("a"),
    "write": lambda store: store.write("a", b"x"),
}


@pytest.mark.parametrize("key, secret", [(KEY, "wrong-secret"), ("AKIAWRONG", SECRET)], ids=["secret", "key"])
def test_wrong_keys_are_refused_without_being_printed(
    s3: S3, monkeypatch: pytest.MonkeyPatch, key: str, secret: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    s3fs.S3FileSystem.clear_instance_cache()
    store = Store(f"s3://{BUCKET}/keys", Storage(**s3.storage))
    for act in ACTS.values():
        with pytest.raises(PermissionError) as fault:
            act(store)
        assert reason(fault.value) == "access denied (are the keys in the environment right?)"
        assert not {key, secret} & set(str(fault.value).split())
    s3fs.S3FileSystem.clear_instance_cache()


def test_no_keys_at_all_says_where_to_put_them(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(Exception) as fault:
        Store(f"s3://{BUCKET}/keys", Storage(**s3.storage)).read("a")
    assert reason(fault.value).startswith("no keys. Put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY into")
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_local_folder_without_permission_says_so_and_speaks_of_no_keys() -> None:
    assert reason(PermissionError(13, "Permission denied", "/no/x")) == "access denied"
