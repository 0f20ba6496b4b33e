"""Whether a cluster is fit for a run: each thing that can be amiss, against a stand-in for the API server."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config import RunConfig, load_config
from job.errors import InputError, JobError
from job.launch.kubernetes.api import connect
from job.launch.kubernetes.preflight import preflight
from job.launch.kubernetes.request import Wanted, make_request
from tests.conftest import REPOSITORY, settings
from tests.kube import Kube, fake_helm, make_kube

__all__ = ["make_kube"]
RENDERED = REPOSITORY / "tests/golden/kubernetes/rendered.yaml"
GPU = "nvidia.com/gpu"
REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
NAMESPACE = "get /api/v1/namespaces/team"


def node(kube: Kube, name: str, gpus: int = 8, ready: str = "True", **spec: Any) -> None:
    labels = {"gpu": "h100"}
    status = {"allocatable": {GPU: str(gpus)}, "conditions": [{"type": "Ready", "status": ready}]}
    kube.add("Node", name, metadata={"labels": labels}, spec=spec, status=status)


def crd(kube: Kube, version: str = "v1", fields: tuple[str, ...] = ()) -> None:
    known = {field: {} for field in fields}
    schema = {"openAPIV3Schema": {"properties": {"spec": {"properties": known}}}}
    versions = [{"name": version, "served": True, "schema": schema}, {"name": "v0", "served": False}]
    kube.add("CustomResourceDefinition", "rayjobs.ray.io", spec={"versions": versions})


@pytest.fixture
def fit(kube: Kube) -> Kube:
    """A cluster that lacks nothing the rendered run needs: two pods with 8 GPUs each."""
    crd(kube)
    operator = [{"image": "quay.io/kuberay/operator:v1.7.0"}]
    labels = {"app.kubernetes.io/name": "kuberay-operator"}
    spec = {"template": {"spec": {"containers": operator}}}
    kube.add("Deployment", "kuberay-operator", namespace="ray", metadata={"labels": labels}, spec=spec)
    kube.add("Secret", "bucket-keys", data={"KEY": "cGxhbnRlZA=="})
    kube.add("StorageClass", "fast")
    kube.add("PriorityClass", "training")
    node(kube, "n1", taints=[{"key": "nvidia.com/gpu", "effect": "NoSchedule"}])
    node(kube, "n2")
    kube.answer(
        NAMESPACE, {"metadata": {"name": "team", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    )
    return kube


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The settings of run.yaml here, where there is a chart and a helm that renders a run."""
    monkeypatch.chdir(tmp_path)
    Path("charts/qlora").mkdir(parents=True)
    Path("charts/qlora/Chart.yaml").touch()
    Path("charts/qlora/values.yaml").touch()
    Path("run.yaml").write_text(yaml.safe_dump(settings("owner/model", "s3://bucket/rows.jsonl", "s3://bucket/first")))
    fake_helm(tmp_path, monkeypatch, f"cat {RENDERED}")
    return load_config("run.yaml", [f"output.url={tmp_path}/out"])


@pytest.fixture
def check(config: RunConfig) -> Callable[[], tuple[int, list[str]]]:
    """Checks the cluster for it; the exit code and what was said."""

    def checked() -> tuple[int, list[str]]:
        said: list[str] = []
        request = make_request(load_config("run.yaml"), "run.yaml", [], Wanted())
        return preflight(connect(), config, request, said.append), said

    return checked


@pytest.fixture
def may(kube: Kube) -> set[tuple[str, str]]:
    """What the user may not do, verb and resource; empty: everything is allowed."""
    forbidden: set[tuple[str, str]] = set()

    def review(request: Any) -> dict[str, Any]:
        asked = request.data["spec"]["resourceAttributes"]
        assert asked["namespace"] == "team"
        resource = asked["resource"] + (f"/{asked['subresource']}" if asked["subresource"] else "")
        return {"status": {"allowed": (asked["verb"], resource) not in forbidden}}

    kube.answer(f"post {REVIEWS}", review)
    return forbidden


Check = Callable[[], tuple[int, list[str]]]
May = set[tuple[str, str]]


def test_a_fit_cluster_ends_with_zero(fit: Kube, may: May, check: Check, tmp_path: Path) -> None:
    image = "registry.example.com/team/qlora-job@sha256:" + "0123456789abcdef" * 4
    assert check() == (
        0,
        [
            f"ok: output {tmp_path}/out is free, and ranks and batches go together",
            "ok: namespace team enforces Pod Security restricted",
            "ok: RayJobs are known as ray.io/v1, KubeRay's operator is operator:v1.7.0",
            "ok: you may do all that a run needs in namespace team",
            "ok: Secret: bucket-keys",
            "ok: storage class fast",
            "ok: priority class training",
            f"ok: image {image}; whether nodes can pull it shows when they do",
            "ok: 2 pods with 8 nvidia.com/gpu each: nodes hold 2 such pods, 2 now",
            "nothing speaks against this run",
        ],
    )


def unfit(check: Check, said: str) -> None:
    code, lines = check()
    assert code == 1 and any(line.startswith(f"unfit: {said}") for line in lines), lines
    assert lines[-1].startswith("1 thing speaks against this run on http://127.0.0.1")


def warned(check: Check, said: str) -> None:
    code, lines = check()
    assert code == 0 and any(line.startswith(f"warning: {said}") for line in lines), lines


def test_without_kuberay(fit: Kube, may: May, check: Check) -> None:
    fit.remove("CustomResourceDefinition", "rayjobs.ray.io")
    unfit(check, "KubeRay is not installed: there is no rayjobs.ray.io. Ask an administrator for its operator")


def test_a_kuberay_that_serves_another_version(fit: Kube, may: May, check: Check) -> None:
    fit.remove("CustomResourceDefinition", "rayjobs.ray.io")
    crd(fit, "v1alpha1")
    unfit(check, "KubeRay is too old: it serves RayJobs as v1alpha1 and not as v1. Have it upgraded")


def test_a_kuberay_that_drops_fields_in_silence(fit: Kube, may: May, check: Check) -> None:
    fit.remove("CustomResourceDefinition", "rayjobs.ray.io")
    run = next(one for one in yaml.safe_load_all(RENDERED.read_text()) if one["kind"] == "RayJob")
    crd(fit, fields=tuple(set(run["spec"]) - {"preRunningDeadlineSeconds"}))
    unfit(
        check, "KubeRay is older than the chart: it drops spec.preRunningDeadlineSeconds in silence. Have it upgraded"
    )


def test_a_definition_that_the_user_may_not_see(fit: Kube, may: May, check: Check) -> None:
    fit.refuse(f"get {fit.path('CustomResourceDefinition', 'rayjobs.ray.io')}", 403, "no")
    assert "ok: RayJobs are known as ray.io/v1; their definition is not shown to you" in check()[1]
    fit.refuse(f"get {fit.path('RayJob')}", 404, "no")
    unfit(check, "the cluster knows no RayJob (ray.io/v1), so KubeRay is not installed there")


def test_a_secret_that_is_missing(fit: Kube, may: May, check: Check) -> None:
    fit.remove("Secret", "bucket-keys")
    unfit(check, "there is no Secret bucket-keys in namespace team. Create it (kubectl create secret), or name another")


def test_no_value_of_a_secret_is_asked_for_or_shown(fit: Kube, may: May, check: Check) -> None:
    assert "cGxhbnRlZA" not in "".join(check()[1])
    assert all("PartialObjectMetadata" in one.headers["Accept"] for one in fit.asked("get", "/secrets/"))


def test_a_secret_that_the_user_may_not_see(fit: Kube, may: May, check: Check) -> None:
    fit.refuse(f"get {fit.path('Secret', 'bucket-keys')}", 403, "no")
    warned(check, "Secret bucket-keys was not looked for: you may not get Secret bucket-keys in namespace team")


def test_what_the_user_may_not_do_is_listed(fit: Kube, may: May, check: Check) -> None:
    may |= {("create", "rayjobs"), ("get", "pods/log"), ("create", "networkpolicies")}
    unfit(
        check,
        "in namespace team you may not: get pods/log, create rayjobs.ray.io, create networkpolicies.networking.k8s.io. "
        "Ask an administrator for a role with them",
    )


@pytest.mark.parametrize(
    ("kind", "what"), [("StorageClass", "storage class fast"), ("PriorityClass", "priority class")]
)
def test_a_class_that_is_missing(kind: str, what: str, fit: Kube, may: May, check: Check) -> None:
    fit.remove(kind, "fast" if kind == "StorageClass" else "training")
    unfit(check, f"there is no {what}")


def test_too_few_gpus(fit: Kube, may: May, check: Check) -> None:
    fit.remove("Node", "n2")
    node(fit, "n3", ready="Unknown")
    node(fit, "n4", gpus=4)
    node(fit, "n5", taints=[{"key": "team", "value": "other", "effect": "NoSchedule"}])
    node(fit, "n6", unschedulable=True)
    unfit(
        check,
        "2 pods with 8 nvidia.com/gpu each do not fit: 2 nodes suit (ready, labels, taints), the largest with 8 "
        "nvidia.com/gpu. Lower nodes or gpusPerNode, or mend worker.nodeSelector and tolerations",
    )


def test_too_few_gpus_where_nodes_are_added(fit: Kube, may: May, check: Check) -> None:
    fit.remove("Node", "n2")
    fit.add("CustomResourceDefinition", "nodepools.karpenter.sh")
    warned(check, "2 pods with 8 nvidia.com/gpu each do not fit")


def test_gpus_that_others_use_now(fit: Kube, may: May, check: Check) -> None:
    for name, phase in (("busy", "Running"), ("done", "Succeeded")):
        container = {"name": "x", "resources": {"limits": {GPU: "1"}}}
        where = "n1" if phase == "Running" else "n2"
        fit.add(
            "Pod",
            name,
            namespace="others",
            spec={"nodeName": where, "containers": [container]},
            status={"phase": phase},
        )
    warned(check, "2 pods with 8 nvidia.com/gpu each: nodes hold 2 such pods, 1 now. The run will wait for others")


def test_nodes_and_pods_that_the_user_may_not_see(fit: Kube, may: May, check: Check) -> None:
    fit.refuse("get /api/v1/pods", 403, "no")
    assert (
        "ok: 2 pods with 8 nvidia.com/gpu each: nodes hold 2 such pods; what others use is not shown to you"
        in check()[1]
    )
    fit.refuse("get /api/v1/nodes", 403, "no")
    warned(check, "not looked at: you may not list nodes (403: no)")


def test_a_quota_without_room(fit: Kube, may: May, check: Check) -> None:
    hard = {"requests.nvidia.com/gpu": "16", "limits.memory": "100Gi", "pods": "10", "requests.cpu": "100"}
    used = {"requests.nvidia.com/gpu": "8", "limits.memory": "1Gi", "pods": "1"}
    fit.add("ResourceQuota", "gpus", status={"hard": hard, "used": used})
    unfit(
        check,
        "quota gpus: requests.nvidia.com/gpu: 16 wanted, 8 of 16 left; limits.memory: 516.5Gi wanted, 99.0Gi of 100Gi "
        "left. Wait until others end, ask for less, or have it raised",
    )


def test_a_quota_with_room(fit: Kube, may: May, check: Check) -> None:
    fit.add("ResourceQuota", "gpus", status={"hard": {"requests.nvidia.com/gpu": "16"}, "used": {}})
    assert "ok: quota gpus has room" in check()[1]


def test_a_namespace_that_is_missing(kube: Kube, may: May, check: Check) -> None:
    kube.refuse(NAMESPACE, 404, "no")
    code, lines = check()
    assert code == 1 and "unfit: there is no namespace team. Create it, or choose another with --namespace" in lines


def rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]) -> None:
    """Have helm render another run."""
    (tmp_path / "other.yaml").write_text(change(RENDERED.read_text()))
    fake_helm(tmp_path, monkeypatch, f"cat {tmp_path}/other.yaml")


def test_pod_security_that_forbids_what_is_asked(
    fit: Kube, may: May, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered(tmp_path, monkeypatch, lambda text: yaml.safe_dump_all(_locked(text)))
    unfit(check, "namespace team enforces Pod Security restricted, which forbids IPC_LOCK. Set rdma.ipcLock to false")


def _locked(text: str) -> list[Any]:
    made = list(yaml.safe_load_all(text))
    run = next(one for one in made if one["kind"] == "RayJob")
    worker = run["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    worker["securityContext"]["capabilities"]["add"] = ["IPC_LOCK"]
    return made


def test_an_image_by_its_tag_or_without_a_registry(
    fit: Kube, may: May, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = "registry.example.com/team/qlora-job@sha256:" + "0123456789abcdef" * 4
    rendered(tmp_path, monkeypatch, lambda text: text.replace(digest, "registry.example.com/team/qlora-job:1"))
    warned(check, "image registry.example.com/team/qlora-job:1 is named by a tag, which may be another image tomorrow")
    rendered(tmp_path, monkeypatch, lambda text: text.replace(digest, "qlora-job:1"))
    warned(
        check, "image qlora-job:1 is named without a registry: nodes have it already, or image.repository is missing"
    )


def test_a_queue_of_kueue(fit: Kube, may: May, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def queued(text: str) -> str:
        before, after = text.split("kind: RayJob\n")
        return f"{before}kind: RayJob\n" + after.replace("labels:", "labels:\n    kueue.x-k8s.io/queue-name: gpus", 1)

    rendered(tmp_path, monkeypatch, queued)
    unfit(check, "there is no queue of Kueue gpus. Create it, or name another in the values")
    fit.add("LocalQueue", "gpus")
    assert "ok: queue of Kueue gpus" in check()[1]


def test_a_volume_without_a_class_takes_a_default(
    fit: Kube, may: May, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered(tmp_path, monkeypatch, lambda text: text.replace('storageClassName: "fast"', ""))
    unfit(check, "a volume is wanted without a storage class, and the cluster has no default. Name one in the values")
    notes = {"storageclass.kubernetes.io/is-default-class": "true"}
    fit.add("StorageClass", "usual", metadata={"annotations": notes})
    assert check()[0] == 0


def test_an_output_that_is_taken_counts_too(fit: Kube, may: May, check: Check, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").touch()
    unfit(check, f"output.url: {tmp_path}/out holds files that are no run (notes.txt)")


def test_who_is_not_known_learns_nothing_more(fit: Kube, may: May, check: Check) -> None:
    fit.refuse(f"get {fit.path('Secret', 'bucket-keys')}", 401, "no")
    with pytest.raises(InputError, match="does not know who asks"):
        check()


def test_a_cluster_that_does_not_answer_ends_the_check(fit: Kube, may: May, check: Check) -> None:
    fit.refuse(f"get {fit.path('ResourceQuota')}", 500, "no")
    with pytest.raises(JobError, match="cannot answer now"):
        check()
