"""The sinks: plain lines or a bar on the console, metrics.jsonl on storage that appends and storage that does not."""

import io
import json
import math
import secrets
from pathlib import Path

import pytest
from rich.console import Console

from job.config.running import Storage
from job.report import summary
from job.sinks import METRICS, ConsoleSink, JsonlSink, evaluations, read_metrics
from job.store import Store
from tests.s3 import BUCKET, S3


def training_row(step: int, loss: float = 1.5) -> dict[str, float]:
    return {"step": step, "loss": loss, "learning_rate": 2e-4, "tokens_per_s": 1234.5}


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
    sink = JsonlSink(Store(str(tmp_path)))
    sink.start("first", 2)
    for step in (1, 2):
        sink.row(training_row(step))
        rows = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
        assert rows == [training_row(n) for n in range(1, step + 1)]
    sink.close()
    assert [file.name for file in tmp_path.iterdir()] == [METRICS]


@pytest.fixture(params=["memory", "s3"])
def remote(request: pytest.FixtureRequest) -> Store:
    """An empty folder on storage that cannot append."""
    if request.param == "memory":
        return Store(f"memory://{secrets.token_hex(4)}")
    s3: S3 = request.getfixturevalue("s3")
    return Store(f"s3://{BUCKET}/{secrets.token_hex(4)}", Storage(**s3.storage))


def test_storage_that_cannot_append_gets_parts_that_are_joined_at_the_end(remote: Store) -> None:
    sink = JsonlSink(remote, part_rows=2)
    sink.start("first", 5)
    for step in range(1, 6):
        sink.row(training_row(step))
    parts = remote.child("metrics-parts")
    assert parts.names() == ["part-00000002.jsonl", "part-00000004.jsonl"]
    assert [json.loads(line)["step"] for line in parts.read("part-00000004.jsonl").splitlines()] == [3, 4]
    assert not remote.exists(METRICS)
    sink.close()
    assert [row["step"] for row in read_metrics(remote)] == [1, 2, 3, 4, 5]
    assert parts.names() == []


def test_a_part_is_written_after_a_while_however_few_rows_there_are(remote: Store) -> None:
    sink = JsonlSink(remote, part_s=0)
    sink.start("first", 1)
    sink.row(training_row(1))
    assert remote.child("metrics-parts").names() == ["part-00000001.jsonl"]


def test_a_run_without_rows_leaves_no_metrics(remote: Store) -> None:
    sink = JsonlSink(remote)
    sink.start("first", 1)
    sink.close()
    assert remote.names() == [] and read_metrics(remote) == []


def test_numbers_that_are_not_finite_are_valid_json_and_read_back_as_nan(tmp_path: Path) -> None:
    sink = JsonlSink(Store(str(tmp_path)))
    for step, loss in enumerate((math.inf, -math.inf, math.nan)):
        sink.row(training_row(step, loss))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for line in (tmp_path / METRICS).read_text().splitlines():
        assert json.loads(line, parse_constant=refuse)["loss"] is None
    assert all(math.isnan(row["loss"]) for row in read_metrics(Store(str(tmp_path))))


def test_evaluations_are_found_among_the_rows_and_summed_up(tmp_path: Path) -> None:
    from job.config import parse_config

    sink = JsonlSink(Store(str(tmp_path)))
    for row in ({"step": 0, "eval_loss": 5.25}, training_row(1), {"step": 1, "eval_loss": math.nan}):
        sink.row(row)
    assert [step for step, _ in evaluations(read_metrics(Store(str(tmp_path))))] == [0, 1]
    config = parse_config(f"{{model: {{name: m}}, data: {{train: d}}, output: {{url: {tmp_path}}}}}")
    assert list(summary(config)) == [
        "evaluation loss: 5.2500 before, nan after 1 steps",
        f"adapter: {tmp_path}/adapter",
    ]
