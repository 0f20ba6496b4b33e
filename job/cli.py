"""The command `qlora`. Heavy libraries are imported by the verb that needs them."""

import io
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from job import __version__
from job.cli_adapters import adapters
from job.cli_jobs import jobs
from job.cli_kubernetes import MACHINE, checks
from job.cli_words import Config, Settings
from job.cli_words import load as _load
from job.cli_words import say as _say
from job.errors import InputError, Interrupted, JobError, OutputError
from job.extras import extra_of

app = typer.Typer(
    name="qlora",
    help="Fine-tune a language model with QLoRA: rows in a bucket go in, a tuned adapter comes out.\n\n"
    "Start with: qlora data CONFIG (what will be learnt), then qlora train CONFIG, then qlora compare CONFIG. "
    "Any setting can be given behind CONFIG as section.key=value; qlora config --explain train tells what there is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, 1 failed, 2 wrong input, 75 interrupted, 130 second Ctrl-C.",
)
app.add_typer(jobs)
app.add_typer(adapters)
app.add_typer(checks, name="preflight")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qlora {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
) -> None:
    """Options in front of the verb; the deepspeed launcher puts --local_rank there."""
    context.obj = local_rank


@app.command()
def train(
    context: typer.Context,
    config: Config,
    settings: Settings = None,
    on: Annotated[Literal["local", "ray"], typer.Option(help="This machine, or the Ray cluster it is in.")] = "local",
    nodes: Annotated[int | None, typer.Option(min=1, help="Ray: nodes; all that are there when left out.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=0, help="Ray: GPUs of each; 0 for CPUs.")] = None,
    wait_minutes: Annotated[float, typer.Option(min=0.1, help="Ray: how long workers may wait for their GPUs.")] = 10.0,
) -> None:
    """Fine-tune: write adapter, metrics and status under output.url.

    Example: qlora train configs/smollm2-135m-demo.yaml train.max_steps=20
    """
    import os

    settings_read = _load(config, settings)
    if settings_read.output.url.startswith("memory://"):
        raise OutputError(f"output.url: {settings_read.output.url} goes with this process. Use a folder or a bucket")
    if on == "ray":
        from job.launch.ray_train import driver
        from job.launch.ray_train.shape import Wanted

        text = Path(config).read_text(encoding="utf-8")
        wanted = Wanted(nodes, gpus_per_node, wait_minutes)
        sys.exit(driver.start(settings_read, text, settings or (), wanted, _say))
    from job.compile_later import compiled_when_called
    from job.hardware import count_gpus
    from job.launch import local
    from job.world import World, started_by_launcher

    if not started_by_launcher(os.environ):
        gpus = count_gpus()
        count = local.workers(settings_read, gpus)
        if count > 1:
            sys.exit(local.start(settings_read, ["train", config, *(settings or ())], count, gpus, _say))
    with compiled_when_called():
        from job.group import disconnect, lost_peer
        from job.model import quiet_libraries
        from job.train import train as run

    quiet_libraries()
    world = World.from_env(os.environ, context.obj)
    try:
        outcome = run(settings_read, world, _say if world.speaks else lambda line: None)
    except BaseException as fault:
        if world.world_size == 1 or isinstance(fault, Interrupted):
            disconnect()
        if lost_peer(fault):
            early = "another rank ended before the run began, or cannot be reached; what it said tells why"
            raise JobError(early) from fault
        raise  # alone with a fault, a rank would wait in disconnect for the others, and nobody would learn of it
    disconnect()
    if not world.speaks:
        return
    if outcome.state == "already finished":
        _say(f"This run is finished already ({outcome.step} steps). Adapter: {outcome.adapter_url}")
        return
    if outcome.eval_before is not None and outcome.eval_after is not None:
        _say(f"evaluation loss: {outcome.eval_before:.4f} before, {outcome.eval_after:.4f} after {outcome.step} steps")
    _say(f"adapter: {outcome.adapter_url}")


@app.command()
def plan(
    config: Config,
    settings: Settings = None,
    deepspeed: Annotated[bool, typer.Option("--deepspeed", help="Print the DeepSpeed configuration alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs a node; this machine's when left out.")] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of so many GPUs.")] = 1,
    gpu_memory: Annotated[float | None, typer.Option(min=1, help="Memory of a GPU, GiB.")] = None,
) -> None:
    """Say what a run will do and need, without a GPU: steps, batches, strategy, memory by item.

    Example: qlora plan runs.yaml --nodes 2 --gpus 4 --gpu-memory 80
    """
    run = _load(config, settings)
    from job.outlook import as_text, look_ahead, planned_for

    outlook = look_ahead(run, *planned_for(run, nodes, gpus, gpu_memory))
    if deepspeed:
        typer.echo(as_text(outlook.plan.deepspeed()))
    elif as_json:
        typer.echo(as_text(outlook.as_json()))
    else:
        for line in outlook.lines():
            typer.echo(line)


@checks.command(MACHINE)
def preflight(
    context: typer.Context,
    config: Config,
    settings: Settings = None,
    report: Annotated[bool, typer.Option("--report", help="Print what this node is, a line of JSON, alone.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Report the first free port from here on.")] = 29500,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that the whole exchange may take.")] = 45.0,
    until: Annotated[float, typer.Option(help="Unix time by which it is to be over, instead of --timeout.")] = 0.0,
    nodes: Annotated[str, typer.Option(metavar="A,B,...", help="Names of the nodes in the order of ranks.")] = "",
    verdict: Annotated[str | None, typer.Option(metavar="FILE", help="Write the verdict there too, as JSON.")] = None,
) -> None:
    """Check nodes before a run holds them: versions, GPUs, memory, clocks, storage, all-reduce. Names the bad ones.

    Alone it checks this machine, started by a launcher all nodes; qlora preflight kubernetes CONFIG checks a cluster.

    Example: deepspeed --hostfile hostfile --module job preflight runs.yaml
    """
    from pathlib import Path

    run = _load(config, settings)
    from job.preflight.verb import Options
    from job.preflight.verb import preflight as check

    named = [name for name in nodes.split(",") if name]
    options = Options(report, port, timeout, named, Path(verdict) if verdict else None, until)
    code = check(run, options, context.obj, sys.argv[1:], _say, typer.echo)
    if code:
        raise typer.Exit(code)


@app.command()
def data(
    config: Config,
    settings: Settings = None,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show, and how many held-out ones.")] = 3,
) -> None:
    """Show rows as the model will see them, trained on and held out, what is learnt, and what was dropped or cut.

    Example: qlora data configs/smollm2-135m-demo.yaml --rows 5
    """
    run = _load(config, settings)
    from rich.console import Console

    from job.data.load import make_encoder
    from job.data.show import show
    from job.data.split import read_split
    from job.model import quiet_libraries
    from job.pretrained import fetch
    from job.tokenizer import Tokenizer

    quiet_libraries()
    train, held_out = read_split(run)
    tokenizer = Tokenizer(fetch(run.model, run.storage)[0], run.model.trust_remote_code)
    encoder = make_encoder(run, tokenizer, train[0])
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"format {encoder.name}, {encoder.chat.name}; learnt text stands between ⟦ and ⟧", markup=False)
    for line in show(encoder, train, held_out, rows):
        console.print(line)


@app.command()
def compare(
    config: Config,
    settings: Settings = None,
    question: Annotated[list[str] | None, typer.Option("--question", "-q", help="Ask this; repeatable.")] = None,
) -> None:
    """Answer held-out rows, or your questions, with the base and with the adapter, side by side.

    Example: qlora compare configs/smollm2-135m-demo.yaml -q "Order: two pears for Ann in Oslo."
    """
    run = _load(config, settings)
    from rich.console import Console

    from job.generate import Responder
    from job.model import quiet_libraries
    from job.report import answers_table, summary

    quiet_libraries()
    responder = Responder(run)
    console = Console(highlight=False, markup=False, emoji=False)
    answers = [responder.compare_question(text) for text in question or ()]
    answers = answers or [responder.compare_row(row) for row in responder.held_out()]
    console.print(answers_table(answers))
    for line in summary(run):
        console.print(line, soft_wrap=True)


@app.command()
def chat(config: Config, settings: Settings = None) -> None:
    """Talk to the tuned model; an empty line or Ctrl-D ends it."""
    run = _load(config, settings)
    from job.generate import Responder
    from job.model import quiet_libraries
    from job.turns import Segment

    quiet_libraries()
    responder = Responder(run)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no UTF-8 are the question's fault, not the end
    turns: list[Segment] = []
    while question := _asked():
        asked = responder.encoder.kind.ask(question)
        try:
            answer = responder.chat([*turns, *asked], lambda text: typer.echo(text, nl=False))
        except InputError as fault:
            _say(str(fault))
            continue
        typer.echo()
        if asked[-1].role == "assistant":  # formats without turns have no memory
            turns += [*asked[:-1], asked[-1]._replace(content=answer, learn=False)]


@app.command()
def config(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of run files, for editors.")] = False,
    explain: Annotated[str | None, typer.Option(metavar="KEY", help="A setting (lora.rank) or section (lora).")] = None,
) -> None:
    """Explain settings."""
    import json

    from job.config.explain import explain as explained
    from job.config.explain import schema as made

    if schema:
        typer.echo(json.dumps(made(), indent=1))
    elif explain:
        typer.echo(explained(explain))
    else:
        raise typer.BadParameter("Give --schema or --explain KEY")


def _asked() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def main() -> None:
    """Run the command; a refusal is one message and its exit code, never a traceback."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported
    try:
        app(standalone_mode=True)
    except JobError as fault:
        typer.echo(f"{type(fault).__name__}: {fault}", err=True)
        sys.exit(fault.exit_code)
    except ModuleNotFoundError as fault:
        extra = extra_of(fault.name or "")
        if extra is None:
            raise
        typer.echo(f"InputError: {fault.name} is not installed. Install it with: pip install '{extra}'", err=True)
        sys.exit(InputError.exit_code)
    except KeyboardInterrupt:
        typer.echo("Stopped", err=True)
        sys.exit(130)
