"""Requests to SLURM as data: what sbatch would get, what is refused before, and what SLURM's own words mean."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config import RunConfig, load_config
from job.errors import ConfigError, InputError, OutputError
from job.launch.blame import first_failure
from job.launch.slurm.jobs import Job, duration, in_folders, parse_queue, parse_sacct, parse_show
from job.launch.slurm.logs import Files
from job.launch.slurm.pending import in_words, never_starts
from job.launch.slurm.request import Wanted, address, job_name, make_request
from job.launch.slurm.submit import look_first
from job.launch.slurm.watch import Standing, read_run, run_of
from tests.conftest import REPOSITORY, settings
from tests.forked import run

GOLDEN = REPOSITORY / "tests/golden/slurm"
ENV = {"HF_TOKEN": "hf_secret", "AWS_SECRET_ACCESS_KEY": "secret", "HOME": "/root", "QLORA_VENV": "/opt/qlora"}
REQUESTS: dict[str, tuple[list[str], Wanted]] = {
    "one_node": ([], Wanted()),
    "two_nodes": (
        ["train.max_steps=20"],
        Wanted(2, 8, 12, "12:00:00", "gpu", "physics", ("--qos=high", "--exclusive")),
    ),
    "array_sweep": (["train.max_steps=20"], Wanted(sweep="sweep", gpus_per_node=1)),
    "pdsh": ([], Wanted(nodes=2, launcher="pdsh")),
    "container": ([], Wanted(nodes=2, container="/images/qlora.sif")),
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """The settings of run.yaml in the current folder, which holds a file of a sweep as well, and no slurm/."""
    monkeypatch.chdir(tmp_path)
    values = settings("owner/model", "s3://bucket/rows.jsonl", "s3://bucket/runs/first")
    Path("run.yaml").write_text(yaml.safe_dump(values))
    Path("sweep").write_text("# ranks\nlora.rank=8\n\nlora.rank=16 train.seed=1\n")
    return load_config("run.yaml")


def asked(config: RunConfig, words: list[str], wanted: Wanted, env: dict[str, str] = ENV) -> dict[str, Any]:
    return make_request(config, "run.yaml", words, wanted, env).as_json()


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package whose repository holds batch scripts, and no settings of a site."""
    repository = tmp_path_factory.mktemp("repository")
    (repository / "slurm").mkdir()
    for name in ("single_node", "zero3_2node", "array_sweep"):
        (repository / f"slurm/{name}.sbatch").write_text("#!/bin/bash\n")
    monkeypatch.setattr("job.__file__", str(repository / "job/__init__.py"))
    return repository


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_are_what_they_were(name: str, config: RunConfig, scripts: Path) -> None:
    words, wanted = REQUESTS[name]
    made = json.dumps(asked(config, words, wanted), indent=1).replace(str(scripts), "REPOSITORY")
    assert json.loads(made) == json.loads((GOLDEN / f"{name}.json").read_text())


def test_no_secret_gets_into_a_request(config: RunConfig) -> None:
    request = make_request(config, "run.yaml", [], Wanted(), ENV)
    said = json.dumps(request.as_json()) + "\n".join(request.lines())
    assert "secret" not in said.replace("AWS_SECRET_ACCESS_KEY", "") and "HF_TOKEN" in said and "HOME" not in said


def test_a_script_here_wins_over_the_packages_and_brings_its_sites_settings(config: RunConfig) -> None:
    Path("slurm").mkdir()
    Path("slurm/single_node.sbatch").touch()
    Path("slurm/site.sh").touch()
    request = make_request(config, "run.yaml", [], Wanted(), {})
    assert request.script == "slurm/single_node.sbatch" and request.site == str(Path("slurm/site.sh").absolute())
    assert request.lines()[0].startswith(f". {request.site} && sbatch --parsable ")
    Path("other.sh").touch()
    assert asked(config, [], Wanted(), {"QLORA_SITE": "other.sh"})["site"] == str(Path("other.sh").absolute())


@pytest.mark.parametrize(
    ("wanted", "words", "env", "said"),
    [
        (Wanted(script="mine.sbatch"), [], {}, "--script mine.sbatch: there is no such file"),
        (Wanted(options=("-J x",)), [], {}, "--option -J x: is no long option of sbatch. Write --option=--name=value"),
        (Wanted(options=("--array=1-3",)), [], {}, "--array is set by qlora submit"),
        (Wanted(options=("--job-name=x",)), [], {}, "--job-name is set by qlora submit"),
        (Wanted(), [], {"QLORA_SITE": "gone.sh"}, "QLORA_SITE is gone.sh, and there is no such file"),
        (Wanted(sweep="gone"), [], {}, "gone: cannot be read"),
        (Wanted(), ["data.train=https://host/a.jsonl?X-Amz-Signature=1"], {}, "data.train: a signed address would be"),
    ],
)
def test_what_cannot_be_handed_on_is_refused(
    wanted: Wanted, words: list[str], env: dict[str, str], said: str, config: RunConfig
) -> None:
    with pytest.raises(InputError) as refusal:
        make_request(config, "run.yaml", words, wanted, env)
    assert said in str(refusal.value) and "Amz" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n# nothing\n", "sweep: has no line with settings"),
        ("lora.rank=8\nlora.rnak=4\n", "1 problem in sweep, line of task 2\n  lora.rnak: unknown name"),
        ("lora.rank='8\n", "sweep, line of task 1: No closing quotation"),
        ("output.url=elsewhere\n", "sets output.url"),
    ],
)
def test_a_wrong_sweep_is_refused_with_its_line(text: str, said: str, config: RunConfig) -> None:
    Path("sweep").write_text(text)
    with pytest.raises(InputError) as refusal:
        make_request(config, "run.yaml", [], Wanted(sweep="sweep"), {})
    assert said in str(refusal.value)


def test_without_scripts_it_says_where_it_looked(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.__file__", "/nowhere/job/__init__.py")
    with pytest.raises(InputError, match=r"there is no batch script slurm/single_node.sbatch nor /nowhere/slurm/"):
        make_request(config, "run.yaml", [], Wanted(), {})


def test_names_of_jobs_are_readable_and_belong_to_one_output(config: RunConfig) -> None:
    assert job_name(config) == job_name(load_config("run.yaml", ["lora.rank=8"])) == "qlora-first-3ecffb"
    renamed = load_config("run.yaml", ["tracking.run_name='a, b/ü'"])
    assert job_name(renamed) == "qlora-a-b-3ecffb"
    here = load_config("run.yaml", ["output.url=runs/first"])
    assert address(here.output.url) == str(Path("runs/first").absolute()) == address("file://" + address("runs/first/"))
    assert address("https://host/run?sig=1") == "https://host/run"


def test_a_dry_run_asks_nobody(config: RunConfig, tmp_path: Path) -> None:
    nobody = {"PATH": "/nowhere", **ENV}
    made = run("submit", "slurm", "run.yaml", "--script", "sweep", "--dry-run", "--json", env=nobody, cwd=tmp_path)
    assert made.code == 0 and json.loads(made.out)["program"] == "sbatch", made
    lines = run("submit", "slurm", "run.yaml", "--script", "sweep", "--dry-run", env=nobody, cwd=tmp_path).out
    assert lines.startswith("sbatch --parsable --job-name=qlora-first-") and "HF_TOKEN" in lines
    refused = run("submit", "slurm", "run.yaml", "lora.rnak=1", "--dry-run", env=nobody, cwd=tmp_path)
    assert refused.code == 2 and "lora.rnak: unknown name" in refused.err


def test_without_slurm_the_verbs_say_so_or_go_by_the_folder(config: RunConfig, tmp_path: Path) -> None:
    nobody, here = {"PATH": "/nowhere"}, f"output.url={tmp_path}/out"
    done = run("submit", "slurm", "run.yaml", here, "--script", "sweep", env=nobody, cwd=tmp_path)
    assert done.code == 2 and "squeue is not on PATH" in done.err and not (tmp_path / "out").exists()
    assert run("status", "run.yaml", here, env=nobody, cwd=tmp_path).out == f"run {tmp_path}/out: has not begun\n"
    assert "Give CONFIG" in run("status", env=nobody, cwd=tmp_path).err
    assert "there are no logs" in run("logs", "run.yaml", here, env=nobody, cwd=tmp_path).err
    done = run("cancel", "run.yaml", here, env=nobody, cwd=tmp_path)
    assert done.code == 2 and "there is nothing to cancel" in done.err
    write_status(tmp_path / "out", "running")
    done = run("cancel", "run.yaml", here, env=nobody, cwd=tmp_path)
    assert done.code == 0 and "asked to save and stop" in done.out and (tmp_path / "out/stop").exists()


def test_slurm_s_commands_without_a_cluster_are_no_slurm(config: RunConfig, tmp_path: Path) -> None:
    """What Debian's package says on a machine that belongs to no cluster; the real one does in tests/cluster."""
    for program in ("squeue", "scontrol"):
        said = f"{program}: error: _establish_config_source: failed to fetch config"
        (tmp_path / program).write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    write_status(tmp_path / "out", "running")
    env, here = {"PATH": f"{tmp_path}:/usr/bin:/bin"}, f"output.url={tmp_path}/out"
    done = run("status", "run.yaml", here, env=env, cwd=tmp_path)
    assert done.code == 0 and "running, step 3 of 3" in done.out and "SLURM" not in done.out + done.err
    assert "asked to save and stop" in run("cancel", "run.yaml", here, env=env, cwd=tmp_path).out
    asked = run("status", "run.yaml", here, "--on", "slurm", env=env, cwd=tmp_path)
    assert "_establish_config_source" in asked.out + asked.err, "who asks for SLURM hears what it says"


def test_a_slurm_that_does_not_answer_hides_no_run(config: RunConfig, tmp_path: Path) -> None:
    for program in ("squeue", "scontrol", "sacct"):
        (tmp_path / program).write_text("#!/bin/sh\necho 'error: Unable to contact slurm controller' >&2\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    write_status(tmp_path / "out", "running")
    env, here = {"PATH": f"{tmp_path}:/usr/bin:/bin"}, f"output.url={tmp_path}/out"
    done = run("status", "run.yaml", here, env=env, cwd=tmp_path)
    assert (
        done.code == 0 and "running, step 3 of 3" in done.out and "job: unknown, squeue: SLURM said: Unable" in done.out
    )
    done = run("status", env=env, cwd=tmp_path)
    assert done.code == 1 and "JobError: squeue: SLURM said: Unable to contact slurm controller. Ask" in done.err


def write_status(folder: Path, state: str, **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    status = {"state": state, "reason": "", "step": 3, "updated": "2026-11-21T15:00:00+00:00", "checkpoint": 2, **more}
    (folder / "status.json").write_text(json.dumps(status))


def test_it_looks_before_anything_is_queued(config: RunConfig, tmp_path: Path) -> None:
    def look(*words: str, **wanted: Any) -> str:
        own = [f"output.url={tmp_path}/out", *words]
        return look_first(load_config("run.yaml", own), "run.yaml", own, Wanted(**wanted))

    assert look() == f"{tmp_path}/out"
    with pytest.raises(ConfigError, match=r"train.global_batch_size: 4 is not a multiple of 32 .*16 ranks"):
        look(nodes=2, gpus_per_node=8)
    with pytest.raises(OutputError, match="goes with its process"):
        look("output.url=memory://x")
    write_status(tmp_path / "out", "finished")
    (tmp_path / "out/run.yaml").write_text(Path("run.yaml").read_text())
    with pytest.raises(OutputError, match=r"holds this run, finished after 3 steps. Raise train.epochs"):
        look()
    with pytest.raises(OutputError, match="other fixed settings"):
        look("lora.rank=8")
    assert look(sweep="sweep")


def test_jobs_as_scontrol_shows_them() -> None:
    running, waiting, again = parse_show((GOLDEN / "scontrol_show.txt").read_text())
    assert (running.id, running.state, running.nodes, running.restarts) == ("2", "RUNNING", "n[1-2]", 0)
    assert (
        running.name == "qlora-a|b-0123ab" and running.left and timedelta(hours=1) < running.left < timedelta(hours=2)
    )
    assert running.comment == "s3://bucket/runs/a b=c D=d" and running.log == "/tmp/w x/qlora-2.log"
    assert running.own_folder == Path("/tmp/w x/qlora-2") and running.account == "" and not running.reason
    assert waiting.queued and waiting.starts.startswith("2026-11-21T") and waiting.left is None
    assert in_words(waiting) == "waits for nodes that others use (Resources)"
    assert again.restarts == 1 and "put back into the queue" in in_words(again)


def test_tasks_of_an_array_as_scontrol_shows_them() -> None:
    rest, first = parse_show((GOLDEN / "scontrol_show_array.txt").read_text())
    assert (rest.id, rest.log, rest.queued) == ("1_[2-3%1]", "", True)
    assert (first.id, first.state, first.own_folder.name) == ("1_1", "RUNNING", "qlora-1_1")
    assert first.log == "/tmp/w x/qlora-1_1.log"


def test_jobs_as_squeue_and_sacct_list_them() -> None:
    jobs = parse_queue((GOLDEN / "squeue.txt").read_text())
    assert {job.id: job.name for job in jobs}["2"] == "qlora-a|b-0123ab" and {"1_1", "1_2", "3"} < {
        job.id for job in jobs
    }
    (ended,) = parse_sacct("17|qlora-first-0123ab|CANCELLED by 1000|0:15|n[1-2]|main|physics|/work\nnoise\n")
    assert (ended.id, ended.state, ended.account, ended.active) == ("17", "CANCELLED", "physics", False)


def test_times_as_slurm_writes_them() -> None:
    assert duration("1-02:03:04") == timedelta(days=1, hours=2, minutes=3, seconds=4)
    assert duration("03:04") == timedelta(minutes=3, seconds=4) and duration("UNLIMITED") is None


@pytest.mark.parametrize(
    ("reason", "said", "never"),
    [
        ("Priority", "other jobs come first (Priority)", False),
        ("ReqNodeNotAvail, UnavailableNodes:n2", "down, drained or reserved (ReqNodeNotAvail, Unav", False),
        ("AssocGrpGRES", "its account uses all that it may at once", False),
        ("QOSMaxJobsPerUserLimit", "you use all that its QOS lets one user have", False),
        ("QOSMaxGRESPerJob", "more, or less, than its QOS lets one job have", True),
        ("PartitionTimeLimit", "lower --time", True),
        ("PartitionNodeLimit", "lower --nodes", True),
        ("JobHeldUser", "scontrol release 17", False),
        ("SomethingNew", "waits (SomethingNew)", False),
        ("", "SLURM has not looked at it yet (no reason yet)", False),
    ],
)
def test_why_a_job_waits_in_plain_words(reason: str, said: str, never: bool) -> None:
    assert said in in_words(Job("17", "x", "PENDING", reason)) and never_starts(reason) == never


TRACEBACK = """[3] Traceback (most recent call last):
[3]   File "a.py", line 1, in f
[0] step 3: loss 1.0
[3] ValueError: first
[3]{space}
[3] During handling of the above exception, another exception occurred:
[3]{space}
[3] Traceback (most recent call last):
[3]   File "b.py", line 2, in g
[3] RuntimeError: second
[3] more
""".replace("{space}", " ")


def test_what_failed_first_is_found_among_what_followed() -> None:
    follows = "[0] JobError: another rank ended after step 3, or cannot be reached; what it said tells why\n"
    failure = first_failure({"n1": follows, "n2": "[2] fine\n" + TRACEBACK + "[2] JobError: later\n"})
    assert failure and (failure.node, failure.rank, failure.lines[-1]) == ("n2", "3", "RuntimeError: second")
    assert "[0]" not in "".join(failure.lines) and len(failure.lines) == 9
    alone = first_failure({"n1": follows})
    assert alone and alone.follows and alone.rank == "0"
    several = first_failure({"n1": "[1] ConfigError: 2 problems in run.yaml\n[1]   a: b\n[1]   c: d\n[1] bye\n"})
    assert several and several.lines == ("ConfigError: 2 problems in run.yaml", "  a: b", "  c: d")
    early = first_failure({"batch": "start\nJobError: n2: see above\nbye\n", "n1": "[0] fine\n"})
    assert early and (early.rank, early.lines) == ("batch", ("JobError: n2: see above",))
    assert first_failure({"n1": "[0] Exception ignored in: x\n[0] no Error here\nTypeError: no rank\n"}) is None


def test_after_a_restart_the_last_start_counts() -> None:
    log = "[0] OutputError: old\n" + TRACEBACK + "--- start 1, 2026-11-21T15:00:00+00:00\n[0] loss\n"
    assert first_failure({"n1": log}) is None
    failure = first_failure({"n1": log + TRACEBACK.replace("second", "third")})
    assert failure and failure.lines[-1] == "RuntimeError: third" and len(failure.lines) == 9
    batch = "2026-11-21T15:00:00+00:00 job 17 on n[1-2], start {}: run.yaml\nJobError: of start {}\n"
    failure = first_failure({"batch": "".join(batch.format(n, n) for n in (0, 1)) + "[3] JobError: repeated\n"})
    assert failure and failure.lines == ("JobError: of start 1",)


def test_logs_are_read_on_by_whole_lines(tmp_path: Path) -> None:
    job = Job("17", "x", "RUNNING", folder=str(tmp_path), log=str(tmp_path / "qlora-17.log"))
    (tmp_path / "qlora-17").mkdir()
    files = Files(job)
    assert list(files.news()) == [] and files.failure() is None
    (tmp_path / "qlora-17.log").write_text("begins\n")
    node = tmp_path / "qlora-17/n1.log"
    node.write_text("[0] one\n[0] tw")
    assert list(files.news()) == ["batch | begins", "n1 | [0] one"]
    with open(node, "a") as log:
        log.write("o\n[0] three")
    assert list(files.news()) == ["n1 | [0] two"]
    assert list(files.news(all_of_it=True)) == ["n1 | [0] three"]
    assert list(Files(job, "n1").paths()) == ["n1"]


def test_a_run_as_its_folder_shows_it(config: RunConfig, tmp_path: Path) -> None:
    url = str(tmp_path / "out")
    assert read_run(url, config).lines() == [f"run {url}: has not begun"]
    write_status(tmp_path / "out", "running", restarts=1)
    rows = [{"step": n, "epoch": n / 10, "loss": 2.0 / n} for n in range(1, 5)] + [{"step": 4, "eval_loss": 0.75}]
    (tmp_path / "out/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    found = read_run(url, load_config("run.yaml", ["train.max_steps=null", "train.epochs=2"]))
    assert (found.step, found.steps, found.loss, found.eval_loss) == (4, 20, 0.5, 0.75)
    assert found.lines()[0] == f"run {url}: running, step 4 of 20, loss 0.5000, evaluation loss 0.7500"
    assert "newest checkpoint: step 2; restarts since: 1" in found.lines()[1]
    lost = Standing(found, Job("17", "x", "NODE_FAIL"))
    assert lost.orphaned and "its processes were lost" in lost.lines()[-1]
    assert lost.as_json()["run"]["status"]["checkpoint"] == 2 and lost.as_json()["job"]["state"] == "NODE_FAIL"
    (tmp_path / "out/status.json").write_text("{")
    assert "damaged" in read_run(url, config).lines()[0]


def test_a_job_folder_tells_whose_run_it_is(config: RunConfig, tmp_path: Path) -> None:
    for number, output in ((16, "runs/a"), (17, "runs/a"), (18, "runs/b")):
        folder = tmp_path / f"qlora-{number}"
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps({"job": str(number), "output": output, "words": ["run.yaml"]}))
    found = in_folders(str(tmp_path / "runs/a"), tmp_path)
    assert found and found.name == "qlora-17" and in_folders("s3://elsewhere", tmp_path) is None
    write_status(tmp_path / "runs", "running")
    seen = run_of(Job("18", "x", "RUNNING", folder=str(tmp_path)), None)
    assert seen and seen.url == str(tmp_path / "runs/b") and seen.status is None
    task = run_of(Job("20_2", "x", "RUNNING", folder=str(tmp_path)), config)
    assert task and task.url == "s3://bucket/runs/first/2"
    assert run_of(Job("20_[1-3]", "x", "PENDING", folder=str(tmp_path)), config) is None
