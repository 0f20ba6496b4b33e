"""One run at a time in an output folder, over a local folder, memory and a real S3, with real processes that die."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from job.config.running import Storage
from job.errors import JobError, OutputError
from job.holder import Holder
from job.lease import FOLDER, STOP_KEY, Lease, NoLease, prove_conditional_puts
from job.store import Store
from tests.conftest import REPOSITORY
from tests.faults import Faults, proxied
from tests.s3 import ADMIN_KEY, ADMIN_SECRET, KEY, S3
from tests.stores import KINDS, make_store, store_at

FIRST, SECOND = (f"{FOLDER}/0000000{number}.json" for number in (1, 2))
WAITS = re.compile(r"output\.url: \S+ is held: waiting up to \d+ s to see whether (.+) is alive")
PROCESS = """
import socket, sys, time
url, storage, job, ttl, host, hours = sys.argv[1:]
if host:
    socket.gethostname = lambda: host
true_time = time.time
time.time = lambda: true_time() + 3600 * float(hours)
from job.config.running import Storage
from job.errors import OutputError
from job.lease import Lease
from job.store import Store
store = Store(url, Storage.model_validate_json(storage))
print("ready", flush=True)
sys.stdin.readline()
try:
    lease = Lease.acquire(store, job or None, print, float(ttl))
except OutputError as fault:
    print("refused", fault, flush=True)
else:
    print("held", flush=True)
    sys.stdin.readline()
    lease.release()
"""


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest) -> Store:
    """An empty folder of each kind."""
    return make_store(request.param, request)


@pytest.fixture(params=["file", "s3"])
def shared(request: pytest.FixtureRequest) -> Store:
    """An empty folder of each kind that several processes see."""
    return make_store(request.param, request)


@pytest.fixture
def flaky(s3: S3) -> Iterator[tuple[Store, Faults]]:
    """A folder on the S3 server behind a proxy."""
    with proxied(s3) as (server, faults):
        yield store_at(server), faults


class Process:
    """A process of its own that takes a lease when it is told to and holds it."""

    def __init__(self, store: Store, job: str = "", ttl_s: float = 60, host: str = "", hours: float = 0):
        words = [store.url, store.storage.model_dump_json(), job, str(ttl_s), host, str(hours)]
        pipe = subprocess.PIPE
        command = [sys.executable, "-c", PROCESS, *words]
        self.popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=REPOSITORY, text=True)

    def line(self) -> str:
        """The next line that it says."""
        assert self.popen.stdout
        return self.popen.stdout.readline().strip()

    def go(self) -> None:
        """Take the lease; the second time release it."""
        assert self.popen.stdin
        self.popen.stdin.write("\n")
        self.popen.stdin.flush()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *fault: object) -> None:
        self.popen.kill()
        self.popen.communicate()


@contextmanager
def holding(store: Store, **how: object) -> Iterator[Process]:
    """A process that holds the lease."""
    with Process(store, **how) as process:  # type: ignore[arg-type]
        process.go()
        assert [process.line(), process.line()] == ["ready", "held"]
        yield process


@contextmanager
def acquired(
    store: Store, job: str | None = None, ttl_s: float = 60.0, attempt: int | None = None
) -> Iterator[tuple[Lease, list[str]]]:
    """A lease of this process and what was said before it came."""
    said: list[str] = []
    lease = Lease.acquire(store, job, said.append, ttl_s, attempt)
    try:
        yield lease, said
    finally:
        lease.release()


def elsewhere(job: str | None = None, ttl_s: float = 60.0, attempt: int | None = None) -> Holder:
    """A holder on another host."""
    return replace(Holder.here(job, ttl_s, attempt), host="elsewhere", pid=12)


def parsed(store: Store, name: str = FIRST) -> Holder:
    found = Holder.parse(store.read(name))
    assert found
    return found


def eventually(true: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_first_run_holds_the_folder_until_it_releases_it(store: Store) -> None:
    with acquired(store, "7") as (lease, said):
        held = parsed(store)
        assert (held.job_id, held.pid, held.ttl_s, held.renewals) == ("7", os.getpid(), 60, 0)
        assert held.host and held.boot_id and held.pid_namespace and held.started
        assert store.child(FOLDER).names() == ["00000001.json"] and not said
        lease.check()
        assert lease.lost is None
    assert store.child(FOLDER).names() == []
    lease.release()  # once more does no harm
    with acquired(store):
        assert store.exists(FIRST)


def test_a_process_that_lives_on_this_host_is_not_waited_for(shared: Store) -> None:
    with holding(shared, job="7") as process:
        found = parsed(shared)
        for job in (None, "7", "8"):
            with pytest.raises(OutputError) as fault:
                Lease.acquire(shared, job, pytest.fail)
            assert str(fault.value) == (
                f"output.url: {shared.url} is in use by another run that is alive (host {found.host}, "
                f"pid {process.popen.pid}, job 7). Use another output.url, or stop that run first"
            )
        assert parsed(shared) == found
        process.go()
        process.popen.wait()
        assert shared.child(FOLDER).names() == []


@pytest.mark.parametrize("reaped", [False, True], ids=["zombie", "reaped"])
def test_a_killed_process_of_this_host_is_followed_at_once(shared: Store, reaped: bool) -> None:
    with holding(shared) as process:
        process.popen.kill()
        if reaped:
            process.popen.wait()
        else:
            os.waitid(os.P_PID, process.popen.pid, os.WEXITED | os.WNOWAIT)
        with acquired(shared) as (_, said):
            assert not said and shared.child(FOLDER).names() == ["00000002.json"]
            assert parsed(shared, SECOND).pid == os.getpid()


def test_another_process_with_the_number_of_the_dead_one_is_not_taken_for_it(store: Store) -> None:
    me = Holder.here(None, 60)
    assert me.started
    store.write(FIRST, replace(me, started=me.started - 1).content())
    with acquired(store) as (_, said):
        assert not said


@pytest.mark.parametrize("change", [{"boot_id": None}, {"pid_namespace": "pid:[1]"}, {"boot_id": "1-2-3"}], ids=str)
def test_a_process_number_of_another_place_says_nothing(tmp_path: Path, change: dict[str, str | None]) -> None:
    store = Store(str(tmp_path))
    dead = replace(Holder.here(None, 1), started=1, **change)
    store.write(FIRST, dead.content())
    with acquired(store) as (_, said):
        assert len(said) == 1


@pytest.mark.parametrize("missing", ["boot_id", "pid_namespace"])
def test_where_the_system_does_not_say_where_a_process_is_nobody_knows_whether_it_lives(missing: str) -> None:
    me = Holder.here(None, 60)
    dead = replace(me, started=1)
    assert me.lives(me) is True and dead.lives(me) is False
    assert replace(dead, **{missing: None}).lives(replace(me, **{missing: None})) is None


def test_a_run_that_renews_on_another_host_is_refused_however_long_it_holds(shared: Store) -> None:
    with holding(shared, host="elsewhere", job="7", ttl_s=4) as process:
        time.sleep(5)
        said: list[str] = []
        with pytest.raises(OutputError) as fault:
            Lease.acquire(shared, "8", said.append, 4)
    who = f"host elsewhere, pid {process.popen.pid}, job 7"
    assert str(fault.value) == (
        f"output.url: {shared.url} is in use by another run that is alive ({who}). Use another output.url, or stop "
        "that run first"
    )
    assert [WAITS.fullmatch(line)[1] for line in said] == [f"the run on {who}"]  # type: ignore[index]


def test_who_falls_silent_on_another_host_is_followed_after_its_time(store: Store) -> None:
    store.write(FIRST, elsewhere(ttl_s=4).content())
    with acquired(store, ttl_s=60) as (lease, said):
        assert [WAITS.fullmatch(line)[1] for line in said] == ["the run on host elsewhere, pid 12"]  # type: ignore[index]
        assert store.child(FOLDER).names() == ["00000002.json"]
        lease.check()


def test_an_expired_lease_is_not_waited_for(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write(FIRST, elsewhere().content())
    os.utime(tmp_path / FIRST, (time.time() - 61,) * 2)
    with acquired(store) as (_, said):
        assert not said and store.exists(SECOND)


def test_the_same_job_started_again_elsewhere_need_not_wait(store: Store) -> None:
    store.write(FIRST, elsewhere("7", attempt=0).content())
    with acquired(store, "7", attempt=1) as (_, said):
        assert not said and store.child(FOLDER).names() == ["00000002.json"]


OTHERS = [(job, 0, own, 1) for job, own in (("7", "8"), (None, "7"), ("7", None), (None, None))]
NOT_LATER = [("7", 1, "7", 1), ("7", 1, "7", 0), ("7", None, "7", 1), ("7", 0, "7", None), ("", None, "", None)]


@pytest.mark.parametrize(("theirs", "their_attempt", "ours", "attempt"), OTHERS + NOT_LATER)
def test_other_jobs_nameless_ones_and_those_not_started_again_since_wait(
    tmp_path: Path, theirs: str | None, their_attempt: int | None, ours: str | None, attempt: int | None
) -> None:
    store = Store(str(tmp_path))
    store.write(FIRST, elsewhere(theirs, 2, their_attempt).content())
    with acquired(store, ours, attempt=attempt) as (_, said):
        assert len(said) == 1


def test_a_lease_is_renewed_and_stays_ours(store: Store) -> None:
    with acquired(store, ttl_s=0.4) as (lease, _):
        eventually(lambda: parsed(store).renewals > 4)
        lease.check()
        assert lease.lost is None and store.child(FOLDER).names() == ["00000001.json"]


def test_who_was_taken_over_learns_it_and_never_writes_again(store: Store) -> None:
    with acquired(store, ttl_s=0.4) as (lease, _):
        other = elsewhere("8")
        assert store.create(SECOND, other.content())
        eventually(lambda: lease.lost)
        store.remove(FIRST, missing_ok=True)  # it may have been about to write
        assert lease.lost == (
            f"output.url: {store.url} is no longer this run's: another run holds it (host elsewhere, pid 12, job 8). "
            "This run stops and publishes nothing more. Start it again when no other run uses the folder, or with "
            "another output.url"
        )
        store.remove(SECOND)
        time.sleep(0.5)
        with pytest.raises(JobError, match="no longer this run's: another run holds it"):
            lease.check()  # once lost, it stays lost
        assert store.child(FOLDER).names() == []


def test_a_check_sees_a_takeover_before_the_next_renewal(store: Store) -> None:
    with acquired(store) as (lease, _):
        lease.check()
        renewals = parsed(store).renewals
        store.write(SECOND, elsewhere().content())
        with pytest.raises(JobError, match="another run holds it"):
            lease.check()
        assert parsed(store).renewals == renewals == 1
    assert store.child(FOLDER).names() == ["00000002.json"]  # release takes its own file only


@pytest.mark.parametrize("content", [None, b"{", elsewhere().content()], ids=["gone", "damaged", "another's"])
def test_a_lease_file_that_is_not_ours_any_more_is_a_lost_lease(store: Store, content: bytes | None) -> None:
    with acquired(store) as (lease, _):
        store.remove(FIRST) if content is None else store.write(FIRST, content)
        with pytest.raises(JobError, match=r"gone or damaged|host elsewhere, pid 12"):
            lease.check()
    assert store.exists(FIRST) == (content is not None)


def test_files_of_earlier_holders_that_come_late_go(store: Store) -> None:
    store.write(SECOND, elsewhere("7", attempt=0).content())
    with acquired(store, "7", attempt=1) as (lease, _):
        store.write(FIRST, elsewhere().content())
        lease.check()
        assert store.child(FOLDER).names() == ["00000003.json"]


DAMAGED = [b"", b"\xff{", b"[]", b"{}", elsewhere().content().replace(b'"pid": 12', b'"pid": -1')]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_lease_file_names_no_holder(content: bytes) -> None:
    assert Holder.parse(content) is None


def test_a_damaged_lease_file_is_an_unknown_holder_that_may_fall_silent(store: Store) -> None:
    store.write(FIRST, b"{")
    with acquired(store, ttl_s=4) as (_, said):
        assert [WAITS.fullmatch(line)[1] for line in said] == [f"a run that {FIRST} does not name"]  # type: ignore[index]


def test_a_damaged_lease_file_that_changes_is_in_use(store: Store) -> None:
    store.write(FIRST, b"{")
    with pytest.raises(OutputError, match=rf"alive \({FIRST} does not say where\)"):
        Lease.acquire(store, None, lambda line: store.write(FIRST, b"{ "))


def test_a_holder_that_ends_during_the_wait_makes_room(store: Store) -> None:
    store.write(FIRST, elsewhere().content())
    lease = Lease.acquire(store, None, lambda line: store.remove(FIRST))
    assert store.child(FOLDER).names() == ["00000001.json"]
    lease.release()


def test_who_looked_before_others_came_gives_way(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    create, other = Store.create, elsewhere()

    def late(self: Store, name: str, content: bytes) -> bool:
        if name == FIRST and not self.exists(SECOND):  # another took the folder, and over, since we looked
            self.write(SECOND, other.content())
        return create(self, name, content)

    def renew(line: str) -> None:
        assert store.child(FOLDER).names() == ["00000002.json"]
        store.write(SECOND, replace(other, renewals=1).content())

    monkeypatch.setattr(Store, "create", late)
    with pytest.raises(OutputError, match="alive"):
        Lease.acquire(store, None, renew)
    assert store.child(FOLDER).names() == ["00000002.json"]


@pytest.mark.parametrize("kind, hosts", [("file", ""), ("file", "host-{}"), ("s3", "host-{}")])
def test_of_many_that_want_an_expired_lease_one_gets_it(kind: str, hosts: str, request: pytest.FixtureRequest) -> None:
    shared = make_store(kind, request)
    shared.write(FIRST, elsewhere(ttl_s=1).content())
    time.sleep(2.1)
    with ExitStack() as stack:
        # so long that nobody expires on a busy machine, so short that the losers need not wait long for a renewal
        many = [stack.enter_context(Process(shared, host=hosts.format(n), ttl_s=12)) for n in range(8)]
        assert {process.line() for process in many} == {"ready"}
        for process in many:
            process.go()
        ends = [next(line for line in iter(process.line, "") if not WAITS.fullmatch(line)) for process in many]
        assert [end for end in ends if end == "held"] == ["held"]
        winner = many[ends.index("held")]
        assert all(f"pid {winner.popen.pid})" in end for end in ends if end != "held")
        assert [parsed(shared, f"{FOLDER}/{name}").pid for name in shared.child(FOLDER).names()] == [winner.popen.pid]


@pytest.mark.parametrize("hours", [-5, 5])
def test_clocks_of_hosts_do_not_matter(shared: Store, hours: float) -> None:
    with holding(shared, host="elsewhere", ttl_s=4, hours=hours) as process:
        with pytest.raises(OutputError, match="alive"):
            Lease.acquire(shared, None, lambda line: None, 4)
        process.popen.kill()
        with acquired(shared) as (_, said):
            assert len(said) <= 1


@pytest.mark.parametrize("hours", [-5, 5])
def test_the_clock_of_the_storage_may_differ_from_ours(flaky: tuple[Store, Faults], hours: float) -> None:
    store, faults = flaky
    faults.ahead_s = 3600 * hours
    store.write(FIRST, elsewhere(ttl_s=5).content())
    with acquired(store) as (_, said):
        assert len(said) == 1


def test_a_storage_that_fails_for_a_while_costs_nothing(flaky: tuple[Store, Faults]) -> None:
    store, faults = flaky
    with acquired(store, ttl_s=0.4) as (lease, _):
        faults.deny = "AccessDenied"
        with pytest.raises(PermissionError):
            lease.check()
        time.sleep(0.5)
        faults.deny = ""
        before = parsed(store).renewals
        eventually(lambda: parsed(store).renewals > before)
        assert lease.lost is None
        faults.deny = "AccessDenied"
        lease.release()  # raises nothing
        faults.deny = ""
        assert store.exists(FIRST)


def test_a_creation_whose_answer_is_lost_is_our_lease(flaky: tuple[Store, Faults]) -> None:
    store, faults = flaky
    faults.only, faults.lose_answer = FIRST, 1
    with acquired(store) as (lease, _):
        assert faults.lose_answer == 0 and faults.puts_of_new == 2
        lease.check()


def test_keys_that_end_during_the_run_are_read_anew(
    flaky: tuple[Store, Faults], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, faults = flaky
    with acquired(store, ttl_s=0.4) as (lease, _):
        faults.deny, faults.only_key = "AccessDenied", KEY
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", ADMIN_KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ADMIN_SECRET)
        seen = Store(store.url, Storage(**store.storage.model_dump() | {"region": "eu-central-1"}))
        before = parsed(seen).renewals
        eventually(lambda: parsed(seen).renewals > before + 1)
        lease.check()


def test_an_acquisition_that_fails_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = Store.remove

    def failing(self: Store, name: str, missing_ok: bool = False) -> None:
        if name == STOP_KEY:
            raise OSError("no")
        remove(self, name, missing_ok)

    store.write(STOP_KEY, b"")
    monkeypatch.setattr(Store, "remove", failing)
    with pytest.raises(OSError, match="no"):
        Lease.acquire(store, None, pytest.fail)
    assert store.child(FOLDER).names() == []


@pytest.mark.parametrize("leased", [True, False])
def test_the_stop_key_asks_this_run_and_not_the_next(store: Store, leased: bool) -> None:
    def start() -> NoLease:
        return Lease.acquire(store, None, pytest.fail, 0.4) if leased else NoLease(store, 0.4)

    store.write(STOP_KEY, b"")
    run = start()
    assert not store.exists(STOP_KEY)
    time.sleep(0.3)
    assert not run.asked_to_stop
    store.write(STOP_KEY, b"")
    eventually(lambda: run.asked_to_stop)
    store.remove(STOP_KEY)
    time.sleep(0.3)
    assert run.asked_to_stop
    run.release()
    assert store.names(folders=True) in ([], [FOLDER])


def test_without_a_lease_nothing_is_written_and_nobody_refused(store: Store) -> None:
    first, second = NoLease(store, 0.4), NoLease(store, 0.4)
    time.sleep(0.3)
    for each in (first, second):
        each.check()
        assert each.lost is None
        each.release()
    assert store.names(folders=True) == []


def test_storage_that_honours_conditions_is_proven_and_left_empty(store: Store) -> None:
    prove_conditional_puts(store)
    assert store.child(FOLDER).names() == []


def test_storage_that_ignores_conditions_is_refused(flaky: tuple[Store, Faults]) -> None:
    store, faults = flaky
    faults.drop_headers = frozenset({"if-none-match"})
    with pytest.raises(OutputError) as fault:
        prove_conditional_puts(store)
    assert str(fault.value) == (
        f"output.url: {store.url}: a file that must be new replaced another one, expected a refusal (If-None-Match: "
        "*). Use other storage, or set storage.lease: false, which gives up the protection against a second run"
    )
    assert faults.puts_of_new == 2 and store.child(FOLDER).names() == []


def test_storage_that_refuses_conditions_is_refused(flaky: tuple[Store, Faults]) -> None:
    store, faults = flaky
    faults.refuse_new = [(501, "NotImplemented")] * 9
    with pytest.raises(OutputError) as fault:
        prove_conditional_puts(store)
    assert str(fault.value) == (
        f"output.url: {store.url}: a file that must be new cannot be made: OSError: [Errno 38] NotImplemented by the "
        "proxy. Check that the folder can be written; if it can, use other storage, or set storage.lease: false, which "
        "gives up the protection against a second run"
    )


def test_a_lease_file_is_for_people_to_read(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    with acquired(store, "7"):
        values = json.loads((tmp_path / FIRST).read_text())
    assert set(values) >= {"id", "job_id", "host", "boot_id", "pid_namespace", "pid", "started", "renewals"}
