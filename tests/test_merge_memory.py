"""Merging takes as little memory as reading ahead does, however large the model."""

import json
import struct
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from job.adapter_file import find
from job.merge import merge
from job.store import Store

WIDE = transformers.LlamaConfig(
    vocab_size=64_000, hidden_size=1024, intermediate_size=32_768, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=8, architectures=["LlamaForCausalLM"],
)  # fmt: skip


def mib(name: str) -> float:
    """What the kernel counts of this process, such as VmRSS or, since the last reset, its peak VmHWM."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def hollow(folder: Path) -> int:
    """A checkpoint of zeros in bf16 that takes no room on the disk, in one file; its bytes."""
    folder.mkdir()
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in transformers.LlamaForCausalLM(WIDE).named_parameters()}
    entries, at = {}, 0
    for name, shape in shapes.items():
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + 2 * shape.numel()]}
        at += 2 * shape.numel()
    text = json.dumps(entries).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(WIDE.to_json_string())
    return at


def test_memory_is_bounded_by_what_is_read_ahead(tmp_path: Path) -> None:
    size = hollow(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    shapes = {f"model.layers.{layer}.mlp.down_proj": (1024, 32_768) for layer in range(3)}
    pairs = {f"base_model.model.{name}.lora_{part}.weight": torch.ones(8 if part == "A" else shape[0],
             shape[1] if part == "A" else 8) for name, shape in shapes.items() for part in "AB"}  # fmt: skip
    save_file(pairs, tmp_path / "adapter/adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(about))
    found = find(str(tmp_path / "adapter"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = mib("VmRSS")
    merge(found, Store(str(tmp_path / "out")), "native", None, lambda line: None)
    grown = mib("VmHWM") - before
    assert size > 800 << 20 and grown < 320, grown
