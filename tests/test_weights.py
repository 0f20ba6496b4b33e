"""The streaming quantizer: bit-equal to bitsandbytes, whole or in shares, and never reading more than its share."""

import json
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from job import weights
from job.config.learning import Quantization
from job.errors import ModelError
from job.headers import read_headers
from job.store import Store
from job.weights import BLOCK, Share, dequantized, fingerprint, split, stream

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class CountingStore(Store):
    """Adds up the bytes that are asked for."""

    asked = 0

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        content = super().read(name, start, stop)
        self.asked += len(content)
        return content


def checkpoint(folder: Path, values: torch.Tensor) -> tuple[CountingStore, Any]:
    save_file({"w": values}, folder / "model.safetensors")
    store = CountingStore(str(folder))
    tensor = read_headers(store)["w"]
    store.asked = 0
    return store, tensor


def whole_tensor(store: Store) -> torch.Tensor:
    return load_file(f"{store.url}/model.safetensors")["w"]


def assert_same_state(found: Any, expected: Any) -> None:
    assert torch.equal(found.absmax, expected.absmax)
    assert torch.equal(found.code, expected.code)
    assert (found.shape, found.dtype, found.blocksize, found.quant_type) == (
        expected.shape,
        expected.dtype,
        expected.blocksize,
        expected.quant_type,
    )
    assert (found.state2 is None) == (expected.state2 is None)
    if found.state2 is not None:
        assert torch.equal(found.offset, expected.offset)
        assert torch.equal(found.state2.absmax, expected.state2.absmax)
        assert torch.equal(found.state2.code, expected.state2.code)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("source", FLOATS)
def test_pieces_are_bit_equal_to_bitsandbytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, kind: str, double: bool
) -> None:
    monkeypatch.setattr(weights, "CHUNK", 1024)  # many chunks
    torch.manual_seed(0)
    store, tensor = checkpoint(tmp_path, torch.randn(96, 80).to(FLOATS[source]))
    full = whole_tensor(store).to(torch.bfloat16).view(96, 80)
    packed, state = bnb.quantize_4bit(full, compress_statistics=double, quant_type=kind)
    how = Quantization(type=kind, double_quant=double)
    (piece,) = stream(store, [Share("w", tensor, 0, tensor.numel, True)], how, torch.bfloat16, "cpu")
    assert torch.equal(piece.data, packed)
    assert_same_state(piece.state, state)
    (plain,) = dequantized([piece], torch.bfloat16)
    assert torch.equal(plain.data, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("seed", range(20))
def test_shares_of_any_number_of_ranks_join_to_the_whole_and_read_at_most_a_block_more(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    rows, columns, ranks = rng.randint(1, 40), 2 * rng.randint(1, 90), rng.randint(1, 7)
    source, kind = rng.choice(list(FLOATS)), rng.choice(["nf4", "fp4"])
    torch.manual_seed(seed)
    store, tensor = checkpoint(tmp_path, torch.randn(rows, columns).to(FLOATS[source]))
    packed, state = bnb.quantize_4bit(whole_tensor(store).float().view(rows, columns), quant_type=kind)
    data, scales = [], []
    for share in split(Share("w", tensor, 0, tensor.numel, True, unit=2 * rng.choice([1, 2, 4])), ranks):
        store.asked = 0
        how = Quantization(type=kind, double_quant=False)
        (piece,) = stream(store, [share], how, torch.float32, "cpu")
        first, last = share.start // BLOCK * BLOCK, min(-(-share.stop // BLOCK) * BLOCK, tensor.numel)
        assert store.asked == (last - first) * tensor.item_size * (share.start < share.stop)
        data.append(piece.data)
        scales.append(piece.state.absmax)  # type: ignore[union-attr]
        assert scales[-1].numel() == share.scales
    assert torch.equal(torch.cat(data), packed)
    assert torch.equal(torch.cat(scales), state.absmax)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_shares_of_a_tensor_that_lies_the_other_way_round_join_to_its_transpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.setattr(weights, "CHUNK", 1024)
    torch.manual_seed(0)
    store, tensor = checkpoint(tmp_path, torch.randn(30, 50))
    turned = whole_tensor(store).view(30, 50).T.contiguous()
    packed, state = bnb.quantize_4bit(turned, quant_type="nf4")
    shares = split(Share("w", tensor, 0, tensor.numel, True, unit=2, transposed=True), ranks)
    how = Quantization(type="nf4", double_quant=False)
    pieces = [piece for share in shares for piece in stream(store, [share], how, torch.float32, "cpu")]
    assert torch.equal(torch.cat([piece.data for piece in pieces]), packed)
    assert torch.equal(torch.cat([piece.state.absmax for piece in pieces]), state.absmax)  # type: ignore[union-attr]
    assert {piece.state.shape for piece in pieces} == {(50, 30)}  # type: ignore[union-attr]
    assert store.asked == sum(share.nbytes for share in shares) == ranks * tensor.nbytes
    (whole,) = dequantized(
        stream(store, [Share("w", tensor, 0, tensor.numel, True, transposed=True)], how, torch.float32, "cpu"),
        torch.float32,
    )
    assert torch.equal(whole.data, bnb.dequantize_4bit(packed, state).T)
    (row,) = stream(store, [shares[0]], Quantization(type="none"), torch.float32, "cpu")
    assert torch.equal(row.data.flatten(), turned.flatten()[: shares[0].stop])


def test_a_fingerprint_changes_with_any_byte_and_with_its_place() -> None:
    torch.manual_seed(0)
    data = torch.randint(0, 256, (40_003,), dtype=torch.uint8)
    marks = {int(fingerprint(data))}
    for place in (0, 1, 7, 8, 20_000, 40_002):
        changed = data.clone()
        changed[place] ^= 1
        marks.add(int(fingerprint(changed)))
    swapped = data.clone()
    swapped[:8], swapped[8:16] = data[8:16], data[:8]
    marks |= {int(fingerprint(swapped)), int(fingerprint(data[:-1]))}
    assert len(marks) == 9
    assert int(fingerprint(data[3:])) == int(fingerprint(data[3:].clone())), "wherever the bytes lie in memory"


def test_scales_are_nested_over_what_all_ranks_exchanged(tmp_path: Path) -> None:
    store, tensor = checkpoint(tmp_path, torch.randn(64, 64))
    whole = whole_tensor(store).view(64, 64)
    state = bnb.quantize_4bit(whole, compress_statistics=True, quant_type="nf4")[1]
    all_scales = bnb.quantize_4bit(whole, quant_type="nf4")[1].absmax
    first_half = Share("w", tensor, 0, tensor.numel // 2, True)
    (piece,) = stream(store, [first_half], Quantization(), torch.float32, "cpu", lambda own, share: all_scales)
    assert_same_state(piece.state, state)


def test_int8_rows_are_bit_equal_to_bitsandbytes(tmp_path: Path) -> None:
    store, tensor = checkpoint(tmp_path, torch.randn(48, 64))
    expected, scale, _ = bnb.int8_vectorwise_quant(whole_tensor(store).half().view(48, 64))
    whole = Share("w", tensor, 0, tensor.numel, True)
    (piece,) = stream(store, [whole], Quantization(type="int8"), torch.float32, "cpu")
    assert torch.equal(piece.data, expected)
    assert torch.equal(piece.row_scale, scale)  # type: ignore[arg-type]


def test_what_is_not_quantized_keeps_its_values_and_shape(tmp_path: Path) -> None:
    store, tensor = checkpoint(tmp_path, torch.arange(12.0).view(3, 4))
    (piece,) = stream(store, [Share("w", tensor, 0, 12, False)], Quantization(), torch.bfloat16, "cpu")
    assert piece.data.dtype == torch.bfloat16
    assert piece.data.tolist() == torch.arange(12.0).view(3, 4).tolist()


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    store, tensor = checkpoint(tmp_path, torch.randn(64, 64))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model.safetensors ends within bytes 72 to 16,456: the file is cut off"):
        list(stream(store, [Share("w", tensor, 0, tensor.numel, True)], Quantization(), torch.float32, "cpu"))


BOUNDED = """
import sys
from pathlib import Path
import torch
from job.config.learning import Quantization
from job.headers import read_headers
from job.store import Store
from job.weights import Share, stream

def peak():
    return next(int(line.split()[1]) >> 10 for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

store = Store(sys.argv[1])
shares = [Share(name, tensor, 0, tensor.numel, True, 2) for name, tensor in sorted(read_headers(store).items())]
small = Share(shares[0].name, shares[0].tensor, 0, 1 << 20, True, 2)
how = Quantization(double_quant=False)
list(stream(store, [small], how, torch.bfloat16, "cpu"))  # libraries and their pools
before = peak()
pieces = list(stream(store, shares, how, torch.bfloat16, "cpu"))
kept = sum(piece.data.numel() + 4 * piece.state.absmax.numel() for piece in pieces) >> 20
print(peak() - before, kept)
"""


def test_host_memory_is_the_pieces_and_a_bounded_buffer_never_the_checkpoint(tmp_path: Path) -> None:
    shape, count = [8192, 8192], 10
    each = 2 * shape[0] * shape[1]
    about = {
        f"w{n}": {"dtype": "BF16", "shape": shape, "data_offsets": [n * each, (n + 1) * each]} for n in range(count)
    }
    header = json.dumps(about).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + count * each)  # zeros, which take no disk
    done = subprocess.run([sys.executable, "-c", BOUNDED, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, kept = map(int, done.stdout.split())
    read_ahead, working = 256, 160
    assert grown < kept + read_ahead + working < count * each >> 20


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quantize", [True, False])
def test_values_that_are_not_finite_are_refused_by_the_tensors_name(
    tmp_path: Path, value: float, quantize: bool
) -> None:
    values = torch.randn(64, 64)
    values[40, 3] = value
    store, tensor = checkpoint(tmp_path, values)
    with pytest.raises(ModelError, match=r"model.safetensors: w holds values that are not finite. Copy the checkpoint"):
        list(stream(store, [Share("w", tensor, 0, tensor.numel, quantize, 2)], Quantization(), torch.bfloat16, "cpu"))
