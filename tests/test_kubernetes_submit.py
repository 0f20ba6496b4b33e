"""Sending a run with helm: what is in its way is removed or refused, and helm's refusals become sentences."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from job.config import load_config
from job.errors import InputError, JobError
from job.launch.kubernetes import helm
from job.launch.kubernetes import submit as sending
from job.launch.kubernetes.api import connect
from job.launch.kubernetes.request import Request, Wanted, make_request
from job.launch.kubernetes.submit import submit
from tests.conftest import settings
from tests.kube import TOKEN, Kube, add_rayjob, fake_helm, make_kube

__all__ = ["make_kube"]
URL = "s3://bucket/runs/first"


@pytest.fixture
def request_(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Request:
    """For the run of run.yaml here, where there is a chart."""
    monkeypatch.chdir(tmp_path)
    Path("charts/qlora").mkdir(parents=True)
    Path("charts/qlora/Chart.yaml").touch()
    Path("charts/qlora/values.yaml").touch()
    Path("run.yaml").write_text(yaml.safe_dump(settings("owner/model", "s3://bucket/rows.jsonl", URL)))
    return make_request(load_config("run.yaml"), "run.yaml", ["train.max_steps=9"], Wanted(namespace="team"))


@pytest.fixture
def send(request_: Request, kube: Kube) -> Callable[[], tuple[str, list[str]]]:
    """Sends it; the RayJob's name and what was said."""

    def sent() -> tuple[str, list[str]]:
        said: list[str] = []
        return submit(connect(), request_, URL, said.append).name, said

    return sent


def test_what_helm_gets_is_what_was_printed(
    send: Callable[[], tuple[str, list[str]]],
    request_: Request,
    kube: Kube,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = fake_helm(tmp_path, monkeypatch, kube.made(tmp_path, "first-1", URL))
    assert send() == ("first-1", [])
    assert words() == [request_.words()[1:]]
    assert words()[0][:4] == ["upgrade", "--install", "qlora-first-3ecffb", "charts/qlora"]


def test_a_run_that_goes_is_not_sent_twice(send: Callable[[], tuple[str, list[str]]], kube: Kube) -> None:
    add_rayjob(kube, "first", URL, "Running", "RUNNING")
    with pytest.raises(InputError) as refusal:
        send()
    assert str(refusal.value) == (
        f"job first of {URL} is RUNNING already, and two runs of one output.url exclude each other. Look at it with "
        "qlora status --on kubernetes --job first, or end it with qlora cancel --on kubernetes --job first"
    )


def test_one_that_has_ended_makes_room(
    send: Callable[[], tuple[str, list[str]]], kube: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_rayjob(kube, "first", URL, "Failed", "FAILED")
    fake_helm(tmp_path, monkeypatch, kube.made(tmp_path, "first-2", URL))
    name, said = send()
    assert name == "first-2" and said == [
        "job first of its last start has ended (FAILED) and is removed; its run goes on"
    ]
    assert len(kube.asked("delete", "rayjobs/first")) == 1


def test_one_that_does_not_go_is_said(
    send: Callable[[], tuple[str, list[str]]], kube: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "GONE_S", 0.1)
    add_rayjob(kube, "first", URL, "Failed", "FAILED")
    kube.answer(f"delete {kube.path('RayJob', 'first')}", {})
    kube.answer(f"get {kube.path('RayJob', 'first')}", {"metadata": {"name": "first"}})
    with pytest.raises(JobError, match=r"job first is deleted and not gone after 0 s. Does KubeRay's operator run"):
        send()


@pytest.mark.parametrize(
    ("helms", "said"),
    [
        (
            'resource mapping not found: no matches for kind "RayJob" in version "ray.io/v1"',
            "KubeRay is not installed there: ask an administrator for its operator",
        ),
        (
            "values don't meet the specifications of the schema(s) in the following chart(s): at '/nodes': minimum",
            "The chart's values.yaml says what each is",
        ),
        ("Kubernetes cluster unreachable: dial tcp: i/o timeout", "Is it the right cluster, and the VPN to it up?"),
        ('secrets is forbidden: User "u" cannot list resource', "qlora preflight kubernetes lists what you need"),
        ("pods is forbidden: exceeded quota: gpus", "Ask for less, or wait until others end"),
        ("another operation (install/upgrade/rollback) is in progress", "helm rollback RELEASE"),
        ("invalid ownership metadata; label validation error", "choose another --release"),
        ('namespaces "team" not found', "Create it: kubectl create namespace NAME"),
        ("the server has asked for the client to provide credentials: Unauthorized", "Log in to the cluster again"),
        ("something new", "helm status RELEASE may tell more"),
    ],
)
def test_helms_refusals_are_said_with_a_cure(
    helms: str, said: str, send: Callable[[], tuple[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_helm(tmp_path, monkeypatch, f"echo 'WARNING: old' >&2; echo {_quoted('Error: ' + helms)} >&2; exit 1")
    with pytest.raises(InputError) as refusal:
        send()
    assert str(refusal.value).startswith(f"helm did not send the run: {helms}. ") and said in str(refusal.value)


def test_what_the_chart_refuses_is_shown_as_it_says_it(
    send: Callable[[], tuple[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = (
        "Error: execution error at (qlora/templates/rayjob.yaml:1:4): \n1 problem in the values of this chart\n"
        "  worker.cpu: 2 for 8 GPUs, and each rank takes a CPU. Set 8 or more\n\n\nUse --debug flag to render out"
    )
    fake_helm(tmp_path, monkeypatch, f"echo {_quoted(refused)} >&2; exit 1")
    with pytest.raises(InputError) as refusal:
        send()
    assert str(refusal.value) == (
        "helm did not send the run: 1 problem in the values of this chart\n"
        "  worker.cpu: 2 for 8 GPUs, and each rank takes a CPU. Set 8 or more"
    )


def test_a_release_that_holds_another_run_is_not_replaced(
    send: Callable[[], tuple[str, list[str]]], request_: Request, kube: Kube
) -> None:
    labels = {"app.kubernetes.io/instance": request_.release}
    add_rayjob(kube, "other", "s3://bucket/runs/other", "Running", "RUNNING", labels=labels)
    with pytest.raises(InputError, match=r"holds job other of s3://bucket/runs/other, which helm would delete. Choose"):
        send()


def test_helm_goes_where_the_other_verbs_look(
    send: Callable[[], tuple[str, list[str]]], kube: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HELM_NAMESPACE", "elsewhere")
    fake_helm(tmp_path, monkeypatch, '[ -z "$HELM_NAMESPACE" ] || exit 1; ' + kube.made(tmp_path, "first-1", URL))
    assert send()[0] == "first-1"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def test_helm_may_show_a_token_and_we_do_not(
    send: Callable[[], tuple[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_helm(tmp_path, monkeypatch, f"echo 'Error: bearer {TOKEN} was refused' >&2; exit 1")
    with pytest.raises(InputError) as refusal:
        send()
    assert TOKEN not in str(refusal.value)


def test_without_helm_it_says_what_to_install(
    send: Callable[[], tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError) as refusal:
        send()
    assert str(refusal.value) == (
        "helm is not on PATH. Install it (https://helm.sh/docs/intro/install), version 3.10 or later, or print the "
        "request with --dry-run and send it from a machine that has it"
    )


def test_a_helm_that_does_not_end_is_said(
    send: Callable[[], tuple[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_helm(tmp_path, monkeypatch, "exec sleep 30")
    monkeypatch.setattr(helm, "ANSWER_S", 0.3)
    with pytest.raises(JobError, match=r"helm did not end in 0 s. Look at what it did with helm list, then try again"):
        send()


def test_a_chart_that_does_not_mark_its_rayjob_is_said(
    send: Callable[[], tuple[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_helm(tmp_path, monkeypatch, "true")
    with pytest.raises(
        JobError, match=r"there is no RayJob with the label qlora.run=3ecffb. Look at it with helm status"
    ):
        send()


@pytest.mark.parametrize(
    ("script", "error", "said"),
    [
        (
            "echo 'Error: no' >&2; exit 1",
            InputError,
            "helm cannot render the chart: no. helm template --debug shows more",
        ),
        ("echo 'a: ['", JobError, "helm rendered what is no YAML"),
    ],
)
def test_what_cannot_be_rendered_is_said(
    script: str, error: type[JobError], said: str, request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_helm(tmp_path, monkeypatch, script)
    with pytest.raises(error) as refusal:
        helm.render(request_.rendering())
    assert said in str(refusal.value)
