"""Weights that are no safetensors: converted once, into the same numbers, and refused when they are not weights."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from job import convert
from job.config import parse_config
from job.config.learning import Model
from job.config.running import Storage
from job.convert import converted, weight_files
from job.errors import ModelError
from job.headers import INDEX, read_headers
from job.pretrained import fetch, fetch_weights
from job.store import Store
from job.train import train
from job.world import World
from tests.conftest import REPOSITORY, losses, make_llama, qlora
from tests.s3 import BUCKET, S3

RunFile = Callable[..., Path]
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PARTS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    """All tensors of a folder with safetensors."""
    return {name: value for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(expected) and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )


def save_old(content: Any, path: Path) -> None:
    """As torch did before 1.6: no zip archive, so it cannot be read in place."""
    torch.save(content, path, _use_new_zipfile_serialization=False)


def pickled(model: Path, folder: Path, parts: int = 1, save: Callable[[Any, Path], None] = save_old) -> Path:
    """The model in `folder`, its weights pickled into one file or into two with an index."""
    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    state = weights(model)
    if parts == 1:
        save(state, folder / BIN)
        return folder
    names = sorted(state)
    halves = {PARTS[0]: names[::2], PARTS[1]: names[1::2]}
    for part, inside in halves.items():
        save({name: state[name] for name in inside}, folder / part)
    places = {name: part for part, inside in halves.items() for name in inside}
    (folder / BIN_INDEX).write_text(json.dumps({"weight_map": places}))
    return folder


def quiet(store: Store, storage: Storage | None = None) -> Store:
    return converted(store, storage or Storage(), lambda line: None)


def trained(path: Path, said: list[str] | None = None, *overrides: str) -> list[float]:
    config = parse_config(path.read_text(), overrides)
    train(config, World(), (said if said is not None else []).append)
    return losses(Path(config.output.url))


@pytest.mark.parametrize("parts", [1, 2], ids=["single", "sharded with index"])
def test_pickled_weights_train_to_the_very_same_losses(
    run_file: RunFile, tiny_model: Path, tmp_path: Path, parts: int
) -> None:
    folder, said = pickled(tiny_model, tmp_path / "pickled", parts), list[str]()
    expected = trained(run_file("plain"))
    storage = {"cache_dir": str(tmp_path / "cache")}
    found = trained(run_file("pickled", model={"name": str(folder)}, storage=storage), said)
    assert found == expected and len(found) == 3
    (made,) = (path for path in (tmp_path / "cache/converted").iterdir() if path.is_dir())
    sentence = f"{folder} holds pickled weights: converted to safetensors once, into {made}"
    assert said.count(sentence) == 1


def test_the_ranks_of_a_node_convert_once_and_leave_nothing(
    run_file: RunFile, tiny_model: Path, tmp_path: Path
) -> None:
    folder = pickled(tiny_model, tmp_path / "pickled", 2)
    config = run_file("two", model={"name": str(folder)}, parallel={"strategy": "zero3"})
    (tmp_path / "tmp").mkdir()
    done = qlora("train", config, "parallel.processes=2", env={"TMPDIR": str(tmp_path / "tmp")})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("converted to safetensors for this run") == 1
    assert losses(tmp_path / "out/two") == pytest.approx(trained(run_file("plain")), rel=1e-5)
    assert list((tmp_path / "tmp" / f"qlora-converted-{os.getuid()}").iterdir()) == []


@pytest.mark.parametrize("parts", [1, 2])
def test_pickled_weights_become_the_same_tensors(tiny_model: Path, tmp_path: Path, parts: int) -> None:
    found = quiet(Store(str(pickled(tiny_model, tmp_path / "pickled", parts))))
    assert same(weights(found.url), weights(tiny_model))
    assert len(json.loads(found.read(INDEX))["weight_map"]) == len(read_headers(found)) == len(weights(tiny_model))


def test_parts_without_an_index_are_taken_as_they_are_numbered(tiny_model: Path, tmp_path: Path) -> None:
    folder = pickled(tiny_model, tmp_path / "pickled", 2)
    (folder / BIN_INDEX).unlink()
    assert same(weights(quiet(Store(str(folder))).url), weights(tiny_model))
    (folder / PARTS[0]).unlink()
    with pytest.raises(ModelError) as refusal:
        quiet(Store(str(folder)))
    assert str(refusal.value) == (
        f"{folder} holds 1 parts of pytorch_model.bin, their names say 2. Copy the checkpoint again"
    )


def test_a_part_that_the_index_names_and_is_missing_is_named(tiny_model: Path, tmp_path: Path) -> None:
    folder = pickled(tiny_model, tmp_path / "pickled", 2)
    (folder / PARTS[1]).unlink()
    with pytest.raises(ModelError, match=rf"{BIN_INDEX} names 2 files, 1 are missing \({PARTS[1]}\). Copy the check"):
        quiet(Store(str(folder)))


def test_a_folder_in_a_bucket_is_converted_and_leaves_no_download_behind(
    s3: S3, tiny_model: Path, tmp_path: Path
) -> None:
    folder = pickled(tiny_model, tmp_path / "pickled", 2)
    url, storage = f"s3://{BUCKET}/{tmp_path.name}", Storage(**s3.storage, cache_dir=str(tmp_path / "cache"))
    for path in folder.iterdir():
        Store(url, storage).write(path.name, path.read_bytes())
    _, store = fetch(Model(name=url), storage)
    found = fetch_weights(Model(name=url), store, storage, lambda line: None)
    assert same(weights(found.url), weights(tiny_model))
    assert [name for name in found.names() if not name.endswith(".safetensors")] == [INDEX]


def test_safetensors_win_over_pickled_and_gguf_weights(tiny_model: Path, tmp_path: Path) -> None:
    torch.save({"other": torch.ones(1)}, tmp_path / BIN)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in tiny_model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    store = Store(str(tmp_path))
    assert fetch_weights(Model(name=str(tmp_path)), store, Storage()) is store


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["config.json", "training_args.bin", "optimizer.bin", "adapter_model.bin"], []),
        ([BIN, "training_args.bin"], [BIN]),
        ([*PARTS, BIN_INDEX], [*PARTS, BIN_INDEX]),
        ([BIN_INDEX, "a.gguf"], ["a.gguf"]),
        ([BIN, "a.gguf"], [BIN]),
        ([BIN, "model.safetensors"], []),
    ],
)
def test_only_a_checkpoints_own_files_are_converted(names: list[str], expected: list[str]) -> None:
    assert weight_files("folder", names) == expected


def test_tied_weights_are_kept_once_and_views_are_kept_apart(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    state = {"embed": whole, "head": whole, "left": whole[:, :3], "turned": whole.T, "flat": whole.view(-1)}
    expected = {name: value.clone() for name, value in state.items() if name != "head"}
    torch.save(state, tmp_path / BIN)
    assert same(weights(quiet(Store(str(tmp_path))).url), expected)


def test_a_tied_pickled_model_fits_its_config(run_file: RunFile, tiny_model: Path, tmp_path: Path) -> None:
    plain, tied = tmp_path / "plain", tmp_path / "tied"
    make_llama(plain, tie_word_embeddings=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (plain / name).write_bytes((tiny_model / name).read_bytes())
    pickled(plain, tied)
    save_old(transformers.AutoModelForCausalLM.from_pretrained(plain).state_dict(), tied / BIN)
    assert "lm_head.weight" in torch.load(tied / BIN)
    assert trained(run_file("tied", model={"name": str(tied)})) == trained(
        run_file("plain", model={"name": str(plain)})
    )


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "b": Evil()}, tmp_path / BIN)
    with pytest.raises(ModelError) as refusal:
        quiet(Store(str(tmp_path)))
    assert str(refusal.value) == (
        f"{tmp_path}/{BIN} holds more than weights (posix.mkdir) and is not opened, because that could run code. "
        "Where you trust its authors, load it and save the model as safetensors"
    )
    assert not Path("pwned").exists()


@pytest.mark.parametrize("content", [{}, {"step": 3}, [torch.ones(1)], {"model": {"a": torch.ones(1)}}], ids=str)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / BIN)
    with pytest.raises(ModelError, match=f"{BIN} holds no dictionary of tensors by name. Save the model as safet"):
        quiet(Store(str(tmp_path)))


def test_damaged_files_are_named(tiny_model: Path, tmp_path: Path) -> None:
    whole = (pickled(tiny_model, tmp_path / "pickled") / BIN).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nonsense", pickle.dumps({"a": 1})):
        (tmp_path / BIN).write_bytes(content)
        with pytest.raises(ModelError, match=rf"{tmp_path}/{BIN} is damaged \(.+\). Copy the file again"):
            quiet(Store(str(tmp_path)))
    (tmp_path / BIN).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 269060552\n")
    with pytest.raises(ModelError, match=f"{BIN} is a git-lfs pointer. Run git lfs pull"):
        quiet(Store(str(tmp_path)))


def test_a_second_run_on_the_node_converts_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, storage = Store(str(pickled(tiny_model, tmp_path / "pickled"))), Storage(cache_dir=str(tmp_path / "cache"))
    first = quiet(store, storage)
    monkeypatch.setattr(torch, "load", None)
    said: list[str] = []
    assert converted(store, storage, said.append).url == first.url and said == []


def test_changed_weights_are_converted_again(tmp_path: Path) -> None:
    storage = Storage(cache_dir=str(tmp_path / "cache"))
    (tmp_path / "real").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / BIN).symlink_to(tmp_path / "real" / BIN)
    for value in (1.0, 2.0):
        save_old({"a": torch.full((3,), value)}, tmp_path / "real" / BIN)
        for folder in ("real", "linked"):
            found = weights(quiet(Store(str(tmp_path / folder)), storage).url)
            assert same(found, {"a": torch.full((3,), value)})


def test_a_conversion_that_failed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, **how: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    save_old({"a": torch.ones(3)}, tmp_path / BIN)
    storage = Storage(cache_dir=str(tmp_path / "cache"))
    with monkeypatch.context() as patched:
        patched.setattr(convert, "save_file", full)
        with pytest.raises(
            ModelError, match=r"cannot be written \(No space left on device\). Set storage.cache_dir to"
        ):
            quiet(Store(str(tmp_path)), storage)
    assert [path.suffix for path in (tmp_path / "cache/converted").iterdir()] == [".lock"]
    assert set(weights(quiet(Store(str(tmp_path)), storage).url)) == {"a"}


WANTS = """
import sys
from job.config.running import Storage
from job.convert import converted
from job.store import Store

print(converted(Store(sys.argv[1]), Storage(), lambda line: print(line, file=sys.stderr)).url, flush=True)
sys.stdin.readline()
"""


def test_without_a_cache_the_last_process_that_uses_the_folder_removes_it(tmp_path: Path) -> None:
    save_old({"a": torch.ones(3)}, tmp_path / BIN)
    how: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", WANTS, tmp_path]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    first, second = (subprocess.Popen(command, cwd=REPOSITORY, env=env, **how) for _ in range(2))
    folders = [Path(user.stdout.readline().strip()) for user in (first, second)]
    assert folders[0] == folders[1] and folders[0].parent == tmp_path / f"qlora-converted-{os.getuid()}"
    _, said_first = first.communicate("\n")
    assert first.returncode == 0 and (folders[0] / INDEX).is_file()
    _, said_second = second.communicate("\n")
    assert second.returncode == 0 and not folders[0].exists()
    assert said_first + said_second == (
        f"{tmp_path} holds pickled weights: converted to safetensors for this run (storage.cache_dir would keep them), "
        f"into {folders[0]}\n"
    )
