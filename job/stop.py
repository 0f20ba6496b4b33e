"""Asked to stop: the first signal sets a flag that the loop reads between steps, a second Ctrl-C exits at once."""

import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
NAMES = [number.name for number in SIGNALS]


class StopRequest:
    """Context manager; `asked` is the name of the signal that asked for a stop, or None."""

    def __init__(self) -> None:
        self.asked: str | None = None

    def __enter__(self) -> Self:
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        self.before = {number: signal.signal(number, self._on_signal) for number in heard}
        return self

    def __exit__(self, *fault: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        ctrl_c = number == signal.SIGINT and sys.stdin.isatty()  # launchers send SIGINT, and more than once, too
        if self.asked:
            if ctrl_c:
                raise KeyboardInterrupt
            return
        self.asked = signal.Signals(number).name
        again = " Ctrl-C again exits at once, without it." if ctrl_c else ""
        with suppress(OSError):  # the terminal may be what is gone
            print(f"\nStopping after this step, the adapter will be written.{again}", file=sys.stderr, flush=True)
