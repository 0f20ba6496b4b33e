"""The image: built on a base of Debian's packages, run as the chart's pods and as a bare container."""

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster import helm
from tests.cluster.containers import IMAGE, Containers, Pod, containers
from tests.cluster.hosts import Host
from tests.cluster.reach import reachable
from tests.conftest import REPOSITORY
from tests.s3 import BUCKET, S3, SECRET

pytestmark = pytest.mark.timeout(1800)  # building takes about six minutes of two cores
SMOKE = "/opt/qlora/smoke/run.yaml"
STEPS = 8
LOSS = re.compile(r"step (\d+)/\d+  loss ([\d.]+)")
OPERATORS = """
from deepspeed.accelerator import get_accelerator
for name in ("AsyncIOBuilder", "CPUAdamBuilder", "ShareMemCommBuilder"):
    print(get_accelerator().create_op_builder(name).load().__file__)
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    """Our image, built here."""
    with containers(tmp_path_factory.mktemp("containers")) as made:
        made.build()
        yield made


@pytest.fixture(autouse=True)
def no_container_left(image: Containers) -> Iterator[None]:
    """A test's pods end with it."""
    yield
    image.podman("rm", "--all", "--force", "--time=0")


@pytest.fixture(scope="module")
def smoke(image: Containers) -> str:
    """What the smoke prints under the chart's restrictions and without a network."""
    return image.run("qlora", "train", SMOKE)


def losses(said: str) -> dict[str, str]:
    return dict(LOSS.findall(said))


def test_the_smoke_learns_without_root_rights_a_writable_root_or_a_network(smoke: str, image: Containers) -> None:
    found = losses(smoke)
    assert len(found) == STEPS and float(found[str(STEPS)]) < float(found["1"]) - 0.3
    assert "adapter: /scratch/smoke/adapter" in smoke
    assert losses(image.run("qlora", "train", SMOKE, options=["--user=4321:4321"])) == found, "as any user"


def test_ranks_of_the_image_compile_nothing(smoke: str, image: Containers) -> None:
    ranks = f"qlora train {SMOKE} parallel.processes=2 parallel.strategy=zero3"
    said = image.run("bash", "-c", f"{ranks} && ls -AR /scratch", options=["--env=CXX=no-compiler"])
    assert {step: float(loss) for step, loss in losses(said).items()} == pytest.approx(
        {step: float(loss) for step, loss in losses(smoke).items()}, rel=1e-4
    )
    assert "/scratch/smoke/adapter:" in said and "torch_extensions" not in said, said


def test_deepspeeds_operators_are_there_for_older_processors_too(image: Containers) -> None:
    files = [line for line in image.run("python", "-c", OPERATORS).splitlines() if line.startswith("/opt/qlora/")]
    assert [Path(file).name.partition(".")[0] for file in files] == [
        *("async_io_op", "cpu_adam_op", "deepspeed_shm_comm_op")
    ]
    for file in files:  # 512 bits wide only where the code asks the processor first
        wide = image.run("bash", "-c", f"objdump --disassemble {file} | grep -c -w 'zmm[0-9]*' || true")
        assert int(wide) == 0 or "shm_comm" in file, f"{file}: {wide}"


def test_what_triton_and_the_launchers_need_is_there(image: Containers) -> None:
    tools = "tini bash sh grep tr wget ray qlora deepspeed python cc c++"
    image.run("bash", "-c", f"for one in {tools}; do command -v $one || exit; done")
    header = "python -c 'import sysconfig; print(sysconfig.get_paths()[\"include\"])'"
    image.run(
        "sh", "-c", f"echo '#include <Python.h>' | cc -I$({header}) -x c -c -o /scratch/it.o - && test -s /scratch/it.o"
    )


def test_all_versions_are_the_locks(image: Containers) -> None:
    lock = {line.partition("+")[0] for line in (REPOSITORY / "requirements.lock").read_text().splitlines()}
    found = image.run("python", "-m", "pip", "freeze", "--all").splitlines()
    own = {line.partition("+")[0] for line in found if not line.startswith(("pip==", "qlora-job"))}
    assert len(own) > 80 and own <= lock, own - lock


def test_the_image_says_what_it_is_and_is_nobodys_root(image: Containers) -> None:
    [said] = json.loads(image.podman("image", "inspect", IMAGE).stdout)
    labels = said["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == "0.1.0" and labels["io.qlora.variant"] == "cpu"
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", labels["org.opencontainers.image.revision"])
    assert said["Config"]["User"] == "1000:1000" and said["Config"]["Entrypoint"] == ["tini", "--"]
    assert image.run("cat", "/proc/1/comm") == "tini\n"


class Rendered:
    """The chart's pods on two hosts, started as KubeRay starts them."""

    def __init__(self, image: Containers, hosts: list[Host], env: dict[str, str], values: Any) -> None:
        self.manifests = helm.template(values)
        self.spec = helm.only(self.manifests, "RayJob")["spec"]
        self.token = {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.hosts, self.made = hosts, (image, env)
        self.cluster = self.spec["rayClusterSpec"]
        self.head = self._pod("head", self.cluster["headGroupSpec"]["template"], hosts[0])
        self.server = f"http://{hosts[0].address}:8265"

    def _pod(self, name: str, template: dict[str, Any], host: Host) -> Pod:
        return Pod(self.made[0], name, template["spec"], self.manifests, host, self.made[1])

    def start(self) -> None:
        """Head and workers, with the commands that KubeRay generates."""
        first = self.cluster["headGroupSpec"]["rayStartParams"]
        self.head.start(f"ray start --head --block {options(first)}", **self.token)
        for group in self.cluster.get("workerGroupSpecs", []):
            self._start_worker(group)

    def _start_worker(self, group: dict[str, Any]) -> None:
        where = f"{self.hosts[0].address}:6379"
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        ready = f"until ray health-check --address {where} >/dev/null 2>&1; do sleep 1; done"
        join = f"ray start --address={where} --block --num-cpus={limits['cpu']} {options(group['rayStartParams'])}"
        self.worker = self._pod("worker", group["template"], self.hosts[1])
        self.worker.start(f"{ready}; {join}", **self.token)

    def submitter(self, name: str) -> Pod:
        return self._pod(name, self.spec["submitterPodTemplate"], self.hosts[0])

    def hand_over(self, name: str, entrypoint: str) -> str:
        """KubeRay's submitter: wait for the head, hand the run over once, follow it to its end."""
        asks = (
            f"python -c 'import urllib.request; urllib.request.urlopen(\"{self.server}/api/gcs_healthz\", timeout=5)'"
        )
        known = f"ray job status --address {self.server} {name} >/dev/null 2>&1"
        hand = f"ray job submit --address {self.server} --no-wait --submission-id {name} -- {entrypoint}"
        follow = f"ray job logs --address {self.server} --follow {name}"
        return f"until {asks} >/dev/null 2>&1 ; do sleep 2 ; done ; if ! {known} ; then {hand} ; fi ; {follow}"

    def submit(self) -> str:
        """What the rendered run printed, which has succeeded."""
        done = self.submitter("first").run(self.hand_over("first", self.spec["entrypoint"]), **self.token)
        state = self.head.exec("ray", "job", "status", "--address", self.server, "first").stdout
        said = done.stdout + done.stderr
        assert "succeeded" in state, said + state + self.head.logs()
        return said


def options(params: dict[str, str]) -> str:
    return " ".join(f"--{name}={value}" for name, value in params.items())


def values(output: str, s3: S3, **train: Any) -> dict[str, Any]:
    """A run of the image's model that writes to a bucket."""
    config = yaml.safe_load((REPOSITORY / "images/smoke/run.yaml").read_text())
    config |= {"output": {"url": output}, "storage": s3.storage, "train": {**config["train"], **train}}
    resources = {"cpu": 2, "memory": "4Gi"}
    more = {"config": yaml.safe_dump(config), "worker": resources, "existingSecrets": ["bucket-keys"]}
    return helm.real(**more, settings=["tracking.run_name=it's first"])


def test_without_values_the_rendered_pods_run_the_smoke(smoke: str, image: Containers, two_hosts: list[Host]) -> None:
    pods = Rendered(image, two_hosts, {}, None)
    pods.start()
    assert losses(pods.submit()) == losses(smoke)


def test_the_rendered_pods_run_the_rendered_entrypoint_and_save_when_one_is_to_end(
    smoke: str, image: Containers, two_hosts: list[Host], s3: S3
) -> None:
    with reachable(s3, two_hosts[0]) as seen:
        pods = Rendered(image, two_hosts, s3.env, values(f"s3://{BUCKET}/rendered", seen))
        pods.start()
        assert losses(pods.submit()) == losses(smoke)
        assert s3.fs().size(f"{BUCKET}/rendered/adapter/adapter_model.safetensors") > 10_000

        long = pods.submitter("long")
        more = f"output.url=s3://{BUCKET}/long train.max_steps=100000"
        long.start(pods.hand_over("long", f"{pods.spec['entrypoint']} {more}"), **pods.token)
        wait_for(lambda: "step 3/" in long.logs(), long)
        ended = pods.worker.exec(*pods.worker.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"])
        assert ended.returncode == 0, ended.stderr
        status = json.loads(s3.fs().cat_file(f"{BUCKET}/long/status.json"))
        assert status["state"] == "interrupted" and status["checkpoint"] == status["step"] >= 3
        said = long.logs() + pods.head.logs() + pods.worker.logs()
        assert SECRET not in said and pods.token["RAY_AUTH_TOKEN"] not in said


def wait_for(what: Callable[[], bool], pod: Pod, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, pod.logs()
        time.sleep(0.5)
