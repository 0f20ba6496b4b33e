"""A checkout on a cluster with settings of its own: no run file, an account, modules."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.batch import ENV, Batch, env_of
from tests.cluster.slurm import Cluster, slurm
from tests.conftest import REPOSITORY

BIN = Path(sys.executable).parent
MODULES = f"""
# what BASH_ENV names on clusters with Lmod or Environment Modules: batch scripts know the function by it
module() {{
  [[ $1 == load ]] || return 1
  local name
  for name in "${{@:2}}"; do
    [[ :${{LOADEDMODULES:-}}: != *:$name:* ]] || continue
    case $name in
      python/3.11) export PATH={BIN}:$PATH ;;
      cuda/12.8) ;;
      *) echo "module: there is no $name" >&2 && return 1 ;;
    esac
    export LOADEDMODULES=${{LOADEDMODULES:+$LOADEDMODULES:}}$name
  done
}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes. There is no accounting here, so that every account is taken, and none where a partition has a list."""
    listed = "PartitionName=listed Nodes=ALL AllowAccounts=physics"
    with slurm(tmp_path_factory.mktemp("slurm"), {"n1": 0, "n2": 0}, more=listed) as running:
        yield running


@pytest.fixture
def checkout(smollm2: Path, tmp_path: Path) -> Path:
    """A checkout with the example's settings, filled in for this cluster."""
    for name in ("slurm", "configs"):
        shutil.copytree(REPOSITORY / name, tmp_path / name)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / smollm2.name).symlink_to(smollm2)
    site = (tmp_path / "slurm/site.sh.example").read_text()
    for before, after in {
        "PARTITION=gpu": "PARTITION=short",
        "ACCOUNT=project": "ACCOUNT=physics",
        "TIMELIMIT=24:00:00": "TIMELIMIT=0:30:00",
        "export SBATCH_GPUS_PER_NODE=4\nexport SBATCH_CPUS_PER_GPU=8\n": "",
        "# module load python/3.11 cuda/12.8": "module load python/3.11 cuda/12.8",
        "export QLORA_VENV=/shared/venvs/qlora": "export QLORA_PYTHON=$(command -v python)",
    }.items():
        assert before in site
        site = site.replace(before, after)
    (tmp_path / "slurm/site.sh").write_text(site)
    (tmp_path / "modules.sh").write_text(MODULES)
    return tmp_path


def test_without_a_run_file_the_demo_runs_under_the_sites_account_and_modules(cluster: Cluster, checkout: Path) -> None:
    env = {**ENV, "BASH_ENV": str(checkout / "modules.sh")}
    asked = cluster.command(
        "bash", "-c", ". slurm/site.sh && sbatch --parsable slurm/zero3_2node.sbatch", cwd=checkout, env=env
    )
    assert asked.returncode == 0, asked.stderr
    batch = Batch.of(cluster, checkout, int(asked.stdout))
    assert [cluster.field(batch.id, name) for name in ("Partition", "Account")] == ["short", "physics"]
    batch.wait_for("step 2/48")
    ranks = [env_of(pid) for host in cluster.hosts.values() for pid in host.python_processes()]
    assert [found["LOADEDMODULES"] for found in ranks if found] == ["python/3.11:cuda/12.8"] * 2
    said = batch.said()
    assert "train: 320 rows" in said and "48 steps in bf16 on 2 x " in said and ", zero3 (" in said, said
    assert (checkout / "runs/smollm2-135m-demo/status.json").is_file(), "from the checkout, wherever it was submitted"
    cluster.command("scancel", str(batch.id))
    assert batch.ended() == "CANCELLED"


def test_an_account_or_module_that_is_not_there_is_said(cluster: Cluster, checkout: Path) -> None:
    site = checkout / "slurm/site.sh"
    right = site.read_text()
    env = {**ENV, "BASH_ENV": str(checkout / "modules.sh")}
    site.write_text(right.replace("PARTITION=short", "PARTITION=listed"))
    wrong = cluster.command("bash", "-c", ". slurm/site.sh && sbatch slurm/single_node.sbatch", cwd=checkout, env=env)
    assert wrong.returncode == 1 and "Invalid account or account/partition combination" in wrong.stderr
    words = (sys.executable, "-m", "job", "submit", "slurm", "configs/smollm2-135m-demo.yaml")
    said = cluster.command(*words, cwd=checkout, env=env)
    assert said.returncode == 2 and "sacctmgr" in said.stderr, said
    site.write_text(right.replace("cuda/12.8", "cuda/99") + "module load cuda/99\n")
    job = cluster.sbatch("--partition=main", "slurm/single_node.sbatch", cwd=checkout, env=env)
    batch = Batch.of(cluster, checkout, job)
    assert batch.code() == 2 and f"{site} failed" in batch.said() and "there is no cuda/99" in batch.said()


def test_on_a_machine_of_no_cluster_slurm_s_commands_change_nothing(checkout: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "SLURM_CONF"}
    asked = [sys.executable, "-m", "job", "status", "configs/smollm2-135m-demo.yaml", f"output.url={checkout}/none"]
    done = subprocess.run(asked, capture_output=True, text=True, env=env, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"run {checkout}/none: has not begun\n"
