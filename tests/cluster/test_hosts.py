"""What the other tests here rely on: hosts are apart as machines are, joined by a network and a disk."""

import subprocess
from pathlib import Path

import pytest

from tests.cluster.hosts import PACKAGES, Host, alive, hosts, missing

STAY = ("sh", "-c", "echo up; exec sleep 60")
LISTEN = """
import socket
server = socket.create_server(("127.0.0.1", 7777))
server.settimeout(20)
print("up", flush=True)
server.accept()
"""


def said(host: Host, *words: str) -> str:
    return subprocess.run(host.command(*words), capture_output=True, text=True, timeout=20).stdout


def started(host: Host, *words: str) -> subprocess.Popen[bytes]:
    """A command there that has said that it is up."""
    process = subprocess.Popen(host.command(*words), stdout=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"up\n"
    return process


def test_hosts_reach_each_other_by_name(two_hosts: list[Host]) -> None:
    assert said(two_hosts[0], "ssh", "n2", "hostname -I").split() == ["10.0.0.2"]
    assert said(two_hosts[1], "ssh", "n1", "hostname -I").split() == ["10.0.0.1"]


def test_a_hosts_loopback_is_its_own(two_hosts: list[Host]) -> None:
    first, second = two_hosts
    with started(first, "python3", "-c", LISTEN):
        connect = ("python3", "-c", "import socket; socket.create_connection(('127.0.0.1', 7777)); print('reached')")
        assert said(second, *connect) == ""
        assert said(first, *connect) == "reached\n"


def test_a_killed_host_is_gone_and_the_other_stays(two_hosts: list[Host]) -> None:
    first, second = two_hosts
    running = started(second, *STAY)
    second.kill()
    assert running.wait(20) != 0
    assert subprocess.run(first.command("ssh", "-o", "ConnectTimeout=3", "n2", "true")).returncode == 255
    assert said(first, "hostname") == "n1\n"


def test_clusters_side_by_side_do_not_see_each_other(two_hosts: list[Host], tmp_path: Path) -> None:
    folder = tmp_path / "others"
    folder.mkdir()
    with hosts(1, folder) as (other,):
        assert said(other, "hostname") == said(two_hosts[0], "hostname")
        two_hosts[0].unplug()
        assert subprocess.run(other.command("ssh", "-o", "ConnectTimeout=3", "10.0.0.2", "true")).returncode == 255
        assert said(other, "ssh", "10.0.0.1", "hostname") == "n1\n"


def test_nothing_of_a_host_is_left_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), hosts(1, tmp_path) as (host,):
        running = started(host, *STAY)
        raise ZeroDivisionError
    assert running.wait(5) != 0
    assert not alive(host.pid)


def test_missing_commands_are_named_by_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda tool, path: None)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert missing() == ["namespaces need root", f"apt-get install {' '.join(sorted(set(PACKAGES.values())))}"]
