"""The base over ranks: byte for byte what DeepSpeed's own partition of a fully quantized model holds, and proven."""

import math
import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import deepspeed
import pytest
import torch
import transformers

from job.config import RunConfig
from job.errors import JobError
from job.group import connect, disconnect, joined
from job.headers import read_headers
from job.loading import fill
from job.matching import shares
from job.model import build
from job.plan import make_plan
from job.pretrained import fetch, read_config
from job.sharding import Receipts, gathered, whole
from job.tensors import Tensor
from job.weights import Piece, Share, split
from job.world import Hardware, World
from tests import forked  # noqa: F401 - its forking process has imported what is heavy
from tests.conftest import make_llama, settings
from tests.ranks import free_port

CPU = Hardware("cpu", "this CPU", bf16=True, memory_gib=8)
Act = Callable[..., Any]


def everywhere(act: Act, count: int, *words: Any, folder: Path, per_node: int = 0) -> list[Any]:
    """What `act(world, *words)` gives or raises on each of so many ranks, in processes of their own."""
    context, port = multiprocessing.get_context("forkserver"), free_port()
    worlds = [
        World(rank, count, rank % (per_node or count), local_world_size=per_node or count) for rank in range(count)
    ]
    arguments = [(act, world, words, port, folder / f"{world.rank}.pickle") for world in worlds]
    processes = [context.Process(target=_on_rank, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * count
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)]


def _on_rank(act: Act, world: World, words: tuple[Any, ...], port: int, result: Path) -> None:
    place = {"RANK": world.rank, "WORLD_SIZE": world.world_size, "LOCAL_RANK": world.local_rank, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    torch.set_num_threads(1)
    connect(world, "cpu")
    try:
        found = act(world, *words)
    except JobError as fault:
        found = str(fault)
    result.write_bytes(pickle.dumps(found))
    disconnect()


def _pair(world: World, folder: Path, kind: str, double: bool) -> tuple[Any, Any, Receipts]:
    """Our sharded base and DeepSpeed's, from the same checkpoint."""
    strategy = "hpz" if world.nodes > 1 else "zero3"
    run = RunConfig.model_validate(
        settings(
            folder,
            "rows.jsonl",
            "out",
            quantization={"type": kind, "double_quant": double},
            train={"global_batch_size": world.world_size, "micro_batch_size": 1, "precision": "bf16"},
            parallel={"strategy": strategy, "persistence": 0},
        )
    )
    plan = make_plan(run, world, CPU)
    files, checkpoint = fetch(run.model, run.storage)
    ours = build(read_config(files, run.model), run.model, run.quantization, "bf16", "bf16")
    wanted = shares(ours, read_headers(checkpoint), run.model.name)
    receipts = fill(ours, wanted, checkpoint, run, plan, world, lambda line: None)
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=None if kind == "none" else how
    ).requires_grad_(False)
    deepspeed.utils.groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # it makes hpZ's groups once a process
    deepspeed.zero.Init(module=stock, config_dict_or_path=plan.deepspeed())
    return ours, stock, receipts


def _valid(partition: torch.Tensor, place: int, numel: int) -> bytes:
    """The bytes of part number `place` before the end of the parameter: DeepSpeed does not initialise its padding."""
    filled = min(max(numel - place * partition.numel(), 0), partition.numel())
    return bytes(partition[:filled].view(torch.uint8).tolist())


def _differences(world: World, folder: Path, kind: str, double: bool) -> tuple[int, int, list[str]]:
    """(tensors, of these cut within a block of 64 weights, what differs)."""
    ours, stock, _ = _pair(world, folder, kind, double)
    expected, differing, unaligned = dict(stock.named_parameters()), [], 0
    for name, found in ours.named_parameters():
        other = expected.pop(name)
        about = [
            (value.ds_shape, value.ds_numel, value.ds_numel_aligned, value.ds_tensor.dtype) for value in (found, other)
        ]
        parts = [_valid(value.ds_tensor, world.rank, value.ds_numel) for value in (found, other)]
        unaligned += bool(found.ds_tensor.numel() % 32)
        if about[0] != about[1] or parts[0] != parts[1]:
            differing.append(name)
        if world.nodes > 1:
            place = world.rank % world.ranks_per_node
            second = [_valid(value.ds_secondary_tensor, place, value.ds_numel) for value in (found, other)]
            if second[0] != second[1] or not any(second[0]):
                differing.append(f"{name}, secondary")
        if isinstance(found, bitsandbytes.nn.Params4bit):
            states = [value.quant_state.absmax for value in (found, other)]
            if not torch.equal(*states):
                differing.append(f"{name}, scales")
    return len(dict(ours.named_parameters())), unaligned, differing + list(expected)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Tiny Llamas without and with tied embeddings."""
    folders = {tied: tmp_path_factory.mktemp(f"tied-{tied}") for tied in (False, True)}
    for tied, folder in folders.items():
        make_llama(folder, tie_word_embeddings=tied)
    return folders


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize(
    ("kind", "double", "tied"),
    [("nf4", True, False), ("nf4", False, False), ("fp4", True, False), ("nf4", True, True), ("none", True, False)],
)
def test_every_partition_is_deepspeeds_own(
    llamas: dict[bool, Path], tmp_path: Path, ranks: int, kind: str, double: bool, tied: bool
) -> None:
    for tensors, unaligned, differing in everywhere(_differences, ranks, llamas[tied], kind, double, folder=tmp_path):
        assert differing == []
        assert tensors == (20 if tied else 21)
        assert unaligned or ranks == 2, "some partitions end within a block"


@pytest.mark.parametrize(("ranks", "per_node"), [(4, 2), (6, 3)])
def test_the_nodes_copy_of_hpz_is_deepspeeds_own(
    llamas: dict[bool, Path], tmp_path: Path, ranks: int, per_node: int
) -> None:
    found = everywhere(_differences, ranks, llamas[False], "nf4", True, folder=tmp_path, per_node=per_node)
    assert [differing for _, _, differing in found] == [[]] * ranks


def _flipped(world: World, folder: Path, broken: int | None) -> str:
    """Prove the gathered base, in which rank `broken` sees one bit of one tensor turned."""
    ours, _, receipts = _pair(world, folder, "nf4", True)

    seen = [(name, tensor.clone()) for name, tensor in gathered(ours.named_parameters())]
    if world.rank == broken:
        dict(seen)["model.layers.1.mlp.up_proj.weight"].view(-1)[-1] ^= 1  # in the part that the last rank quantized
    receipts.prove(seen)
    return "proven"


@pytest.mark.parametrize("broken", [None, 0, 1])
def test_a_bit_that_turned_on_the_way_is_found_where_it_is_held(
    llamas: dict[bool, Path], tmp_path: Path, broken: int | None
) -> None:
    expected = ["proven", "proven"]
    if broken is not None:
        expected[broken] = (
            "model.layers.1.mlp.up_proj.weight: the bytes that rank 1 quantized are not those that rank "
            f"{broken} holds. Check memory and network of both"
        )
    assert everywhere(_flipped, 2, llamas[False], broken, folder=tmp_path) == expected


def _joined(world: World, sizes: list[int], kind: str) -> list[float]:
    own = torch.full((sizes[world.rank],), world.rank + 1).to(getattr(torch, kind))
    return joined(world, own, sizes).tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 1], [4, 3, 0], [4, 0, 0], [1, 0, 3], [0, 2, 5], [0, 0, 0]])
def test_parts_of_any_sizes_are_joined_in_the_order_of_ranks(tmp_path: Path, sizes: list[int], kind: str) -> None:
    expected = [rank + 1 for rank, size in enumerate(sizes) for _ in range(size)]
    assert everywhere(_joined, 3, sizes, kind, folder=tmp_path) == [expected] * 3


@pytest.mark.parametrize(
    ("numel", "unit", "ranks"), [(10, 1, 3), (10, 2, 3), (10, 2, 7), (10, 8, 3), (1, 2, 4), (64, 4, 4)]
)
def test_a_split_covers_everything_once_in_equal_steps_of_whole_units(numel: int, unit: int, ranks: int) -> None:
    tensor = Tensor("w", "BF16", (numel,), "model.safetensors", 0)
    parts = split(Share("w", tensor, 0, numel, True, unit), ranks)
    assert len(parts) == ranks
    assert [element for part in parts for element in range(part.start, part.stop)] == list(range(numel))
    step = math.ceil(math.ceil(numel / unit) / ranks) * unit
    assert all(part.stop - part.start in (0, step) or part.stop == numel for part in parts)


def _whole(world: World, row_scale: bool) -> tuple[Any, ...]:
    tensor = Tensor("w", "BF16", (5, 4), "model.safetensors", 0)
    share = Share("w", tensor, 0, 20, row_scale, 4 if row_scale else 1)
    mine = split(share, world.world_size)[world.rank]
    values = torch.arange(20, dtype=torch.int8)[mine.start : mine.stop]
    scale = torch.arange(5.0)[mine.start // 4 : mine.stop // 4] if row_scale else None
    (piece,) = whole([Piece(mine, values.view(-1, 4) if row_scale else values, row_scale=scale)], world)
    return piece.data.tolist(), None if piece.row_scale is None else piece.row_scale.tolist()


@pytest.mark.parametrize("row_scale", [False, True])
def test_a_piece_is_made_whole_with_its_shape_and_its_scales(tmp_path: Path, row_scale: bool) -> None:
    data = torch.arange(20).view(5, 4).tolist()
    scales = [0.0, 1.0, 2.0, 3.0, 4.0] if row_scale else None
    assert everywhere(_whole, 3, row_scale, folder=tmp_path) == [(data, scales)] * 3
