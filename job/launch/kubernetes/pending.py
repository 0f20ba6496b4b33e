"""Why a RayJob waits, in plain words: what Kubernetes, KubeRay and Kueue say, explained."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from job.launch.kubernetes.jobs import Job

REASONS = (
    (r"Insufficient [\w./-]*gpu", "too few GPUs are free: others use them, or no node has as many"),
    (r"Insufficient (cpu|memory|ephemeral-storage)", "no node has as much {0} free: lower the resources in the values"),
    (r"Insufficient (?!cpu|memory|ephemeral|[\w./-]*gpu)([\w./-]*\w)", "no node has as much {0} free"),
    (r"untolerated taint\S* *(\{[^}]*\})?", "nodes are kept for others by a taint {0}: add tolerations to the values"),
    (r"didn't match Pod's node affinity", "no node has the labels that the values ask for (nodeSelector, affinity)"),
    (r"node\(s\) were unschedulable", "nodes are closed for new pods (cordoned)"),
    (r'persistentvolumeclaim "([^"]+)" not found', "there is no volume claim {0}: name one that exists in the values"),
    (r"unbound immediate PersistentVolumeClaims", "its volume is not there yet: does the storage class exist?"),
    (r"volume node affinity conflict", "its volume lies in another zone than the nodes that are free"),
    (r"Too many pods", "nodes hold as many pods as they may"),
    (r"ImagePullBackOff|ErrImagePull|ErrImageNeverPull|InvalidImageName|Failed to pull image",
     "its image cannot be pulled: check image in the values, and the secret to pull it with"),
    (r'secret "([^"]+)" not found', "there is no secret {0}: create it, or name another in the values"),
    (r'configmap "([^"]+)" not found', "there is no ConfigMap {0}: submit the run again"),
    (r"CreateContainerConfigError", "its container cannot be set up as the values say"),
    (r"exceeded quota: ([^,\s]+)", "the namespace has used up its quota {0}: wait for others, or ask for less"),
    (r"violates PodSecurity", "the namespace's Pod Security forbids what the values ask for"),
    (r"(?i)serviceaccount \"?([\w.-]+)\"? not found", "there is no service account {0}"),
    (r"no PriorityClass with name (\S+)", "there is no priority class {0}"),
    (r"FailedMount|FailedAttachVolume|MountVolume", "a volume cannot be mounted"),
    (r"couldn't assign flavors|insufficient (unused )?quota", "Kueue lets it wait until its queue has enough free"),
    (r"LocalQueue .* doesn't exist|QueueNotFound", "there is no such queue of Kueue: check the queue in the values"),
    (r"TriggeredScaleUp", "the cluster adds nodes for it"),
    (r"NotTriggerScaleUp", "the cluster cannot add a node that would do"),
    (r"ContainerCreating|PodInitializing", "its container is being made: a large image takes minutes to pull"),
    (r"CrashLoopBackOff", "its container ends again and again: qlora logs shows why"),
)  # fmt: skip
"""What stands in conditions, container states and events; all that match count. {0} is what the pattern caught."""
_TELLING = ("Pending", "TriggeredScaleUp", "NotTriggerScaleUp")
"""Reasons of events that say why something waits, though they are no warnings."""
HOPELESS = re.compile(
    "ErrImageNeverPull|InvalidImageName|ImagePullBackOff|not found|violates PodSecurity|CreateContainerConfigError"
    "|no PriorityClass|QueueNotFound"
)
"""What waiting alone will not cure."""
_STAGES = {
    "": "KubeRay has not looked at it yet; does its operator run?",
    "Initializing": "its Ray cluster is being started",
    "Suspending": "it is being suspended",
    "Suspended": "it is suspended until somebody lets it go",
    "Waiting": "it waits to be submitted",
    "Retrying": "its last start failed; a new Ray cluster is being made",
}


def stage_in_words(job: Job) -> str:
    """What a RayJob that waits does, with KubeRay's own word behind it."""
    if job.queue and job.stage in ("", "Suspended", "Suspending"):
        return f"waits in Kueue's queue {job.queue} ({job.stage or 'no status yet'})"
    return f"{_STAGES.get(job.stage, 'waits')} ({job.stage or 'no status yet'})"


def in_words(said: str) -> list[str]:
    """What Kubernetes said, explained; empty when nobody knows it."""
    found = []
    for pattern, words in REASONS:
        if match := re.search(pattern, said):
            caught = next(filter(None, match.groups()), "")
            found.append(words.replace(" {0}", f" {caught}" if caught else ""))
    return found


def causes(pods: Iterable[Mapping[str, Any]], events: Sequence[Mapping[str, Any]] = ()) -> dict[str, list[str]]:
    """What holds pods up, in Kubernetes' words, with the names of those that say so.

    Args:
        events: of the RayJob, its cluster, its pods and its workload; the newest last.
    """
    found: dict[str, list[str]] = {}
    waiting = {pod["metadata"]["name"]: pod for pod in pods if _waits(pod)}
    for name, pod in waiting.items():
        for said in _said_by(pod):
            found.setdefault(said, []).append(name)
    for event in events:
        about = event.get("involvedObject") or {}
        warns = event.get("type") == "Warning" or event.get("reason") in _TELLING
        said = f"{event.get('reason', '')}: {' '.join(str(event.get('message') or '').split())}"
        if warns and (about.get("kind") != "Pod" or (about.get("name") in waiting and _adds(said, found))):
            found.setdefault(said, []).append(str(about.get("name")))
    return found


def lines(job: Job, pods: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why a RayJob, or some of its pods, wait: a line a cause. Of what goes, events tell only what is past."""
    if not job.queued and not any(map(_waits, pods)):
        return []
    said = causes(pods, events)
    return [f"  {_names(names)}: {'; '.join(in_words(cause)) or 'waits'} ({cause})" for cause, names in said.items()]


def hopeless(said: Iterable[str]) -> bool:
    """Whether one of these causes will not pass by waiting."""
    return any(HOPELESS.search(cause) for cause in said)


def _adds(said: str, found: Mapping[str, object]) -> bool:
    """Whether an event of a pod says more than the conditions of pods did."""
    words = in_words(said)
    return bool(words) and not any(set(words) <= set(in_words(known)) for known in found)


def _waits(pod: Mapping[str, Any]) -> bool:
    """Whether a pod has not begun, or one of its containers has not."""
    status = pod.get("status") or {}
    return status.get("phase") == "Pending" or (status.get("phase") == "Running" and bool(_waiting(status)))


def _waiting(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    return [waits for container in containers if (waits := (container.get("state") or {}).get("waiting"))]


def _said_by(pod: Mapping[str, Any]) -> list[str]:
    status = pod.get("status") or {}
    said = []
    for condition in status.get("conditions") or []:
        gated = condition.get("reason") == "SchedulingGated"
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            said.append("SchedulingGated" if gated else str(condition.get("message") or condition.get("reason")))
    for waits in _waiting(status):
        told = f"{waits.get('reason', '')}: {waits.get('message')}" if waits.get("message") else waits.get("reason", "")
        said.append(" ".join(str(told).split()))
    return list(dict.fromkeys(said))


def _names(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
