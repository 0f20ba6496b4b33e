"""The API server's refusals, each one sentence: Kubernetes' real client against a stand-in for the server."""

import asyncio
import base64
import builtins
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.errors import InputError, JobError
from job.launch.kubernetes import api
from job.launch.kubernetes.api import Cluster, connect
from job.launch.kubernetes.jobs import find, show
from job.launch.kubernetes.refusals import Absent, Asked, Expired, Forbidden, message, without_tokens
from tests.kube import TOKEN, Kube, make_kube, write_kubeconfig

__all__ = ["make_kube"]
POD = "/api/v1/namespaces/team/pods/p"
REFUSALS = [
    (
        401,
        InputError,
        "does not know who asks (401: no). The credentials of the kubeconfig are missing or have expired",
    ),
    (403, Forbidden, "you may not get pod p in namespace team (403: no). Ask an administrator for a role that allows"),
    (404, Absent, "there is no pod p in namespace team (404: no). Check the name, --namespace and --context"),
    (409, JobError, "pod p in namespace team is there already, or was changed by somebody else at this moment (409"),
    (410, Expired, "what was known of pod p in namespace team is too old by now (410: no). Try again"),
    (422, InputError, "Kubernetes does not take pod p in namespace team as it is (422: no). Mend what it names in the"),
    (429, JobError, "cannot answer now (429: no). Try again in a minute"),
    (500, JobError, "cannot answer now (500: no). Try again in a minute"),
    (503, JobError, "cannot answer now (503: no). Try again in a minute"),
    (400, JobError, "refuses to get pod p in namespace team (400: no)"),
]


@pytest.mark.parametrize(("status", "error", "said"), REFUSALS)
def test_a_refusal_is_one_sentence(status: int, error: type[JobError], said: str, kube: Kube) -> None:
    kube.refuse(f"get {POD}", status, "no")
    with pytest.raises(error) as refusal:
        connect().get(POD, "pod p")
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert refusal.value.exit_code == (2 if issubclass(error, InputError) else 1)


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (403, Forbidden, r"you may not {act} RayJob r in namespace team \(403: no\)"),
        (409, JobError, r"RayJob r in namespace team is there already, or was changed .* \(409: no\)"),
        (422, InputError, r"does not take RayJob r in namespace team as it is \(422: no\)"),
    ],
)
@pytest.mark.parametrize("act", ["create", "patch", "delete"])
def test_refusals_name_what_was_wanted(act: str, status: int, error: type[JobError], said: str, kube: Kube) -> None:
    cluster, path = connect(), kube.path("RayJob", "" if act == "create" else "r")
    kube.refuse(f"{ {'create': 'post'}.get(act, act) } {path}", status, "no")
    acts: dict[str, Callable[[], Any]] = {
        "create": lambda: cluster.create(path, "RayJob r", {"metadata": {"name": "r"}}),
        "patch": lambda: cluster.patch(path, "RayJob r", {"spec": {}}),
        "delete": lambda: cluster.delete(path, "RayJob r"),
    }
    if act != "create":
        kube.add("RayJob", "r")
    with pytest.raises(error, match=said.replace("{act}", act)):
        acts[act]()


def test_no_refusal_shows_a_token(kube: Kube) -> None:
    kube.refuse(f"get {POD}", 401, f"Bearer {TOKEN} is not valid, nor is {TOKEN}, Authorization: bearer abc.def")
    with pytest.raises(InputError) as refusal:
        connect().get(POD, "pod p")
    assert TOKEN not in str(refusal.value) and "abc.def" not in str(refusal.value) and "***" in str(refusal.value)
    assert kube.asked("get", POD)[0].headers["Authorization"] == f"Bearer {TOKEN}"  # it was sent, and not shown


def test_a_server_that_does_not_answer_is_named(kube: Kube, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "ANSWER_S", 0.2)
    kube.answer(f"get {POD}", lambda: asyncio.sleep(30))
    with pytest.raises(JobError, match=r"http://127.0.0.1:\d+ did not answer in 0.2 s. Is the VPN or tunnel to the"):
        connect().get(POD, "pod p")


def test_a_server_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path, url)))
    with pytest.raises(JobError) as refusal:
        connect().get(POD, "pod p")
    assert str(refusal.value) == (
        f"{url} cannot be reached: connection refused. Is it the right cluster (kubectl config current-context), and "
        "the VPN or tunnel to it up?"
    )


def test_what_is_no_kubernetes_is_said(kube: Kube) -> None:
    kube.answer(f"get {POD}", b"<html>Log in</html>\nmore")
    with pytest.raises(InputError, match=r"does not answer as Kubernetes does: <html>Log in</html>. Check the server"):
        connect().get(POD, "pod p")


def test_a_server_that_speaks_no_tls_is_said(kube: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path, kube.url.replace("http:", "https:"))))
    with pytest.raises(JobError, match=r"cannot be verified|cannot be reached"):
        connect().get(POD, "pod p")


def test_without_kuberay_there_are_no_rayjobs(kube: Kube) -> None:
    kube.refuse(f"get {kube.path('RayJob')}", 404, "the server could not find the requested resource")
    with pytest.raises(Absent, match=r"the cluster knows no RayJob \(ray.io/v1\), so KubeRay is not installed there"):
        find(connect(), "s3://bucket/runs/first")


def test_one_rayjob_that_is_not_there_is_named(kube: Kube) -> None:
    with pytest.raises(Absent, match="there is no RayJob gone in namespace team"):
        show(connect(), "gone")


def test_a_watch_tells_of_changes_and_ends_by_itself(kube: Kube) -> None:
    cluster = connect()
    kube.add("RayJob", "r")
    events = cluster.changes(cluster.rayjobs(), "RayJobs", "1", 0)
    assert [event["type"] for event in events] == ["ADDED"]
    (asked,) = kube.asked("get", "watch=true")
    assert asked.params["resourceVersion"] == "1" and asked.params["timeoutSeconds"] == "0"


def test_a_watch_that_is_cut_off_within_a_line_just_ends(kube: Kube) -> None:
    cluster = connect()
    kube.answer(f"get {kube.path('RayJob')}?watch=true", (b'{"type": "ADDED", "object": {}}\n\n{"type": "MODI', b""))
    assert list(cluster.changes(cluster.rayjobs(), "RayJobs", "1", 1)) == [{"type": "ADDED", "object": {}}]


@pytest.mark.parametrize("within", [True, False])
def test_a_watch_that_begins_too_early_is_expired(within: bool, kube: Kube) -> None:
    cluster, words = connect(), f"get {kube.path('RayJob')}"
    gone = {"kind": "Status", "code": 410, "message": "too old resource version: 1 (9)"}
    kube.answer(words, ({"type": "ERROR", "object": gone},)) if within else kube.answer(words, 410, gone)
    with pytest.raises(Expired, match=r"what was known of RayJobs in namespace team is too old by now \(410: too old"):
        list(cluster.changes(cluster.rayjobs(), "RayJobs", "1", 1))


def test_a_stream_that_falls_silent_or_breaks_ends(kube: Kube) -> None:
    cluster = connect()
    kube.answer(f"get {POD}/log", (b"one\ntwo\nthr", lambda: asyncio.sleep(5), b"ee\n"))
    lines = cluster.lines(f"{POD}/log", Asked("get", "log of pod p", f"{POD}/log"), 0.3)
    assert list(lines) == ["one", "two"]


def test_of_a_secret_only_the_name_is_asked(kube: Kube) -> None:
    kube.add("Secret", "keys", data={"AWS_SECRET_ACCESS_KEY": base64.b64encode(b"planted").decode()})
    connect().get(kube.path("Secret", "keys"), "secret keys", api.METADATA)
    assert "as=PartialObjectMetadata" in kube.asked("get", "secrets")[0].headers["Accept"]


def test_the_namespace_is_the_contexts_unless_one_is_given(
    kube: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(*where: str | None) -> tuple[str, str | None]:
        cluster = connect(*where)
        return cluster.namespace, cluster.context

    assert at() == ("team", "here") and at("mine") == ("mine", "here")
    assert at(None, "elsewhere") == ("other", "elsewhere")
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path, kube.url, None)))
    assert at() == ("default", "here")


@pytest.mark.parametrize(
    ("content", "context", "said"),
    [
        (None, None, "no cluster is known here: Invalid kube-config file. No configuration found. Set KUBECONFIG"),
        ("{}", "gone", "no cluster is known here"),
        ("a: [", None, "no cluster is known here"),
    ],
)
def test_a_wrong_kubeconfig_is_one_sentence(
    content: str | None, context: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    if content is not None:
        (tmp_path / "config").write_text(content)
    with pytest.raises(InputError) as refusal:
        connect(None, context)
    assert said in str(refusal.value) and "--context as kubectl config get-contexts lists them" in str(refusal.value)


def test_inside_a_pod_the_service_account_is_taken(kube: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.config import incluster_config

    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "ca.crt").write_text("certificate")
    (tmp_path / "namespace").write_text("inside\n")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "1")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(api, "_SERVICE_ACCOUNT", tmp_path / "namespace")
    settings: list[Any] = []
    monkeypatch.setattr("kubernetes.client.ApiClient", lambda made: settings.append(made) or _Client(made))
    cluster = connect()
    assert (cluster.namespace, cluster.server) == ("inside", "https://127.0.0.1:1") and settings[0].retries.read == 0


class _Client:
    def __init__(self, configuration: Any):
        self.configuration = configuration


def test_without_the_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "kubernetes":
            raise ModuleNotFoundError("No module named 'kubernetes'", name="kubernetes")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError) as refusal:
        connect()
    assert str(refusal.value) == (
        "Kubernetes' client is not installed (kubernetes is missing). Install it with pip install "
        "'qlora-job[kubernetes]'"
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"message": "a\\n b.", "reason": "c"}', "a b"),
        (b'{"reason": "Gone"}', "Gone"),
        (b"plain\nmore", "plain"),
        (b"", ""),
        (b"\xff", "\ufffd"),
        (json.dumps({"message": "x" * 999}).encode(), "x" * 400),
    ],
)
def test_what_a_server_said_is_one_short_line(body: bytes, said: str) -> None:
    assert message(body) == said


def test_tokens_are_known_by_their_look() -> None:
    assert without_tokens(f"a {TOKEN} b 'Bearer xyz' c") == "a *** b 'Bearer ***' c"


def test_clusters_paths_are_kubernetes(kube: Kube) -> None:
    cluster = Cluster(_Client(type("_", (), {"host": "https://host"})()), "team")
    assert cluster.rayjobs("r") == kube.path("RayJob", "r") and cluster.core("pods") == kube.path("Pod")
