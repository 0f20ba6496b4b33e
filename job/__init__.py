"""Fine-tune a language model with QLoRA: rows in a bucket go in, a tuned adapter comes out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job.loading import load_base

__all__ = ["__version__", "load_base"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load_base`, imported when it is first asked for: it takes torch, which most of the command does not."""
    if name == "load_base":
        return import_module("job.loading").load_base
    raise AttributeError(f"module {__name__} has no attribute {name}")
