"""What becomes of a job when its processes are gone, for everything that the run can have recorded."""

import pytest

from job.launch.outcome import Outcome, outcome
from job.run_folder import LOST_RANK, State, Status
from job.stop import STOP_FILE, STOP_KEY, TIME_LIMIT, WARNING, WORDS

AGAIN = {TIME_LIMIT, WARNING, "SIGTERM", "SIGUSR1", "SIGUSR2"}
WISHED = {STOP_KEY, STOP_FILE, "SIGINT", "SIGHUP"}
DID_NOT_BEGIN = "the run did not begin; what the ranks said tells why"
NO_TIME = "the time limit left no time for a step. Raise it (sbatch --time), or lower train.stop_grace_s"
CODES = (0, 1, 2, 75, 137)


def recorded(state: State, why: str = "", step: int = 7) -> Status:
    return Status(state, why, step, "2026-11-21T15:00:00+00:00")


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("warned", [False, True])
@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (recorded("finished"), Outcome("done", "finished after step 7", 0)),
        (recorded("failed", "loss is not finite"), Outcome("failed", "loss is not finite", 1)),
        (recorded("running"), Outcome("again", "its processes were lost after step 7", 1)),
        (recorded("interrupted", WARNING), Outcome("again", f"interrupted by {WARNING} after step 7", 75)),
        (recorded("interrupted", STOP_KEY), Outcome("stopped", "interrupted by a stop key after step 7", 75)),
    ],
    ids=["finished", "failed", "lost", "warned", "stopped"],
)
def test_what_the_run_recorded_counts_and_no_exit_code(
    status: Status, expected: Outcome, warned: bool, code: int
) -> None:
    assert outcome(status, True, 3, warned, code) == expected


@pytest.mark.parametrize("warned", [False, True])
@pytest.mark.parametrize("word", WORDS)
def test_a_run_that_the_scheduler_interrupted_goes_on_and_one_that_its_user_stopped_does_not(
    word: str, warned: bool
) -> None:
    verdict = "again" if word in AGAIN else "stopped"
    expected = Outcome(verdict, f"interrupted by {word} after step 7", 75)
    assert outcome(recorded("interrupted", word), True, 6, warned, 75) == expected


def test_every_word_has_its_place() -> None:
    assert set(WORDS) == AGAIN | WISHED and not AGAIN & WISHED


@pytest.mark.parametrize("status", [None, *map(recorded, ("running", "finished", "interrupted", "failed"))])
@pytest.mark.parametrize(("code", "left"), [(0, 1), (1, 1), (2, 2), (137, 1)])
def test_a_run_that_did_not_begin_has_failed_unless_the_nodes_were_wanted_back(
    status: Status | None, code: int, left: int
) -> None:
    assert outcome(status, False, 0, False, code) == Outcome("failed", DID_NOT_BEGIN, left)
    wanted_back = Outcome("again", "the scheduler wanted the nodes back before the run began", 75)
    assert outcome(status, False, 0, True, code) == wanted_back


def test_a_status_from_nowhere_is_none() -> None:
    assert outcome(None, True, 0, False, 0) == Outcome("failed", DID_NOT_BEGIN, 1)


@pytest.mark.parametrize(
    ("word", "step", "before", "warned", "expected"),
    [
        (TIME_LIMIT, 7, 7, False, Outcome("failed", NO_TIME, 1)),
        (TIME_LIMIT, 0, 0, False, Outcome("failed", NO_TIME, 1)),
        (TIME_LIMIT, 6, 7, False, Outcome("failed", NO_TIME, 1)),
        (TIME_LIMIT, 8, 7, False, Outcome("again", "interrupted by the time limit after step 8", 75)),
        (TIME_LIMIT, 7, 7, True, Outcome("again", "interrupted by the time limit after step 7", 75)),
        (WARNING, 7, 7, True, Outcome("again", f"interrupted by {WARNING} after step 7", 75)),
        ("SIGTERM", 7, 7, False, Outcome("again", "interrupted by SIGTERM after step 7", 75)),
    ],
)
def test_a_time_limit_too_short_for_a_step_is_no_reason_to_begin_again(
    word: str, step: int, before: int, warned: bool, expected: Outcome
) -> None:
    assert outcome(recorded("interrupted", word, step), True, before, warned, 75) == expected


PEER = f"{LOST_RANK} after step 7, or cannot be reached; what it said tells why"


@pytest.mark.parametrize(
    ("status", "cause", "expected"),
    [
        (recorded("failed", PEER), "", Outcome("again", "one of its ranks was lost after step 7", 1)),
        (recorded("failed", PEER), "ValueError: x", Outcome("failed", "ValueError: x", 1)),
        (recorded("running"), "ValueError: x", Outcome("failed", "ValueError: x", 1)),
        (recorded("failed", "loss is nan"), "ValueError: x", Outcome("failed", "loss is nan", 1)),
        (recorded("finished"), "ValueError: x", Outcome("done", "finished after step 7", 0)),
        (
            recorded("interrupted", "SIGTERM"),
            "ValueError: x",
            Outcome("again", "interrupted by SIGTERM after step 7", 75),
        ),
    ],
)
def test_a_lost_rank_is_no_reason_to_end_unless_one_said_why(status: Status, cause: str, expected: Outcome) -> None:
    assert outcome(status, True, 3, False, 1, cause) == expected
