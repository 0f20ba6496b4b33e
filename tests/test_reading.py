"""Reading ahead: the right bytes and no others, several requests at once, bounded memory, and what failures become."""

import random
import secrets
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from s3fs.errors import translate_boto_error

from job import reading
from job.config.running import Storage
from job.errors import JobError, ModelError
from job.reading import Range, read_ahead
from job.store import Store
from tests import web
from tests.s3 import BUCKET, S3

CONTENT = random.Random(0).randbytes(100_000)
Read = Callable[[str, int, int], bytes]


class Watched(Store):
    """Notes each read [start, stop); `answer` may take the place of the storage."""

    answer: Read | None = None

    def __init__(self, url: str, storage: Storage | None = None):
        super().__init__(url, storage)
        self.reads: list[tuple[str, int, int]] = []

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        assert start is not None and stop is not None
        self.reads.append((name, start, stop))
        return self.answer(name, start, stop) if self.answer else super().read(name, start, stop)


@pytest.fixture
def store() -> Watched:
    """A folder in memory with the same content in files a and b."""
    store = Watched(f"memory://{secrets.token_hex(4)}/model")
    for name in "ab":
        store.write(name, CONTENT)
    return store


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made; none takes time."""
    made: list[float] = []
    monkeypatch.setattr(reading, "pause", lambda seconds, given_up: made.append(seconds))
    return made


def failing(*faults: BaseException) -> Read:
    """Raises these one after the other, then gives bytes."""
    left = list(faults)

    def read(name: str, start: int, stop: int) -> bytes:
        if left:
            raise left.pop(0)
        return CONTENT[start:stop]

    return read


def touching(file: str, *cuts: int) -> list[Range]:
    return [Range(file, start, stop) for start, stop in pairwise(cuts)]


def until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("kind", ["file", "memory", "s3", "http"])
def test_the_bytes_are_those_of_the_ranges_and_no_other_byte_is_read(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    rng = random.Random(kind)
    edges = [sorted(rng.sample(range(len(CONTENT)), 12)) for _ in range(4)]
    ranges = [part for cuts, file in zip(edges, "abab", strict=True) for part in touching(file, *cuts, cuts[-1])]
    ranges = [part for part in ranges if rng.random() < 0.8]
    with web.serve() as server:
        server.files = {"/a": CONTENT, "/b": CONTENT}
        if kind == "s3":
            s3: S3 = request.getfixturevalue("s3")
            store = Watched(f"s3://{BUCKET}/{secrets.token_hex(4)}", Storage(**s3.storage))
        else:
            urls = {"file": str(tmp_path), "memory": f"memory://{tmp_path.name}", "http": server.url}
            store = Watched(urls[kind])
        if kind != "http":
            store.write("a", CONTENT)
            store.write("b", CONTENT)
        found = [bytes(content) for content in read_ahead(store, ranges)]
    assert found == [CONTENT[part.start : part.stop] for part in ranges]
    assert sum(stop - start for _, start, stop in store.reads) == sum(part.nbytes for part in ranges)


def test_ranges_that_touch_are_one_request_of_a_bounded_length(store: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "REQUEST", 100)
    ranges = [*touching("a", 0, 60, 90, 100, 101), Range("a", 102, 110), Range("b", 110, 120), Range("b", 119, 125)]
    assert [len(content) for content in read_ahead(store, ranges)] == [60, 30, 10, 1, 8, 10, 6]
    expected = [("a", 0, 100), ("a", 100, 101), ("a", 102, 110), ("b", 110, 120), ("b", 119, 125)]
    assert sorted(store.reads) == expected
    store.reads.clear()
    assert len(list(read_ahead(store, touching("a", 0, 30, 60, 90), budget=60))) == 3
    assert sorted(store.reads) == [("a", 0, 60), ("a", 60, 90)]  # nor longer than the budget


def test_a_long_range_is_not_split_and_an_empty_one_is_not_asked_for(
    store: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "REQUEST", 100)
    assert [len(content) for content in read_ahead(store, [Range("a", 5, 905), Range("b", 7, 7)])] == [900, 0]
    assert store.reads == [("a", 5, 905)]
    with pytest.raises(ValueError, match="a: no range goes from byte 3 to 2"):
        Range("a", 3, 2)


def test_requests_run_at_once_and_ahead_of_use(store: Watched) -> None:
    met = threading.Barrier(3)  # nobody passes alone

    def read(name: str, start: int, stop: int) -> bytes:
        met.wait(60)
        return CONTENT[start:stop]

    store.answer = read
    ranges = [Range("a", start, start + 5) for start in range(0, 60, 10)]
    assert [bytes(content) for content in read_ahead(store, ranges, workers=3)] == [
        CONTENT[part.start : part.stop] for part in ranges
    ]


def test_a_slow_user_never_has_more_than_the_budget_waiting(store: Watched) -> None:
    ranges = [Range("a", start, start + size) for start, size in ((10 * n, 1 + n % 7) for n in range(300))]
    lock, held = threading.Lock(), [0]

    def hold(nbytes: int) -> None:
        with lock:
            held.append(held[-1] + nbytes)

    def read(name: str, start: int, stop: int) -> bytes:
        hold(stop - start)
        return CONTENT[start:stop]

    store.answer = read
    for number, content in enumerate(read_ahead(store, ranges, budget=20)):
        if number in (0, 100, 200):  # slow: all that may be read ahead comes
            until(lambda: held[-1] > 20 - 7)
        hold(-len(content))
    assert max(held) <= 20 and held[-1] == 0


def test_memory_is_bounded_and_what_was_used_is_freed(store: Watched) -> None:
    size, budget = 1 << 20, 4 << 20
    store.answer = lambda name, start, stop: bytes(stop - start)
    ranges = [Range("a", start, start + size) for start in range(0, 60 * size, size + 1)]
    list(read_ahead(store, ranges[:1]))  # what is loaded once is not counted
    tracemalloc.start()
    try:
        for content in read_ahead(store, ranges, budget=budget):
            assert len(content) == size
            del content
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert budget / 2 < peak < budget + size / 2


def test_a_range_above_the_budget_is_read_with_nothing_beside_it(store: Watched) -> None:
    alone, busy = [], set()

    def read(name: str, start: int, stop: int) -> bytes:
        busy.add(start)
        alone.append((stop - start, len(busy)))
        busy.remove(start)
        return CONTENT[start:stop]

    store.answer = read
    ranges = [Range("a", 0, 5), Range("a", 10, 500), Range("a", 600, 605)]
    ahead = read_ahead(store, ranges, budget=10)
    assert len(next(ahead)) == 5 and len(store.reads) == 1
    assert len(next(ahead)) == 490 and len(store.reads) == 2
    assert len(next(ahead)) == 5 and list(ahead) == []
    assert alone == [(5, 1), (490, 1), (5, 1)]


def test_progress_hears_every_byte(store: Watched) -> None:
    heard: list[int] = []
    list(read_ahead(store, [*touching("a", 0, 10, 30), Range("b", 5, 10)], progress=heard.append))
    assert heard == [30, 5]


def test_a_request_that_failed_is_tried_again_with_growing_pauses(store: Watched, pauses: list[float]) -> None:
    store.answer = failing(OSError("reset"), TimeoutError(), ConnectionError("gone"), RuntimeError("driver"))
    assert list(read_ahead(store, [Range("a", 3, 9)])) == [CONTENT[3:9]]
    assert pauses == [0.5, 1, 2, 4] and len(store.reads) == 5


def test_a_request_that_fails_five_times_is_named(store: Watched, pauses: list[float]) -> None:
    store.answer = failing(*[OSError(f"no {n}") for n in range(9)])
    with pytest.raises(JobError) as fault:
        list(read_ahead(store, [Range("a", 3, 9_000)]))
    assert str(fault.value) == (
        f"{store.url}/a: bytes 3 to 9,000 could not be read in 5 tries (OSError: no 4). "
        "Start the run again when the storage answers"
    )
    assert pauses == [0.5, 1, 2, 4] and fault.value.exit_code == 1 and fault.value.__cause__


@pytest.mark.parametrize("status", [429, 503])
def test_a_web_server_that_asks_for_a_longer_pause_gets_it(status: int, pauses: list[float]) -> None:
    with web.serve() as server:
        server.files = {"/a": CONTENT}
        server.refusals = [(status, {"Retry-After": "17"}), (500, {"Retry-After": "17"}), (status, {})]
        assert list(read_ahead(Store(server.url), [Range("a", 3, 9)])) == [CONTENT[3:9]]
    assert pauses == [17, 1, 2]


def throttled(status: int, headers: dict[str, str]) -> BaseException:
    """What s3fs raises for such an answer."""
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    answer: Any = {"Error": {"Code": "SlowDown", "Message": "slow down"}, "ResponseMetadata": metadata}
    translated: BaseException = translate_boto_error(ClientError(answer, "GetObject"))
    return translated


def test_a_bucket_that_asks_for_a_longer_pause_gets_it(store: Watched, pauses: list[float]) -> None:
    store.answer = failing(throttled(503, {"retry-after": "9"}), throttled(503, {}))
    assert list(read_ahead(store, [Range("a", 3, 9)])) == [CONTENT[3:9]]
    assert pauses == [9, 1]


@pytest.mark.parametrize(
    ("asked", "low", "high"),
    [("in two minutes", 1, 120), ("86400", 300, 300), ("soon", 0.5, 0.5), ("-5", 0.5, 0.5)],
    ids=["date", "a day", "words", "negative"],
)
def test_a_date_is_waited_for_a_day_is_not(
    store: Watched, pauses: list[float], asked: str, low: float, high: float
) -> None:
    if asked == "in two minutes":  # by the clock of this test, not of the collection of all
        asked = formatdate(time.time() + 120, usegmt=True)
    store.answer = failing(throttled(503, {"retry-after": asked}))
    list(read_ahead(store, [Range("a", 3, 9)]))
    assert low <= pauses[0] <= high


FINAL = [
    (FileNotFoundError("a"), "not found. Copy the file there again"),
    (PermissionError(13, "no"), "access denied (are the keys in the environment right?). Give the keys the right to"),
    (type("NoCredentialsError", (Exception,), {})(), "no keys. Put AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY into"),
]


@pytest.mark.parametrize(("fault", "said"), FINAL, ids=["missing", "denied", "no keys"])
def test_what_no_second_try_mends_is_refused_at_once(
    store: Watched, pauses: list[float], fault: Exception, said: str
) -> None:
    store.answer = failing(fault)
    with pytest.raises(ModelError) as refused:
        list(read_ahead(store, [Range("a", 3, 9)]))
    assert str(refused.value).startswith(f"{store.url}/a: {said}")
    assert not pauses and len(store.reads) == 1


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "access denied. Give the keys the right to read it"),
        (403, "access denied. Give the keys the right to read it"),
        (404, "not found. Copy the file there again"),
        (410, "not found. Copy the file there again"),
    ],
)
def test_a_web_servers_refusal_is_final_too(pauses: list[float], status: int, said: str) -> None:
    with web.serve() as server:
        server.files, server.refusals = {"/a": CONTENT}, [(status, {})]
        with pytest.raises(ModelError) as refused:
            list(read_ahead(Store(server.url), [Range("a", 3, 9)]))
    assert str(refused.value) == f"{server.url}/a: {said}" and not pauses


def test_a_missing_object_and_a_missing_local_file_are_refused(s3: S3, tmp_path: Path) -> None:
    for store in (Store(f"s3://{BUCKET}/nowhere", Storage(**s3.storage)), Store(str(tmp_path))):
        with pytest.raises(ModelError, match=r"/a: not found\. Copy the file there again"):
            list(read_ahead(store, [Range("a", 3, 9)]))


def test_a_local_file_without_permission_is_made_readable(tmp_path: Path) -> None:
    store = Watched(str(tmp_path))
    store.answer = failing(PermissionError(13, "Permission denied", f"{tmp_path}/a"))
    with pytest.raises(ModelError, match=r"/a: access denied\. Make it readable to this user$"):
        list(read_ahead(store, [Range("a", 3, 9)]))


def test_a_file_that_was_cut_off_is_named(store: Watched, pauses: list[float]) -> None:
    end = len(CONTENT)
    with pytest.raises(ModelError) as refused:
        list(read_ahead(store, [Range("a", 0, 9), Range("b", end - 5, end + 1)]))
    assert str(refused.value) == (
        f"{store.url}/b ends within bytes {end - 5:,} to {end + 1:,}: the file is cut off. Copy it again"
    )
    assert not pauses


def test_a_server_that_sends_the_whole_file_for_a_range_is_refused() -> None:
    with web.serve() as server:
        server.files, server.knows_ranges = {"/a": CONTENT}, False
        with pytest.raises(ModelError, match=r"sent 100,000 bytes for bytes 3 to 9\. Expected a server that answers"):
            list(read_ahead(Store(server.url), [Range("a", 3, 9)]))


@pytest.fixture
def no_reader_is_left() -> Iterator[None]:
    """No thread reads before or after the test."""
    assert not readers()
    yield
    assert not readers()


@pytest.mark.usefixtures("no_reader_is_left")
def test_a_user_who_leaves_early_stops_all_reading(store: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    closing = threading.Event()

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            closing.set()
            super().shutdown(wait=wait)

    def read(name: str, start: int, stop: int) -> bytes:
        assert start == 0 or closing.wait(60)
        return CONTENT[start:stop]

    monkeypatch.setattr(reading, "ThreadPoolExecutor", Pool)
    store.answer = read
    ahead = read_ahead(store, [Range("a", start, start + 5) for start in range(0, 9_000, 10)], workers=2)
    assert len(next(ahead)) == 5
    until(lambda: len(store.reads) == 3)  # the first, and two that hang
    ahead.close()
    assert len(store.reads) == 3 and not readers()


@pytest.mark.usefixtures("no_reader_is_left")
def test_a_user_who_leaves_early_does_not_wait_for_a_pause(store: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PAUSES_S", (3600.0,) * 4)

    def read(name: str, start: int, stop: int) -> bytes:
        if start:
            raise OSError("busy")
        return CONTENT[start:stop]

    store.answer = read
    ahead = read_ahead(store, [Range("a", 0, 5), Range("a", 10, 15)])
    assert len(next(ahead)) == 5
    until(lambda: len(store.reads) == 2)
    ahead.close()
    assert len(store.reads) == 2


@pytest.mark.usefixtures("no_reader_is_left")
def test_a_failure_stops_all_reading(store: Watched) -> None:
    failed = threading.Event()

    def read(name: str, start: int, stop: int) -> bytes:
        if start == 0:
            failed.set()
            raise FileNotFoundError(name)
        assert failed.wait(60)
        return CONTENT[start:stop]

    store.answer = read
    with pytest.raises(ModelError, match="not found"):
        list(read_ahead(store, [Range("a", start, start + 5) for start in range(0, 90_000, 10)], budget=500))
    assert len(store.reads) <= 100 and not readers()  # of 9,000: what the budget let begin
