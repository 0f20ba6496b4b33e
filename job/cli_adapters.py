"""The verbs for what a run left: its adapter under other names, or in its base."""

from typing import Annotated, Literal

import typer

from job.cli_words import Out, Settings, Source, read_dotenv, say
from job.errors import OutputError

adapters = typer.Typer(rich_markup_mode=None)


@adapters.command()
def export(
    source: Source,
    out: Out,
    settings: Settings = None,
    names: Annotated[
        Literal["original", "native"], typer.Option(help="The base's authors' own, or transformers'.")
    ] = "original",
) -> None:
    """Write an adapter under the names of its base's authors (ChatGLM, first-generation Qwen), or back.

    Example: qlora export runs.yaml s3://bucket/adapter-original
    """
    read_dotenv()
    from job.adapter_file import find
    from job.export import export as write
    from job.model import quiet_libraries
    from job.store import Store

    quiet_libraries()
    found = find(source, settings or ())
    write(found, Store(_lasting(out), found.storage), names, say)


@adapters.command()
def merge(
    source: Source,
    out: Out,
    settings: Settings = None,
    names: Annotated[
        Literal["native", "original"], typer.Option(help="transformers' own, or the base's authors'.")
    ] = "native",
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Type of the result; the base's when left out."),
    ] = None,
) -> None:
    """Add an adapter to its 16-bit base: a model of its own, streamed file by file. The same command goes on.

    Example: qlora merge runs.yaml s3://bucket/merged --dtype bfloat16
    """
    read_dotenv()
    from job.adapter_file import find
    from job.merge import merge as write
    from job.model import quiet_libraries
    from job.store import Store

    quiet_libraries()
    found = find(source, settings or ())
    write(found, Store(_lasting(out), found.storage), names, dtype, say)


def _lasting(out: str) -> str:
    if out.startswith("memory://"):
        raise OutputError(f"{out} goes with this process. Use a folder or a bucket")
    return out
