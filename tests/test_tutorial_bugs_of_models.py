"""What tutorials for these models get wrong between base, GPUs and adapter, each shown to be right here.

Other files hold what is no matter of tutorials alone: a base that is read in shares, and batches that count ranks
(test_presets, test_weights, test_plan); targets that a model does not have, and remote code (test_model); fp16 that
overflows (test_plan); FP4 beside NF4 (test_presets).
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import job
from job.config.learning import Lora
from job.families import adapted
from job.hardware import this_hardware
from job.model import add_adapter
from job.trained import trained_elements
from tests.ranks import run_ranks
from tests.test_shape import shape_of
from tests.test_tutorial_bugs import ORIGINALS

RunFile = Callable[..., Path]
LAYER = peft.tuners.lora.LoraLayer


def test_each_rank_computes_on_the_gpu_of_its_own_and_on_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    card = SimpleNamespace(major=9, name="NVIDIA H200", total_memory=140 << 30)
    fake = {"is_available": lambda: True, "device_count": lambda: 4, "get_device_properties": lambda number: card}
    for name, value in {**fake, "set_device": taken.append}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert [this_hardware(rank).device for rank in range(4)] == ["cuda"] * 4
    assert taken == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("chatglm2", ["query_key_value"]),
        ("chatglm3", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
        ("qwen1", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("qwen1", ["c_attn", "c_proj", "w1", "w2"]),
    ],
)
def test_lora_is_put_on_each_target_once_and_nothing_else_is_trained(name: str, targets: list[str]) -> None:
    base, _ = job.load_base(str(ORIGINALS / name))
    linears = dict.fromkeys(adapted(targets, base.config.model_type) or ())
    expected = [place for place, module in base.named_modules() if place.rpartition(".")[2] in linears]
    tuned, _ = add_adapter(base, Lora(rank=4, targets=targets), 1, "base", torch.float32)
    assert [place.removeprefix("base_model.model.") for place, _ in adapters(tuned)] == expected
    assert not any(list(adapters(module)) for _, layer in adapters(tuned) for module in layer.children())
    assert all(list(layer.lora_A) == ["default"] for _, layer in adapters(tuned))
    trained = sum(value.numel() for value in tuned.parameters() if value.requires_grad)
    assert trained == trained_elements(shape_of(ORIGINALS / name), 4, targets)


def adapters(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    return ((place, module) for place, module in model.named_modules() if isinstance(module, LAYER))


def test_under_zero3_no_rank_holds_the_adapter_and_the_file_holds_all_of_it(run_file: RunFile, tmp_path: Path) -> None:
    parallel = {"strategy": "zero3", "persistence": 0}
    config = run_file(parallel=parallel, train={"max_steps": 1, "global_batch_size": 2, "micro_batch_size": 1})
    done = run_ranks(2, "train", config)
    assert [one.code for one in done] == [0, 0], done[0].err
    written = load_file(tmp_path / "out/run/adapter/adapter_model.safetensors")
    assert len(written) == 2 * 7 * 2  # A and B, linears, layers
    assert all(value.dim() == 2 and 4 in value.shape and value.abs().max() > 0 for value in written.values())
