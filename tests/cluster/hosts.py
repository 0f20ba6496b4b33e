"""Several hosts on this machine: each has its own processes, name, network, loopback and sshd; they share its disk.

A host is a set of Linux namespaces whose first process is its sshd; the switch between them is a bridge in a network
namespace of its own. Nothing is made in this machine's network, so that clusters side by side cannot collide, and all
of it is gone as soon as its processes are, which the kernel ends together with whoever started them.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.conftest import REPOSITORY

PACKAGES = {
    "ip": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "shellcheck": "shellcheck",
    "debootstrap": "debootstrap",
    "buildah": "buildah",
    "podman": "podman",
    "runc": "runc",
}
"""The commands that it takes, and Debian's packages that bring them."""

ENV = {**os.environ, "PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL")
BECOME_HOST = """
set -e
hostname "$0"
mount --bind "$1/hosts.$0" /etc/hosts
mount --bind "$1/ssh_config" /etc/ssh/ssh_config
mount -t tmpfs tmpfs /run
mkdir /run/sshd
ip link set lo up
exec "$(command -v sshd)" -D -f "$1/sshd_config" -E "$1/sshd.$0.log"
"""
SSH_CONFIG = """
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SSHD_CONFIG = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PidFile none
"""


def missing() -> list[str]:
    """What this machine lacks for hosts, and what to do about it."""
    packages = sorted({package for tool, package in PACKAGES.items() if not shutil.which(tool, path=ENV["PATH"])})
    lacks = [] if os.geteuid() == 0 else ["namespaces need root"]
    return lacks + ([f"apt-get install {' '.join(packages)}"] if packages else [])


@dataclass(frozen=True)
class Host:
    """One host; `pid` is its first process as seen from here, which goes when `keeper` does."""

    name: str
    address: str
    pid: int
    keeper: int
    switch: int

    def command(self, *words: str | Path, cwd: Path = REPOSITORY) -> list[str]:
        """`words` as a command here that runs them there, in `cwd`."""
        inside = ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid"]
        return [*inside, "env", f"--chdir={cwd}", *map(str, words)]

    def start(
        self, *words: str | Path, env: Mapping[str, str], log: Path, cwd: Path = REPOSITORY
    ) -> subprocess.Popen[bytes]:
        """A command on this host, both its outputs in the file `log`."""
        with open(log, "wb") as out:
            return subprocess.Popen(
                self.command(*words, cwd=cwd), env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def python_processes(self) -> list[int]:
        """The pids of what Python runs there."""
        there = _namespace(self.pid, "pid")
        found = []
        for process in psutil.process_iter():
            try:
                same = process.name().startswith("python") and _namespace(process.pid, "pid") == there
                if same and alive(process.pid):
                    found.append(process.pid)
            except (OSError, psutil.Error):
                continue  # it has just ended
        return found

    def unplug(self) -> None:
        """From now on nothing that it sends arrives, nor does anything arrive there."""
        _in_network(self.switch, "ip", "link", "set", f"to-{self.name}", "down")

    def kill(self) -> None:
        """End all its processes at once."""
        os.kill(self.keeper, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether this process runs; one that has ended and was not yet asked about does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def hosts(count: int, folder: Path, *more: str) -> Iterator[list[Host]]:
    """Bring up `count` hosts named n1, n2, ..., all gone at the end, however that comes.

    Args:
        folder: an empty one for their keys, settings and logs.
        more: names of further hosts, which come after these.
    """
    names = [*(f"n{number}" for number in range(1, count + 1)), *more]
    addresses = {name: f"10.0.0.{number}" for number, name in enumerate(names, start=1)}
    _write_settings(folder, addresses)
    with ExitStack() as stack:
        switch = stack.enter_context(_started("unshare", "--net", "sleep", "infinity"))
        _wait_until(lambda: _namespace(switch.pid, "net") != _namespace(os.getpid(), "net"))
        _in_network(switch.pid, "ip", "link", "add", "switch", "up", "type", "bridge")
        yield [stack.enter_context(_host(name, address, switch.pid, folder)) for name, address in addresses.items()]


@contextmanager
def _host(name: str, address: str, switch: int, folder: Path) -> Iterator[Host]:
    namespaces = ("--net", "--uts", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child")
    with _started("unshare", *namespaces, "sh", "-c", BECOME_HOST, name, str(folder)) as around:
        _wait_until(lambda: psutil.Process(around.pid).children())
        host = Host(name, address, psutil.Process(around.pid).children()[0].pid, around.pid, switch)
        port = f"to-{name}"
        cable = ("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        _in_network(switch, *cable)
        _in_network(switch, "ip", "link", "set", port, "up", "master", "switch")
        _in_network(host.pid, "ip", "address", "add", f"{address}/24", "dev", "eth0")
        _in_network(host.pid, "ip", "link", "set", "eth0", "up")
        _wait_until(lambda: "listening" in Path(folder, f"sshd.{name}.log").read_text())
        try:
            yield host
        finally:
            host.kill()
            _wait_until(lambda: not alive(host.pid))  # its first process is the last one there to end


@contextmanager
def _started(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*DIE_WITH_US, *words], stdin=subprocess.DEVNULL, env=ENV)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _write_settings(folder: Path, addresses: Mapping[str, str]) -> None:
    for own in addresses:
        # as Debian's installer writes it: a host's own name is an address that nobody else can reach
        lines = ["127.0.0.1 localhost", f"127.0.1.1 {own}"]
        lines += [f"{address} {name}" for name, address in addresses.items() if name != own]
        Path(folder, f"hosts.{own}").write_text("\n".join(lines) + "\n")
        Path(folder, f"sshd.{own}.log").touch()
    Path(folder, "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
    Path(folder, "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)


def _in_network(pid: int, *words: str) -> None:
    subprocess.run(["nsenter", f"--target={pid}", "--net", *words], check=True, env=ENV)


def _namespace(pid: int, kind: str) -> str:
    return str(Path(f"/proc/{pid}/ns/{kind}").readlink())


def _wait_until(condition: Callable[[], object], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("a host did not come up, or did not go")
        time.sleep(0.01)
