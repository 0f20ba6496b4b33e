"""Whether a cluster is fit for a run: one question each, answered by what is found, with the cure."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from job.errors import InputError, JobError
from job.launch.kubernetes.api import METADATA, Cluster
from job.launch.kubernetes.needs import Needs, Pods, quantity, suits
from job.launch.kubernetes.refusals import Absent, Forbidden

CRD = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/rayjobs.ray.io"
AUTOSCALED = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/nodepools.karpenter.sh"
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
POD_SECURITY = "pod-security.kubernetes.io/enforce"
_PLURALS = {"Secret": "secrets", "ConfigMap": "configmaps", "PersistentVolumeClaim": "persistentvolumeclaims"}
_CURES = {
    "Secret": "Create it (kubectl create secret), or name another in the values",
    "ConfigMap": "Create it (kubectl create configmap), or name another in the values",
    "PersistentVolumeClaim": "Create it, or have the chart make one (cache.create)",
}
_RUNS = (  # what the verbs do themselves
    ("", "pods", ("list",)),
    ("", "pods/log", ("get",)),
    ("", "events", ("list",)),
    ("ray.io", "rayjobs", ("get", "list", "watch", "create", "patch", "delete")),
    ("", "secrets", ("create", "get", "list", "update", "delete")),  # helm keeps its releases in secrets
)


@dataclass(frozen=True)
class Finding:
    """What was found: fit, doubtful (a warning) or unfit."""

    verdict: Literal["ok", "warning", "unfit"]
    said: str

    def line(self) -> str:
        """For people."""
        return f"{self.verdict}: {self.said}"


Check = Callable[[Cluster, Needs], Iterable[Finding]]


def kuberay(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    """The CRD of RayJobs, its version, and whether it knows all that is sent."""
    try:
        crd = cluster.get(CRD, "the definition of RayJobs")
    except Forbidden:  # of the whole cluster: most users may not
        try:
            cluster.items(cluster.rayjobs(), "RayJobs")
            yield Finding("ok", "RayJobs are known as ray.io/v1; their definition is not shown to you")
        except Absent as fault:
            yield _unfit(str(fault))
        return
    except Absent:
        yield _unfit("KubeRay is not installed: there is no rayjobs.ray.io. Ask an administrator for its operator")
        return
    versions = {one["name"]: one for one in crd["spec"]["versions"] if one.get("served")}
    if "v1" not in versions:
        yield _unfit(f"KubeRay is too old: it serves RayJobs as {', '.join(versions)} and not as v1. Have it upgraded")
        return
    schema = (versions["v1"].get("schema") or {}).get("openAPIV3Schema") or {}
    known = schema.get("properties", {}).get("spec", {}).get("properties")
    unknown = sorted(set(needs.rayjob["spec"]) - set(known)) if known else []
    if unknown:
        yield _unfit(
            f"KubeRay is older than the chart: it drops spec.{', spec.'.join(unknown)} in silence. Have it upgraded to "
            "1.7, or leave that out of the values"
        )
    else:
        yield Finding("ok", f"RayJobs are known as ray.io/v1{_operator(cluster)}")


def _operator(cluster: Cluster) -> str:
    """The operator's version, where the user may see it."""
    try:
        which = {"labelSelector": "app.kubernetes.io/name=kuberay-operator"}
        found = cluster.items("/apis/apps/v1/deployments", "deployments", **which)
    except InputError:
        return ""
    images = [one["spec"]["template"]["spec"]["containers"][0]["image"] for one in found]
    return f", KubeRay's operator is {images[0].rpartition('/')[2]}" if images else ""


def references(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    """Secrets, config maps and volume claims that are named exist; of secrets nothing but the name is asked."""
    for kind, plural in _PLURALS.items():
        names, missing = needs.named(kind), []
        for name in names:
            try:
                cluster.get(cluster.core(plural, name), f"{kind} {name}", METADATA)
            except Absent:
                missing.append(name)
                yield _unfit(f"there is no {kind} {name} in namespace {cluster.namespace}. {_CURES[kind]}")
            except Forbidden as fault:
                missing.append(name)
                yield Finding("warning", f"{kind} {name} was not looked for: {fault}")
        if names and not missing:
            yield Finding("ok", f"{kind}: {', '.join(names)}")


def gpus(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    """Nodes that suit the workers can hold them all, and can now beside what others use."""
    for workers in (pods for pods in needs.pods() if pods.role == "worker" and pods.gpu[1]):
        resource, each = workers.gpu
        wanted = f"{workers.count} pods with {each} {resource} each"
        nodes = [node for node in cluster.items("/api/v1/nodes", "nodes") if suits(workers.spec, node)]
        room = {node["metadata"]["name"]: _holds(node, resource) for node in nodes}
        holds = sum(amount // each for amount in room.values())
        if holds < workers.count:
            yield _too_few(cluster, workers, wanted, room)
            continue
        try:
            used = _used(cluster.items("/api/v1/pods", "pods of all namespaces"), resource)
        except Forbidden:
            yield Finding("ok", f"{wanted}: nodes hold {holds} such pods; what others use is not shown to you")
            continue
        free = sum(max(amount - used.get(name, 0), 0) // each for name, amount in room.items())
        if free < workers.count:
            yield Finding(
                "warning", f"{wanted}: nodes hold {holds} such pods, {free} now. The run will wait for others"
            )
        else:
            yield Finding("ok", f"{wanted}: nodes hold {holds} such pods, {free} now")


def _too_few(cluster: Cluster, workers: Pods, wanted: str, room: Mapping[str, int]) -> Finding:
    resource, _ = workers.gpu
    most = max(room.values(), default=0)
    found = f"{len(room)} nodes suit (ready, labels, taints), the largest with {most} {resource}"
    said = f"{wanted} do not fit: {found}. Lower nodes or gpusPerNode, or mend worker.nodeSelector and tolerations"
    try:
        cluster.get(AUTOSCALED, "the definition of node pools", METADATA)
    except InputError:
        return _unfit(said)
    return Finding("warning", f"{said}; Karpenter may add nodes")


def _holds(node: Mapping[str, Any], resource: str) -> int:
    return int(quantity(((node.get("status") or {}).get("allocatable") or {}).get(resource, 0)))


def _used(pods: Iterable[Mapping[str, Any]], resource: str) -> dict[str, int]:
    """How much of a resource pods hold, by node."""
    used: dict[str, int] = {}
    for pod in pods:
        node = pod["spec"].get("nodeName")
        if node and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed"):
            amount = int(Pods("other", 1, pod["spec"]).requests().get(resource, 0))
            used[node] = used.get(node, 0) + amount
    return used


def quota(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    """What is left of the namespace's quotas is enough for all pods together."""
    total = needs.total()
    for one in cluster.items(cluster.core("resourcequotas"), "resource quotas"):
        hard, used = ((one.get("status") or {}).get(part) or {} for part in ("hard", "used"))
        short = []
        for name, limit in hard.items():
            wanted = total.get(name.removeprefix("requests.").removeprefix("limits."), 0.0)
            left = quantity(limit) - quantity(used.get(name, 0))
            if wanted > max(left, 0.0):
                short.append(f"{name}: {_plain(wanted)} wanted, {_plain(max(left, 0.0))} of {limit} left")
        label = f"quota {one['metadata']['name']}"
        if short:
            yield _unfit(f"{label}: {'; '.join(short)}. Wait until others end, ask for less, or have it raised")
        else:
            yield Finding("ok", f"{label} has room")


def _plain(amount: float) -> str:
    return f"{amount / 2**30:.1f}Gi" if amount >= 2**30 else f"{amount:g}"


def classes(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    """Storage classes, priority classes, service accounts and the queue of Kueue that are named exist."""
    made = {one["metadata"]["name"] for one in needs.made if one.get("kind") == "ServiceAccount"}
    wanted = [("storage class", f"/apis/storage.k8s.io/v1/storageclasses/{name}", name)
              for name in needs.storage_classes() if name]  # fmt: skip
    wanted += [("priority class", f"/apis/scheduling.k8s.io/v1/priorityclasses/{name}", name)
               for name in needs.of_pods("priorityClassName")]  # fmt: skip
    accounts = [name for name in needs.of_pods("serviceAccountName") if name not in made]
    wanted += [("service account", cluster.core("serviceaccounts", name), name) for name in accounts]
    if needs.queue:
        queues = f"{_kueue(cluster)}/namespaces/{cluster.namespace}/localqueues"
        wanted.append(("queue of Kueue", f"{queues}/{needs.queue}", needs.queue))
    for what, path, name in wanted:
        try:
            cluster.get(path, f"{what} {name}", METADATA)
            yield Finding("ok", f"{what} {name}")
        except Absent:
            yield _unfit(f"there is no {what} {name}. Create it, or name another in the values")
        except Forbidden as fault:
            yield Finding("warning", f"{what} {name} was not looked for: {fault}")
    if "" in needs.storage_classes():
        yield from _default_class(cluster)


def _kueue(cluster: Cluster) -> str:
    """Kueue's path, in the version that the cluster prefers."""
    try:
        group = cluster.get("/apis/kueue.x-k8s.io", "Kueue")
    except Absent:
        return "/apis/kueue.x-k8s.io/v1beta1"  # where nothing will be found
    return f"/apis/{group['preferredVersion']['groupVersion']}"


def _default_class(cluster: Cluster) -> Iterator[Finding]:
    notes = [one["metadata"].get("annotations") or {}
             for one in cluster.items("/apis/storage.k8s.io/v1/storageclasses", "storage classes")]  # fmt: skip
    if not any(note.get("storageclass.kubernetes.io/is-default-class") == "true" for note in notes):
        yield _unfit(
            "a volume is wanted without a storage class, and the cluster has no default. Name one in the values"
        )


def rights(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    """The user may do all that submit, status, logs and cancel do, and helm for them."""
    wanted = [*_RUNS, *((group, plural, ("create", "get", "patch", "delete")) for group, plural in needs.kinds())]
    missing: list[str] = []
    for group, plural, verbs in wanted:
        resource, _, subresource = plural.partition("/")
        for verb in verbs:
            asked = {"namespace": cluster.namespace, "verb": verb, "group": group, "resource": resource}
            review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
            spec = {"resourceAttributes": {**asked, "subresource": subresource}}
            answer = cluster.create(REVIEWS, "a question about rights", {**review, "spec": spec})
            if not (answer.get("status") or {}).get("allowed"):
                missing.append(f"{verb} {plural}{'.' * bool(group)}{group}")
    if missing:
        listed = ", ".join(dict.fromkeys(missing))
        yield _unfit(
            f"in namespace {cluster.namespace} you may not: {listed}. Ask an administrator for a role with them"
        )
    else:
        yield Finding("ok", f"you may do all that a run needs in namespace {cluster.namespace}")


def images(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    """Images are named by what is in them, and can be found by nodes."""
    for image in needs.images():
        if "/" not in image:
            yield Finding(
                "warning",
                f"image {image} is named without a registry: nodes have it already, or image.repository is missing",
            )
        elif "@sha256:" in image:
            yield Finding("ok", f"image {image}; whether nodes can pull it shows when they do")
        else:
            yield Finding(
                "warning", f"image {image} is named by a tag, which may be another image tomorrow. Set image.digest"
            )


def pod_security(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    """The namespace is there, and its Pod Security lets the pods in."""
    try:
        space = cluster.get(f"/api/v1/namespaces/{cluster.namespace}", f"namespace {cluster.namespace}")
    except Absent:
        yield _unfit(f"there is no namespace {cluster.namespace}. Create it, or choose another with --namespace")
        return
    level = (space["metadata"].get("labels") or {}).get(POD_SECURITY, "privileged")
    capabilities = [(one.get("securityContext") or {}).get("capabilities") or {}
                    for pods in needs.pods() for one in pods.containers()]  # fmt: skip
    added = sorted({str(name) for one in capabilities for name in one.get("add") or []})
    if added and level != "privileged":
        yield _unfit(
            f"namespace {cluster.namespace} enforces Pod Security {level}, which forbids {', '.join(added)}. Set "
            "rdma.ipcLock to false, or use a namespace that allows it"
        )
    else:
        yield Finding("ok", f"namespace {cluster.namespace} enforces Pod Security {level}")


def _unfit(said: str) -> Finding:
    return Finding("unfit", said)


CHECKS: tuple[Check, ...] = (pod_security, kuberay, rights, references, classes, images, quota, gpus)


def look(cluster: Cluster, needs: Needs) -> Iterator[Finding]:
    """All that is found; what the user may not look at is a warning.

    Raises:
        JobError: the cluster does not answer, or does not know who asks.
    """
    for check in CHECKS:
        try:
            yield from check(cluster, needs)
        except Forbidden as fault:
            yield Finding("warning", f"not looked at: {fault}")
        except Absent as fault:
            raise JobError(f"the cluster lacks what every cluster has: {fault}") from fault
