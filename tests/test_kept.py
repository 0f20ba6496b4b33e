"""Tokens that stay: the next start finds them, what would change them makes others, and no fault ends a run."""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from job import tokenizer as reader
from job import world
from job.config import RunConfig
from job.data import kept
from job.data.encode import Encoder, Tokens
from job.data.load import Dataset, load_dataset
from job.errors import DataError
from job.tokenizer import Tokenizer
from tests.conftest import alpaca_rows, losses, settings, write_rows
from tests.ranks import run_ranks
from tests.stores import KINDS, make_store

Load = Callable[..., Dataset]
RunFile = Callable[..., Path]


@pytest.fixture
def load(tiny_model: Path, tmp_path: Path) -> Load:
    """Reads 30 rows with these settings, and keeps tokens that were made; `said` hears what the writing says."""

    def loaded(
        data: Mapping[str, Any],
        said: list[str] | None = None,
        tokenizer: Tokenizer | None = None,
        rows: list[Any] | None = None,
        **sections: Mapping[str, Any],
    ) -> Dataset:
        file = write_rows(tmp_path / "rows.jsonl", rows or alpaca_rows(30))
        values = settings("owner/model", file, str(tmp_path / "out"), data=data, **sections)
        found = load_dataset(RunConfig.model_validate(values), tokenizer or Tokenizer(str(tiny_model)))
        heard: list[str] = [] if said is None else said
        writing = found.keep(heard.append)
        assert writing
        writing.join(30)
        assert not writing.is_alive()
        assert said is not None or not heard
        return found

    return loaded


def tokens(data: Dataset) -> Tokens:
    found: Tokens = data.train.tokens  # type: ignore[union-attr]
    return found


def there(data: Dataset) -> bool:
    return any(line.startswith("the tokens of ") for line in data.report())


def assert_equal(first: Tokens, second: Tokens) -> None:
    for name in ("ids", "learn", "offsets", "rows"):
        one, other = getattr(first, name), getattr(second, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)
    assert first.fate == second.fate


def save(inner: Any, model: Path, folder: Path) -> None:
    """A tokenizer, with what the model's folder says of the ends of answers, which decide tokens too."""
    inner.save_pretrained(folder)
    (folder / reader.GENERATION).write_bytes((model / reader.GENERATION).read_bytes())


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_start_finds_the_same_tokens(kind: str, load: Load, request: pytest.FixtureRequest) -> None:
    store = make_store(kind, request)
    storage = request.getfixturevalue("s3").storage if kind == "s3" else {}
    rows = [*alpaca_rows(30), {"instruction": "a", "output": ""}]  # one that is dropped
    fresh = load({"cache": None}, rows=rows)
    first, again = (load({"cache": store.url}, rows=rows, storage=storage, evaluation={"share": 0.2}) for _ in range(2))
    assert not there(fresh) and not there(first)
    assert again.report()[1:3] == [f"the tokens of {number} rows were there already" for number in (25, 6)]
    assert first.report()[1:] == again.report()[3:]
    assert len(store.names()) == 2
    assert_equal(tokens(first), tokens(again))
    whole = load({"cache": store.url}, rows=rows, storage=storage)
    assert_equal(tokens(whole), tokens(fresh))
    assert len(store.names()) == 3


@pytest.mark.parametrize(
    "data",
    [{"max_length": 24}, {"learn": "last"}, {"template": {"user": "Q {content}", "assistant": "A {content}"}}],
    ids=lambda data: next(iter(data)),
)
def test_settings_that_change_tokens_make_others(load: Load, tmp_path: Path, data: dict[str, Any]) -> None:
    cache = {"cache": str(tmp_path / "tokens")}
    load(cache)
    assert not there(load({**cache, **data}))
    assert there(load({**cache, **data}))
    assert there(load({**cache, "packing": False, "shuffle": False, "workers": 2}))


def test_another_row_tokenizer_or_program_makes_others(
    load: Load, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"cache": str(tmp_path / "tokens")}
    load(cache)
    assert not there(load(cache, rows=[*alpaca_rows(29), {"instruction": "other", "output": "row"}]))
    for change in ("template", "token", "part"):
        inner = transformers.AutoTokenizer.from_pretrained(tiny_model)
        if change == "part":  # of which templates are told; both tokens stay special
            inner.bos_token = inner.eos_token
        elif change == "template":
            inner.chat_template = inner.chat_template.replace("user", "person") + " "
        else:
            inner.add_tokens(["wholly"])
        save(inner, tiny_model, tmp_path / change)
        assert not there(load(cache, tokenizer=Tokenizer(str(tmp_path / change))))
    assert there(load(cache))
    monkeypatch.setattr(kept, "_program", lambda: "another version ")
    assert not there(load(cache))


def test_the_tokenizer_may_lie_elsewhere(load: Load, tiny_model: Path, tmp_path: Path) -> None:
    cache = {"cache": str(tmp_path / "tokens")}
    load(cache)
    save(transformers.AutoTokenizer.from_pretrained(tiny_model), tiny_model, tmp_path / "elsewhere")
    assert there(load(cache, tokenizer=Tokenizer(str(tmp_path / "elsewhere"))))


def test_what_a_program_of_the_users_makes_is_never_kept(load: Load, tmp_path: Path) -> None:
    rows = [{"q": f"Q{number}", "a": "yes"} for number in range(5)]
    for _ in range(2):
        data = load({"cache": str(tmp_path / "tokens"), "format": "tests.my_rows:ask"}, rows=rows)
        assert not there(data)
    assert not (tmp_path / "tokens").exists()


def test_a_place_of_no_known_kind_is_wrong_input(load: Load) -> None:
    with pytest.raises(DataError, match=r"^data\.cache: .*Protocol not known: foo\. Name a folder at a URL whose"):
        load({"cache": "foo://bucket/tokens"})


def test_a_closed_terminal_is_no_fault(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")

    class Closed(list[str]):
        def append(self, line: str) -> None:
            raise BrokenPipeError

    faults: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", faults.append)
    load({"cache": str(tmp_path / "file" / "tokens")}, Closed())
    assert faults == []


def test_few_rows_are_not_worth_a_file_of_the_run(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load({})
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(kept, "FROM_ROWS", 30)
    assert not there(load({}))
    assert there(load({}))
    assert len(list((tmp_path / "out" / "tokens").iterdir())) == 1


def test_a_damaged_file_is_said_and_made_anew(load: Load, tmp_path: Path) -> None:
    cache = {"cache": str(tmp_path / "tokens")}
    whole = tokens(load(cache))
    (file,) = (tmp_path / "tokens").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    for damaged in (bytes(content), bytes(content[: len(content) // 2]), b""):
        file.write_bytes(damaged)
        again = load(cache)
        assert f"{file} cannot be read (" in again.report()[1]
        assert again.report()[1].endswith("): the tokens are made anew")
        assert_equal(tokens(again), whole)
        assert there(load(cache))  # it was mended


def test_rows_that_cannot_be_used_leave_nothing(load: Load, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: has instruction"):
        load({"cache": str(tmp_path / "tokens")}, rows=[*alpaca_rows(1), {"instruction": "a"}])
    assert not (tmp_path / "tokens").exists()


def test_a_place_that_takes_nothing_costs_a_sentence(load: Load, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said: list[str] = []
    data = load({"cache": str(tmp_path / "file" / "tokens")}, said)
    assert len(tokens(data)) == 30
    assert len(said) == 1
    assert said[0].startswith(f"the tokens are not kept in {tmp_path}/file/tokens (")


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("max 100000", 6), ("250000 100000", 2), ("50000 100000", 1), ("990000 100000", 6), ("", 6)],
)
def test_cpus_are_those_of_the_container(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(world, "QUOTA", tmp_path / "cpu.max")
    assert world.cores() == 6
    world.QUOTA.write_text(quota)
    assert world.cores() == expected


def test_many_rows_get_processes(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("job.data.encode.ROWS_A_WORKER", 10)
    monkeypatch.setattr("job.data.encode.cores", lambda: 2)
    counts: list[int] = []
    count = Encoder._workers

    def counted(self: Encoder, rows: int) -> int:
        counts.append(count(self, rows))
        return counts[-1]

    monkeypatch.setattr(Encoder, "_workers", counted)
    alone, both = load({"workers": 1, "cache": None}), load({"cache": None})
    assert counts == [1, 2]
    assert_equal(tokens(alone), tokens(both))


def test_two_ranks_train_on_kept_tokens_alike(run_file: RunFile, tmp_path: Path) -> None:
    runs = []
    for name in ("fresh", "again"):
        config = run_file(name, data={"cache": str(tmp_path / "tokens")}, train={"micro_batch_size": 1})
        done = run_ranks(2, "train", config)
        assert [one.code for one in done] == [0, 0], done[0].err[-2000:]
        assert ("were there already" in done[0].err) == (name == "again")
        runs.append(losses(config.parent / "out" / name))
    assert runs[0] == runs[1]
