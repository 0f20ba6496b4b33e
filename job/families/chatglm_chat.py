"""How ChatGLM2 and ChatGLM3 were trained to talk. Both put [gMASK] sop before everything, as their tokenizers do."""

import json
from collections.abc import Sequence

from job.turns import Piece, Seam, Segment, one_answer_each


class ChatGLM2:
    """Rounds of a question and an answer, written as one text; the last answer was encoded apart from it.

    Only behind the last answer came an eos, so each learnt answer becomes a conversation of its own.

    Args:
        eos: what ends an answer.
    """

    name = "ChatGLM2's own chat format"
    stops: tuple[str, ...] = ()
    has_tools = False

    def __init__(self, eos: str):
        self.eos = eos

    def talks(self, turns: Sequence[Segment]) -> list[list[Segment]]:
        return one_answer_each(turns)

    def pieces(self, turns: Sequence[Segment]) -> list[Piece]:
        """The rounds; only the last answer may be learnt.

        Raises:
            ValueError: there are other turns than questions and answers in turn.
        """
        pieces = []
        for place, turn in enumerate(turns):
            expected = "assistant" if place % 2 else "user"
            if turn.role != expected:
                raise ValueError(
                    f"ChatGLM2 was trained on user and assistant turns in turn, turn {place + 1} is {turn.role}. "
                    "Write it into the user turn, or set data.template"
                )
            if turn.role == "user":
                opening = f"[Round {place // 2 + 1}]\n\n问："
                pieces += [_one(opening, True), _one(turn.content, False), _one("\n\n答：", True)]
            elif place == len(turns) - 1 and turn.learn:
                pieces += [Piece(turn.content, False, True, Seam.APART), Piece(self.eos, True, True)]
            else:
                pieces += [_one(turn.content, False), _one("\n\n", True)]
        return pieces


def _one(text: str, markup: bool) -> Piece:
    return Piece(text, markup, False, Seam.ONE)


class ChatGLM3:
    """A token for the role, a line of metadata (the tool that is called, mostly nothing) and the content, each encoded
    apart. The model writes the line itself, and the role that comes next ends its answer.

    Args:
        eos: what ends the last answer.
    """

    name = "ChatGLM3's own chat format"
    stops: tuple[str, ...] = ("<|user|>", "<|observation|>")
    has_tools = True

    def __init__(self, eos: str):
        self.eos = eos

    def talks(self, turns: Sequence[Segment]) -> list[list[Segment]]:
        return [list(turns)]

    def pieces(self, turns: Sequence[Segment]) -> list[Piece]:
        """The turns, and an eos behind the last answer."""
        pieces = []
        answered = False
        for turn in turns:
            role = "<|observation|>" if turn.role == "tool" else f"<|{turn.role}|>"
            pieces.append(Piece(role, True, answered and role in self.stops))
            own = bool(turn.learn or turn.metadata)  # of the row, in which nothing is markup
            pieces.append(Piece(f"{turn.metadata}\n", not own, turn.learn, Seam.APART))
            pieces.append(Piece(_content(turn), False, turn.learn, Seam.APART))
            answered = turn.learn
        if turns[-1].role == "assistant":
            pieces.append(Piece(self.eos, True, answered))
        return pieces


def _content(turn: Segment) -> str:
    """What a turn says; a system turn names the tools in JSON, laid out as in the authors' training."""
    if not turn.tools:
        return turn.content
    tools = turn.tools if isinstance(turn.tools, str) else json.dumps(turn.tools, ensure_ascii=False, indent=4)
    return f"{turn.content}\n{tools}"
