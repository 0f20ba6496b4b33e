"""Tokenizers of ChatGLM2, ChatGLM3 and Qwen of 2023: text and special tokens become the ids of the authors' code."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import job
from job.chat import prompt_ids
from job.config.learning import Model
from job.config.running import Storage
from job.errors import ModelError
from job.pretrained import fetch
from job.tokenizer import Tokenizer
from tests.originals import MODELS, ORIGINALS, TALK, VECTORS, asked, encoded, ids_of, original


@pytest.mark.parametrize("name", MODELS)
def test_text_becomes_the_authors_ids_whatever_it_says(name: str) -> None:
    tokenizer, vectors = original(name), VECTORS[name]
    wanted = vectors["no_special_ids" if name == "qwen1" else "plain_ids"]
    assert [tokenizer.text(text, first=True) for text in vectors["strings"]] == wanted
    assert [tokenizer.decode(ids) for ids in wanted] == vectors["decode"]


@pytest.mark.parametrize(
    ("name", "wanted"), [("chatglm2", "plain_ids"), ("chatglm3", "plain_ids"), ("qwen1", "all_special_ids")]
)
def test_the_inner_tokenizer_reads_special_tokens_in_text_where_the_authors_does(name: str, wanted: str) -> None:
    inner, vectors = original(name).inner, VECTORS[name]
    assert inner(vectors["strings"], add_special_tokens=False)["input_ids"] == vectors[wanted]


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3"])
def test_every_text_begins_as_the_authors_does(name: str) -> None:
    inner, vectors = original(name).inner, VECTORS[name]
    found = [inner.encode(text) for text in vectors["strings"]]
    assert found == vectors["with_prefix_ids"]
    assert original(name).prefix == vectors["with_prefix_ids"][0]


@pytest.mark.parametrize("name", MODELS)
def test_special_tokens_have_the_authors_ids_and_only_in_markup(name: str) -> None:
    tokenizer, special = original(name), VECTORS[name]["special"]
    assert {token: tokenizer.markup(token) for token in special} == {token: [at] for token, at in special.items()}
    assert set(special) <= tokenizer.specials
    for token in special:
        assert not set(special.values()).intersection(tokenizer.text(f"a {token} b"))
    assert tokenizer.eos == VECTORS[name].get("eos", 370)
    assert tokenizer.inner.pad_token_id == VECTORS[name].get("pad")


def test_markup_of_qwen_is_read_as_the_authors_read_it() -> None:
    vectors = VECTORS["qwen1"]
    assert [original("qwen1").markup(text) for text in vectors["strings"]] == vectors["all_special_ids"]


def test_words_that_hold_a_special_token_s_letters_are_whole_in_markup_too() -> None:
    for name in ("chatglm2", "chatglm3"):
        text = "people like soprano operas and people"
        assert original(name).markup(text, first=True) == original(name).text(text, first=True)


@pytest.mark.parametrize("name", MODELS)
def test_the_saved_tokenizer_is_a_plain_fast_one_that_does_the_same(tmp_path: Path, name: str) -> None:
    original(name).save(str(tmp_path))
    assert not [file for file in tmp_path.iterdir() if file.suffix in (".py", ".model", ".tiktoken")]
    again, vectors = Tokenizer(str(tmp_path)), VECTORS[name]
    wanted = vectors["no_special_ids" if name == "qwen1" else "plain_ids"]
    assert [again.text(text, first=True) for text in vectors["strings"]] == wanted
    assert ids_of(encoded(again, TALK)) == ids_of(encoded(original(name), TALK))
    assert (again.prefix, again.specials, again.eos) == (
        original(name).prefix,
        original(name).specials,
        original(name).eos,
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_template_that_is_saved_for_other_programs_asks_the_same(tmp_path: Path, name: str) -> None:
    original(name).save(str(tmp_path))
    chat = VECTORS[name]["chats"][1]
    messages = [{"role": turn.role, "content": turn.content} for turn in asked(name, chat)[:-1]]
    inner = AutoTokenizer.from_pretrained(tmp_path)
    text = inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert inner(text, add_special_tokens=False).input_ids == chat["input_ids"]
    asking = inner.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert asking == chat["input_ids"] == prompt_ids(encoded(original(name), asked(name, chat)))


@pytest.mark.parametrize("name", MODELS)
def test_the_tokenizer_beside_a_loaded_base_asks_the_same(name: str) -> None:
    chat = VECTORS[name]["chats"][1]
    messages = [{"role": turn.role, "content": turn.content} for turn in asked(name, chat)[:-1]]
    inner = job.load_base(str(ORIGINALS / name))[1]
    asking = inner.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert asking == chat["input_ids"]


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_at_a_url_has_the_same_tokenizer(name: str) -> None:
    folder, _ = fetch(Model(name=f"file://{ORIGINALS / name}"), Storage())
    tokenizer = Tokenizer(folder)
    assert (
        prompt_ids(encoded(tokenizer, asked(name, VECTORS[name]["chats"][0]))) == VECTORS[name]["chats"][0]["input_ids"]
    )


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder for files that a test damages."""
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("code", "named", "chat"),
    [
        ('SPECIALS = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]', "chatglm3", "chatglm2"),
        ('SPECIALS = ["[sMASK]", "<|observation|>"]', "chatglm2", "chatglm3"),
        (None, "/mnt/ChatGLM3-6B-base", "chatglm3"),
        (None, "somebody/chatglm2-6b-medical", "chatglm2"),
    ],
)
def test_which_chatglm_it_is_shows_in_its_tokenizer_s_code_or_its_name(
    copied: Path, code: str | None, named: str, chat: str
) -> None:
    shutil.copytree(ORIGINALS / "chatglm3", copied)
    (copied / "config.json").write_text(json.dumps({"model_type": "chatglm", "_name_or_path": named}))
    if code:
        (copied / "tokenization_chatglm.py").write_text(f"raise SystemExit\n{code}\n")
    assert Tokenizer(str(copied)).family_chat == chat


@pytest.mark.parametrize("name", MODELS)
def test_the_model_s_type_tells_which_tokenizer_it_is_where_no_file_does(copied: Path, name: str) -> None:
    shutil.copytree(ORIGINALS / name, copied)
    (copied / "tokenizer_config.json").unlink()
    written = json.loads((copied / "config.json").read_text())
    written.pop("tokenizer_class", None)
    (copied / "config.json").write_text(json.dumps(written))
    assert Tokenizer(str(copied)).inner.get_vocab() == original(name).inner.get_vocab()


def test_a_folder_may_have_the_name_of_its_chatglm(tmp_path: Path) -> None:
    folder = tmp_path / "chatglm2-and-3" / "ChatGLM3-6b"
    shutil.copytree(ORIGINALS / "chatglm2", folder)
    (folder / "config.json").write_text('{"model_type": "chatglm"}')
    assert Tokenizer(str(folder)).family_chat == "chatglm3"


def test_the_first_chatglm_is_refused(copied: Path) -> None:
    shutil.copytree(ORIGINALS / "chatglm2", copied)
    (copied / "tokenizer.model").rename(copied / "ice_text.model")
    with pytest.raises(ModelError) as refused:
        Tokenizer(str(copied))
    assert str(refused.value) == (
        f"{copied} is the first ChatGLM-6B, whose architecture is not read. Use ChatGLM2-6B or ChatGLM3-6B"
    )


def test_a_chatglm_of_neither_kind_is_refused(copied: Path) -> None:
    shutil.copytree(ORIGINALS / "chatglm3", copied)
    (copied / "config.json").write_text("{}")
    (copied / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    with pytest.raises(ModelError) as refused:
        Tokenizer(str(copied))
    assert str(refused.value) == (
        f"{copied}: nothing says whether this is ChatGLM2 or ChatGLM3. "
        'Write "_name_or_path": "THUDM/chatglm3-6b" (or chatglm2-6b) into its config.json'
    )


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "chatglm2",
            "tokenizer.model",
            None,
            "{folder} has no tokenizer.model, which its tokenizer is made from. Copy it from where the model is from",
        ),
        (
            "qwen1",
            "qwen.tiktoken",
            None,
            "{folder} has no qwen.tiktoken, which its tokenizer is made from. Copy it from where the model is from",
        ),
        (
            "chatglm2",
            "tokenizer.model",
            b"version https://git-lfs.github.com/spec/v1\n",
            "{folder}/tokenizer.model is a git-lfs pointer. Run git lfs pull",
        ),
        (
            "qwen1",
            "qwen.tiktoken",
            b"version https://git-lfs.github.com/spec/v1\n",
            "{folder}/qwen.tiktoken is a git-lfs pointer. Run git lfs pull",
        ),
        ("chatglm2", "tokenizer.model", b"<html>", "{folder}/tokenizer.model is damaged. Copy the file again"),
        ("qwen1", "qwen.tiktoken", b"<html>", "{folder}/qwen.tiktoken is damaged. Copy the file again"),
        (
            "qwen1",
            "qwen.tiktoken",
            b"IQ== 0\n",
            "{folder}/qwen.tiktoken is damaged: ranks or single bytes are missing. Copy the file again",
        ),
        (
            "qwen1",
            "tokenizer_config.json",
            b"",
            "{folder}/tokenizer_config.json is damaged (Expecting value: line 1 column 1 (char 0)). Copy it again",
        ),
    ],
)
def test_files_that_are_missing_or_damaged_are_refused(
    copied: Path, name: str, file: str, content: bytes | None, message: str
) -> None:
    shutil.copytree(ORIGINALS / name, copied)
    (copied / file).unlink()
    if content is not None:
        (copied / file).write_bytes(content)
    with pytest.raises(ModelError) as refused:
        Tokenizer(str(copied))
    assert str(refused.value) == message.format(folder=copied)


def changed(content: bytes, old: bytes, new: bytes) -> bytes:
    assert content.count(old) == 1
    return content.replace(old, new)


@pytest.mark.parametrize(
    ("normalizer", "odd"),
    [
        (b"\x12\x01x\x18\x01\x20\x00", "a normalization"),
        (b"\x12\x00\x18\x00\x20\x00", "no space before the text"),
        (b"\x12\x00\x18\x01\x20\x01", "spaces removed"),
    ],
)
def test_a_sentencepiece_model_of_another_kind_is_refused(copied: Path, normalizer: bytes, odd: str) -> None:
    shutil.copytree(ORIGINALS / "chatglm2", copied)
    path = copied / "tokenizer.model"
    content, name = path.read_bytes(), b"\x0a\x08identity"
    own = name + b"\x12\x00\x18\x01\x20\x00"
    path.write_bytes(
        changed(content, bytes([0x1A, len(own)]) + own, bytes([0x1A, len(name + normalizer)]) + name + normalizer)
    )
    with pytest.raises(ModelError) as refused:
        Tokenizer(str(copied))
    assert str(refused.value) == f"{path} has {odd}, which is not read. Put a tokenizer.json beside it"


def test_glm_4_as_its_authors_laid_it_out_is_refused_with_the_layout_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm"}))
    auto = {"AutoTokenizer": ["tokenization_chatglm.ChatGLM4Tokenizer", None]}
    settings = {"tokenizer_class": "ChatGLM4Tokenizer", "auto_map": auto}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"no usable tokenizer \(.*\)\. Take the model in transformers' own layout"):
        Tokenizer(str(tmp_path))
