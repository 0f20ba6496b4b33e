"""A run into a cluster: looked at first, then handed to helm, whose refusals become a sentence."""

import time
from collections.abc import Callable

from job.config import RunConfig
from job.errors import InputError, JobError
from job.launch import looking
from job.launch.kubernetes.api import Cluster
from job.launch.kubernetes.helm import ask
from job.launch.kubernetes.jobs import RELEASE_LABEL, Job, find, labelled, show
from job.launch.kubernetes.refusals import Absent
from job.launch.kubernetes.request import RUN_LABEL, Request, shape
from job.launch.slurm.request import tag

Say = Callable[[str], None]
GONE_S = 60.0
"""Seconds that KubeRay may take to let go of a RayJob that has ended."""


def look_first(config: RunConfig, request: Request, say: Say) -> str:
    """Look at a run before it is sent; the output address. See `looking.look_first`.

    Raises:
        InputError: ranks and batches do not go together, the output folder is not this run's, or the run is done.
    """
    nodes, gpus = shape(request) or (1, 0)
    return looking.look_first(config, nodes, gpus, "the pods do that, with keys of their own", say)


def submit(cluster: Cluster, request: Request, url: str, say: Say) -> Job:
    """Send it; the RayJob that it became.

    Args:
        url: its output address, of which there may be one RayJob at a time.
        say: hears what was removed before.

    Raises:
        InputError: helm or Kubernetes refuse it, or a RayJob of this output waits or runs already.
        JobError: the cluster does not answer.
    """
    before = find(cluster, url)
    for job in before:
        if job.active:
            raise InputError(
                f"job {job.name} of {url} is {job.state or job.stage or 'waiting'} already, and two runs of one "
                f"output.url exclude each other. Look at it with qlora status --on kubernetes --job {job.name}, or end "
                f"it with qlora cancel --on kubernetes --job {job.name}"
            )
        _make_room(cluster, job, say)  # KubeRay never reruns one that has ended, and the new one may have its name
    _refuse_to_replace(cluster, request, url)
    answer = ask(request.words())
    if answer.code:
        raise InputError(f"helm did not send the run: {answer.with_cure('helm status RELEASE may tell more')}")
    now = [job for job in find(cluster, url) if job.active]
    if not now:
        raise JobError(
            f"helm sent release {request.release}, and there is no RayJob with the label {RUN_LABEL}={tag(url)}. Look "
            f"at it with helm status {request.release}"
        )
    return now[-1]


def _refuse_to_replace(cluster: Cluster, request: Request, url: str) -> None:
    """A release has one RayJob: helm deletes it when it sends another one.

    Raises:
        InputError: that of another output waits or runs.
    """
    for job in labelled(cluster, f"{RELEASE_LABEL}={request.release}"):
        if job.active and job.output != url:
            raise InputError(
                f"--release {request.release}: holds job {job.name} of {job.output or 'another output.url'}, which "
                "helm would delete. Choose another name, or leave it out: then each run has its own"
            )


def _make_room(cluster: Cluster, job: Job, say: Say) -> None:
    """Delete a RayJob that has ended, and wait until it is gone."""
    say(f"job {job.name} of its last start has ended ({job.state or job.stage}) and is removed; its run goes on")
    try:
        cluster.delete(cluster.rayjobs(job.name), f"RayJob {job.name}")
        end = time.monotonic() + GONE_S
        while time.monotonic() < end:
            show(cluster, job.name)
            time.sleep(0.5)
    except Absent:
        return
    raise JobError(
        f"job {job.name} is deleted and not gone after {GONE_S:.0f} s. Does KubeRay's operator run? Try again then"
    )
