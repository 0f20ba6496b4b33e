"""What becomes of a job when its processes are gone: decided by what the run recorded, not by exit codes."""

import signal
from dataclasses import dataclass
from typing import Literal

from job.errors import InputError, Interrupted, JobError
from job.run_folder import Status
from job.stop import TIME_LIMIT, WARNING

Verdict = Literal["done", "again", "stopped", "failed"]
SCHEDULERS = (TIME_LIMIT, WARNING, *(number.name for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)))
"""Who may have interrupted a run for the scheduler; Ctrl-C, a stop key and the user's own stop file want it to end."""


@dataclass(frozen=True)
class Outcome:
    """What comes next, why, and what the batch script ends with."""

    verdict: Verdict
    why: str
    code: int


def outcome(
    status: Status | None,
    this_start: bool,
    step_before: int,
    warned: bool,
    code: int,
    cause: str = "",
    enough: bool = False,
) -> Outcome:
    """Judge a start of the job that has ended.

    Args:
        status: the run's; None without any.
        this_start: whether this start has written it.
        step_before: how far the run was before.
        warned: whether the scheduler gave notice.
        code: exit code of the launcher.
        cause: what a rank said that failed by itself; only the first rank writes the status, and may not have lived to
            hear of it.
        enough: whether so many starts before this one came no further that another one is in vain, too.
    """
    found = _judged(status, this_start, step_before, warned, code, cause)
    no_further = status is None or not this_start or status.step <= step_before
    if enough and no_further and found.verdict == "again":
        cure = "Raise the time between the scheduler's notice and the end, or look for what ends them"
        return Outcome("failed", f"{found.why}, and so did the starts before it, no step further. {cure}", 1)
    return found


def _judged(status: Status | None, this_start: bool, step_before: int, warned: bool, code: int, cause: str) -> Outcome:
    if status is None or not this_start:
        if warned:
            return Outcome("again", "the scheduler wanted the nodes back before the run began", Interrupted.exit_code)
        kind = InputError if code == InputError.exit_code else JobError
        return Outcome("failed", "the run did not begin; what the ranks said tells why", kind.exit_code)
    if status.state == "finished":
        return Outcome("done", f"finished after step {status.step}", 0)
    if status.lost and cause:
        return Outcome("failed", cause, JobError.exit_code)
    if status.lost:
        what = "its processes were" if status.state == "running" else "one of its ranks was"
        return Outcome("again", f"{what} lost after step {status.step}", JobError.exit_code)
    if status.state == "failed":
        return Outcome("failed", status.reason, JobError.exit_code)
    said = f"interrupted by {status.reason} after step {status.step}"
    if status.reason == TIME_LIMIT and status.step <= step_before and not warned:
        cure = "Raise it (sbatch --time), or lower train.stop_grace_s"
        return Outcome("failed", f"the time limit left no time for a step. {cure}", JobError.exit_code)
    return Outcome("again" if status.reason in SCHEDULERS else "stopped", said, Interrupted.exit_code)
