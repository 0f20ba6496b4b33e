"""What `compare` prints."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from job.config import RunConfig
from job.generate import Answers
from job.run_folder import RunFolder
from job.sinks import evaluations, read_metrics
from job.store import Store


def answers_table(answers: Sequence[Answers]) -> Table:
    """Questions down, base and tuned model across."""
    table = Table(box=box.ROUNDED, show_lines=True, expand=True)
    known = any(answer.wanted for answer in answers)
    for name in ("question", *(["wanted"] if known else []), "base", "tuned"):
        table.add_column(name, ratio=1, overflow="fold")
    for answer in answers:
        table.add_row(answer.question, *([answer.wanted] if known else []), answer.base, answer.tuned)
    return table


def summary(config: RunConfig) -> Iterator[str]:
    """Evaluation loss before and after, and where the adapter lies."""
    store = Store(config.output.url, config.storage)
    losses = evaluations(read_metrics(store))
    if losses:
        (_, before), *later = losses
        if later:
            step, after = min(later, key=lambda evaluated: evaluated[1]) if config.evaluation.keep_best else later[-1]
            yield f"evaluation loss: {before:.4f} before, {after:.4f} after {step} steps"
        else:
            yield f"evaluation loss: {before:.4f} before the first step, and not measured since"
    status = RunFolder(config).status
    if status and status.state != "finished":
        yield f"the run is {status.state} after {status.step} steps: this adapter is none of a finished run"
    yield f"adapter: {store.url}/adapter"
