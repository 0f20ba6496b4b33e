"""What tutorials for these models get wrong between rows and labels, each shown to be right here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from job.chat import encode, prompt_ids
from job.config import parse_config
from job.data.batches import IGNORED, MicroBatch
from job.data.encode import Encoder
from job.data.load import load_dataset, make_encoder
from job.data.rows import Row
from job.errors import ModelError
from job.tokenizer import Tokenizer
from tests.conftest import settings, write_rows
from tests.originals import ORIGINALS, original


class Recipe(NamedTuple):
    """A tutorial's model and prompt, and rows with what they ask and answer."""

    model: str
    template: dict[str, str]
    rows: list[dict[str, str]]
    prompts: list[str]
    answers: list[str]


RECIPES = {
    "ChatGLM2 on Alpaca rows": Recipe(
        "chatglm2",
        {"prompt": "### 问题：\n{instruction}\n{input}\n\n### 回答：\n", "completion": "{output}"},
        [
            {
                "instruction": "请将以下翻译成英文。",
                "input": "你好，欢迎来到北京。",
                "output": "Hello, welcome to Beijing.",
            },
            {"instruction": "你好", "input": "", "output": "你好！"},
        ],
        [
            "### 问题：\n请将以下翻译成英文。\n你好，欢迎来到北京。\n\n### 回答：\n",
            "### 问题：\n你好\n\n\n### 回答：\n",
        ],
        ["Hello, welcome to Beijing.", "你好！"],
    ),
    "Qwen on instructions": Recipe(
        "qwen1",
        {"prompt": "### 指令\n{instruction}[[\n\n### 输入\n{input}]]\n\n### 回答\n", "completion": "{output}"},
        [
            {"instruction": "什么是机器学习？", "input": "一句话", "output": "人工智能的一个分支。"},
            {"instruction": "Why?", "input": "", "output": "So."},
        ],
        ["### 指令\n什么是机器学习？\n\n### 输入\n一句话\n\n### 回答\n", "### 指令\nWhy?\n\n### 回答\n"],
        ["人工智能的一个分支。", "So."],
    ),
    "ChatGLM3 on AdvertiseGen": Recipe(
        "chatglm3",
        {"prompt": "用户: {content}\n广告: ", "completion": "{summary}"},
        [
            {"content": "类型#裤*版型#宽松", "summary": "宽松的阔腿裤，显瘦又百搭。"},
            {"content": "类型#裙", "summary": "裙"},
        ],
        ["用户: 类型#裤*版型#宽松\n广告: ", "用户: 类型#裙\n广告: "],
        ["宽松的阔腿裤，显瘦又百搭。", "裙"],
    ),
}
TUTORIALS = pytest.mark.parametrize("name", RECIPES)
Made = Callable[[str], tuple[Tokenizer, MicroBatch]]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """The rows of a recipe as one micro-batch, a sequence each."""

    def batch(name: str) -> tuple[Tokenizer, MicroBatch]:
        recipe, tokenizer = RECIPES[name], original(RECIPES[name].model)
        rows = write_rows(tmp_path / "rows.jsonl", recipe.rows)
        data = {"template": recipe.template, "max_length": 512, "packing": False, "shuffle": False}
        config = parse_config(json.dumps(settings("m", rows, "o", data=data)))
        batches = load_dataset(config, tokenizer).train
        (found,) = batches.share(next(batches.from_step(0)), 0, 1, len(recipe.rows))
        return tokenizer, found

    return batch


def encoder_of(name: str) -> tuple[Encoder, list[Row]]:
    recipe = RECIPES[name]
    rows = [Row(f"rows.jsonl line {number}", dict(row)) for number, row in enumerate(recipe.rows, 1)]
    config = parse_config(json.dumps(settings("m", "rows.jsonl", "o", data={"template": recipe.template})))
    return make_encoder(config, original(recipe.model), rows[0]), rows


@TUTORIALS
def test_labels_are_the_next_tokens_of_the_same_sequence(made: Made, name: str) -> None:
    _, batch = made(name)
    learnt = batch.targets[:, :-1] != IGNORED
    assert (batch.targets[:, :-1] == batch.ids[:, 1:])[learnt].all() and learnt.any()
    assert (batch.targets[:, -1] == IGNORED).all()


@TUTORIALS
def test_the_loss_is_taken_over_the_answer_and_its_end_and_not_over_the_prompt(made: Made, name: str) -> None:
    tokenizer, batch = made(name)
    eos = str(tokenizer.inner.eos_token)
    for targets, answer in zip(batch.targets, RECIPES[name].answers, strict=True):
        learnt = targets[targets != IGNORED]
        assert learnt[-1] == tokenizer.eos
        assert tokenizer.decode(learnt.tolist()) == answer + eos


@TUTORIALS
def test_the_prompt_holds_all_that_a_row_gives(made: Made, name: str) -> None:
    tokenizer, batch = made(name)
    for ids, targets, prompt in zip(batch.ids, batch.targets, RECIPES[name].prompts, strict=True):
        asked = ids[: int(np.argmax(targets != IGNORED)) + 1].tolist()
        assert asked[: len(tokenizer.prefix)] == tokenizer.prefix
        assert tokenizer.decode(asked[len(tokenizer.prefix) :]) == prompt


def test_the_input_of_a_row_without_a_template_is_asked_too() -> None:
    config = parse_config(json.dumps(settings("m", "rows.jsonl", "o")))
    row = Row("rows.jsonl line 1", dict(RECIPES["ChatGLM2 on Alpaca rows"].rows[0]))
    encoder = make_encoder(config, original("qwen1"), row)
    (parts,), _ = encoder.encode(row)
    assert "请将以下翻译成英文。\n你好，欢迎来到北京。<|im_end|>" in encoder.tokenizer.decode(prompt_ids(parts))


@TUTORIALS
def test_rows_are_padded_to_the_longest_beside_them_and_padding_is_not_learnt(made: Made, name: str) -> None:
    tokenizer, batch = made(name)
    padding = batch.rows < 0
    longest = max(int((~row).sum()) for row in padding)
    assert batch.ids.shape == (2, longest) and longest < 100
    assert padding.any() and (batch.targets[padding] == IGNORED).all()
    answers = [tokenizer.text(answer) for answer in RECIPES[name].answers]
    assert (batch.targets != IGNORED).sum() == sum(len(answer) + 1 for answer in answers)


@TUTORIALS
def test_an_end_is_learnt_where_the_pad_token_is_the_eos_token(made: Made, name: str) -> None:
    tokenizer, batch = made(name)
    pad = tokenizer.inner.pad_token
    try:
        tokenizer.inner.pad_token = tokenizer.inner.eos_token
        again = made(name)[1]
    finally:
        tokenizer.inner.pad_token = pad
    assert (again.ids == batch.ids).all() and (again.targets == batch.targets).all()
    assert ((batch.targets == tokenizer.eos).sum(axis=1) == 1).all()


@TUTORIALS
def test_a_model_is_asked_exactly_as_it_was_trained(made: Made, name: str) -> None:
    tokenizer, batch = made(name)
    encoder, rows = encoder_of(name)
    for ids, targets, row in zip(batch.ids, batch.targets, rows, strict=True):
        trained = ids[: int(np.argmax(targets != IGNORED)) + 1].tolist()
        (parts,), _ = encoder.encode(row)
        assert prompt_ids(parts) == trained
    question = encoder.kind.ask(next(iter(rows[-1].fields.values())))
    assert prompt_ids(encode(question, tokenizer, encoder.chat)) == trained


@pytest.mark.parametrize("known", [True, False])
def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path: Path, known: bool) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nclass OwnTokenizer: pass\nclass QWenTokenizer: pass\n"
    settings: dict[str, Any] = json.loads((ORIGINALS / "qwen1/tokenizer_config.json").read_text())
    if not known:
        settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "qwen"}')
    (tmp_path / "qwen.tiktoken").write_bytes((ORIGINALS / "qwen1/qwen.tiktoken").read_bytes())
    for name in ("own.py", "tokenization_qwen.py"):
        (tmp_path / name).write_text(code)
    if known:
        assert Tokenizer(str(tmp_path)).text("Hello") == original("qwen1").text("Hello")
    else:
        with pytest.raises(ModelError, match=r"no usable tokenizer \(.*\)\. Copy tokenizer\.json next to it"):
            Tokenizer(str(tmp_path))
    assert not ran.exists()
