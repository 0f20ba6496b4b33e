"""The chat template that came with a model: where it puts contents, and where an answer begins and ends."""

import re
from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import jinja2

from job.tokenizer import Tokenizer
from job.turns import Piece, Seam, Segment, one_answer_each

_EDGE = "\u205f"
"""A mathematical space, which str.strip and Jinja's trim remove."""
_MARK = re.compile(f"({_EDGE}?)\ue000(\\d+)\ue001({_EDGE}?)")
_MARK_OF_FIRST = "\ue0000\ue001"
_WORD = "x"
_THOUGHTS = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*(.*)", re.DOTALL)
_PROMPTS_KEPT = 1000


class Slot(NamedTuple):
    """What a template puts somewhere, strips or leaves out as a whole: the content of turn `place`, or of an answer
    with thoughts these, and the rest."""

    place: int
    text: str


class Shown(NamedTuple):
    """A rendering: with placeholders for the slots, which it holds in this order, and taken apart at them."""

    marked: str
    said: list[Slot]
    markup: list[str]
    kept: list[str]


class ModelChat:
    """The chat template that came with the model.

    The template is rendered with a placeholder for each slot. It may strip contents (Llama 3 does), which a
    placeholder between two spaces of a kind that no markup has shows, for each side apart: Llama 2 puts the system
    text in front of the first question and strips the whole. What a placeholder cannot show (some templates escape
    quotes) shows in a second rendering, of the contents themselves, which must read the same; it costs every row 30 us
    of some 400 (SmolLM2, two turns of 80 tokens, 2026-11-21).

    An answer begins where the prompt ends with which the template asks for it. What lies between (a space for Llama 2,
    empty thoughts for Qwen 3, which leaves out those of all answers but the last) the model writes, and learns.
    """

    name = "the model's chat template"
    stops: tuple[str, ...] = ()
    has_tools = False

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        specials = sorted(map(re.escape, tokenizer.specials), key=len, reverse=True)
        self.special = re.compile("|".join(specials) or r"(?!)")
        self.eos = str(tokenizer.inner.eos_token)
        template = tokenizer.chat_template or ""
        self.asks = "add_generation_prompt" in template
        self.thinks = "</think>" in template and "</think>" not in tokenizer.specials
        self._prompts: dict[tuple[tuple[int, str], ...], str | None] = {}

    def talks(self, turns: Sequence[Segment]) -> list[list[Segment]]:
        """A conversation for each answer where one is learnt whose form changes when others follow it."""
        earlier = [turn for turn in turns[:-1] if turn.learn]
        if any(self._thoughts(turn) for turn in earlier) or (earlier and self._system_moves(turns)):
            return one_answer_each(turns)
        return [list(turns)]

    def pieces(self, turns: Sequence[Segment]) -> list[Piece]:
        slots = self._slots(turns)
        shown = self._shown(turns, slots)
        if len(shown.said) < len(slots) and turns[-1].role == "assistant":
            shown = self._behind_the_prompt(turns, slots, shown)
        _refuse_lost(turns, slots, shown.said)
        starts = [mark.start() for mark in _MARK.finditer(shown.marked)]
        pieces: list[Piece] = []
        learn = False
        for place, found in groupby(range(len(starts)), key=lambda number: shown.said[number].place):
            first, *others = found
            turn, markup = turns[place], shown.markup[first]
            text = shown.kept[first] + "".join(shown.markup[number] + shown.kept[number] for number in others)
            own = self._own(turns, slots, place, shown.marked[: starts[first]], markup)
            pieces += self._after(markup.removesuffix(own), learn)
            if self.special.search(own):
                pieces.append(Piece(own, True, turn.learn))
                own = ""
            pieces.append(Piece(own + text, False, turn.learn, spoken=turn.role == "assistant"))
            learn = turn.learn
        pieces += self._after(shown.markup[-1], learn, last=True)
        return [piece for piece in pieces if piece.text or piece.learn]

    def _slots(self, turns: Sequence[Segment]) -> list[Slot]:
        parts = [(place, self._thoughts(turn) or (turn.content,)) for place, turn in enumerate(turns)]
        return [Slot(place, text) for place, texts in parts for text in texts]

    def _shown(self, turns: Sequence[Segment], slots: Sequence[Slot], ask: bool = False) -> Shown:
        marked = self._render(turns, slots, _marked(slots), ask)
        marks = list(_MARK.finditer(marked))
        said = [slots[int(mark[2])] for mark in marks]
        markup = _MARK.sub("\ue000", marked).split("\ue000")
        kept = [_stripped(slot.text, mark[1], mark[3]) for slot, mark in zip(said, marks, strict=True)]
        rendered = self._render(turns, slots, [slot.text if slot.text.strip() else _WORD for slot in slots], ask)
        return Shown(
            marked, said, markup, _as_rendered(rendered, markup, kept, [turns[slot.place].role for slot in said])
        )

    def _behind_the_prompt(self, turns: Sequence[Segment], slots: Sequence[Slot], whole: Shown) -> Shown:
        """The answer behind the prompt that asks for it, where the whole rendering lacks what the prompt has: Mistral
        puts the system text before the last question, as long as no answer follows."""
        answer = sum(slot.place < len(turns) - 1 for slot in whole.said)
        prompt = self._shown(turns[:-1], [slot for slot in slots if slot.place < len(turns) - 1], ask=True)
        header = whole.markup[answer]
        if answer == len(whole.said) or not header.startswith(prompt.markup[-1]):
            return whole
        start = list(_MARK.finditer(whole.marked))[answer].start()
        return Shown(
            prompt.marked + header.removeprefix(prompt.markup[-1]) + whole.marked[start:],
            [*prompt.said, *whole.said[answer:]],
            [*prompt.markup[:-1], *whole.markup[answer:]],
            [*prompt.kept, *whole.kept[answer:]],
        )

    def _system_moves(self, turns: Sequence[Segment]) -> bool:
        """Whether the template leaves out a system turn before the last question is answered."""
        if turns[0].role != "system":
            return False
        slots = [Slot(place, "") for place in range(len(turns))]
        return _MARK_OF_FIRST not in self._render(turns, slots, _marked(slots))

    def _thoughts(self, turn: Segment) -> tuple[str, ...]:
        """The thoughts of an answer, and the rest of it; nothing for other turns."""
        match = _THOUGHTS.fullmatch(turn.content) if self.thinks and turn.role == "assistant" else None
        return match.groups() if match else ()

    def _render(self, turns: Sequence[Segment], slots: Sequence[Slot], texts: Sequence[str], ask: bool = False) -> str:
        contents = [
            [text for slot, text in zip(slots, texts, strict=True) if slot.place == i] for i in range(len(turns))
        ]
        messages = [
            {"role": turn.role, "content": said[0] if len(said) == 1 else "<think>\n{}\n</think>\n\n{}".format(*said)}
            for turn, said in zip(turns, contents, strict=True)
        ]
        try:
            return self.tokenizer.render(messages, ask)
        except jinja2.TemplateError as fault:
            raise ValueError(
                f"the model's chat template refuses these turns ({fault}). Change them, or set data.template"
            ) from fault
        except Exception as fault:  # the template is a program of the model's, which may raise anything
            raise ValueError(
                f"the model's chat template fails on these turns ({type(fault).__name__}: {fault}). "
                "Repair it, or set data.template"
            ) from fault

    def _own(self, turns: Sequence[Segment], slots: Sequence[Slot], place: int, rendered: str, markup: str) -> str:
        """The end of the markup before an answer that the prompt does not have which asks for it. Before other turns
        the space, since tokens have it before a word, not behind one."""
        if turns[place].role != "assistant":
            return markup.removeprefix(markup.rstrip(" "))
        prompt = self._prompt(turns[:place], [slot for slot in slots if slot.place < place])
        if prompt is None or not rendered.startswith(prompt):
            return markup.removeprefix(markup.rstrip(" "))
        own = rendered.removeprefix(prompt)
        # where a template does not ask, the prompt lacks the answer's header, which is not the model's to write
        return own if markup.endswith(own) and (self.asks or own.isspace()) else ""

    def _prompt(self, turns: Sequence[Segment], slots: Sequence[Slot]) -> str | None:
        """The rendering that asks for what comes after these turns; None where the template fails at that."""
        key = tuple((slot.place, turns[slot.place].role) for slot in slots)
        if key not in self._prompts:
            if len(self._prompts) == _PROMPTS_KEPT:
                self._prompts.clear()
            try:
                self._prompts[key] = self._render(turns, slots, _marked(slots), ask=True)
            except ValueError:  # an answer that comes first: it has no prompt
                self._prompts[key] = None
        return self._prompts[key]

    def _after(self, markup: str, learn: bool, last: bool = False) -> list[Piece]:
        """The markup behind a content; behind a learnt one, up to the end-of-turn token is learnt."""
        if not learn:
            return [Piece(markup, True, False)]
        end = self.special.search(markup)
        if end:
            # Phi 3's tokens take the white space behind them with them, if it is there when they are encoded
            seam = Seam.ONE if self.tokenizer.inner.is_fast else Seam.CONTINUES
            return [Piece(markup[: end.end()], True, True), Piece(markup[end.end() :], True, False, seam)]
        return [Piece(markup, True, False), *([Piece(self.eos, True, True)] if last else [])]


def _as_rendered(rendered: str, markup: Sequence[str], kept: Sequence[str], roles: Sequence[str]) -> list[str]:
    """The slots as the template writes them; it may strip them, by characters of its own, and nothing else.

    An empty one (an answer that is asked for) is rendered as a word: templates treat it in their own ways.
    """
    words = [content if content.strip() else _WORD for content in kept]
    if rendered == _woven(markup, words):
        return list(kept)
    pattern = _woven([re.escape(part) for part in markup], [rf"(\s*{re.escape(word.strip())}\s*)" for word in words])
    match = re.fullmatch(pattern, rendered)
    if match is None:
        raise ValueError(_changed(rendered, roles, words, markup))
    return [new if old.strip() else old for old, new in zip(kept, match.groups(), strict=True)]


def _marked(slots: Sequence[Slot]) -> list[str]:
    """A placeholder for each."""
    return [f"{_EDGE}\ue000{number}\ue001{_EDGE}" for number in range(len(slots))]


def _refuse_lost(turns: Sequence[Segment], slots: Sequence[Slot], said: Sequence[Slot]) -> None:
    for place, turn in enumerate(turns):
        parts = [len([slot for slot in some if slot.place == place]) for some in (slots, said)]
        if not parts[1]:
            raise ValueError(
                f"the model's chat template drops the {turn.role} turn. Leave it out, or set data.template"
            )
        if parts[1] < parts[0] and turn.learn:
            raise ValueError(
                "the model's chat template drops the thoughts of an answer. Leave them out, or set data.template"
            )


def _stripped(content: str, before: str, after: str) -> str:
    """The content without the spaces of the sides on which the template left none around the placeholder."""
    content = content if before else content.lstrip()
    return content if after else content.rstrip()


def _woven(markup: Sequence[str], contents: Sequence[str]) -> str:
    return markup[0] + "".join(content + part for content, part in zip(contents, markup[1:], strict=True))


def _changed(rendered: str, roles: Sequence[str], contents: Sequence[str], markup: Sequence[str]) -> str:
    """Which turn reads differently, and where the difference begins."""
    expected = _woven(markup, contents)
    same = (place for place, (old, new) in enumerate(zip(expected, rendered, strict=False)) if old != new)
    start = next(same, min(len(expected), len(rendered)))
    ends = accumulate(len(before) + len(content) for before, content in zip(markup, contents, strict=False))
    role = next((role for role, end in zip(roles, ends, strict=True) if start < end), roles[-1])
    return (
        f"the model's chat template changes what the {role} turn says "
        f"({rendered[start : start + 20]!r} for {expected[start : start + 20]!r}). Set data.template"
    )
