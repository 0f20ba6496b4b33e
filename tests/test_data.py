"""From rows to tokens: what is cut and counted, what is held out, and how a data set is reported."""

import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from job.chat import Encoded
from job.config import RunConfig
from job.data.encode import Encoder
from job.data.load import load_dataset, make_encoder
from job.data.rows import Row
from job.data.split import split_rows
from job.errors import DataError
from job.tokenizer import Tokenizer
from tests.conftest import alpaca_rows, settings, write_rows

Make = Callable[..., Encoder]
Load = Callable[..., Any]


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(str(tiny_model))


def config_of(train: Path | str, **sections: Mapping[str, Any]) -> RunConfig:
    return RunConfig.model_validate(settings("owner/model", train, "runs/x", **sections))


@pytest.fixture
def encoder(tokenizer: Tokenizer) -> Make:
    """An encoder for rows like `fields`; keyword arguments are data settings."""

    def make(fields: Mapping[str, Any], **data: Any) -> Encoder:
        return make_encoder(config_of("rows.jsonl", data=data), tokenizer, Row("rows.jsonl line 1", dict(fields)))

    return make


def content(encoder: Encoder, parts: list[Encoded], learn: bool) -> str:
    """What is left of the row's own text: its answer (learnt) or its prompt."""
    return "".join(encoder.tokenizer.decode(part.ids) for part in parts if part.learn == learn and not part.markup)


def size(parts: list[Encoded]) -> int:
    return sum(len(part.ids) for part in parts)


def words(start: int, stop: int) -> str:
    return " ".join(f"w{number}" for number in range(start, stop))


def row(prompt: int, answer: int) -> dict[str, str]:
    """An alpaca row of so many words."""
    return {"instruction": words(1, prompt + 1), "output": words(1, answer + 1)}


def turns(*lengths: int, system: str = "Be kind.") -> dict[str, Any]:
    """User and assistant in turn, so many words each."""
    said = [
        {"role": ("user", "assistant")[place % 2], "content": f"t{place}: {words(0, length)}"}
        for place, length in enumerate(lengths)
    ]
    return {"messages": [{"role": "system", "content": system}, *said]}


def one(encoder: Encoder, fields: Mapping[str, Any]) -> tuple[list[Encoded], str]:
    sequences, fate = encoder.encode(Row("here", dict(fields)))
    assert len(sequences) == 1
    return sequences[0], fate


def test_a_row_that_fits_is_kept_whole(encoder: Make) -> None:
    made = encoder(row(3, 3))
    parts, fate = one(made, row(3, 3))
    assert fate == "kept"
    exact = encoder(row(3, 3), max_length=size(parts))
    assert one(exact, row(3, 3)) == (parts, "kept")
    tight = encoder(row(3, 3), max_length=size(parts) - 1)
    assert one(tight, row(3, 3))[1] == "truncated: over max_length"


def test_a_long_prompt_loses_its_middle_and_the_answer_stays_whole(encoder: Make) -> None:
    made = encoder(row(1, 1), max_length=64)
    parts, fate = one(made, row(100, 5))
    asked = content(made, parts, learn=False)
    assert fate == "truncated: over max_length"
    assert size(parts) == 64
    assert asked.startswith("w1 w2 w3")
    assert asked.endswith("w99 w100")
    assert content(made, parts, learn=True) == words(1, 6)
    assert made.tokenizer.eos in [token for part in parts if part.learn for token in part.ids]


def test_a_long_answer_loses_its_end_and_no_end_is_learnt(encoder: Make) -> None:
    made = encoder(row(1, 1), max_length=64)
    parts, _ = one(made, row(2, 100))
    assert size(parts) == 64
    assert content(made, parts, learn=False) == "w1 w2"
    assert words(1, 101).startswith(content(made, parts, learn=True))
    assert made.tokenizer.eos not in [token for part in parts if part.learn for token in part.ids]


def test_prompt_and_answer_share_the_room_when_both_are_long(encoder: Make) -> None:
    made = encoder(row(1, 1), max_length=64)
    parts, _ = one(made, row(100, 100))
    prompt, answer = (sum(len(p.ids) for p in parts if not p.markup and p.learn == learn) for learn in (False, True))
    assert size(parts) == 64
    assert 0.2 < prompt / (prompt + answer) < 0.3


@pytest.mark.parametrize("learn", ["all", "last"])
def test_old_turns_of_a_conversation_go_first(encoder: Make, learn: str) -> None:
    made = encoder(turns(1, 1), max_length=80, learn=learn)
    parts, fate = one(made, turns(9, 9, 9, 9, 4, 4))
    text = made.tokenizer.decode([token for part in parts for token in part.ids])
    assert fate == "truncated: over max_length"
    assert "Be kind." in text
    assert f"t4: {words(0, 4)}" in text
    assert f"t5: {words(0, 4)}<|im_end|>" in text
    assert "t0:" not in text
    assert "t1:" not in text


def test_a_long_text_is_split_and_nothing_of_it_is_lost(encoder: Make) -> None:
    made = encoder({"text": ""}, max_length=16)
    sequences, fate = made.encode(Row("here", {"text": words(0, 30)}))
    ids = [token for parts in sequences for part in parts for token in part.ids]
    assert fate == "split: text over max_length"
    assert all(1 < size(parts) <= 16 and all(part.learn for part in parts) for parts in sequences)
    assert made.tokenizer.decode(ids) in (f"{words(0, 30)}<|im_end|>", words(0, 30))


@pytest.mark.parametrize("format_name", ["alpaca", "messages", "prompt_completion", "template"])
def test_whatever_the_lengths_a_cut_row_fits_and_keeps_prompt_and_answer(encoder: Make, format_name: str) -> None:
    dice = random.Random(0)
    template = {"prompt": "Q: {instruction}\n", "completion": "A: {output}"} if format_name == "template" else None
    for _ in range(60):
        plain = row(dice.randint(1, 60), dice.randint(1, 60))
        fields: dict[str, Any] = {
            "messages": turns(*(dice.randint(1, 30) for _ in range(2 * dice.randint(1, 4)))),
            "prompt_completion": {"prompt": plain["instruction"], "completion": plain["output"]},
        }.get(format_name, plain)
        limit = dice.randint(4, 90)
        made = encoder(fields, max_length=limit, template=template, format=format_name)
        sequences, fate = made.encode(Row("here", fields))
        if not sequences:
            assert fate == "dropped: the chat format alone fills max_length"
            continue
        assert size(sequences[0]) <= limit
        assert any(part.ids for part in sequences[0] if part.learn and not part.markup)
        assert any(part.ids for part in sequences[0] if not part.learn and not part.markup)


@pytest.mark.parametrize(
    ("fields", "data", "fate"),
    [
        (row(3, 0), {}, "dropped: nothing to learn"),
        ({"instruction": "a", "output": " \n"}, {}, "dropped: nothing to learn"),
        ({"text": ""}, {}, "dropped: nothing to learn"),
        ({"messages": [{"role": "user", "content": "a"}]}, {}, "dropped: nothing to learn"),
        ({"q": "a", "a": ""}, {"template": {"prompt": "{q}", "completion": "A: {a}"}}, "dropped: nothing to learn"),
        (row(9, 9), {"max_length": 4}, "dropped: the chat format alone fills max_length"),
        (
            {"messages": [*turns(9, 9)["messages"], {"role": "user", "content": words(0, 90)}]},
            {"max_length": 64},
            "dropped: over max_length, and only its oldest turns are learnt",
        ),
        ({"prompt": "a", "completion": "<|im_end|>"}, {}, "dropped: nothing to learn"),
    ],
)
def test_a_row_that_teaches_nothing_is_dropped_and_says_why(
    encoder: Make, fields: dict[str, Any], data: dict[str, Any], fate: str
) -> None:
    assert encoder(fields, **data).encode(Row("here", fields)) == ([], fate)


BARE = "kept without the eos text at the end"
EOS_ROWS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"prompt": "a ", "completion": "b<|im_end|>"}, {}, "a b", BARE),
    ({"prompt": "a ", "completion": "b <|im_end|>\n"}, {}, "a b ", BARE),
    ({"text": "a b<|im_end|>"}, {}, "a b", BARE),
    ({"q": "a", "a": "b<|im_end|>"}, {"template": {"prompt": "{q} ", "completion": "{a}"}}, "a b", BARE),
    ({"q": "a", "a": "b<|im_end|>"}, {"template": {"prompt": "{q} ", "completion": "{a}<|im_end|>"}}, "a b", BARE),
    ({"prompt": "a<|im_end|>", "completion": "b<|im_end|>c"}, {}, "a<|im_end|>b<|im_end|>c", "kept"),
    ({"prompt": "a ", "completion": "b<|im_end|><|im_end|>"}, {}, "a b<|im_end|>", BARE),
]


@pytest.mark.parametrize(("fields", "data", "text", "fate"), EOS_ROWS)
def test_an_eos_written_at_the_end_of_a_completion_is_taken_off_once(
    encoder: Make, fields: dict[str, Any], data: dict[str, Any], text: str, fate: str
) -> None:
    made = encoder(fields, **data)
    parts, said = one(made, fields)
    ids = [token for part in parts for token in part.ids]
    assert said == fate
    assert ids[-1] == made.tokenizer.eos
    assert ids.count(made.tokenizer.eos) == 1
    assert made.tokenizer.decode(ids[:-1]) == text


def test_an_eos_written_in_a_turn_stays_text(encoder: Make) -> None:
    fields = {"instruction": "a", "output": "b<|im_end|>"}
    made = encoder(fields)
    parts, fate = one(made, fields)
    assert fate == "kept"
    assert content(made, parts, learn=True) == "b<|im_end|>"


def test_the_report_says_that_written_eos_were_taken_off(load: Load) -> None:
    data = load([{"prompt": "a", "completion": "b<|im_end|>"}, {"prompt": "a", "completion": "b"}])
    assert data.report()[1].startswith(f"train: 2 rows (1 kept, 1 {BARE}), ")


@pytest.fixture
def load(tokenizer: Tokenizer, tmp_path: Path) -> Load:
    """Loads rows written to rows.jsonl; keyword arguments are sections."""

    def loaded(rows: list[Any], **sections: Mapping[str, Any]) -> Any:
        return load_dataset(config_of(write_rows(tmp_path / "rows.jsonl", rows), **sections), tokenizer)

    return loaded


def test_the_report_counts_what_was_read_and_lost(load: Load) -> None:
    rows = [*alpaca_rows(8), row(3, 0), row(100, 2)]
    data = load(rows, evaluation={"share": 0.2}, data={"max_length": 64, "packing": False})
    head, train, held_out = data.report()
    assert head == "format alpaca, the model's chat template"
    assert train.startswith("train: 8 rows (")
    assert held_out.startswith("held out: 2 rows (")
    assert "1 dropped: nothing to learn" in train + held_out
    assert "1 truncated: over max_length" in train + held_out
    assert "longest 64" in train + held_out


@pytest.mark.parametrize(
    ("rows", "sections", "message"),
    [
        (
            [*alpaca_rows(2), {"instruction": "a", "answer": "b"}],
            {},
            "data.train: {file} line 3: has instruction, answer; the format alpaca needs instruction, output "
            "(missing: output)",
        ),
        (
            [*alpaca_rows(2), {"instruction": "a", "answer": "b"}],
            {"data": {"workers": 2}},
            "data.train: {file} line 3: has instruction, answer; the format alpaca needs instruction, output "
            "(missing: output)",
        ),
        (
            [row(3, 0), row(4, 0)],
            {},
            "data.train: none of the 2 rows has anything to learn: 2 dropped: nothing to learn",
        ),
        (
            [{"q": "a"}],
            {},
            "{file} line 1: data.format: no format has the fields q. Set data.template, or use alpaca: instruction, "
            "output; conversations: conversations; messages: messages; prompt_completion: prompt, completion; "
            "content_summary: content, summary; text: text",
        ),
        (
            alpaca_rows(3),
            {"evaluation": {"share": 0.1}},
            "evaluation.share: 0.1 of 3 rows holds out 0, expected at least 1 and fewer than all. "
            "Change the share, or give evaluation.file",
        ),
    ],
)
def test_rows_that_cannot_be_used_are_refused(
    load: Load, tmp_path: Path, rows: list[Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as refused:
        load(rows, **sections)
    assert str(refused.value) == message.format(file=tmp_path / "rows.jsonl")


def test_half_a_character_names_its_row(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a \\ud83d b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: half a character .*\. Repair the row$"):
        load_dataset(config_of(tmp_path / "rows.jsonl"), tokenizer)


def test_a_source_that_is_not_there_is_named_by_its_setting(load: Load, tmp_path: Path) -> None:
    none = str(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"^data\.train: .*none\.jsonl: not found\. "):
        load([], data={"train": none})
    with pytest.raises(DataError, match=r"^evaluation\.file: .*none\.jsonl: not found\. "):
        load(alpaca_rows(3), evaluation={"file": none})


def test_a_fault_in_held_out_rows_names_them(load: Load, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"^evaluation: .*held\.jsonl line 1: has text; the format alpaca needs"):
        load(alpaca_rows(3), evaluation={"file": str(held)})


@pytest.mark.parametrize(
    ("rows", "data"),
    [
        (alpaca_rows(30), {}),
        ([{"q": f"Q{n}", "a": words(0, n)} for n in range(30)], {"format": "tests.my_rows:ask"}),
        ([{"q": f"Q{n}", "a": words(0, n)} for n in range(30)], {"template": {"prompt": "{q}", "completion": "{a}"}}),
    ],
    ids=["alpaca", "own function", "template"],
)
def test_two_workers_make_the_tokens_of_one(load: Load, rows: list[Any], data: dict[str, Any]) -> None:
    environment = os.environ
    alone, both = (load(rows, data={**data, "workers": count}).train.tokens for count in (1, 2))
    assert os.environ is environment
    for name in ("ids", "learn", "offsets", "rows"):
        assert np.array_equal(getattr(alone, name), getattr(both, name))
    assert alone.fate == both.fate


def test_the_held_out_share_is_disjoint_and_a_function_of_the_seed() -> None:
    rows = [Row(f"line {n}", {}) for n in range(100)]
    train, held = split_rows(rows, 0.25, seed=3)
    assert len(held) == 25
    assert sorted(train + held) == sorted(rows)
    assert split_rows(rows, 0.25, seed=3) == (train, held)
    assert split_rows(rows, 0.25, seed=4) != (train, held)
    assert train == [row for row in rows if row in train]


def test_a_thousand_leading_rows_with_nothing_to_learn_are_dropped_and_counted(load: Load) -> None:
    empty = [{"instruction": "Say nothing.", "output": ""}] * 1100
    tokens = load([*empty, {"instruction": "Say one.", "output": "one"}]).train.tokens
    assert len(tokens) == 1
    assert tokens.fate["dropped: nothing to learn"] == 1100
