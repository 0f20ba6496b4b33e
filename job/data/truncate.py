"""Rows that are too long: what is cut, in which order."""

from collections.abc import Sequence

from job.chat import Encoded


def fit(parts: Sequence[Encoded], max_length: int) -> list[Encoded] | None:
    """Cut a row's contents so that it has at most `max_length` tokens; markup is never cut.

    The prompt's contents lose their middle, longest first, down to a quarter of the room. Only then does the answer
    lose its end, and what would have ended it is no longer learnt, for it did not end there.

    Returns:
        The parts that fit, or None when the markup alone leaves no room.
    """
    room = max_length - sum(len(part.ids) for part in parts if part.markup)
    if room < 2:
        return None
    prompt = sum(len(part.ids) for part in parts if not part.markup and not part.learn)
    answer = sum(len(part.ids) for part in parts if not part.markup and part.learn)
    keep_answer = min(answer, room - min(prompt, max(room // 4, 1)))
    kept = _cut_prompts(list(parts), prompt - min(prompt, room - keep_answer))
    return _cut_answers(kept, answer - keep_answer)


def windows(ids: Sequence[int], max_length: int) -> list[list[int]]:
    """Plain text in stretches of at most `max_length` tokens."""
    return [list(ids[start : start + max_length]) for start in range(0, len(ids), max_length)]


def _cut_prompts(parts: list[Encoded], excess: int) -> list[Encoded]:
    while excess > 0:
        prompts = [place for place, part in enumerate(parts) if not part.markup and not part.learn]
        lengths = sorted((len(parts[place].ids) for place in prompts), reverse=True)
        longest = next(place for place in prompts if len(parts[place].ids) == lengths[0])
        second = lengths[1] if len(lengths) > 1 else 0
        cut = min(excess, max(lengths[0] - second, 1))
        ids = parts[longest].ids
        head = (len(ids) - cut + 1) // 2
        parts[longest] = parts[longest]._replace(ids=ids[:head] + ids[head + cut :])
        excess -= cut
    return parts


def _cut_answers(parts: list[Encoded], excess: int) -> list[Encoded]:
    for place in range(len(parts) - 1, -1, -1):
        if excess <= 0:
            break
        part = parts[place]
        if part.markup and part.learn:
            parts[place] = part._replace(learn=False)
        elif part.learn:
            cut = min(excess, len(part.ids))
            parts[place] = part._replace(ids=part.ids[: len(part.ids) - cut])
            excess -= cut
    return parts
