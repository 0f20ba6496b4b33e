"""What asks a run to stop besides signals: a file, a key, the time that is left; and who says so."""

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from job.config import RunConfig, parse_config
from job.errors import InputError
from job.stop import (
    NAMES,
    STOP_FILE,
    STOP_KEY,
    TIME_LIMIT,
    WARNING,
    WORDS,
    CutShort,
    StopRequest,
    files_that_ask,
    limits,
    out_of_time,
)
from tests.test_config import LEAST


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False))


def test_the_old_handlers_and_wake_up_come_back(no_terminal: None) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    files = len(list(Path("/proc/self/fd").iterdir()))
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.asked == "SIGUSR1"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert len(list(Path("/proc/self/fd").iterdir())) == files


def test_a_stop_file_that_appears_asks_and_stays_the_reason(
    tmp_path: Path, no_terminal: None, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "stop"
    with StopRequest(files={str(file): STOP_FILE}) as stop:
        assert stop.asked is None
        file.touch()
        assert stop.asked == STOP_FILE
        file.unlink()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == STOP_FILE
    said = capsys.readouterr().err
    assert said.startswith("Stopping now, for a stop file; a checkpoint and the adapter will be written.\n")
    assert said.count("Stopping now") == 1


def test_a_stop_file_where_storage_falters_is_no_stop_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert StopRequest(files={str(tmp_path / "file/below"): STOP_FILE}).asked is None
    assert StopRequest(files={"x" * 5000: STOP_FILE}).asked is None


def test_a_key_asks_by_its_word_and_is_not_looked_for_again() -> None:
    answers: Iterator[str | None] = iter([None, STOP_KEY])
    stop = StopRequest(also=lambda: next(answers))
    assert [stop.asked, stop.asked, stop.asked] == [None, STOP_KEY, STOP_KEY]


def test_only_the_rank_that_speaks_says_that_it_stops(capsys: pytest.CaptureFixture[str]) -> None:
    with StopRequest(also=lambda: STOP_KEY, speaks=False) as stop:
        assert stop.asked == STOP_KEY
        os.kill(os.getpid(), signal.SIGUSR1)
    assert capsys.readouterr().err == ""


def test_ranks_have_a_word_for_everything_and_a_signal_is_the_reason_they_agree_on() -> None:
    others = (STOP_FILE, STOP_KEY, TIME_LIMIT, WARNING)
    assert {*others, *NAMES} == set(WORDS)
    assert len(set(WORDS)) == len(WORDS)
    assert all(WORDS.index(name) > WORDS.index(word) for name in NAMES for word in others)


def test_the_schedulers_warning_is_a_file_beside_the_users_own(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    config = parse_config(f"{LEAST}\ntrain: {{stop_file: {mine}}}")
    assert files_that_ask(parse_config(LEAST), {}) == {}
    files = files_that_ask(config, {"QLORA_WARNING_FILE": str(theirs)})
    theirs.touch()
    assert StopRequest(files=files).asked == WARNING
    mine.touch()
    assert StopRequest(files=files).asked == STOP_FILE


def test_signals_that_a_launcher_blocks_are_heard_within(no_terminal: None) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        # while the model loads; sent to this thread alone, for those that other tests left behind do not block it
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        with StopRequest() as stop:
            assert stop.asked == "SIGTERM"
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@pytest.mark.parametrize(
    ("now", "longest_s", "over"),
    [(850.0, 0.0, False), (880.0, 0.0, False), (880.5, 0.0, True), (850.0, 30.0, False), (850.0, 30.5, True)],
)
def test_time_is_over_when_one_more_longest_step_would_eat_into_the_grace(
    now: float, longest_s: float, over: bool
) -> None:
    assert out_of_time(now, ends_at=1000.0, grace_s=120.0, longest_s=longest_s) is over


def test_the_longest_time_between_two_readings_counts_as_the_step_that_must_still_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ends_at = time.time() + 3
    stop = StopRequest(grace_s=1, ends_at=ends_at)
    assert stop.asked is None
    begun = time.monotonic()
    time.sleep(0.6)  # a step, and perhaps an evaluation
    assert stop.asked is None
    longest_s = time.monotonic() - begun
    while stop.asked is None:
        time.sleep(0.01)  # short steps do not make the longest one shorter
    left = ends_at - time.time()
    assert stop.asked == TIME_LIMIT and longest_s + 0.7 < left < longest_s + 1
    assert capsys.readouterr().err.startswith("Stopping now, for the time limit; ")


def test_a_limit_closer_than_the_grace_asks_before_the_first_step_and_says_what_to_raise(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert StopRequest(grace_s=120, ends_at=time.time() + 36.2).asked == TIME_LIMIT
    assert StopRequest(grace_s=120, ends_at=time.time() - 5).asked == TIME_LIMIT
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "The time limit is in 36 s, and train.stop_grace_s keeps 120 s for the save: no step is taken. Raise the limit "
        "(train.max_hours, or the job's own), or lower train.stop_grace_s"
    )
    assert second.startswith("The time limit is in 0 s")


def with_hours(hours: float | None) -> RunConfig:
    return parse_config(LEAST + (f"\ntrain: {{max_hours: {hours}}}\n" if hours else ""))


@pytest.mark.parametrize(
    ("hours", "job_ends", "expected"),
    [
        (None, None, None),
        (2, None, 1_800_007_200.0),
        (0.5, None, 1_800_001_800.0),
        (None, "1800003600", 1_800_003_600.0),
        (2, "1800003600", 1_800_003_600.0),
        (0.5, "1800003600", 1_800_001_800.0),
    ],
)
def test_the_end_is_what_comes_first_of_max_hours_and_the_jobs_own_limit(
    hours: float | None, job_ends: str | None, expected: float | None
) -> None:
    env = {} if job_ends is None else {"SLURM_JOB_END_TIME": job_ends}
    assert limits(with_hours(hours), env, 1_800_000_000.0) == expected


@pytest.mark.parametrize("text", ["soon", "", "-1", "1e9", "2027-01-15T08:00:00", "１８", "12.5"])
def test_an_end_of_the_job_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(InputError) as refused:
        limits(with_hours(1), {"SLURM_JOB_END_TIME": text}, 0.0)
    assert str(refused.value) == (f"The environment's SLURM_JOB_END_TIME is {text!r}, expected Unix seconds. Unset it")


def test_without_a_grace_only_ctrl_c_ends_a_run(no_terminal: None) -> None:
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.asked, stop.grace_s) == ("SIGTERM", math.inf)


def test_the_end_at_once_is_no_ordinary_exception() -> None:
    assert not issubclass(CutShort, Exception)
    assert CutShort("why").code == "why", "said on stderr, exit code 1"
