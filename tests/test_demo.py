"""`make demo` on the real model: the held-out loss falls by far, and only when there is something to learn."""

import json
import random
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, metrics, qlora, write_rows

DEMO = REPOSITORY / "configs/demo"
TWO_CORES = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
"""Threads that sleep while they wait for each other: those that spin take the core of the other test worker, and a step
takes twice as long."""


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def evaluations(output: Path) -> list[float]:
    return [row["eval_loss"] for row in metrics(output) if "eval_loss" in row]


def test_the_rows_are_what_their_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DEMO / "rows.py", tmp_path], check=True)
    for name in ("train.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes()


def test_held_out_rows_share_no_question_answer_person_city_or_article_with_the_training_rows() -> None:
    train, held_out = rows("train.jsonl"), rows("heldout.jsonl")
    assert (len(train), len(held_out)) == (320, 40)
    for field in ("input", "output"):
        assert not {row[field] for row in train} & {row[field] for row in held_out}

    def entities(found: list[dict[str, str]]) -> set[str]:
        parts = [part.strip() for row in found for part in row["output"].split("|")]
        return {re.sub(r"^\d+\s*", "", part) for part in parts}

    assert not entities(train) & entities(held_out)
    assert sum("一" <= row["input"][0] <= "鿿" for row in train) == 160  # half of them Chinese


@pytest.fixture(scope="module")
def demo(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's run, in an output folder of this test."""
    output = tmp_path_factory.mktemp("demo") / "out"
    done = qlora("train", REPOSITORY / "configs/smollm2-135m-demo.yaml", f"output.url={output}", env=TWO_CORES)
    assert done.returncode == 0, done.stderr
    assert re.search(r"evaluation loss: \d\.\d{4} before, \d\.\d{4} after 48 steps", done.stderr)
    return output


def test_the_demo_lowers_the_loss_on_rows_it_was_not_trained_on_to_less_than_a_quarter(demo: Path) -> None:
    before, after = evaluations(demo)
    assert after < 0.25 * before
    assert max(row["memory_gib"] for row in metrics(demo) if "loss" in row) < 4


def test_compare_shows_base_and_tuned_side_by_side_with_losses_and_the_adapter(demo: Path) -> None:
    config = REPOSITORY / "configs/smollm2-135m-demo.yaml"
    shown = qlora("compare", config, f"output.url={demo}", "generation.rows=4", env=TWO_CORES)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert re.search(r"question .* wanted .* base .* tuned", lines[1])
    table = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")][1:]
    answers = [(wanted, base, tuned) for _, wanted, base, tuned in table if wanted]
    assert len(answers) == 4
    assert sum(wanted == tuned for wanted, _, tuned in answers) >= 2
    assert not any(wanted == base for wanted, base, _ in answers)
    assert re.fullmatch(r"evaluation loss: .* before, .* after 48 steps", lines[-2])
    assert lines[-1] == f"adapter: {demo}/adapter"


def test_chat_answers_what_is_typed(demo: Path) -> None:
    config = REPOSITORY / "configs/smollm2-135m-demo.yaml"
    question = (
        "Sum up the order in one line: person | city | goods Please send nine pears to Naomi in Kyoto, thank you!"
    )
    said = qlora("chat", config, f"output.url={demo}", env=TWO_CORES, stdin=f"{question}\n\n")
    assert said.returncode == 0, said.stderr
    assert "Naomi" in said.stdout and "Kyoto" in said.stdout


def test_with_shuffled_labels_the_held_out_loss_does_not_halve(smollm2: Path, tmp_path: Path) -> None:
    by_language: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in rows("train.jsonl"):
        by_language[row["instruction"]].append(row)
    shuffled = []
    for same in by_language.values():
        outputs = [row["output"] for row in same]
        random.Random(0).shuffle(outputs)
        shuffled += [{**row, "output": output} for row, output in zip(same, outputs, strict=True)]
    file = write_rows(tmp_path / "shuffled.jsonl", shuffled)
    config = REPOSITORY / "configs/smollm2-135m-demo.yaml"
    done = qlora("train", config, f"data.train={file}", f"output.url={tmp_path / 'out'}", env=TWO_CORES)
    assert done.returncode == 0, done.stderr
    before, after = evaluations(tmp_path / "out")
    assert after > 0.5 * before
