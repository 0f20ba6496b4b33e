"""A SLURM of its own for a test: real daemons on hosts of this machine, and the commands that users have.

Each host runs munged and slurmd, one more named ctl runs slurmctld. What they write, but for their logs, lies in their
hosts' own /run: it goes with them, and its sockets' paths stay short. Being processes of hosts, they end as these do.
"""

import os
import secrets
import stat
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import ENV, Host, hosts
from tests.conftest import REPOSITORY

CONTROLLER = "ctl"
COMMAND_S = 30
OWN_ENV = {name: value for name, value in ENV.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
"""What tests start with: inside a job of a real SLURM its variables would be options here."""

ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "PREEMPTED"}
)

RUN_MUNGED = """
set -e
mkdir -m 755 /run/munge
install -m 400 "$0" /run/munge/key
exec munged --foreground --key-file=/run/munge/key --seed-file=/run/munge/seed --pid-file=/run/munge/pid
"""
RUN_DAEMON = 'mkdir -p /run/slurm && exec "$0" -D'
SLURM_CONF = """
ClusterName=test
SlurmctldHost={controller.name}({controller.address})
SlurmUser=root
StateSaveLocation=/run/slurm/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
AuthType=auth/munge
AuthInfo=cred_expire={requeue_s}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
EnforcePartLimits=ALL
JobRequeue=1
SlurmdParameters=config_overrides
SlurmdTimeout=10
MessageTimeout=5
ReturnToService=2
KillWait={kill_wait_s}
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
DefMemPerCPU={memory_per_cpu_mb}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
PartitionName=short Nodes=ALL MaxTime=1:00:00
{more}
"""


@dataclass(frozen=True)
class Cluster:
    """A running SLURM: its nodes by their names, and the host that users' commands run on."""

    folder: Path
    hosts: dict[str, Host]
    controller: Host

    def command(
        self, *words: str | Path, cwd: Path = REPOSITORY, env: Mapping[str, str] = OWN_ENV
    ) -> subprocess.CompletedProcess[str]:
        """What a command on the controller's host said, however it ended."""
        command = self.controller.command(*words, cwd=cwd)
        env = {**env, "SLURM_CONF": str(self.folder / "slurm.conf")}
        return subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S
        )

    def sbatch(self, *words: str | Path, cwd: Path, env: Mapping[str, str] = OWN_ENV) -> int:
        """Submit a job; its number."""
        done = self.command("sbatch", "--parsable", *words, cwd=cwd, env=env)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def refused(self, *words: str | Path, cwd: Path = REPOSITORY, env: Mapping[str, str] = OWN_ENV) -> str:
        """What sbatch says of a job that it does not take."""
        done = self.command("sbatch", "--parsable", *words, cwd=cwd, env=env)
        assert done.returncode != 0, f"job {done.stdout.strip()} was accepted"
        return done.stderr

    def field(self, job_id: int, name: str) -> str:
        """One field of a job as `scontrol show job` calls it; it knows ended jobs as well."""
        for _ in range(3):  # a controller that is busy may leave one unanswered
            done = self.command("scontrol", "--oneliner", "show", "job", str(job_id))
            if done.returncode == 0:
                break
            time.sleep(1)
        assert done.returncode == 0, done.stderr
        return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)[name]

    def state(self, job_id: int) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        return self.field(job_id, "JobState")

    def exit_code(self, job_id: int) -> int:
        """With which code the job's script ended; 0 as well if a signal ended it."""
        return int(self.field(job_id, "ExitCode").split(":")[0])

    def restarts(self, job_id: int) -> int:
        """How often the job was put back into the queue."""
        return int(self.field(job_id, "Restarts"))

    def wait(self, job_id: int, states: Iterable[str] = ENDED, timeout_s: float = 60) -> str:
        """Wait until the job is in one of these states; in which."""
        wanted = set(states)
        seen = ""

        def reached() -> bool:
            nonlocal seen
            seen = self.state(job_id)
            return seen in wanted

        wait_until(reached, timeout_s, lambda: f"job {job_id} is {seen}, not {sorted(wanted)}\n{self.logs()}")
        return seen

    def wait_for_restart(self, job_id: int, restarts: int = 1, timeout_s: float = 90) -> None:
        """Wait until the job was put back into the queue this often, and runs again."""
        self.until(lambda: self.restarts(job_id) >= restarts and self.state(job_id) == "RUNNING", timeout_s)

    def hurry(self, job_id: int, restarts: int = 1, timeout_s: float = 90) -> None:
        """The same, without its wait in the queue: it starts soon after what it ran before has ended. At once would be
        too early: credentials bear seconds, and one from the second in which the last was revoked is taken for it."""
        waits_since: list[float] = []

        def runs() -> bool:
            state = self.state(job_id)
            waits_since[:] = waits_since or [time.monotonic()] if state == "PENDING" else []
            if waits_since and time.monotonic() - waits_since[0] > 2:
                self.command("scontrol", "update", f"JobId={job_id}", "StartTime=now")
            return state == "RUNNING" and self.restarts(job_id) >= restarts

        self.until(runs, timeout_s)

    def until(self, condition: Callable[[], object], timeout_s: float = 60) -> None:
        """Wait for what is neither a state nor a restart."""
        wait_until(condition, timeout_s, lambda: f"still not so\n{self.command('squeue').stdout}\n{self.logs()}")

    def node_state(self, name: str) -> str:
        """idle, mixed, allocated, down, ..., with SLURM's marks: down* does not answer."""
        return self.command("sinfo", "--noheader", "--Node", "--nodes", name, "--format=%T").stdout.split()[0]

    def logs(self) -> str:
        """The ends of what all daemons wrote."""
        return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(self.folder.glob("slurm*.log")))


@contextmanager
def slurm(
    folder: Path,
    nodes: Mapping[str, int],
    *,
    cpus: int = 4,
    memory_mb: int = 4000,
    requeue_s: int = 8,
    kill_wait_s: int = 5,
    more: str = "",
) -> Iterator[Cluster]:
    """Bring up a SLURM whose nodes are idle, all of it gone at the end, however that comes.

    Args:
        folder: an empty one for settings and logs.
        nodes: n1, n2, ... in this order, and how many GPUs each has: files of the kind that devices are. 0 is a node
            without the resource, not one of which none is left.
        cpus: that each node says it has.
        requeue_s: how long a requeued job waits before it may start again, which is as long as a permit to start its
            tasks holds: two minutes, unless this says otherwise.
        kill_wait_s: how long what was sent SIGTERM has until SIGKILL.
        more: lines at the end of slurm.conf.
    """
    assert list(nodes) == [f"n{number + 1}" for number in range(len(nodes))], "hosts are named so"
    with hosts(len(nodes), folder, CONTROLLER) as (*workers, controller):
        cluster = Cluster(folder, {host.name: host for host in workers}, controller)
        conf = SLURM_CONF.format(
            controller=controller,
            requeue_s=requeue_s,
            kill_wait_s=kill_wait_s,
            memory_per_cpu_mb=memory_mb // cpus,
            nodes="\n".join(_node(host, nodes[host.name], cpus, memory_mb) for host in workers),
            more=more,
        )
        (folder / "slurm.conf").write_text(conf)
        _make_gpus(folder, nodes)
        daemons = _start_daemons(cluster)
        try:
            wait_until(lambda: _all_idle(cluster), 30, cluster.logs)
            yield cluster
        finally:
            for host in (*workers, controller):
                host.kill()
            for daemon in daemons:
                daemon.wait(COMMAND_S)


def wait_until(condition: Callable[[], object], timeout_s: float, else_say: Callable[[], str]) -> None:
    """Look again and again until the condition holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, else_say()
        time.sleep(0.1)


def _node(host: Host, gpus: int, cpus: int, memory_mb: int) -> str:
    gres = f" Gres=gpu:{gpus}" if gpus else ""
    return f"NodeName={host.name} NodeAddr={host.address} CPUs={cpus} RealMemory={memory_mb}{gres}"


def _make_gpus(folder: Path, nodes: Mapping[str, int]) -> None:
    for number in range(max(nodes.values())):
        os.mknod(folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # each is another /dev/null
    lines = [f"NodeName={name} Name=gpu File={folder}/gpu[0-{count - 1}]\n" for name, count in nodes.items() if count]
    (folder / "gres.conf").write_text("".join(lines))


def _start_daemons(cluster: Cluster) -> list[subprocess.Popen[bytes]]:
    key = cluster.folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    env = {**OWN_ENV, "SLURM_CONF": str(cluster.folder / "slurm.conf")}
    everywhere = [cluster.controller, *cluster.hosts.values()]

    def start(host: Host, daemon: str, script: str, argument: str | Path) -> subprocess.Popen[bytes]:
        return host.start("sh", "-c", script, argument, env=env, log=cluster.folder / f"{daemon}.{host.name}.log")

    started = [start(host, "munged", RUN_MUNGED, key) for host in everywhere]
    for host in everywhere:
        look = host.command("test", "-S", "/run/munge/munge.socket.2")
        wait_until(lambda look=look: not subprocess.call(look), 20, lambda: "munged did not come up")
    started.append(start(cluster.controller, "slurmctld", RUN_DAEMON, "slurmctld"))
    return started + [start(host, "slurmd", RUN_DAEMON, "slurmd") for host in cluster.hosts.values()]


def _all_idle(cluster: Cluster) -> bool:
    idle = cluster.command("sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N %T")
    return sorted(idle.stdout.split("\n")[:-1]) == sorted(f"{name} idle" for name in cluster.hosts)
