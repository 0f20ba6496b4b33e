"""The RayJob: the server and KubeRay take it, it says what was asked for, and its name says when it is another."""

import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.launch.kubernetes.request import OUTPUT_NOTE, RUN_LABEL
from job.launch.slurm.request import address, tag
from tests.cluster import helm, kuberay
from tests.cluster.test_chart import GOOD, named
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("values", GOOD, ids=named)
def test_the_server_and_kuberay_take_it(values: Path) -> None:
    job = helm.rayjob(values)
    assert kuberay.faults(job) == []
    assert kuberay.refusals(job) == []


def test_the_check_by_the_crd_is_strict() -> None:
    job = helm.rayjob()
    job["spec"]["backofLimit"] = 1
    job["spec"]["ttlSecondsAfterFinished"] = 2**31
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"] = 5
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["label"] = {}
    found = "\n".join(kuberay.faults(job))
    for part in ("'backofLimit' was unexpected", "2147483648 is greater", "5 is not of type 'string'", "'label' was"):
        assert part in found
    assert len(kuberay.faults(job)) == 4


def test_every_cel_rule_of_the_crd_is_evaluated() -> None:
    job = helm.rayjob(helm.VALUES / "good/deletion-rules.yaml")
    redis = {"backend": "redis"}
    job["spec"] |= {"managedBy": "kueue.x-k8s.io/multikueue"}
    job["spec"]["rayClusterSpec"] |= {"managedBy": "ray.io/kuberay-operator", "gcsFaultToleranceOptions": redis}
    assert kuberay.faults(job, before=job) == []
    met = {rule["rule"] for rule, *_ in kuberay.rules(kuberay.structure(), job, job, "$")}
    assert met == set(kuberay.all_rules())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"deletionStrategy": {}}, "deletionStrategy requires either BOTH onSuccess and onFailure"),
        (
            {"deletionStrategy": {"onSuccess": {"policy": "DeleteSelf"}, "deletionRules": []}},
            "legacy policies (onSuccess/onFailure) and deletionRules cannot be used together",
        ),
        (
            {"deletionStrategy": {"deletionRules": [{"policy": "DeleteSelf", "condition": {"ttlSeconds": 1}}]}},
            "the deletion condition requires either the JobStatus or the JobDeploymentStatus field.",
        ),
        ({"managedBy": "me"}, "the managedBy field value must be either"),
    ],
)
def test_a_broken_cel_rule_is_found(spec: dict[str, Any], message: str) -> None:
    job = helm.rayjob()
    job["spec"] |= spec
    assert message in "\n".join(kuberay.faults(job))


def test_a_cel_rule_about_a_change_is_found() -> None:
    before, after = helm.rayjob(), helm.rayjob()
    before["spec"]["managedBy"] = "ray.io/kuberay-operator"
    after["spec"]["managedBy"] = "kueue.x-k8s.io/multikueue"
    assert kuberay.faults(after, before) == ["$.spec.managedBy: the managedBy field is immutable"]


def test_what_kuberay_refuses_is_found() -> None:
    job = helm.rayjob()
    job["metadata"]["name"] = "1" * 48
    job["spec"] |= {"submissionMode": "SidecarMode", "suspend": True, "shutdownAfterJobFinishes": False}
    job["spec"]["rayClusterSpec"]["rayVersion"] = "2.51.1"
    assert kuberay.refusals(job) == [
        "the name has more than 47 characters",
        "the name is no DNS-1035 label",
        "suspend without shutdownAfterJobFinishes",
        "a TTL without shutdownAfterJobFinishes",
        "SidecarMode with submitterPodTemplate",
        "SidecarMode with submitterConfig",
        "tokens without Ray 2.52",
    ]


def words(entrypoint: str) -> list[str]:
    """The words that the command sees at the end of an entrypoint's way: the submitter's shell takes them apart, Ray
    joins them again, the head's shell takes them apart."""
    for shell in (["bash", "-ce", "--"], ["sh", "-c"]):
        printing = f"set -f; printf '%s\\0' {entrypoint}"
        done = subprocess.run([*shell, printing], capture_output=True, text=True, check=True, cwd="/")
        entrypoint = shlex.join(done.stdout.split("\0")[:-1])
    return shlex.split(entrypoint)


@pytest.mark.parametrize("values", GOOD, ids=named)
def test_shells_split_the_entrypoint_into_the_words_that_were_meant(values: Path) -> None:
    given = yaml.safe_load(values.read_text()) or {}
    run = "/etc/qlora/run.yaml" if given.get("config") else "/opt/qlora/smoke/run.yaml"
    shape = ["--nodes", str(given.get("nodes", 1)), "--gpus-per-node", str(given.get("gpusPerNode", 0))]
    expected = ["qlora", "train", "--on", "ray", *shape, "--wait-minutes", "15", run, *given.get("settings", [])]
    assert words(helm.rayjob(values)["spec"]["entrypoint"]) == expected


@pytest.mark.parametrize(
    "text", ["", " ", "a'b", 'a"b', "$HOME", "`id`", "a\\nb", "*", "~", "!x", "{a,b}", "#", "é;&|<>()"]
)
def test_any_text_of_a_setting_reaches_the_command(text: str) -> None:
    setting = f"data.template={text}"
    assert words(helm.rayjob(helm.real(settings=[setting]))["spec"]["entrypoint"])[-1] == setting


def test_the_node_count_is_said_once() -> None:
    job = helm.rayjob(helm.real(nodes=3, gpusPerNode=2))
    [workers] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [workers[name] for name in ("replicas", "minReplicas", "maxReplicas")] == [3, 3, 3]
    assert "--nodes 3 --gpus-per-node 2" in job["spec"]["entrypoint"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == workers["rayStartParams"]["num-gpus"] == "2"


def test_no_rank_lands_on_the_head() -> None:
    head = helm.rayjob(helm.real(gpusPerNode=2))["spec"]["rayClusterSpec"]["headGroupSpec"]
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    assert head["template"]["spec"]["containers"][0]["resources"]["limits"].keys() == {"cpu", "memory"}


def test_kuberay_is_told_the_ray_that_is_installed() -> None:
    assert helm.rayjob()["spec"]["rayClusterSpec"]["rayVersion"] == version("ray")


def pods_of(values: str) -> dict[str, dict[str, Any]]:
    """The specs of a job's pods by what they are."""
    spec = helm.rayjob(helm.VALUES / "good" / values)["spec"]
    cluster = spec["rayClusterSpec"]
    templates = {"submitter": spec["submitterPodTemplate"], "head": cluster["headGroupSpec"]["template"]}
    templates["worker"] = cluster["workerGroupSpecs"][0]["template"]
    return {kind: template["spec"] for kind, template in templates.items()}


def test_a_digest_wins_over_a_tag() -> None:
    for pod in pods_of("digest.yaml").values():
        [container] = pod["containers"]
        assert container["image"] == f"registry.example.com/team/qlora-job@sha256:{'0123456789abcdef' * 4}"
        assert container["imagePullPolicy"] == "Always"


def test_every_pod_has_the_priority_and_the_account_with_its_role() -> None:
    assert {pod["priorityClassName"] for pod in pods_of("placed.yaml").values()} == {"high"}
    made = helm.template(helm.VALUES / "good/eks.yaml")
    account = helm.only(made, "ServiceAccount")["metadata"]
    assert account["annotations"]["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::111122223333:role/")
    assert {pod["serviceAccountName"] for pod in pods_of("eks.yaml").values()} == {account["name"]}


def test_volumes_of_the_team_are_where_ranks_and_driver_look() -> None:
    pods = pods_of("claims.yaml")
    for kind in ("head", "worker"):
        mounts = {mount["name"]: mount for mount in pods[kind]["containers"][0]["volumeMounts"]}
        sources = {volume["name"]: volume for volume in pods[kind]["volumes"]}
        for name, path, read_only in (("models", "/models", True), ("results", "/results", False)):
            assert mounts[f"own-{name}"]["mountPath"] == path and mounts[f"own-{name}"]["readOnly"] is read_only
            assert sources[f"own-{name}"]["persistentVolumeClaim"]["claimName"] == name
        assert sources["own-bucket"]["csi"]["driver"] == "s3.csi.aws.com"


def test_local_disks_are_claimed_for_workers_alone() -> None:
    pods = pods_of("nvme.yaml")
    claims = {
        volume["ephemeral"]["volumeClaimTemplate"]["spec"]["resources"]["requests"]["storage"]: volume["name"]
        for volume in pods["worker"]["volumes"]
        if "ephemeral" in volume
    }
    mounts = {mount["name"]: mount["mountPath"] for mount in pods["worker"]["containers"][0]["volumeMounts"]}
    assert mounts[claims["2Ti"]] == "/nvme" and "100Gi" in claims
    assert "/nvme" not in {mount["mountPath"] for mount in pods["head"]["containers"][0]["volumeMounts"]}


def test_the_rendering_that_other_tests_read_is_the_charts() -> None:
    made = yaml.safe_load_all((REPOSITORY / "tests/golden/kubernetes/rendered.yaml").read_text())
    golden = [manifest for manifest in made if manifest]
    config = helm.only(golden, "ConfigMap")["data"]["run.yaml"]
    values = yaml.safe_load((REPOSITORY / "tests/golden/kubernetes/team.yaml").read_text())
    values |= {"config": config, "settings": ["train.max_steps=20"]}
    name = helm.only(golden, "ServiceAccount")["metadata"]["name"]
    assert helm.template(values, "--namespace", "team", release=name) == golden


def job_name(*more: str, release: str = "first", **values: Any) -> str:
    return helm.rayjob(helm.real(**values), *more, release=release)["metadata"]["name"]


def test_another_content_is_another_rayjob_of_the_same_run(tmp_path: Path) -> None:
    before = helm.template(helm.real())
    other = tmp_path / "other.yaml"
    other.write_text(helm.real()["config"] + "train: {epochs: 5}\n")
    after = helm.template(helm.real(), "--set-file", f"config={other}")
    for kind in ("RayJob", "ConfigMap"):
        assert helm.only(before, kind)["metadata"]["name"] != helm.only(after, kind)["metadata"]["name"]
    urls = [yaml.safe_load(helm.only(one, "ConfigMap")["data"]["run.yaml"])["output"] for one in (before, after)]
    assert urls[0] == urls[1] == {"url": "s3://bucket/runs/first"}


def test_the_name_changes_with_what_a_cluster_is_made_of_and_with_nothing_else() -> None:
    name = job_name()
    assert name == job_name() and name.startswith("first-")
    others = [
        job_name(settings=["lora.rank=8"]),
        job_name(nodes=2),
        job_name(shm={"size": "2Gi"}),
        job_name("--set-string", "image.tag=2"),
        job_name(existingSecrets=["keys"]),
    ]
    assert len({name, *others}) == 6
    assert job_name(backoffLimit=5, ttlSecondsAfterFinished=1, suspend=True, activeDeadlineSeconds=9) == name


@pytest.mark.parametrize("url", ["s3://bucket/runs/first", "s3://bucket/runs/first//", "file:///shared/runs/first/"])
def test_status_logs_and_cancel_find_the_job_by_its_output(url: str) -> None:
    claim = {"persistentVolumeClaim": {"claimName": "runs"}}
    shared = [{"name": "shared", "mountPath": "/shared", "source": claim}]
    values = helm.real(config=yaml.safe_dump({"output": {"url": url}}), volumes=shared)
    metadata = helm.rayjob(values)["metadata"]
    assert metadata["labels"][RUN_LABEL] == tag(address(url))
    assert metadata["annotations"] == {OUTPUT_NOTE: address(url)}


def test_long_names_of_releases_fit() -> None:
    name = job_name(release="a" * 37 + "-" + "b" * 15)
    assert name.startswith("a" * 37 + "-") and len(name) <= kuberay.NAME_LENGTH


def test_kueue_gets_a_suspended_run_with_its_labels() -> None:
    job = helm.rayjob(helm.VALUES / "good/kueue.yaml")
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "night"
    [workers] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    rack = {"kueue.x-k8s.io/podset-required-topology": "cloud.provider.com/topology-rack"}
    assert workers["template"]["metadata"]["annotations"] == rack


def test_gang_schedulers_get_their_labels() -> None:
    volcano = helm.rayjob(helm.VALUES / "good/volcano.yaml")
    assert volcano["metadata"]["labels"]["volcano.sh/queue-name"] == "training"
    assert volcano["metadata"]["labels"]["ray.io/priority-class-name"] == "high"
    kai = helm.rayjob(helm.VALUES / "good/kai.yaml")
    pods = [kai["spec"]["submitterPodTemplate"], kai["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]]
    assert kai["metadata"]["labels"]["kai.scheduler/queue"] == "training"
    for pod in [*pods, kai["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]]:
        assert pod["metadata"]["labels"]["kai.scheduler/queue"] == "training"
        assert pod["spec"]["schedulerName"] == "kai-scheduler"


def test_workers_are_kept_together_or_apart() -> None:
    efa = helm.rayjob(helm.VALUES / "good/efa.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"][
        "spec"
    ]
    [term] = efa["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "topology.kubernetes.io/zone"
    assert term["labelSelector"]["matchLabels"]["ray.io/node-type"] == "worker"
    placed = helm.rayjob(helm.VALUES / "good/placed.yaml")["spec"]["rayClusterSpec"]
    [spread] = placed["workerGroupSpecs"][0]["template"]["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"]["app.kubernetes.io/instance"] == "first"
    assert placed["headGroupSpec"]["template"]["spec"]["nodeSelector"] == {"pool": "cpus"}


def test_deadlines_and_retries_are_kuberays() -> None:
    spec = helm.rayjob(helm.VALUES / "good/deadlines.yaml")["spec"]
    assert "preRunningDeadlineSeconds" not in spec
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) == (0, 86400, 0)
    assert helm.rayjob()["spec"]["preRunningDeadlineSeconds"] == 3600
