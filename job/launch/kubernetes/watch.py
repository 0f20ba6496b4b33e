"""How a run stands: its own status.json beside what Kubernetes says of its RayJob. Either may be absent."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from job.config import RunConfig, parse_config
from job.errors import InputError, JobError
from job.launch.kubernetes.api import Cluster
from job.launch.kubernetes.jobs import Job, events_of, find, mine, pods_of, show
from job.launch.kubernetes.pending import hopeless, lines, stage_in_words
from job.launch.kubernetes.refusals import Forbidden
from job.launch.slurm.request import address
from job.launch.slurm.watch import Run, read_run

REASONS = {
    "PreRunningDeadlineExceeded": "its pods did not start in time: GPUs never came, or an image could not be pulled",
    "DeadlineExceeded": "it took longer than its deadline",
    "SubmissionFailed": "the command could not be handed to the Ray cluster: qlora logs shows why",
    "AppFailed": "the command ended with a failure: qlora logs shows why",
    "ValidationFailed": "KubeRay does not take what it says",
    "JobDeploymentStatusTransitionGracePeriodExceeded": "the Ray cluster did not say in time that the command ended",
}
"""KubeRay's reasons of a RayJob that failed."""


@dataclass(frozen=True)
class Standing:
    """A run and the RayJob that it has, or had last.

    Attributes:
        waits: why pods of it wait, for people.
        fault: why Kubernetes could not be asked for one.
    """

    run: Run | None
    job: Job | None
    waits: tuple[str, ...] = ()
    fault: str = ""

    @property
    def orphaned(self) -> bool:
        """Whether status.json says running, and its RayJob has ended."""
        going = self.run and self.run.status and self.run.status.state == "running"
        return bool(going and (self.job is None or not self.job.active) and not self.fault)

    def lines(self) -> list[str]:
        """For people."""
        lines = [*(self.run.lines() if self.run else []), *(job_lines(self.job) if self.job else []), *self.waits]
        if self.fault:
            lines.append(f"job: unknown, {self.fault}")
        elif self.job is None:
            lines.append("job: none in this namespace; what ended long ago is removed")
        if self.orphaned:
            lines.append(
                "  no RayJob of it waits or runs: its processes were lost. The same command goes on from its checkpoint"
            )
        elif self.job and self.job.active and hopeless(self.waits):
            lines.append("  waiting alone will not cure this: mend it and submit again, or end it with qlora cancel")
        return lines

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "run": asdict(self.run) if self.run else None,
            "job": asdict(self.job) if self.job else None,
            "waits_for": [line.strip() for line in self.waits],
            "fault": self.fault,
        }


def job_lines(job: Job) -> list[str]:
    """What Kubernetes says of a RayJob, for people."""
    again = f", failed starts: {job.failed} of {job.retries + 1}" if job.failed else ""
    if job.deleting:
        return [f"job {job.name}: is being deleted"]
    if job.queued:
        return [f"job {job.name}: {stage_in_words(job)}{again}"]
    if job.active:
        shown = f"; dashboard {job.dashboard}" if job.dashboard else ""
        return [f"job {job.name}: {job.state or 'RUNNING'} on cluster {job.cluster}{again}{shown}"]
    words = f": {REASONS.get(job.reason, job.reason)}" if job.reason else ""
    said = f" ({job.message})" if job.message and not job.succeeded else ""
    return [f"job {job.name}: {job.state or job.stage}{words}{said}, ended {job.ended or 'unknown when'}{again}"]


def jobs_of(cluster: Cluster, config: RunConfig | None, name: str | None) -> list[Job]:
    """The RayJobs that were asked about: by name, else by the output address of the settings.

    Raises:
        InputError: neither was given, there is none of this name, or the user may not look.
        JobError: the API server does not answer.
    """
    if name is not None:
        return [show(cluster, name)]
    if config is None:
        raise InputError("neither CONFIG nor --job was given, so there is no job to look for. Give one of them")
    return find(cluster, address(config.output.url))


def standings(cluster: Cluster, config: RunConfig | None, name: str | None) -> list[Standing]:
    """How the run stands; without settings and name, how each run of the namespace does.

    Raises:
        InputError: see `jobs_of`.
        JobError: the API server does not answer, and no settings tell where the run writes.
    """
    try:
        jobs = mine(cluster) if config is None and name is None else jobs_of(cluster, config, name)
    except JobError as fault:
        if config is None or isinstance(fault, InputError):
            raise
        return [Standing(read_run(address(config.output.url), config), None, (), str(fault))]
    if not jobs and config is not None:
        return [Standing(read_run(address(config.output.url), config), None)]
    return [Standing(run_of(job, config or config_of(cluster, job)), job, tuple(why(cluster, job))) for job in jobs]


def why(cluster: Cluster, job: Job) -> Sequence[str]:
    """Why pods of a RayJob wait, as far as the user may see it."""
    if not job.active:
        return []
    try:
        pods = pods_of(cluster, job)
        return lines(job, pods, events_of(cluster, job, pods))
    except Forbidden as fault:
        return [f"  why it waits is not shown: {fault}"] if job.queued else []


def config_of(cluster: Cluster, job: Job) -> RunConfig | None:
    """The settings that a RayJob began with, for how its storage is reached; None when they cannot be read."""
    if not job.config_map:
        return None
    try:
        kept = cluster.get(cluster.core("configmaps", job.config_map), f"ConfigMap {job.config_map}")
        return parse_config(kept["data"]["run.yaml"], job.settings)
    except (InputError, KeyError):
        return None


def run_of(job: Job, config: RunConfig | None) -> Run | None:
    """The run of a RayJob: where the settings say, else where its annotation does."""
    url = address(config.output.url) if config is not None else job.output
    return read_run(url, config) if url else None
