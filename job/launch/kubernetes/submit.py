"""A run into a cluster: looked at first, then handed to helm, whose refusals become a sentence."""

import time
from collections.abc import Callable

from job.config import RunConfig
from job.errors import ConfigError, InputError, JobError, OutputError
from job.launch.kubernetes.api import Cluster
from job.launch.kubernetes.helm import ask
from job.launch.kubernetes.jobs import RELEASE_LABEL, Job, find, labelled, show
from job.launch.kubernetes.refusals import Absent
from job.launch.kubernetes.request import RUN_LABEL, Request, shape
from job.launch.slurm.request import address, tag
from job.plan import make_plan
from job.run_folder import RunFolder
from job.world import Hardware, World

Say = Callable[[str], None]
GONE_S = 60.0
"""Seconds that KubeRay may take to let go of a RayJob that has ended."""


def look_first(config: RunConfig, request: Request, say: Say) -> str:
    """Refuse what can be known to fail before anything is sent; the output address. Model and rows are left to the
    pods: this machine need not reach them.

    Args:
        say: hears that the output folder cannot be read from here. That is common, and no fault: its keys may be the
            pods' alone, which look for themselves.

    Raises:
        InputError: ranks and batches do not go together, the output folder is not this run's, or the run is done.
    """
    wanted = shape(request)
    if wanted is not None and wanted[1] > 0:
        nodes, gpus = wanted
        world = World(world_size=nodes * gpus, local_world_size=gpus)
        try:
            make_plan(config, world, Hardware("cuda", "", True, 80.0, gpus))
        except ConfigError as fault:
            raise ConfigError(f"the settings for {nodes * gpus} ranks, {gpus} a node", fault.faults) from fault
    try:
        folder = RunFolder(config)
    except OutputError as fault:
        if fault.__cause__ is None or isinstance(fault.__cause__, (JobError, ValueError, TypeError, ImportError)):
            raise
        say(f"Warning: {fault}. It was not looked into: the pods do that, with keys of their own")
        return address(config.output.url)
    folder.refuse_finished()
    return address(config.output.url)


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
