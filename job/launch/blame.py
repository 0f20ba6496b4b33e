"""What failed first: ranks whose peer is gone say so in many words, and one of them says why."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

MOST_LINES = 60
BATCH = "batch"
_START = re.compile(r"^(?:--- start |\S+ job [\d_]+ on .*, start )\d+.*$", re.MULTILINE)
"""What the batch scripts write into the logs, which go on from one start of a job to the next."""
_RANKED = re.compile(r"\[(\d+)\] ?(?:\[rank\d+\]: ?)?(.*)")
"""A line of a rank; torch numbers those of its last traceback itself, once there is a process group."""
_ERROR = re.compile(r"[\w.]*(Error|Exception)(: .*)?$|Traceback \(most recent call last\):$")
_CHAINED = ("During handling of the above", "The above exception was", "Traceback (most recent call last)")
_FOLLOWS = re.compile(
    r"another rank ended|lost_peer|ncclRemoteError|DistBackendError|[Cc]onnection (closed|reset|refused)|Broken pipe"
    r"|Socket Timeout|DistNetworkError|DistStoreError|Timed out waiting|caused connection abort"
)
"""What ranks say that failed only because another one had."""


@dataclass(frozen=True)
class Failure:
    """The lines in which one rank says why it failed."""

    node: str
    rank: str
    lines: tuple[str, ...]

    @property
    def follows(self) -> bool:
        """Whether it names another rank's end as its cause."""
        return any(_FOLLOWS.search(line) for line in self.lines)


def first_failure(logs: Mapping[str, str]) -> Failure | None:
    """What failed first in the last start of a job: the lines of its logs bear no time, so the first error of each
    rank is looked at, and one that is no consequence of another rank's end counts.

    Args:
        logs: by node, lines beginning with `[rank] `. That of BATCH counts when no rank said anything: it tells what
            went wrong before they began, and repeats what they said.
    """
    nodes = {node: text for node, text in logs.items() if node != BATCH}
    found = [failure for node, text in nodes.items() for failure in _failures(node, text)]
    if not found and BATCH in logs:
        found = _failures(BATCH, logs[BATCH], unranked=True)
    return next((failure for failure in found if not failure.follows), next(iter(found), None))


def _failures(node: str, text: str, unranked: bool = False) -> list[Failure]:
    """The first error of each rank in the last start, in the order in which they stand there."""
    by_rank: dict[str, list[str]] = {}
    for line in _START.split(text)[-1].splitlines():
        ranked = _RANKED.match(line)
        if bool(ranked) == unranked:
            continue
        rank, said = ranked.groups() if ranked else (BATCH, line)
        if rank in by_rank:
            by_rank[rank].append(said)
        elif _ERROR.match(said):
            by_rank[rank] = [said]
    return [Failure(node, rank, tuple(_first_block(lines))) for rank, lines in by_rank.items()]


def _first_block(lines: list[str]) -> list[str]:
    """An error with the lines that belong to it: those indented, and all of a traceback with its causes."""
    block = lines[:1]
    inside = lines[0].startswith("Traceback")
    for line in lines[1:MOST_LINES]:
        belongs = line.startswith((" ", *_CHAINED)) or not line.strip()
        if not belongs and not inside:
            break
        if line.startswith("Traceback"):
            inside = True
        elif not belongs:
            inside = False  # the exception's own sentence ends its traceback
        block.append(line)
    while not block[-1].strip():
        block.pop()
    return block
