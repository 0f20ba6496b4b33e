"""Ending a job: one that runs is asked to save and stop, one that waits is taken out of the queue."""

import re
from collections.abc import Callable

from job.config import RunConfig
from job.errors import InputError
from job.launch.slurm.commands import ask
from job.launch.slurm.jobs import Job
from job.launch.slurm.request import address
from job.launch.slurm.watch import Run, config_of, jobs_of, read_run, run_of
from job.launch.stopping import WHAT_THEN, ask_to_stop
from job.lease import STOP_KEY

Say = Callable[[str], None]


def cancel(config: RunConfig | None, job_id: str | None, now: bool, say: Say) -> None:
    """End the jobs of a run that wait or run.

    Args:
        now: end them at once, without a save.

    Raises:
        InputError: there is none, or SLURM refuses.
        OutputError: the run cannot be asked, since its output folder cannot be written.
    """
    jobs = jobs_of(config, job_id)
    active = [job for job in jobs if job.active]
    if not active:
        ended = f" (job {jobs[-1].id} is {jobs[-1].state})" if jobs else ""
        what = f"job {job_id}" if job_id else f"output.url {config.output.url}" if config else "this"
        raise InputError(f"there is nothing to cancel: no job of {what} is queued or runs{ended}. See qlora status")
    for job in active:
        _end(job, config, now, say)


def cancel_without_slurm(config: RunConfig | None, now: bool, say: Say) -> None:
    """Ask a run that no scheduler knows of to save and stop.

    Raises:
        InputError: it does not run, by what it wrote itself, or cannot be ended from here.
    """
    if config is None:
        raise InputError("there is no SLURM to ask here, so a run is known by its run file alone. Give CONFIG")
    run = read_run(address(config.output.url), config)
    if run.status is None or run.status.state != "running":
        state = run.fault or (run.status.state if run.status else "has not begun")
        raise InputError(f"there is nothing to cancel: the run of output.url {run.url} is not running ({state})")
    if now:
        raise InputError(
            "--now ends jobs of SLURM, and this run is none. Leave --now out, or press Ctrl-C where it runs"
        )
    ask_to_stop(run.url, config.storage if config else None)
    say(f"the run was asked to save and stop: {run.url}/{STOP_KEY} is there now. {WHAT_THEN}")


def _end(job: Job, config: RunConfig | None, now: bool, say: Say) -> None:
    if now or job.queued:
        _scancel(job)
        lost = "; what it did since its last checkpoint is lost" if not job.queued else ", it had not begun"
        say(f"job {job.id} is cancelled{lost}")
        return
    run = run_of(job, config)
    if run is None:
        raise InputError(f"job {job.id} has not said yet where its run writes. Wait a moment, or end it with --now")
    if not run.fault and _not_begun(job, run):
        _scancel(job)
        say(f"job {job.id} is cancelled; its run had not begun, so there was nothing to save")
        return
    known = config or config_of(job)
    ask_to_stop(run.url, known.storage if known else None)
    say(f"job {job.id} was asked to save and stop: {run.url}/{STOP_KEY} is there now. {WHAT_THEN}")
    say(f"to end it at once: qlora cancel --job {job.id} --now")


def _not_begun(job: Job, run: Run) -> bool:
    """Whether this start of the job has not come to its run yet, which would remove an earlier stop key."""
    if run.status is None or run.status.state != "running":
        return True
    return bool(run.status.updated == job.about().get("before", ""))


def _scancel(job: Job) -> None:
    answer = ask("scancel", re.sub(r"%\d+", "", job.id))  # behind it: how many tasks may run at once
    if answer.code:
        raise InputError(f"SLURM did not cancel job {job.id}: {answer.reason}. Is it yours?")
