"""`qlora preflight kubernetes`: what a run would send, held against what its cluster has."""

from collections.abc import Callable

from job.config import RunConfig
from job.errors import InputError
from job.launch.kubernetes.api import Cluster
from job.launch.kubernetes.checks import Finding, look
from job.launch.kubernetes.helm import render
from job.launch.kubernetes.needs import needs_of
from job.launch.kubernetes.request import Request
from job.launch.kubernetes.submit import look_first

Say = Callable[[str], None]


def preflight(cluster: Cluster, config: RunConfig, request: Request, put: Say) -> int:
    """Say what is fit and what is not, each with its cure; 0 when nothing speaks against the run, else 1.

    Args:
        request: what would be sent; helm renders it here.
        put: gets a line a finding.

    Raises:
        InputError: helm does not take the values, or the cluster does not know who asks.
        JobError: the cluster does not answer.
    """
    unfit = 0
    try:
        warnings: list[str] = []
        url = look_first(config, request, warnings.append)
        seen = Finding("ok", f"output {url} is free, and ranks and batches go together")
        for finding in [Finding("warning", said.removeprefix("Warning: ")) for said in warnings] or [seen]:
            put(finding.line())
    except InputError as fault:
        unfit += 1
        put(Finding("unfit", str(fault)).line())
    for finding in look(cluster, needs_of(render(request.rendering()))):
        unfit += finding.verdict == "unfit"
        put(finding.line())
    problems = "1 thing speaks" if unfit == 1 else f"{unfit} things speak"
    put(f"{problems} against this run on {cluster.server}" if unfit else "nothing speaks against this run")
    return 1 if unfit else 0
