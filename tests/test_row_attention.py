"""Attention of packed rows by where they begin is that with a mask, wherever it is taken."""

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import library
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from job import row_attention
from job.row_attention import Rows, attend_by_rows
from job.shape import CAUSAL, read_shape
from job.tensors import Tensor
from tests.native_models import CONFIGS, GATED, SMALL

TAKEN = {
    *("Llama 2", "Llama 3.2", "Mixtral", "OLMoE", "Qwen2.5", "Qwen3", "Qwen2-MoE", "Qwen3-MoE", "Gemma", "Phi-4"),
    *("GLM-4 (2024)", "GLM-4 (2025)", "Phi-4-mini"),
}
LENGTHS = ((5, 20, 7), (12, 1, 19))
POSITIONS = np.array([[place for length in row for place in range(length)] for row in LENGTHS])
IDS = torch.randint(3, 512, POSITIONS.shape, generator=torch.Generator().manual_seed(3))


def attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, begins: torch.Tensor, same: torch.Tensor,
    longest: int, as_long: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """What torch documents of varlen_attn, row by row: it has kernels for GPUs alone."""
    assert same is begins and longest == as_long == int(begins.diff().max()) and window_size == (-1, 0)
    assert begins.dtype == torch.int32 and begins[0] == 0 and begins[-1] == len(query) == len(key)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    rows = []
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        q, k, v = (one[begin:end].transpose(0, 1)[None] for one in (query, key, value))
        k, v = (repeat_kv(one, q.shape[1] // k.shape[1]) for one in (k, v))
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        rows.append(found[0].transpose(0, 1))
    return torch.cat(rows)


def register_for_cpu() -> None:
    """Kernels of torch's operation for this processor, by `attended`: what autograd does around it is torch's."""

    def forward(query: Any, key: Any, value: Any, begins: Any, same: Any, longest: int, *rest: Any) -> Any:
        grouped = key.shape[1] != query.shape[1]
        found = attended(
            query, key, value, begins, begins, longest, longest, scale=rest[2], window_size=(-1, 0), enable_gqa=grouped
        )
        return found, query.new_zeros(query.shape[1], len(query)), torch.zeros(2, dtype=torch.uint64)

    def backward(grad: Any, query: Any, key: Any, value: Any, out: Any, lse: Any, begins: Any, *rest: Any) -> Any:
        shared, scale, found = query.shape[1] // key.shape[1], rest[5], []
        for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
            q, dy, k, v = (one[begin:end].transpose(0, 1) for one in (query, grad, key, value))
            k, v = (one.repeat_interleave(shared, 0) for one in (k, v))
            later = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
            p = (q @ k.mT * scale).masked_fill(later, -torch.inf).softmax(-1)
            torch.testing.assert_close((p @ v).transpose(0, 1), out[begin:end])
            dp = dy @ v.mT
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
            dk, dv = (one.unflatten(0, (-1, shared)).sum(1) for one in (ds.mT @ q, p.mT @ dy))
            found.append([one.transpose(0, 1) for one in (ds @ k, dk, dv)])
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    library.register_kernel("torch_attn::_varlen_attn", "cpu", forward)
    library.register_kernel("torch_attn::_varlen_attn_backward", "cpu", backward)


def learnt(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of packed rows, and the gradient of the embedding."""
    embedding = model.get_input_embeddings().weight
    embedding.grad = None
    logits = model(input_ids=IDS, position_ids=torch.from_numpy(POSITIONS), use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), embedding.grad


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As there: torch's function, which has no kernel here, written out."""
    monkeypatch.setattr(row_attention, "varlen_attn", attended)


def of(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("family", CONFIGS)
def test_values_and_gradients_are_those_with_a_mask(family: str) -> None:
    model = of(CONFIGS[family])
    expected = learnt(model)
    rows = attend_by_rows(model)
    assert (rows is not None) == (family in TAKEN)
    if rows is not None:
        rows.move(POSITIONS, "cpu")
        for found, wanted in zip(learnt(model), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["Llama 2", "Qwen3"])
def test_torchs_own_operation_gives_them_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = of(CONFIGS[family])
    expected = learnt(model)
    rows = attend_by_rows(model)
    assert rows is not None
    rows.move(POSITIONS, "cpu")
    register_for_cpu()
    for found, wanted in zip(learnt(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_values_of_another_size_than_queries_are_refused() -> None:
    layer = of(CONFIGS["Llama 2"]).model.layers[0].self_attn
    layer.rows = Rows()
    q, v = torch.zeros(1, 4, 3, 16), torch.zeros(1, 4, 3, 8)
    with pytest.raises(RuntimeError, match="LlamaAttention: heads of 16 have values of 8"):
        row_attention._attend(layer, q, q, v, None)


def test_no_mask_is_made_and_a_row_a_sequence_takes_torchs_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = of(CONFIGS["Llama 2"])
    rows = attend_by_rows(model)
    assert rows is not None
    positions = np.tile(np.arange(32), (2, 1))
    rows.move(positions, "cpu")
    assert rows.begins is None  # else the kernel would be asked for, which fails here
    masks = []

    def plain(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **more: Any) -> Any:
        masks.append(mask)
        return query, None

    monkeypatch.setattr(row_attention, "sdpa_attention_forward", plain)
    model(input_ids=IDS, position_ids=torch.from_numpy(positions), use_cache=False)
    assert masks == [None, None]


def test_padding_is_a_row_and_so_is_a_single_token() -> None:
    rows = Rows()
    rows.move(POSITIONS, "cpu")
    assert rows.begins is not None
    assert rows.begins.tolist() == [0, 5, 25, 32, 44, 45, 64]
    assert rows.longest == 20
    rows.move(np.zeros((1, 1), np.int64), "cpu")
    assert rows.begins is None


def test_tokens_that_were_not_told_are_refused() -> None:
    model = of(CONFIGS["Llama 2"])
    rows = attend_by_rows(model)
    assert rows is not None
    rows.move(POSITIONS[:, :-1], "cpu")
    with pytest.raises(RuntimeError, match=r"rows of \(2, 31\) were told, attention got \(2, 32\)"):
        learnt(model)


@pytest.mark.parametrize(
    "config",
    [
        transformers.MistralConfig(**GATED, sliding_window=16),
        transformers.Qwen2Config(**GATED, use_sliding_window=True, sliding_window=16, max_window_layers=0),
        transformers.LlamaConfig(**GATED, head_dim=12),
        transformers.LlamaConfig(**GATED, attn_implementation="eager"),
        transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=512),
        transformers.GPTJConfig(vocab_size=512, n_embd=64, n_layer=2, n_head=4, rotary_dim=8),
    ],
    ids=["windows", "windows in some layers", "odd heads", "written out", "alibi", "attention of its own"],
)
def test_other_attention_stays_as_it_is(config: Any) -> None:
    assert attend_by_rows(of(config)) is None


PLANNED: dict[str, dict[str, Any]] = {
    "all there is": {},
    "no windows": {"sliding_window": None},
    "windows": {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
    "odd heads": {"hidden_size": 48, "head_dim": 12, "sliding_window": None},
}


@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("what", PLANNED)
def test_the_plan_takes_for_causal_what_is_taken(kind: str, what: str, tmp_path: Path) -> None:
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])
    sizes = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 48, "intermediate_size": 96}
    known = inspect.signature(model.config_class).parameters
    given = {name: value for name, value in (SMALL | sizes | PLANNED[what]).items() if name in known}
    config = model.config_class(**given)
    written = {"model_type": kind, **given}  # what transformers adds by itself is not there, as in old files
    with torch.device("meta"):
        made = model(config)
    tensors = {
        name: Tensor(name, "BF16", tuple(value.shape), "model.safetensors", 0)
        for name, value in made.state_dict().items()
    }
    assert read_shape(tensors, written).causal == (attend_by_rows(made) is not None)


def test_a_mistral_without_windows_is_taken() -> None:
    assert attend_by_rows(of(transformers.MistralConfig(**GATED, sliding_window=None))) is not None
