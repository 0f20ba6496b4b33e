"""A walk over all settings: documented with unit and off, refused when wrong, read by something, under a rule."""

import ast
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from job.config import RunConfig, changes, fields, fixed_hash, rule_of
from job.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.test_config import TEXT, faults, minimal

FIELDS = {f"{section}.{name}": field for section, name, field in fields()}

BOOL, WHOLE, NUMBER = (
    "input should be a valid boolean",
    "input should be a valid integer",
    "input should be a valid number",
)
POSITIVE, NOT_NEGATIVE = "input should be greater than 0", "input should be greater than or equal to 0"
OFFLOADS = "input should be 'none', 'cpu' or 'nvme'"
NOTHING = "names nothing. Give a file, glob, folder, URL or hub id, or a list of them"


def wrong(value: Any, expected: str) -> str:
    return f"{value!r} is wrong: {expected}"


REFUSED = {
    "model.name": ("5", wrong(5, TEXT)),
    "model.revision": ("1.0", wrong(1.0, TEXT)),
    "model.trust_remote_code": ("1", wrong(1, BOOL)),
    "model.attention": (
        "fast",
        wrong("fast", "input should be 'auto', 'eager', 'sdpa', 'flash_attention_2' or 'flash_attention_3'"),
    ),
    "quantization.type": ("nf5", wrong("nf5", "input should be 'nf4', 'fp4', 'int8' or 'none'")),
    "quantization.double_quant": ("maybe", wrong("maybe", BOOL)),
    "quantization.compute_dtype": ("int8", wrong("int8", "input should be 'auto', 'bf16', 'fp16' or 'fp32'")),
    "lora.rank": ("0", wrong(0, POSITIVE)),
    "lora.alpha": ("-1", wrong(-1, POSITIVE)),
    "lora.dropout": ("1.0", wrong(1.0, "input should be less than 1")),
    "lora.targets": ("[]", "an empty list trains nothing. Name linears such as [q_proj, v_proj], or write all"),
    "lora.bias": ("some", wrong("some", "input should be 'none', 'all' or 'lora_only'")),
    "lora.rslora": ("2", wrong(2, BOOL)),
    "lora.share_a": ("x", wrong("x", BOOL)),
    "lora.dora": ("x", wrong("x", BOOL)),
    "data.train": ("[]", NOTHING),
    "data.format": ("3", wrong(3, TEXT)),
    "data.template": (
        "{question: q}",
        "has question. Give prompt and completion, or user and assistant (and system), each with {content} in it once "
        "and no other field",
    ),
    "data.learn": ("first", wrong("first", "input should be 'all' or 'last'")),
    "data.max_length": ("0", wrong(0, POSITIVE)),
    "data.packing": ("3", wrong(3, BOOL)),
    "data.streaming": (
        "true",
        "nobody knows how many steps an epoch has before it was read. Set train.max_steps",
    ),
    "data.shuffle_buffer": ("0", wrong(0, POSITIVE)),
    "data.workers": ("0", wrong(0, "input should be 'auto' or greater than 0")),
    "data.cache": ("3", wrong(3, TEXT)),
    "data.shuffle": ("3", wrong(3, BOOL)),
    "evaluation.file": ("''", NOTHING),
    "evaluation.share": ("1", wrong(1, "input should be less than 1")),
    "evaluation.every_steps": ("0", wrong(0, POSITIVE)),
    "evaluation.micro_batch_size": ("0", wrong(0, POSITIVE)),
    "evaluation.keep_best": ("3", wrong(3, BOOL)),
    "evaluation.patience": ("0.5", wrong(0.5, WHOLE)),
    "train.epochs": ("0", wrong(0, POSITIVE)),
    "train.max_steps": ("1e3", wrong(1000.0, WHOLE)),
    "train.learning_rate": (".inf", "inf is wrong: input should be a finite number"),
    "train.schedule": ("step", wrong("step", "input should be 'linear', 'cosine' or 'constant'")),
    "train.warmup_steps": ("-1", wrong(-1, NOT_NEGATIVE)),
    "train.weight_decay": ("-0.1", wrong(-0.1, NOT_NEGATIVE)),
    "train.max_grad_norm": ("-1", wrong(-1, NOT_NEGATIVE)),
    "train.global_batch_size": ("0", wrong(0, POSITIVE)),
    "train.micro_batch_size": ("x", wrong("x", WHOLE)),
    "train.precision": ("fp8", wrong("fp8", "input should be 'auto', 'bf16', 'fp16' or 'fp32'")),
    "train.optimizer": (
        "sgd",
        wrong("sgd", "input should be 'adamw', 'adamw_8bit', 'paged_adamw_8bit' or 'paged_adamw_32bit'"),
    ),
    "train.offload_activations": ("host", wrong("host", BOOL)),
    "train.recompute": ("off", wrong(False, "input should be 'auto', 'none' or 'full' or a valid integer")),
    "train.dequantize": ("never", wrong("never", "input should be 'auto', 'always' or 'once'")),
    "train.fused": ("liger", wrong("liger", "input should be a valid boolean")),
    "train.seed": ("-1", wrong(-1, NOT_NEGATIVE)),
    "train.base_compute": ("fp16", wrong("fp16", "input should be 'bf16' or 'fp8'")),
    "train.max_hours": ("0", wrong(0, POSITIVE)),
    "train.stop_grace_s": ("0", wrong(0, POSITIVE)),
    "train.stop_file": ("3", wrong(3, TEXT)),
    "train.max_skipped_steps": ("0", wrong(0, POSITIVE)),
    "generation.max_new_tokens": ("0", wrong(0, POSITIVE)),
    "generation.temperature": ("-1", wrong(-1, NOT_NEGATIVE)),
    "generation.top_p": ("0", wrong(0, POSITIVE)),
    "generation.top_k": ("-1", wrong(-1, NOT_NEGATIVE)),
    "generation.repetition_penalty": ("0.5", wrong(0.5, "input should be greater than or equal to 1")),
    "generation.rows": ("0", wrong(0, POSITIVE)),
    "parallel.strategy": (
        "zero1",
        wrong("zero1", "input should be 'auto', 'replicate', 'zero2', 'zero3' or 'hpz'"),
    ),
    "parallel.processes": ("0", wrong(0, "input should be 'all' or greater than 0")),
    "parallel.offload_optimizer": ("disk", wrong("disk", OFFLOADS)),
    "parallel.offload_parameters": ("gpu", wrong("gpu", OFFLOADS)),
    "parallel.nvme_path": ("/nvme", "nothing is offloaded to nvme. Leave it out, or set an offload to nvme"),
    "parallel.bucket": ("0", wrong(0, POSITIVE)),
    "parallel.prefetch": ("-1", wrong(-1, NOT_NEGATIVE)),
    "parallel.persistence": ("-1", wrong(-1, NOT_NEGATIVE)),
    "parallel.max_live": ("-1", wrong(-1, NOT_NEGATIVE)),
    "parallel.layer_gathers": ("1", wrong(1, BOOL)),
    "parallel.overlap_comm": ("1", wrong(1, BOOL)),
    "parallel.contiguous_gradients": ("yes please", wrong("yes please", BOOL)),
    "parallel.deepspeed": ("3", wrong(3, TEXT)),
    "checkpoint.every_steps": ("0", wrong(0, POSITIVE)),
    "checkpoint.every_epoch": ("1", wrong(1, BOOL)),
    "checkpoint.every_minutes": ("0", wrong(0, POSITIVE)),
    "checkpoint.keep": ("0", wrong(0, POSITIVE)),
    "checkpoint.keep_best": (
        "true",
        "judges by evaluations on the way. Set evaluation.every_steps, and evaluation.file or evaluation.share",
    ),
    "checkpoint.max_restarts": ("-1", wrong(-1, NOT_NEGATIVE)),
    "storage.endpoint": ("9000", wrong(9000, TEXT)),
    "storage.region": ("1", wrong(1, TEXT)),
    "storage.path_style": ("1", wrong(1, BOOL)),
    "storage.ca_bundle": ("true", wrong(True, TEXT)),
    "storage.cache_dir": (
        "s3://bucket/x",
        "'s3://bucket/x' is no folder of this machine. Name one on its own disk, such as /tmp/weights",
    ),
    "storage.cache_gib": ("9", "9 GiB of no folder. Set storage.cache_dir, or use null"),
    "storage.lease": ("1", wrong(1, BOOL)),
    "storage.retry_minutes": ("-1", wrong(-1, NOT_NEGATIVE)),
    "output.url": ("/", "is empty or the root. Name a folder such as runs/first or s3://bucket/runs/first"),
    "tracking.sinks": ("[tensorboard]", wrong("tensorboard", "input should be 'console' or 'jsonl'")),
    "tracking.every_steps": ("0", wrong(0, POSITIVE)),
    "tracking.run_name": ("2024", wrong(2024, TEXT)),
}

PLAIN_NUMBERS = {"lora.alpha", "lora.rank", "train.learning_rate", "train.weight_decay", "train.seed"}
"""Numbers without a unit."""
NO_OFF = {"train.seed"}
"""Settings that may be 0 and are not off there."""


def can_be_off(field: FieldInfo) -> bool:
    """Null, false, "none", or a number that may be 0."""
    kinds = (field.annotation, *get_args(field.annotation))
    lowest = [getattr(mark, "ge", None) for mark in field.metadata]
    return type(None) in kinds or bool in kinds or "none" in kinds or 0 in lowest


def is_number(field: FieldInfo) -> bool:
    return bool({int, float} & {field.annotation, *get_args(field.annotation)})


@pytest.mark.parametrize("key", FIELDS)
def test_a_setting_says_what_it_is_and_ends_with_its_rule(key: str) -> None:
    field = FIELDS[key]
    said = " ".join((field.description or "").split())
    assert len(said.split()) > 3, "a meaning"
    assert said.endswith(f" {rule_of(field).name.capitalize()}.")
    if can_be_off(field) and key not in NO_OFF:
        assert re.search(r"\b[Oo]ff\b|\bnull is\b", said), "what off means"
    if is_number(field) and key not in PLAIN_NUMBERS:
        units = "tokens?|steps?|sequences|passes|rows|shares?|elements|gib|hours|minutes|seconds|processes|workers"
        units += "|evaluations|checkpoints|norm|distribution|logits"
        assert re.search(rf"\b({units})\b", said.lower()), "a unit"


@pytest.mark.parametrize("key", FIELDS)
def test_a_wrong_value_is_refused_in_one_sentence(key: str) -> None:
    value, message = REFUSED[key]
    assert faults(f"{key}={value}") == (f"{key}: {message}",)


def test_the_table_of_refusals_has_no_setting_that_is_gone() -> None:
    assert list(REFUSED) == list(FIELDS)


def reads() -> Iterator[tuple[str, str]]:
    """(holder, name) of every attribute read in job/ outside job/config: `config.lora.rank` and `lora.rank`."""
    for path in (REPOSITORY / "job").rglob("*.py"):
        if "config" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                holder = node.value
                yield getattr(holder, "attr", getattr(holder, "id", "")), node.attr


def test_something_reads_every_setting_that_has_a_choice() -> None:
    read = {f"{holder}.{name}" for holder, name in reads()}
    read |= {"tracking.run_name"} if "config.run_name" in read else set()  # a property of RunConfig
    unread = set(FIELDS) - read
    assert not unread


READY = ("evaluation.share=0.1", "evaluation.every_steps=7", "storage.cache_dir=cache")


def another(key: str, field: FieldInfo) -> RunConfig:
    """Held-out rows, a cache and defaults, but another value for one setting: the first of these that it accepts."""
    words = [str(word) for kind in (field.annotation, *get_args(field.annotation)) for word in get_args(kind) or [kind]]
    for value in ("true", "false", "2", "0.5", "[a]", "[]", "other", "{prompt: '{a}', completion: '{b}'}", *words):
        try:
            config = minimal(*READY, f"{key}={value}")
        except ConfigError:
            continue
        if changes(minimal(*READY), config):
            return config
    raise AssertionError(f"no other value for {key}")


ALONE = ("data.streaming", "evaluation.file", "parallel.nvme_path")
"""Settings that need another one beside them."""


@pytest.mark.parametrize("key", [key for key in FIELDS if key not in ALONE])
def test_the_hash_follows_fixed_settings_only(key: str) -> None:
    before, after = minimal(*READY), another(key, FIELDS[key])
    assert [change.key for change in changes(before, after)] == [key]
    assert (fixed_hash(before) != fixed_hash(after)) == (rule_of(FIELDS[key]).name == "fixed")


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        (
            "fixed",
            "model.name quantization.type lora.rank data.train data.max_length data.packing train.seed "
            "train.global_batch_size train.optimizer train.precision evaluation.share",
        ),
        (
            "extendable",
            "train.epochs train.max_steps evaluation.file evaluation.every_steps checkpoint.keep train.max_hours",
        ),
        (
            "free",
            "parallel.strategy tracking.sinks train.micro_batch_size train.recompute train.fused data.workers "
            "train.dequantize data.cache storage.region",
        ),
    ],
)
def test_rules_are_those_of_the_contract(rule: str, keys: str) -> None:
    assert {rule_of(FIELDS[key]).name for key in keys.split()} == {rule}


@pytest.mark.parametrize("key", ["model.name", "data.train", "evaluation.file", "output.url", "storage.endpoint"])
@pytest.mark.parametrize(
    "url",
    [
        "https://anna:geheim@host/rows.jsonl",
        "s3://KEY:ge/heim@bucket/rows.jsonl",
        "https://geheim@host:8080/x",
        "simplecache::https://anna:1geheim?#@host/x",
    ],
)
def test_an_address_with_a_user_name_or_password_is_refused_and_not_shown(key: str, url: str) -> None:
    expected = f"{key}: holds a user name or password. Put keys into the environment or an .env file"
    assert faults(f"{key}={url}") == (expected,)
    if key in ("data.train", "evaluation.file"):
        assert faults(f"{key}=[rows.jsonl, '{url}']") == (expected,)
    else:
        assert faults(f"{key}=['{url}']") == (f"{key}: list is wrong: {TEXT}",)


@pytest.mark.parametrize(
    "url",
    [
        "https://host:8080/rows@v1.jsonl",
        "http://[::1]:9000/rows@v1.jsonl",
        "https://host/rows.jsonl?mail=a:b@c",
        "hf://datasets/owner/name@main/rows.jsonl",
        "hf://gpt2@main",
        "s3://bucket/a@b:train[:1%]",
        "folder@home/rows.jsonl",
    ],
)
def test_an_at_sign_elsewhere_in_an_address_is_no_password(url: str) -> None:
    assert minimal(f"data.train={url}").data.train == url


def test_a_password_in_what_is_no_yaml_or_no_setting_is_not_shown() -> None:
    broken = "output: {url: https://anna:geheim@host/x"
    assert faults(text=broken) == ("is no valid YAML in line 1, and holds a user name or password",)
    assert faults("output.url=[https://anna:geheim@host/x") == (
        "a setting with a user name or password: the value is no valid YAML, or output is no section",
    )
    assert faults("https://anna:geheim@host/x") == (
        "a setting with a user name or password: is no setting. Write section.key=value, such as train.max_steps=20",
    )
