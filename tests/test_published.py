"""What is published of a model, and that a refusal has the same words as when the model is trained."""

import json
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from job.config.learning import Model
from job.config.running import Storage
from job.errors import ModelError
from job.headers import read_headers
from job.pretrained import fetch, fetch_weights, read_config
from job.published import published
from job.store import Store
from tests.s3 import BUCKET, S3


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(ModelError) as found:
        act()
    return str(found.value)


def as_trained(model: Model, storage: Storage) -> None:
    """What training does with a model before it reads the weights."""
    folder, store = fetch(model, storage, lambda line: None)
    read_config(folder, model)
    read_headers(fetch_weights(model, store, storage, lambda line: None))


def test_a_folder_gives_its_config_and_headers(tiny_model: Path) -> None:
    config, headers = published(Model(name=str(tiny_model)), Storage())
    assert config == json.loads((tiny_model / "config.json").read_text())
    assert headers == read_headers(Store(str(tiny_model)))


def test_a_bucket_gives_the_same_and_only_headers_are_read(s3: S3, tiny_model: Path) -> None:
    url, storage = f"s3://{BUCKET}/{secrets.token_hex(4)}", Storage(**s3.storage)
    for path in tiny_model.iterdir():
        Store(url, storage).write(path.name, path.read_bytes())
    assert published(Model(name=url), storage) == published(Model(name=str(tiny_model)), Storage())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"model.name: .* has no config.json. Give a transformers checkpoint"),
        ({"config.json": "{"}, r"model.name: .*: config.json is damaged \(.*\). Copy it again"),
        ({"config.json": "[]"}, r"model.name: .*: config.json is no object with settings. Copy it again"),
        (
            {"config.json": '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}'},
            r"model.name: .* is quantized already. Give the 16-bit checkpoint it was made from",
        ),
        (
            {"config.json": '{"model_type": "llama"}'},
            r".*: no weights. Expected model.safetensors or its parts. The folder holds config.json",
        ),
        (
            {"config.json": '{"model_type": "llama"}', "model.safetensors": "short"},
            r".*/model.safetensors: the safetensors header is damaged \(.*\). Copy the file again",
        ),
    ],
)
@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_a_folder_that_cannot_be_used_is_refused_as_in_training(
    s3: S3, tmp_path: Path, place: str, files: dict[str, str], message: str
) -> None:
    url = str(tmp_path) if place == "folder" else f"s3://{BUCKET}/{secrets.token_hex(4)}"
    storage = Storage(**s3.storage)
    for name, content in files.items():
        Store(url, storage).write(name, content.encode())
    found = refusal(lambda: published(Model(name=url), storage))
    assert found == refusal(lambda: as_trained(Model(name=url), storage))
    assert re.fullmatch(message, found)


@pytest.mark.parametrize("name", ["s3://no-such-bucket-here/model", "nowhere/at/all", "none://model"])
def test_a_place_that_is_not_there_is_refused_as_in_training(s3: S3, name: str) -> None:
    storage = Storage(**s3.storage)
    found = refusal(lambda: published(Model(name=name), storage))
    assert found == refusal(lambda: fetch(Model(name=name), storage))
    assert found.startswith(f"model.name: {name}: ")


def test_a_server_that_is_not_there_is_refused_as_in_training(s3: S3) -> None:
    storage = Storage(endpoint="http://127.0.0.1:9", path_style=True)
    found = refusal(lambda: published(Model(name="s3://bucket/model"), storage))
    assert found == refusal(lambda: fetch(Model(name="s3://bucket/model"), storage))
    assert found.endswith("Check the URL and storage.endpoint")
