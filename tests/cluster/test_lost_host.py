"""A host is lost in the middle of a run: the others end, with an exit code, and status.json says so."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.hosts import Host
from tests.cluster.launching import Launched, over_ssh, without_ssh

RunFile = Callable[..., Path]
NOTICED_S = 60


@pytest.fixture
def endless(run_of: RunFile, request: pytest.FixtureRequest) -> Path:
    """The run file of a run that nothing ends."""
    return run_of(request.node.name, max_steps=100_000, strategy="zero3")


def wait_for_a_step(launched: Launched, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while "step 1/" not in launched.said():
        assert time.monotonic() < end and not any(process.poll() for process in launched.running), launched.said()
        time.sleep(0.05)


def state(config: Path) -> str:
    return str(json.loads((config.with_suffix("") / "status.json").read_text())["state"])


def test_when_a_host_dies_deepspeed_over_ssh_ends_with_a_fault(
    endless: Path, two_hosts: list[Host], tmp_path: Path
) -> None:
    launched = over_ssh(tmp_path, two_hosts, "job", "train", endless)
    wait_for_a_step(launched)
    assert two_hosts[0].python_processes()
    two_hosts[1].kill()
    assert launched.codes(NOTICED_S)[0] > 0
    assert "another rank ended" in launched.said()
    assert state(endless) == "failed"
    assert two_hosts[0].python_processes() == []


def test_when_the_first_host_dies_the_others_end_with_1(endless: Path, two_hosts: list[Host], tmp_path: Path) -> None:
    launched = without_ssh(tmp_path, two_hosts, "job", "train", endless)
    wait_for_a_step(launched)
    assert two_hosts[1].python_processes()
    two_hosts[0].kill()
    assert launched.codes(NOTICED_S)[1] == 1
    assert two_hosts[1].python_processes() == []


def test_when_a_host_falls_silent_the_others_end_after_the_time_limit(
    endless: Path, two_hosts: list[Host], tmp_path: Path
) -> None:
    launched = without_ssh(tmp_path, two_hosts, "job", "train", endless, DEEPSPEED_TIMEOUT="1")  # minutes
    wait_for_a_step(launched)
    two_hosts[1].unplug()  # nobody is told that its connections are gone, unlike when only its processes die
    assert launched.running[0].wait(60 + NOTICED_S) == 1
    assert state(endless) == "failed"
