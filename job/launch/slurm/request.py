"""A request to sbatch as data: what would be typed, without a secret in it. Nothing here contacts anybody."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import job
from job.config import RunConfig, load_config
from job.config.urls import unsigned
from job.errors import ConfigError, InputError
from job.launch.slurm.sweep import settings_of

ONE_NODE, MORE_NODES, SWEEP = "single_node.sbatch", "zero3_2node.sbatch", "array_sweep.sbatch"
SITE = "QLORA_SITE"
READ_BY_RUNS = re.compile(
    r"(HF|AWS|NCCL|QLORA|SBATCH|DEEPSPEED|GOOGLE|FSSPEC)_\w+|\w+_proxy|\w+_PROXY|CUDA_VISIBLE_DEVICES"
)
"""Variables that a run or sbatch looks at, so that a request names them."""
OURS = ("--job-name", "--comment", "--parsable", "--wrap", "--test-only", "--wait", "--array", "--chdir")
"""Options of sbatch that the verbs rely on."""


@dataclass(frozen=True)
class Wanted:
    """What the user asks SLURM for; None leaves it to the site's settings and the script.

    Args:
        time: as sbatch writes it, such as 12:00:00.
        options: further options of sbatch, each `--name` or `--name=value`.
        script: path of another batch script.
        sweep: a file of settings, a line a run: one array task each.
        launcher: srun or pdsh.
        container: image that the ranks run in.
    """

    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    options: tuple[str, ...] = ()
    script: str | None = None
    sweep: str | None = None
    launcher: str | None = None
    container: str | None = None


@dataclass(frozen=True)
class Request:
    """What is handed to sbatch.

    Attributes:
        settings: variables that this request sets for the job; never secrets.
        environment: names of variables that are set here and go along, as sbatch hands on all; never their values.
        site: the shell file with the site's settings, read before sbatch; None without one.
    """

    program: str
    options: tuple[str, ...]
    script: str
    arguments: tuple[str, ...]
    settings: dict[str, str]
    environment: tuple[str, ...]
    site: str | None

    def words(self) -> list[str]:
        """The command; `env` sets what wins over the site's file."""
        before = ["env", *(f"{name}={value}" for name, value in self.settings.items())] if self.settings else []
        return [*before, self.program, *self.options, self.script, *self.arguments]

    def as_json(self) -> dict[str, Any]:
        """All of it, for programs."""
        return asdict(self)

    def lines(self) -> list[str]:
        """All of it, for people."""
        names = ", ".join(self.environment) or "none that a run reads"
        site = f". {shlex.quote(self.site)} && " if self.site else ""
        return [f"{site}{shlex.join(self.words())}", f"environment that goes along (names): {names}"]


def address(url: str, folder: Path | None = None) -> str:
    """output.url as everybody may see it and from everywhere: without a signature, a local folder from the root.

    Args:
        folder: where a relative one begins; the current one when left out.
    """
    url = str(unsigned(url)).removeprefix("file://").rstrip("/")
    return url if "://" in url else str((folder or Path.cwd()) / url)


def tag(url: str) -> str:
    """What the names of all jobs of one output address end with: 6 hex digits."""
    return sha256(url.encode()).hexdigest()[:6]


def job_name(config: RunConfig) -> str:
    """The name by which the job of this run is found again; squeue takes no commas, and people read it."""
    readable = re.sub(r"[^\w.]+", "-", config.run_name, flags=re.ASCII).strip("-")[:40] or "run"
    return f"qlora-{readable}-{tag(address(config.output.url))}"


def make_request(config: RunConfig, path: str, words: Sequence[str], wanted: Wanted, env: Mapping[str, str]) -> Request:
    """The request for this run.

    Args:
        config: the settings that `path` and `words` come to.
        path: the run file.
        words: section.key=value.
        env: the environment that sbatch will have.

    Raises:
        InputError: an option or a setting cannot be handed on, or a file is missing.
    """
    for word in words:
        if unsigned(word.partition("=")[2]) != word.partition("=")[2]:
            raise InputError(
                f"{word.partition('=')[0]}: a signed address would be shown to everybody by scontrol. Put it into the "
                "run file"
            )
    options = [f"--job-name={job_name(config)}", f"--comment={address(config.output.url)}"]
    if wanted.sweep is not None:
        options.append(f"--array=1-{len(sweep_runs(path, words, wanted.sweep))}")
    for name in ("nodes", "gpus_per_node", "cpus_per_task", "time", "partition", "account"):
        value = getattr(wanted, name)
        if value is not None:
            options.append(f"--{name.replace('_', '-')}={value}")
    options += [_further(option, wanted.sweep) for option in wanted.options]
    settings = {"QLORA_LAUNCHER": wanted.launcher, "QLORA_CONTAINER": wanted.container}
    script = _script(wanted)
    return Request(
        program="sbatch",
        options=("--parsable", *options),
        script=str(script),
        arguments=(path, *([wanted.sweep] if wanted.sweep is not None else []), *words),
        settings={name: value for name, value in settings.items() if value is not None},
        environment=tuple(sorted(name for name in env if READ_BY_RUNS.fullmatch(name) and name not in settings)),
        site=_site(script, env),
    )


def sweep_runs(path: str, words: Sequence[str], sweep: str) -> list[RunConfig]:
    """The runs of a sweep, in the order of its tasks, which count from 1.

    Raises:
        InputError: the file is missing, has no line with settings, or a line is wrong.
    """
    try:
        lines = [line.strip() for line in Path(sweep).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as fault:
        raise InputError(f"{sweep}: cannot be read ({fault}). Give a text file with settings, a line a run") from fault
    count = sum(bool(line) and not line.startswith("#") for line in lines)
    if not count:
        raise InputError(f"{sweep}: has no line with settings. Write a line a run, such as lora.rank=8 train.seed=1")
    runs = []
    for task in map(str, range(1, count + 1)):
        try:
            runs.append(load_config(path, settings_of(path, Path(sweep), task, words)))
        except ConfigError as fault:
            raise ConfigError(f"{sweep}, line of task {task}", fault.faults) from fault
    return runs


def _further(option: str, sweep: str | None) -> str:
    name = option.partition("=")[0]
    if not re.fullmatch(r"--[a-z][\w-]*", name):
        raise InputError(
            f"--option {option}: is no long option of sbatch. Write --option=--name=value, such as --option=--qos=high"
        )
    if name in OURS and not (name == "--array" and sweep):  # some tasks, or some at once: the last one counts
        raise InputError(
            f"--option {option}: {name} is set by qlora submit, whose other verbs rely on it. Leave it out"
        )
    return option


def _script(wanted: Wanted) -> Path:
    """The batch script: the one named, else that of the shape, here or beside the package.

    Raises:
        InputError: there is none.
    """
    if wanted.script is not None:
        if not Path(wanted.script).is_file():
            raise InputError(f"--script {wanted.script}: there is no such file. Give the path of a batch script")
        return Path(wanted.script)
    name = SWEEP if wanted.sweep is not None else MORE_NODES if (wanted.nodes or 1) > 1 else ONE_NODE
    places = [Path("slurm") / name, Path(job.__file__).parent.parent / "slurm" / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(
            f"there is no batch script {' nor '.join(map(str, places))}. Start from the repository's folder, or give "
            "one with --script"
        )
    return found


def _site(script: Path, env: Mapping[str, str]) -> str | None:
    """The file of the site's settings: QLORA_SITE, else site.sh beside the script, if it is there.

    Raises:
        InputError: QLORA_SITE names a file that is not there.
    """
    if named := env.get(SITE):
        if not Path(named).is_file():
            raise InputError(f"{SITE} is {named}, and there is no such file. Unset it, or name the site's settings")
        return str(Path(named).absolute())
    beside = script.parent / "site.sh"
    return str(beside.absolute()) if beside.is_file() else None
