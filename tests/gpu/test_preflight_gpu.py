"""The check before a run on GPUs: what a node says of them, and the exchange over NCCL."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from job.preflight.facts import Facts
from tests.conftest import qlora

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
RunFile = Callable[..., Path]
GOOD = "preflight: nothing speaks against the run"


def test_the_report_names_gpus_clocks_driver_and_nccl(run_file: RunFile) -> None:
    done = qlora("preflight", run_file(), "--report")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    facts = Facts.parse(line)
    count = torch.cuda.device_count()
    assert len(facts.gpus) == count <= facts.devices
    for index, gpu in enumerate(facts.gpus):
        total = torch.cuda.get_device_properties(index).total_memory / 2**30
        assert gpu.name == torch.cuda.get_device_name(index)
        assert 0 < gpu.memory_free_gib <= gpu.memory_total_gib == pytest.approx(total, rel=0.01)
    assert len(facts.clocks) == count and all(clock.max_sm_mhz > 100 for clock in facts.clocks)
    assert {"driver", "nccl"} <= set(facts.versions) and "CUDA" in facts.versions["torch"]


def test_a_gpu_that_another_process_holds_is_named(run_file: RunFile) -> None:
    free, total = torch.cuda.mem_get_info(0)
    held = torch.empty(max(int(free - 0.7 * total), 1), dtype=torch.uint8, device="cuda:0")
    done = qlora("preflight", run_file(parallel={"processes": 1}))
    del held
    torch.cuda.empty_cache()
    assert done.returncode == 1 and re.search(r"GPU 0 has .* GiB free, expected 80%", done.stdout), done


def test_a_node_that_was_promised_no_gpu_is_named(run_file: RunFile) -> None:
    done = qlora("preflight", run_file(), env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 1 and "and this job was given none" in done.stdout, done
    assert "(sbatch --gpus-per-node=" in done.stdout


def test_one_gpu_sums_up_with_itself(run_file: RunFile) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "0"}
    done = qlora("preflight", run_file(), env=env)
    assert done.returncode == 0 and done.stdout.splitlines()[0] == "one rank: nothing to exchange with", done


@two
def test_two_gpus_exchange_faster_than_any_network(run_file: RunFile) -> None:
    done = qlora("preflight", run_file(), "parallel.processes=2")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == GOOD, done
    assert "all-reduce of 256 MiB, bus bandwidth:" in done.stdout
    found = re.search(r"alone: ([\d.e+]+) GB/s", done.stdout)
    assert found and float(found[1]) > 5
