"""A sweep: one file of settings, a line a run, each run with a folder of its own."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from job.config import load_config
from job.errors import InputError


def settings_of(config: str, file: Path, task: str, words: Sequence[str]) -> list[str]:
    """The settings of one task, which win over those that all have.

    Args:
        file: a line a run, `section.key=value ...` as in a shell; empty lines and those behind # do not count.
        task: its number in the array, from 1 on.
        words: settings of all runs.

    Raises:
        InputError: there is no such line, a quote in it is not closed, or it sets output.url, which is the run file's
            with the number behind it.
    """
    if not file.is_file():
        raise InputError(f"{file}: there is no such file. Expected a line of settings for each task of the array")
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not (task.isascii() and task.isdecimal() and 1 <= int(task) <= len(lines)):
        raise InputError(
            f"{file} has {len(lines)} lines of settings, and this is task {task}: sbatch --array=1-{len(lines)}"
        )
    try:
        own = shlex.split(lines[int(task) - 1])
    except ValueError as fault:  # a quote that is not closed
        raise InputError(f"{file}, line of task {task}: {fault}. Quote as in a shell") from fault
    if any(word.startswith("output.url=") for word in own):
        raise InputError(
            f"{file}: line {task} sets output.url. Leave it out: each run gets the run file's with /{task}"
        )
    output = load_config(config, (*words, *own)).output.url.rstrip("/")
    return [*words, *own, f"output.url={output}/{task}"]
