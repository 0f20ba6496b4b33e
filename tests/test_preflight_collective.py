"""The exchange before a run: who is named when ranks do not come, hang, die, are slow or sum up wrongly."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest

from job.errors import JobError
from job.preflight.findings import (
    Found,
    absent,
    broken,
    hung,
    judge_devices,
    judge_opening,
    judge_rounds,
    read_found,
    report,
)
from job.preflight.judge import Verdict
from job.preflight.rounds import Node, Round, nodes_of, rounds_of
from tests.conftest import REPOSITORY
from tests.forked import NO_GPU, Command, Done, run
from tests.ranks import free_port, run_ranks

RunFile = Callable[..., Path]
GOOD = "preflight: nothing speaks against the run"
PATCHED = """
import os, sys, time
import torch.distributed as dist
all_reduce = dist.all_reduce
def patched(tensor, *arguments, **named):
    if tensor.numel() == 1:
        return all_reduce(tensor, *arguments, **named)
    {}
dist.all_reduce = patched
import job.preflight.collective
open(os.environ["READY"], "w").close()
sys.argv = ["qlora", *sys.argv[1:]]
from job.cli import main
main()
"""
WRONG_SUM = "done = all_reduce(tensor, *arguments, **named); tensor[7] += 1; return done"
WRONG_PART = "tensor[7] += 1; return all_reduce(tensor, *arguments, **named)"
HANGS = "time.sleep(1000)"
DIES = "os._exit(9)"
FAILS = "raise RuntimeError('NIC mlx5_3 is down')"


def run_patched(path: Path, tmp_path: Path, last: str, count: int = 2, here: int = 1, *words: str) -> list[Done]:
    """Ranks of the check, of which the last one's all-reduce does what `last` says: it has imported what it takes when
    the others, which are forked from a process that has, begin to wait for it."""
    place = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    names = ",".join("abcdef"[: count // here])
    words = ("preflight", str(path), "--nodes", names, "--timeout", "40", *words)

    def env(rank: int) -> dict[str, str]:
        return {name: str(n) for name, n in {**place, "RANK": rank, "LOCAL_RANK": rank % here}.items()}

    with ExitStack() as stack:
        patched = subprocess.Popen(
            [sys.executable, "-c", PATCHED.format(last), *words],
            env={**os.environ, **NO_GPU, **env(count - 1), "READY": str(tmp_path / "ready")},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.callback(patched.kill)
        while not (tmp_path / "ready").exists():
            assert patched.poll() is None, patched.communicate()
            time.sleep(0.05)
        ranks = [stack.enter_context(Command(*words, env=env(rank))) for rank in range(count - 1)]
        done = [rank.wait() for rank in ranks]
        out, err = patched.communicate(timeout=60)
        return [*done, Done(patched.returncode, out, err)]


@pytest.mark.parametrize(("count", "here"), [(2, 2), (2, 1), (4, 2)])
def test_ranks_that_get_along_are_good_and_the_first_one_reports(run_file: RunFile, count: int, here: int) -> None:
    done = run_ranks(count, "preflight", run_file(), per_node=here)
    assert [one.code for one in done] == [0] * count, done
    lines = done[0].out.splitlines()
    assert lines[0] == "all-reduce of 4 MiB, bus bandwidth:" and lines[-1] == GOOD
    groups = (count // here if here > 1 else 0) + (count > here)
    assert sum(line.endswith(" GB/s") and not line.startswith("Warning") for line in lines) == groups
    assert not any(one.out or one.err for one in done[1:])


@pytest.mark.parametrize(
    "launcher",
    [("torchrun", "--standalone", "--nproc-per-node=2", "-m"), ("deepspeed", "--num_gpus", "2", "--module")],
    ids=lambda words: words[0],
)
def test_launchers_start_it(run_file: RunFile, launcher: tuple[str, ...]) -> None:
    name, *words = launcher
    port = ["--master_port", str(free_port())] if name == "deepspeed" else []
    env = {**os.environ, **NO_GPU, "DS_ACCELERATOR": "cpu"}  # or deepspeed looks for GPUs before it starts anything
    done = subprocess.run(
        [Path(sys.executable).parent / name, *port, *words, "job", "preflight", run_file()],
        env=env,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and GOOD in done.stdout.splitlines(), done
    assert " alone: " in done.stdout


def test_one_rank_has_nothing_to_exchange(run_file: RunFile) -> None:
    (done,) = run_ranks(1, "preflight", run_file())
    assert done.code == 0 and done.out.splitlines() == ["one rank: nothing to exchange with", GOOD], done


def test_workers_of_this_machine_are_started(run_file: RunFile) -> None:
    done = run("preflight", run_file(parallel={"processes": 2}))
    assert done.code == 0 and " alone: " in done.out and done.out.endswith(f"{GOOD}\n"), done
    assert run("preflight", run_file(output={"url": "/proc/runs"}), "parallel.processes=2").code == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [(("--nodes", "a,b"), "b"), ((), "the node of ranks 1..")],
    ids=["with names", "without"],
)
def test_a_rank_that_never_comes_is_named_in_time(run_file: RunFile, words: tuple[str, ...], named: str) -> None:
    begun = time.monotonic()
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0"}
    done = run("preflight", run_file(), "--timeout", "3", *words, env={**place, "MASTER_PORT": str(free_port())})
    assert done.code == 1 and time.monotonic() - begun < 30
    assert done.out.splitlines() == [
        f"{named}: rank 1 did not come within 3 s. Look whether it is up, runs the command and can reach the first "
        "node",
        f"preflight: repair or leave out {named}",
    ]


def test_a_first_rank_that_never_comes_is_said(run_file: RunFile) -> None:
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "RANK": "1", "LOCAL_RANK": "0"}
    port = free_port()
    done = run("preflight", run_file(), "--timeout", "2", env={**place, "MASTER_PORT": str(port)})
    assert done.code == 1 and done.err.startswith(
        f"JobError: the first rank's 127.0.0.1:{port} could not be reached within 2 s ("
    )


def test_ranks_without_an_address_are_refused(run_file: RunFile) -> None:
    done = run("preflight", run_file(), env={"WORLD_SIZE": "2", "RANK": "0"})
    assert done.code == 2 and "MASTER_ADDR is not set" in done.err


def test_a_node_with_a_fault_of_its_own_is_named_before_any_exchange(run_file: RunFile, tmp_path: Path) -> None:
    path = run_file(output={"url": "/proc/runs"})
    done = run_ranks(2, "preflight", path, "--nodes", "a,b", "--verdict", tmp_path / "verdict", per_node=1)
    assert [one.code for one in done] == [1, 1] and not done[1].out and not done[1].err, done
    assert done[0].out.startswith("a, b: output.url: /proc/runs") and "GB/s" not in done[0].out
    assert list(json.loads((tmp_path / "verdict").read_text())["faults"]) == ["a", "b"]


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (WRONG_SUM, ["b: rank 1: 1 sums of the all-reduce (a and b) came out wrong there"]),
        (WRONG_PART, ["a, b: the sums of the all-reduce (a and b) are wrong. Look at the network between them"]),
        (FAILS, ["b: rank 1: the all-reduce failed: RuntimeError: NIC mlx5_3 is down"]),
        (DIES, ["b: rank 1: ended, or fell silent, in the all-reduce"]),
    ],
    ids=["wrong sum", "wrong part", "fails", "dies"],
)
def test_two_nodes_of_which_one_is_bad(run_file: RunFile, tmp_path: Path, last: str, said: list[str]) -> None:
    # a node of one rank exchanges with nobody in the first round, where its patched call comes first
    alone = "if dist.get_world_size(named['group']) == 1: return all_reduce(tensor, *arguments, **named)\n    "
    done = run_patched(run_file(), tmp_path, alone + last)
    faults = [line for line in done[0].out.splitlines() if not line.startswith(("all-reduce", "  ", "preflight"))]
    assert faults == said, done
    assert [one.code for one in done] == [1, 9 if last == DIES else 1]


def test_a_node_that_hangs_by_itself_is_named(run_file: RunFile, tmp_path: Path) -> None:
    begun = time.monotonic()
    done = run_patched(run_file(), tmp_path, HANGS, 2, 1, "--timeout", "15")
    said = r"^b: the all-reduce of node b alone failed: no end within \d+ s. Look at NCCL's words \(NCCL_DEBUG=INFO\)$"
    assert re.search(said, done[0].out, re.MULTILINE), done
    assert [one.code for one in done] == [1, 1] and time.monotonic() - begun < 45
    stages = re.search(r"^  seconds: (.*)$", done[0].out, re.MULTILINE)
    assert stages and sum(float(stage.split()[-1]) for stage in stages[1].split(", ")) < 16, "all of them have 15 s"


def four(size: int = 1) -> tuple[Node, ...]:
    """Nodes a to d."""
    return tuple(Node(name, tuple(range(at * size, (at + 1) * size))) for at, name in enumerate("abcd"))


def test_nodes_are_told_apart_by_their_first_ranks() -> None:
    places = [("x", 0), ("x", 1), ("y", 0), ("z", 0), ("z", 1)]
    assert nodes_of(places, ()) == (Node("x", (0, 1)), Node("y", (2,)), Node("z", (3, 4)))
    assert [node.name for node in nodes_of(places, ["a", "b", "c"])] == ["a", "b", "c"]
    assert [node.name for node in nodes_of(places, ["a"])] == ["x", "y", "z"]
    assert [node.name for node in nodes_of([("x", 0), ("x", 0)], ())] == ["x#0", "x#1"]


@pytest.mark.parametrize(
    ("count", "pairs"),
    [(1, []), (2, [["ab"]]), (3, [["ab"], ["bc"]]), (4, [["ab", "cd"], ["bc", "da"]])],
)
def test_neighbours_exchange_in_pairs_and_nobody_in_two_at_once(count: int, pairs: list[list[str]]) -> None:
    rounds = rounds_of(four()[:count])
    assert [len(round_.groups) for round_ in rounds[:1]] == [count]
    found = [["".join(group.nodes) for group in round_.groups] for round_ in rounds[1:] if "pairs" in round_.name]
    assert found == pairs and (rounds[-1].name == "all") == (count > 2)


def test_absent_nodes_are_named_by_their_place() -> None:
    assert list(absent([2, 3], 8, 2, "abcd", 40).faults) == ["b"]
    verdict = absent([5, 6, 7], 8, 2, (), 40)
    assert list(verdict.faults) == ["the node of ranks 4..", "the node of ranks 6.."]
    assert verdict.faults["the node of ranks 6.."][0].startswith("ranks 6, 7 did not come within 40 s")


def test_ranks_without_a_device_are_named() -> None:
    devices = [("cuda", ""), ("cpu", ""), ("cpu", "LOCAL_RANK is 1"), ("cuda", "")]
    verdict = judge_devices(four(), devices)
    assert verdict.faults == {
        "b": ["rank 1: computes on cpu, the first rank on cuda. Give all of them the same"],
        "c": ["rank 2: LOCAL_RANK is 1"],
    }


def test_a_group_that_cannot_be_opened() -> None:
    late, broken_one = hung(40), Found(fault="RuntimeError: no interface")
    three = dict.fromkeys(range(3), late)
    assert judge_opening(four(), three).faults == {"d": ["rank 3: ended, or fell silent, when the group was opened"]}
    verdict = judge_opening(four(), {**three, 3: broken_one})
    assert verdict.faults == {"d": ["rank 3: the group could not be opened: RuntimeError: no interface"]}
    verdict = judge_opening(four(), {**three, 3: late})
    assert not verdict.bad and verdict.general[0].startswith(
        "the group of all ranks could not be opened: no end within 40 s. Look at the network between the nodes"
    )


def found_in(round_: Round, changed: Mapping[str, Found], usual: Found, size: int) -> dict[int, Found]:
    """What ranks find, by the nodes of their group ("ab")."""
    return {
        rank: changed.get("".join(group.nodes), usual)
        for group in round_.groups
        for rank in group.ranks
        if rank < 4 * size
    }


def judged(changed: Mapping[str, Found], size: int = 2, strict: bool = True) -> Verdict:
    nodes = four(size)
    results = [(round_, found_in(round_, changed, Found(gbps=100.0), size)) for round_ in rounds_of(nodes)]
    return judge_rounds(nodes, results, strict)


@pytest.mark.parametrize(
    ("changed", "bad"),
    [
        ({}, ()),
        ({"b": Found(gbps=49.0)}, ("b",)),
        ({"b": Found(gbps=51.0)}, ()),
        ({"bc": Found(gbps=10.0), "ab": Found(gbps=10.0)}, ("b",)),
        ({"bc": Found(gbps=10.0)}, ("b", "c")),
        ({"b": Found(gbps=10.0), "ab": Found(gbps=10.0), "bc": Found(gbps=10.0)}, ("b",)),
        ({"ab": Found(100, 0, 5), "bc": Found(100, 0, 5), "abcd": Found(100, 0, 5)}, ("b",)),
        ({"b": Found(100, 0, 5), "ab": Found(100, 0, 5), "abcd": Found(100, 0, 5)}, ("b",)),
        ({"cd": hung(40)}, ("c", "d")),
        ({"d": Found(fault="RuntimeError: x")}, ("d",)),
        ({"cd": Found(fault="Connection closed by peer", lost_peer=True)}, ("c", "d")),
    ],
    ids=str,
)
def test_rounds_together_tell_which_node_is_bad(changed: Mapping[str, Found], bad: tuple[str, ...]) -> None:
    verdict = judged(changed)
    assert tuple(sorted(verdict.bad)) == bad and not verdict.general, verdict
    assert verdict.ok is not bool(bad)


def test_slow_nodes_of_cpus_are_warned_of() -> None:
    verdict = judged({"b": Found(gbps=10.0)}, strict=False)
    assert verdict.ok and verdict.warnings == {"b": ["the all-reduce of node b alone has 10 GB/s, others 100 GB/s"]}


def test_what_fails_only_among_all_is_no_single_nodes_fault() -> None:
    for changed in ({"abcd": Found(100, 0, 5)}, {"abcd": hung(40)}):
        verdict = judged(changed)
        assert not verdict.bad and not verdict.ok
        assert "all 8 ranks" in verdict.general[0] and "in pairs the nodes get along" in verdict.general[0]


def test_memory_that_changes_and_ranks_that_go_are_named_by_rank() -> None:
    nodes = four(2)
    (first, *_) = rounds_of(nodes)
    found = {rank: Found(100.0) for rank in range(8)}
    verdict = judge_rounds(nodes, [(first, {**found, 3: Found(100, 2, 9), 2: Found(100, 0, 9)})], True)
    assert (
        verdict.faults["b"][-1] == "rank 3: 2 numbers changed in its memory before they were sent. Replace the device"
    )
    assert verdict.bad == ("b",)
    gone = {rank: one for rank, one in found.items() if rank != 5} | {4: Found(fault="closed by peer", lost_peer=True)}
    assert judge_rounds(nodes, [(first, gone)], True).faults == {
        "c": ["rank 5: ended, or fell silent, in the all-reduce"]
    }
    assert broken(gone, 8) and not broken(found, 8)


def test_the_report_of_many_nodes_is_short() -> None:
    nodes = [Node(f"n{at}", (2 * at, 2 * at + 1)) for at in range(40)]
    results = [(round_, {rank: Found(80.0 + rank) for rank in range(80)}) for round_ in rounds_of(nodes)]
    assert report(256 << 20, results) == [
        "all-reduce of 256 MiB, bus bandwidth:",
        "  alone: 118 GB/s (median), 80 GB/s of node n0 alone",
        "  pairs: 117 GB/s (median), 81 GB/s of n0 and n1",
        "  other pairs: 115 GB/s (median), 81 GB/s of n39 and n0",
        "  all 80 ranks: 119 GB/s",
    ]


def test_a_ranks_note_reads_back_or_is_refused() -> None:
    assert read_found(Found(1.5, 2, 3, "x", True).to_json()) == Found(1.5, 2, 3, "x", True)
    with pytest.raises(JobError, match="a rank's note cannot be read"):
        read_found('{"older": 1}')
