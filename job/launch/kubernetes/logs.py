"""What the pods of a run wrote: what failed first, then each pod's log."""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from job.config import RunConfig
from job.errors import InputError
from job.launch.blame import BATCH, first_failure
from job.launch.kubernetes.api import Cluster
from job.launch.kubernetes.jobs import Job, pods_of, role
from job.launch.kubernetes.refusals import Absent, Asked
from job.launch.kubernetes.watch import jobs_of

Say = Callable[[str], None]
SILENCE_S = 60.0
"""Seconds without a line after which a log is asked for anew: a broken connection does not say so."""
_LINE = re.compile(r"(\d{4}-\d\d-\d\dT\S+Z) ?(.*)")
"""A line of a log with the time that Kubernetes put before it."""
_FROM_RAY = re.compile(r"^\x1b?\[?\d*m?\(\w[^()]*pid=[^()]*\)(?:\x1b\[0m)? ?")
"""What Ray puts before a line of a worker when the driver shows it."""


@dataclass(frozen=True)
class Source:
    """A container whose log can be read.

    Attributes:
        label: for people: the pod, and the container where the pod has others.
    """

    pod: str
    container: str
    label: str


class Log:
    """The log of a container, and what of it was read already."""

    def __init__(self, cluster: Cluster, source: Source):
        self.cluster, self.source = cluster, source
        self._last = ""
        """The time of the newest line."""

    def read(self, put: Callable[[str], None], follow: bool) -> None:
        """Hand on all lines that were not handed on yet.

        Args:
            follow: go on until the container ends, the connection breaks or SILENCE_S pass.
        """
        path = f"{self.cluster.core('pods', self.source.pod)}/log"
        asked = Asked("get", f"log of pod {self.source.pod}", path)
        query = {"container": self.source.container, "timestamps": "true", "follow": str(follow).lower()}
        read = self._last
        if read:
            query["sinceTime"] = re.sub(r"\.\d+Z$", "Z", read)  # whole seconds; what was read is left out below
        for line in self.cluster.lines(path, asked, SILENCE_S, **query):
            match = _LINE.fullmatch(line)
            when, text = match.groups() if match else ("", line)
            if when and when <= read:
                continue
            self._last = when or self._last
            put(text)


def sources(pods: Iterable[Mapping[str, Any]], states: Collection[str] = ("running", "terminated")) -> list[Source]:
    """The containers that have begun: the one that submits, the head, the workers.

    Args:
        states: only those in one of these.
    """
    found = []
    for pod in pods:
        status, name = pod.get("status") or {}, pod["metadata"]["name"]
        containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
        begun = [one["name"] for one in containers if any(state in (one.get("state") or {}) for state in states)]
        found += [Source(name, one, name if len(containers) == 1 else f"{name}/{one}") for one in begun]
    return found


def lost_pods(pods: Iterable[Mapping[str, Any]]) -> list[str]:
    """Containers and pods that failed, by the time of their end, the first one first; without the one that submits,
    which fails because others did."""
    found: list[tuple[str, str]] = []
    for pod in pods:
        status, name = pod.get("status") or {}, pod["metadata"]["name"]
        if status.get("reason") in ("Evicted", "NodeLost", "Preempting", "UnexpectedAdmissionError"):
            when = str(status.get("startTime") or "")
            found.append((when, f"pod {name} was ended: {status['reason']}: {status.get('message', '')}".rstrip(": ")))
        for one in status.get("containerStatuses") or []:
            for state in (one.get("state") or {}, one.get("lastState") or {}):
                ended = state.get("terminated") or {}
                if ended.get("exitCode") and role(pod) != "submitter" and one["name"] != "ray-job-submitter":
                    why = f"{ended.get('reason', 'Error')}, exit code {ended['exitCode']}"
                    found.append((str(ended.get("finishedAt") or ""), f"pod {name} ({one['name']}): {why}"))
    return [said for _, said in sorted(found)]


def what_failed(pods: Iterable[Mapping[str, Any]], logs: Mapping[str, str]) -> list[str]:
    """What failed first, for people; empty when nothing did.

    Args:
        logs: by the name of what wrote them; lines of ranks begin with `[rank] `, behind Ray's own words.
    """
    lost = lost_pods(pods)
    plain = {name: "\n".join(_FROM_RAY.sub("", line) for line in text.splitlines()) for name, text in logs.items()}
    failure = first_failure(plain) or first_failure({BATCH: "\n".join(plain.values())})
    lines = [f"failed first: {lost[0]}", *(f"  then {said}" for said in lost[1:])] if lost else []
    if failure is not None:
        who = f"rank {failure.rank}, as {failure.node} says" if failure.rank != BATCH else "the command"
        lines += [f"{'and' if lost else 'failed first:'} {who}", *(f"  {line}" for line in failure.lines)]
    return lines


def print_logs(cluster: Cluster, job: Job, pod: str | None, put: Say) -> None:
    """Print the logs of a RayJob that are there now.

    Args:
        pod: show this pod's log alone.
        put: gets the lines of the logs.

    Raises:
        Absent: it has no logs yet, or none of that pod.
        JobError: the API server does not answer.
    """
    pods = chosen(pods_of(cluster, job), pod)
    begun = sources(pods)
    if not begun:
        raise _nothing(cluster, job, pod)
    texts: dict[str, list[str]] = {source.label: [] for source in begun}
    for source in begun:
        with suppress(Absent):  # removed at this moment
            Log(cluster, source).read(texts[source.label].append, follow=False)
    if not job.succeeded:
        tell_failure(pods, texts, put)
    for label, lines in texts.items():
        for line in lines:
            put(f"{label} | {line}")


def tell_failure(pods: Iterable[Mapping[str, Any]], texts: Mapping[str, Iterable[str]], put: Say) -> None:
    """Put what failed first, if anything did.

    Args:
        texts: the lines of each log.
    """
    failed = what_failed(pods, {label: "\n".join(lines) for label, lines in texts.items()})
    for line in [*failed, ""] if failed else []:
        put(line)


def job_of(cluster: Cluster, config: RunConfig | None, name: str | None) -> Job:
    """The RayJob whose logs are wanted.

    Args:
        name: of a RayJob, instead of settings.

    Raises:
        InputError: there is none.
        JobError: the API server does not answer.
    """
    jobs = jobs_of(cluster, config, name)
    if not jobs:
        where = config.output.url if config else ""
        raise InputError(
            f"there is no RayJob of output.url {where} in namespace {cluster.namespace}. Submit the run with qlora "
            "submit kubernetes, or look elsewhere with --namespace"
        )
    return jobs[-1]


def chosen(pods: list[dict[str, Any]], name: str | None) -> list[dict[str, Any]]:
    """The pod of this name, or all without one."""
    return [pod for pod in pods if name in (None, pod["metadata"]["name"])]


def _nothing(cluster: Cluster, job: Job, pod: str | None) -> Absent:
    if pod is not None:
        others = ", ".join(one["metadata"]["name"] for one in pods_of(cluster, job)) or "none"
        return Absent(f"--node {pod}: job {job.name} has no log of a pod of this name. There are: {others}")
    gone = "its pods are removed" if not job.active else "none of its pods has begun"
    return Absent(f"job {job.name} has no logs: {gone}. See qlora status --on kubernetes; -f waits for them")
