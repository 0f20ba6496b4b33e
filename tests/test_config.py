"""The run file as people write it: read as meant, refused in one message, frozen, explained, never with secrets."""

import json
import os
from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from job.config import RunConfig, changes, fields, load_config, load_dotenv_file, parse_config
from job.config.explain import explain, schema
from job.errors import ConfigError
from tests.conftest import REPOSITORY

LEAST = "model: {name: owner/model}\ndata: {train: rows.jsonl}\noutput: {url: runs/first}\n"
TEXT = "input should be a valid string"
KEYS = [f"{section}.{name}" for section, name, _ in fields()]


def minimal(*overrides: str) -> RunConfig:
    return parse_config(LEAST, overrides)


def faults(*overrides: str, text: str = LEAST) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as refused:
        parse_config(text, overrides)
    return refused.value.faults


def test_all_faults_come_in_one_message() -> None:
    text = LEAST + "lora: {rnak: 8, dropout: 2}\ntrain: {global_batch_size: 100, micro_batch_size: 16}\n"
    with pytest.raises(ConfigError) as refused:
        parse_config(text, ["quantization.type=nf5", "epochs=3"], source="configs/a.yaml")
    assert str(refused.value).splitlines() == [
        "5 problems in configs/a.yaml",
        "  epochs=3: is no setting. Write section.key=value, such as train.max_steps=20",
        "  quantization.type: 'nf5' is wrong: input should be 'nf4', 'fp4', 'int8' or 'none'",
        "  lora.dropout: 2 is wrong: input should be less than 1",
        '  lora.rnak: unknown name. Did you mean "rank"? Valid: alpha, bias, dora, dropout, rank, rslora, share_a, '
        "targets.",
        "  train.global_batch_size: 100 is not a multiple of micro_batch_size 16. Try 96 or 112",
    ]
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no mapping of sections such as model, data, output"),
        ("- model", "is no mapping of sections such as model, data, output"),
        (LEAST + "lora: 5\n", "lora: 5 is no section. Write its settings beneath it, indented"),
        (LEAST + "1: 2\n", "1: 1 is wrong: keys should be strings"),
        (
            LEAST + "lroa: {rank: 8}\n",
            'lroa: unknown name. Did you mean "lora"? Valid: checkpoint, data, evaluation, generation, lora, model, '
            "output, parallel, quantization, storage, tracking, train.",
        ),
        (LEAST + "lora:\n  rank: 8\n  rank: 16\n", "is no valid YAML: rank is given twice in"),
        (LEAST + "lora: {{rank}}\n", "is no valid YAML: a name is no plain text in"),
        (LEAST + "lora: {rank: [\n", "is no valid YAML: while parsing"),
        ("data: {train: x}\noutput: {url: y}", "model: is required. Write model: {name: owner/name or a folder}."),
        ("model: {name: x}\ndata: {}\noutput: {url: y}", "data.train: is required. Write data: {train: rows.jsonl}."),
        ("model: {name: x}\ndata: {train: x}\noutput:", "output: is required. Write output: {url: runs/first}."),
        (
            LEAST + "evaluation: {file: a.jsonl, share: 0.1}\n",
            "evaluation.file and evaluation.share are both set. Keep one of them",
        ),
        (
            LEAST + "evaluation: {patience: 2}\n",
            "evaluation: keep_best and patience need held-out rows. Set evaluation.file or evaluation.share",
        ),
        (
            LEAST + "evaluation: {share: 0.1, keep_best: true}\n",
            "evaluation: keep_best chooses among evaluations on the way. Set evaluation.every_steps",
        ),
        (
            "model: {name: x}\noutput: {url: y}\ndata: {train: x, format: template, template: {user: '{content}', "
            "assistant: '{content}'}}",
            "data.format: template needs data.template with prompt and completion",
        ),
        (LEAST + "lora: {targets: 7}\n", "lora.targets: 7 is wrong: input should be 'all' or a valid list"),
        ("model: {name: x}\noutput: {url: y}\ndata: {train: [a, 5]}", f"data.train: 5 is wrong: {TEXT}"),
    ],
)
def test_a_broken_run_file_gets_one_clear_fault(text: str, message: str) -> None:
    (fault,) = faults(text=text)
    assert fault == message or (message.startswith("is no valid YAML") and fault.startswith(message))


ROLES = (
    "has assistant, user. Give prompt and completion, or user and assistant (and system), each with {content} in it "
    "once and no other field"
)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"prompt": "{q} {my-q}", "completion": "{a}"}, "prompt has {my-q}, {NO}Write {{my-q}} for {THEMSELVES}"),
        ({"prompt": "{q}", "completion": '{"a": "{a}"}'}, "completion has {, {NO}Write {{ for {THEMSELVES}"),
        ({"prompt": "{q}", "completion": "{a}}"}, "completion has }, {NO}Write }} for {THEMSELVES}"),
        ({"prompt": "{q}{}", "completion": "{a}"}, "prompt has {}, {NO}Write {{}} for {THEMSELVES}"),
        ({"user": "{content}", "assistant": "{ content }"}, "assistant has { content }, {NO}Write {{ content }} for "),
        ({"user": "{content} {content}", "assistant": "{content}"}, ROLES),
        ({"user": "{content} {name}", "assistant": "{content}"}, ROLES),
        ({"user": "{{content}}", "assistant": "{content}"}, ROLES),
    ],
)
def test_braces_in_a_template_that_mean_nothing_are_refused(template: dict[str, str], message: str) -> None:
    message = message.replace("{NO}", "which is no {field} (letters, digits and _). ")
    message = message.replace("{THEMSELVES}", "braces that stand for themselves")
    (fault,) = faults("data.template=" + json.dumps(template))
    assert fault.startswith(f"data.template: {message}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"prompt": "{q}[[{c}", "completion": "{a}"}, "prompt has [[, "),
        ({"prompt": "{q}", "completion": "{a}]]"}, "completion has ]], "),
        ({"prompt": "[[{q}", "completion": "{a}]]"}, "prompt has [[, "),
        ({"prompt": "]]{q}[[", "completion": "{a}"}, "prompt has ]] [[, "),
        ({"prompt": "[[{q} [[{c}]]]]", "completion": "{a}"}, "prompt has [[ [[ ]] ]], "),
        ({"prompt": "[[{q} [[{c}]]", "completion": "{a}"}, "prompt has [[ [[ ]], "),
    ],
)
def test_marks_of_a_template_that_do_not_pair_are_refused(template: dict[str, str], message: str) -> None:
    (fault,) = faults("data.template=" + json.dumps(template))
    assert fault == f"data.template: {message}" + (
        "expected a ]] behind every [[, none within another. Write both into this part, "
        "around what is left out when a field in it is empty"
    )


@pytest.mark.parametrize(
    "template",
    [
        {"prompt": "[[{c} ]][[[{d}]]]{q}", "completion": "{a}[[ ({why})]]"},
        {"user": "[[{content}", "assistant": "{content}"},  # the marks mean nothing around turns
    ],
)
def test_marks_of_a_template_that_pair_pass(template: dict[str, str]) -> None:
    assert minimal("data.template=" + json.dumps(template)).data.template == template


@pytest.mark.parametrize("name", ["''", "' '"])
def test_an_empty_model_name_is_not_the_current_folder(name: str) -> None:
    assert faults(f"model.name={name}") == ("model.name: names nothing. Give a hub id (owner/name), a folder or a URL",)


def test_doubled_braces_of_a_template_pass_through_yaml() -> None:
    text = "model: {name: x}\noutput: {url: y}\ndata:\n  train: x\n  template:\n    prompt: '[[{{{c}}} ]]{q}'\n"
    text += '    completion: |\n      {{"a": "{a}"}}\n'
    assert parse_config(text).data.template == {"prompt": "[[{{{c}}} ]]{q}", "completion": '{{"a": "{a}"}}\n'}


def test_a_missing_run_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.yaml\n  cannot be read: No such file or directory\. Give the path"):
        load_config(str(tmp_path / "a.yaml"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is no UTF-8 text"):
        load_config(str(tmp_path / "b.yaml"))


@pytest.mark.parametrize(
    ("whole", "micro", "cure"), [(100, 16, "Try 96 or 112"), (2, 4, "Try 4"), (5, 2, "Try 4 or 6")]
)
def test_batch_numbers_must_divide(whole: int, micro: int, cure: str) -> None:
    assert faults(f"train.global_batch_size={whole}", f"train.micro_batch_size={micro}") == (
        f"train.global_batch_size: {whole} is not a multiple of micro_batch_size {micro}. {cure}",
    )


def test_overrides_win_over_the_file_and_are_yaml() -> None:
    text = LEAST + "train: {epochs: 5, seed: 1}\n"
    words = ["train.epochs=2", "lora.targets=[q_proj, v_proj]", "model.revision=", "data.train=a/b:train[:1%]"]
    config = parse_config(text, words)
    assert (config.train.epochs, config.train.seed, config.model.revision) == (2, 1, None)
    assert (config.lora.targets, config.data.train) == (["q_proj", "v_proj"], "a/b:train[:1%]")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("lora.rank", "lora.rank: is no setting. Write section.key=value, such as train.max_steps=20"),
        ("rank=3", "rank=3: is no setting. Write section.key=value, such as train.max_steps=20"),
        ("lora.rank=[", "lora.rank=[: the value is no valid YAML, or lora is no section"),
        (
            "lora.rnak=3",
            'lora.rnak: unknown name. Did you mean "rank"? Valid: alpha, bias, dora, dropout, rank, rslora, share_a, '
            "targets.",
        ),
    ],
)
def test_a_bad_override_is_refused(word: str, message: str) -> None:
    assert faults(word) == (message,)


@pytest.mark.parametrize("number", ["2e-4", "2E-4", "2.0e-4", "0.0002", "+2e-4"])
def test_numbers_are_read_as_people_write_them(number: str) -> None:
    assert parse_config(LEAST + f"train: {{learning_rate: {number}}}").train.learning_rate == 2e-4
    assert minimal(f"train.learning_rate={number}").train.learning_rate == 2e-4


def test_a_section_whose_lines_are_all_comments_keeps_its_defaults() -> None:
    assert parse_config(LEAST + "train:\n  # epochs: 5\n") == minimal()


def test_defaults_are_those_of_the_qlora_world() -> None:
    config = minimal()
    assert (config.quantization.type, config.quantization.double_quant) == ("nf4", True)
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout, config.lora.targets) == (16, 32, 0.05, "all")
    assert (config.train.learning_rate, config.train.optimizer, config.train.max_grad_norm) == (2e-4, "adamw", 1.0)
    assert (config.data.packing, config.parallel.strategy, config.model.trust_remote_code) == (True, "auto", False)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        minimal().lora.rank = 8


def test_a_written_run_file_reads_back_the_same() -> None:
    config = minimal("data.template={prompt: '{q}', completion: '{a}'}", "evaluation.share=0.1")
    assert parse_config(yaml.safe_dump(config.model_dump())) == config


def test_the_run_is_named_by_its_folder_unless_told() -> None:
    assert minimal("output.url=s3://bucket/runs/a/").run_name == "a"
    assert minimal("tracking.run_name=b").run_name == "b"


def test_the_schema_accepts_the_demo_and_refuses_unknown_names() -> None:
    made = json.loads(json.dumps(schema()))
    jsonschema.Draft202012Validator.check_schema(made)
    demo = yaml.safe_load((REPOSITORY / "configs/smollm2-135m-demo.yaml").read_text())
    demo["train"]["learning_rate"] = float(demo["train"]["learning_rate"])
    jsonschema.validate(demo, made)
    with pytest.raises(jsonschema.ValidationError, match="rnak"):
        jsonschema.validate({**demo, "lora": {"rnak": 8}}, made)
    assert all(prop["description"] for section in made["$defs"].values() for prop in section["properties"].values())


def test_explain_gives_type_default_rule_and_meaning() -> None:
    assert explain("lora.rank").splitlines() == [
        "lora.rank (integer > 0; default 16)",
        "  Rank r of each product B A. More learns more and costs more memory. Fixed.",
        "  fixed: another value is another run and needs another output.url.",
    ]
    assert explain("model.name").startswith("model.name (string; required)")
    assert [block.split()[0] for block in explain("lora").split("\n\n")] == [k for k in KEYS if k.startswith("lora.")]
    assert all(explain(key) for key in KEYS)


@pytest.mark.parametrize(("key", "near"), [("lora.rnak", "lora.rank"), ("trian", "train")])
def test_explain_names_the_nearest_setting(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f'{key}: unknown name. Did you mean "{near}"[?] Valid: '):
        explain(key)


def test_changes_name_key_rule_and_both_values() -> None:
    found = changes(minimal(), minimal("lora.rank=8", "train.epochs=5", "model.attention=eager"))
    assert [(change.key, change.rule) for change in found] == [
        ("model.attention", "free"),
        ("lora.rank", "fixed"),
        ("train.epochs", "extendable"),
    ]
    assert str(found[1]) == "lora.rank: 16 there, 8 here"
    assert changes(minimal(), minimal()) == []


def test_an_env_file_is_read_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HF_ENDPOINT"):  # set, so that their absence is put back in the end
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("HF_TOKEN")
    assert not load_dotenv_file()
    (tmp_path / ".env").write_text("HF_TOKEN=hf_secret\nHF_ENDPOINT=https://mirror.example\n")
    os.environ["HF_ENDPOINT"] = "https://mine.example"
    assert load_dotenv_file()
    assert os.environ["HF_TOKEN"] == "hf_secret"
    assert os.environ["HF_ENDPOINT"] == "https://mine.example"
    assert "hf_secret" not in minimal().model_dump_json()
    assert ".env" in (REPOSITORY / ".gitignore").read_text().split()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"HF_TOKEN=\xff\xfesecret\n", "is no UTF-8 text. Save it as UTF-8"),
        (b"HF_TOKEN=sec\0ret\n", "cannot be put into the environment: embedded null byte. Repair the line"),
    ],
)
def test_an_env_file_that_is_no_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    Path(".env").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_dotenv_file()
    assert str(refused.value) == f"1 problem in .env\n  {message}"


def test_an_env_file_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*words: object, **how: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("dotenv.load_dotenv", closed)  # root may read every file
    with pytest.raises(ConfigError, match=r"in \.env\n  cannot be read: Permission denied\. Make it readable, or"):
        load_dotenv_file()
