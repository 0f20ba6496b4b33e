"""From what SLURM gave to what DeepSpeed starts: hostfiles, the GPUs of each rank, the address where ranks meet."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from job.errors import ConfigError, InputError, JobError
from job.launch.slurm.allocation import HOSTFILE, Node, Start, address_of_first, hostfile, nodes_of, own_gpus
from job.preflight.facts import Facts, Gpu
from tests.conftest import REPOSITORY
from tests.ranks import free_port

GOLDEN = REPOSITORY / "tests/golden/slurm"
UUIDS = ("GPU-8a5c1d2e-0f11-42aa-93d5-6f2f0c1b7e10", "GPU-1b0e77c4-9a34-4d1c-8f57-2d9b64a1c3f2")
PARTS = ("MIG-1f4c9e4a-5f0c-5b7e-8d8e-0c8f5f1f2f3a", "MIG-7d1d2b6e-3a0f-5c11-9b60-77a4a9be4c55")


def said(node: str, visible: Sequence[str] | None = None, gpus: int | None = None) -> Facts:
    """What a good node says: CUDA_VISIBLE_DEVICES there, and the number of GPUs that torch sees."""
    count = len(visible or ()) if gpus is None else gpus
    return Facts(
        node=node,
        visible=None if visible is None else tuple(visible),
        promised=None if visible is None else len(visible),
        gpus=(Gpu("H200", 139.0, 140.0),) * count,
        clocks=(),
        devices=count,
        versions={"torch": "2.13.0"},
        memory_free_gib=500.0,
        cpus=16,
        shm_free_gib=100.0,
        shm_total_gib=100.0,
        time=1000.0,
        addresses=(),
        port=12017,
        storage="",
    )


def numbers(*found: int) -> tuple[str, ...]:
    return tuple(map(str, found))


def allocated(shared_out: str, *names: str) -> str:
    """The file `allocation` of slurm/job.sh."""
    return "".join(f"{name} 10.0.0.{number} {shared_out}\n" for number, name in enumerate(names, 1))


Case = tuple[str, list[Facts], Literal["all"] | int, Sequence[str], list[tuple[str, ...]]]
CASES: dict[str, Case] = {
    "equal": (
        allocated("gpu:h200:8(S:0-1)", "n1", "n2"),
        [said("n2", numbers(*range(8))), said("n1", numbers(*range(8)))],
        "all",
        (),
        [numbers(*range(8))] * 2,
    ),
    "unequal": (
        "n1 10.0.0.1 gpu:4\nn2 10.0.0.2 gpu:2\n",
        [said("n1", numbers(0, 1, 2, 3)), said("n2", numbers(0, 1))],
        "all",
        (),
        [numbers(0, 1, 2, 3), numbers(0, 1)],
    ),
    "shared": (
        allocated("gpu:4", "n1", "n2"),
        [said("n1", numbers(2, 3)), said("n2", numbers(0, 1))],
        "all",
        (),
        [numbers(2, 3), numbers(0, 1)],
    ),
    "ids": (allocated("gpu:4", "n1", "n2"), [said("n1", UUIDS), said("n2", PARTS[:1])], "all", (), [UUIDS, PARTS[:1]]),
    "unmanaged": (
        allocated("(null)", "n1", "n2"),
        [said("n1", gpus=2), said("n2", gpus=4)],
        2,
        (),
        [numbers(0, 1), numbers(0, 1)],
    ),
    "cpu": (allocated("(null)", "n1", "n2"), [said("n1"), said("n2", ())], "all", (), [(), ()]),
    "cpu_two": (allocated("gpu:4", "n1", "n2"), [said("n1"), said("n2", ())], 2, (), [(), ()]),
    "left_out": (
        allocated("gpu:4", "n1", "n2", "n3"),
        [said(name, numbers(0, 1, 2, 3)) for name in ("n1", "n2", "n3")],
        "all",
        ("n2",),
        [numbers(0, 1, 2, 3)] * 2,
    ),
    "order": (allocated("(null)", "gpu-010", "gpu-009"), [], "all", (), [(), ()]),
}


def found(name: str) -> tuple[Node, ...]:
    allocation, facts, processes, without, _ = CASES[name]
    return nodes_of(allocation, facts, processes, without)


def start_of(*nodes: Node) -> Start:
    return Start("17", ("run.yaml", "lora.rank=8"), "s3://bucket/ü", "2026-11-21T10:00:00+00:00", 3, nodes)


@pytest.mark.parametrize("name", CASES)
def test_hostfiles_are_what_they_were_and_deepspeed_reads_them(name: str, tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    nodes = found(name)
    text = hostfile(nodes)
    assert text == (GOLDEN / f"hostfile_{name}.txt").read_text()
    (tmp_path / HOSTFILE).write_text(text)
    read = fetch_hostfile(str(tmp_path / HOSTFILE))
    assert list(read.items()) == [(node.name, node.slots) for node in nodes], "in this order"


@pytest.mark.parametrize("name", CASES)
def test_each_node_gets_its_own_gpus(name: str) -> None:
    start = start_of(*found(name))
    # DeepSpeed has put its own count there
    seen = [own_gpus(start, {"CROSS_RANK": str(n), "CUDA_VISIBLE_DEVICES": "0,1"}) for n in range(len(start.nodes))]
    assert seen == [{"CUDA_VISIBLE_DEVICES": ",".join(gpus)} for gpus in CASES[name][4]]


def test_addresses_are_the_schedulers() -> None:
    assert [(node.name, node.address) for node in found("left_out")] == [("n1", "10.0.0.1"), ("n3", "10.0.0.3")]


RANK = (
    "import os, sys; from pathlib import Path; from job.launch.slurm.allocation import Start, own_gpus; "
    "gpus = own_gpus(Start.read(Path(sys.argv[1])), os.environ)['CUDA_VISIBLE_DEVICES']; "
    "said = [*(os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')), gpus]; "
    "os.write(1, (' '.join(said) + '\\n').encode())"
)


@pytest.mark.parametrize(
    ("node", "ranks"),
    [
        (0, ["0 0 5 2,3", "1 1 5 2,3"]),
        (1, ["2 2 5 0,1,5", "3 0 5 0,1,5", "4 1 5 0,1,5"]),  # its own way to count, and each number is there once
    ],
)
def test_deepspeeds_own_launcher_starts_each_nodes_ranks_with_its_gpus(
    node: int, ranks: list[str], tmp_path: Path
) -> None:
    facts = [said("n1", numbers(2, 3)), said("n2", numbers(0, 1, 5))]
    nodes = nodes_of(allocated("gpu:8", "n1", "n2"), facts, "all")
    start_of(*nodes).save(tmp_path)
    (tmp_path / HOSTFILE).write_text(hostfile(nodes))
    launcher = [Path(sys.executable).parent / "deepspeed", "--hostfile", tmp_path / HOSTFILE, "--quiet", "--no_ssh"]
    where = [f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    own = ["--no_python", "--no_local_rank", sys.executable, "-c", RANK, tmp_path]
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [*launcher, *where, *own], capture_output=True, text=True, timeout=120, env=env, cwd=REPOSITORY
    )
    assert done.returncode == 0 and sorted(done.stdout.splitlines()) == ranks, done


@pytest.mark.parametrize("gpus", [1, 4])
def test_gpus_that_nobody_asked_for_are_refused_where_they_are_shared_out(gpus: int) -> None:
    facts = [said("n1", numbers(0)), said("n2", gpus=gpus)]
    with pytest.raises(InputError) as refused:
        nodes_of(allocated("gpu:4", "n1", "n2"), facts, "all")
    assert str(refused.value) == (
        f"n2 has {gpus} GPUs, and this job asked for none. Ask for them: sbatch --gpus-per-node={gpus}, or "
        "SBATCH_GPUS_PER_NODE in slurm/site.sh"
    )
    assert nodes_of(allocated("gpu:4", "n1", "n2"), facts, "all", ["n2"])


def test_a_node_with_fewer_gpus_than_processes_is_named() -> None:
    with pytest.raises(ConfigError) as refused:
        nodes_of(allocated("gpu:4", "n1", "n2"), [said("n1", numbers(0, 1)), said("n2", numbers(3))], 2)
    assert (
        str(refused.value) == "1 problem in the settings for n2\n  parallel.processes: 2, and here are 1 GPUs. Use all"
    )


def test_several_ranks_on_parts_of_gpus_are_refused_and_one_is_not() -> None:
    facts = [said("n1", PARTS)]
    with pytest.raises(InputError) as refused:
        nodes_of(allocated("gpu:4", "n1"), facts, "all")
    assert str(refused.value) == (
        "n1 gave 2 parts of GPUs (MIG), and several ranks cannot have one each: CUDA shows a process only the first. "
        "Ask for whole GPUs or one part a node, or set parallel.processes=1"
    )
    (node,) = nodes_of(allocated("gpu:4", "n1"), facts, 1)
    assert own_gpus(start_of(node), {"CROSS_RANK": "0"}) == {"CUDA_VISIBLE_DEVICES": PARTS[0]}


def test_a_node_with_gpus_that_said_nothing_is_named_and_does_not_train_on_its_cpu() -> None:
    with pytest.raises(JobError) as refused:
        nodes_of(allocated("gpu:4", "n1", "n2"), [said("n1", numbers(0))], "all")
    assert str(refused.value) == "n2 said nothing, and so not which of its GPUs are this job's. Leave it out"
    assert nodes_of(allocated("gpu:4", "n1", "n2"), [said("n1", numbers(0))], "all", ["n2"])


@pytest.mark.parametrize(("allocation", "without"), [("", ()), (allocated("(null)", "n1", "n2"), ("n2", "n1"))])
def test_without_a_node_there_is_no_run(allocation: str, without: Sequence[str]) -> None:
    with pytest.raises(InputError) as refused:
        nodes_of(allocation, [], "all", without)
    assert str(refused.value) == "no node is left to run on. Repair those that were named, or ask for others"


def test_ranks_of_one_node_meet_on_it() -> None:
    assert address_of_first([Node("n1", "10.0.0.1")], "n1") == "127.0.0.1"


def own_address() -> str:
    """An address of this machine that is not loopback."""
    here = [
        place.address for each in psutil.net_if_addrs().values() for place in each if place.family == socket.AF_INET
    ]
    found = next((address for address in here if not address.startswith("127.")), "")
    return found or pytest.skip("this machine has no address but loopback")


def test_the_first_node_gives_the_address_from_which_it_speaks_to_the_second() -> None:
    own = own_address()
    assert address_of_first([Node("n1", "127.0.1.1"), Node("n2", own)], "n1") == own


@pytest.mark.parametrize("second", ["127.0.0.1", "localhost", "no-such-host.invalid"])
def test_where_that_is_loopback_or_unknown_the_schedulers_address_is_taken(second: str) -> None:
    assert address_of_first([Node("n1", "name-of-n1"), Node("n2", second)], "n1") == "name-of-n1"


def test_another_node_gives_the_schedulers_address_of_the_first() -> None:
    assert address_of_first([Node("n1", "name-of-n1"), Node("n2", own_address())], "n0") == "name-of-n1"


def test_a_start_is_read_back(tmp_path: Path) -> None:
    for start in (start_of(), start_of(*found("ids"))):
        start.save(tmp_path)
        assert Start.read(tmp_path) == start
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]
    assert "s3://bucket/ü" in (tmp_path / "job.json").read_text(), "for people, too"


def damaged(**changed: Any) -> str:
    good: dict[str, Any] = {"job": "1", "words": [], "output": "", "before": "", "step": 0, "nodes": []}
    return json.dumps({name: value for name, value in {**good, **changed}.items() if value is not None})


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        damaged()[:-5],
        "[]",
        "null",
        damaged(words=None),
        damaged(more=1),
        damaged(nodes=["n1"]),
        damaged(nodes=[{"name": "n1", "address": "n1"}]),
        damaged(nodes=[{"gpus": []}]),
    ],
)
def test_a_start_that_is_not_there_or_damaged_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "job.json").write_text(content)
    with pytest.raises(JobError) as refused:
        Start.read(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/job.json cannot be read (")
    assert str(refused.value).endswith("). Is this folder on all nodes?")


def test_nobody_reads_half_a_start(tmp_path: Path) -> None:
    long = start_of(*(Node(f"n{number}", f"10.0.0.{number}", PARTS, 2) for number in range(2000)))
    long.save(tmp_path)

    def save() -> None:
        for number in range(30):
            replace(long, step=number).save(tmp_path)

    writer = threading.Thread(target=save)
    writer.start()
    try:
        while writer.is_alive():
            assert Start.read(tmp_path).nodes == long.nodes
    finally:
        writer.join()
