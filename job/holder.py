"""A process as others can find it again: who holds an output folder, and whether it still lives."""

import json
import math
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self
from uuid import uuid4


@dataclass(frozen=True)
class Holder:
    """Who holds a folder: what a lease file says.

    Args:
        id: of this one lease, never used again.
        job_id: the scheduler's, which a job keeps when it is started again.
        attempt: how often the scheduler had started the job again; None without a scheduler that counts.
        boot_id, pid_namespace: with `host` they say where `pid` means this process; None where Linux does not say.
        started: of the process, clock ticks after boot: setting the host's clock does not change it.
        ttl_s: seconds without a renewal after which the lease may be taken over.
        renewals: how many there were.
    """

    id: str
    job_id: str | None
    host: str
    boot_id: str | None
    pid_namespace: str | None
    pid: int
    started: int | None
    ttl_s: float
    attempt: int | None
    renewals: int = 0

    @classmethod
    def here(cls, job_id: str | None, ttl_s: float, attempt: int | None = None) -> Self:
        """This process, with a new id."""
        boot_id = namespace = started = None
        with suppress(OSError):  # no Linux: nobody can tell then whether this process lives
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115  # no path: pid:[4026531836]
            started = _process(os.getpid())[1]
        host = socket.gethostname()
        return cls(uuid4().hex, job_id, host, boot_id, namespace, os.getpid(), started, ttl_s, attempt)

    @classmethod
    def parse(cls, content: bytes) -> Self | None:
        """What a lease file says; None when it is damaged."""
        try:
            values = json.loads(content)
            holder = cls(**{field.name: values[field.name] for field in fields(cls)})
            sound = 0 < holder.pid < 2**31 and 0 < holder.ttl_s < math.inf
        except (ValueError, TypeError, KeyError):  # ValueError: no JSON, no UTF-8
            return None
        return holder if sound else None

    def content(self) -> bytes:
        """The lease file."""
        return json.dumps(asdict(self), indent=1).encode()

    def is_before(self, me: "Holder") -> bool:
        """Whether `me` is the same job, which the scheduler has started again since: it ended this one first."""
        if self.job_id is None or self.attempt is None or me.attempt is None:
            return False
        return self.job_id == me.job_id and self.attempt < me.attempt

    def lives(self, seen_by: "Holder") -> bool | None:
        """Whether this process lives; None when it is on another host, or hidden."""
        places = [(each.host, each.boot_id, each.pid_namespace) for each in (self, seen_by)]
        if places[0] != places[1] or None in places[0]:
            return None
        try:
            os.kill(self.pid, 0)  # asks only
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's
            pass
        try:
            state, started = _process(self.pid)
        except OSError:  # /proc mounted with hidepid
            return None
        return state not in "ZX" and started == self.started

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}" + (f", job {self.job_id}" if self.job_id else "")


def _process(pid: int) -> tuple[str, int]:
    """State and start of a process, the latter in clock ticks after boot. psutil adds the host's clock to these."""
    state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return state, int(rest[18])
