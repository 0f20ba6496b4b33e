"""The logs of all pods of a RayJob as they are written, to its end: reconnected, and told apart by their pods."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from job.config import RunConfig
from job.errors import InputError, JobError
from job.launch.kubernetes.api import Cluster
from job.launch.kubernetes.jobs import Job, parse, pods_of, show
from job.launch.kubernetes.logs import Log, Source, chosen, job_of, print_logs, sources, tell_failure
from job.launch.kubernetes.pending import stage_in_words
from job.launch.kubernetes.refusals import Absent, Expired, NoAnswer
from job.launch.kubernetes.watch import config_of, job_lines, run_of, why

Say = Callable[[str], None]
LOOK_S = 5
"""Seconds between two looks at which pods there are; changes of the RayJob are heard at once."""
LAST_LINES_S, LAST_WORDS_S = 10.0, 1.0
"""Seconds that logs may still take when the RayJob has ended: of containers that have, too, and of those that go on."""
KEPT_LINES = 20_000
"""Lines of each log that are looked through for what failed first."""
ANSWERS_AGAIN_S = 600.0
"""Seconds for which an API server that does not answer is asked again."""


def logs(
    cluster: Cluster, config: RunConfig | None, name: str | None, follow: bool, pod: str | None, put: Say, say: Say
) -> int:
    """Print the logs of a run's RayJob; the exit code: when followed, 0 if its run finished, else 1.

    Args:
        name: of a RayJob, instead of settings.
        follow: go on until it ends.
        pod: show this pod's log alone.
        put: gets the lines of the logs.
        say: hears why it waits, and how it ended.

    Raises:
        InputError: there is no such RayJob, it has no logs, or the user may not read them.
        JobError: the API server does not answer.
    """
    job = job_of(cluster, config, name)
    if not follow:
        print_logs(cluster, job, pod, put)
        return 0
    if job.active:
        job = _Follow(cluster, job, pod, put, say).to_the_end()
    else:
        with suppress(Absent):  # its pods are removed some time after the end
            print_logs(cluster, job, pod, put)
    run = run_of(job, config or config_of(cluster, job))
    for line in [*(run.lines() if run else []), *job_lines(job)]:
        say(line)
    if run is None or run.status is None:
        return 0 if job.succeeded else 1
    return 0 if run.finished else 1


class _Follow:
    """Readers of all logs, one thread each, until the RayJob ends."""

    def __init__(self, cluster: Cluster, job: Job, pod: str | None, put: Say, say: Say):
        self.cluster, self.job, self.pod, self.put, self.say = cluster, job, pod, put, say
        self.pods: dict[str, dict[str, Any]] = {}
        self.texts: dict[str, deque[str]] = {}
        self.readers: dict[Source, threading.Thread] = {}
        self.one_at_a_time = threading.Lock()
        self.over = threading.Event()
        self.told: list[str] = []
        self.deaf: OSError | None = None

    def to_the_end(self) -> Job:
        """The RayJob as it ended; all that was written by then is put."""
        while self.job.active and self.deaf is None:
            self._start_readers()
            self._tell_waiting()
            self.job = _next(self.cluster, self.job)
        if self.deaf is not None:  # nobody reads on, as behind `| head`
            raise self.deaf
        self._start_readers()
        self.over.set()
        begun, going = time.monotonic(), sources(self.pods.values(), ("running",))
        for source, reader in self.readers.items():
            limit = LAST_WORDS_S if source in going else LAST_LINES_S
            reader.join(max(begun + limit - time.monotonic(), 0.0))
        if not self.job.succeeded:
            with self.one_at_a_time:
                tell_failure(self.pods.values(), self.texts, self.put)
        return self.job

    def _start_readers(self) -> None:
        try:
            pods = chosen(pods_of(self.cluster, self.job), self.pod)
        except NoAnswer:
            return  # the next look is soon
        self.pods |= {pod["metadata"]["name"]: pod for pod in pods}
        for source in sources(pods):
            if source not in self.readers:
                self.texts[source.label] = deque(maxlen=KEPT_LINES)
                reader = threading.Thread(target=self._read, args=(Log(self.cluster, source),), daemon=True)
                self.readers[source] = reader
                reader.start()

    def _read(self, log: Log) -> None:
        """Read a log until its container ends, beginning again where the connection broke."""

        def put(line: str) -> None:
            with self.one_at_a_time:
                self.texts[log.source.label].append(line)
                self.put(f"{log.source.label} | {line}")

        while True:
            last_look = self.over.is_set()
            try:
                log.read(put, follow=not last_look)
                if last_look or not self._runs(log.source):
                    return log.read(put, follow=False)
            except InputError:  # the pod is gone
                return None
            except OSError as fault:
                self.deaf = fault
                return None
            except JobError:
                if last_look:
                    return None
            self.over.wait(0.5)

    def _runs(self, source: Source) -> bool:
        pod = self.cluster.get(self.cluster.core("pods", source.pod), f"pod {source.pod}")
        status = pod.get("status") or {}
        containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
        return any(one["name"] == source.container and "running" in (one.get("state") or {}) for one in containers)

    def _tell_waiting(self) -> None:
        if not self.job.queued:
            return
        told = [f"job {self.job.name}: {stage_in_words(self.job)}"]
        with suppress(NoAnswer):
            told += why(self.cluster, self.job)
        if told != self.told:
            self.told = told
            for line in told:
                self.say(line)


def _next(cluster: Cluster, job: Job) -> Job:
    """The RayJob as it is after its next change, or after LOOK_S. What is too old to be watched from (410) is read
    anew; a server that does not answer is asked again.

    Raises:
        JobError: it did not answer for ANSWERS_AGAIN_S.
    """
    end = time.monotonic() + ANSWERS_AGAIN_S
    while True:
        try:
            one = {"fieldSelector": f"metadata.name={job.name}"}
            for event in cluster.changes(cluster.rayjobs(), "RayJobs", job.version, LOOK_S, **one):
                thing = event.get("object") or {}
                if thing.get("metadata", {}).get("name") != job.name:
                    continue
                now = parse(thing)
                if event.get("type") == "DELETED":
                    return replace(now, deleting=True)
                if now.version != job.version:
                    return now
            return job
        except Expired:
            return _now(cluster, job)
        except NoAnswer:
            if time.monotonic() > end:
                raise
            time.sleep(1.0)


def _now(cluster: Cluster, job: Job) -> Job:
    try:
        return show(cluster, job.name)
    except Absent:
        return replace(job, deleting=True)
