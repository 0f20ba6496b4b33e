"""Requests to Kubernetes as data: what helm would get, what is refused before, and what it needs of a cluster."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config import RunConfig, load_config
from job.errors import ConfigError, InputError, OutputError
from job.launch.kubernetes.jobs import parse
from job.launch.kubernetes.needs import Needs, Pods, needs_of, quantity, suits, tolerates
from job.launch.kubernetes.request import OUTPUT_NOTE, RUN_LABEL, Wanted, make_request, release_name, shape
from job.launch.kubernetes.submit import look_first
from job.launch.slurm.request import tag
from tests.conftest import REPOSITORY, settings

GOLDEN = REPOSITORY / "tests/golden/kubernetes"
REQUESTS: dict[str, tuple[list[str], Wanted]] = {
    "plain": ([], Wanted()),
    "two_nodes": (
        ["train.max_steps=20", "tracking.run_name=a, b"],
        Wanted(("team.yaml", "gpus.yaml"), 2, 8, "team", "prod", "mine"),
    ),
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The settings of run.yaml in the current folder, which holds two files of values as well, and no charts/."""
    monkeypatch.chdir(tmp_path)
    values = settings("owner/model", "s3://bucket/rows.jsonl", "s3://bucket/runs/first")
    Path("run.yaml").write_text(yaml.safe_dump(values))
    Path("team.yaml").write_text("nodes: 3\nexistingSecrets: [bucket-keys]\n")
    Path("gpus.yaml").write_text("gpusPerNode: 4\n")
    return load_config("run.yaml")


@pytest.fixture(autouse=True)
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose repository holds a chart for one node without GPUs."""
    repository = tmp_path_factory.mktemp("repository")
    (repository / "charts/qlora").mkdir(parents=True)
    (repository / "charts/qlora/Chart.yaml").write_text("name: qlora\n")
    (repository / "charts/qlora/values.yaml").write_text("nodes: 1\ngpusPerNode: 0\n")
    monkeypatch.setattr("job.__file__", str(repository / "job/__init__.py"))
    return repository


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_are_what_they_were(name: str, config: RunConfig, repository: Path) -> None:
    words, wanted = REQUESTS[name]
    made = json.dumps(make_request(config, "run.yaml", words, wanted).as_json()).replace(str(repository), "REPOSITORY")
    assert json.loads(made) == json.loads((GOLDEN / f"{name}.json").read_text())


def test_a_request_reads_as_it_would_be_typed(config: RunConfig, repository: Path) -> None:
    command, keys = make_request(config, "run.yaml", ["train.max_steps=20"], Wanted(nodes=2)).lines()
    assert command == (
        f"helm upgrade --install qlora-first-3ecffb {repository}/charts/qlora --set-file config=run.yaml "
        """--set-json 'settings=["train.max_steps=20"]' --set-json nodes=2"""
    )
    assert keys == "keys come from the secrets that the values name; config is run.yaml"
    request = make_request(config, "run.yaml", [], Wanted())
    assert request.rendering()[:3] == ["helm", "template", "qlora-first-3ecffb"]


def test_a_chart_here_wins_over_the_packages(config: RunConfig) -> None:
    Path("charts/qlora").mkdir(parents=True)
    Path("charts/qlora/Chart.yaml").touch()
    assert make_request(config, "run.yaml", [], Wanted()).chart == "charts/qlora"


def test_no_secret_gets_into_a_request(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted")
    Path(".env").write_text("AWS_ACCESS_KEY_ID=planted\n")
    request = make_request(config, "run.yaml", [], Wanted(("team.yaml",)))
    assert "planted" not in json.dumps(request.as_json()) + "\n".join(request.lines())


def test_helm_reads_a_path_as_it_is(config: RunConfig) -> None:
    Path("a,b{1}.yaml").write_text(Path("run.yaml").read_text())
    assert r"config=a\,b\{1\}.yaml" in make_request(config, "a,b{1}.yaml", [], Wanted()).words()


@pytest.mark.parametrize(
    ("words", "wanted", "said"),
    [
        ([], Wanted(("gone.yaml",)), "--values gone.yaml: there is no such file. Give a YAML file with values of the"),
        ([], Wanted(release="Mine!"), "--release Mine!: is no name of a release. Use a-z, 0-9 and -, at most 37"),
        ([], Wanted(release="a" * 38), "is no name of a release"),
        (
            ["data.train=https://host/a.jsonl?X-Amz-Signature=1"],
            Wanted(),
            "data.train: a signed address would be shown to everybody who may read the namespace. Use a bucket, with",
        ),
        (
            ["output.url=runs/first"],
            Wanted(),
            "output.url: runs/first is a folder of this machine, and pods write else",
        ),
        (["output.url=/data/first"], Wanted(), "Use a bucket, such as s3://bucket/runs/first"),
        (["output.url=file:///data/first"], Wanted(), "is a folder of this machine"),
        (["output.url=memory://first"], Wanted(), "is a folder of this machine"),
    ],
)
def test_what_cannot_be_handed_on_is_refused(words: list[str], wanted: Wanted, said: str, config: RunConfig) -> None:
    with pytest.raises(InputError) as refusal:
        make_request(load_config("run.yaml", words), "run.yaml", words, wanted)
    assert said in str(refusal.value) and "Amz" not in str(refusal.value)


def test_without_a_chart_it_says_where_it_looked(config: RunConfig, repository: Path) -> None:
    (repository / "charts/qlora/Chart.yaml").unlink()
    with pytest.raises(InputError, match=r"there is no chart charts/qlora nor .*/charts/qlora. Start from the repos"):
        make_request(config, "run.yaml", [], Wanted())


def test_a_release_is_named_by_the_run_and_its_output(config: RunConfig) -> None:
    def named(**output: str) -> str:
        return release_name(
            load_config("run.yaml", [f"{key.replace('__', '.')}={value}" for key, value in output.items()])
        )

    assert named() == "qlora-first-3ecffb" and named(output__url="s3://bucket/runs/first/") == "qlora-first-3ecffb"
    assert named(tracking__run_name="Größe_7B, Lauf 1") == "qlora-gr-e-7b-lauf-1-3ecffb"
    long = named(tracking__run_name="a" * 60)
    assert len(long) == 37 and long.endswith("a-3ecffb")
    assert named(tracking__run_name="运行") == "qlora-run-3ecffb"


def test_the_shape_is_the_options_then_the_values_then_the_charts(config: RunConfig) -> None:
    def shape_of(**wanted: Any) -> tuple[int, int] | None:
        return shape(make_request(config, "run.yaml", [], Wanted(**wanted)))

    assert shape_of() == (1, 0) and shape_of(values=("team.yaml", "gpus.yaml")) == (3, 4)
    assert shape_of(values=("team.yaml", "gpus.yaml"), nodes=2) == (2, 4)
    Path("team.yaml").write_text("- a\n")
    with pytest.raises(InputError, match=r"team.yaml: holds no names with values"):
        shape_of(values=("team.yaml",))
    Path("team.yaml").write_text("a: [\n")
    with pytest.raises(InputError, match=r"team.yaml: cannot be read as YAML"):
        shape_of(values=("team.yaml",))


def test_it_looks_before_anything_is_sent(config: RunConfig, tmp_path: Path) -> None:
    def look(url: str = f"{tmp_path}/out", **wanted: Any) -> str:
        request = make_request(config, "run.yaml", [], Wanted(**wanted))
        return look_first(load_config("run.yaml", [f"output.url={url}"]), request, said.append)

    said: list[str] = []
    assert look() == f"{tmp_path}/out" and not said
    with pytest.raises(ConfigError, match=r"train.global_batch_size: 4 is not a multiple of 32 .*16 ranks"):
        look(nodes=2, gpus_per_node=8)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").touch()
    with pytest.raises(OutputError, match=r"holds files that are no run \(notes.txt\)"):
        look()


def test_an_output_whose_keys_are_the_pods_alone_is_left_to_them(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    said: list[str] = []
    assert look_first(config, make_request(config, "run.yaml", [], Wanted()), said.append) == "s3://bucket/runs/first"
    assert said[0].startswith("Warning: output.url: s3://bucket/runs/first: no keys. Put AWS_ACCESS_KEY_ID and")
    assert said[0].endswith("It was not looked into: the pods do that, with keys of their own")
    with pytest.raises(OutputError, match=r"output.url: what://bucket/x"):
        unknown = load_config("run.yaml", ["output.url=what://bucket/x"])
        look_first(unknown, make_request(unknown, "run.yaml", [], Wanted()), said.append)


@pytest.fixture
def needs() -> Needs:
    """Of the chart, as helm rendered it for two nodes of 8 GPUs."""
    return needs_of(list(yaml.safe_load_all((GOLDEN / "rendered.yaml").read_text())))


def test_what_a_run_needs_is_read_from_what_is_sent(needs: Needs) -> None:
    assert [(pods.role, pods.count, pods.gpu[1]) for pods in needs.pods()] == [
        ("head", 1, 0),
        ("worker", 2, 8),
        ("submitter", 1, 0),
    ]
    assert needs.named("Secret") == ["bucket-keys"] and needs.named("PersistentVolumeClaim") == []
    assert needs.storage_classes() == ["fast"] and needs.of_pods("priorityClassName") == ["training"]
    assert needs.total()["nvidia.com/gpu"] == 16 and needs.total()["pods"] == 4
    assert ("ray.io", "rayjobs") in needs.kinds() and len(needs.images()) == 1


def test_the_chart_marks_its_rayjob_as_the_verbs_look_for_it(needs: Needs) -> None:
    meta = needs.rayjob["metadata"]
    assert meta["labels"][RUN_LABEL] == tag("s3://bucket/runs/first") == "3ecffb"
    assert meta["annotations"][OUTPUT_NOTE] == "s3://bucket/runs/first"
    job = parse(needs.rayjob)
    assert job.settings == ("train.max_steps=20",) and job.config_map.startswith("qlora-first-3ecffb-")


def test_a_chart_without_a_run_is_refused() -> None:
    with pytest.raises(InputError, match="renders no RayJob"):
        needs_of([{"kind": "ConfigMap", "metadata": {"name": "x"}}])


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), (2, 2.0), ("64Gi", 64 * 2**30), ("1e3", 1e3), ("1.5k", 1500.0), ("8", 8.0)]
)
def test_quantities_of_kubernetes(text: str, number: float) -> None:
    assert quantity(text) == number


def test_what_is_no_quantity_is_refused() -> None:
    with pytest.raises(InputError, match=r"64 GB: is no quantity of Kubernetes. Write it as 500m, 2, 64Gi or 1e3"):
        quantity("64 GB")


TAINT = {"key": "nvidia.com/gpu", "value": "yes", "effect": "NoSchedule"}


@pytest.mark.parametrize(
    ("toleration", "may"),
    [
        ({"key": "nvidia.com/gpu", "operator": "Exists"}, True),
        ({"operator": "Exists"}, True),
        ({"key": "nvidia.com/gpu", "value": "yes", "effect": "NoSchedule"}, True),
        ({"key": "nvidia.com/gpu", "value": "no"}, False),
        ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "other", "operator": "Exists"}, False),
    ],
)
def test_taints_and_tolerations(toleration: dict[str, str], may: bool) -> None:
    assert tolerates({"tolerations": [toleration]}, TAINT) == may
    assert tolerates({}, {**TAINT, "effect": "PreferNoSchedule"})


def test_a_node_suits_by_readiness_labels_and_taints() -> None:
    def node(**spec: Any) -> dict[str, Any]:
        return {"metadata": {"labels": {"gpu": "h100"}}, "spec": spec, "status": {"conditions": [ready]}}

    ready = {"type": "Ready", "status": "True"}
    assert suits({"nodeSelector": {"gpu": "h100"}}, node()) and not suits({"nodeSelector": {"gpu": "a100"}}, node())
    assert not suits({}, node(taints=[TAINT])) and not suits({}, node(unschedulable=True))
    ready["status"] = "Unknown"
    assert not suits({}, node())


def test_gpus_of_any_maker_and_parts_of_them_count() -> None:
    def gpu(resource: str) -> tuple[str, int]:
        return Pods("worker", 1, {"containers": [{"resources": {"limits": {"cpu": "4", resource: "2"}}}]}).gpu

    for resource in ("nvidia.com/gpu", "amd.com/gpu", "nvidia.com/mig-1g.10gb", "nvidia.com/gpu.shared"):
        assert gpu(resource) == (resource, 2)
    assert gpu("rdma/hca")[1] == 0
