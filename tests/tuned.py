"""Adapters that learnt something, written as plain peft writes them, and what the tuned models then compute."""

import shutil
from pathlib import Path
from typing import Any

import torch

import job
from job.config.learning import Lora
from job.model import add_adapter

LEGACY = Path(__file__).parent / "legacy_models"
IDS = torch.tensor([[5, 81, 17, 300, 2, 44, 129, 8]])


def logits(model: Any) -> torch.Tensor:
    """Of `IDS`."""
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
        return found


def base_logits(folder: Path) -> torch.Tensor:
    """What a checkpoint computes as it is, in fp32."""
    return logits(job.load_base(str(folder))[0])


def tuned(base: Path, folder: Path, **lora: Any) -> torch.Tensor:
    """Write an adapter of rank 4 with random products for the base in `base`; the logits of the tuned model in fp32."""
    torch.manual_seed(1)
    model, _ = job.load_base(str(base))
    settings = Lora(**{"rank": 4, "alpha": 8, "dropout": 0, **lora})
    model, _ = add_adapter(model, settings, 1, str(base), torch.float32)
    for name, value in model.named_parameters():
        if value.requires_grad and ".lora_A." not in name:
            value.data.add_(torch.randn_like(value), alpha=0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()
    return logits(model)


def checkpoint(source: Path, folder: Path) -> Path:
    """A copy of a legacy model, in a folder of its own."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, folder)
    return folder
