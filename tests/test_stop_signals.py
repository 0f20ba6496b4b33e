"""Signals to a run, real ones to real processes and terminals: which ask, which change nothing, which end it."""

import ctypes
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY

SAID = "Stopping after this step; a checkpoint and the adapter will be written."
HINT = " Ctrl-C again exits at once, without them."
RUN = """
import sys, time
from job import stop
stop.LAST_WORDS_S = 0.5
{before}
with stop.StopRequest(grace_s={grace_s}) as request:
    print("ready", flush=True)
    try:
        while not request.asked:
            {step}
        print("asked by", request.asked, flush=True)
        {save}
        print("saved", flush=True)
    except BaseException as fault:
        print("raised", type(fault).__name__, flush=True)
        raise
sys.exit(75)
"""
STUCK = (
    "import ctypes; c = ctypes.CDLL(None); c.PyThread_allocate_lock.restype = ctypes.c_void_p\n"
    "lock = ctypes.c_void_p(c.PyThread_allocate_lock()); c.PyThread_acquire_lock(lock, 1)"
)
"""A library's lock that is taken: who takes it again waits for ever, without Python's knowing."""


class Run:
    """A process whose steps and save are Python as given; used as a context manager it is gone at the end."""

    def __init__(
        self,
        grace_s: float = 60,
        step: str = "time.sleep(0.01)",
        save: str = "time.sleep(0.5)",
        before: str = "",
        **how: Any,
    ) -> None:
        words = [sys.executable, "-c", RUN.format(grace_s=grace_s, step=step, save=save, before=before)]
        files = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(words, cwd=REPOSITORY, text=True, **{**files, **how})
        self.out = ""

    def __enter__(self) -> "Run":
        self.wait_for("ready")
        return self

    def __exit__(self, *fault: object) -> None:
        self.process.kill()
        self.process.communicate()

    def wait_for(self, words: str) -> None:
        assert self.process.stdout
        while words not in self.out:
            line = self.process.stdout.readline()
            assert line, self.out
            self.out += line

    def send(self, *numbers: int) -> None:
        for number in numbers:
            self.process.send_signal(number)

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, self.out + out, err or ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_each_signal_asks_and_says_so_without_a_word_of_ctrl_c(number: signal.Signals) -> None:
    with Run() as run:
        run.send(number)
        code, out, err = run.end()
    assert (code, err) == (75, f"\n{SAID}\n")
    assert f"asked by {number.name}\nsaved" in out


def test_sigterm_twice_within_a_millisecond_asks_once() -> None:
    with Run() as run:
        run.send(signal.SIGTERM, signal.SIGTERM)
        code, out, err = run.end()
    assert (code, err.count("Stopping")) == (75, 1)
    assert "saved" in out


def test_all_signals_within_the_grace_change_nothing_and_the_first_is_the_reason() -> None:
    with Run() as run:
        run.send(signal.SIGUSR1)
        run.wait_for("asked by SIGUSR1")
        run.send(signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGUSR1)
        code, out, err = run.end()
    assert (code, err) == (75, f"\n{SAID}\n")
    assert "saved" in out


def test_a_save_longer_than_the_grace_is_not_ended_by_itself() -> None:
    with Run(grace_s=0.1) as run:
        run.send(signal.SIGTERM)
        code, out, _ = run.end()
    assert code == 75 and "saved" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_after_the_grace_ends_the_run_at_once_with_1_and_says_why(number: signal.Signals) -> None:
    patient = "\n        while True:\n            try: time.sleep(60)\n            except Exception: pass\n"
    with Run(grace_s=0.3, save=patient) as run:
        run.send(signal.SIGTERM)
        run.wait_for("asked by")
        time.sleep(0.4)
        run.send(number)
        code, out, err = run.end()
    assert code == 1 and "raised CutShort" in out and "saved" not in out
    why = rf"{number.name} came \d+ s after the first signal, and train.stop_grace_s is 0.3: ended at once, before all"
    assert re.search(why, err) and "Traceback" not in err


def test_the_signal_that_ends_a_run_may_come_twice_too_and_does_not_cut_its_last_words() -> None:
    save = (
        "\n        try: time.sleep(60)\n"
        "        except stop.CutShort: time.sleep(0.3); print('last words', flush=True); raise\n"
    )
    with Run(grace_s=0.1, save=save, before="stop.LAST_WORDS_S = 10") as run:
        run.send(signal.SIGTERM)
        run.wait_for("asked by")
        time.sleep(0.2)
        run.send(signal.SIGTERM, signal.SIGTERM)
        time.sleep(0.1)
        run.send(signal.SIGTERM)
        code, out, _ = run.end()
    assert code == 1 and "last words" in out


def test_a_main_thread_stuck_in_a_library_is_ended_by_a_signal_after_the_grace() -> None:
    stuck = 'print("stuck", flush=True); c.PyThread_acquire_lock(lock, 1)'
    with Run(grace_s=0.3, step=stuck, before=STUCK) as run:
        run.wait_for("stuck")
        run.send(signal.SIGTERM, signal.SIGTERM)
        time.sleep(1)
        assert run.process.poll() is None, "within the grace nothing ends it, and the grace alone does not"
        run.send(signal.SIGTERM)
        code, out, err = run.end()
    assert code == 1 and "asked" not in out and "raised" not in out
    assert re.search(r"SIGTERM came \d+ s after the first signal", err)


def test_a_forked_child_that_is_sent_signals_does_not_end_its_parent() -> None:
    child = (
        "\n        child = stop.os.fork()\n"
        "        if not child: time.sleep(60)\n"
        "        time.sleep(0.2)\n"
        "        for number in (15, 15): stop.os.kill(child, number); time.sleep(0.1)\n"
        "        stop.os.kill(child, 9); stop.os.waitpid(child, 0); time.sleep(1)\n"
    )
    with Run(grace_s=0.1, save=child) as run:
        run.send(signal.SIGTERM)
        code, out, _ = run.end()
    assert code == 75 and "saved" in out


def test_a_process_full_of_busy_threads_hears_a_signal_whichever_thread_gets_it() -> None:
    busy = (
        "import threading\n"
        "def spin():\n    while True: sum(range(1000))\n"
        "for _ in range(30): threading.Thread(target=spin, daemon=True).start()"
    )
    with Run(before=busy) as run:
        threads = [int(entry.name) for entry in Path(f"/proc/{run.process.pid}/task").iterdir()]
        assert len(threads) >= 31
        for thread in threads[1:6]:
            send_to_thread(run.process.pid, thread, signal.SIGUSR2)
        code, out, err = run.end()
    assert code == 75 and "asked by SIGUSR2\nsaved" in out
    assert err.count("Stopping") == 1


def send_to_thread(process: int, thread: int, number: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    tgkill = {"x86_64": 234, "aarch64": 131}[os.uname().machine]
    assert libc.syscall(tgkill, process, thread, int(number)) == 0


def test_a_signal_while_the_main_thread_writes_to_a_full_stderr_is_said_when_there_is_room() -> None:
    flood = "sys.stderr.write('.' * 200_000 + chr(10))"
    with Run(step=flood, env={**os.environ, "PYTHONUNBUFFERED": ""}) as run:
        time.sleep(0.5)  # the pipe is full, and the main thread inside its write
        run.send(signal.SIGTERM)
        time.sleep(0.2)
        code, out, err = run.end()
    assert code == 75 and "saved" in out and "Traceback" not in err
    assert err.count(SAID) == 1


def test_a_signal_with_nobody_on_stderr_and_no_stdin_asks_all_the_same() -> None:
    with Run(before="sys.stdin.close()") as run:
        assert run.process.stderr
        run.process.stderr.close()
        run.process.stderr = None
        run.send(signal.SIGINT)
        code, out, _ = run.end()
    assert code == 75 and "saved" in out


def test_under_nohup_a_hang_up_stays_ignored() -> None:
    with Run(before="import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)") as run:
        run.send(signal.SIGHUP)
        time.sleep(0.3)
        run.send(signal.SIGTERM)
        code, out, _ = run.end()
    assert code == 75 and "asked by SIGTERM" in out


class Terminal:
    """A terminal whose foreground process is the one started in it; keys go in, what it shows comes out."""

    def __init__(self, **how: Any) -> None:
        words = [sys.executable, "-c", RUN.format(**{"grace_s": 60, "step": "time.sleep(0.01)", "before": "", **how})]
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.chdir(REPOSITORY)
            os.execv(words[0], words)
        self.shown = ""

    def wait_for(self, words: str) -> None:
        while words not in self.shown:
            self.shown += os.read(self.fd, 4096).decode()

    def press_ctrl_c(self) -> None:
        os.write(self.fd, b"\x03")

    def end(self) -> int:
        """The exit code."""
        try:
            while read := os.read(self.fd, 4096):
                self.shown += read.decode()
        except OSError:  # EIO: nobody is at the other end any more
            pass
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)
        return code


def test_a_second_ctrl_c_at_a_terminal_interrupts_at_once() -> None:
    terminal = Terminal(save="time.sleep(60)")
    terminal.wait_for("ready")
    terminal.press_ctrl_c()
    terminal.wait_for(SAID + HINT)
    terminal.wait_for("asked by SIGINT")
    terminal.press_ctrl_c()
    assert terminal.end() == -signal.SIGINT, "what Python does with a KeyboardInterrupt; the command makes it 130"
    assert "raised KeyboardInterrupt" in terminal.shown


def test_one_ctrl_c_at_a_terminal_asks_and_other_signals_do_not_count_as_a_second() -> None:
    terminal = Terminal(save="time.sleep(1)")
    terminal.wait_for("ready")
    terminal.press_ctrl_c()
    terminal.wait_for("asked by SIGINT")
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.end() == 75
    assert "saved" in terminal.shown


def test_a_first_ctrl_c_after_another_signal_says_what_a_second_would_do() -> None:
    terminal = Terminal(save="time.sleep(1)")
    terminal.wait_for("ready")
    os.kill(terminal.pid, signal.SIGTERM)
    terminal.wait_for("asked by SIGTERM")
    terminal.press_ctrl_c()
    terminal.wait_for("Stopping already; a checkpoint and the adapter will be written." + HINT)
    assert terminal.end() == 75
    assert HINT not in terminal.shown.partition("asked by")[0] and "saved" in terminal.shown


def test_a_second_ctrl_c_ends_even_a_main_thread_stuck_in_a_library_with_130() -> None:
    terminal = Terminal(before=STUCK, step='print("stuck", flush=True); c.PyThread_acquire_lock(lock, 1)', save="pass")
    terminal.wait_for("stuck")
    terminal.press_ctrl_c()
    time.sleep(0.2)
    terminal.press_ctrl_c()
    assert terminal.end() == 130
    assert "A second Ctrl-C: ended at once" in terminal.shown
