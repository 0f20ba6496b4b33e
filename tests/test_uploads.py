"""Writes behind the training's back, and in front of it, while a real S3 server refuses, stalls and loses them."""

import errno
import itertools
import math
import os
import re
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import aiohttp
import botocore.exceptions
import pytest
import s3fs

from job.errors import JobError
from job.store import Store
from job.uploads import LONGEST_PAUSE_S, Uploads, passes, patiently, pause_s
from tests.faults import Faults, proxied
from tests.s3 import KEY, S3, SECRET
from tests.stores import store_at

PATIENCE_S = 60.0
FAILING = OSError(errno.EBUSY, "busy")


def soon(tries: int) -> float:
    return 0.02


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def uploads(said: list[str]) -> Iterator[Uploads]:
    with closing(Uploads(said.append, PATIENCE_S, soon)) as uploads:
        yield uploads


@pytest.fixture
def flaky(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[S3, Faults]]:
    """The S3 server behind the proxy, and a driver that hands every fault to us at once."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with proxied(s3, seed=0) as found:
        yield found


@pytest.fixture
def store(flaky: tuple[S3, Faults]) -> Store:
    return store_at(flaky[0])


@pytest.fixture
def faults(flaky: tuple[S3, Faults]) -> Faults:
    return flaky[1]


def writing(store: Store, name: str, content: bytes) -> Callable[[], None]:
    return lambda: store.write(name, content)


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def fails(fault: BaseException, times: float = math.inf) -> Callable[[], str]:
    """Raises so many times, then gives "done"."""
    tries = itertools.count()

    def act() -> str:
        if next(tries) < times:
            raise fault
        return "done"

    return act


def test_jobs_are_done_in_order_while_the_caller_goes_on(uploads: Uploads, said: list[str]) -> None:
    gate, done = threading.Event(), []
    uploads.put("first", gate.wait)
    for number in range(20):
        uploads.put(str(number), lambda number=number: done.append(number))  # type: ignore[misc]
    assert not uploads.idle and done == []
    gate.set()
    uploads.wait(PATIENCE_S)
    assert done == list(range(20)) and uploads.idle and said == []


def test_a_failing_job_is_tried_until_it_works_and_those_behind_it_wait(uploads: Uploads, said: list[str]) -> None:
    done = []
    uploads.put("checkpoint of step 120", fails(OSError(errno.EIO, "broken"), 7))
    uploads.put("checkpoint of step 140", lambda: done.append(140))
    uploads.wait(PATIENCE_S)
    assert done == [140]
    first, last = said
    assert first == (
        "the checkpoint of step 120 cannot be written (OSError: [Errno 5] broken); trying again while training goes on"
    )
    assert re.fullmatch(r"the checkpoint of step 120 is written after all, \d+ s later", last)


def test_pauses_grow_to_half_a_minute_and_differ() -> None:
    assert all(0.5 <= pause_s(1) <= 1 and 2 <= pause_s(3) <= 4 for _ in range(100))
    assert all(LONGEST_PAUSE_S / 2 <= pause_s(tries) <= LONGEST_PAUSE_S for tries in (6, 60, 5000))
    assert len({pause_s(6) for _ in range(10)}) > 1


def test_whoever_waits_has_a_paused_job_tried_at_once(said: list[str]) -> None:
    with closing(Uploads(said.append, PATIENCE_S, lambda tries: 1000.0)) as uploads:
        uploads.put("checkpoint", fails(FAILING, 1))
        wait_until(lambda: said)
        uploads.wait(PATIENCE_S)
    assert len(said) == 2


def test_a_job_that_fails_for_too_long_is_named_with_its_reason(said: list[str]) -> None:
    with closing(Uploads(said.append, 0.3, soon)) as uploads:
        uploads.put("checkpoint of step 120", fails(OSError(errno.ENOSPC, "No space left on device")))
        uploads.put("metrics of step 130", lambda: None)
        with pytest.raises(JobError) as fault:
            uploads.wait(PATIENCE_S)
        assert re.sub(r"\d+ s,", "N s,", str(fault.value)) == (
            "the checkpoint of step 120 could not be written in N s, nor what follows it (metrics of step 130): "
            "OSError: [Errno 28] No space left on device. Check the storage: network, space and keys. "
            "storage.retry_minutes is how long a run waits for it"
        )
        assert len(said) == 1


def test_only_failing_while_it_is_waited_for_counts(said: list[str]) -> None:
    with closing(Uploads(said.append, 1.0, soon)) as uploads:
        mended = threading.Event()
        uploads.put("checkpoint", lambda: None if mended.is_set() else fails(FAILING)())
        wait_until(lambda: said)
        time.sleep(1.1)  # training went on meanwhile
        threading.Timer(0.2, mended.set).start()
        uploads.wait(PATIENCE_S)


def test_a_job_that_hangs_is_named_when_the_time_is_over(uploads: Uploads) -> None:
    gate = threading.Event()
    uploads.put("checkpoint of step 120", gate.wait)
    with pytest.raises(JobError, match=r"step 120 could not be written in . s: the storage has not answered"):
        uploads.wait(0.1)
    gate.set()
    uploads.wait(PATIENCE_S)


@pytest.mark.parametrize("fault", [TypeError("no"), KeyError("x"), AssertionError("no"), JobError("refused")], ids=repr)
def test_a_mistake_of_ours_surfaces_at_the_next_call_and_ends_the_queue(uploads: Uploads, fault: Exception) -> None:
    done, queued = [], threading.Event()

    def mistake() -> None:
        queued.wait()
        raise fault

    uploads.put("checkpoint", mistake)
    uploads.put("next", lambda: done.append(1))
    queued.set()
    calls = (lambda: uploads.wait(PATIENCE_S), lambda: uploads.idle, lambda: uploads.put("x", fails(fault)))
    for call in (*calls, uploads.raise_fault):
        with pytest.raises(type(fault)) as found:
            call()
        assert found.value is fault
    assert done == []


def test_a_fault_that_lasts_is_a_sentence_at_once(uploads: Uploads, said: list[str]) -> None:
    uploads.put("checkpoint of step 120", fails(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(JobError, match=r"step 120 cannot be written: .*Read-only file system\. Trying again does not"):
        uploads.wait(PATIENCE_S)
    assert said == []


def test_after_the_end_nothing_is_tried(said: list[str]) -> None:
    tries = []
    uploads = Uploads(said.append, PATIENCE_S, soon)
    uploads.put("checkpoint", lambda: tries.append(fails(FAILING)()))
    uploads.put("next", lambda: tries.append(1))
    wait_until(lambda: said)
    uploads.close()
    wait_until(lambda: uploads.idle)
    with pytest.raises(RuntimeError, match="after the end"):
        uploads.put("more", lambda: None)
    assert tries == []


def test_a_closed_terminal_ends_no_upload() -> None:
    def closed(line: str) -> None:
        raise BrokenPipeError

    with closing(Uploads(closed, PATIENCE_S, soon)) as uploads:
        uploads.put("checkpoint", fails(FAILING, 2))
        uploads.wait(PATIENCE_S)


PASSING = [
    *(OSError(number, "x") for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ECONNREFUSED)),
    *(PermissionError("The token has expired"), TimeoutError("x"), ConnectionResetError("x")),
    *(aiohttp.ClientPayloadError("x"), botocore.exceptions.EndpointConnectionError(endpoint_url="x")),
    botocore.exceptions.NoCredentialsError(),
]
LASTING = [
    *(OSError(number, "x") for number in (errno.EROFS, errno.EACCES, errno.ENOENT, errno.EEXIST, errno.ENAMETOOLONG)),
    *(FileNotFoundError("x"), FileExistsError("x"), ValueError("x"), MemoryError(), JobError("x"), KeyboardInterrupt()),
    type("DistNetworkError", (RuntimeError,), {"__module__": "torch.distributed"})("a rank is gone"),
]


def test_storage_may_come_back_and_our_mistakes_do_not_go_away() -> None:
    assert [fault for fault in PASSING if not passes(fault)] == []
    assert [fault for fault in LASTING if passes(fault)] == []


def test_no_line_shows_a_signature_or_what_fetches_keys_was_given(said: list[str]) -> None:
    hidden = (
        aiohttp.ClientError("https://host/x?X-Amz-Signature=hidden"),
        botocore.exceptions.CredentialRetrievalError(provider="custom-process", error_msg="hidden"),
        PermissionError("hidden"),
    )
    for fault in hidden:
        with closing(Uploads(said.append, 0.1, soon)) as uploads:
            uploads.put("checkpoint", fails(fault))
            with pytest.raises(JobError) as found:
                uploads.wait(PATIENCE_S)
            said.append(str(found.value))
    assert len(said) == 6 and "hidden" not in "".join(said), said
    assert "ClientError: https://host/x)" in said[0] and "CredentialRetrievalError" in said[2]


def test_patience_gives_what_was_read_after_all(said: list[str]) -> None:
    act = fails(FAILING, 3)
    assert patiently(act, "checkpoint of step 120", 60, said.append, done="read", pause_s=soon) == "done"
    first, last = said
    assert first == "the checkpoint of step 120 cannot be read (OSError: [Errno 16] busy); trying again for 60 s"
    assert re.fullmatch(r"the checkpoint of step 120 is read after all, \d+ s later", last)


def test_patience_ends_with_the_reason_and_without_any_there_is_one_try(said: list[str]) -> None:
    with pytest.raises(JobError, match=r"the adapter could not be written in . s: OSError: \[Errno 16\] busy"):
        patiently(fails(FAILING), "adapter", 0.2, said.append, pause_s=soon)
    assert len(said) == 1
    tries = []
    with pytest.raises(JobError, match="the adapter could not"):
        patiently(lambda: tries.append(1) or fails(FAILING)(), "adapter", 0, said.append)
    assert len(tries) == 1 and len(said) == 1


@pytest.mark.parametrize("fault", [FileNotFoundError("x"), FileExistsError("x"), ValueError("x")], ids=repr)
def test_answers_and_mistakes_need_no_patience(said: list[str], fault: Exception) -> None:
    with pytest.raises(type(fault)) as found:
        patiently(fails(fault), "adapter", 60, said.append)
    assert found.value is fault and said == []


def test_patience_names_a_fault_that_lasts(said: list[str]) -> None:
    with pytest.raises(JobError, match=r"the adapter cannot be written: .*Trying again does not help"):
        patiently(fails(PermissionError(errno.EACCES, "Permission denied", "/x")), "adapter", 60, said.append)


def test_everything_arrives_in_a_storm_of_503_with_delays(
    store: Store, faults: Faults, s3: S3, uploads: Uploads, said: list[str]
) -> None:
    faults.share_503, faults.delay_s = 0.3, 0.02
    contents = {f"{number}.bin": os.urandom(1 << 18) for number in range(40)}
    for name, content in contents.items():
        uploads.put(name, writing(store, name, content), store)
    uploads.wait(PATIENCE_S)
    faults.share_503 = faults.delay_s = 0
    fs = s3.fs()
    assert {name: fs.cat_file(store.path(name)) for name in store.names()} == contents
    assert faults.given["share_503"] >= 10 and faults.requests["PUT"] == 40 + faults.given["share_503"]
    assert 0 < len(said) <= 2 * faults.given["share_503"] and "SlowDown" in said[0]


def test_the_main_thread_reads_while_two_others_write_through_one_driver(
    store: Store, faults: Faults, uploads: Uploads, said: list[str]
) -> None:
    content = os.urandom(1 << 20)
    patiently(writing(store, "read", content), "file", PATIENCE_S, said.append)
    faults.share_503 = 0.3
    with closing(Uploads(said.append, PATIENCE_S, soon)) as others:
        for number in range(20):
            for queue in (uploads, others):
                name = f"{number} of {id(queue)}"
                queue.put(name, writing(store, name, content), store)
        for _ in range(20):
            assert (
                patiently(lambda: store.read("read"), "file", PATIENCE_S, said.append, store, pause_s=soon) == content
            )
        uploads.wait(PATIENCE_S)
        others.wait(PATIENCE_S)
    faults.share_503 = 0
    assert len(store.names()) == 41 and all(store.read(name) == content for name in store.names())


def test_storage_that_was_down_gets_everything_when_it_is_back(
    store: Store, faults: Faults, uploads: Uploads, said: list[str]
) -> None:
    faults.down = True
    for step in (120, 140):
        uploads.put(f"checkpoint of step {step}", writing(store, str(step), b"x" * step), store)
    wait_until(lambda: faults.given["down"] > 5)
    assert not uploads.idle and len(said) == 1, "one line, however often it is tried"
    faults.down = False
    uploads.wait(PATIENCE_S)
    assert [store.read(name) for name in store.names()] == [b"x" * 120, b"x" * 140]
    assert len(said) == 2 and "the checkpoint of step 120 is written after all" in said[1]


def test_a_server_that_takes_requests_and_says_nothing_is_not_waited_for_without_end(
    store: Store, faults: Faults, uploads: Uploads, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write("old", b"x")
    monkeypatch.setattr("job.store.ANSWER_S", 1.0)
    faults.silent = True
    acts = (lambda: store.read("old"), lambda: store.read("old", 0, 1), store.names, lambda: store.exists("old"))
    for act in (*acts, lambda: store.create("new", b"x"), lambda: store.remove("old")):
        with pytest.raises(TimeoutError) as fault:
            act()
        assert passes(fault.value)
    uploads.put("checkpoint", writing(store, "a", b"x"), store)
    wait_until(lambda: said)
    assert said[0] == "the checkpoint cannot be written (no answer in time); trying again while training goes on"
    faults.silent = False
    uploads.wait(PATIENCE_S)
    assert store.read("a") == b"x"


def test_reads_are_made_again_with_new_keys_too(store: Store, faults: Faults, said: list[str]) -> None:
    inside = store.child("inside")
    inside.write("a", b"x")
    faults.deny, before = "ExpiredToken", inside.fs
    threading.Timer(0.5, lambda: setattr(faults, "deny", "")).start()
    assert patiently(lambda: inside.read("a"), "file", PATIENCE_S, said.append, store, pause_s=soon) == b"x"
    assert store.fs is inside.fs is not before, "a folder and those inside it have the same keys"


def test_what_a_job_held_is_gone_with_it(uploads: Uploads) -> None:
    class Held:
        """Stands for bytes, which know no weak references."""

    def put() -> weakref.ref[Held]:
        held, tries = Held(), iter([True, True, False])

        def act() -> Held:
            if next(tries):
                raise OSError(errno.EBUSY, "busy")
            return held

        uploads.put("checkpoint", act)
        return weakref.ref(held)

    held = put()
    uploads.wait(PATIENCE_S)
    wait_until(lambda: held() is None)


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken", "AccessDenied"])
def test_keys_that_are_refused_for_a_while_end_nothing(
    store: Store, faults: Faults, uploads: Uploads, said: list[str], code: str
) -> None:
    faults.deny, before = code, store.fs
    uploads.put("checkpoint", writing(store, "a", b"x"), store)
    wait_until(lambda: faults.given["deny"] > 2)
    faults.deny = ""
    uploads.wait(PATIENCE_S)
    assert store.read("a") == b"x" and store.fs is not before and len(said) == 2
    assert (code == "ExpiredToken") == ("(access denied, the keys have expired)" in said[0])


@pytest.mark.parametrize("old", ["an-old-secret", None], ids=["wrong", "none"])
def test_new_keys_in_the_credentials_file_are_taken_up(
    flaky: tuple[S3, Faults],
    uploads: Uploads,
    said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    old: str | None,
) -> None:
    def write_keys(secret: str) -> None:
        file = tmp_path / "new"
        file.write_text(f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {secret}\n")
        file.rename(tmp_path / "credentials")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("HOME", str(tmp_path))
    if old:
        write_keys(old)
    store = store_at(flaky[0])
    uploads.put("checkpoint", writing(store, "a", b"x"), store)
    wait_until(lambda: flaky[1].requests["PUT"] > 2 if old else said)
    assert said and not uploads.idle and KEY not in said[0] and "an-old-secret" not in said[0]
    write_keys(SECRET)
    uploads.wait(PATIENCE_S)
    assert store.child("").names() == store.names() == ["a"], "folders inside use the new keys too"


def test_a_write_whose_answer_was_lost_is_made_again(
    store: Store, faults: Faults, uploads: Uploads, said: list[str]
) -> None:
    faults.lose_answer = 3
    uploads.put("checkpoint", writing(store, "a", b"x" * 1000), store)
    uploads.wait(PATIENCE_S)
    assert store.read("a") == b"x" * 1000 and faults.given["lose_answer"] == 3 and len(said) == 2


@pytest.mark.parametrize("lost", ["a?uploads", "partNumber=2", "a?uploadId"])
def test_a_large_object_arrives_though_the_answer_of_a_part_is_lost(
    store: Store, faults: Faults, uploads: Uploads, said: list[str], lost: str
) -> None:
    content = os.urandom(101 << 20)
    faults.only, faults.lose_answer = lost, 1
    uploads.put("checkpoint", writing(store, "a", content), store)
    uploads.wait(PATIENCE_S)
    assert store.read("a") == content and faults.given["lose_answer"] == 1
    assert len(said) in (0, 2), "aiohttp makes a PUT again by itself when a connection that it used before is cut"


def test_a_read_that_was_cut_off_is_noticed_and_made_again(store: Store, faults: Faults, said: list[str]) -> None:
    small, large = os.urandom(1 << 20), os.urandom(51 << 20)  # the driver reads large objects in parts
    store.write("small", small)
    store.write("large", large)
    for name, content in (("small", small), ("large", large)):
        faults.truncate = 1
        assert patiently(lambda name=name: store.read(name), name, 60, said.append, pause_s=soon) == content  # type: ignore[misc]
        faults.truncate = 1
        read = patiently(lambda name=name: store.read(name, 9, 999), name, 60, said.append, pause_s=soon)  # type: ignore[misc]
        assert read == content[9:999]
    assert faults.given["truncate"] == 4 and len(said) == 8


def test_a_refused_range_is_not_the_end_of_the_file(store: Store, faults: Faults) -> None:
    store.write("a", b"12345")
    faults.deny = "InvalidToken"
    with pytest.raises(OSError, match="InvalidToken"):
        store.read("a", 0, 5)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_waited_for_until_someone_makes_room(
    small_disk: Path, uploads: Uploads, said: list[str]
) -> None:
    (small_disk / "old").write_bytes(b"x" * 900_000)
    store, content = Store(str(small_disk)), os.urandom(500_000)
    uploads.put("checkpoint of step 120", writing(store, "new", content), store)
    wait_until(lambda: said)
    assert store.names() == ["old"] and "No space left on device" in said[0]
    (small_disk / "old").unlink()
    uploads.wait(PATIENCE_S)
    assert store.read("new") == content and store.names() == ["new"] and len(said) == 2
