"""The verbs of the command on Kubernetes: output in a real S3 server, the cluster a stand-in, helm a script."""

import json
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY, settings
from tests.forked import Done, run
from tests.kube import TOKEN, Kube, add_pod, add_rayjob, fake_helm, make_kube
from tests.s3 import BUCKET, S3

__all__ = ["make_kube"]
ON = ("--on", "kubernetes")
VOLUME = {"name": "config", "configMap": {"name": "first-0a"}}
VALUES = f"{REPOSITORY}/tests/golden/kubernetes/team.yaml"


@pytest.fixture
def url() -> str:
    """An output address in a bucket that is there."""
    return f"s3://{BUCKET}/{secrets.token_hex(4)}/first"


@pytest.fixture
def verb(s3: S3, url: str, tmp_path: Path) -> Callable[..., Done]:
    """Runs a verb in a folder with run.yaml and charts/."""
    (tmp_path / "charts").symlink_to(REPOSITORY / "charts")
    values = settings("owner/model", "s3://bucket/rows.jsonl", url, storage=s3.storage)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))

    def done(*words: str, **env: str) -> Done:
        return run(*words, env={**s3.env, **env}, cwd=tmp_path)

    return done


def write_status(s3: S3, url: str, state: str) -> None:
    status = {"state": state, "reason": "", "step": 3, "updated": "2026-11-21T15:00:00+00:00", "checkpoint": 2}
    s3.fs().pipe_file(f"{url}/status.json", json.dumps(status).encode())


def test_a_request_is_printed_without_cluster_and_helm(verb: Callable[..., Done], tmp_path: Path) -> None:
    nobody = {"PATH": str(tmp_path), "KUBECONFIG": str(tmp_path / "none")}
    words = ("submit", "kubernetes", "run.yaml", "train.max_steps=9", "--values", VALUES, "--nodes", "2", "--dry-run")
    done = verb(*words, **nobody)
    assert done.code == 0 and done.out.startswith("helm upgrade --install qlora-first-"), done.err
    assert "--set-file config=run.yaml" in done.out and """'settings=["train.max_steps=9"]'""" in done.out
    asked: dict[str, Any] = json.loads(verb(*words, "--json", **nobody).out)
    assert asked["values"] == {"settings": ["train.max_steps=9"], "nodes": 2} and asked["chart"] == "charts/qlora"
    assert asked["command"][0] == "helm"


def test_a_run_is_sent_and_found_again(
    verb: Callable[..., Done], url: str, kube: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = fake_helm(tmp_path, monkeypatch, kube.made(tmp_path, "first-1", url))
    done = verb("submit", "kubernetes", "run.yaml", "--namespace", "team")
    assert (done.code, done.out.splitlines()) == (
        0,
        [
            "job first-1",
            "  qlora status run.yaml --on kubernetes --namespace team",
            "  qlora logs -f run.yaml --on kubernetes --namespace team",
            "  qlora cancel run.yaml --on kubernetes --namespace team",
        ],
    )
    assert words()[0][:2] == ["upgrade", "--install"]
    said = verb("status", "run.yaml", *ON).out
    assert f"run {url}: has not begun\njob first-1: KubeRay has not looked at it yet" in said
    again = verb("submit", "kubernetes", "run.yaml")
    assert again.code == 2 and "InputError: job first-1 of" in again.err and len(words()) == 1
    assert TOKEN not in said + done.out + done.err + again.err


def test_what_cannot_work_is_refused_before_anything_is_sent(
    verb: Callable[..., Done], url: str, s3: S3, kube: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_helm(tmp_path, monkeypatch, "touch sent")
    for word, said in (
        ("output.url=runs/first", "is a folder of this machine"),
        ("lora.rnak=8", 'Did you mean "rank"'),
    ):
        done = verb("submit", "kubernetes", "run.yaml", word)
        assert done.code == 2 and said in done.err
    done = verb("submit", "kubernetes", "run.yaml", "--nodes", "2", "--gpus-per-node", "8")
    assert done.code == 2 and "train.global_batch_size: 4 is not a multiple of 32" in done.err
    s3.fs().pipe_file(f"{url}/run.yaml", (tmp_path / "run.yaml").read_bytes())
    write_status(s3, url, "finished")
    done = verb("submit", "kubernetes", "run.yaml")
    assert done.code == 2 and "holds this run, finished after 3 steps" in done.err
    assert not (tmp_path / "sent").exists() and not list(kube.asked("get"))


def test_a_run_is_watched_read_and_stopped(
    verb: Callable[..., Done], url: str, s3: S3, kube: Kube, tmp_path: Path
) -> None:
    spec = {"rayClusterSpec": {"headGroupSpec": {"template": {"spec": {"volumes": [VOLUME]}}}}, "backoffLimit": 2}
    add_rayjob(kube, "first-1", url, "Running", "RUNNING", startTime="2026-11-21T14:00:00Z", spec=spec)
    kube.add("ConfigMap", "first-0a", data={"run.yaml": (tmp_path / "run.yaml").read_text()})
    write_status(s3, url, "running")
    add_pod(kube, "head", "first-1", "head")
    kube.answer(f"get {kube.path('Pod', 'head')}/log", b"2026-11-21T15:00:00Z loss 1\n")
    said = verb("status", "run.yaml", *ON).out
    assert f"run {url}: running, step 3 of 3" in said and "job first-1: RUNNING on cluster first-1-abc" in said
    (standing,) = json.loads(verb("status", *ON, "--json").out)
    assert standing["job"]["name"] == "first-1" and standing["run"]["status"]["state"] == "running"
    assert verb("logs", "run.yaml", *ON).out == "head | loss 1\n"
    assert verb("logs", "run.yaml", "--node", "w", *ON).code == 2
    done = verb("cancel", "run.yaml", *ON)
    assert done.code == 0 and "job first-1 was asked to save and stop" in done.out
    assert s3.fs().cat_file(f"{url}/stop") == b"qlora cancel\n"
    assert verb("cancel", "--job", "first-1", "--now", *ON).out.startswith("job first-1 is deleted")
    assert kube.asked("delete", "rayjobs/first-1")


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("failed", 1)])
def test_logs_end_with_what_the_run_did(
    state: str, code: int, verb: Callable[..., Done], url: str, s3: S3, kube: Kube
) -> None:
    add_rayjob(kube, "first-1", url, "Complete", "SUCCEEDED")
    write_status(s3, url, state)
    done = verb("logs", "run.yaml", "-f", *ON)
    assert done.code == code and f"run {url}: {state}, step 3" in done.err


def test_a_refusal_is_one_sentence_and_its_exit_code(verb: Callable[..., Done], kube: Kube, tmp_path: Path) -> None:
    kube.refuse(f"get {kube.path('RayJob')}", 401, f"token {TOKEN} expired")
    for words in (("status", "run.yaml"), ("logs", "run.yaml", "-f"), ("cancel", "run.yaml")):
        done = verb(*words, *ON)
        assert done.code == 2 and done.err.startswith(f"InputError: {kube.url} does not know who asks (401: token ***")
        assert "Traceback" not in done.err and TOKEN not in done.err + done.out
    done = verb("status", *ON, KUBECONFIG=str(tmp_path / "none"))
    assert done.code == 2 and done.err.startswith("InputError: no cluster is known here: Invalid kube-config file")
    assert "no such context" not in done.err and "gone" in verb("status", *ON, "--context", "gone").err


def test_a_cluster_is_checked_beside_this_machine(
    verb: Callable[..., Done], kube: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kube.answer("post /apis/authorization.k8s.io/v1/selfsubjectaccessreviews", lambda: {"status": {"allowed": True}})
    kube.answer("get /api/v1/namespaces/team", {"metadata": {"name": "team"}})
    fake_helm(tmp_path, monkeypatch, f"cat {REPOSITORY}/tests/golden/kubernetes/rendered.yaml")
    done = verb("preflight", "kubernetes", "run.yaml", "--values", VALUES)
    assert done.code == 1 and "unfit: there is no Secret bucket-keys in namespace team" in done.out, done.err
    assert "things speak against this run" in done.out.splitlines()[-1]
    report = verb("preflight", "--report", "run.yaml")
    assert report.code == 0 and json.loads(report.out)["versions"]
    assert "machine" in verb("preflight", "--help").out and "Missing argument 'CONFIG'" in verb("preflight").err


def test_the_verbs_import_neither_client_nor_torch_before_they_need_them() -> None:
    modules = ("request", "submit", "watch", "follow", "cancel", "preflight")
    code = "; ".join(["import sys", *(f"import job.launch.kubernetes.{name}" for name in modules)])
    heavy = "{'kubernetes', 'torch', 'transformers', 'ray'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{code}; assert not ({heavy}), {heavy}"], cwd=REPOSITORY, check=False)
    assert done.returncode == 0
