"""submit, status, logs and cancel against a real SLURM; the jobs are stand-ins that write what a run writes."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.cluster.slurm import OWN_ENV, Cluster, slurm, wait_until
from tests.conftest import settings

STAND_IN = r"""#!/bin/bash
#SBATCH --output=qlora-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
out=OUT; folder=qlora-$SLURM_JOB_ID
status() {
  printf '{"state": "%s", "reason": "%s", "step": %s, "updated": "%s", "checkpoint": 0, "restarts": 0}' \
    "$1" "$2" "$3" "$(date -Iseconds)" >"$out/draft"
  mv "$out/draft" "$out/status.json"
}
say() { echo "[$1] $2" >>"$folder/n1.log"; }
mkdir -p "$out" "$folder"
echo "start ${SLURM_RESTART_COUNT:-0}"
printf '{"job": "%s", "output": "%s", "words": ["run.yaml"], "before": ""}' "$SLURM_JOB_ID" "$out" \
  >"$folder/job.json"
cp run.yaml "$out"
status running "" 0
"""
FINISHES = """
for n in 1 2 3; do
  say 0 "step $n"
  echo "{\\"step\\": $n, \\"epoch\\": 1, \\"loss\\": 0.$n}" >>"$out/metrics.jsonl"
  sleep 2
done
status finished "" 3
"""
FAILS = """
say 0 "JobError: another rank ended after step 1, or cannot be reached; what it said tells why"
say 1 "Traceback (most recent call last):"
say 1 '  File "train.py", line 1, in <module>'
say 1 "ValueError: the cause"
status failed "ValueError: the cause" 1
exit 1
"""
REQUEUED = (
    """
if [[ -z ${SLURM_RESTART_COUNT:-} ]]; then
  say 0 "JobError: of the first start"
  echo "--- start 1, now" >>"$folder/n1.log"
  scontrol requeue "$SLURM_JOB_ID"
  sleep 60
fi
"""
    + FINISHES
)
HEARS = """
for n in $(seq 300); do
  if [[ -e $out/stop ]]; then
    status interrupted "a stop key" 7
    exit 75
  fi
  sleep 0.2
done
"""


@dataclass(frozen=True)
class Place:
    """A folder to submit from, with its run file and batch script."""

    cluster: Cluster
    folder: Path
    more: Mapping[str, str] = field(default_factory=dict)

    def script(self, text: str) -> None:
        """What the job shall do."""
        (self.folder / "job.sh").write_text(STAND_IN.replace("OUT", str(self.folder / "out")) + text)

    def qlora(self, *words: str, code: int = 0) -> str:
        """What the verb said; it ended with `code`."""
        done = self.cluster.command(sys.executable, "-m", "job", *words, cwd=self.folder, env=self.env)
        assert done.returncode == code, done
        return done.stdout + done.stderr

    @property
    def env(self) -> dict[str, str]:
        return {**OWN_ENV, "SLURM_CONF": str(self.cluster.folder / "slurm.conf"), **self.more}

    def submit(self, *words: str) -> int:
        """Submit it; the job's number."""
        said = self.qlora("submit", "slurm", "run.yaml", "--script", "job.sh", *words)
        number = int(said.split()[1])
        assert all(f"qlora {verb} --job {number}" in said for verb in ("status", "logs -f", "cancel"))
        return number

    def follow(self) -> "subprocess.Popen[bytes]":
        """`logs -f`, which writes to the file `followed`."""
        words = (sys.executable, "-m", "job", "logs", "run.yaml", "-f")
        return self.cluster.controller.start(*words, env=self.env, log=self.folder / "followed", cwd=self.folder)

    def followed(self, running: "subprocess.Popen[bytes]") -> tuple[int, str]:
        """Its exit code, and what it wrote."""
        return running.wait(90), (self.folder / "followed").read_text()

    def until_it_says(self, words: str, path: str = "run.yaml", timeout_s: float = 60) -> str:
        """What status says once that has `words` in it."""
        said = ""

        def says() -> bool:
            nonlocal said
            said = self.qlora("status", path)
            return words in said

        wait_until(says, timeout_s, lambda: f"{said}\n{self.cluster.logs()}")
        return said


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    physics = "PartitionName=physics Nodes=ALL AllowAccounts=physics"
    with slurm(tmp_path_factory.mktemp("slurm"), {"n1": 1, "n2": 1}, more=physics) as up:
        yield up


def make_place(cluster: Cluster, folder: Path) -> Place:
    (folder / "run.yaml").write_text(yaml.safe_dump(settings("owner/model", "rows.jsonl", folder / "out")))
    place = Place(cluster, folder)
    place.script("")
    return place


@pytest.fixture
def place(cluster: Cluster, tmp_path: Path) -> Place:
    return make_place(cluster, tmp_path)


def test_a_run_is_submitted_watched_and_followed_to_its_end(place: Place) -> None:
    place.script("env >environment" + FINISHES.replace("sleep 2", "until [[ -e go ]]; do sleep 0.1; done; sleep 2"))
    (place.folder / ".env").write_text("HF_TOKEN=hf_secret\n")
    assert place.qlora("status", "run.yaml") == f"run {place.folder}/out: has not begun\n"
    number = place.submit("--time", "30")
    refused = place.qlora("submit", "slurm", "run.yaml", "--script", "job.sh", code=2)
    assert f"InputError: job {number} of {place.folder}/out is " in refused and "exclude each other" in refused
    running = place.follow()
    said = place.until_it_says("step 1 of 3, loss 0.1000")
    assert f"job {number}: RUNNING on n1, 0:" in said and " left" in said
    assert f"job {number}: RUNNING" in place.qlora("status"), "all jobs of this user"
    (standing,) = json.loads(place.qlora("status", "--job", str(number), "--json"))
    assert standing["run"]["status"]["state"] == "running" and 0 < standing["job"]["left"] <= 1800
    (place.folder / "go").touch()
    code, log = place.followed(running)
    assert "hf_secret" not in (place.folder / "environment").read_text(), "the job reads .env itself"
    assert code == 0 and "batch | start 0\n" in log and all(f"n1 | [0] step {n}\n" in log for n in (1, 2, 3)), log
    assert f"run {place.folder}/out: finished, step 3 of 3" in log and "failed first" not in log
    assert f"job {number}: COMPLETED" in place.qlora("status", "run.yaml")
    again = place.qlora("submit", "slurm", "run.yaml", "--script", "job.sh", code=2)
    assert "OutputError" in again and "finished after 3 steps" in again
    assert "nothing to cancel" in place.qlora("cancel", "run.yaml", code=2)


def test_a_job_of_plain_sbatch_is_found_by_its_folder(place: Place) -> None:
    place.script(HEARS)
    number = place.cluster.sbatch("job.sh", cwd=place.folder, env=place.env)
    said = place.until_it_says("running, step 0")
    assert f"job {number}: RUNNING on n" in said, said
    assert "is there now" in place.qlora("cancel", "run.yaml")
    code, log = place.followed(place.follow())
    assert code == 1 and "interrupted (a stop key), step 7" in log and f"job {number}: FAILED" in log, log


def test_logs_begin_with_what_failed_first(place: Place) -> None:
    place.script(FAILS)
    number = place.submit()
    code, log = place.followed(place.follow())
    assert code == 1 and "failed first: rank 1 on n1" in log, log
    assert f"job {number}: FAILED (NonZeroExitCode) on n1, exit code 1:0" in log
    lines = place.qlora("logs", "--job", str(number)).splitlines()
    assert lines[:4] == [
        "failed first: rank 1 on n1",
        "  Traceback (most recent call last):",
        '    File "train.py", line 1, in <module>',
        "  ValueError: the cause",
    ]
    assert "n1 | [0] JobError: another rank ended" in "\n".join(lines)
    assert "batch" not in place.qlora("logs", "run.yaml", "--node", "n1")
    assert "There are: batch, n1" in place.qlora("logs", "run.yaml", "--node", "n7", code=2)


def test_a_requeued_job_is_followed_through(place: Place) -> None:
    place.script(REQUEUED)
    number = place.submit()
    running = place.follow()
    said = place.until_it_says("(BeginTime)")
    assert "put back into the queue" in said and "restarted once" in said
    place.cluster.hurry(number)
    code, log = place.followed(running)
    assert code == 0 and "batch | start 0\n" in log and "batch | start 1\n" in log and "PENDING" in log, log
    assert "failed first" not in place.qlora("logs", "run.yaml")


def test_a_waiting_job_is_taken_out_of_the_queue(place: Place) -> None:
    number = place.submit("--option=--begin=now+1hour")
    said = place.until_it_says("BeginTime")
    assert f"job {number}: PENDING: may not start before its time" in said and "has not begun" in said
    assert f"job {number} is PENDING and has written nothing yet" in place.qlora("logs", "run.yaml", code=2)
    assert place.qlora("cancel", "run.yaml") == f"job {number} is cancelled, it had not begun\n"
    assert place.cluster.wait(number) == "CANCELLED" and not (place.folder / "out").exists()
    assert "(job " in place.qlora("cancel", "--job", str(number), code=2)


def test_a_running_job_is_asked_to_save_and_stop(place: Place) -> None:
    place.script(HEARS)
    number = place.submit()
    place.until_it_says("running, step 0")
    said = place.qlora("cancel", "run.yaml")
    assert f"job {number} was asked to save and stop: {place.folder}/out/stop is there now" in said
    assert f"qlora cancel --job {number} --now" in said
    place.cluster.wait(number)
    assert place.cluster.exit_code(number) == 75
    assert "interrupted (a stop key), step 7" in place.qlora("status", "run.yaml")


def test_now_ends_it_at_once_and_the_orphan_is_named(place: Place) -> None:
    place.script("sleep 300\n")
    number = place.submit()
    place.until_it_says("running, step 0")
    assert "since its last checkpoint is lost" in place.qlora("cancel", "run.yaml", "--now")
    assert place.cluster.wait(number) == "CANCELLED"
    assert not (place.folder / "out/stop").exists()
    assert "its processes were lost" in place.qlora("status", "--job", str(number))


def test_a_sweep_is_an_array_whose_runs_are_told_apart(place: Place) -> None:
    (place.folder / "sweep").write_text("lora.rank=8\nlora.rank=16\n")
    (place.folder / "job.sh").write_text("#!/bin/bash\n#SBATCH --output=qlora-%A_%a.log\necho task; sleep 300\n")
    number = place.submit("--array-sweep", "sweep", "--option=--array=1-2%1")
    said = place.until_it_says(f"job {number}_2: PENDING: as many tasks")
    assert f"run {place.folder}/out/1: has not begun" in said and f"job {number}_1: RUNNING" in said
    log = place.folder / f"qlora-{number}_1.log"
    place.cluster.until(lambda: log.exists() and log.read_text())
    assert place.qlora("logs", "run.yaml") == "batch | task\n"
    place.qlora("cancel", "run.yaml")
    assert place.cluster.wait(number) == "CANCELLED"


def test_a_job_that_can_never_start_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    lax = "EnforcePartLimits=NO"  # as it is, unless a site sets it
    with slurm(tmp_path / "slurm", {"n1": 1}, more=lax) as cluster:
        place = make_place(cluster, tmp_path)
        words = ("--partition=short", "--time=2:00:00")
        said = place.qlora("submit", "slurm", "run.yaml", "--script", "job.sh", *words)
        assert "Warning: job 1 was taken, but cannot start" in said and "End it with scancel 1" in said
        place.until_it_says("its partition allows no job this long: lower --time (PartitionTimeLimit)")


def test_what_slurm_refuses_is_said_with_where_to_look(place: Place) -> None:
    def refused(*words: str) -> str:
        said = place.qlora("submit", "slurm", "run.yaml", "--script", "job.sh", *words, code=2)
        assert said.startswith("InputError: sbatch did not take the job: "), said
        return said

    assert "Invalid partition name" in (said := refused("--partition", "nope")) and "sinfo lists" in said
    assert "nvalid account" in (said := refused("--partition=physics", "--account=no")) and "sacctmgr" in said, said
    assert "lower --nodes" in refused("--nodes", "5")
    assert "node configuration is not available" in refused("--gpus-per-node", "2")
    assert "--time" in refused("--time", "soon")
    assert "time limit" in refused("--partition=short", "--time=2:00:00")
    assert "sbatch --help" in refused("--option=--frobnicate")
    assert "no job 999" in place.qlora("status", "--job", "999", code=2)
    (place.folder / "site.sh").write_text("export SBATCH_PARTITION=elsewhere\n")
    words = (sys.executable, "-m", "job", "submit", "slurm", "run.yaml", "--script", "job.sh")
    assert "invalid partition specified: elsewhere" in refused_by_site(place, *words)


def refused_by_site(place: Place, *words: str) -> str:
    """What is said when the site's settings are read first."""
    done = place.cluster.command(*words, cwd=place.folder, env={**place.env, "QLORA_SITE": "site.sh"})
    assert done.returncode == 2
    return done.stderr


def test_a_real_run_is_watched_and_asked_to_stop(cluster: Cluster, run_of: Callable[..., Path], tmp_path: Path) -> None:
    config = run_of("verbs", max_steps=100000)
    place = Place(cluster, tmp_path, {"QLORA_PREFLIGHT": "nodes", "OMP_NUM_THREADS": "1"})
    words = (str(config), "parallel.processes=1")
    said = place.qlora("submit", "slurm", *words, "--nodes", "2", "--time", "1:00:00")
    number = int(said.split()[1])
    place.until_it_says(" of 100000, loss ", path=str(config), timeout_s=150)
    logs = place.qlora("logs", str(config))
    assert "batch | " in logs and "n1 | [0] " in logs and "n2 | " in logs and "failed first" not in logs, logs
    assert "was asked to save and stop" in place.qlora("cancel", str(config))
    cluster.wait(number, timeout_s=90)
    said = place.qlora("status", "--job", str(number))
    assert "interrupted (a stop key)" in said and "newest checkpoint: step" in said and "no checkpoint" not in said
    assert cluster.restarts(number) == 0
