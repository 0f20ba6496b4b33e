"""A merged model: what base plus adapter computes, in any naming, from and to any storage, whole or not a model."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import job
from job import merge as module
from job.adapter_file import find
from job.config.learning import Model
from job.config.running import Storage
from job.errors import InputError, JobError, ModelError, OutputError
from job.export import export
from job.headers import INDEX
from job.merge import merge
from job.store import Store
from tests.conftest import make_llama
from tests.faults import proxied
from tests.forked import run
from tests.hub import Hub
from tests.native_models import SEEING, tiny
from tests.s3 import S3
from tests.test_hub import server  # noqa: F401  # a fixture
from tests.tuned import LEGACY, base_logits, checkpoint, logits, tuned

ANY = {"chatglm3": {}, "chatglm2": {"targets": ["q_proj", "dense"], "rslora": True}, "qwen1": {"share_a": True},
       "tied": {"rslora": True}, "Qwen2.5": {"bias": "lora_only"}, "GPT-2": {}, "Pythia": {"dora": True},
       "OPT-350m": {}, "Mixtral": {}, "Llama 2": {"dora": True}, SEEING: {}}  # fmt: skip


def merged(adapter: Path, out: Path | Store, names: Any = "native", dtype: Any = None, *words: str) -> list[str]:
    """Merge; what was said."""
    said: list[str] = []
    merge(find(str(adapter), words), out if isinstance(out, Store) else Store(str(out)), names, dtype, said.append)
    return said


def base(name: str, folder: Path) -> Path:
    """A model's folder: a tied Llama in several files, or a tiny one of its family."""
    if name == "tied":
        make_llama(folder, "float32", tie_word_embeddings=True)
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="120KB")
        return folder
    return tiny(name, folder)


@pytest.mark.parametrize("name", ANY)
def test_it_computes_what_base_and_adapter_do(tmp_path: Path, name: str) -> None:
    folder = base(name, tmp_path / "base")
    expected = tuned(folder, tmp_path / "adapter", **ANY[name])
    merged(tmp_path / "adapter", tmp_path / "native", "native", "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native").eval()
    assert theirs.dtype == torch.float32
    assert (logits(theirs) - expected).abs().max() < 2e-5 < (base_logits(folder) - expected).abs().max()
    merged(tmp_path / "adapter", tmp_path / "original", "original", "float32")
    assert torch.equal(base_logits(tmp_path / "original"), base_logits(tmp_path / "native"))
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as before, safe_open(tmp_path / "original" / file.name, "pt") as after:
            shapes = [{name: each.get_slice(name).get_shape() for name in each.keys()} for each in (before, after)]  # noqa: SIM118
            assert shapes[0] == shapes[1]
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "original"))
    assert {name for name in after if after[name] != before.get(name)} <= {"dtype", "torch_dtype"}


def test_it_is_rounded_once_into_the_type_asked_for(tmp_path: Path) -> None:
    tuned(LEGACY / "chatglm3", tmp_path / "adapter")
    for dtype in ("float32", "float16", "bfloat16"):
        merged(tmp_path / "adapter", tmp_path / dtype, "original", dtype)
        assert json.loads((tmp_path / dtype / "config.json").read_text())["torch_dtype"] == dtype
    merged(tmp_path / "adapter", tmp_path / "own", "original")
    full, fp16, bf16, own = (load_file(tmp_path / name / "model.safetensors")
                             for name in ("float32", "float16", "bfloat16", "own"))  # fmt: skip
    table = "transformer.rotary_pos_emb.inv_freq"  # which no adapter changes and newer code computes
    assert torch.equal(own.pop(table), bf16.pop(table))
    assert all(torch.equal(full[name].bfloat16(), value) for name, value in bf16.items())
    assert all(torch.equal(full[name].half(), value) and torch.equal(fp16[name], value) for name, value in own.items())


@pytest.mark.parametrize("name", ["chatglm3", "qwen1"])
def test_the_authors_tokenizer_comes_along_as_one_that_transformers_reads(tmp_path: Path, name: str) -> None:
    tuned(LEGACY / name, tmp_path / "adapter")
    for names in ("native", "original"):
        merged(tmp_path / "adapter", tmp_path / names, names)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "native"), job.load_base(str(LEGACY / name))[1]
    assert theirs("你好, people!").input_ids == ours("你好, people!").input_ids
    small = {file.name for file in (LEGACY / name).iterdir() if "token" in file.name}
    assert all((tmp_path / "original" / file).read_bytes() == (LEGACY / name / file).read_bytes() for file in small)


def test_an_adapter_under_the_authors_names_is_merged_as_it_is(tmp_path: Path) -> None:
    tuned(LEGACY / "chatglm3", tmp_path / "adapter")
    export(find(str(tmp_path / "adapter")), Store(str(tmp_path / "exported")), "original", print)
    for name in ("adapter", "exported"):
        merged(tmp_path / name, tmp_path / f"of-{name}", "original")
    one, other = (load_file(tmp_path / f"of-{name}/model.safetensors") for name in ("adapter", "exported"))
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_an_adapter_without_products_of_its_own_leaves_every_bit_as_it_is(tmp_path: Path) -> None:
    tuned(LEGACY / "qwen1", tmp_path / "adapter", targets=["o_proj"])
    merged(tmp_path / "adapter", tmp_path / "out", "original")
    before, after = (load_file(folder / "model.safetensors") for folder in (LEGACY / "qwen1", tmp_path / "out"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {f"transformer.h.{layer}.attn.c_proj.weight" for layer in (0, 1)}


def test_a_bucket_is_read_from_and_written_to(tmp_path: Path, s3: S3) -> None:
    folder = base("tied", tmp_path / "base")
    expected = tuned(folder, tmp_path / "adapter")
    for name in ("base", "adapter"):
        for file in (tmp_path / name).iterdir():
            Store(f"s3://bucket/merge/{name}", Storage(**s3.storage)).write(file.name, file.read_bytes())
    words = [f"storage.endpoint={s3.endpoint}", "storage.path_style=true", "model.name=s3://bucket/merge/base"]
    done = run("merge", "s3://bucket/merge/adapter", "s3://bucket/merge/out", *words)
    assert done.code == 0, done.err
    out = Store("s3://bucket/merge/out", Storage(**s3.storage))
    for name in out.names():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_bytes(out.read(name))
    assert (base_logits(tmp_path / "out") - expected).abs().max() < 2e-5


def test_a_bucket_that_fails_now_and_then_gets_the_same_bytes(tmp_path: Path, s3: S3) -> None:
    folder = base("tied", tmp_path / "base")
    tuned(folder, tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out")
    with proxied(s3, seed=0) as (flaky, faults):
        storage = Storage(**flaky.storage)
        for file in folder.iterdir():
            Store("s3://bucket/flaky/base", storage).write(file.name, file.read_bytes())
        faults.share_503, faults.truncate, faults.lose_answer = 0.2, 2, 3
        found = replace(find(str(tmp_path / "adapter")), model=Model(name="s3://bucket/flaky/base"), storage=storage)
        out = Store("s3://bucket/flaky/out", storage)
        merge(found, out, "native", None, lambda line: None)
        assert all(faults.given[name] for name in ("share_503", "truncate", "lose_answer"))
        faults.share_503 = 0
        for file in (tmp_path / "out").glob("model*"):
            assert out.read(file.name) == file.read_bytes()


def test_a_hub_id_with_pickled_weights_is_merged_and_one_with_gguf_refused(
    tmp_path: Path,
    server: Hub,  # noqa: F811
) -> None:
    expected = tuned(LEGACY / "chatglm2", tmp_path / "adapter")
    torch.save(load_file(LEGACY / "chatglm2/model.safetensors"), tmp_path / "pickled")
    config = (LEGACY / "chatglm2/config.json").read_bytes()
    server.files = {"config.json": config, "pytorch_model.bin": (tmp_path / "pickled").read_bytes()}
    words = ("model.name=owner/model", f"storage.cache_dir={tmp_path}/cache")
    said = merged(tmp_path / "adapter", tmp_path / "out", "native", "float32", *words)
    assert said == [f"model: {tmp_path}/out"] and (tmp_path / "out/model.safetensors").is_file()
    assert (base_logits(tmp_path / "out") - expected).abs().max() < 2e-5
    server.files = {"config.json": config, "model.gguf": b"GGUF"}
    with pytest.raises(ModelError, match=r"^model\.name: owner/model is a GGUF file, whose weights are quantized\."):
        merged(tmp_path / "adapter", tmp_path / "other", "native", None, *words)


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_one_that_was_cut_off_is_no_model_and_goes_on_with_the_file_it_came_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, kind: str
) -> None:
    folder = base("tied", tmp_path / "base")
    expected = tuned(folder, tmp_path / "adapter")
    out = Store(str(tmp_path / "out"))
    if kind == "s3":
        out = Store("s3://bucket/cut-off", Storage(**request.getfixturevalue("s3").storage))
    contents, files = module.contents, []

    def dies_in_the_second(file: Any, *others: Any) -> Iterator[memoryview]:
        files.append(file)
        for number, content in enumerate(contents(file, *others)):
            if len(files) == 2 and number == 1:
                raise KeyboardInterrupt
            yield content

    monkeypatch.setattr(module, "contents", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        merged(tmp_path / "adapter", out)
    first = files[0][0].tensor.file
    assert out.names() == ["merge.json", first]
    assert json.loads(out.read("merge.json"))["state"] == "running"
    monkeypatch.setattr(module, "contents", contents)
    out.write(f"{files[1][0].tensor.file}.77.part", b"of a killed one")
    assert f"{first} is there already" in merged(tmp_path / "adapter", out)
    assert merged(tmp_path / "adapter", out) == [f"model: {out.url}"]
    assert not any(name.endswith(".part") for name in out.names())
    (tmp_path / "copy").mkdir()
    for name in out.names():
        (tmp_path / "copy" / name).write_bytes(out.read(name))
    assert (base_logits(tmp_path / "copy") - expected).abs().max() < 2e-5


def test_one_that_was_killed_over_its_first_file_is_begun_again(tmp_path: Path) -> None:
    tuned(LEGACY / "qwen1", tmp_path / "adapter", targets=["o_proj"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/merge.json.0a1b.part.77.part").write_bytes(b"{")
    merged(tmp_path / "adapter", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.part"))


def test_config_json_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = Store.write
    monkeypatch.setattr(
        Store, "write", lambda store, name, content: (written.append(name), write(store, name, content))
    )
    tuned(base("tied", tmp_path / "base"), tmp_path / "adapter")
    merged(tmp_path / "adapter", tmp_path / "out")
    assert written[-3:] == [INDEX, "config.json", "merge.json"]


def test_folders_that_hold_something_else_are_left_alone(tmp_path: Path) -> None:
    tuned(LEGACY / "qwen1", tmp_path / "adapter")
    with pytest.raises(OutputError) as refused:
        merged(tmp_path / "adapter", tmp_path / "adapter")
    assert str(refused.value) == (
        f"{tmp_path}/adapter holds files that are no merge (adapter_config.json, adapter_model.safetensors). "
        "Use an empty or a new folder"
    )
    merged(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(OutputError) as refused:
        merged(tmp_path / "adapter", tmp_path / "out", "original")
    assert str(refused.value) == (
        f"{tmp_path}/out holds another merge (base {LEGACY}/qwen1, revision the newest, adapter {tmp_path}/adapter, "
        "names native, dtype the base's). Use an empty or a new folder"
    )
    twin = checkpoint(LEGACY / "qwen1", tmp_path / "twin")  # of the same shapes
    with pytest.raises(OutputError, match=r"/out holds another merge \(base "):
        merged(tmp_path / "adapter", tmp_path / "out", "native", None, f"model.name={twin}")
    tuned(LEGACY / "qwen1", tmp_path / "adapter", alpha=16)
    with pytest.raises(OutputError, match=r"/out holds another merge \(of the same adapter or base, which"):
        merged(tmp_path / "adapter", tmp_path / "out")
    (tmp_path / "out/merge.json").write_text("{}")
    with pytest.raises(OutputError) as refused:
        merged(tmp_path / "adapter", tmp_path / "out")
    assert str(refused.value) == (
        f"{tmp_path}/out/merge.json is damaged (KeyError('key')). Use an empty or a new folder"
    )


def test_quantized_bases_are_refused(tmp_path: Path) -> None:
    shutil.copytree(base("tied", tmp_path / "base"), tmp_path / "four")
    tuned(tmp_path / "base", tmp_path / "adapter")
    config = json.loads((tmp_path / "four/config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (tmp_path / "four/config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as refused:
        merged(tmp_path / "adapter", tmp_path / "out", "native", None, f"model.name={tmp_path}/four")
    assert str(refused.value) == (
        f"model.name: {tmp_path}/four has a quantization_config, so it is quantized already. Give the 16-bit "
        "checkpoint it was made from"
    )
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError) as refused:
        merged(tmp_path / "adapter", tmp_path / "out", "native", None, f"model.name={tmp_path}/gguf")
    assert str(refused.value) == (
        f"model.name: {tmp_path}/gguf is a GGUF file, whose weights are quantized. Give the 16-bit checkpoint it was "
        "made from"
    )
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    tuned(base("tied", tmp_path / "base"), tmp_path / "adapter", targets=["q_proj"])
    make_llama(tmp_path / "wide", num_attention_heads=8, num_key_value_heads=8, head_dim=16)
    with pytest.raises(InputError) as refused:
        merged(tmp_path / "adapter", tmp_path / "out", "native", None, f"model.name={tmp_path}/wide")
    assert str(refused.value) == (
        f"{tmp_path}/adapter: model.layers.0.self_attn.q_proj has a weight of shape [64, 64], the base's has "
        "[128, 64]. Give the adapter's own base"
    )
    with pytest.raises(InputError) as refused:
        merged(tmp_path / "adapter", tmp_path / "other", "native", None, f"model.name={base('GPT-2', tmp_path / 'g')}")
    assert str(refused.value) == (
        f"{tmp_path}/adapter: model.layers.0.self_attn.q_proj has a weight that the base {tmp_path}/g has not. "
        "Give the adapter's own base"
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "other").exists()


def test_what_is_too_large_for_a_type_is_refused(tmp_path: Path) -> None:
    tuned(LEGACY / "qwen1", tmp_path / "adapter", alpha=10_000_000, targets=["o_proj"])
    with pytest.raises(JobError) as refused:
        merged(tmp_path / "adapter", tmp_path / "out", "native", "float16")
    assert str(refused.value) == (
        "model.layers.0.self_attn.o_proj.weight has values that are not finite in F16. Give --dtype bfloat16, or copy "
        "the base again if it has them itself"
    )
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["merge.json"]
