"""Asked to stop: by a signal, a file, a key or the time that is left. The loop asks between steps whether it was."""

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType, MappingProxyType
from typing import Literal, Self

from job.config import RunConfig
from job.errors import InputError, JobError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
NAMES = tuple(number.name for number in SIGNALS)
STOP_FILE, STOP_KEY, TIME_LIMIT, WARNING = "a stop file", "a stop key", "the time limit", "the scheduler's warning"
WORDS = (TIME_LIMIT, STOP_KEY, STOP_FILE, WARNING, *NAMES)
"""All that may have asked; ranks that heard different ones agree on the last of them here."""
LAST_WORDS_S = 10.0
"""How long a run that is ended at once may take to say so in status.json."""
CTRL_C_TWICE = 130


class CutShort(SystemExit):
    """A signal that came after the grace ended the run at once, before all was saved.

    As a SystemExit no `except Exception` holds it up. It carries a text, so that the command ends with exit code 1 and
    that text, if nobody catches it: 75 would promise that all was saved, 130 that somebody pressed Ctrl-C twice.
    """


class StopRequest:
    """Context manager of the main thread, within which signals ask instead of ending the process.

    The first SIGINT, SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 asks and says so; repeats change nothing, for launchers send
    signals twice. A signal that comes `grace_s` after the first raises CutShort, and a second Ctrl-C at a terminal
    raises KeyboardInterrupt, both wherever the main thread is; what does not end within LAST_WORDS_S of that, such as
    a collective whose other rank is gone, is ended without more ado. Ignored signals stay ignored.

    Args:
        grace_s: seconds a stopping run has for its save; inf lets no signal but Ctrl-C end it.
        files: paths whose appearance asks, each with its word; looked at each time `asked` is read.
        ends_at: when the time is over, Unix seconds (see `limits`); `grace_s` and the longest step before it asks.
        also: asked last, gives one of WORDS or None.
        speaks: whether this process says on stderr that it stops.
    """

    def __init__(
        self,
        grace_s: float = math.inf,
        files: Mapping[str, str] = MappingProxyType({}),
        ends_at: float | None = None,
        also: Callable[[], str | None] = lambda: None,
        speaks: bool = True,
    ) -> None:
        self.grace_s, self.files, self.ends_at, self.also, self.speaks = grace_s, files, ends_at, also, speaks
        self._word: str | None = None
        self._heard = _Heard(grace_s)
        self._last_resort = _LastResort(_Heard(grace_s))
        self._read_at: float | None = None
        self._longest_s = 0.0

    @property
    def asked(self) -> str | None:
        """Who asked first, one of WORDS, or None.

        To be read before the first step, then between any two: the longest time between two readings, whatever
        happened in it, counts as the longest step.
        """
        now = time.monotonic()
        if self._read_at is not None:
            self._longest_s = max(self._longest_s, now - self._read_at)
        first, self._read_at = self._read_at is None, now
        if self._word is None and (word := self._looked()):
            assert word in WORDS
            self._word = self._word or word  # a signal may have come meanwhile
            self._say(self._too_short() if first and word == TIME_LIMIT else _stopping("now", f", for {word}"))
        return self._word

    def _looked(self) -> str | None:
        for path, word in self.files.items():
            if os.path.exists(path):  # noqa: PTH110 - Path's raises where storage falters
                return word
        if self.ends_at is not None and out_of_time(time.time(), self.ends_at, self.grace_s, self._longest_s):
            return TIME_LIMIT
        return self.also()

    def __enter__(self) -> Self:
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self.before = {number: signal.signal(number, self._on_signal) for number in heard}
        self._last_resort.watch(heard)
        # a launcher that blocks signals, so as not to end its workers by them, has given them that, too
        self.blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, heard)
        return self

    def __exit__(self, *fault: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self.blocked)
        self._last_resort.leave()
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        ctrl_c = _is_ctrl_c(number)
        told = self._heard.judge(ctrl_c, time.monotonic())
        if told == "end":
            raise KeyboardInterrupt if self._heard.ctrl_cs > 1 else CutShort(self._heard.why(number))
        if told == "ask":
            when = "already" if self._word else "after this step"
            self._word = self._word or signal.Signals(number).name
            self._say("\n" + _stopping(when) + (" Ctrl-C again exits at once, without them." if ctrl_c else ""))

    def _too_short(self) -> str:
        left = max((self.ends_at or 0) - time.time(), 0)
        return (
            f"The time limit is in {left:.0f} s, and train.stop_grace_s keeps {self.grace_s:g} s for the save: no step "
            "is taken. Raise the limit (train.max_hours, or the job's own), or lower train.stop_grace_s"
        )

    def _say(self, sentence: str) -> None:
        if not self.speaks:
            return
        with suppress(OSError):  # the terminal may be what is gone
            try:
                print(sentence, file=sys.stderr, flush=True)
            except RuntimeError:  # the signal came while the main thread was writing there
                os.write(2, f"{sentence}\n".encode())


def files_that_ask(config: RunConfig, env: Mapping[str, str]) -> dict[str, str]:
    """The paths whose appearance asks, each with its word: train.stop_file, and QLORA_WARNING_FILE, which the scripts
    in slurm/ make when the scheduler warns them.

    Args:
        env: the environment.
    """
    paths = {config.train.stop_file: STOP_FILE, env.get("QLORA_WARNING_FILE"): WARNING}
    return {path: word for path, word in paths.items() if path}


def limits(config: RunConfig, env: Mapping[str, str], begun: float) -> float | None:
    """When the time of this start is over, Unix seconds: what comes first of train.max_hours and SLURM_JOB_END_TIME;
    None without either.

    Args:
        env: the environment.
        begun: when this start began, Unix seconds.

    Raises:
        InputError: SLURM_JOB_END_TIME is no number.
    """
    ends = []
    if config.train.max_hours is not None:
        ends.append(begun + config.train.max_hours * 3600)
    if (text := env.get("SLURM_JOB_END_TIME")) is not None:
        if not (text.isascii() and text.isdecimal()):
            raise InputError(f"The environment's SLURM_JOB_END_TIME is {text!r}, expected Unix seconds. Unset it")
        ends.append(float(text))
    return min(ends, default=None)


def out_of_time(now: float, ends_at: float, grace_s: float, longest_s: float) -> bool:
    """Whether one more step, as long as the longest so far, would leave less than the grace."""
    return now + longest_s + grace_s > ends_at


class _Heard:
    """What the signals so far mean; counts Ctrl-C and knows when the first came (monotonic, s)."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s, self.first_at, self.now, self.ctrl_cs, self.ended = grace_s, math.inf, 0.0, 0, False

    def judge(self, ctrl_c: bool, now: float) -> Literal["ask", "end"] | None:
        """One more came. The first of all asks, and so does the first Ctrl-C; once told to end, repeats mean nothing:
        the last words are being written."""
        if self.ended:
            return None
        self.now, self.ctrl_cs = now, self.ctrl_cs + ctrl_c
        self.ended = self.ctrl_cs > 1 or now - self.first_at >= self.grace_s
        first = self.first_at == math.inf
        self.first_at = min(self.first_at, now)
        if self.ended:
            return "end"
        return "ask" if first or ctrl_c else None

    def why(self, number: int) -> str:
        """Why this signal ends the run."""
        return (
            f"{signal.Signals(number).name} came {self.now - self.first_at:.0f} s after the first signal, and "
            f"train.stop_grace_s is {self.grace_s:g}: ended at once, before all was saved. Raise it when a step and a "
            "save take longer"
        )


class _LastResort:
    """Ends the process when it was told to end at once and the main thread does not.

    Python's handlers run in the main thread alone and wait while it is inside a library, which can be for ever; the
    bytes of `set_wakeup_fd` are written wherever it is.
    """

    def __init__(self, heard: _Heard) -> None:
        self.heard, self.left, self.watching = heard, threading.Event(), False

    def watch(self, numbers: list[signal.Signals]) -> None:
        self.numbers, self.watching = numbers, True
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.before = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=self._in_child)
        self.thread = threading.Thread(target=self._run, name="stop", daemon=True)
        self.thread.start()

    def leave(self) -> None:
        signal.set_wakeup_fd(self.before)
        self.watching = False
        self.left.set()
        with suppress(BlockingIOError):  # full: there is enough to wake up for
            os.write(self.writer, b"\0")
        self.thread.join()
        os.close(self.reader)
        os.close(self.writer)

    def _in_child(self) -> None:
        if self.watching:  # what the child is sent is not meant for its parent
            signal.set_wakeup_fd(-1)

    def _run(self) -> None:
        while (number := os.read(self.reader, 1)[0]) in self.numbers or not self.left.is_set():
            if number not in self.numbers or self.heard.judge(_is_ctrl_c(number), time.monotonic()) != "end":
                continue
            if self.left.wait(LAST_WORDS_S):
                return
            twice = self.heard.ctrl_cs > 1
            said = "A second Ctrl-C: ended at once" if twice else self.heard.why(number)
            if select.select([], [2], [], 0)[1]:  # nobody may be reading any more
                with suppress(OSError):
                    os.write(2, f"{said}\n".encode())
            os._exit(CTRL_C_TWICE if twice else JobError.exit_code)


def _stopping(when: str, why: str = "") -> str:
    return f"Stopping {when}{why}; a checkpoint and the adapter will be written."


def _is_ctrl_c(number: int) -> bool:
    """Whether somebody pressed it: launchers send SIGINT, and more than once, too."""
    with suppress(AttributeError, ValueError):  # no stdin, or a closed one
        return number == signal.SIGINT and sys.stdin.isatty()
    return False
