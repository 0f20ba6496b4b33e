"""Ending a RayJob: one that runs is asked to save and stop, one that waits is deleted."""

from collections.abc import Callable
from datetime import datetime

from job.config import RunConfig
from job.errors import InputError, OutputError
from job.launch.kubernetes.api import Cluster
from job.launch.kubernetes.jobs import Job
from job.launch.kubernetes.refusals import Absent
from job.launch.kubernetes.watch import config_of, jobs_of, run_of
from job.launch.slurm.watch import Run
from job.launch.stopping import WHAT_THEN, ask_to_stop
from job.lease import STOP_KEY

Say = Callable[[str], None]


def cancel(cluster: Cluster, config: RunConfig | None, name: str | None, now: bool, say: Say) -> None:
    """End the RayJobs of a run that wait or run.

    Args:
        name: of a RayJob, instead of settings.
        now: delete them at once; their pods have their grace period to save in.

    Raises:
        InputError: there is none, or Kubernetes refuses.
        OutputError: the run cannot be asked, since its output folder cannot be written.
    """
    jobs = jobs_of(cluster, config, name)
    active = [job for job in jobs if job.active]
    if not active:
        ended = f" (job {jobs[-1].name} has ended: {jobs[-1].state or jobs[-1].stage})" if jobs else ""
        what = f"job {name}" if name else f"output.url {config.output.url}" if config else "this"
        raise InputError(f"there is nothing to cancel: no job of {what} waits or runs{ended}. See qlora status")
    for job in active:
        _end(cluster, job, config, now, say)


def _end(cluster: Cluster, job: Job, config: RunConfig | None, now: bool, say: Say) -> None:
    if now or job.queued:
        _delete(cluster, job)
        before = ", it had not begun" if not job.failed else "; its run goes on from its last checkpoint when submitted"
        what = before if job.queued else "; its pods get their grace period, what is not saved by then is lost"
        say(f"job {job.name} is deleted{what}")
        return
    config = config or config_of(cluster, job)
    run = run_of(job, config)
    if run is None:
        raise InputError(f"job {job.name} does not say where its run writes. Give CONFIG, or end it with --now")
    if run.fault:
        raise OutputError(
            f"run {run.url}: {run.fault}, so it cannot be asked to stop. Give the keys of its storage in the "
            "environment, or end the job with --now, which leaves its pods their grace period"
        )
    if _not_begun(job, run):
        _delete(cluster, job)
        say(f"job {job.name} is deleted; its run had not begun, so there was nothing to save")
        return
    if job.retries:  # or KubeRay starts the stopped run again
        cluster.patch(cluster.rayjobs(job.name), f"RayJob {job.name}", {"spec": {"backoffLimit": 0}})
    ask_to_stop(run.url, config.storage if config else None)
    say(f"job {job.name} was asked to save and stop: {run.url}/{STOP_KEY} is there now. {WHAT_THEN}")
    say(f"to end it at once: qlora cancel --on kubernetes --job {job.name} --now")


def _not_begun(job: Job, run: Run) -> bool:
    """Whether this start has not come to its run yet, which would remove an earlier stop key."""
    if run.status is None or run.status.state != "running":
        return True
    return bool(job.started) and datetime.fromisoformat(run.status.updated) < datetime.fromisoformat(job.started)


def _delete(cluster: Cluster, job: Job) -> None:
    try:
        cluster.delete(cluster.rayjobs(job.name), f"RayJob {job.name}")
    except Absent:
        return  # gone by itself meanwhile
