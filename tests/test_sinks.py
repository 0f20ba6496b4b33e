"""The sinks: plain lines or a bar on the console, metrics.jsonl on storage that appends and storage that does not."""

import errno
import io
import json
import math
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from job.config.running import Storage
from job.report import summary
from job.run_folder import RunFolder
from job.sinks import (
    METRICS,
    PARTS,
    ConsoleSink,
    JsonlSink,
    cut_metrics,
    evaluations,
    forget_metrics,
    latest_step,
    read_metrics,
)
from job.store import Store
from tests.s3 import BUCKET, S3


def training_row(step: int, loss: float = 1.5) -> dict[str, float]:
    return {"step": step, "loss": loss, "learning_rate": 2e-4, "tokens_per_s": 1234.5}


def at_once(what: str, act: Callable[[], object], store: Store) -> None:
    """As `Uploads.put`, without a thread."""
    act()


class Later:
    """As `Uploads.put`, when it is told to."""

    def __init__(self) -> None:
        self.jobs: list[tuple[str, Callable[[], object], Store]] = []

    def put(self, what: str, act: Callable[[], object], store: Store) -> None:
        self.jobs.append((what, act, store))

    def act(self) -> None:
        while self.jobs:
            self.jobs.pop(0)[1]()


def console(terminal: bool, **how: object) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=60, **how)  # type: ignore[arg-type]


def said(sink: ConsoleSink) -> str:
    assert isinstance(sink.console.file, io.StringIO)
    return sink.console.file.getvalue()


def show(sink: ConsoleSink, steps: int = 5, run_name: str = "first") -> str:
    """What a run of so many steps, with an evaluation before and after, prints."""
    sink.start(run_name, steps)
    sink.row({"step": 0, "eval_loss": 5.25})
    for step in range(1, steps + 1):
        sink.row(training_row(step))
    sink.row({"step": steps, "eval_loss": 2.5})
    sink.close()
    return said(sink)


def test_without_a_terminal_the_console_gets_one_plain_line_a_row() -> None:
    lines = show(ConsoleSink(console=console(terminal=False))).splitlines()
    assert lines[0] == "step 0: evaluation loss 5.2500" and lines[-1] == "step 5: evaluation loss 2.5000"
    assert lines[1].startswith("step 1/5  loss 1.5000  1,234 tok/s") and lines[1].endswith("lr 2.00e-04")
    assert "left" in lines[2] and len(lines) == 7, "no line is wrapped, though the console is 60 wide"
    assert "\x1b" not in "".join(lines) and "\r" not in "".join(lines)


def test_a_step_that_was_left_out_is_said_on_the_console() -> None:
    sink = ConsoleSink(console=console(terminal=False))
    sink.start("first", 2)
    sink.row(training_row(1))
    sink.row({**training_row(2, math.nan), "left_out": 1})
    first, second = said(sink).splitlines()
    assert "left out" not in first and second.startswith("step 2/2  not finite, left out  loss nan  ")


def test_plain_lines_come_every_so_many_steps_and_at_the_end() -> None:
    text = show(ConsoleSink(every_steps=2, console=console(terminal=False)))
    assert [line.split()[1] for line in text.splitlines() if "/" in line.split()[1]] == ["2/5", "4/5", "5/5"]


def test_on_a_terminal_the_console_shows_a_bar_with_loss_speed_and_time_left() -> None:
    text = show(ConsoleSink(console=console(terminal=True, color_system=None)))
    assert "━" in text and "5/5" in text and "loss 1.5000" in text and "tok/s" in text and "left" in text
    assert "evaluation loss 2.5000" in text and "step 3/5" not in text


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "step 3/5" in show(ConsoleSink(console=console(terminal=True)))


def test_colours_forced_by_the_environment_make_no_terminal_of_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    sink = ConsoleSink()
    sink.start("first", 1)
    sink.row(training_row(1))
    sink.close()
    assert capsys.readouterr().err.startswith("step 1/1  loss")


def test_a_run_name_with_brackets_or_braces_is_shown_as_it_is() -> None:
    name = "a[b]{c}"
    assert name in show(ConsoleSink(console=console(terminal=True, color_system=None)), run_name=name)


def test_a_local_metrics_file_has_each_row_as_soon_as_it_happened(tmp_path: Path) -> None:
    later = Later()
    sink = JsonlSink(Store(str(tmp_path)), later.put)
    sink.start("first", 2)
    for step in (1, 2):
        sink.row(training_row(step))
        rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
        assert rows == [training_row(n) for n in range(1, step + 1)]
    sink.close()
    assert [file.name for file in tmp_path.iterdir()] == [METRICS] and not later.jobs, "nothing is left for later"


def lines(*steps: int) -> list[bytes]:
    return [json.dumps(training_row(step)).encode() + b"\n" for step in steps]


def steps_there(store: Store) -> list[float]:
    return [row["step"] for row in read_metrics(store)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_on_a_full_disk_rows_wait_for_room_and_none_is_lost_or_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store, full = Store(str(tmp_path)), False
    append = store.append

    def refuse_when_full(name: str, content: bytes) -> None:
        if full:
            raise OSError(code, "no room")
        append(name, content)

    monkeypatch.setattr(store, "append", refuse_when_full)
    sink = JsonlSink(store, at_once)
    for step in range(1, 7):
        full = step in (2, 3, 6)
        sink.row(training_row(step))
    assert steps_there(store) == [1, 2, 3, 4, 5]
    sink.flush()
    assert steps_there(store) == [1, 2, 3, 4, 5], "still full"
    full = False
    sink.close()
    sink.flush()
    assert steps_there(store) == [1, 2, 3, 4, 5, 6]


def test_other_faults_of_a_local_disk_are_not_kept_silent(tmp_path: Path) -> None:
    (tmp_path / METRICS).mkdir()
    with pytest.raises(IsADirectoryError):
        JsonlSink(Store(str(tmp_path)), at_once).row(training_row(1))


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest) -> Store:
    """An empty folder on storage that cannot append."""
    if request.param == "memory":
        return Store(f"memory://{secrets.token_hex(4)}")
    s3: S3 = request.getfixturevalue("s3")
    return Store(f"s3://{BUCKET}/{secrets.token_hex(4)}", Storage(**s3.storage))


def test_storage_that_cannot_append_gets_parts_that_are_joined_at_the_end(remote: Store) -> None:
    sink = JsonlSink(remote, at_once, part_rows=2)
    sink.start("first", 5)
    for step in range(1, 6):
        sink.row(training_row(step))
    parts = remote.child("metrics-parts")
    assert parts.names() == ["part-00000002.jsonl", "part-00000004.jsonl"]
    assert [json.loads(line)["step"] for line in parts.read("part-00000004.jsonl").splitlines()] == [3, 4]
    assert not remote.exists(METRICS)
    sink.close()
    assert steps_there(remote) == [1, 2, 3, 4, 5]
    assert parts.names() == []


def test_what_is_written_in_the_background_holds_the_rows_as_they_were(remote: Store) -> None:
    later = Later()
    sink = JsonlSink(remote, later.put, part_rows=2)
    for step in range(1, 4):
        sink.row(training_row(step))
    sink.flush()
    sink.flush()  # nothing is new
    sink.row(training_row(4))
    assert remote.names(folders=True) == []
    assert [(what, store) for what, _, store in later.jobs] == [("rows of metrics", remote)] * 2
    first, second = (act for _, act, _ in later.jobs)
    first()
    first()  # what failed half-way is tried again
    second()
    parts = remote.child(PARTS)
    assert b"".join(map(parts.read, parts.names())) == b"".join(lines(1, 2, 3))
    later.jobs.clear()
    sink.close()
    later.act()
    assert steps_there(remote) == [1, 2, 3, 4] and parts.names() == []


def test_a_continued_run_joins_its_rows_to_those_that_it_kept(remote: Store) -> None:
    sink = JsonlSink(remote, at_once, lines(1, 2), part_rows=2)
    for step in (3, 4, 5):
        sink.row(training_row(step))
    assert remote.child(PARTS).names() == ["part-00000004.jsonl"]
    assert remote.child(PARTS).read("part-00000004.jsonl") == b"".join(lines(3, 4)), "only what is new"
    sink.close()
    assert steps_there(remote) == [1, 2, 3, 4, 5]


def test_a_continued_run_on_a_disk_adds_its_rows_to_those_that_are_there(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.write(METRICS, b"".join(lines(1, 2)))
    sink = JsonlSink(store, at_once, lines(1, 2))
    sink.row(training_row(3))
    sink.close()
    assert steps_there(store) == [1, 2, 3]


@pytest.fixture(params=["file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(str(tmp_path) if request.param == "file" else f"memory://{secrets.token_hex(4)}")


def test_metrics_are_cut_after_a_step_evaluations_of_it_included(place: Store) -> None:
    judged = [json.dumps({"step": step, "eval_loss": 2.0}).encode() + b"\n" for step in (0, 2, 3)]
    zero, *rest = judged
    place.write(METRICS, b"".join([zero, *lines(1, 2), rest[0], *lines(3), rest[1], *lines(4)]))
    expected = [zero, *lines(1, 2), rest[0]]
    assert cut_metrics(place, 2) == expected
    assert place.read(METRICS) == b"".join(expected)
    assert cut_metrics(place, 2) == expected, "a second time changes nothing"


def test_parts_of_a_run_that_was_killed_are_joined_when_they_are_cut(place: Store) -> None:
    parts = place.child(PARTS)
    parts.write("part-00000002.jsonl", b"".join(lines(1, 2)))
    parts.write("part-00000004.jsonl", b"".join(lines(3, 4)))
    assert latest_step(place) == 4
    assert cut_metrics(place, 3) == lines(1, 2, 3)
    assert steps_there(place) == [1, 2, 3] and parts.names() == []
    assert latest_step(place) == 3


def test_a_row_that_is_both_joined_and_in_a_part_is_kept_once(place: Store) -> None:
    place.write(METRICS, b"".join(lines(1, 2, 3)))
    place.child(PARTS).write("part-00000003.jsonl", b"".join(lines(2, 3)))
    assert cut_metrics(place, 3) == lines(1, 2, 3)


@pytest.mark.parametrize("torn", [b'{"step": 3, "lo', b"[]\n", b"\n", b'{"loss": 1.0}\n', b"\xff\n", lines(3)[0][:-1]])
def test_a_torn_line_is_no_row(place: Store, torn: bytes) -> None:
    place.write(METRICS, b"".join(lines(1, 2)) + torn)
    assert cut_metrics(place, 9) == lines(1, 2)
    assert place.read(METRICS) == b"".join(lines(1, 2))


def test_without_metrics_there_is_nothing_to_cut_and_no_latest_step(place: Store) -> None:
    assert cut_metrics(place, 5) == []
    assert latest_step(place) == 0
    forget_metrics(place)


def test_forgotten_metrics_are_gone_with_their_parts(place: Store) -> None:
    place.write(METRICS, b"".join(lines(1)))
    place.child(PARTS).write("part-00000002.jsonl", b"".join(lines(2)))
    place.write("other", b"")
    forget_metrics(place)
    assert place.names() == ["other"] and place.child(PARTS).names() == []
    assert read_metrics(place) == [] and latest_step(place) == 0


def test_a_part_is_written_after_a_while_however_few_rows_there_are(remote: Store) -> None:
    sink = JsonlSink(remote, at_once, part_s=0)
    sink.start("first", 1)
    sink.row(training_row(1))
    assert remote.child("metrics-parts").names() == ["part-00000001.jsonl"]


def test_a_run_without_rows_leaves_no_metrics(remote: Store) -> None:
    sink = JsonlSink(remote, at_once)
    sink.start("first", 1)
    sink.close()
    assert remote.names() == [] and read_metrics(remote) == []


def test_numbers_that_are_not_finite_are_valid_json_and_read_back_as_nan(tmp_path: Path) -> None:
    sink = JsonlSink(Store(str(tmp_path)), at_once)
    for step, loss in enumerate((math.inf, -math.inf, math.nan)):
        sink.row(training_row(step, loss))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for line in (tmp_path / METRICS).read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["loss"] is None
    assert all(math.isnan(row["loss"]) for row in read_metrics(Store(str(tmp_path))))


def test_evaluations_are_found_among_the_rows_and_summed_up(tmp_path: Path) -> None:
    from job.config import parse_config

    sink = JsonlSink(Store(str(tmp_path)), at_once)
    for row in ({"step": 0, "eval_loss": 5.25}, training_row(1), {"step": 1, "eval_loss": math.nan}):
        sink.row(row)
    assert [step for step, _ in evaluations(read_metrics(Store(str(tmp_path))))] == [0, 1]
    config = parse_config(f"{{model: {{name: m}}, data: {{train: d}}, output: {{url: {tmp_path}}}}}")
    assert list(summary(config)) == [
        "evaluation loss: 5.2500 before, nan after 1 steps",
        f"adapter: {tmp_path}/adapter",
    ]


def test_an_adapter_that_was_not_judged_yet_says_so_and_that_its_run_goes_on(tmp_path: Path) -> None:
    from job.config import parse_config

    JsonlSink(Store(str(tmp_path)), at_once).row({"step": 0, "eval_loss": 5.25})
    config = parse_config(f"{{model: {{name: m}}, data: {{train: d}}, output: {{url: {tmp_path}}}}}")
    RunFolder(config).write_status("interrupted", "SIGTERM", 6)
    assert list(summary(config)) == [
        "evaluation loss: 5.2500 before the first step, and not measured since",
        "the run is interrupted after 6 steps: this adapter is none of a finished run",
        f"adapter: {tmp_path}/adapter",
    ]
