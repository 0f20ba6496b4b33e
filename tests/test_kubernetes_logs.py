"""The logs of a run's pods, now and to its end, whatever breaks: against a stand-in for the API server."""

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kmock import Response

from job.config import RunConfig, load_config
from job.errors import InputError, JobError
from job.launch.kubernetes import follow as following
from job.launch.kubernetes import logs as reading
from job.launch.kubernetes.api import connect
from job.launch.kubernetes.follow import logs
from job.launch.kubernetes.logs import sources, what_failed
from tests.conftest import settings
from tests.kube import Kube, add_pod, add_rayjob, make_kube, write_status

__all__ = ["make_kube"]
SUBMITTED = """\x1b[36m(RayTrainWorker pid=71, ip=10.0.0.5)\x1b[0m [1] step 2: loss 1.0
(RayTrainWorker pid=72, ip=10.0.0.6) [0] JobError: another rank ended after step 2, or cannot be reached
\x1b[36m(RayTrainWorker pid=71, ip=10.0.0.5)\x1b[0m [1] ValueError: of rank 1
(RayTrainWorker pid=71, ip=10.0.0.5) [1] bye
Job failed"""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run that writes to `out`."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings("owner/model", "rows.jsonl", tmp_path / "out")))
    return load_config(str(path))


def stamped(*lines: str, start: int = 0) -> bytes:
    """Lines as Kubernetes gives them with their times, a second each."""
    return b"".join(f"2026-11-21T15:00:{start + n:02}.5Z {line}\n".encode() for n, line in enumerate(lines))


def write(kube: Kube, pod: str, *parts: Any) -> None:
    """What requests for a pod's log get."""
    kube.answer(f"get {kube.path('Pod', pod)}/log", parts if len(parts) > 1 else parts[0])


def ran(kube: Kube, url: str, state: str = "SUCCEEDED") -> None:
    """A RayJob that has ended, whose three pods are still there."""
    add_rayjob(kube, "first", url, "Complete" if state == "SUCCEEDED" else "Failed", state)
    add_pod(kube, "first-submit", "first", "submitter", "Succeeded")
    add_pod(kube, "w1", "first", "worker")
    add_pod(kube, "head", "first", "head")
    write(kube, "first-submit", stamped("loss 1", "loss 0.5"))
    write(kube, "head", stamped("Ray runs"))
    write(kube, "w1", stamped("joined"))


def read(config: RunConfig | None, follow: bool = False, pod: str | None = None) -> tuple[int, list[str], list[str]]:
    put: list[str] = []
    said: list[str] = []
    return logs(connect(), config, None, follow, pod, put.append, said.append), put, said


def test_the_logs_are_read_pod_by_pod(kube: Kube, config: RunConfig) -> None:
    ran(kube, config.output.url)
    code, put, _ = read(config)
    assert code == 0 and put == [
        "first-submit | loss 1",
        "first-submit | loss 0.5",
        "head | Ray runs",
        "w1 | joined",
    ]
    assert read(config, pod="head")[1] == ["head | Ray runs"]
    asked = kube.asked("get", "pods/w1/log")[0].params
    assert (asked["container"], asked["timestamps"], asked["follow"]) == ("ray-worker", "true", "false")


def test_what_failed_first_stands_in_front(kube: Kube, config: RunConfig) -> None:
    add_rayjob(kube, "first", config.output.url, "Failed", "FAILED")
    add_pod(kube, "first-submit", "first", "submitter", "Failed")
    write(kube, "first-submit", stamped(*SUBMITTED.splitlines()))
    _, put, _ = read(config)
    assert put[:3] == ["failed first: rank 1, as first-submit says", "  ValueError: of rank 1", ""]


def terminated(code: int, reason: str, when: str) -> dict[str, Any]:
    return {"state": {"terminated": {"exitCode": code, "reason": reason, "finishedAt": when}}}


def pod(name: str, role: str, container: str, **told: Any) -> dict[str, Any]:
    labels = {"ray.io/node-type": role}
    return {
        "metadata": {"name": name, "labels": labels},
        "status": {"containerStatuses": [{"name": container, **told}]},
    }


def test_pods_that_were_lost_are_named_by_the_time_of_their_end() -> None:
    pods = [
        pod("h", "head", "ray-head", **terminated(1, "Error", "2026-11-21T15:00:09Z")),
        pod("w1", "worker", "ray-worker", **terminated(137, "OOMKilled", "2026-11-21T15:00:01Z")),
        pod("w2", "worker", "ray-worker", **terminated(0, "Completed", "2026-11-21T15:00:00Z")),
        pod("s", "submitter", "ray-job-submitter", **terminated(1, "Error", "2026-11-21T14:00:00Z")),
    ]
    assert what_failed(pods, {}) == [
        "failed first: pod w1 (ray-worker): OOMKilled, exit code 137",
        "  then pod h (ray-head): Error, exit code 1",
    ]
    said = what_failed(pods[1:2], {"s": SUBMITTED})
    assert said[1:] == ["and rank 1, as s says", "  ValueError: of rank 1"]
    evicted = {"metadata": {"name": "w3"}, "status": {"reason": "Evicted", "message": "The node was low on memory."}}
    assert what_failed([evicted], {}) == ["failed first: pod w3 was ended: Evicted: The node was low on memory."]
    assert what_failed([], {"s": "all is well"}) == []


def test_a_command_that_failed_before_its_ranks_began_is_named() -> None:
    assert what_failed([], {"s": "submitting\nConfigError: 1 problem in run.yaml\n  lora.rnak: unknown name"}) == [
        "failed first: the command",
        "  ConfigError: 1 problem in run.yaml",
        "    lora.rnak: unknown name",
    ]


def test_containers_that_have_begun_are_told_apart() -> None:
    several = {"metadata": {"name": "h"}, "status": {"containerStatuses": [
        {"name": "ray-head", "state": {"running": {}}},
        {"name": "ray-job-submitter", "state": {"terminated": {}}},
        {"name": "waits", "state": {"waiting": {}}},
    ]}}  # fmt: skip
    assert [source.label for source in sources([several])] == ["h/ray-head", "h/ray-job-submitter"]


def test_without_logs_it_says_why(kube: Kube, config: RunConfig) -> None:
    with pytest.raises(InputError, match=r"there is no RayJob of output.url .*/out in namespace team. Submit the run"):
        read(config)
    add_rayjob(kube, "first", config.output.url, "Initializing")
    with pytest.raises(
        InputError, match=r"job first has no logs: none of its pods has begun. See qlora status --on kube"
    ):
        read(config)
    add_pod(kube, "w1", "first", "worker")
    with pytest.raises(InputError, match=r"--node w2: job first has no log of a pod of this name. There are: w1"):
        read(config, pod="w2")


def test_one_that_ended_and_whose_pods_are_gone_is_told_by_its_record(kube: Kube, config: RunConfig) -> None:
    add_rayjob(kube, "first", config.output.url, "Complete", "SUCCEEDED")
    write_status(Path(config.output.url), "finished")
    code, put, said = read(config, follow=True)
    assert code == 0 and not put and said[-1].startswith("job first: SUCCEEDED, ended")


@pytest.mark.parametrize(
    ("state", "status", "code"),
    [("SUCCEEDED", "finished", 0), ("FAILED", "finished", 0), ("FAILED", "interrupted", 1), ("SUCCEEDED", None, 0)],
)
def test_the_exit_code_is_the_runs(state: str, status: str | None, code: int, kube: Kube, config: RunConfig) -> None:
    ran(kube, config.output.url, state)
    if status:
        write_status(Path(config.output.url), status)
    assert read(config, follow=True)[0] == code


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks come every second, and silence is short."""
    monkeypatch.setattr(following, "LOOK_S", 1)
    monkeypatch.setattr(reading, "SILENCE_S", 0.7)


class Story(threading.Thread):
    """What happens to a cluster while its logs are followed: acts, each when its moment has come."""

    def __init__(self, *acts: tuple[Callable[[], bool], Callable[[], Any]]):
        super().__init__(daemon=True)
        self.acts = acts
        self.start()

    def run(self) -> None:
        for moment, act in self.acts:
            end = time.monotonic() + 15
            while not moment() and time.monotonic() < end:
                time.sleep(0.02)
            act()


def ends(kube: Kube, url: str, state: str = "SUCCEEDED") -> None:
    write_status(Path(url), "finished" if state == "SUCCEEDED" else "failed")
    status = {"jobStatus": state, "jobDeploymentStatus": "Complete" if state == "SUCCEEDED" else "Failed"}
    kube.change("RayJob", "first", metadata={"resourceVersion": "9"}, status=status)


def test_logs_are_followed_from_waiting_to_the_end(kube: Kube, config: RunConfig, quick: None) -> None:
    url = config.output.url
    add_rayjob(kube, "first", url, "Initializing")
    write(kube, "w1", stamped("one"), lambda: asyncio.sleep(0.2), stamped("two", start=1))
    put: list[str] = []
    said: list[str] = []

    def begins() -> None:
        add_pod(kube, "w1", "first", "worker")
        running = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
        kube.change("RayJob", "first", metadata={"resourceVersion": "5"}, status=running)

    def ended() -> None:
        kube.change("Pod", "w1", status={"containerStatuses": [{"name": "ray-worker", "state": {"terminated": {}}}]})
        ends(kube, url)

    Story((lambda: bool(said), begins), (lambda: len(put) == 2, ended))
    assert logs(connect(), config, None, True, None, put.append, said.append) == 0
    assert put == ["w1 | one", "w1 | two"]
    assert said[0] == "job first: its Ray cluster is being started (Initializing)" and "run" in said[1]


def test_a_log_goes_on_where_its_connection_broke(kube: Kube, config: RunConfig, quick: None) -> None:
    url = config.output.url
    add_rayjob(kube, "first", url, "Running", "RUNNING")
    add_pod(kube, "w1", "first", "worker")
    kube.answer_once(f"get {kube.path('Pod', 'w1')}/log", (stamped("one", "two"), lambda: asyncio.sleep(5)))
    kube.answer(f"get {kube.path('Pod', 'w1')}/log", stamped("two", "three", start=1))
    put: list[str] = []
    Story((lambda: len(put) == 3, lambda: ends(kube, url)))
    assert logs(connect(), config, None, True, None, put.append, [].append) == 0
    assert put == ["w1 | one", "w1 | two", "w1 | three"]
    assert [one.params.get("sinceTime") for one in kube.asked("get", "w1/log")][:2] == [None, "2026-11-21T15:00:01Z"]


def test_a_watch_that_is_too_old_is_begun_anew(kube: Kube, config: RunConfig, quick: None) -> None:
    url = config.output.url
    add_rayjob(kube, "first", url, "Running", "RUNNING")
    add_pod(kube, "w1", "first", "worker")
    write(kube, "w1", stamped("one"))
    gone = {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old resource version"}}
    kube.answer_once(f"get {kube.path('RayJob')}?watch=true", (gone,))
    Story((lambda: bool(kube.asked("get", "rayjobs/first")), lambda: ends(kube, url)))
    assert logs(connect(), config, None, True, None, [].append, [].append) == 0
    assert kube.asked("get", "rayjobs/first")


def test_a_server_that_is_busy_for_a_while_ends_nothing(kube: Kube, config: RunConfig, quick: None) -> None:
    url = config.output.url
    add_rayjob(kube, "first", url, "Running", "RUNNING")
    add_pod(kube, "w1", "first", "worker")
    write(kube, "w1", stamped("one"))
    busy = Response(status=503, payload={"kind": "Status", "code": 503, "message": "busy"})
    kube.answer_once(f"get {kube.path('RayJob')}?watch=true", busy)
    Story((lambda: len(kube.asked("get", "watch=true")) > 1, lambda: ends(kube, url, "FAILED")))
    put: list[str] = []
    assert logs(connect(), config, None, True, None, put.append, [].append) == 1 and put[0] == "w1 | one"


def test_one_that_waits_is_waited_for_though_events_do_not_come(kube: Kube, config: RunConfig, quick: None) -> None:
    add_rayjob(kube, "first", config.output.url, "Initializing")
    kube.refuse(f"get {kube.path('Event')}", 503, "busy")
    Story((lambda: bool(kube.asked("get", "watch=true")), lambda: ends(kube, config.output.url)))
    said: list[str] = []
    assert logs(connect(), config, None, True, None, [].append, said.append) == 0
    assert said[0] == "job first: its Ray cluster is being started (Initializing)"


def test_it_ends_when_nobody_reads_on(kube: Kube, config: RunConfig, quick: None) -> None:
    add_rayjob(kube, "first", config.output.url, "Running", "RUNNING")
    add_pod(kube, "w1", "first", "worker")
    write(kube, "w1", stamped("one"))

    def closed(line: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        logs(connect(), config, None, True, None, closed, [].append)


def test_a_server_that_stays_silent_is_given_up(
    kube: Kube, config: RunConfig, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "ANSWERS_AGAIN_S", 0.0)
    add_rayjob(kube, "first", config.output.url, "Running", "RUNNING")
    kube.refuse(f"get {kube.path('RayJob')}?watch=true", 503, "busy")
    with pytest.raises(JobError, match="cannot answer now"):
        logs(connect(), config, None, True, None, [].append, [].append)


def test_one_that_is_deleted_meanwhile_is_over(kube: Kube, config: RunConfig, quick: None) -> None:
    add_rayjob(kube, "first", config.output.url, "Running", "RUNNING")
    Story((lambda: bool(kube.asked("get", "watch=true")), lambda: kube.remove("RayJob", "first")))
    said: list[str] = []
    assert logs(connect(), config, None, True, None, [].append, said.append) == 1
    assert said[-1] == "job first: is being deleted"
