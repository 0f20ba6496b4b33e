"""What Kubernetes says about RayJobs: their words understood, and the one of a run found."""

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from job.launch.kubernetes.api import Cluster
from job.launch.kubernetes.request import OUTPUT_NOTE, RUN_LABEL
from job.launch.slurm.request import tag

RELEASE_LABEL = "app.kubernetes.io/instance"
RUN_FILE = "/etc/qlora/run.yaml"
"""Where the chart puts the run file into pods."""
OVER = ("Complete", "Failed", "ValidationFailed")
"""jobDeploymentStatus of a RayJob that KubeRay never looks at again."""
WAITS = ("", "Initializing", "Suspending", "Suspended", "Waiting", "Retrying")
"""jobDeploymentStatus of one that has no run now."""


@dataclass(frozen=True)
class Job:
    """A RayJob.

    Attributes:
        version: its resourceVersion.
        state: of the entrypoint: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; empty before it is submitted.
        stage: of the RayJob (jobDeploymentStatus): Initializing, Running, Complete, Failed, Suspended, Retrying, ...
        cluster: name of its RayCluster; each retry has a new one.
        failed: starts that failed.
        retries: how many of them KubeRay follows by another one.
        queue: of Kueue, which lets it wait suspended; empty without one.
        release: helm's.
        output: where its run writes; empty when nobody noted it.
        config_map: the name of the one that holds its run file; empty without one.
        settings: section.key=value, behind the run file.
        started: UTC as Kubernetes writes it; empty before.
    """

    name: str
    namespace: str
    version: str = ""
    state: str = ""
    stage: str = ""
    reason: str = ""
    message: str = ""
    cluster: str = ""
    dashboard: str = ""
    failed: int = 0
    retries: int = 0
    queue: str = ""
    release: str = ""
    output: str = ""
    config_map: str = ""
    settings: tuple[str, ...] = ()
    created: str = ""
    started: str = ""
    ended: str = ""
    deleting: bool = False

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.stage not in OVER and not self.deleting

    @property
    def queued(self) -> bool:
        """Whether it waits: for Kueue, for nodes, for images, or to be tried again."""
        return self.active and self.stage in WAITS

    @property
    def succeeded(self) -> bool:
        """Whether its entrypoint ended well; the run itself says in status.json what it did."""
        return self.state == "SUCCEEDED"


def parse(thing: Mapping[str, Any]) -> Job:
    """A RayJob as the API server shows it."""
    meta, spec, status = thing["metadata"], thing.get("spec") or {}, thing.get("status") or {}
    labels, notes = meta.get("labels") or {}, meta.get("annotations") or {}
    return Job(
        name=meta["name"],
        namespace=meta.get("namespace", ""),
        version=str(meta.get("resourceVersion") or ""),
        state=status.get("jobStatus") or "",
        stage=status.get("jobDeploymentStatus") or "",
        reason=status.get("reason") or "",
        message=" ".join(str(status.get("message") or "").split()),
        cluster=status.get("rayClusterName") or "",
        dashboard=status.get("dashboardURL") or "",
        failed=int(status.get("failed") or 0),
        retries=int(spec.get("backoffLimit") or 0),
        queue=labels.get("kueue.x-k8s.io/queue-name") or "",
        release=labels.get(RELEASE_LABEL) or "",
        output=notes.get(OUTPUT_NOTE) or "",
        config_map=_config_map(spec),
        settings=_settings(str(spec.get("entrypoint") or "")),
        created=str(meta.get("creationTimestamp") or ""),
        started=str(status.get("startTime") or ""),
        ended=str(status.get("endTime") or ""),
        deleting=bool(meta.get("deletionTimestamp")),
    )


def _config_map(spec: Mapping[str, Any]) -> str:
    head = ((spec.get("rayClusterSpec") or {}).get("headGroupSpec") or {}).get("template") or {}
    volumes = (head.get("spec") or {}).get("volumes") or []
    return next(
        (str(one["configMap"]["name"]) for one in volumes if one["name"] == "config" and "configMap" in one), ""
    )


def _settings(entrypoint: str) -> tuple[str, ...]:
    """What stands behind the run file in the command; nothing when it is somebody else's command."""
    try:
        words = shlex.split(entrypoint)
        return tuple(words[words.index(RUN_FILE) + 1 :])
    except ValueError:
        return ()


def show(cluster: Cluster, name: str) -> Job:
    """A RayJob by its name.

    Raises:
        InputError: there is none, or the user may not look.
        JobError: the API server does not answer.
    """
    return parse(cluster.get(cluster.rayjobs(name), f"RayJob {name}"))


def find(cluster: Cluster, url: str) -> list[Job]:
    """The RayJobs of an output address: all that wait or run, else the newest that is still there.

    Args:
        url: see `slurm.request.address`.

    Raises:
        InputError: the user may not look, or there is no KubeRay.
        JobError: the API server does not answer.
    """
    jobs = labelled(cluster, f"{RUN_LABEL}={tag(url)}")
    return [job for job in jobs if job.active] or jobs[-1:]


def mine(cluster: Cluster) -> list[Job]:
    """All RayJobs of the namespace that qlora submitted and that wait or run."""
    return [job for job in labelled(cluster, RUN_LABEL) if job.active]


def labelled(cluster: Cluster, selector: str) -> list[Job]:
    """RayJobs by their labels, the newest last."""
    found = cluster.items(cluster.rayjobs(), "RayJobs", labelSelector=selector)
    return sorted(map(parse, found), key=lambda job: (job.created, job.name))


def pods_of(cluster: Cluster, job: Job) -> list[dict[str, Any]]:
    """The pods of a RayJob that are there now: the one that submits, the head, the workers."""
    which = [f"job-name={job.name}", *([f"ray.io/cluster={job.cluster}"] if job.cluster else [])]
    pods = [pod for one in which for pod in cluster.items(cluster.core("pods"), "pods", labelSelector=one)]
    return sorted(pods, key=lambda pod: (_ROLES.index(role(pod)), pod["metadata"]["name"]))


_ROLES = ("submitter", "head", "worker")


def role(pod: Mapping[str, Any]) -> str:
    """What a pod is for: submitter, head or worker."""
    kind = (pod["metadata"].get("labels") or {}).get("ray.io/node-type")
    return kind if kind in _ROLES else "submitter"


def events_of(cluster: Cluster, job: Job, pods: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What Kubernetes noted of a RayJob, its cluster, its pods and its workload of Kueue; the newest last."""
    names = {job.name, job.cluster, *(pod["metadata"]["name"] for pod in pods)} - {""}

    def concerns(event: Mapping[str, Any]) -> bool:
        about = event.get("involvedObject") or {}
        workload = about.get("kind") == "Workload" and str(about.get("name", "")).startswith(f"rayjob-{job.name}-")
        return about.get("name") in names or workload

    found = [event for event in cluster.items(cluster.core("events"), "events") if concerns(event)]
    return sorted(found, key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""))
