"""The chart in the hands of the real helm: what it takes, what it refuses and why, and what it says afterwards."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from job.config import RunConfig
from job.launch.kubernetes.needs import needs_of
from job.launch.kubernetes.request import Request
from tests.cluster import helm

GOOD = sorted((helm.VALUES / "good").glob("*.yaml"))
BAD = sorted((helm.VALUES / "bad").glob("*.yaml"))
KUBERNETES = "1.34"
"""The version whose core kinds manifests are held against."""


def named(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("values", GOOD, ids=named)
def test_good_values_pass_lint_template_and_a_dry_run_of_install(values: Path) -> None:
    for verb in (["lint", "--strict"], ["template", "first"], ["install", "first", "--dry-run=client"]):
        done = helm.run(*verb, helm.CHART, "--values", values)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "coalesce" not in done.stderr, "helm warns of a value of another type"


@pytest.mark.parametrize("values", BAD, ids=named)
def test_bad_values_are_refused_with_their_reason(values: Path) -> None:
    reason = values.read_text().splitlines()[0].removeprefix("# refused: ")
    for verb in (["template", "first"], ["install", "first", "--dry-run=client"]):
        done = helm.run(*verb, helm.CHART, "--values", values)
        assert done.returncode != 0
        assert reason in done.stderr


def test_all_problems_are_said_at_once() -> None:
    values = helm.real(env={"HF_TOKEN": "x", "HOME": "/"}, gpusPerNode=8)
    with pytest.raises(ValueError) as refused:
        helm.template(values, release="1.run")
    assert "4 problems in the values of this chart" in str(refused.value)
    assert 'release name "1.run": KubeRay takes names of a-z, 0-9 and -, a letter first. Try "run-1-run"' in str(
        refused.value
    )


def core(manifests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Everything of a render that Kubernetes knows by itself: its kinds, and the pods inside the RayJob."""
    for manifest in manifests:
        if manifest["kind"] != "RayJob":
            yield manifest
            continue
        spec = manifest["spec"]
        cluster = spec["rayClusterSpec"]
        groups = [cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", [])]
        for template in [spec["submitterPodTemplate"], *(group["template"] for group in groups)]:
            metadata = {"name": "pod", **template.get("metadata", {})}
            yield {"apiVersion": "v1", "kind": "Pod", **template, "metadata": metadata}


@pytest.mark.parametrize("values", GOOD, ids=named)
def test_core_kinds_are_strictly_valid(values: Path) -> None:
    for manifest in core(helm.template(values)):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


RUN_FILE = """# über

model: {name: "a \\u00e9 $b"}
output:
  url: s3://bucket/runs/first  # {{ .Values }}


"""


def test_a_run_file_arrives_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    for text in (RUN_FILE, RUN_FILE.strip(), RUN_FILE.replace("\n", "\r\n"), " " + RUN_FILE):
        path.write_bytes(text.encode())
        manifests = helm.template({"image": {"repository": "r/i"}}, "--set-file", f"config={path}")
        held = helm.only(manifests, "ConfigMap")
        assert held["data"] == {"run.yaml": text}
        assert held["immutable"] is True


def test_the_kinds_are_those_that_were_asked_for() -> None:
    usual = {"NetworkPolicy", "ServiceAccount", "RayJob", "Pod"}
    assert {manifest["kind"] for manifest in helm.template()} == usual
    assert {manifest["kind"] for manifest in helm.template(helm.real())} == {*usual, "ConfigMap"}
    held = helm.template(helm.real(cache={"create": True}))
    assert {manifest["kind"] for manifest in held} == {*usual, "ConfigMap", "PersistentVolumeClaim"}
    assert helm.only(held, "PersistentVolumeClaim")["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def notes(values: dict[str, Any], folder: Path) -> str:
    """What helm prints after installing."""
    done = helm.run("install", "first", helm.CHART, "-n", "team", "--dry-run=client", *helm.words(values, folder))
    assert done.returncode == 0, done.stderr
    return done.stdout.split("NOTES:\n")[1]


def test_the_notes_say_how_to_watch_read_and_fetch(tmp_path: Path) -> None:
    said = notes(helm.real(kueue={"queue": "night"}), tmp_path)
    name = helm.rayjob(helm.real(kueue={"queue": "night"}))["metadata"]["name"]
    assert f"kubectl get rayjob {name} -n team -w" in said
    assert f"kubectl logs -n team -f job/{name}" in said
    assert "aws s3 cp --recursive s3://bucket/runs/first/adapter adapter" in said
    assert "It is suspended until Kueue has the quota of queue night." in said


def test_the_notes_follow_where_the_adapter_is(tmp_path: Path) -> None:
    elsewhere = helm.real(settings=["output.url=gs://b/it's"])
    assert """gcloud storage cp -r 'gs://b/it'"'"'s/adapter' adapter""" in notes(elsewhere, tmp_path)
    minio = helm.real(settings=["storage.endpoint=http://minio:9000"])
    assert "aws s3 cp --recursive --endpoint-url http://minio:9000 s3://bucket/runs/first/adapter" in notes(
        minio, tmp_path
    )
    smoke = notes({}, tmp_path)
    assert "No run was given" in smoke
    assert ":/scratch/smoke/adapter" in smoke


def test_what_qlora_submit_asks_helm_for_is_what_the_chart_takes(tmp_path: Path) -> None:
    run, values = tmp_path / "run, file.yaml", helm.VALUES / "good/smoke-pushed.yaml"
    run.write_text(helm.real()["config"])
    own = {"settings": ["lora.rank=8"], "nodes": 2}
    asked = Request("first", str(helm.CHART), str(run), (str(values),), own, "team", None)
    done = helm.run(*asked.rendering()[1:])
    assert done.returncode == 0, done.stderr
    needs = needs_of([manifest for manifest in yaml.safe_load_all(done.stdout) if manifest])
    assert needs.total()["pods"] == 4, "submitter, head, two workers"
    assert needs.named("Secret") == ["registry"] and needs.named("ConfigMap") == []
    assert "--nodes 2 --gpus-per-node 0" in needs.rayjob["spec"]["entrypoint"]
    assert "lora.rank=8" in needs.rayjob["spec"]["entrypoint"]


def nodes_of(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema inside a schema, but for the conditions of its rules."""
    yield path, schema
    for name in ("properties", "definitions"):
        for key, inner in schema.get(name, {}).items():
            yield from nodes_of(inner, f"{path}/{key}")
    if isinstance(schema.get("items"), dict):
        yield from nodes_of(schema["items"], f"{path}[]")


def test_the_schema_is_closed_and_describes_every_value() -> None:
    schema = json.loads((helm.CHART / "values.schema.json").read_text())
    shared = schema["definitions"]
    for path, node in nodes_of(schema):
        if node.get("type") == "object":
            assert node.get("additionalProperties") is not None, f"{path} takes anything"
            assert node["additionalProperties"] is not True, f"{path} takes anything"
        if not path.endswith("[]"):
            known = node if "$ref" not in node else {**shared[node["$ref"].removeprefix("#/definitions/")], **node}
            assert known.get("description"), f"{path} is not described"


def test_values_and_schema_name_the_same_things() -> None:
    schema = json.loads((helm.CHART / "values.schema.json").read_text())
    values = yaml.safe_load((helm.CHART / "values.yaml").read_text())
    assert values.keys() == schema["properties"].keys()
    for name, value in values.items():
        inner = schema["properties"][name].get("properties")
        if inner:
            assert value.keys() == inner.keys(), name


def test_no_value_is_a_setting_of_training() -> None:
    values = yaml.safe_load((helm.CHART / "values.yaml").read_text())
    assert not values.keys() & RunConfig.model_fields.keys()
    inner = {key for value in values.values() if isinstance(value, dict) for key in value}
    of_runs = {
        key for field in RunConfig.model_fields.values() for key in getattr(field.annotation, "model_fields", {})
    }
    assert inner & of_runs <= {"name"}, "of a service account"
