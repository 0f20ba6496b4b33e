"""How a run stands: its own status.json beside what SLURM says of its jobs. Either may be absent."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from job.config import RunConfig, load_config
from job.config.running import Storage
from job.errors import ConfigError, InputError, JobError
from job.launch.slurm.jobs import Job, find, in_folders, mine, show
from job.launch.slurm.pending import in_words
from job.launch.slurm.request import address
from job.run_folder import STATUS, Status
from job.sinks import METRICS, PARTS
from job.store import Store, reason

TAIL = 1 << 15
"""Bytes at the end of metrics.jsonl that hold its last rows."""


@dataclass(frozen=True)
class Run:
    """A run as its output folder shows it.

    Attributes:
        url: see `request.address`.
        status: None before it began, or when status.json cannot be read.
        steps: how many it will take; None when nobody can tell yet.
        loss: of the newest row of metrics, and `step` its step.
        fault: why the folder could not be read; empty when it could.
    """

    url: str
    status: Status | None = None
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    fault: str = ""

    @property
    def finished(self) -> bool:
        """Whether it is done."""
        return self.status is not None and self.status.state == "finished"

    def lines(self) -> list[str]:
        """For people."""
        status = self.status
        if status is None:
            return [f"run {self.url}: {self.fault or 'has not begun'}"]
        step = f"step {max(self.step, status.step)}" + (f" of {self.steps}" if self.steps else "")
        losses = [
            f"{name} {loss:.4f}"
            for name, loss in (("loss", self.loss), ("evaluation loss", self.eval_loss))
            if loss is not None
        ]
        why = f" ({status.reason})" if status.reason else ""
        kept = f"newest checkpoint: step {status.checkpoint}" if status.checkpoint else "no checkpoint yet"
        lost = f"; restarts since: {status.restarts}" if status.restarts else ""
        return [
            f"run {self.url}: {status.state}{why}, {', '.join([step, *losses])}",
            f"  {kept}{lost}; status written {status.updated}",
        ]


@dataclass(frozen=True)
class Standing:
    """A run and the job that it has, or had last; `fault` is why SLURM could not be asked for one."""

    run: Run | None
    job: Job | None
    fault: str = ""

    @property
    def orphaned(self) -> bool:
        """Whether status.json says running, and its job has ended."""
        going = self.run and self.run.status and self.run.status.state == "running"
        return bool(going and self.job and not self.job.active)

    def lines(self) -> list[str]:
        """For people."""
        lines = [*(self.run.lines() if self.run else []), *(job_lines(self.job) if self.job else [])]
        if self.fault:
            lines.append(f"job: unknown, {self.fault}")
        if self.orphaned:
            lines.append(
                "  no job of it waits or runs: its processes were lost. The same command goes on from its checkpoint"
            )
        return lines

    def as_json(self) -> dict[str, Any]:
        """For programs; times that may still pass in seconds."""
        run = asdict(self.run) if self.run else None
        job = asdict(self.job) if self.job else None
        if job and self.job:
            job["left"] = self.job.left.total_seconds() if self.job.left is not None else None
            job["waits_for"] = in_words(self.job) if self.job.queued else ""
        return {"run": run, "job": job, "fault": self.fault}


def job_lines(job: Job) -> list[str]:
    """What SLURM says of a job, for people."""
    again = f", restarted {job.restarts} times" if job.restarts > 1 else ", restarted once" if job.restarts else ""
    if job.queued:
        starts = f", expected to start {job.starts}" if job.starts else ""
        return [f"job {job.id}: {job.state}: {in_words(job)}{starts}{again}"]
    on = f" on {job.nodes}" if job.nodes else ""
    left = f", {job.left} left" if job.left is not None else ""
    code = f", exit code {job.exit_code}" if not job.active and job.exit_code else ""
    why = f" ({job.reason})" if job.reason else ""
    return [f"job {job.id}: {job.state}{why}{on}{left}{code}{again}"]


def jobs_of(config: RunConfig | None, job_id: str | None) -> list[Job]:
    """The jobs that were asked about: by id, else by the output address of the settings.

    Raises:
        InputError: neither was given, or there is no job of this id.
    """
    if job_id is not None:
        found = show(job_id)
        return found or _left_behind(job_id)
    if config is None:
        raise InputError("neither CONFIG nor --job was given, so there is no job to look for. Give one of them")
    url = address(config.output.url)
    found = find(url)
    folder = None if found else in_folders(url, Path.cwd())  # of a job that was submitted with plain sbatch
    return found if folder is None else of_folder(folder)


def of_folder(folder: Path) -> list[Job]:
    """The job of a job folder."""
    number = folder.name.removeprefix("qlora-")
    return [job for job in show(number) if job.id == number] or [forgotten(folder)]


def _left_behind(job_id: str) -> list[Job]:
    folder = Path.cwd() / f"qlora-{job_id}"
    if not folder.is_dir():
        raise InputError(
            f"SLURM knows no job {job_id}, and here is no folder {folder.name}. qlora status lists your jobs"
        )
    return [forgotten(folder)]


def forgotten(folder: Path) -> Job:
    """The job of a job folder, when SLURM has forgotten it."""
    log = folder.parent / f"{folder.name}.log"
    return Job(
        id=folder.name.removeprefix("qlora-"),
        name="",
        state="unknown to SLURM by now",
        folder=str(folder.parent),
        log=str(log) if log.exists() else "",
    )


def without_slurm(config: RunConfig | None) -> list[Standing]:
    """How the run stands, by its folder alone.

    Raises:
        InputError: no settings were given.
    """
    if config is None:
        raise InputError("there is no SLURM to ask here, so a run is known by its run file alone. Give CONFIG")
    return [Standing(read_run(address(config.output.url), config), None)]


def standings(config: RunConfig | None, job_id: str | None) -> list[Standing]:
    """How the run stands, or each run of an array; without settings and id, how each of this user's jobs does.

    Raises:
        InputError: see `jobs_of`.
        JobError: SLURM does not answer, and no settings tell where the run writes.
    """
    try:
        jobs = mine() if config is None and job_id is None else jobs_of(config, job_id)
    except JobError as fault:
        if config is None or isinstance(fault, InputError):
            raise
        return [Standing(read_run(address(config.output.url), config), None, str(fault))]
    if not jobs and config is not None:
        return without_slurm(config)
    return [Standing(run_of(job, config), job) for job in sorted(jobs, key=lambda job: job.number)]


def run_of(job: Job, config: RunConfig | None) -> Run | None:
    """The run of a job: where its job.json says, else where the settings or the job's comment say."""
    if output := job.about().get("output"):
        url = address(str(output), Path(job.folder))
        same = config is not None and address(config.output.url) == url
        return read_run(url, config if same else config_of(job) or config)
    _, _, task = job.id.partition("_")
    if task and not task.isdecimal():  # several runs
        return None
    url = address(config.output.url) if config is not None else job.comment
    return read_run(f"{url}/{task}".rstrip("/"), config) if url else None


def config_of(job: Job) -> RunConfig | None:
    """The settings that a job began with, for how its storage is reached; None when they cannot be read."""
    try:
        path, *settings = map(str, job.about()["words"])
        return load_config(os.path.join(job.folder, path), settings)
    except (ConfigError, KeyError, TypeError, ValueError):
        return None


def read_run(url: str, config: RunConfig | None) -> Run:
    """A run as its output folder shows it now; what cannot be read is said in `fault`.

    Args:
        config: the run's settings, for its storage and its number of steps.
    """
    try:
        store = Store(url, config.storage if config else Storage())
        status = Status(**json.loads(store.read(STATUS))) if store.exists(STATUS) else None
        rows = _last_rows(store)
    except (ValueError, TypeError):
        return Run(url, fault=f"{STATUS} is damaged")
    except Exception as fault:  # every driver has its own errors
        return Run(url, fault=f"cannot be read from here: {reason(fault)}")
    train = next((row for row in reversed(rows) if "loss" in row), {})
    held_out = next((row for row in reversed(rows) if "eval_loss" in row), {})
    step = int(train.get("step") or 0)
    return Run(url, status, step, _steps(config, train), train.get("loss"), held_out.get("eval_loss"))


def _steps(config: RunConfig | None, row: Mapping[str, float]) -> int | None:
    """All steps of the run: told by the settings, or by how far into the epochs a step came."""
    if config is None:
        return None
    if config.train.max_steps is not None:
        return config.train.max_steps
    return round(row["step"] / row["epoch"] * config.train.epochs) if row.get("epoch") else None


def _last_rows(store: Store) -> list[dict[str, float]]:
    """The last rows of metrics; where storage cannot append, those since the last start are in parts."""
    parts = store.child(PARTS)
    names = parts.names()
    if names:
        content = parts.read(names[-1])
    elif store.exists(METRICS):
        size = store.size(METRICS)
        content = store.read(METRICS, max(size - TAIL, 0), size)
    else:
        return []
    rows = []
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut off at either end
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
