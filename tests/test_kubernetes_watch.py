"""How a run on Kubernetes stands, why it waits, and how it is ended: against a stand-in for the API server."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from job.config import RunConfig, load_config
from job.errors import InputError, JobError, OutputError
from job.launch.kubernetes.api import connect
from job.launch.kubernetes.cancel import cancel
from job.launch.kubernetes.jobs import Job, find, parse
from job.launch.kubernetes.pending import hopeless, in_words, stage_in_words
from job.launch.kubernetes.watch import config_of, job_lines, standings
from tests.conftest import settings
from tests.kube import Kube, add_event, add_pod, add_rayjob, make_kube, write_status

__all__ = ["make_kube"]
UNSCHEDULABLE = (
    "0/5 nodes are available: 3 Insufficient nvidia.com/gpu, 2 node(s) had untolerated taint {team: other}. "
    "preemption: 0/5 nodes are available."
)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run that writes to `out`."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings("owner/model", "rows.jsonl", tmp_path / "out")))
    return load_config(str(path))


def stand(config: RunConfig | None, name: str | None = None) -> list[str]:
    return [line for standing in standings(connect(), config, name) for line in standing.lines()]


def test_what_the_run_says_stands_beside_what_kubernetes_says(kube: Kube, config: RunConfig) -> None:
    url = config.output.url
    add_rayjob(kube, "first-1", url, "Failed", "FAILED", created="2025")
    add_rayjob(kube, "first-2", url, "Running", "RUNNING", dashboardURL="first-2.team.svc:8265", failed=1)
    add_rayjob(kube, "other", url + "-other", "Running", "RUNNING")
    write_status(Path(url), "running")
    assert stand(config) == [
        f"run {url}: running, step 3 of 3",
        "  newest checkpoint: step 2; status written 2026-11-21T15:00:00+00:00",
        "job first-2: RUNNING on cluster first-2-abc, failed starts: 1 of 3; dashboard first-2.team.svc:8265",
    ]
    assert stand(config, "first-1")[2] == "job first-1: FAILED, ended unknown when"


def test_one_that_ended_is_said_with_kuberays_reason(kube: Kube, config: RunConfig) -> None:
    url = config.output.url
    ended = {"reason": "PreRunningDeadlineExceeded", "message": "not running\nafter 3600 s", "endTime": "2026-11-21"}
    add_rayjob(kube, "first", url, "Failed", "", **ended)
    write_status(Path(url), "running")
    said = stand(config)
    assert said[2:] == [
        "job first: Failed: its pods did not start in time: GPUs never came, or an image could not be pulled (not "
        "running after 3600 s), ended 2026-11-21",
        "  no RayJob of it waits or runs: its processes were lost. The same command goes on from its checkpoint",
    ]


def test_a_run_without_a_rayjob_is_known_by_its_folder(kube: Kube, config: RunConfig) -> None:
    write_status(Path(config.output.url), "finished")
    assert stand(config)[-1] == "job: none in this namespace; what ended long ago is removed"
    assert "processes were lost" not in "".join(stand(config))


def test_without_a_run_file_all_runs_of_the_namespace_are_listed(kube: Kube, config: RunConfig, tmp_path: Path) -> None:
    add_rayjob(kube, "a", str(tmp_path / "out"), "Running", "RUNNING")
    add_rayjob(kube, "b", str(tmp_path / "none"), "Initializing")
    add_rayjob(kube, "c", str(tmp_path / "out"), "Complete", "SUCCEEDED")
    kube.add("RayJob", "of-somebody-else", spec={})
    write_status(tmp_path / "out", "running")
    said = stand(None)
    assert said[0].startswith(f"run {tmp_path}/out: running") and "job b: its Ray cluster is being started" in said[4]
    assert len(said) == 5 and "somebody" not in "".join(said)


def test_a_rayjob_tells_its_settings(kube: Kube, config: RunConfig, tmp_path: Path) -> None:
    command = f"qlora train --on ray --nodes 2 /etc/qlora/run.yaml output.url={tmp_path}/else 'tracking.run_name=a b'"
    volume = {"name": "config", "configMap": {"name": "first-0a"}}
    spec = {"entrypoint": command, "rayClusterSpec": {"headGroupSpec": {"template": {"spec": {"volumes": [volume]}}}}}
    add_rayjob(kube, "first", config.output.url, "Running", "RUNNING", spec=spec)
    assert stand(None, "first")[0] == f"run {tmp_path}/out: has not begun"  # by the annotation
    kube.add("ConfigMap", "first-0a", data={"run.yaml": (tmp_path / "run.yaml").read_text()})
    (job,) = find(connect(), config.output.url)
    read = config_of(connect(), job)
    assert read and read.output.url == f"{tmp_path}/else" and read.run_name == "a b"
    assert stand(None, "first")[0] == f"run {tmp_path}/else: has not begun"


def test_a_server_that_does_not_answer_hides_no_run(kube: Kube, config: RunConfig) -> None:
    write_status(Path(config.output.url), "running")
    kube.refuse(f"get {kube.path('RayJob')}", 503, "busy")
    assert f"job: unknown, {kube.url} cannot answer now (503: busy). Try again in a minute" in stand(config)
    with pytest.raises(JobError, match="cannot answer now"):
        stand(None)


def test_a_refusal_to_look_is_said_at_once(kube: Kube, config: RunConfig) -> None:
    kube.refuse(f"get {kube.path('RayJob')}", 403, "no")
    with pytest.raises(InputError, match="you may not list RayJobs in namespace team"):
        stand(config)


def test_why_pods_wait_is_said_for_each_cause(kube: Kube, config: RunConfig) -> None:
    add_rayjob(kube, "first", config.output.url, "Initializing")
    unfit = [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": UNSCHEDULABLE}]
    for name in ("w1", "w2"):
        add_pod(kube, name, "first", "worker", "Pending", conditions=unfit)
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x:1"'}
    add_pod(
        kube, "h", "first", "head", "Pending", containerStatuses=[{"name": "ray-head", "state": {"waiting": waiting}}]
    )
    add_pod(kube, "of-others", "other", "worker", "Pending", conditions=unfit)
    add_event(kube, "Pod", "w1", "FailedScheduling", UNSCHEDULABLE)
    add_event(
        kube, "RayCluster", "first-abc", "FailedToCreateWorkerPod", "pods is forbidden: exceeded quota: gpus, used"
    )
    said = stand(config)
    assert said[1] == "job first: its Ray cluster is being started (Initializing)"
    assert said[2].startswith("  h: its image cannot be pulled: check image in the values")
    assert said[3].startswith(
        "  w1 and 1 more: too few GPUs are free: others use them, or no node has as many; nodes are kept for others by "
        "a taint {team: other}: add tolerations to the values (0/5 nodes are available: 3 Insufficient nvidia.com/gpu"
    )
    assert "the namespace has used up its quota gpus: wait for others, or ask for less" in said[4] and len(said) == 6
    assert said[5] == "  waiting alone will not cure this: mend it and submit again, or end it with qlora cancel"


def test_a_run_that_kueue_holds_back_says_its_queue_and_why(kube: Kube, config: RunConfig) -> None:
    queue = {"kueue.x-k8s.io/queue-name": "gpus"}
    add_rayjob(kube, "first", config.output.url, "Suspended", labels=queue, spec={"suspend": True})
    short = "couldn't assign flavors to pod set workers: insufficient unused quota for nvidia.com/gpu in flavor h100"
    add_event(kube, "Workload", "rayjob-first-0a1b2", "Pending", short, type="Normal")
    said = stand(config)
    assert said[1] == "job first: waits in Kueue's queue gpus (Suspended)"
    assert said[2] == f"  rayjob-first-0a1b2: Kueue lets it wait until its queue has enough free (Pending: {short})"


def test_events_that_the_user_may_not_see_cost_only_the_reason(kube: Kube, config: RunConfig) -> None:
    add_rayjob(kube, "first", config.output.url, "Initializing")
    kube.refuse(f"get {kube.path('Event')}", 403, "no")
    assert stand(config)[2].startswith(
        "  why it waits is not shown: you may not list events in namespace team (403: no)"
    )


def test_of_a_run_that_goes_old_events_say_nothing(kube: Kube, config: RunConfig) -> None:
    add_rayjob(kube, "first", config.output.url, "Running", "RUNNING")
    add_pod(kube, "w1", "first", "worker")
    add_event(
        kube, "RayCluster", "first-abc", "FailedToCreateWorkerPod", "pods is forbidden: exceeded quota: gpus, used"
    )
    assert len(stand(config)) == 2


@pytest.mark.parametrize(
    ("said", "words", "never"),
    [
        (
            "0/1 nodes are available: 1 Insufficient memory.",
            "no node has as much memory free: lower the resources",
            False,
        ),
        ("1 Insufficient rdma/hca", "no node has as much rdma/hca free", False),
        (
            "2 node(s) didn't match Pod's node affinity/selector",
            "no node has the labels that the values ask for",
            False,
        ),
        ('persistentvolumeclaim "rows" not found', "there is no volume claim rows: name one", True),
        (
            "pod has unbound immediate PersistentVolumeClaims",
            "its volume is not there yet: does the storage class",
            False,
        ),
        (
            'CreateContainerConfigError: secret "keys" not found',
            "there is no secret keys: create it, or name another",
            True,
        ),
        ("InvalidImageName: couldn't parse", "its image cannot be pulled", True),
        ('FailedCreate: violates PodSecurity "restricted:latest"', "the namespace's Pod Security forbids", True),
        ("NotTriggerScaleUp: pod didn't trigger scale-up", "the cluster cannot add a node that would do", False),
        ("TriggeredScaleUp: pod triggered scale-up", "the cluster adds nodes for it", False),
        ("PodInitializing", "its container is being made: a large image takes minutes to pull", False),
        ("FailedMount: MountVolume.SetUp failed", "a volume cannot be mounted", False),
    ],
)
def test_kubernetes_words_in_plain_ones(said: str, words: str, never: bool) -> None:
    assert any(one.startswith(words) for one in in_words(said)) and hopeless([said]) == never


def test_what_nobody_knows_is_shown_as_it_is(kube: Kube, config: RunConfig) -> None:
    add_rayjob(kube, "first", config.output.url, "Initializing")
    new = [{"type": "PodScheduled", "status": "False", "message": "the moon is full"}]
    add_pod(kube, "w1", "first", "worker", "Pending", conditions=new)
    assert stand(config)[2] == "  w1: waits (the moon is full)"


@pytest.mark.parametrize(
    ("stage", "queued", "active", "said"),
    [
        ("", True, True, "KubeRay has not looked at it yet; does its operator run? (no status yet)"),
        ("Initializing", True, True, "its Ray cluster is being started (Initializing)"),
        ("Waiting", True, True, "it waits to be submitted (Waiting)"),
        ("Retrying", True, True, "its last start failed; a new Ray cluster is being made (Retrying)"),
        ("Suspended", True, True, "it is suspended until somebody lets it go (Suspended)"),
        ("Running", False, True, "RUNNING on cluster"),
        ("Complete", False, False, "Complete, ended unknown when"),
        ("Failed", False, False, "Failed, ended unknown when"),
        ("ValidationFailed", False, False, "ValidationFailed, ended unknown when"),
    ],
)
def test_stages_of_a_rayjob(stage: str, queued: bool, active: bool, said: str) -> None:
    job = Job("first", "team", stage=stage)
    assert (job.queued, job.active) == (queued, active) and said in job_lines(job)[0]
    assert stage_in_words(job).endswith(f"({stage or 'no status yet'})")


def test_one_that_is_being_deleted_is_over() -> None:
    job = parse({"metadata": {"name": "first", "deletionTimestamp": "2026"}, "status": {"jobStatus": "RUNNING"}})
    assert not job.active and job_lines(job) == ["job first: is being deleted"]


def test_the_newest_that_ended_counts_when_none_runs(kube: Kube) -> None:
    for name, created in (("b", "2025"), ("a", "2026")):
        add_rayjob(kube, name, "s3://bucket/x", "Failed", "FAILED", created=created)
    assert [job.name for job in find(connect(), "s3://bucket/x")] == ["a"]


def ended(kube: Kube, config: RunConfig | None, name: str | None = None, now: bool = False) -> str:
    said: list[str] = []
    cancel(connect(), config, name, now, said.append)
    return "\n".join(said)


def rayjob(kube: Kube, name: str) -> dict[str, Any]:
    return connect().get(kube.path("RayJob", name), name)


def test_a_run_that_goes_is_asked_to_save_and_stop_and_is_not_begun_again(kube: Kube, config: RunConfig) -> None:
    url = config.output.url
    add_rayjob(kube, "first", url, "Running", "RUNNING", startTime="2026-11-21T14:00:00Z")
    write_status(Path(url), "running")
    said = ended(kube, config)
    assert f"job first was asked to save and stop: {url}/stop is there now" in said
    assert "qlora cancel --on kubernetes --job first --now" in said
    assert (Path(url) / "stop").exists() and rayjob(kube, "first")["spec"]["backoffLimit"] == 0


def test_one_whose_folder_cannot_be_read_is_left_as_it_is(kube: Kube, config: RunConfig) -> None:
    add_rayjob(kube, "first", config.output.url, "Running", "RUNNING")
    write_status(Path(config.output.url), "running")
    (Path(config.output.url) / "status.json").write_text("{")
    with pytest.raises(
        OutputError, match=r"status.json is damaged, so it cannot be asked to stop. Give the keys of its"
    ):
        ended(kube, config)
    assert rayjob(kube, "first")["spec"]["backoffLimit"] == 2


def test_one_that_may_not_be_held_back_is_not_asked(kube: Kube, config: RunConfig) -> None:
    url = config.output.url
    add_rayjob(kube, "first", url, "Running", "RUNNING")
    write_status(Path(url), "running")
    kube.refuse(f"patch {kube.path('RayJob', 'first')}", 403, "no")
    with pytest.raises(InputError, match="you may not patch RayJob first in namespace team"):
        ended(kube, config)
    assert not (Path(url) / "stop").exists()


@pytest.mark.parametrize(
    ("stage", "status", "said"),
    [
        ("Suspended", None, "job first is deleted, it had not begun"),
        ("Initializing", "running", "job first is deleted, it had not begun"),
        ("Running", None, "job first is deleted; its run had not begun, so there was nothing to save"),
        ("Running", "interrupted", "its run had not begun"),
    ],
)
def test_one_that_waits_is_deleted(stage: str, status: str | None, said: str, kube: Kube, config: RunConfig) -> None:
    add_rayjob(kube, "first", config.output.url, stage)
    if status:
        write_status(Path(config.output.url), status)
    assert said in ended(kube, config) and len(kube.asked("delete", "rayjobs/first")) == 1


def test_one_whose_status_is_of_an_earlier_start_has_not_begun(kube: Kube, config: RunConfig) -> None:
    add_rayjob(kube, "first", config.output.url, "Running", "RUNNING", startTime="2026-11-21T16:00:00Z")
    write_status(Path(config.output.url), "running")
    assert "its run had not begun" in ended(kube, config)


def test_now_deletes_what_runs(kube: Kube, config: RunConfig) -> None:
    add_rayjob(kube, "first", config.output.url, "Running", "RUNNING")
    said = ended(kube, None, "first", now=True)
    assert said == "job first is deleted; its pods get their grace period, what is not saved by then is lost"
    assert kube.asked("delete", "rayjobs/first")[0].params["propagationPolicy"] == "Background"


def test_one_that_is_tried_again_goes_on_later(kube: Kube, config: RunConfig) -> None:
    add_rayjob(kube, "first", config.output.url, "Retrying", failed=1)
    assert "its run goes on from its last checkpoint when submitted" in ended(kube, config)


def test_there_may_be_nothing_to_cancel(kube: Kube, config: RunConfig) -> None:
    with pytest.raises(InputError, match=r"there is nothing to cancel: no job of output.url .*/out waits or runs. See"):
        ended(kube, config)
    add_rayjob(kube, "first", config.output.url, "Failed", "FAILED")
    with pytest.raises(InputError, match=r"waits or runs \(job first has ended: FAILED\). See qlora status"):
        ended(kube, config)
    with pytest.raises(InputError, match=r"there is no RayJob gone in namespace team"):
        ended(kube, None, "gone")
    with pytest.raises(InputError, match="neither CONFIG nor --job was given"):
        ended(kube, None)


def test_one_that_went_meanwhile_is_no_fault(kube: Kube, config: RunConfig) -> None:
    add_rayjob(kube, "first", config.output.url, "Suspended")
    kube.refuse(f"delete {kube.path('RayJob', 'first')}", 404, "gone")
    assert "job first is deleted" in ended(kube, config)


def test_one_that_does_not_say_where_it_writes_takes_the_run_file(kube: Kube) -> None:
    kube.add("RayJob", "plain", spec={}, status={"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"})
    with pytest.raises(
        InputError, match=r"job plain does not say where its run writes. Give CONFIG, or end it with --now"
    ):
        ended(kube, None, "plain")
