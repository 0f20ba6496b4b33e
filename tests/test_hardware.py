"""What a rank computes on."""

import re

import pytest
import torch

from job.errors import InputError
from job.hardware import count_gpus, peak_memory_gib, this_hardware


def test_more_ranks_than_gpus_on_a_node_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    expected = "LOCAL_RANK is 2, and this node shows 2 GPUs. Start as many ranks a node as it has GPUs"
    with pytest.raises(InputError, match=re.escape(expected)):
        this_hardware(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_it_is_the_cpu_and_its_memory() -> None:
    found = this_hardware(0)
    assert (found.device, found.bf16, count_gpus()) == ("cpu", True, 0)
    assert 0 < peak_memory_gib("cpu") < found.memory_gib
