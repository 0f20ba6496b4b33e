"""Segments as the model will see them: the chat format around the turns, and ids with the learnt part marked.

Content and markup are encoded apart, so that no content can pose as a special token, and joined by ids.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple, Protocol

from job.chat_template import ModelChat
from job.config.learning import PLACE
from job.families.chatglm_chat import ChatGLM2, ChatGLM3
from job.formats import single_braces
from job.tokenizer import Tokenizer
from job.turns import Piece, Seam, Segment

TURNS = ("system", "user", "assistant", "tool")
PLAIN_TEMPLATE = {
    "system": "{content}\n\n",
    "user": "User: {content}\n",
    "assistant": "Assistant: {content}",
    "tool": "{content}\n",
}
"""For models that come without a chat template."""


class ChatFormat(Protocol):
    """Puts markup around turns."""

    name: str
    stops: tuple[str, ...]
    """Tokens that end an answer, beside eos and what ends one in the turns themselves."""
    has_tools: bool
    """Whether it writes the tools of a system turn."""

    def talks(self, turns: Sequence[Segment]) -> list[list[Segment]]:
        """The conversations that a row is learnt as: itself, or one for each answer where answers change their form
        when others follow them."""

    def pieces(self, turns: Sequence[Segment]) -> list[Piece]:
        """The turns with their markup; what ends a learnt turn is learnt with it."""


class RoleTemplates:
    """Turns in templates with one {content} each; the model's eos ends every assistant turn."""

    stops: tuple[str, ...] = ()
    has_tools = False

    def __init__(self, templates: Mapping[str, str], eos: str, name: str = "data.template"):
        self.templates, self.eos, self.name = templates, eos, name

    def talks(self, turns: Sequence[Segment]) -> list[list[Segment]]:
        return [list(turns)]

    def pieces(self, turns: Sequence[Segment]) -> list[Piece]:
        pieces = []
        for turn in turns:
            assistant = turn.role == "assistant"
            template = self.templates.get(turn.role, PLAIN_TEMPLATE[turn.role])
            place = next(place for place in PLACE.finditer(template) if place[1])
            before, after = single_braces(template[: place.start()]), single_braces(template[place.end() :])
            header = before.rstrip(" ")  # tokens have the space before a word, not behind one
            content = before.removeprefix(header) + turn.content
            pieces += [Piece(header, True, False), Piece(content, False, turn.learn, spoken=assistant)]
            if assistant:
                ending, found, after = after.partition(self.eos)
                if not found:
                    ending, after = "", ending
                pieces.append(Piece(ending + self.eos, True, turn.learn))
            pieces.append(Piece(after, True, False))
        return [piece for piece in pieces if piece.text or piece.learn]


FAMILIES: dict[str, Callable[[str], ChatFormat]] = {"chatglm2": ChatGLM2, "chatglm3": ChatGLM3}
"""Chat formats that no template can write, from the model's eos."""


def chat_format(tokenizer: Tokenizer, template: Mapping[str, str] | None) -> ChatFormat:
    """The user's role templates if there are any, else the format of the model's family or its own chat template, else
    plain roles."""
    eos = str(tokenizer.inner.eos_token)
    if template and "user" in template:
        return RoleTemplates(template, eos)
    if family := FAMILIES.get(tokenizer.family_chat):
        return family(eos)
    if tokenizer.chat_template:
        return ModelChat(tokenizer)
    return RoleTemplates(PLAIN_TEMPLATE, eos, name="plain roles (the model has no chat template)")


class Encoded(NamedTuple):
    """Ids of one stretch and what it is."""

    ids: list[int]
    markup: bool
    learn: bool


def encode(segments: Sequence[Segment], tokenizer: Tokenizer, chat: ChatFormat) -> list[Encoded]:
    """The whole row as stretches of ids, from bos to eos.

    Raises:
        ValueError: the chat format refuses the turns.
    """
    if segments[0].role in TURNS:
        if not chat.has_tools and any(segment.tools for segment in segments):
            raise ValueError(
                f"the system turn has tools, which {chat.name} does not write. Write them into its content"
            )
        pieces = chat.pieces(segments)
        own_bos = isinstance(chat, ModelChat)
    else:
        pieces = _ended([Piece(part.content, part.role == "markup", part.learn) for part in segments], tokenizer)
        own_bos = False
    encoded = [] if own_bos or not tokenizer.prefix else [Encoded(tokenizer.prefix, True, False)]
    return encoded + [Encoded(ids, piece.markup, piece.learn) for ids, piece in _ids(pieces, tokenizer)]


def _ids(pieces: Sequence[Piece], tokenizer: Tokenizer) -> Iterator[tuple[list[int], Piece]]:
    place = 0
    while place < len(pieces):
        piece = pieces[place]
        first = place == 0 or piece.seam is Seam.APART
        joined = [piece, *takewhile(lambda other: other.seam is Seam.ONE, pieces[place + 1 :])]
        if len(joined) > 1:
            special = all(part.markup for part in joined)
            yield from zip(tokenizer.joined([part.text for part in joined], first, special), joined, strict=True)
        elif piece.markup:
            yield tokenizer.markup(piece.text, first), piece
        else:
            yield tokenizer.text(piece.text, first, piece.spoken or piece.learn), piece
        place += len(joined)


def _ended(pieces: list[Piece], tokenizer: Tokenizer) -> list[Piece]:
    """The pieces with one eos at their end, which may be the one that the user's template writes."""
    eos, last = str(tokenizer.inner.eos_token), pieces[-1]
    if last.markup and last.text.rstrip().endswith(eos):
        return [*pieces[:-1], last._replace(text=last.text.rstrip())]
    return [*pieces, Piece(eos, True, last.learn)]


def without_eos(segments: list[Segment], eos: str) -> list[Segment]:
    """The row without the eos that is written as text at the end of its completion.

    Files made for other trainers bring it. As content it would be learnt letter by letter, in front of the eos that
    every row ends with. Turns are left as they are: what ends them is the chat format's.
    """
    place = len(segments) - 1
    while place > 0 and segments[place].role == "markup" and segments[place].content.strip() in ("", eos):
        place -= 1  # the template writes an eos too
    if place < 0 or segments[place].role != "text" or not segments[place].learn:
        return segments
    text = segments[place].content.rstrip()
    if not text.endswith(eos):
        return segments
    return [*segments[:place], segments[place]._replace(content=text.removesuffix(eos)), *segments[place + 1 :]]


def prompt_ids(encoded: Sequence[Encoded]) -> list[int]:
    """The ids before the last answer: what a model is given, exactly as in training.

    An answer may begin with markup that the model writes itself, such as the line of metadata of ChatGLM3.
    """
    said = [place for place, part in enumerate(encoded) if part.learn and not part.markup]
    answer = said[-1] if said else len(encoded)
    while answer and encoded[answer - 1].learn:
        answer -= 1
    return [token for part in encoded[:answer] for token in part.ids]


def stop_ids(encoded: Sequence[Encoded], tokenizer: Tokenizer, chat: ChatFormat) -> list[int]:
    """Tokens that end an answer: eos, what training showed as the end of a turn, and the authors' own."""
    behind = [*(part.learn for part in encoded[1:]), False]  # markup before or within what is learnt ends nothing
    pairs = zip(encoded, behind, strict=True)
    ends = {part.ids[-1] for part, goes_on in pairs if part.learn and part.markup and part.ids and not goes_on}
    return sorted(
        ends | {tokenizer.eos, *tokenizer.ends} | {token for stop in chat.stops for token in tokenizer.markup(stop)}
    )
