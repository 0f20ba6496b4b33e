"""On a GPU: packed rows by where they begin are as close to fp32 as with a mask, and come back from the host alike."""

import copy
from typing import Any

import pytest
import torch
import transformers

from job.attention_out import AttentionOutputs
from job.hardware import this_hardware
from job.host_inputs import HostInputs
from job.recompute import recompute_activations
from job.row_attention import attend_by_rows
from tests.native_models import GATED
from tests.test_row_attention import IDS, POSITIONS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GROUPS = {"as many keys as queries": 4, "groups": 2}


def learnt(model: Any) -> list[torch.Tensor]:
    """Logits of packed rows, and the gradient of the embedding, in fp32."""
    embedding = model.get_input_embeddings().weight
    embedding.grad = None
    positions = torch.from_numpy(POSITIONS).cuda()
    logits = model(input_ids=IDS.cuda(), position_ids=positions, use_cache=False).logits
    logits.float().square().mean().backward()
    return [logits.detach().float(), embedding.grad.float()]


def distance(found: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    return [float((one - other).norm() / other.norm()) for one, other in zip(found, exact, strict=True)]


@pytest.mark.parametrize("groups", GROUPS)
def test_rows_are_kept_apart_as_well_as_with_a_mask(groups: str) -> None:
    if groups == "groups" and this_hardware(0).rows != "grouped":
        pytest.skip("this torch takes as many keys as queries alone")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**GATED | {"num_key_value_heads": GROUPS[groups]}, initializer_range=0.2)
    model = transformers.AutoModelForCausalLM.from_config(config).cuda().train()
    exact = learnt(model)
    masked = model.bfloat16()
    by_rows, again = copy.deepcopy(masked), copy.deepcopy(masked)
    expected = distance(learnt(masked), exact)
    for one in (by_rows, again):
        rows = attend_by_rows(one)
        assert rows is not None
        rows.move(POSITIONS, "cuda")
    found = learnt(by_rows)
    assert all(one < 1.5 * other for one, other in zip(distance(found, exact), expected, strict=True))
    on_host = HostInputs()
    rows.outputs = AttentionOutputs(on_host)
    recompute_activations(again, on_host)
    for _ in range(2):
        kept = learnt(again)
        assert torch.equal(kept[0], found[0])
        assert distance(kept, found)[1] < 0.01  # FlashAttention sums gradients in no fixed order
    assert len(on_host.free) == 4
