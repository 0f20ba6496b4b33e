"""Pickled checkpoints are read in place, tensor by tensor: no copy on the disk, no code run."""

import json
import resource
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from job import pickled as pickled_module
from job.config.learning import Model
from job.config.running import Storage
from job.convert import converted
from job.errors import ModelError
from job.headers import read_headers
from job.pickled import pickled_header
from job.pretrained import fetch, fetch_weights
from job.published import published
from job.store import Store
from job.tensors import Tensor
from tests.conftest import losses, make_llama, qlora
from tests.s3 import BUCKET, S3
from tests.test_convert import BIN, PARTS, Evil, pickled, trained, weights

RunFile = Callable[..., Path]
DTYPE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
DTYPE |= {"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def read(store: Store, tensor: Tensor) -> torch.Tensor:
    content = store.read(tensor.file, tensor.start, tensor.start + tensor.nbytes)
    if not content:
        return torch.zeros(tensor.shape, dtype=DTYPE[tensor.dtype])
    return torch.frombuffer(bytearray(content), dtype=DTYPE[tensor.dtype]).view(tensor.shape)


def in_place(folder: Path | str, storage: Storage | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the ranges that its headers name."""
    store = Store(str(folder), storage)
    assert converted(store, Storage(), lambda line: None) is store, "nothing is converted"
    return {name: read(store, tensor) for name, tensor in read_headers(store).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", DTYPE.values(), ids=str)
def test_each_type_of_tensor_is_a_range_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    content = {"a": torch.arange(6).view(2, 3).to(dtype), "b": torch.ones((), dtype=dtype)}
    torch.save(content | {"empty": torch.zeros(0, 4, dtype=dtype)}, tmp_path / BIN)
    found = in_place(tmp_path)
    assert found.pop("empty").shape == (0, 4)
    assert same(found, content) and all(found[name].dtype == dtype for name in found)


def test_state_dicts_parameters_parts_of_a_storage_and_tied_names_are_read(tmp_path: Path) -> None:
    module, whole = torch.nn.Linear(3, 2), torch.arange(24.0).view(4, 6)
    state = OrderedDict(module.state_dict(keep_vars=True))
    state |= {"head": whole, "tied": whole, "rows": whole[1:3], "flat": whole.view(-1), "thin": whole[:, :1].T[:, :1]}
    torch.save(state, tmp_path / BIN)
    expected = {name: value.detach() for name, value in state.items() if name != "tied"}
    assert same(in_place(tmp_path), expected)


@pytest.mark.parametrize("parts", [1, 2], ids=["single", "sharded with index"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_run_reads_pickled_weights_where_they_are(
    run_file: RunFile, tiny_model: Path, tmp_path: Path, parts: int, cached: bool
) -> None:
    folder, said = pickled(tiny_model, tmp_path / "pickled", parts, torch.save), list[str]()
    storage = {"cache_dir": str(tmp_path / "cache")} if cached else {}
    found = trained(run_file("pickled", model={"name": str(folder)}, storage=storage), said)
    assert found == trained(run_file("plain")) and len(found) == 3
    assert "converted" not in "\n".join(said) and not (tmp_path / "cache/converted").exists()


def test_ranks_read_their_share_of_a_pickled_base(run_file: RunFile, tiny_model: Path, tmp_path: Path) -> None:
    folder = pickled(tiny_model, tmp_path / "pickled", 2, torch.save)
    config = run_file("two", model={"name": str(folder)}, parallel={"strategy": "zero3"})
    done = qlora("train", config, "parallel.processes=2")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "out/two") == pytest.approx(trained(run_file("plain")), rel=1e-5)


def test_a_plan_knows_the_memory_of_a_pickled_model(run_file: RunFile, tiny_model: Path, tmp_path: Path) -> None:
    folder = pickled(tiny_model, tmp_path / "pickled", 2, torch.save)
    plans = [
        json.loads(qlora("plan", path, "--json").stdout)
        for path in (run_file("plain"), run_file("pickled", model={"name": str(folder)}))
    ]
    assert plans[0]["memory_gib"] and plans[0]["memory_gib"] == plans[1]["memory_gib"]


def test_a_pickled_model_in_a_bucket_is_read_by_ranges(s3: S3, tiny_model: Path, tmp_path: Path) -> None:
    folder = pickled(tiny_model, tmp_path / "pickled", 2, torch.save)
    url, storage = f"s3://{BUCKET}/{tmp_path.name}", Storage(**s3.storage)
    for path in folder.iterdir():
        Store(url, storage).write(path.name, path.read_bytes())
    _, store = fetch(Model(name=url), storage)
    assert fetch_weights(Model(name=url), store, storage) is store
    assert weights(tiny_model).keys() == (found := in_place(url, storage)).keys()
    assert all(torch.equal(found[name], value) for name, value in weights(tiny_model).items())
    _, headers = published(Model(name=url), storage)
    assert {name: (one.shape, one.dtype) for name, one in headers.items()} == {
        name: (tuple(value.shape), "BF16") for name, value in weights(tiny_model).items()
    }


def test_looking_at_a_large_file_reads_little_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({f"layer.{number}": torch.zeros(1 << 18) for number in range(40)}, tmp_path / BIN)
    asked: list[int] = []

    class Counted(Store):
        def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
            content = super().read(name, start, stop)
            asked.append(len(content))
            return content

    assert len(pickled_header(Counted(str(tmp_path)), BIN, places=False) or {}) == 40
    assert len(asked) <= 6 and sum(asked) < 400_000, "of 42 MB"
    asked.clear()
    assert len(pickled_header(Counted(str(tmp_path)), BIN) or {}) == 40
    assert len(asked) <= 46 and sum(asked) < 400_000


def test_a_tied_model_as_transformers_saved_it_trains_as_its_safetensors(
    run_file: RunFile, tiny_model: Path, tmp_path: Path
) -> None:
    plain, tied = tmp_path / "plain", tmp_path / "tied"
    make_llama(plain, tie_word_embeddings=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (plain / name).write_bytes((tiny_model / name).read_bytes())
    pickled(plain, tied)
    torch.save(transformers.AutoModelForCausalLM.from_pretrained(plain).state_dict(), tied / BIN)
    assert trained(run_file("tied", model={"name": str(tied)})) == trained(
        run_file("plain", model={"name": str(plain)})
    )


def rewritten(path: Path, change: Callable[[dict[str, bytes]], None], how: int = zipfile.ZIP_STORED) -> None:
    """The archive with other content, or packed in another way."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    change(content)
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, text in content.items():
            archive.writestr(name, text)


def big_endian(content: dict[str, bytes]) -> None:
    content[next(name for name in content if name.endswith("byteorder"))] = b"big"


def cut_storage(content: dict[str, bytes]) -> None:
    name = next(name for name in content if name.endswith("data/0"))
    content[name] = content[name][:-1]


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("compressed", lambda path: rewritten(path, lambda content: None, zipfile.ZIP_DEFLATED)),
        (
            "big-endian",
            lambda path: rewritten(path, lambda content: content.update({f"{path.stem}/byteorder": b"big"})),
        ),
        ("short", lambda path: rewritten(path, cut_storage)),
        ("no pickle", lambda path: rewritten(path, lambda content: content.pop(f"{path.stem}/data.pkl"))),
        ("a view across", lambda path: torch.save({"a": torch.ones(2, 3).T}, path)),
        ("nested", lambda path: torch.save({"model": {"a": torch.ones(2)}}, path)),
        ("no tensors", lambda path: torch.save({}, path)),
        ("complex", lambda path: torch.save({"a": torch.ones(2, dtype=torch.complex64)}, path)),
        ("code", lambda path: torch.save({"a": torch.ones(2), "b": Evil()}, path)),
        ("cut off", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        ("empty", lambda path: path.write_bytes(b"")),
    ],
)
def test_what_cannot_be_read_in_place_is_left_to_the_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[Path], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(2, 3)}, tmp_path / BIN)
    assert pickled_header(Store(str(tmp_path)), BIN)
    spoil(tmp_path / BIN)
    assert pickled_header(Store(str(tmp_path)), BIN) is None
    with pytest.raises(ModelError, match=rf"{BIN} cannot be read in place. Training converts pytorch_model.bin"):
        read_headers(Store(str(tmp_path)))
    assert not Path("pwned").exists()


def test_a_storage_that_lies_elsewhere_than_the_directory_says_is_not_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2, 3)}, tmp_path / BIN)
    content = bytearray((tmp_path / BIN).read_bytes())
    with zipfile.ZipFile(tmp_path / BIN) as archive:
        entry = archive.getinfo(f"{Path(BIN).stem}/data/0")
    struct.pack_into("<4s", content, entry.header_offset, b"lost")
    (tmp_path / BIN).write_bytes(content)
    assert pickled_header(Store(str(tmp_path)), BIN) is None


def test_a_pickle_of_names_that_collide_with_attributes_builds_nothing(tmp_path: Path) -> None:
    class Sneaky:
        def __reduce__(self) -> tuple[Any, ...]:
            return getattr, (OrderedDict, "fromkeys")

    torch.save({"a": torch.ones(1), "b": Sneaky()}, tmp_path / BIN)
    assert pickled_header(Store(str(tmp_path)), BIN) is None


def crafted(path: Path, program: bytes) -> None:
    """A pickled file whose data.pkl is `program`, with a storage of four floats."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
VIEW = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00(K\x04t(K\x01t\x89Nt"
NAME = b"X\x01\x00\x00\x00w"


def test_a_crafted_pickle_as_torch_writes_it_is_read(tmp_path: Path) -> None:
    crafted(tmp_path / BIN, b"\x80\x02}" + NAME + VIEW + b"Rs.")
    assert same(in_place(tmp_path), {"w": torch.tensor([1.0, 2, 3, 4])})


@pytest.mark.parametrize(
    "program",
    [
        b"}" + NAME + VIEW + b"R}X\x06\x00\x00\x00offsetJ\xf0\xff\xff\xffsbs.",  # BUILD on a view
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__Ns\x86b.",  # BUILD on our function
        b"}" + b"X\x01\x00\x00\x00w\x85" + VIEW + b"Rs.",  # a name that is no text
        b"}" + b"K\x01" + VIEW + b"Rs.",
        b"}" + NAME + VIEW[:-1] + b"}X\x03\x00\x00\x00neg\x88stRs.",  # negated by metadata
        b"}" + NAME + VIEW.replace(b"K\x00(K\x04t", b"\x88(K\x04t") + b"Rs.",  # an offset that is true
    ],
    ids=["view changed", "function changed", "tuple", "number", "negated", "odd offset"],
)
def test_a_pickle_that_changes_what_was_built_or_means_more_is_not_read_in_place(
    tmp_path: Path, program: bytes
) -> None:
    before = pickled_module._tensor.__defaults__
    crafted(tmp_path / BIN, b"\x80\x02" + program)
    assert pickled_header(Store(str(tmp_path)), BIN) is None
    assert pickled_module._tensor.__defaults__ == before is not None


def test_negated_tensors_and_files_in_two_folders_are_left_to_the_conversion(tmp_path: Path) -> None:
    torch.save({"w": torch._neg_view(torch.arange(4.0))}, tmp_path / BIN)
    assert pickled_header(Store(str(tmp_path)), BIN) is None
    torch.save({"w": torch.ones(4)}, tmp_path / BIN)
    rewritten(tmp_path / BIN, lambda content: content.update({"evil/data/0": b"0" * 16}))
    assert pickled_header(Store(str(tmp_path)), BIN) is None


def test_a_number_that_a_pickle_makes_up_takes_no_memory(tmp_path: Path) -> None:
    memo = b"r" + struct.pack("<I", 2**32 - 1)  # LONG_BINPUT
    crafted(tmp_path / BIN, b"\x80\x02}" + memo + NAME + VIEW + b"Rs.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert same(in_place(tmp_path), {"w": torch.tensor([1.0, 2, 3, 4])})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000, "KiB"


def test_a_missing_part_is_named_before_anything_is_read(tiny_model: Path, tmp_path: Path) -> None:
    folder = pickled(tiny_model, tmp_path / "pickled", 2, torch.save)
    (folder / PARTS[1]).unlink()
    with pytest.raises(ModelError, match=rf"names 2 files, 1 are missing \({PARTS[1]}\)"):
        read_headers(Store(str(folder)))
