"""What verbs share: CONFIG and the settings behind it as arguments, read with their warnings, and a line to people."""

from typing import Annotated, Any

import typer

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The run file, YAML; see configs/.")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Settings that win over the file's.")
]
Source = Annotated[str, typer.Argument(metavar="CONFIG|RUN|ADAPTER", help="A run file, or a run's or adapter's URL.")]
Out = Annotated[str, typer.Argument(metavar="OUT", help="An empty or a new folder, or its URL.")]


def read_dotenv() -> None:
    """The secrets of an .env file here, before any library reads HF_ENDPOINT or keys."""
    from job.config import load_dotenv_file

    load_dotenv_file()


def load(path: str, settings: list[str] | None) -> Any:
    """The run file with these settings, and what it warns of said."""
    from job.config import load_config

    read_dotenv()
    read = load_config(path, settings or ())
    if read.model.trust_remote_code:
        say("Warning: model.trust_remote_code runs Python code from the checkpoint with all your rights")
    return read


def say(line: str) -> None:
    """A line for people, apart from what programs read."""
    typer.echo(line, err=True)
