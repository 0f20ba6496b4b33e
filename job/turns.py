"""Stretches of text with a role and a learn mark, and conversations as such. Nothing here knows a tokenizer."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple


class Segment(NamedTuple):
    """A stretch of text.

    `role` is system, user, assistant or tool (a turn, put into the chat format), text (as it stands) or markup
    (as it stands, and special tokens in it are special). `learn` marks what the loss is taken over. `metadata` stands
    beside an assistant's role (the tool that it calls) and `tools` beside the system's; few chat formats write them.
    """

    role: str
    content: str
    learn: bool = False
    metadata: str = ""
    tools: Any = None


class Seam(Enum):
    """How a piece is encoded behind the one before it: as what continues it, as if nothing stood before it, or both
    together as one text."""

    CONTINUES = "continues"
    APART = "apart"
    ONE = "one"


class Piece(NamedTuple):
    """A stretch of the final text: markup or content, learnt or not. `spoken` is content that the model says, in which
    the markup that models write themselves, such as <think>, is theirs."""

    text: str
    markup: bool
    learn: bool
    seam: Seam = Seam.CONTINUES
    spoken: bool = False


def one_answer_each(turns: Sequence[Segment]) -> list[list[Segment]]:
    """A conversation for each learnt answer, which ends with it and learns nothing before it."""
    return [
        [*(before._replace(learn=False) for before in turns[:place]), turn]
        for place, turn in enumerate(turns)
        if turn.learn and turn.content.strip()
    ]


ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def turns_of(turns: Any) -> list[Segment]:
    """A list of {role, content} or ShareGPT's {from, value}; assistant turns are learnt unless `learn` is false."""
    if not isinstance(turns, list) or not turns:
        raise ValueError("expected a list of turns")
    segments = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} is {kind_of(turn)}, expected {{role, content}}")
        said = _first(turn, "role", "from")
        role = ROLES.get(str(said).lower())
        if role is None:
            raise ValueError(f"turn {number} has the role {said!r}, expected one of {', '.join(ROLES)}")
        learn = role == "assistant" and turn.get("learn") is not False
        metadata = turn.get("metadata")
        tools = turn.get("tools") if role == "system" else None
        written = metadata if isinstance(metadata, str) else ""  # other sets keep objects there, about the turn
        segments.append(Segment(role, _content(turn, number), learn, written, tools or None))
    return segments


def _content(turn: Mapping[str, Any], number: int) -> str:
    """The text of a turn; what is no text (images, tool calls) is refused rather than left out in silence."""
    content = _first(turn, "content", "value")
    if turn.get("tool_calls"):
        raise ValueError(f"turn {number} has tool_calls, which are not read. Write them into its content")
    if isinstance(content, Mapping):
        content = [content] if content.get("type") in (None, "text") else None
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        whole = not any(part is None or isinstance(part, (Mapping, list)) for part in parts)
        content = "".join(map(str, parts)) if whole else None
    if content is None:
        found = ", ".join(key for key, value in turn.items() if value is not None)
        raise ValueError(f"turn {number} has {found}, but no text in content or value")
    return str(content)


def _first(turn: Mapping[str, Any], *names: str) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def kind_of(value: Any) -> str:
    """The kind of a value in a sentence: a str, an int, None."""
    name = type(value).__name__
    return "None" if value is None else f"an {name}" if name[0] in "aeiou" else f"a {name}"
