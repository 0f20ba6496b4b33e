"""Functions decorated with torch.compile while libraries are imported: compiled when called, and then as ever."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from job.compile_later import compiled_when_called

LOADED = """
import sys
from job.compile_later import compiled_when_called
with compiled_when_called():
    import bitsandbytes, deepspeed
    from deepspeed.runtime.zero.muon import muon_optimizer
print(*(name for name in ("torch._dynamo", "torch._inductor.compile_fx") if name in sys.modules), "none")
"""


def test_functions_are_compiled_at_their_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    at_once = lambda model, **how: (compiled.append((model.__name__, how)), model)[1]  # noqa: E731
    monkeypatch.setattr(torch, "compile", at_once)
    with compiled_when_called():

        @torch.compile
        def double(x: int) -> int:
            """Twice as much."""
            return 2 * x

        @torch.compile(dynamic=False)
        def triple(x: int, *, more: int = 0) -> int:
            return 3 * x + more

    assert torch.compile is at_once and not compiled
    assert (double(2), double(3), triple(1, more=1)) == (4, 6, 4)
    assert compiled == [("double", {}), ("triple", {"dynamic": False})], "each once"
    assert double.__doc__ == "Twice as much."


def test_modules_are_compiled_at_once_and_torch_is_whole_after_a_fault() -> None:
    at_once = torch.compile
    with pytest.raises(KeyError), compiled_when_called():
        assert isinstance(torch.compile(nn.Linear(2, 2), backend="eager"), torch._dynamo.OptimizedModule)
        raise KeyError
    assert torch.compile is at_once


def test_what_libraries_decorate_does_not_bring_torchs_compiler() -> None:
    said = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "none"
