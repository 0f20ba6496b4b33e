"""What can be said of runs on Ray without a cluster: shapes, requests, paths, and rows that go to the worker."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from job.config import load_config
from job.errors import ConfigError, InputError, OutputError
from job.launch.ray_train.shape import Node, Shape, Wanted, missing, shape_of
from job.sinks import PipeSink
from tests.conftest import REPOSITORY, qlora

RunFile = Callable[..., Path]
HEAD, CPUS, GPUS = Node("head", 0, 0), Node("a", 16, 0), Node("b", 64, 8)


@pytest.mark.parametrize(
    ("found", "processes", "nodes", "gpus", "shape"),
    [
        ([HEAD, GPUS, GPUS], "all", None, None, Shape(16, 1, 1)),
        ([HEAD, CPUS, GPUS], "all", None, None, Shape(8, 1, 1)),  # GPUs where there are any
        ([HEAD, GPUS, GPUS], 4, None, None, Shape(8, 1, 1)),
        ([HEAD, GPUS, Node("c", 32, 4)], "all", None, None, Shape(12, 1, 1)),
        ([HEAD], "all", 2, 8, Shape(16, 1, 1)),  # nodes that are still to come
        ([HEAD, GPUS], "all", 2, None, Shape(16, 1, 1)),
        ([HEAD, CPUS, CPUS], "all", None, None, Shape(2, 16, 0)),  # whole nodes, or both ranks are packed onto one
        ([HEAD, CPUS, CPUS], 2, None, None, Shape(4, 8, 0)),
        ([HEAD], "all", 3, None, Shape(3, 1, 0)),
        ([HEAD, GPUS], "all", 2, 0, Shape(2, 64, 0)),
    ],
)
def test_workers_and_what_each_holds(
    found: list[Node], processes: int | str, nodes: int | None, gpus: int | None, shape: Shape
) -> None:
    assert shape_of(found, processes, nodes, gpus) == shape  # type: ignore[arg-type]
    assert shape.resources == {"CPU": shape.cpus} | ({"GPU": 1} if shape.gpus else {})


def test_a_cluster_without_room_is_refused() -> None:
    with pytest.raises(InputError, match=r"has no node with CPUs for workers\. Say --nodes"):
        shape_of([HEAD], "all")
    with pytest.raises(ConfigError, match=r"parallel\.processes: 16, and here are 8 GPUs"):
        shape_of([GPUS], 16)


def test_what_is_missing_is_said_with_what_there_is() -> None:
    assert missing(Shape(16, 1, 1), [HEAD, GPUS], {"CPU": 60.0, "GPU": 3.0}, 10) == (
        "16 workers of 1 CPU and a GPU could not be placed within 10 min. The cluster has head 0 CPUs 0 GPUs, b 64 "
        "CPUs 8 GPUs; free are 60 CPUs and 3 GPUs. Ask for fewer (--nodes, --gpus-per-node), end other jobs, or wait "
        "longer (--wait-minutes)"
    )
    assert "The cluster has no node; free are 0 CPUs" in missing(Shape(1, 2, 0), [], {}, 0.5)


def test_living_nodes_are_read_from_what_ray_says() -> None:
    said = [
        {"NodeName": "a", "Alive": True, "Resources": {"CPU": 16.0, "memory": 1e9}},
        {"NodeName": "dead", "Alive": False, "Resources": {"CPU": 16.0}},
        {"NodeName": "b", "Alive": True, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    assert Node.all_of(said) == [CPUS, GPUS]


def test_a_request_is_shown_and_nobody_is_asked(run_file: RunFile, tmp_path: Path) -> None:
    words = ("submit", "ray", run_file(), "tracking.run_name=a b", "--address", "http://127.0.0.1:9", "--dry-run")
    done = qlora(*words, "--nodes", "2", "--gpus-per-node", "8")
    assert done.returncode == 0, done
    send, command = done.stdout.splitlines()
    assert send.startswith("ray job submit --address http://127.0.0.1:9 --submission-id qlora-")
    assert command == (
        "  -- qlora train --on ray --nodes 2 --gpus-per-node 8 --wait-minutes 10 run.yaml 'tracking.run_name=a b'"
    )
    request = json.loads(qlora(*words, "--json").stdout)
    assert request["output"] == f"{tmp_path}/out/run" and request["files"] == {"run.yaml": run_file().read_text()}


def test_what_cannot_be_sent_is_refused(run_file: RunFile, tmp_path: Path) -> None:
    from job.launch.ray_train.request import make_request

    path = str(run_file())
    with pytest.raises(OutputError, match=r"is a path on this machine\. Use a bucket"):
        make_request(load_config(path, ["output.url=runs/x"]), path, (), Wanted(), "http://x", None)
    with pytest.raises(InputError, match="is not in --working-dir"):
        make_request(load_config(path), path, (), Wanted(), "http://x", str(tmp_path / "elsewhere"))
    inside = make_request(load_config(path), path, (), Wanted(), "http://x", str(tmp_path))
    assert inside.entrypoint.endswith(" run.yaml") and (inside.files, inside.folder) == ({}, str(tmp_path))


def test_a_run_is_looked_at_before_anybody_is_asked(run_file: RunFile, tmp_path: Path) -> None:
    words = ("submit", "ray", run_file(), "--address", "http://127.0.0.1:9")
    done = qlora(*words, "train.global_batch_size=4", "--nodes", "2", "--gpus-per-node", "8")
    assert done.returncode == 2 and "the settings for 16 ranks, 8 a node" in done.stderr, done
    (tmp_path / "out/run").mkdir(parents=True)
    (tmp_path / "out/run/notes.txt").touch()
    done = qlora(*words)
    assert done.returncode == 2 and "holds files that are no run (notes.txt)" in done.stderr, done


def test_a_folder_that_only_the_cluster_has_is_left_to_it(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from job.launch.looking import look_first

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    said: list[str] = []

    def look() -> str:
        return look_first(load_config(str(run_file()), [f"output.url={tmp_path}/shared"]), 1, 0, "they do", said.append)

    assert look() == f"{tmp_path}/shared"
    cannot = "cannot be written. Use a folder that is yours. It was not looked into: they do"
    assert said == [f"Warning: output.url: {tmp_path}/shared {cannot}"]
    (tmp_path / "shared").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="cannot be written"):
        look()


def test_ranks_do_not_look_into_the_folder_that_was_uploaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from job.launch.ray_train.driver import own_path

    monkeypatch.chdir(tmp_path)
    assert own_path({}) is None
    assert own_path({"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}) == str(REPOSITORY)
    assert own_path({"PYTHONPATH": str(tmp_path), "PATH": os.environ["PATH"]}) is None, "the package is installed"


def test_the_command_is_the_installed_package_whatever_is_named_job_here(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job/__init__.py").write_text("raise RuntimeError('another one')")
    command = Path(sys.executable).parent / "qlora"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([command, "--version"], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=60)
    assert (done.returncode, done.stdout[:6]) == (0, "qlora "), done.stderr


def test_rows_go_to_the_worker_with_the_newest_checkpoint() -> None:
    reader, writer = os.pipe()
    steps = iter([0, 2, 3])
    sink = PipeSink(writer, lambda: next(steps))
    sink.start("run", 2)
    sink.row({"step": 1, "loss": 1.5})
    sink.row({"step": 2, "loss": 1.0})
    sink.close()
    with open(reader) as lines:
        rows = [json.loads(line) for line in lines]
    assert rows == [
        {"step": 1, "loss": 1.5, "checkpoint": 0},
        {"step": 2, "loss": 1.0, "checkpoint": 2},
        {"step": 2, "checkpoint": 3},
    ]
    reader, writer = os.pipe()
    os.close(reader)
    ended = PipeSink(writer, lambda: 0)
    ended.row({"step": 1})  # nobody listens any more
    ended.close()
