"""What the chart's pods may do, see and reach."""

import ipaddress
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import helm
from tests.cluster.pod_security import containers, violations, with_kuberays_own
from tests.cluster.test_chart import GOOD, named

LEAVES_RESTRICTED = "rdma-ipc-lock"
SECRET = "planted-a9f3c2e1"
WRITTEN = ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR")
"""Variables that name folders which are written."""


def pods(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every pod's template, by what the pod is."""
    spec = helm.only(manifests, "RayJob")["spec"]
    cluster = spec["rayClusterSpec"]
    found = {
        "submitter": spec["submitterPodTemplate"],
        "head": cluster["headGroupSpec"]["template"],
        "smoke": helm.only(manifests, "Pod"),
    }
    for workers in cluster.get("workerGroupSpecs", []):
        found["worker"] = {**workers["template"], "spec": with_kuberays_own(workers["template"]["spec"])}
    return found


@pytest.mark.parametrize("values", GOOD, ids=named)
def test_every_container_passes_pod_security_restricted(values: Path) -> None:
    found = {name: violations(pod["spec"]) for name, pod in pods(helm.template(values)).items()}
    expected: dict[str, list[str]] = {name: [] for name in found}
    if values.stem == LEAVES_RESTRICTED:
        expected["worker"] = [f"{name}: adds ['IPC_LOCK']" for name in ("wait-gcs-ready", "ray-worker")]
    assert found == expected


def test_what_restricted_refuses_is_found() -> None:
    spec = pods(helm.template(helm.real()))["worker"]["spec"]
    container = spec["containers"][0]
    bare = {**spec, "securityContext": {}, "hostNetwork": True, "volumes": [{"name": "x", "hostPath": {"path": "/"}}]}
    ports = [{"hostPort": 1, "containerPort": 1}]
    bare["containers"] = [{"name": "bare", "securityContext": {"runAsUser": 0, "privileged": True}, "ports": ports}]
    bare["initContainers"] = []
    assert violations(bare) == [
        "hostNetwork is shared",
        "volume x is of kind hostPath",
        "bare: is privileged",
        "bare: may gain privileges",
        "bare: may be root",
        "bare: runs as user 0",
        "bare: does not drop ALL capabilities",
        "bare: has no seccomp profile",
        "bare: takes a port of the host",
    ]
    container["securityContext"]["procMount"] = "Unmasked"
    container["securityContext"]["seLinuxOptions"] = {"user": "root"}
    container["lifecycle"]["postStart"] = {"httpGet": {"host": "example.com", "port": 80}}
    last = [sentence for sentence in violations(spec) if sentence.startswith("ray-worker")]
    assert [sentence.removeprefix("ray-worker: ") for sentence in last] == [
        "unmasks /proc",
        "SELinux options",
        "a probe or hook names a host",
    ]


@pytest.mark.parametrize("values", GOOD, ids=named)
def test_roots_are_read_only_and_what_is_written_has_a_place(values: Path) -> None:
    for name, pod in pods(helm.template(values)).items():
        for container in containers(pod["spec"]):
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            mounts = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert {"/scratch", "/tmp"} <= mounts
            env = {one["name"]: one["value"] for one in container["env"]}
            for variable in WRITTEN if name != "submitter" else ["HOME"]:
                assert any(f"{env[variable]}/".startswith(f"{mount}/") for mount in mounts), (name, variable)


@pytest.mark.parametrize("values", GOOD, ids=named)
def test_every_volume_is_mounted_and_has_a_size(values: Path) -> None:
    for pod in pods(helm.template(values)).values():
        mounted = {mount["name"] for container in containers(pod["spec"]) for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
        for volume in pod["spec"]["volumes"]:
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], f"{volume['name']} has no size"


@pytest.mark.parametrize("values", GOOD, ids=named)
def test_no_token_of_kubernetes_is_mounted(values: Path) -> None:
    manifests = helm.template(values)
    for pod in pods(manifests).values():
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["enableServiceLinks"] is False
    for account in (manifest for manifest in manifests if manifest["kind"] == "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert "Role" not in {manifest["kind"] for manifest in manifests}


def test_ray_asks_for_tokens_and_the_chart_holds_none() -> None:
    usual, named_one = helm.rayjob(), helm.rayjob(helm.VALUES / "good/held.yaml")
    assert usual["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert named_one["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    for name, pod in pods(helm.template()).items():
        env = {one["name"]: one.get("value") for one in pod["spec"]["containers"][0]["env"]}
        assert env.get("RAY_AUTH_MODE") == (None if name == "smoke" else "token")
    assert "Secret" not in {manifest["kind"] for manifest in helm.template()}


def test_a_secret_of_the_caller_is_in_no_manifest(tmp_path: Path) -> None:
    planted = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "WANDB_API_KEY"), SECRET)
    values = helm.real(existingSecrets=["bucket"], rayToken={"existingSecret": "ray-token"})
    path = tmp_path / "values.yaml"
    path.write_text(yaml.safe_dump(values))
    for verb in (["template", "first"], ["install", "first", "--dry-run=client", "--debug"]):
        done = helm.run(*verb, helm.CHART, "--values", path, env=planted)
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "WANDB_API_KEY", "password", "DB_PASSWORD"]
)
def test_a_secret_among_plain_variables_is_refused_without_being_said(name: str) -> None:
    with pytest.raises(ValueError, match=f"env: {name} looks like a secret") as refused:
        helm.template(helm.real(env={name: SECRET}))
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@host/rows.jsonl",
        f"https://host/rows.jsonl?X-Amz-Signature={SECRET}",
        f"https://host/rows?se=1&sig={SECRET}",
        "AKIA" + "A1" * 8,
        "hf_" + "a1" * 17,
    ],
)
@pytest.mark.parametrize("place", ["config", "settings", "env"])
def test_a_secret_in_the_run_is_refused_without_being_said(place: str, text: str) -> None:
    values = helm.real(settings=[f"data.train={text}"])
    if place == "config":
        values = helm.real(config=yaml.safe_dump({"data": {"train": text}, "output": {"url": "s3://b/x"}}))
    if place == "env":
        values = helm.real(env={"WHERE": text})
    said = "env: WHERE looks like a secret" if place == "env" else "holds a password, a key or a signed address"
    with pytest.raises(ValueError, match=said) as refused:
        helm.template(values)
    assert text not in str(refused.value)


def test_variables_that_only_sound_like_secrets_pass() -> None:
    env = {"TOKENIZERS_PARALLELISM": "false", "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/token", "NCCL_DEBUG": "INFO"}
    head = pods(helm.template(helm.real(env=env)))["head"]["spec"]["containers"][0]
    assert env.items() <= {one["name"]: one["value"] for one in head["env"]}.items()


def test_secrets_go_by_name_to_those_who_train_only() -> None:
    made = pods(helm.template(helm.real(existingSecrets=["bucket", "hub"])))
    by_name = [{"secretRef": {"name": "bucket"}}, {"secretRef": {"name": "hub"}}]
    for name, pod in made.items():
        assert pod["spec"]["containers"][0].get("envFrom", []) == (by_name if name in ("head", "worker") else [])


def egress(values: dict[str, Any] | Path | None) -> dict[str, set[int]]:
    """Addresses that pods reach, each with its TCP ports."""
    policy = helm.only(helm.template(values), "NetworkPolicy")["spec"]
    reached: dict[str, set[int]] = {}
    for rule in policy["egress"]:
        for block in (to["ipBlock"] for to in rule["to"] if "ipBlock" in to):
            ports = {port["port"] for port in rule["ports"] if port["protocol"] == "TCP"}
            reached.setdefault(block["cidr"], set()).update(ports)
            network = ipaddress.ip_network(block["cidr"])
            assert all(ipaddress.ip_network(inner).subnet_of(network) for inner in block.get("except", []))
    return reached


def test_the_policy_selects_every_pod_and_denies_what_is_not_listed() -> None:
    manifests = helm.template(helm.real(networkPolicy={"egress": []}))
    policy = helm.only(manifests, "NetworkPolicy")["spec"]
    assert sorted(policy["policyTypes"]) == ["Egress", "Ingress"]
    selected = policy["podSelector"]["matchLabels"]
    for pod in pods(manifests).values():
        assert selected.items() <= pod["metadata"]["labels"].items()
    own = {"podSelector": {"matchLabels": selected}}
    assert policy["ingress"][0] == {"from": [own]} and policy["egress"][0] == {"to": [own]}
    operator = {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    assert policy["ingress"][1:] == [
        {
            "from": [{"namespaceSelector": {}, "podSelector": operator}],
            "ports": [{"protocol": "TCP", "port": 8265}],
        }
    ]
    dns = policy["egress"][1]["ports"]
    assert dns == [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}]
    assert len(policy["egress"]) == 2


def test_storage_is_reached_by_address_and_port() -> None:
    node_dns = {"169.254.20.10/32": {53}}
    assert egress(None) == {**node_dns, "0.0.0.0/0": {443}, "::/0": {443}}
    corporate = {"10.1.2.3/32": {3128}, "10.9.0.0/16": {9000, 9001}}
    assert egress(helm.VALUES / "good/behind-a-proxy.yaml") == corporate


@pytest.mark.parametrize(
    ("preset", "reached"),
    [
        ("irsa", {"0.0.0.0/0": {443}, "::/0": {443}}),
        ("azure-workload-identity", {"0.0.0.0/0": {443}, "::/0": {443}}),
        ("eks-pod-identity", {"169.254.170.23/32": {80}, "fd00:ec2::23/128": {80}}),
        ("gke-workload-identity", {"169.254.169.252/32": {80, 988}, "169.254.169.254/32": {80, 988}}),
    ],
)
def test_presets_reach_where_identities_come_from(preset: str, reached: dict[str, set[int]]) -> None:
    values = helm.real(networkPolicy={"egress": [], "presets": [preset], "dns": {"cidrs": []}})
    assert egress(values) == reached


def test_metadata_of_machines_is_out_of_reach() -> None:
    policy = helm.only(helm.template(), "NetworkPolicy")["spec"]
    blocks = [to["ipBlock"] for rule in policy["egress"][2:] for to in rule["to"]]
    for address in ("169.254.169.254", "fd00:ec2::254"):
        for block in blocks:
            network = ipaddress.ip_network(block["cidr"])
            if network.version == ipaddress.ip_address(address).version:
                assert any(ipaddress.ip_address(address) in ipaddress.ip_network(one) for one in block["except"])


def test_ipc_lock_is_asked_for_by_name_and_only_workers_get_it() -> None:
    made = pods(helm.template(helm.VALUES / f"good/{LEAVES_RESTRICTED}.yaml"))
    for name, pod in made.items():
        added = pod["spec"]["containers"][0]["securityContext"]["capabilities"].get("add")
        assert added == (["IPC_LOCK"] if name == "worker" else None)
    limits = made["worker"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["rdma/hca"] == 1
    assert "IPC_LOCK" not in json.dumps(helm.template(helm.VALUES / "good/efa.yaml"))


def test_proxy_and_certificates_reach_those_who_train() -> None:
    made = pods(helm.template(helm.VALUES / "good/behind-a-proxy.yaml"))
    env = {one["name"]: one["value"] for one in made["worker"]["spec"]["containers"][0]["env"]}
    assert env["HTTPS_PROXY"] == env["https_proxy"] == "http://proxy.corp:3128"
    assert env["NO_PROXY"] == "localhost,127.0.0.1,.svc,.cluster.local,.corp,10.0.0.0/8"
    assert env["AWS_CA_BUNDLE"] == env["SSL_CERT_FILE"] == "/etc/qlora-ca/ca.crt"
    assert "HTTP_PROXY" not in {one["name"] for one in made["submitter"]["spec"]["containers"][0]["env"]}


def test_helm_test_trains_the_tiny_run_as_one_process() -> None:
    pod = helm.only(helm.template(helm.real()), "Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    assert pod["spec"]["containers"][0]["command"] == ["tini", "--", "qlora", "train", "/opt/qlora/smoke/run.yaml"]
