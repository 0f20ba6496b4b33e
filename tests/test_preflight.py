"""The check before a run: what a node says about itself, who is named as bad by it, and what it can reach."""

import json
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from job.config import load_config
from job.errors import JobError
from job.preflight.facts import Clock, Facts, Gpu, promised, visible
from job.preflight.judge import Verdict, judge
from job.preflight.limit import within
from job.preflight.probe import free_port, read_clocks
from job.preflight.reach import storage_fault
from tests.conftest import qlora
from tests.forked import NO_GPU, run
from tests.s3 import BUCKET, S3

RunFile = Callable[..., Path]
H200 = Gpu("H200", 139.0, 140.0)
GOOD = Facts(
    node="a",
    visible=("0", "1"),
    promised=2,
    gpus=(H200, H200),
    clocks=(Clock(1980, ()), Clock(1980, ())),
    devices=2,
    versions={"python": "3.11.7", "torch": "2.13.0 (CUDA 13.0)", "driver": "580.1", "settings": "abc"},
    memory_free_gib=500.0,
    cpus=16,
    shm_free_gib=100.0,
    shm_total_gib=128.0,
    time=1000.0,
    addresses=(),
    port=29500,
    storage="",
)
ON_CPU: dict[str, Any] = {"visible": None, "promised": None, "gpus": (), "clocks": (), "devices": 0}


def nodes(**last: Any) -> list[Facts]:
    """Three nodes, of which the last differs."""
    return [GOOD, replace(GOOD, node="b"), replace(GOOD, node="c", **last)]


def test_equal_nodes_are_good() -> None:
    verdict = judge(nodes(), ["a", "b", "c"])
    assert verdict == Verdict({}, {}) and verdict.ok and not verdict.lines()
    assert judge([replace(GOOD, **ON_CPU)], ()).ok


@pytest.mark.parametrize(
    ("differs", "said"),
    [
        (
            {"versions": {**GOOD.versions, "torch": "2.11.0 (CUDA 12.8)"}},
            "has torch 2.11.0 (CUDA 12.8), and 2 of 3 nodes have 2.13.0 (CUDA 13.0). Install the same on all nodes",
        ),
        (
            {"versions": {**GOOD.versions, "settings": "other"}},
            "has settings other, and 2 of 3 nodes have abc. Give all nodes the same run file",
        ),
        (
            {"versions": {name: value for name, value in GOOD.versions.items() if name != "driver"}},
            "has driver none, and 2 of 3 nodes have 580.1. Install the same on all nodes",
        ),
        (
            {"gpus": (H200,)},
            "torch sees 1 of the 2 GPUs that the scheduler gave. Look at nvidia-smi and the driver there (torch is "
            "2.13.0 (CUDA 13.0), driver 580.1)",
        ),
        (
            {"gpus": (Gpu("A100", 79.0, 80.0),) * 2},
            "has A100, and 2 of 3 nodes have H200. Ask for nodes of one kind (sbatch --constraint or "
            "--gpus-per-node=KIND:N)",
        ),
        (
            ON_CPU,
            "has no GPU, and 2 of 3 nodes have some. Ask for nodes of one kind (sbatch --constraint or "
            "--gpus-per-node=KIND:N)",
        ),
        (
            {**ON_CPU, "visible": (), "promised": 0, "devices": 8},
            "has 8 GPUs (/dev/nvidia*), and this job was given none. Ask the scheduler for them (sbatch "
            "--gpus-per-node=8)",
        ),
        (
            {**ON_CPU, "devices": 8},
            "has 8 GPUs (/dev/nvidia*), and this job was given none. Ask the scheduler for them (sbatch "
            "--gpus-per-node=8), or install a torch that sees them (this is 2.13.0 (CUDA 13.0))",
        ),
        (
            {"gpus": (H200, Gpu("H200", 111.9, 140.0))},
            "GPU 1 has 111.9 of 140.0 GiB free, expected 80%: another process holds it. Find it with nvidia-smi and "
            "end it",
        ),
        (
            {"clocks": (Clock(1980, ("hw_thermal_slowdown", "hw_power_brake")), Clock(1980, ()))},
            "GPU 0 is slowed down by hw_thermal_slowdown, hw_power_brake. Look at its cooling and power",
        ),
        (
            {"time": 1061.0},
            "its clock is 61 s ahead of the other nodes', expected at most 60 s: storage refuses signatures of another "
            "time. Set it (chrony)",
        ),
        (
            {"time": 900.0},
            "its clock is 100 s behind the other nodes', expected at most 60 s: storage refuses signatures of another "
            "time. Set it (chrony)",
        ),
        (
            {"shm_total_gib": 0.05},
            "/dev/shm has 51 MiB, expected 1 GiB: NCCL fails between GPUs of a node without it. Start the container "
            "with --shm-size=8g, or on Kubernetes with an emptyDir of medium Memory there",
        ),
        ({"storage": "output.url: s3://b/x: access denied"}, "output.url: s3://b/x: access denied"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_node_is_named_with_what_is_wrong(differs: dict[str, Any], said: str) -> None:
    verdict = judge(nodes(**differs), ())
    assert verdict.faults == {"c": [said]}
    assert verdict.bad == ("c",) and not verdict.ok and verdict.lines()[0] == f"c: {said}"


@pytest.mark.parametrize(
    ("differs", "said"),
    [
        ({"shm_total_gib": 1 / 16}, "/dev/shm has 64 MiB, better 1 GiB: NCCL may need more"),
        ({"shm_free_gib": 0.01}, "/dev/shm has 10 MiB left: remove what ended jobs left there"),
        ({"memory_free_gib": 7.9}, "7.9 GiB of host memory are free, better 4 GiB for each of 2 ranks"),
        ({"cpus": 1}, "1 CPU cores for 2 ranks: raise --cpus-per-task"),
        ({"port": 0}, "has no free port behind the wanted one. Give another with --port"),
        (
            {"clocks": (Clock(1980, ()), Clock(1200, ()))},
            "GPU 1 runs at 1200 MHz at most, most of them at 1980 MHz",
        ),
    ],
    ids=str,
)
def test_what_may_hurt_is_a_warning(differs: dict[str, Any], said: str) -> None:
    verdict = judge(nodes(**differs), ())
    assert verdict.ok and verdict.warnings == {"c": [said]}
    assert verdict.lines() == [f"Warning: c: {said}"]


def test_nodes_that_did_not_report_are_named_and_strangers_noted() -> None:
    verdict = judge([GOOD, replace(GOOD, node="x.cluster")], ["a.cluster", "b", "X"])
    assert verdict.faults == {"b": ["did not report"]} and not verdict.warnings
    assert judge([GOOD], ["b"]).warnings == {"a": ["reported, and nobody expected it"]}
    assert judge([], ["a"]).bad == ("a",)


def test_a_small_shared_memory_matters_between_several_gpus_only() -> None:
    assert judge([replace(GOOD, gpus=(H200,), promised=1, shm_total_gib=0.01)], ()) == Verdict({}, {})


def test_many_nodes_with_the_same_fault_are_one_line() -> None:
    many = [replace(GOOD, node=f"n{number}", storage="output.url: no") for number in range(40)]
    assert judge(many, ()).lines() == ["n0, n1, n2, n3 and 36 more: output.url: no"]


def test_verdicts_join_and_travel_as_json() -> None:
    both = Verdict({"a": ["x"]}, {"a": ["w"]}).joined(Verdict({"b": ["y"], "a": ["z"]}, {}, ["all"]))
    assert json.loads(both.to_json()) == {
        "faults": {"a": ["x", "z"], "b": ["y"]},
        "warnings": {"a": ["w"]},
        "general": ["all"],
    }
    assert both.lines() == ["all", "a: x", "a: z", "b: y", "Warning: a: w"]


@pytest.mark.parametrize("facts", [GOOD, replace(GOOD, **ON_CPU)], ids=["gpus", "cpu"])
def test_facts_are_one_line_that_reads_back(facts: Facts) -> None:
    line = facts.to_json()
    assert "\n" not in line and Facts.parse(f"{line}\n") == facts


@pytest.mark.parametrize(
    "line",
    [
        "",
        GOOD.to_json()[:-20],
        "[]",
        "null",
        '"text"',
        json.dumps({**json.loads(GOOD.to_json()), "newer": 1}),
        json.dumps({**json.loads(GOOD.to_json()), "gpus": [["H200", 1]]}),
        json.dumps({**json.loads(GOOD.to_json()), "cpus": "many"}),
        json.dumps({**json.loads(GOOD.to_json()), "time": None}),
        json.dumps({**json.loads(GOOD.to_json()), "node": 7}),
        GOOD.to_json().replace("1000.0", "NaN"),
        "srun: error: Unable to create step",
    ],
)
def test_a_broken_line_is_a_clear_error(line: str) -> None:
    with pytest.raises(JobError, match=r"(?s)^a node's report cannot be read \(.*Install the same version on all"):
        Facts.parse(line)


@pytest.mark.parametrize(
    ("env", "shown", "count"),
    [
        ({}, None, None),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, ("0", "2"), 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, (), 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, (), 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, (), 0),
        ({"SLURM_GPUS_ON_NODE": "8"}, None, 8),
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}, ("GPU-a", "GPU-b"), 2),
        ({"SLURM_GPUS_ON_NODE": "gpu:8"}, None, None),
    ],
)
def test_the_environment_says_how_many_gpus_were_promised(
    env: dict[str, str], shown: tuple[str, ...] | None, count: int | None
) -> None:
    assert (visible(env), promised(env)) == (shown, count)


def test_clocks_are_those_of_the_gpus_that_torch_sees() -> None:
    said = (
        "GPU-1, 580.1, 1980, Not Active, Not Active\n"
        "GPU-2, 580.1, 1980, Active, Not Active\n"
        "GPU-3, 580.1, [N/A], [N/A], Active\n"
    )
    assert read_clocks(said, ["3", "2"]) == (
        (Clock(0, ("hw_power_brake",)), Clock(1980, ("hw_thermal_slowdown",))),
        "580.1",
    )
    assert len(read_clocks(said, [])[0]) == len(read_clocks(said, ["unknown"])[0]) == 3
    assert read_clocks("", []) == ((), "")


def test_the_port_is_the_first_that_is_free() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        wanted = taken.getsockname()[1]
        assert free_port(wanted) > wanted
    assert free_port(65536) == 0


def test_a_call_that_hangs_is_left_alone() -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no end within 0\.1 s"):
        within(0.1, lambda: time.sleep(30))
    assert time.monotonic() - begun < 5
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    assert within(5, lambda: None) is None


def test_the_report_is_one_line_and_nothing_else(run_file: RunFile) -> None:
    path = run_file()
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        wanted = taken.getsockname()[1]
        env = {**NO_GPU, "SLURMD_NODENAME": "n17"}
        done = qlora("preflight", path, "lora.rank=2", "--report", "--port", str(wanted), env=env)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    facts = Facts.parse(line)
    assert (facts.node, facts.visible, facts.promised, facts.gpus) == ("n17", (), 0, ())
    assert facts.port > wanted and facts.cpus > 0 and abs(facts.time - time.time()) < 60
    assert facts.memory_free_gib > 0 and facts.storage == ""
    assert {"python", "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "job", "code", "settings"} <= set(
        facts.versions
    )


def test_other_settings_or_code_have_another_digest(run_file: RunFile) -> None:
    path = run_file()
    lines = [run("preflight", path, f"lora.rank={rank}", "--report").out for rank in (2, 2, 4)]
    one, again, other = (Facts.parse(line).versions for line in lines)
    assert one == again and {name for name in one if one[name] != other[name]} == {"settings"}


def test_this_machine_alone_is_checked_and_the_run_begins_afterwards(run_file: RunFile) -> None:
    path = run_file()
    done = run("preflight", path)
    assert done.code == 0 and done.out.splitlines()[-1] == "preflight: nothing speaks against the run", done
    trained = run("train", path, "train.max_steps=1")
    assert trained.code == 0, trained.err


def test_a_fault_ends_it_with_one_and_is_written_down(run_file: RunFile, tmp_path: Path) -> None:
    path = run_file(output={"url": str(tmp_path / "mine")})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    done = run("preflight", path, "--verdict", tmp_path / "verdict.json", env={"SLURMD_NODENAME": "n17"})
    assert done.code == 1
    said = f"output.url: {tmp_path}/mine holds files that are no run (letter.txt). Use an empty or a new folder"
    assert done.out.splitlines()[0] == f"n17: {said}"
    assert done.out.splitlines()[-1] == "preflight: repair or leave out n17"
    assert json.loads((tmp_path / "verdict.json").read_text())["faults"] == {"n17": [said]}


def test_a_verdict_that_cannot_be_written_is_said(run_file: RunFile, tmp_path: Path) -> None:
    done = run("preflight", run_file(), "--verdict", tmp_path / "none" / "verdict.json")
    assert done.code == 1 and "No such file or directory. Name a file that can be written" in done.err


def test_wrong_settings_end_it_with_two(run_file: RunFile) -> None:
    done = run("preflight", run_file(), "lora.rank=none", "--report")
    assert done.code == 2 and not done.out


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"train": "none.jsonl"}}, "data.train: none.jsonl: not found. Give a file, glob or folder"),
        ({"evaluation": {"file": "none.jsonl", "every_steps": 1}}, "evaluation.file: none.jsonl: not found"),
        ({"output": {"url": "/proc/runs"}}, "output.url: /proc/runs"),
        ({"data": {"train": "s3://bucket/rows.jsonl"}, "storage": {"endpoint": "http://127.0.0.1:9"}}, "data.train: "),
    ],
    ids=str,
)
def test_what_cannot_be_reached_is_one_sentence(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], said: str
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "very-secret")
    found = storage_fault(load_config(str(run_file(**sections)), ()))
    assert found.startswith(said) and "very-secret" not in found


def test_a_signature_is_not_shown(run_file: RunFile) -> None:
    url = "http://127.0.0.1:9/rows.jsonl?signature=very-secret"
    found = storage_fault(load_config(str(run_file(data={"train": url})), ()))
    assert found.startswith("data.train: http://127.0.0.1:9/rows.jsonl: cannot be read") and "secret" not in found


@pytest.mark.parametrize("lease", [True, False])
def test_a_bucket_is_read_and_written_and_nothing_is_left_there(run_file: RunFile, s3: S3, lease: bool) -> None:
    s3.fs().pipe_file(f"{BUCKET}/preflight/rows.jsonl", b'{"text": "a"}\n')
    path = run_file(
        data={"train": f"s3://{BUCKET}/preflight/rows.jsonl"},
        output={"url": f"s3://{BUCKET}/preflight/out"},
        storage={**s3.storage, "lease": lease},
    )
    assert storage_fault(load_config(str(path), ())) == ""
    assert not [name for name in s3.fs().find(f"{BUCKET}/preflight") if "probe" in name]
    missing = load_config(str(path), ["output.url=s3://nowhere/out"])
    assert "there is no bucket nowhere" in storage_fault(missing)
