"""Two threads with one tokenizer: each gets its own ids, whether special tokens are special or text."""

import contextlib
import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from job import tokenizer as module
from job.tokenizer import Tokenizer

TIMES = 3000


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def mixed_up(tokenizer: Tokenizer) -> int:
    """How often of many times eos came out as the other thread wants it."""
    eos, wrong = str(tokenizer.inner.eos_token), []

    def encode(how: Callable[[str], list[int]], expected: list[int]) -> None:
        wrong.extend(1 for _ in range(TIMES) if how(eos) != expected)

    ways: list[Callable[[str], list[int]]] = [
        tokenizer.text,
        lambda text: tokenizer.joined([text], True, True)[0],
        lambda text: tokenizer.joined([text], True, False)[0],
    ]
    expected = [way(eos) for way in ways]
    assert expected[1] == [tokenizer.eos] and expected[0] != expected[1] != expected[2]
    threads = [threading.Thread(target=encode, args=pair) for pair in zip(ways, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(wrong)


@pytest.mark.usefixtures("often")
def test_threads_get_their_own_ids(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(str(tiny_model))
    assert mixed_up(tokenizer) == 0
    monkeypatch.setattr(module, "_one_at_a_time", contextlib.nullcontext())
    assert any(mixed_up(tokenizer) for _ in range(10)), "threads never met, so that this shows nothing"


def test_a_process_that_was_forked_while_another_thread_encodes_is_not_held_up(tiny_model: Path) -> None:
    tokenizer = Tokenizer(str(tiny_model))
    with module._one_at_a_time:
        child = multiprocessing.get_context("fork").Process(target=tokenizer.text, args=("a",))
        child.start()
    child.join(20)
    held_up = child.is_alive()
    if held_up:
        child.kill()
    assert not held_up and child.exitcode == 0
