"""The verbs for jobs that others run: submit, status, logs, cancel. They look only at which launcher to ask."""

import json
import os
import shlex
from typing import Annotated, Any, Literal

import typer

from job.cli_words import Config, Settings, load, say

jobs = typer.Typer(rich_markup_mode=None)
submit = typer.Typer(
    help="Queue a run at a scheduler, which starts it on its nodes.", no_args_is_help=True, rich_markup_mode=None
)
jobs.add_typer(submit, name="submit")

MaybeConfig = Annotated[str | None, typer.Argument(metavar="CONFIG", help="The run file; or give --job.")]
JobId = Annotated[str | None, typer.Option("--job", metavar="ID", help="The job, or ARRAY_TASK, instead of CONFIG.")]
On = Annotated[
    Literal["slurm", "ray", "kubernetes", "local"] | None,
    typer.Option(
        "--on", help="Whom to ask; SLURM where there is one, else the run's folder alone.", show_default=False
    ),
]
Address = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        help="The job server of a Ray cluster.",
    ),
]
RAY = "http://127.0.0.1:8265"
Namespace = Annotated[str | None, typer.Option(help="Kubernetes: the namespace; the context's own when left out.")]
Context = Annotated[str | None, typer.Option(help="Kubernetes: the context of the kubeconfig.")]


@submit.command("slurm")
def submit_slurm(
    config: Config,
    settings: Settings = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs of each.")] = None,
    cpus_per_task: Annotated[int | None, typer.Option(min=1, help="CPU cores of each task.")] = None,
    time: Annotated[str | None, typer.Option(metavar="TIME", help="Time limit, such as 12:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Account.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="--NAME=VALUE", help="Any other option of sbatch; repeatable.")
    ] = None,
    script: Annotated[str | None, typer.Option(metavar="PATH", help="A batch script of your own.")] = None,
    array_sweep: Annotated[
        str | None, typer.Option(metavar="FILE", help="Settings, a line a run: an array with a task each.")
    ] = None,
    launcher: Annotated[Literal["srun", "pdsh"] | None, typer.Option(help="What starts the ranks.")] = None,
    container: Annotated[str | None, typer.Option(metavar="IMAGE", help="Image that the ranks run in.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the request and ask nobody.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the request as JSON; with --dry-run.")] = False,
) -> None:
    """Queue a run with sbatch.

    What is left out comes from the site's file (QLORA_SITE, else slurm/site.sh) and from the batch script.

    Example: qlora submit slurm runs.yaml --nodes 2 --gpus-per-node 8 --time 12:00:00
    """
    env = dict(os.environ)  # without what an .env file adds: the job reads that file itself
    run = load(config, settings)
    from job.launch.slurm import submit as slurm
    from job.launch.slurm.request import Wanted, make_request

    further = tuple(option or ())
    shape = (nodes, gpus_per_node, cpus_per_task, time, partition, account)
    wanted = Wanted(*shape, further, script, array_sweep, launcher, container)
    request = make_request(run, config, settings or (), wanted, env)
    if dry_run:
        for line in [json.dumps(request.as_json(), indent=1)] if as_json else request.lines():
            typer.echo(line)
        return
    number = slurm.submit(request, slurm.look_first(run, config, settings or (), wanted), env, say)
    typer.echo(f"job {number}")
    for verb in ("status", "logs -f", "cancel"):
        typer.echo(f"  qlora {verb} --job {number}")


@submit.command("ray")
def submit_ray(
    config: Config,
    settings: Settings = None,
    address: Address = RAY,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes; all that are there when left out.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="GPUs of each; 0 for CPUs.")] = None,
    wait_minutes: Annotated[float, typer.Option(min=0.1, help="How long workers may wait for their GPUs.")] = 10.0,
    working_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="A folder that goes with the job, CONFIG and its rows in it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the request and ask nobody.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the request as JSON; with --dry-run.")] = False,
) -> None:
    """Hand a run to a Ray cluster.

    Keys of storage come from the cluster's own environment: what is sent is seen by everybody who sees its dashboard.

    Example: qlora submit ray runs.yaml --address http://head:8265 --nodes 2 --gpus-per-node 8
    """
    run = load(config, settings)
    from job.launch.ray_train.request import make_request
    from job.launch.ray_train.shape import Wanted

    wanted = Wanted(nodes, gpus_per_node, wait_minutes)
    request = make_request(run, config, settings or (), wanted, address, working_dir)
    if dry_run:
        for line in [json.dumps(request.as_json(), indent=1)] if as_json else request.lines():
            typer.echo(line)
        return
    from job.launch.ray_train import jobs as ray

    number = ray.submit(run, request, wanted, say)
    typer.echo(f"job {number}")
    same = shlex.join([config, *(settings or ()), "--on", "ray", "--address", address])
    for verb in ("status", "logs -f", "cancel"):
        typer.echo(f"  qlora {verb} {same}")


@jobs.command()
def status(
    config: MaybeConfig = None,
    settings: Settings = None,
    job: JobId = None,
    on: On = None,
    address: Address = RAY,
    namespace: Namespace = None,
    context: Context = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say how a run stands: what it wrote itself, beside what the scheduler says of its job. Without CONFIG: all jobs.

    Example: qlora status runs.yaml
    """
    run = load(config, settings) if config else None
    if on == "ray":
        from job.launch.ray_train.jobs import lines_of

        said, rows = lines_of(run, job, address)
        for line in [json.dumps(rows, indent=1, default=str)] if as_json else said or ["no runs are known there"]:
            typer.echo(line)
        return
    found = _standings(run, job, on, namespace, context)
    if as_json:
        typer.echo(json.dumps([standing.as_json() for standing in found], indent=1))
        return
    for line in [line for standing in found for line in standing.lines()] or ["no jobs of yours wait or run"]:
        typer.echo(line)


@jobs.command()
def logs(
    config: MaybeConfig = None,
    settings: Settings = None,
    job: JobId = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends; 0 if it finished.")] = False,
    node: Annotated[str | None, typer.Option(help="This node's log alone; Kubernetes: this pod's.")] = None,
    on: On = None,
    address: Address = RAY,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Print what a job wrote, what failed first in front: the batch log, and each node's or pod's.

    Example: qlora logs runs.yaml -f
    """
    run = load(config, settings) if config else None
    if on == "ray":
        from job.launch.ray_train import jobs as ray

        code = ray.print_logs(run, job, follow, address, typer.echo, say)
    elif on == "kubernetes":
        from job.launch.kubernetes import follow as pods
        from job.launch.kubernetes.api import connect

        code = pods.logs(connect(namespace, context), run, job, follow, node, typer.echo, say)
    else:
        from job.launch.slurm.logs import print_logs

        _must_ask_slurm(on)
        code = print_logs(run, job, follow, node, typer.echo, say)
    if code:
        raise typer.Exit(code)


@jobs.command()
def cancel(
    config: MaybeConfig = None,
    settings: Settings = None,
    job: JobId = None,
    now: Annotated[bool, typer.Option("--now", help="End it at once, without a save.")] = False,
    on: On = None,
    address: Address = RAY,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Ask a run to save and stop, or take its job out of the queue.

    Example: qlora cancel runs.yaml
    """
    run = load(config, settings) if config else None
    if on == "ray":
        from job.launch.ray_train import jobs as ray

        ray.cancel(run, job, now, address, typer.echo)
        return
    if on == "kubernetes":
        from job.launch.kubernetes import cancel as pods
        from job.launch.kubernetes.api import connect

        pods.cancel(connect(namespace, context), run, job, now, typer.echo)
        return
    from job.launch.slurm import cancel as ending

    if _asks_slurm(on):
        ending.cancel(run, job, now, typer.echo)
    else:
        ending.cancel_without_slurm(run, now, typer.echo)


def _standings(run: Any, job: str | None, on: str | None, namespace: str | None, context: str | None) -> list[Any]:
    """How runs stand, by whom is asked."""
    if on == "kubernetes":
        from job.launch.kubernetes import watch as pods
        from job.launch.kubernetes.api import connect

        return list(pods.standings(connect(namespace, context), run, job))
    from job.launch.slurm import watch

    return list(watch.standings(run, job) if _asks_slurm(on) else watch.without_slurm(run))


def _asks_slurm(on: str | None) -> bool:
    from job.launch.slurm.commands import belongs_to_a_cluster

    return on == "slurm" or (on is None and belongs_to_a_cluster())


def _must_ask_slurm(on: str | None) -> None:
    from job.errors import InputError

    if not _asks_slurm(on):
        raise InputError(
            "a run that was started here writes to its terminal, there are no logs. Its metrics.jsonl has every step; "
            "logs of a job need --on slurm, ray or kubernetes"
        )
