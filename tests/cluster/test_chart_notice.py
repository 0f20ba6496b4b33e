"""The notice of a pod's end: its preStop, run by a real sh beside processes that are named as Ray names them."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import helm

RANK = "ray::RayTrainWorker"
"""What Ray calls the process of a rank."""
SAVES = """
import signal, sys, time
def save(number, frame):
    time.sleep(2)
    print("saved")
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("runs", flush=True)
time.sleep(60)
"""
"""A `qlora` that saves when it is asked to stop."""


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


def notice(kind: str, file: Path, mine: str, at_most: int = 60) -> subprocess.Popen[bytes]:
    """Starts preStop, for processes of this test alone, since /proc shows those of others, too."""
    [*shell, pattern, _, asks] = container(kind)[1]["lifecycle"]["preStop"]["exec"]["command"]
    command = [*shell, f"{pattern}.*{mine}", str(at_most), asks]
    return subprocess.Popen(command, env={**os.environ, "QLORA_WARNING_FILE": str(file)})


def test_a_worker_makes_the_file_and_waits_while_its_ranks_save(tmp_path: Path) -> None:
    mine, file = uuid.uuid4().hex, tmp_path / "notice"
    with process(f"{RANK} {mine}") as first, process(f"{RANK} {mine}") as second:
        waiting = notice("worker", file, mine)
        time.sleep(1.5)
        assert file.exists(), "the ranks look for it"
        assert first.poll() is None, "no signal cuts them off"
        first.kill()  # not collected: what has ended is not waited for
        time.sleep(1.5)
        assert waiting.poll() is None, "the second still saves"
        second.kill()
        assert waiting.wait(timeout=30) == 0


def test_a_worker_does_not_wait_for_ranks_that_are_started_anew(tmp_path: Path) -> None:
    mine = uuid.uuid4().hex
    with process(f"{RANK} {mine}") as first:
        waiting = notice("worker", tmp_path / "notice", mine)
        time.sleep(1)
        with process(f"{RANK} {mine}"):
            first.kill()
            assert waiting.wait(timeout=30) == 0


def test_the_head_asks_what_steers_the_run_and_waits_for_it(tmp_path: Path) -> None:
    mine, qlora = uuid.uuid4().hex, tmp_path / "qlora"
    qlora.write_text(f"#!{sys.executable}\n{SAVES}")
    qlora.chmod(0o755)
    around = ["sh", "-c", f"qlora train --on ray {mine}; exit $?"]  # a shell that stays, as a job of Ray may have it
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(around, stdout=subprocess.PIPE, text=True, env=env) as job:
        assert job.stdout and job.stdout.readline() == "runs\n"
        begun = time.monotonic()
        assert notice("head", tmp_path / "notice", mine).wait(timeout=30) == 0
        assert time.monotonic() - begun > 1.5
        assert job.communicate(timeout=30)[0] == "saved\n"
        assert job.returncode == 75


def test_it_waits_for_nobody_when_the_run_is_over(tmp_path: Path) -> None:
    begun = time.monotonic()
    mine = uuid.uuid4().hex
    with process(f"ray::IDLE {mine}") as idle:
        for kind in ("head", "worker"):
            assert notice(kind, tmp_path / "notice", mine).wait(timeout=30) == 0
        assert idle.poll() is None
    assert time.monotonic() - begun < 30


def test_it_ends_before_kubernetes_does(tmp_path: Path) -> None:
    mine = uuid.uuid4().hex
    with process(f"{RANK} {mine}"), process(f"{RANK} {mine}"):
        begun = time.monotonic()
        assert notice("worker", tmp_path / "notice", mine, at_most=2).wait(timeout=30) == 0
        assert 1.5 < time.monotonic() - begun < 30


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_the_wait_fits_the_grace_and_the_file_is_the_one_that_ranks_look_for(kind: str) -> None:
    spec, first = container(kind, terminationGracePeriodSeconds=300)
    assert spec["terminationGracePeriodSeconds"] == 300
    assert first["lifecycle"]["preStop"]["exec"]["command"][-2] == "285"
    assert {"name": "QLORA_WARNING_FILE", "value": "/scratch/notice"} in first["env"]


def test_ranks_have_the_name_in_ray_that_is_looked_for() -> None:
    import ray

    source = Path(ray.__file__).parent / "train/v2/_internal/execution/worker_group/worker.py"
    assert f"class {RANK.removeprefix('ray::')}:" in source.read_text()


def test_the_signal_is_one_that_the_command_takes_as_a_question() -> None:
    assert container("head")[1]["lifecycle"]["preStop"]["exec"]["command"][-1] == signal.SIGTERM.name[3:]
    assert container("worker")[1]["lifecycle"]["preStop"]["exec"]["command"][-1] == ""


def test_the_chart_knows_when_a_save_takes_longer_than_the_grace() -> None:
    with pytest.raises(ValueError, match=r"train.stop_grace_s \(200\) and 30 s around it. Set it to 230 or more"):
        helm.template(helm.real(settings=["train.stop_grace_s=200"]))
    config = "output: {url: s3://b/x}\ntrain: {stop_grace_s: 400}\n"
    with pytest.raises(ValueError, match="Set it to 430 or more"):
        helm.template(helm.real(config=config))
    assert helm.template(helm.real(config=config, terminationGracePeriodSeconds=430))
