"""generation_config.json: bases and merged models answer as their authors said, and end where training taught it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers

import job
from job.errors import ModelError
from tests.conftest import make_llama, make_tokenizer
from tests.test_merge import merged
from tests.tuned import IDS, LEGACY, tuned

ENDS = {
    "chatglm2": ["</s>"],
    "chatglm3": ["</s>", "<|user|>", "<|observation|>"],
    "qwen1": ["<|endoftext|>", "<|im_end|>"],
}
QWEN = {
    "chat_format": "chatml", "eos_token_id": 370, "pad_token_id": 370, "max_window_size": 6144, "max_new_tokens": 9,
    "do_sample": True, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.1, "_from_model_config": True,
}  # fmt: skip
"""As the authors of Qwen wrote it, with an id of this small vocabulary."""


def ends_of(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def ids(name: str) -> set[int]:
    tokenizer = job.load_base(str(LEGACY / name))[1]
    return set(tokenizer.convert_tokens_to_ids(ENDS[name]))


def answer(model: Any, token: int) -> list[int]:
    """What the model says if it is made to say this token."""
    out = model.generate(IDS, max_new_tokens=5, do_sample=False, sequence_bias=[[[token], 1e4]])
    said: list[int] = out[0, IDS.shape[1] :].tolist()
    return said


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "generation_config.json").read_text())
    return found


@pytest.mark.parametrize("name", ENDS)
def test_a_merged_model_ends_its_answers_where_training_taught_it(tmp_path: Path, name: str) -> None:
    tuned(LEGACY / name, tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert ends_of(model) == ids(name)
    for end in ids(name):
        assert answer(model, end) == [end]
    assert answer(model, 17) == [17] * 5


@pytest.mark.parametrize("name", ENDS)
def test_a_base_of_the_authors_ends_its_answers_there_too(name: str) -> None:
    model, _ = job.load_base(str(LEGACY / name))
    assert ends_of(model) == ids(name)
    for end in ids(name):
        assert answer(model, end) == [end]


def test_the_authors_settings_stay_as_far_as_transformers_has_them(tmp_path: Path) -> None:
    shutil.copytree(LEGACY / "qwen1", tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text(json.dumps(QWEN))
    tuned(tmp_path / "base", tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out")
    ends = sorted(ids("qwen1"))
    assert written(tmp_path / "out") == {
        "eos_token_id": ends, "pad_token_id": 370, "max_new_tokens": 9, "do_sample": True, "top_k": 0, "top_p": 0.8,
        "repetition_penalty": 1.1,
    }  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config
    ours = job.load_base(str(tmp_path / "base"))[0].generation_config
    for config in (theirs, ours):
        assert (config.eos_token_id, config.max_new_tokens, config.top_p, config.do_sample) == (ends, 9, 0.8, True)


def test_under_the_authors_names_their_file_is_as_it_was(tmp_path: Path) -> None:
    shutil.copytree(LEGACY / "qwen1", tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text(json.dumps(QWEN))
    tuned(tmp_path / "base", tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out", "original")
    assert written(tmp_path / "out") == QWEN


@pytest.mark.parametrize("settings", [None, {"eos_token_id": [2, 5], "temperature": 0.6, "do_sample": True}])
def test_a_base_answers_as_transformers_would_load_it(tmp_path: Path, settings: dict[str, Any] | None) -> None:
    make_llama(tmp_path)
    make_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if settings:
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    ours = job.load_base(str(tmp_path))[0].generation_config
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert ours.to_dict() == theirs.to_dict()


@pytest.mark.parametrize(
    ("content", "why"),
    [("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
     ("[2]", "no object with settings")],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path: Path, content: str, why: str) -> None:
    make_llama(tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ModelError) as refused:
        job.load_base(str(tmp_path))
    assert str(refused.value) == f"{tmp_path}/generation_config.json is damaged ({why}). Copy it again"
