"""The notice of a pod's end: its preStop, run by a real sh beside processes that are named as Ray names them."""

import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import helm


def container(kind: str, **values: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's spec and first container of head or worker."""
    cluster = helm.rayjob(helm.real(**values))["spec"]["rayClusterSpec"]
    group = cluster["headGroupSpec"] if kind == "head" else cluster["workerGroupSpecs"][0]
    spec = group["template"]["spec"]
    return spec, spec["containers"][0]


@contextmanager
def process(name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that calls itself so, as Ray's workers do."""
    with subprocess.Popen([name, "60"], executable="/bin/sleep") as running:
        try:
            yield running
        finally:
            running.kill()


def notice(kind: str, folder: Path, mine: str, at_most: int) -> list[str]:
    """preStop's command for processes of this test alone, since /proc shows those of others, too."""
    [*shell, pattern, _] = container(kind)[1]["lifecycle"]["preStop"]["exec"]["command"]
    return [*shell, f"{pattern} {mine}", str(at_most)]


def start(command: list[str], file: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env={**os.environ, "QLORA_WARNING_FILE": str(file)})


@pytest.mark.parametrize(
    ("kind", "title"),
    [("worker", "ray::RayTrainWorker"), ("head", "python /usr/local/bin/qlora train --on ray")],
)
def test_it_makes_the_file_and_waits_while_the_run_goes(kind: str, title: str, tmp_path: Path) -> None:
    mine = uuid.uuid4().hex
    file = tmp_path / "notice"
    with process(f"{title} {mine}") as running:
        waiting = start(notice(kind, tmp_path, mine, 60), file)
        time.sleep(1.5)
        assert file.exists(), "the ranks look for it"
        assert waiting.poll() is None, "the run still goes"
        running.kill()
        running.wait()
        assert waiting.wait(timeout=5) == 0


def test_it_waits_for_nobody_when_the_run_is_over(tmp_path: Path) -> None:
    begun = time.monotonic()
    with process(f"ray::IDLE {uuid.uuid4().hex}"):
        command = notice("worker", tmp_path, uuid.uuid4().hex, 60)
        assert start(command, tmp_path / "notice").wait(timeout=10) == 0
    assert time.monotonic() - begun < 2


def test_it_ends_before_kubernetes_does(tmp_path: Path) -> None:
    mine = uuid.uuid4().hex
    with process(f"ray::RayTrainWorker {mine}"):
        begun = time.monotonic()
        assert start(notice("worker", tmp_path, mine, 2), tmp_path / "notice").wait(timeout=10) == 0
        assert 1.5 < time.monotonic() - begun < 5


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_the_wait_fits_the_grace_and_the_file_is_the_one_that_ranks_look_for(kind: str) -> None:
    spec, first = container(kind, terminationGracePeriodSeconds=300)
    assert spec["terminationGracePeriodSeconds"] == 300
    assert first["lifecycle"]["preStop"]["exec"]["command"][-1] == "285"
    assert {"name": "QLORA_WARNING_FILE", "value": "/scratch/notice"} in first["env"]


def test_ranks_have_the_name_in_ray_that_is_looked_for() -> None:
    import ray

    source = Path(ray.__file__).parent / "train/v2/_internal/execution/worker_group/worker.py"
    assert "class RayTrainWorker:" in source.read_text()
    assert container("worker")[1]["lifecycle"]["preStop"]["exec"]["command"][-2] == "[r]ay::RayTrainWorker"


def test_the_chart_knows_when_a_save_takes_longer_than_the_grace() -> None:
    with pytest.raises(ValueError, match=r"train.stop_grace_s \(200\) and 30 s around it. Set it to 230 or more"):
        helm.template(helm.real(settings=["train.stop_grace_s=200"]))
    config = "output: {url: s3://b/x}\ntrain: {stop_grace_s: 400}\n"
    with pytest.raises(ValueError, match="Set it to 430 or more"):
        helm.template(helm.real(config=config))
    assert helm.template(helm.real(config=config, terminationGracePeriodSeconds=430))
