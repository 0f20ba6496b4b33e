"""The verbs for runs on Kubernetes that others have not: submit, and the check of a cluster before it."""

import json
import shlex
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from job.cli_jobs import Context, Namespace, submit
from job.cli_words import Config, Settings, load, say

MACHINE = "machine"
"""What `qlora preflight` checks when nothing else stands before CONFIG."""


class _Checks(TyperGroup):
    """`preflight CONFIG` is `preflight machine CONFIG`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args if args and args[0] in self.commands else [MACHINE, *args])


checks = typer.Typer(
    cls=_Checks,
    help="Check nodes, or a cluster, before a run holds them: qlora preflight CONFIG, or preflight kubernetes CONFIG.",
    rich_markup_mode=None,
)
Values = Annotated[
    list[str] | None, typer.Option("--values", "-f", metavar="FILE", help="Values of the chart; repeatable.")
]
Nodes = Annotated[int | None, typer.Option(min=1, help="Worker pods, each a node of the run.")]
GpusPerNode = Annotated[int | None, typer.Option(min=0, help="GPUs of each.")]
Release = Annotated[str | None, typer.Option(metavar="NAME", help="Helm's name of it; made of the run's.")]


@submit.command("kubernetes")
def submit_kubernetes(
    config: Config,
    settings: Settings = None,
    values: Values = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    namespace: Namespace = None,
    context: Context = None,
    release: Release = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the request and ask nobody.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the request as JSON; with --dry-run.")] = False,
) -> None:
    """Send a run to a cluster with helm, as the chart charts/qlora: a RayJob of KubeRay.

    What is left out comes from the values files and the chart. Keys come from secrets that the values name.

    Example: qlora submit kubernetes runs.yaml --values team.yaml --nodes 2 --gpus-per-node 8
    """
    run = load(config, settings)
    from job.launch.kubernetes.request import Wanted, make_request

    wanted = Wanted(tuple(values or ()), nodes, gpus_per_node, namespace, context, release)
    request = make_request(run, config, settings or (), wanted)
    if dry_run:
        for line in [json.dumps(request.as_json(), indent=1)] if as_json else request.lines():
            typer.echo(line)
        return
    from job.launch.kubernetes import api
    from job.launch.kubernetes import submit as sending

    url = sending.look_first(run, request, say)
    job = sending.submit(api.connect(namespace, context), request, url, say)
    typer.echo(f"job {job.name}")
    where = [("--namespace", namespace), ("--context", context)]
    same = [config, *(settings or ()), "--on", "kubernetes", *(word for pair in where if pair[1] for word in pair)]
    for verb in ("status", "logs -f", "cancel"):
        typer.echo(f"  qlora {verb} {shlex.join(map(str, same))}")


@checks.command("kubernetes")
def preflight_kubernetes(
    config: Config,
    settings: Settings = None,
    values: Values = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    namespace: Namespace = None,
    context: Context = None,
    release: Release = None,
) -> None:
    """Check a cluster before a run is sent: KubeRay, rights, secrets, classes, quotas, GPUs, images. 0 when it is fit.

    Example: qlora preflight kubernetes runs.yaml --values team.yaml
    """
    run = load(config, settings)
    from job.launch.kubernetes import api
    from job.launch.kubernetes.preflight import preflight
    from job.launch.kubernetes.request import Wanted, make_request

    wanted = Wanted(tuple(values or ()), nodes, gpus_per_node, namespace, context, release)
    request = make_request(run, config, settings or (), wanted)
    code = preflight(api.connect(namespace, context), run, request, typer.echo)
    if code:
        raise typer.Exit(code)
