"""The check before a run over several hosts: they exchange through their network, and one without is named."""

from collections.abc import Callable
from pathlib import Path

from tests.cluster.hosts import Host
from tests.cluster.launching import over_ssh, with_torchrun, without_ssh

RunFile = Callable[..., Path]


def test_hosts_that_get_along_are_good(run_of: RunFile, two_hosts: list[Host], tmp_path: Path) -> None:
    launched = over_ssh(tmp_path, two_hosts, "job", "preflight", run_of("ssh"), slots=2)
    assert launched.codes() == [0], launched.said()
    said = launched.said()
    assert all(f"{group}: " in said for group in ("node n1 alone", "node n2 alone", "n1 and n2")), said
    assert "preflight: nothing speaks against the run" in said


def test_torchrun_on_each_host(run_of: RunFile, two_hosts: list[Host], tmp_path: Path) -> None:
    launched = with_torchrun(tmp_path, two_hosts, "job", "preflight", run_of("torchrun"))
    assert launched.codes() == [0, 0] and "n1 and n2: " in launched.said(), launched.said()


def test_a_host_without_a_network_is_named(run_of: RunFile, two_hosts: list[Host], tmp_path: Path) -> None:
    two_hosts[1].unplug()
    words = ("job", "preflight", run_of("cut"), "--nodes", "n1,n2", "--timeout", "8")
    launched = without_ssh(tmp_path, two_hosts, *words)
    assert launched.codes() == [1, 1], launched.said()
    first, second = (log.read_text() for log in launched.logs)
    assert "n2: rank 1 did not come within 8 s." in first and "preflight: repair or leave out n2" in first, first
    assert f"the first rank's {two_hosts[0].address}:" in second and "could not be reached within 8 s" in second, second
