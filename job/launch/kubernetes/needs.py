"""What a run needs of its cluster, read from the objects that helm would send."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from job.errors import InputError

_SUFFIXES = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_SUFFIXES |= {f"{letter}i": 1024.0**power for power, letter in enumerate("KMGTP", start=1)}
_PLURALS = {
    "RayJob": ("ray.io", "rayjobs"),
    "ConfigMap": ("", "configmaps"),
    "Secret": ("", "secrets"),
    "ServiceAccount": ("", "serviceaccounts"),
    "PersistentVolumeClaim": ("", "persistentvolumeclaims"),
    "NetworkPolicy": ("networking.k8s.io", "networkpolicies"),
    "Role": ("rbac.authorization.k8s.io", "roles"),
    "RoleBinding": ("rbac.authorization.k8s.io", "rolebindings"),
}
_FIELDS = {
    "secretRef": "Secret",
    "secretKeyRef": "Secret",
    "configMapRef": "ConfigMap",
    "configMapKeyRef": "ConfigMap",
}
"""Fields of environments that refer to something, and to what."""
_VOLUMES = {
    "secret": ("Secret", "secretName"),
    "configMap": ("ConfigMap", "name"),
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
}
"""Fields of volumes that do, to what, and the field with its name."""


@dataclass(frozen=True)
class Pods:
    """Pods of one shape.

    Attributes:
        role: submitter, head or worker.
        spec: of each.
    """

    role: str
    count: int
    spec: Mapping[str, Any]

    def containers(self) -> list[Mapping[str, Any]]:
        """Of each pod, those that only prepare it first."""
        return [*(self.spec.get("initContainers") or []), *(self.spec.get("containers") or [])]

    def requests(self) -> dict[str, float]:
        """What each asks a node for; limits count where there is no request."""
        total: dict[str, float] = {}
        for container in self.spec.get("containers") or []:
            resources = container.get("resources") or {}
            for name, amount in {**(resources.get("limits") or {}), **(resources.get("requests") or {})}.items():
                total[name] = total.get(name, 0.0) + quantity(amount)
        return total

    @property
    def gpu(self) -> tuple[str, int]:
        """The name of its GPUs, such as nvidia.com/gpu, and how many each asks for."""
        found = {name: int(amount) for name, amount in self.requests().items() if is_gpu(name)}
        return next(iter(found.items()), ("nvidia.com/gpu", 0))


@dataclass(frozen=True)
class Needs:
    """What is sent.

    Attributes:
        rayjob: its manifest.
        made: all manifests that go along.
    """

    rayjob: Mapping[str, Any]
    made: tuple[Mapping[str, Any], ...]

    def pods(self) -> list[Pods]:
        """All its pods."""
        spec = self.rayjob["spec"]
        ray = spec.get("rayClusterSpec") or {}
        found = [Pods("head", 1, _pod_spec(ray.get("headGroupSpec") or {}))]
        for group in ray.get("workerGroupSpecs") or []:
            count = int(group.get("replicas") or 0) * int(group.get("numOfHosts") or 1)
            found.append(Pods("worker", count, _pod_spec(group)))
        if submitter := spec.get("submitterPodTemplate"):
            found.append(Pods("submitter", 1, submitter.get("spec") or {}))
        return found

    def kinds(self) -> list[tuple[str, str]]:
        """API group and plural of all that is made."""
        known = [_PLURALS[made["kind"]] for made in self.made if made.get("kind") in _PLURALS]
        return list(dict.fromkeys(known))

    def named(self, kind: str) -> list[str]:
        """Names of what pods refer to and the release does not bring.

        Args:
            kind: Secret, ConfigMap or PersistentVolumeClaim.
        """
        brought = {str(made["metadata"]["name"]) for made in self.made if made.get("kind") == kind}
        found = {name for pods in self.pods() for of, name in _references(pods) if of == kind}
        token = (self.rayjob["spec"].get("rayClusterSpec") or {}).get("authOptions") or {}
        if kind == "Secret" and token.get("secretName"):
            found.add(str(token["secretName"]))
        return sorted(found - brought)

    def storage_classes(self) -> list[str]:
        """Of the volume claims that the release or its pods make; empty for the cluster's own choice."""
        specs = [made["spec"] for made in self.made if made.get("kind") == "PersistentVolumeClaim"]
        volumes = [volume for pods in self.pods() for volume in pods.spec.get("volumes") or []]
        own = [(volume.get("ephemeral") or {}).get("volumeClaimTemplate") for volume in volumes]
        specs += [template["spec"] for template in own if template]
        return sorted({str(spec.get("storageClassName") or "") for spec in specs})

    def images(self) -> list[str]:
        """Of all containers."""
        return sorted({str(one["image"]) for pods in self.pods() for one in pods.containers() if one.get("image")})

    def of_pods(self, name: str) -> list[str]:
        """The values of a field of all pods' specs, such as priorityClassName or serviceAccountName."""
        return sorted({str(pods.spec[name]) for pods in self.pods() if pods.spec.get(name)})

    def total(self) -> dict[str, float]:
        """What all its pods ask for together, as quotas count it."""
        total = {"pods": 0.0}
        for pods in self.pods():
            total["pods"] += pods.count
            for name, amount in pods.requests().items():
                total[name] = total.get(name, 0.0) + pods.count * amount
        return total

    @property
    def queue(self) -> str:
        """Kueue's, which lets it wait; empty without one."""
        return str((self.rayjob["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name") or "")


def needs_of(manifests: Sequence[Mapping[str, Any]]) -> Needs:
    """What these objects need; tests of the chart are no part of a run.

    Raises:
        InputError: there is no RayJob among them.
    """
    made = tuple(one for one in manifests if "helm.sh/hook" not in (one.get("metadata", {}).get("annotations") or {}))
    rayjob = next((one for one in made if one.get("kind") == "RayJob"), None)
    if rayjob is None:
        raise InputError("the chart renders no RayJob with these values. Use the chart of this version, charts/qlora")
    return Needs(rayjob, made)


def quantity(text: str | int | float) -> float:
    """A quantity of Kubernetes as a number: 500m is 0.5, 1Ki is 1024.

    Raises:
        InputError: it is none.
    """
    match = re.fullmatch(r"([+-]?[\d.]+(?:[eE][+-]?\d+)?)([a-zA-Z]*)", str(text))
    if not match or match[2] not in _SUFFIXES:
        raise InputError(f"{text}: is no quantity of Kubernetes. Write it as 500m, 2, 64Gi or 1e3")
    return float(match[1]) * _SUFFIXES[match[2]]


def is_gpu(name: str) -> bool:
    """Whether a resource is GPUs: nvidia.com/gpu, amd.com/gpu, a part of one (nvidia.com/mig-1g.10gb)."""
    return "/" in name and bool(re.search(r"gpu|^mig-", name.partition("/")[2]))


def tolerates(spec: Mapping[str, Any], taint: Mapping[str, Any]) -> bool:
    """Whether pods of this spec may be put on a node with this taint."""
    if taint.get("effect") == "PreferNoSchedule":
        return True
    for one in spec.get("tolerations") or []:
        key = one.get("key") in (None, "", taint.get("key"))
        value = one.get("operator", "Equal") == "Exists" or one.get("value", "") == (taint.get("value") or "")
        if key and value and one.get("effect") in (None, "", taint.get("effect")):
            return True
    return False


def suits(spec: Mapping[str, Any], node: Mapping[str, Any]) -> bool:
    """Whether a node may take pods of this spec by readiness, labels and taints; affinity is left to the scheduler."""
    if (node.get("spec") or {}).get("unschedulable") or not _ready(node):
        return False
    labels = node["metadata"].get("labels") or {}
    chosen = all(labels.get(name) == value for name, value in (spec.get("nodeSelector") or {}).items())
    return chosen and all(tolerates(spec, taint) for taint in (node.get("spec") or {}).get("taints") or [])


def _ready(node: Mapping[str, Any]) -> bool:
    conditions = (node.get("status") or {}).get("conditions") or []
    return all(one.get("status") == "True" for one in conditions if one.get("type") == "Ready")


def _pod_spec(group: Mapping[str, Any]) -> Mapping[str, Any]:
    return (group.get("template") or {}).get("spec") or {}


def _references(pods: Pods) -> Iterator[tuple[str, str]]:
    """Kind and name of what pods cannot start without."""
    for container in pods.containers():
        sources = [
            *(container.get("envFrom") or []),
            *(one.get("valueFrom") or {} for one in container.get("env") or []),
        ]
        for source in sources:
            for field, kind in _FIELDS.items():
                if (reference := source.get(field)) and not reference.get("optional"):
                    yield kind, str(reference["name"])
    for volume in pods.spec.get("volumes") or []:
        for field, (kind, name) in _VOLUMES.items():
            if (reference := volume.get(field)) and not reference.get("optional"):
                yield kind, str(reference[name])
    for reference in pods.spec.get("imagePullSecrets") or []:
        yield "Secret", str(reference["name"])
