"""Asks this node what it is and what it can reach."""

import hashlib
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from job import __version__
from job.config import RunConfig, without_signatures
from job.hardware import count_gpus
from job.preflight.facts import Address, Clock, Facts, Gpu, promised, visible
from job.preflight.limit import begin
from job.preflight.reach import storage_fault

PORT = 29500
"""torch's own default."""
LIMIT_S = 25.0
LIBRARIES = ("transformers", "peft", "bitsandbytes", "deepspeed")
HELD_DOWN = {"hw_thermal_slowdown": "hw_thermal_slowdown", "hw_power_brake_slowdown": "hw_power_brake"}
"""nvidia-smi's names, and ours."""

Say = Callable[[str], None]


def probe(config: RunConfig, env: Mapping[str, str], port: int, say: Say, limit_s: float = LIMIT_S) -> Facts:
    """This node's facts.

    Args:
        env: the environment.
        port: the wanted one; the first free one from there on is told.
        say: hears why something could not be asked.
        limit_s: seconds that storage and nvidia-smi have for their answers, at the same time.
    """
    ends = time.monotonic() + limit_s
    asked = begin(lambda: storage_fault(config))
    clocks, driver = _clocks(say, limit_s)
    shm = _shm()
    memory = psutil.virtual_memory()
    try:
        storage = asked(max(ends - time.monotonic(), 0.0))
    except TimeoutError:
        storage = f"data.train or output.url did not answer within {limit_s:.0f} s. Check storage.endpoint and proxies"
    return Facts(
        node=node_name(env),
        visible=visible(env),
        promised=promised(env),
        gpus=_gpus(say),
        clocks=clocks,
        devices=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        versions=_versions(config, driver),
        memory_free_gib=memory.available / 2**30,
        cpus=len(os.sched_getaffinity(0)),
        shm_free_gib=shm[0],
        shm_total_gib=shm[1],
        time=time.time(),
        addresses=_addresses(),
        port=free_port(port),
        storage=storage,
    )


def node_name(env: Mapping[str, str]) -> str:
    """What the scheduler calls this node, else its host's name."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def free_port(wanted: int) -> int:
    """The first port from the wanted one on that can be listened on; 0 when none of a thousand can."""
    for port in range(wanted, min(wanted + 1000, 65536)):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: ended ones do not count
            try:
                listener.bind(("", port))
                listener.listen()
            except OSError:
                continue
            return port
    return 0


def _gpus(say: Say) -> tuple[Gpu, ...]:
    """All that torch can use; one that fails is left out, so that its node has fewer than promised."""
    found = []
    for index in range(count_gpus()):
        try:
            free, total = torch.cuda.mem_get_info(index)
            found.append(Gpu(torch.cuda.get_device_name(index), free / 2**30, total / 2**30))
        except RuntimeError as fault:
            say(f"GPU {index} cannot be used: {str(fault).splitlines()[0]}")
    return tuple(found)


def _clocks(say: Say, limit_s: float) -> tuple[tuple[Clock, ...], str]:
    """The clocks of the GPUs that torch sees, in its order (all that nvidia-smi shows, where they cannot be matched),
    and the driver's version; empty without nvidia-smi."""
    ends = time.monotonic() + limit_s
    words = ["nvidia-smi", "--format=csv,noheader,nounits"]
    for reasons in ("clocks_event_reasons", "clocks_throttle_reasons"):  # drivers before 535 know the second alone
        asked = ["uuid", "driver_version", "clocks.max.sm", *(f"{reasons}.{name}" for name in HELD_DOWN)]
        query = f"--query-gpu={','.join(asked)}"
        left_s = max(ends - time.monotonic(), 0.1)
        try:
            done = subprocess.run([*words, query], capture_output=True, text=True, timeout=left_s)  # noqa: S603
        except FileNotFoundError:
            return (), ""
        except (OSError, subprocess.TimeoutExpired) as fault:
            say(f"nvidia-smi: {fault}")
            return (), ""
        if done.returncode == 0:
            return read_clocks(done.stdout, _uuids())
    say(f"nvidia-smi: {(done.stdout + done.stderr).strip()[:200]}")
    return (), ""


def read_clocks(answer: str, uuids: list[str]) -> tuple[tuple[Clock, ...], str]:
    """nvidia-smi's lines as clocks, those of `uuids` alone if they are among them, and the driver's version."""
    found: dict[str, Clock] = {}
    driver = ""
    for line in filter(None, answer.splitlines()):
        uuid, driver, most, *active = (cell.strip() for cell in line.split(","))
        held = tuple(name for name, state in zip(HELD_DOWN.values(), active, strict=False) if state == "Active")
        found[uuid.removeprefix("GPU-")] = Clock(int(most) if most.isdecimal() else 0, held)
    ours = [found[uuid] for uuid in uuids if uuid in found]
    return tuple(ours if uuids and len(ours) == len(uuids) else found.values()), driver


def _uuids() -> list[str]:
    try:
        return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count_gpus())]
    except RuntimeError:  # a GPU that fails: `_gpus` says so
        return []


def _versions(config: RunConfig, driver: str) -> dict[str, str]:
    cuda = torch.version.cuda
    found = {
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {cuda})" if cuda else torch.__version__,
        "job": __version__,
        "code": _digest(*(path.read_bytes() for path in sorted(Path(__file__).parent.parent.rglob("*.py")))),
        "settings": _digest(json.dumps(without_signatures(config), sort_keys=True).encode()),
    }
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    if driver:
        found["driver"] = driver
    if cuda:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def _digest(*contents: bytes) -> str:
    """Twelve hexadecimal digits of the SHA-256 over all of them."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(content)
    return digest.hexdigest()[:12]


def _shm() -> tuple[float, float]:
    """Free and total GiB of the shared memory; 0 where there is none."""
    try:
        there = os.statvfs("/dev/shm")  # noqa: S108 - looked at, nothing is written there
    except OSError:
        return 0.0, 0.0
    return there.f_bavail * there.f_frsize / 2**30, there.f_blocks * there.f_frsize / 2**30


def _addresses() -> tuple[Address, ...]:
    """Those of interfaces that are up, but loopback and those that only mean something on one cable."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return tuple(
        Address(name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if name in up
        and entry.family in (socket.AF_INET, socket.AF_INET6)
        and not entry.address.startswith(("127.", "::1", "fe80"))
    )
