"""A request to helm as data: what would be typed, without a secret in it. Nothing here contacts anybody."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

import job
from job.config import RunConfig
from job.config.urls import unsigned
from job.errors import InputError, OutputError
from job.launch.slurm.request import address, tag
from job.store import is_url

CHART = "charts/qlora"
RUN_LABEL = "qlora.run"
"""The label of a RayJob by which it is found again, however it was sent: the chart computes `tag` of the address."""
OUTPUT_NOTE = "qlora.output"
"""Its annotation that says where the run writes, for those who have no run file at hand."""
_RELEASE = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_NAMES_AT_MOST = 37
"""Signs of a release's name: the RayJob's has a hash behind it, and KubeRay allows 47."""


@dataclass(frozen=True)
class Wanted:
    """What the user asks Kubernetes for; None leaves it to the values files, the chart and the kubeconfig.

    Args:
        values: files of the chart's values, the later ones win.
        context: of the kubeconfig.
        release: helm's name for what is installed; made of the run's name when left out.
    """

    values: tuple[str, ...] = ()
    nodes: int | None = None
    gpus_per_node: int | None = None
    namespace: str | None = None
    context: str | None = None
    release: str | None = None


@dataclass(frozen=True)
class Request:
    """What is handed to helm.

    Attributes:
        config: path of the run file, which becomes a ConfigMap.
        settings: section.key=value, which the chart puts behind `qlora train`.
        values: what this request says of the chart's values itself; never secrets.
    """

    release: str
    chart: str
    config: str
    files: tuple[str, ...]
    values: dict[str, Any]
    namespace: str | None
    context: str | None

    def words(self) -> list[str]:
        """The command that sends it."""
        return ["helm", "upgrade", "--install", self.release, self.chart, *self._options()]

    def rendering(self) -> list[str]:
        """The command that only renders what would be sent."""
        return ["helm", "template", self.release, self.chart, *self._options()]

    def _options(self) -> list[str]:
        where = [("--namespace", self.namespace), ("--kube-context", self.context)]
        options = [word for name, value in where if value is not None for word in (name, value)]
        options += [word for path in self.files for word in ("--values", path)]
        options += ["--set-file", f"config={_escaped(self.config)}"]
        for name, value in self.values.items():
            options += ["--set-json", f"{name}={json.dumps(value, ensure_ascii=False)}"]
        return options

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return {**asdict(self), "command": self.words()}

    def lines(self) -> list[str]:
        """All of it, for people."""
        return [shlex.join(self.words()), f"keys come from the secrets that the values name; config is {self.config}"]


def release_name(config: RunConfig) -> str:
    """The release of this run's output address: one run, one release, whatever is submitted for it."""
    ending = tag(address(config.output.url))
    readable = re.sub(r"[^a-z0-9]+", "-", config.run_name.lower()).strip("-") or "run"
    return f"qlora-{readable[: _NAMES_AT_MOST - len(ending) - 7].rstrip('-')}-{ending}"


def make_request(config: RunConfig, path: str, words: Sequence[str], wanted: Wanted) -> Request:
    """The request for this run.

    Args:
        config: the settings that `path` and `words` come to.
        path: the run file.
        words: section.key=value.

    Raises:
        InputError: a setting or an option cannot be handed on, or a file is missing.
    """
    _refuse_signatures(config)
    if not is_url(config.output.url) or config.output.url.startswith(("file:", "memory:")):
        raise OutputError(
            f"output.url: {config.output.url} is a folder of this machine, and pods write elsewhere. Use a bucket, "
            "such as s3://bucket/runs/first; for a folder of a volume claim use helm itself, since nobody can look "
            "into it from here"
        )
    release = wanted.release or release_name(config)
    if not _RELEASE.fullmatch(release) or len(release) > _NAMES_AT_MOST:
        raise InputError(
            f"--release {release}: is no name of a release. Use a-z, 0-9 and -, at most {_NAMES_AT_MOST} of them"
        )
    for file in wanted.values:
        if not Path(file).is_file():
            raise InputError(f"--values {file}: there is no such file. Give a YAML file with values of the chart")
    values: dict[str, Any] = {"settings": list(words)}  # also when empty: those of a values file were not looked at
    values |= {"nodes": wanted.nodes} if wanted.nodes is not None else {}
    values |= {"gpusPerNode": wanted.gpus_per_node} if wanted.gpus_per_node is not None else {}
    return Request(release, str(_chart()), path, wanted.values, values, wanted.namespace, wanted.context)


def shape(request: Request) -> tuple[int, int] | None:
    """Nodes and GPUs a node that a request comes to: its own, else the last values file's, else the chart's; None when
    nobody says it.

    Raises:
        InputError: a values file cannot be read.
    """
    said: dict[str, Any] = {}
    for path in (f"{request.chart}/values.yaml", *request.files):
        said |= _values(path)
    said |= request.values
    nodes, gpus = said.get("nodes"), said.get("gpusPerNode")
    return (nodes, gpus) if isinstance(nodes, int) and isinstance(gpus, int) else None


def _values(path: str) -> Mapping[str, Any]:
    try:
        read = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
        raise InputError(f"{path}: cannot be read as YAML ({fault}). Give a file with values of the chart") from fault
    if not isinstance(read or {}, dict):
        raise InputError(f"{path}: holds no names with values. Give a YAML file with values of the chart")
    return read or {}


def _escaped(path: str) -> str:
    """A path as helm's --set takes it, where commas and brackets have a meaning."""
    return re.sub(r"([,\\{}\[\]])", r"\\\1", path)


def _refuse_signatures(config: RunConfig) -> None:
    """The run file becomes a ConfigMap, and settings a command line: many may read both.

    Raises:
        InputError: an address in the settings is signed.
    """
    for section, settings in config.model_dump(mode="json").items():
        for name, value in settings.items():
            if unsigned(value) != value:
                raise InputError(
                    f"{section}.{name}: a signed address would be shown to everybody who may read the namespace. Use "
                    "a bucket, with its keys in a secret that the values name"
                )


def _chart() -> Path:
    """The chart, here or beside the package.

    Raises:
        InputError: there is none.
    """
    places = [Path(CHART), Path(job.__file__).parent.parent / CHART]
    found = next((place for place in places if (place / "Chart.yaml").is_file()), None)
    if found is None:
        raise InputError(
            f"there is no chart {' nor '.join(map(str, places))}. Start from the repository's folder, which holds it"
        )
    return found
