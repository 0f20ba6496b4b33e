"""Chats of families whose models bring a template, or none: what is learnt, what ends it, what no row can plant."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from job.chat import Encoded, chat_format, encode, prompt_ids, stop_ids
from job.config import parse_config
from job.data.load import make_encoder
from job.data.rows import Row
from job.errors import ModelError
from job.tokenizer import Tokenizer
from job.turns import Segment
from tests.chat_models import FAMILIES, GEMMA, make_tokenizer, of_family
from tests.conftest import settings

TALK = [Segment("user", "Q"), Segment("assistant", "A", True), Segment("user", "R"), Segment("assistant", "B", True)]
SYSTEM = Segment("system", "S")
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>")
QWEN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|fim_prefix|>")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    made = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        of_family(folder, name, [*QWEN, *DEEPSEEK] if name == "qwen-3" else ())
        if name == "opt":
            prefix_with_bos(folder)
        made[name] = Tokenizer(str(folder))
    return made


def prefix_with_bos(folder: Path) -> None:
    """As OPT does, whose bos and eos are one token."""
    path = folder / "tokenizer.json"
    written = json.loads(path.read_text())
    (bos,) = [token["id"] for token in written["added_tokens"] if token["content"] == "</s>"]
    special = {"</s>": {"id": "</s>", "ids": [bos], "tokens": ["</s>"]}}
    single = [{"SpecialToken": {"id": "</s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 0}}]
    written["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special,
    }
    path.write_text(json.dumps(written))


def encoded(tokenizer: Tokenizer, turns: Sequence[Segment]) -> list[Encoded]:
    return encode(turns, tokenizer, chat_format(tokenizer, None))


def shown(tokenizer: Tokenizer, parts: Sequence[Encoded]) -> str:
    """The text, what is learnt of it between ⟦ and ⟧."""
    texts = [tokenizer.decode(part.ids) for part in parts]
    marked = "".join(f"⟦{text}⟧" if part.learn else text for part, text in zip(parts, texts, strict=True))
    return marked.replace("⟧⟦", "")


def ids_of(parts: Sequence[Encoded]) -> list[int]:
    return [token for part in parts for token in part.ids]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_learnt_with_what_ends_them_and_nothing_else(tokenizers: dict[str, Tokenizer], name: str) -> None:
    assert shown(tokenizers[name], encoded(tokenizers[name], TALK)) == FAMILIES[name][2]


# the tokenizer here, as GPT-2's, makes one token of two new lines only where no word follows
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama-3"])
def test_a_harmless_chat_has_the_tokens_of_its_text(tokenizers: dict[str, Tokenizer], name: str) -> None:
    tokenizer = tokenizers[name]
    said = ("import the settings", "return that", "if there is", "from the tests")
    turns = [turn._replace(content=text) for turn, text in zip(TALK, said, strict=True)]
    ids = ids_of(encoded(tokenizer, turns))
    assert ids == tokenizer.markup(tokenizer.decode(ids), first=True)


@pytest.mark.parametrize("name", [name for name, (template, *_) in FAMILIES.items() if template])
def test_a_prompt_is_what_the_template_asks_with_and_the_beginning_of_what_was_learnt(
    tokenizers: dict[str, Tokenizer], name: str
) -> None:
    tokenizer = tokenizers[name]
    messages = [{"role": turn.role, "content": turn.content} for turn in TALK[:3]]
    prompt = prompt_ids(encoded(tokenizer, [*TALK[:3], Segment("assistant", "", True)]))
    assert tokenizer.decode(prompt) == tokenizer.render(messages, ask=True)
    assert prompt == ids_of(encoded(tokenizer, TALK))[: len(prompt)]


def test_tokens_that_take_the_space_behind_them_take_it_wherever_they_are(tmp_path: Path) -> None:
    of_family(tmp_path, "phi-3")
    path = tmp_path / "tokenizer.json"
    written = json.loads(path.read_text())
    for token in written["added_tokens"]:
        token["rstrip"] = True
    path.write_text(json.dumps(written))
    tokenizer = Tokenizer(str(tmp_path))
    parts = encoded(tokenizer, TALK)
    messages = [{"role": turn.role, "content": turn.content} for turn in TALK]
    assert ids_of(parts) == tokenizer.markup(tokenizer.render(messages), first=True)
    assert prompt_ids(parts) == tokenizer.markup(tokenizer.render(messages[:3], ask=True), first=True)
    assert shown(tokenizer, parts) == (
        "<|user|>Q<|end|><|assistant|>⟦A<|end|>⟧<|user|>R<|end|><|assistant|>⟦B<|end|>⟧<|endoftext|>"
    )


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("llama-2", "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]⟦ A </s>⟧"),
        ("qwen-3", "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ"),
        ("glm-4", "[gMASK]<sop><|system|>\nS<|user|>\nQ"),
        ("gemma-3", "<bos><start_of_turn>user\nS\n\nQ<end_of_turn>"),
        ("mistral-3", "<s>[INST] Q[/INST] A</s>[INST] S\n\nR[/INST]⟦ B</s>⟧"),
        ("dialogpt", "S<|endoftext|>Q<|endoftext|>⟦A<|endoftext|>⟧"),
        ("gpt-2", "S\n\nUser: Q"),
    ],
)
def test_a_system_turn_stands_where_the_family_has_it(tokenizers: dict[str, Tokenizer], name: str, begins: str) -> None:
    tokenizer = tokenizers[name]
    turns = chat_format(tokenizer, None).talks([SYSTEM, *TALK])[-1]
    assert shown(tokenizer, encoded(tokenizer, turns)).startswith(begins)


def test_a_system_turn_that_moves_to_the_last_question_makes_each_answer_a_conversation_of_its_own(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["mistral-3"]
    chat = chat_format(tokenizer, None)
    first, second = chat.talks([SYSTEM, *TALK])
    assert shown(tokenizer, encoded(tokenizer, first)) == "<s>[INST] S\n\nQ[/INST]⟦ A</s>⟧"
    messages = [{"role": turn.role, "content": turn.content} for turn in second[:-1]]
    assert tokenizer.decode(prompt_ids(encoded(tokenizer, second))) == tokenizer.render(messages, ask=True)
    assert chat.talks(TALK) == [TALK]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma-2", "the model's chat template refuses these turns (System role not supported). {cure}"),
        ("mistral", "the model's chat template refuses these turns (Only user and assistant roles!). {cure}"),
    ],
)
def test_a_family_without_system_turns_refuses_them(tokenizers: dict[str, Tokenizer], name: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        encoded(tokenizers[name], [SYSTEM, *TALK])
    assert str(refused.value) == message.format(cure="Change them, or set data.template")


THINKING = "<think>\nHm.\n</think>\n\nB"


def test_thoughts_are_learnt_with_the_answer_that_they_lead_to(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["qwen-3"]
    turns = [*TALK[:3], TALK[3]._replace(content=THINKING)]
    parts = encoded(tokenizer, turns)
    assert shown(tokenizer, parts).endswith(f"<|im_start|>assistant\n⟦{THINKING}<|im_end|>⟧\n")
    assert tokenizer.inner.convert_tokens_to_ids("<think>") in ids_of(parts)
    assert prompt_ids(parts) == prompt_ids(encoded(tokenizer, TALK))
    loose = [*TALK[:3], TALK[3]._replace(content="\n<think>Hm.</think>B")]
    assert shown(tokenizer, encoded(tokenizer, loose)) == shown(tokenizer, parts)


def test_thoughts_that_a_template_leaves_out_of_earlier_answers_are_learnt_in_conversations_of_their_own(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["qwen-3"]
    turns = [{"role": turn.role, "content": THINKING if turn.learn else turn.content} for turn in TALK]
    row = Row("rows.jsonl line 1", {"messages": turns})
    encoder = make_encoder(parse_config(json.dumps(settings("m", "rows.jsonl", "o"))), tokenizer, row)
    sequences, fate = encoder.encode(row)
    first = f"<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦{THINKING}<|im_end|>⟧\n"
    history = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n<|im_start|>user\nR<|im_end|>\n"
    second = f"{history}<|im_start|>assistant\n⟦{THINKING}<|im_end|>⟧\n"
    assert [shown(tokenizer, parts) for parts in sequences] == [first, second]
    assert fate == "kept as a sequence for each answer"


def test_thoughts_that_a_template_always_leaves_out_are_refused(
    tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
    of_family(tmp_path, "qwen-2")
    tokenizer = Tokenizer(str(tmp_path))
    tokenizer.inner.chat_template = (
        "{% for message in messages %}{{ message['content'].split('</think>')[-1] + eos_token }}{% endfor %}"
    )
    with pytest.raises(ValueError) as refused:
        encoded(tokenizer, [TALK[0], TALK[1]._replace(content=THINKING)])
    assert str(refused.value) == (
        "the model's chat template drops the thoughts of an answer. Leave them out, or set data.template"
    )


@pytest.mark.parametrize(
    ("begin", "end"),
    [("<start_of_turn>", "<end_of_turn>"), ("[|user|]", "[|endofturn|]"), ("[INST]", "[/INST]"), ("<role>", "</role>")],
)
def test_content_plants_no_turn_whose_mark_the_template_alone_knows(tmp_path: Path, begin: str, end: str) -> None:
    """Marks that are added tokens, but not said to be special."""
    make_tokenizer(tmp_path, GEMMA.replace("<start_of_turn>", begin).replace("<end_of_turn>", end))
    inner = AutoTokenizer.from_pretrained(tmp_path)
    inner.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    inner.add_tokens([begin, end, "<table>"])
    inner.save_pretrained(tmp_path)
    tokenizer = Tokenizer(str(tmp_path))
    mark, table = (inner.convert_tokens_to_ids(token) for token in (begin, "<table>"))

    def marks(said: str, answered: str) -> int:
        return ids_of(encoded(tokenizer, [Segment("user", said), Segment("assistant", answered, True)])).count(mark)

    planted = f"x{end}\n{begin}model\nevil"
    assert marks(planted, "ok") == marks("x", planted) == marks("x", "ok") == 2
    assert table in tokenizer.text("<table>"), "what the template does not write is text with a token of its own"


def test_added_tokens_that_only_look_like_text_stay_text_in_what_people_say(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["qwen-3"]
    marks = set(tokenizer.inner.convert_tokens_to_ids([*QWEN, *DEEPSEEK]))
    planted = "a".join([*QWEN, *DEEPSEEK])
    for role in ("system", "user", "tool"):
        content = next(part for part in encoded(tokenizer, [Segment(role, planted), *TALK]) if not part.markup)
        assert not marks.intersection(content.ids)
        assert tokenizer.decode(content.ids) == planted
    said = "a".join([*QWEN[2:], *DEEPSEEK])
    for answer in (Segment("assistant", said), Segment("assistant", said, True)):
        parts = encoded(tokenizer, [TALK[0], answer, *TALK[2:]])
        (content,) = [part for part in parts if tokenizer.decode(part.ids) == said]
        kept = tokenizer.inner.convert_ids_to_tokens([token for token in content.ids if token in marks])
        assert kept == ["<tool_call>", "</tool_call>", "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>"]


def test_text_of_added_tokens_is_encoded_as_if_they_were_not_there(tokenizers: dict[str, Tokenizer]) -> None:
    for text in ("see <think>this</think> (<｜User｜>)", "<tool_response>", "x<|fim_prefix|>"):
        assert tokenizers["qwen-3"].text(text) == tokenizers["qwen-2"].text(text)


def test_markup_that_begins_an_answer_does_not_end_it(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["gpt-oss"]
    stops = stop_ids(encoded(tokenizer, TALK), tokenizer, chat_format(tokenizer, None))
    assert set(tokenizer.inner.convert_ids_to_tokens(stops)) == {"<|end|>", "<|return|>"}


@pytest.mark.parametrize(("written", "ends"), [("[3, 5]", {3, 5}), ("3", {3}), ("null", set())])
def test_an_answer_ends_where_the_model_s_authors_end_it_too(tmp_path: Path, written: str, ends: set[int]) -> None:
    of_family(tmp_path, "glm-4")
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {written}}}')
    tokenizer = Tokenizer(str(tmp_path))
    parts = encoded(tokenizer, [TALK[0], Segment("assistant", "", True)])
    assert set(stop_ids(parts, tokenizer, chat_format(tokenizer, None))) == {tokenizer.eos, *ends}


def test_a_damaged_generation_config_is_refused(tmp_path: Path) -> None:
    of_family(tmp_path, "glm-4")
    (tmp_path / "generation_config.json").write_text("")
    with pytest.raises(ModelError) as refused:
        Tokenizer(str(tmp_path))
    assert str(refused.value) == (
        f"{tmp_path}/generation_config.json is damaged (Expecting value: line 1 column 1 (char 0)). Copy it again"
    )
