"""Segments as the model will see them: the chat format around the turns, and ids with the learnt part marked.

Content and markup are encoded apart, so that no content can pose as a special token, and joined by ids.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import jinja2

from job.config.learning import PLACE
from job.formats import single_braces
from job.tokenizer import Tokenizer
from job.turns import Segment

TURNS = ("system", "user", "assistant", "tool")
PLAIN_TEMPLATE = {
    "system": "{content}\n\n",
    "user": "User: {content}\n",
    "assistant": "Assistant: {content}",
    "tool": "{content}\n",
}
"""For models that come without a chat template."""
_EDGE = "\u205f"
"""A mathematical space, which str.strip and Jinja's trim remove."""
_WORD = "x"


class Piece(NamedTuple):
    """A stretch of the final text: markup or content, learnt or not."""

    text: str
    markup: bool
    learn: bool


class ChatFormat(Protocol):
    """Puts markup around turns."""

    name: str

    def pieces(self, turns: Sequence[Segment]) -> list[Piece]:
        """The turns with their markup; what ends a learnt turn is learnt with it."""


class ModelChat:
    """The chat template that came with the model.

    The template is rendered with a placeholder for each content. It may strip contents (Llama 3 does), which a
    placeholder between two spaces of a kind that no markup has shows, for each side apart: Llama 2 puts the system
    text in front of the first question and strips the whole. What a placeholder cannot show (Qwen 3 moves the thoughts
    in an answer, others escape quotes) shows in a second rendering, of the contents themselves, which must read the
    same; it costs every row 30 us of some 400 (SmolLM2, two turns of 80 tokens, 2026-11-21).
    """

    name = "the model's chat template"

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        specials = sorted(map(re.escape, tokenizer.specials), key=len, reverse=True)
        self.end_of_turn = re.compile("|".join(specials) or r"(?!)")
        self.eos = str(tokenizer.inner.eos_token)

    def pieces(self, turns: Sequence[Segment]) -> list[Piece]:
        rendered = self._render(turns, [f"{_EDGE}\ue000{i}\ue001{_EDGE}" for i in range(len(turns))])
        parts = re.split(f"({_EDGE}?)\ue000(\\d+)\ue001({_EDGE}?)", rendered)
        seen = [int(index) for index in parts[2::4]]
        lost = [turn.role for i, turn in enumerate(turns) if i not in seen]
        if lost:
            raise ValueError(f"the model's chat template drops the {lost[0]} turn. Leave it out, or set data.template")
        said = [turns[place] for place in seen]
        kept = [_stripped(turn.content, *edges) for turn, *edges in zip(said, parts[1::4], parts[3::4], strict=True)]
        kept = self._as_rendered(turns, said, kept, parts[::4])
        pieces = [Piece(parts[0], True, False)]
        for place, (turn, content, markup) in enumerate(zip(said, kept, parts[4::4], strict=True), 1):
            pieces.append(Piece(content, False, turn.learn))
            pieces += self._after(markup, turn.learn, last=place == len(said))
        return [piece for piece in pieces if piece.text or piece.learn]

    def _render(self, turns: Sequence[Segment], contents: Sequence[str]) -> str:
        messages = [{"role": turn.role, "content": text} for turn, text in zip(turns, contents, strict=True)]
        try:
            return self.tokenizer.render(messages)
        except jinja2.TemplateError as fault:
            raise ValueError(f"the model's chat template refuses these turns: {fault}") from fault
        except Exception as fault:  # the template is a program of the model's, which may raise anything
            raise ValueError(
                f"the model's chat template fails on these turns ({type(fault).__name__}: {fault}). "
                "Repair it, or set data.template"
            ) from fault

    def _as_rendered(
        self, turns: Sequence[Segment], said: Sequence[Segment], kept: Sequence[str], markup: Sequence[str]
    ) -> list[str]:
        """The contents as the template writes them; it may strip them, by characters of its own, and nothing else.

        An empty content (an answer that is asked for) is rendered as a word: templates treat it in their own ways.
        """
        rendered = self._render(turns, [turn.content if turn.content.strip() else _WORD for turn in turns])
        words = [content if content.strip() else _WORD for content in kept]
        if rendered == _woven(markup, words):
            return list(kept)
        pattern = _woven(
            [re.escape(part) for part in markup], [rf"(\s*{re.escape(word.strip())}\s*)" for word in words]
        )
        match = re.fullmatch(pattern, rendered)
        if match is None:
            raise ValueError(_changed(rendered, said, words, markup))
        return [new if old.strip() else old for old, new in zip(kept, match.groups(), strict=True)]

    def _after(self, markup: str, learn: bool, last: bool) -> list[Piece]:
        """The markup behind a content; behind a learnt one, up to the end-of-turn token is learnt."""
        if not learn:
            return [Piece(markup, True, False)]
        end = self.end_of_turn.search(markup)
        if end:
            return [Piece(markup[: end.end()], True, True), Piece(markup[end.end() :], True, False)]
        return [Piece(markup, True, False), *([Piece(self.eos, True, True)] if last else [])]


def _stripped(content: str, before: str, after: str) -> str:
    """The content without the spaces of the sides on which the template left none around the placeholder."""
    content = content if before else content.lstrip()
    return content if after else content.rstrip()


def _woven(markup: Sequence[str], contents: Sequence[str]) -> str:
    return markup[0] + "".join(content + part for content, part in zip(contents, markup[1:], strict=True))


def _changed(rendered: str, said: Sequence[Segment], contents: Sequence[str], markup: Sequence[str]) -> str:
    """Which turn reads differently, and where the difference begins."""
    expected = _woven(markup, contents)
    same = (place for place, (old, new) in enumerate(zip(expected, rendered, strict=False)) if old != new)
    start = next(same, min(len(expected), len(rendered)))
    ends = accumulate(len(before) + len(content) for before, content in zip(markup, contents, strict=False))
    role = next((turn.role for turn, end in zip(said, ends, strict=True) if start < end), said[-1].role)
    return (
        f"the model's chat template changes what the {role} turn says "
        f"({rendered[start : start + 20]!r} for {expected[start : start + 20]!r}). Set data.template"
    )


class RoleTemplates:
    """Turns in templates with one {content} each; the model's eos ends every assistant turn."""

    def __init__(self, templates: Mapping[str, str], eos: str, name: str = "data.template"):
        self.templates, self.eos, self.name = templates, eos, name

    def pieces(self, turns: Sequence[Segment]) -> list[Piece]:
        pieces = []
        for turn in turns:
            template = self.templates.get(turn.role, PLAIN_TEMPLATE[turn.role])
            place = next(place for place in PLACE.finditer(template) if place[1])
            before, after = single_braces(template[: place.start()]), single_braces(template[place.end() :])
            pieces += [Piece(before, True, False), Piece(turn.content, False, turn.learn)]
            if turn.role == "assistant":
                ending, found, after = after.partition(self.eos)
                if not found:
                    ending, after = "", ending
                pieces.append(Piece(ending + self.eos, True, turn.learn))
            pieces.append(Piece(after, True, False))
        return [piece for piece in pieces if piece.text or piece.learn]


def chat_format(tokenizer: Tokenizer, template: Mapping[str, str] | None) -> ChatFormat:
    """The user's role templates if there are any, else the model's own chat template, else plain roles."""
    eos = str(tokenizer.inner.eos_token)
    if template and "user" in template:
        return RoleTemplates(template, eos)
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
        pieces = chat.pieces(segments)
        own_bos = isinstance(chat, ModelChat)
    else:
        pieces = _ended([Piece(part.content, part.role == "markup", part.learn) for part in segments], tokenizer)
        own_bos = False
    encoded = [] if own_bos or not tokenizer.prefix else [Encoded(tokenizer.prefix, True, False)]
    for place, piece in enumerate(pieces):
        turn_into_ids = tokenizer.markup if piece.markup else tokenizer.text
        encoded.append(Encoded(turn_into_ids(piece.text, first=place == 0), piece.markup, piece.learn))
    return encoded


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
    """The ids before the last learnt content: what a model is given to answer, exactly as in training."""
    learnt = [place for place, part in enumerate(encoded) if part.learn and not part.markup]
    answer = learnt[-1] if learnt else len(encoded)
    return [token for part in encoded[:answer] for token in part.ids]


def stop_ids(encoded: Sequence[Encoded], eos: int) -> list[int]:
    """Tokens that end an answer: eos, and what training showed as the end of a turn."""
    behind = [*(part.learn for part in encoded[1:]), False]  # markup before or within what is learnt ends nothing
    pairs = zip(encoded, behind, strict=True)
    ends = {part.ids[-1] for part, goes_on in pairs if part.learn and part.markup and part.ids and not goes_on}
    return sorted(ends | {eos})
