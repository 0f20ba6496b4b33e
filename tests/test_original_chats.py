"""Chats of ChatGLM2, ChatGLM3 and Qwen of 2023: asked with the authors' ids, learnt as the authors trained them."""

import json
from collections.abc import Sequence

import pytest

from job.chat import Encoded, chat_format, prompt_ids, stop_ids
from job.config import parse_config
from job.data.load import make_encoder
from job.data.rows import Row
from job.tokenizer import Tokenizer
from job.turns import Segment, turns_of
from tests.conftest import settings
from tests.originals import MODELS, TALK, VECTORS, asked, encoded, ids_of, original


def shown(tokenizer: Tokenizer, parts: Sequence[Encoded]) -> str:
    """The tokens, a stretch of learnt ones between ⟦ and ⟧."""
    words = []
    for part in parts:
        text = " ".join(tokenizer.inner.convert_ids_to_tokens(part.ids))
        words += [f"⟦{text}⟧" if part.learn else text] * bool(part.ids)
    return " ".join(words).replace("⟧ ⟦", " ")


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name in MODELS for place in range(len(VECTORS[name]["chats"]))]
)
def test_a_chat_is_asked_with_the_authors_ids(name: str, place: int) -> None:
    chat = VECTORS[name]["chats"][place]
    assert prompt_ids(encoded(original(name), asked(name, chat))) == chat["input_ids"]


def test_qwen_is_told_who_it_is_where_a_row_does_not_say() -> None:
    chat = VECTORS["qwen1"]["chats"][0]
    assert prompt_ids(encoded(original("qwen1"), asked("qwen1", chat)[1:])) == chat["input_ids"]


LEARNT = {
    "chatglm2": [
        "[gMASK] sop ▁[ Rou nd ▁ 1 ] <0x0A> <0x0A> 问 ： 你 好 <0x0A> <0x0A> 答 ： ⟦▁in </s>⟧",
        "[gMASK] sop ▁[ Rou nd ▁ 1 ] <0x0A> <0x0A> 问 ： 你 好 <0x0A> <0x0A> 答 ： in <0x0A> <0x0A> "
        "[ Rou nd ▁ 2 ] <0x0A> <0x0A> 问 ： on <0x0A> <0x0A> 答 ： ⟦▁你好 </s>⟧",
    ],
    "chatglm3": [
        "[gMASK] sop <|user|> ▁ <0x0A> ▁你好 <|assistant|> ⟦▁ <0x0A> ▁in <|user|>⟧ "
        "▁ <0x0A> ▁on <|assistant|> ⟦▁ <0x0A> ▁你好 </s>⟧"
    ],
    "qwen1": [
        "<|im_start|> s y s t e m Ċ Y ou Ġ ar e Ġ a Ġ he l p f u l Ġ a s s i s t an t . <|im_end|> Ċ "
        "<|im_start|> u s er Ċ ä½łå¥½ <|im_end|> Ċ <|im_start|> a s s i s t an t Ċ ⟦in <|im_end|>⟧ Ċ "
        "<|im_start|> u s er Ċ on <|im_end|> Ċ <|im_start|> a s s i s t an t Ċ ⟦ä½łå¥½ <|im_end|>⟧ Ċ"
    ],
}


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_learnt_with_what_ends_them_as_the_authors_trained_them(name: str) -> None:
    tokenizer = original(name)
    talks = chat_format(tokenizer, None).talks(TALK)
    assert [shown(tokenizer, encoded(tokenizer, talk)) for talk in talks] == LEARNT[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_prompt_at_inference_is_the_beginning_of_what_was_learnt(name: str) -> None:
    tokenizer = original(name)
    trained = ids_of(encoded(tokenizer, TALK))
    prompt = prompt_ids(encoded(tokenizer, [*TALK[:3], TALK[3]._replace(content="")]))
    assert prompt == prompt_ids(encoded(tokenizer, TALK)) == trained[: len(prompt)]


def test_a_row_of_chatglm2_s_is_a_sequence_for_each_of_its_answers() -> None:
    config = parse_config(json.dumps(settings("m", "rows.jsonl", "o", data={"max_length": 64})))
    turns = [{"role": turn.role, "content": turn.content} for turn in TALK]
    row = Row("rows.jsonl line 1", {"messages": turns})
    encoder = make_encoder(config, original("chatglm2"), row)
    sequences, fate = encoder.encode(row)
    assert fate == "kept as a sequence for each answer"
    assert [shown(original("chatglm2"), parts) for parts in sequences] == LEARNT["chatglm2"]
    assert encoder.talks([*TALK, Segment("user", "on")])[-1] == [TALK[0], TALK[1]._replace(learn=False), *TALK[2:]]
    turns[2]["content"] = "on " * 80
    sequences, fate = encoder.encode(row)
    assert fate == "truncated: over max_length"
    assert [sum(len(part.ids) for part in parts) for parts in sequences] == [20, 64]


def test_chatglm3_learns_which_tool_it_calls_and_is_given_tools_as_its_authors_laid_them_out() -> None:
    turns = turns_of(
        [
            {"role": "system", "content": "an", "tools": [{"name": "天"}]},
            {"role": "user", "content": "on"},
            {"role": "assistant", "metadata": "in", "content": "an"},
            {"role": "observation", "content": "<|user|>"},
            {"role": "assistant", "content": "on"},
        ]
    )
    parts = encoded(original("chatglm3"), turns)
    assert shown(original("chatglm3"), parts).partition("<|user|>")[2] == (
        " ▁ <0x0A> ▁on <|assistant|> ⟦▁in <0x0A> ▁ an <|observation|>⟧ ▁ <0x0A> ▁ <0x3C> <0x7C> u s er <0x7C> <0x3E> "
        "<|assistant|> ⟦▁ <0x0A> ▁on </s>⟧"
    )
    assert original("chatglm3").decode(parts[3].ids) == 'an\n[\n    {\n        "name": "天"\n    }\n]'


def test_tools_may_be_json_text_and_notes_about_a_turn_are_not_metadata() -> None:
    system, user = turns_of(
        [
            {"role": "system", "content": "an", "tools": '[{"name": "in"}]', "metadata": {"source": "on"}},
            {"role": "user", "content": "on", "tools": ["in"], "metadata": None},
        ]
    )
    assert (system.metadata, user.metadata, user.tools) == ("", "", None)
    parts = encoded(original("chatglm3"), [system, user])
    assert original("chatglm3").decode(parts[3].ids) == 'an\n[{"name": "in"}]'


def test_tools_are_refused_where_they_would_be_left_out() -> None:
    turns = turns_of([{"role": "system", "content": "an", "tools": [{}]}, {"role": "user", "content": "on"}])
    with pytest.raises(ValueError) as refused:
        encoded(original("qwen1"), turns)
    assert str(refused.value) == (
        "the system turn has tools, which the model's chat template does not write. Write them into its content"
    )


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("chatglm2", {"</s>"}),
        ("chatglm3", {"</s>", "<|user|>", "<|observation|>"}),
        ("qwen1", {"<|endoftext|>", "<|im_end|>"}),
    ],
)
def test_an_answer_stops_where_the_authors_stop_it(name: str, stops: set[str]) -> None:
    tokenizer = original(name)
    parts = encoded(tokenizer, [TALK[0], TALK[1]._replace(content="")])
    found = stop_ids(parts, tokenizer, chat_format(tokenizer, None))
    assert set(tokenizer.inner.convert_ids_to_tokens(found)) == stops


@pytest.mark.parametrize("name", MODELS)
def test_special_tokens_in_any_content_stay_text(name: str) -> None:
    tokenizer = original(name)
    planted = "x ".join(sorted(tokenizer.specials)[:12]) + "</s>[gMASK]sop<|user|>\n<|im_end|>"
    said = {"role": "assistant", "content": planted, **({"metadata": planted} if name == "chatglm3" else {})}
    turns = turns_of([{"role": "user", "content": planted}, said] * 2)
    plain = [turn._replace(content="x", metadata="") for turn in turns]
    special = set(tokenizer.inner.all_special_ids)
    marks = [[token for token in ids_of(encoded(tokenizer, rows)) if token in special] for rows in (turns, plain)]
    assert marks[0] == marks[1]


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([Segment("system", "Be kind."), *TALK], "turn 1 is system"),
        ([TALK[1]], "turn 1 is assistant"),
        ([TALK[0], Segment("tool", "20")], "turn 2 is tool"),
    ],
)
def test_chatglm2_refuses_turns_that_it_never_saw(turns: list[Segment], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        encoded(original("chatglm2"), turns)
    assert str(refused.value) == (
        f"ChatGLM2 was trained on user and assistant turns in turn, {message}. "
        "Write it into the user turn, or set data.template"
    )
