"""What verbs share: CONFIG and the settings behind it as arguments, read with their warnings, and a line to people."""

from typing import Annotated, Any

import typer

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="The run file, YAML; see configs/.")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Settings that win over the file's.")
]


def load(path: str, settings: list[str] | None) -> Any:
    """The run file with these settings, and what it warns of said."""
    from job.config import load_config, load_dotenv_file

    load_dotenv_file()  # before any library reads HF_ENDPOINT or keys
    read = load_config(path, settings or ())
    if read.model.trust_remote_code:
        say("Warning: model.trust_remote_code runs Python code from the checkpoint with all your rights")
    return read


def say(line: str) -> None:
    """A line for people, apart from what programs read."""
    typer.echo(line, err=True)
