"""The headers of safetensors checkpoints: what is read, over which storage, and what is refused with which words."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from job.errors import ModelError
from job.headers import FIRST_READ, read_headers
from job.store import Store

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(4, dtype=torch.bfloat16)}
FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PARTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty checkpoint folder."""
    return Store(str(tmp_path / "model") if request.param == "file" else f"memory://{tmp_path}/model")


def write_sharded(store: Store) -> None:
    for part, name in zip(PARTS, TENSORS, strict=True):
        store.write(part, save({name: TENSORS[name]}))
    store.write(INDEX, json.dumps({"weight_map": dict(zip(TENSORS, PARTS, strict=True))}).encode())


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file whose header may be anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_a_single_file_gives_every_tensor_with_type_shape_and_place(store: Store) -> None:
    store.write(FILE, save(TENSORS, metadata={"format": "pt"}))
    headers = read_headers(store)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in headers.items()} == {
        "a.weight": ("F32", (2, 3)),
        "b.bias": ("BF16", (4,)),
    }
    a = headers["a.weight"]
    assert (a.numel, a.nbytes) == (6, 24)
    read = store.read(a.file, a.start, a.start + a.nbytes)
    assert torch.equal(torch.frombuffer(bytearray(read), dtype=torch.float32).view(2, 3), TENSORS["a.weight"])


def test_a_sharded_checkpoint_is_read_through_its_index(store: Store) -> None:
    write_sharded(store)
    store.write("consolidated.safetensors", save({"another": torch.ones(1)}))
    assert {name: tensor.file for name, tensor in read_headers(store).items()} == dict(zip(TENSORS, PARTS, strict=True))


def test_a_missing_part_is_named(store: Store) -> None:
    write_sharded(store)
    store.remove(PARTS[1])
    with pytest.raises(ModelError, match=rf"names 2 files, 1 are missing \({PARTS[1]}\). Copy the checkpoint again"):
        read_headers(store)


def test_a_damaged_index_is_named(store: Store) -> None:
    store.write(FILE, save(TENSORS))
    for damaged in (b'{"weight_map": ', b"[]", b"{}"):
        store.write(INDEX, damaged)
        with pytest.raises(ModelError, match=f"{INDEX} is damaged"):
            read_headers(store)


def test_a_folder_without_weights_says_what_is_there(store: Store) -> None:
    with pytest.raises(ModelError, match=r"no weights. Expected .* There is no such folder, or it is empty"):
        read_headers(store)
    store.write("config.json", b"{}")
    store.write("notes.txt", b"")
    with pytest.raises(ModelError, match=r"Expected model.safetensors .* The folder holds config.json, notes.txt"):
        read_headers(store)
    how = (
        "Training converts pytorch_model.bin, its parts or one GGUF file; other weights, and what only headers are "
        "read of, have to be saved as safetensors"
    )
    for name, why in (
        ("pytorch_model.bin", "/pytorch_model.bin cannot be read in place."),
        ("model.Q4_1.gguf", ": no weights. Expected model.safetensors or its parts."),
    ):
        store.write(name, b"")
        with pytest.raises(ModelError) as refusal:
            read_headers(store)
        assert str(refusal.value) == f"{store.url}{why} {how}"
        store.remove(name)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "empty": b"",
    "three bytes": b"abc",
    "no length": b"\xff" * 100,
    "no JSON": raw(b"{'a': "),
    "not UTF-8": raw(b"\xff\xfe\xfd"),
    "a list": raw([1, 2]),
    "no offsets": raw({"a": {"dtype": "F32", "shape": [2]}}),
    "shorter than its length": raw({"a": ENTRY}, length=5000),
    "shorter than its length by more than one read": raw({"a": ENTRY}, length=5 * FIRST_READ),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_header_is_refused_by_name(store: Store, content: bytes) -> None:
    store.write(FILE, content)
    with pytest.raises(
        ModelError, match=rf"{store.url}/{FILE}: the safetensors header is damaged .* Copy the file again"
    ):
        read_headers(store)


def test_a_git_lfs_pointer_is_recognised(store: Store) -> None:
    store.write(FILE, b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 269060552\n")
    with pytest.raises(ModelError, match="git-lfs pointer, so run git lfs pull"):
        read_headers(store)


def test_a_half_copied_file_is_refused_before_it_is_loaded(store: Store) -> None:
    whole = save(TENSORS)
    store.write(FILE, whole[:-1])
    with pytest.raises(ModelError, match=f"has {len(whole) - 1} bytes, its header says {len(whole)}. Copy the file"):
        read_headers(store)


def test_a_type_that_cannot_be_read_is_named(store: Store) -> None:
    store.write(FILE, raw({"a": {**ENTRY, "dtype": "F8_E4M3"}}, bytes(8)))
    with pytest.raises(ModelError, match=r"a has type F8_E4M3, expected one of F64, .* Give the 16-bit checkpoint"):
        read_headers(store)


def test_a_header_larger_than_the_first_read_is_read_whole(store: Store) -> None:
    many = {f"model.layers.{n}.mlp.down_proj.weight": torch.full((1,), float(n)) for n in range(3000)}
    store.write(FILE, save(many))
    (length,) = struct.unpack("<Q", store.read(FILE, 0, 8))
    assert length > 2 * FIRST_READ
    headers = read_headers(store)
    assert set(headers) == set(many)
    last = headers["model.layers.2999.mlp.down_proj.weight"]
    assert struct.unpack("<f", store.read(FILE, last.start, last.start + 4)) == (2999.0,)
