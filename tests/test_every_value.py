"""Every value of every setting that concerns training: it trains, equal to the reference where it must be, or is
refused in one sentence with exit code 2."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.conftest import alpaca_rows, losses, make_llama, make_tokenizer, metrics, write_rows
from tests.ranks import run_ranks

RunFile = Callable[..., Path]
Sections = Mapping[str, Mapping[str, Any]]
Run = Callable[..., list[float]]
RANKS = {"replicate": (2, 2), "zero2": (2, 2), "zero3": (2, 2), "hpz": (4, 2)}
"""Ranks and ranks on a node for each strategy."""


@pytest.fixture
def run(run_file: RunFile) -> Run:
    """The losses of 3 steps with these settings on so many ranks; whole=False shards even the smallest tensor."""

    def train(strategy: str | None = None, ranks: int = 0, /, name: str = "run", **sections: Any) -> list[float]:
        ranks, per_node = (ranks, ranks) if ranks else RANKS.get(strategy or "", (1, 1))
        parallel = {"strategy": strategy} if strategy else {}
        parallel |= {"persistence": 0} if strategy in ("zero3", "hpz") else {}
        config = run_file(
            name,
            **{
                **sections,
                "train": {"micro_batch_size": 1 if ranks > 1 else 2, **sections.get("train", {})},
                "parallel": {**parallel, **sections.get("parallel", {})},
            },
        )
        done = run_ranks(ranks, "train", config, per_node=per_node)
        assert [one.code for one in done] == [0] * ranks, "\n".join(one.err[-3000:] for one in done)
        return losses(config.parent / "out" / name)

    return train


@pytest.fixture(scope="module")
def known() -> dict[str, list[float]]:
    """Losses of one process, by settings."""
    return {}


@pytest.fixture
def reference(run: Run, known: dict[str, list[float]]) -> Run:
    """Losses of one process with these settings, made once."""

    def train(**sections: Any) -> list[float]:
        key = repr(sections)
        if key not in known:
            known[key] = run(name="reference", **sections)
        return known[key]

    return train


def falling(found: list[float]) -> bool:
    """Finite, and lower at the end than at the beginning."""
    return all(map(math.isfinite, found)) and found[-1] < found[0]


ALONE: list[Sections] = [
    *({"train": {"precision": name}} for name in ("auto", "bf16", "fp32")),
    *({"train": {"optimizer": name}} for name in ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")),
    *({"train": {"schedule": name, "warmup_steps": 0}} for name in ("linear", "cosine", "constant")),
    *({"train": {"warmup_steps": value}} for value in (0.5, 2)),
    {"train": {"weight_decay": 0.1}},
    *({"train": {"recompute": value}} for value in ("full", 1)),
    {"train": {"fused": False}},
    {"train": {"max_grad_norm": 0.0}},
    *({"quantization": {"type": name}} for name in ("nf4", "fp4", "int8", "none")),
    {"quantization": {"double_quant": False}},
    *({"quantization": {"compute_dtype": name}} for name in ("auto", "bf16", "fp16", "fp32")),
    *({"lora": {"bias": name}} for name in ("none", "all", "lora_only")),
    {"lora": {"rslora": True}},
    {"lora": {"dora": True}},
    *({"model": {"attention": name}} for name in ("auto", "eager", "sdpa")),
    {"data": {"packing": False}},
    {"data": {"learn": "last"}},
    {"data": {"shuffle": False}},
]


@pytest.mark.parametrize("sections", ALONE, ids=str)
def test_a_value_trains_in_one_process(run: Run, sections: Sections) -> None:
    assert falling(run(**sections))


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"recompute": "full"}},
        {"train": {"recompute": 1}},
        {"train": {"fused": False}},
        {"model": {"attention": "eager"}},
        {"train": {"micro_batch_size": 1}},
        {"train": {"micro_batch_size": 4}},
        {"train": {"optimizer": "paged_adamw_32bit"}},
        {"parallel": {"bucket": 100, "overlap_comm": False, "contiguous_gradients": False}},
    ],
    ids=str,
)
def test_what_is_a_matter_of_memory_and_speed_changes_no_loss(run: Run, reference: Run, sections: Sections) -> None:
    assert run(**sections) == pytest.approx(reference(), rel=1e-5)


def test_clipping_off_and_out_of_reach_are_the_same(run: Run) -> None:
    off, far = ({"train": {"max_grad_norm": value}} for value in (0.0, 1e9))
    assert run(name="off", **off) == run(name="far", **far)


PAIRS: list[Sections] = [
    {"train": {"optimizer": "adamw_8bit"}},
    {"train": {"optimizer": "paged_adamw_8bit"}},
    {"train": {"optimizer": "paged_adamw_32bit"}},
    {"train": {"recompute": "full"}},
    {"train": {"max_grad_norm": 0.0}},
    {"train": {"max_grad_norm": 0.1}},
    {"train": {"weight_decay": 0.1}},
    {"quantization": {"type": "none"}},
    {"quantization": {"type": "fp4"}},
    {"quantization": {"double_quant": False}},
    {"lora": {"bias": "all"}},
    {"lora": {"rslora": True}},
    {"model": {"attention": "eager"}},
    {"parallel": {"overlap_comm": False, "contiguous_gradients": False}},
    {"parallel": {"bucket": 100}},
]
SHARDED: list[Sections] = [
    {"parallel": {"prefetch": 0, "max_live": 0}},
    {"parallel": {"prefetch": 10**12, "max_live": 10**12}},
    {"parallel": {"persistence": 10**12}},
    {"parallel": {"persistence": 4096}},
    {"parallel": {"persistence": 700}},
    {"parallel": {"persistence": 700, "layer_gathers": False}},
    {"parallel": {"persistence": 700, "offload_optimizer": "cpu"}},
    *({"parallel": {"persistence": 700, "prefetch": 0}, "train": {"recompute": value}} for value in ("full", 1)),
    # plain products, of which autograd keeps a view of the gathered weight
    {"parallel": {"persistence": 700}, "quantization": {"type": "none"}, "lora": {"targets": ["q_proj", "v_proj"]}},
]


def pairs() -> list[Any]:
    """The two strategies that differ most with everything, the others with what is not theirs alone."""
    found = [("zero3", sections) for sections in [*PAIRS, *SHARDED]] + [("zero2", sections) for sections in PAIRS]
    few = [sections for sections in PAIRS if "optimizer" in sections.get("train", {}) or "quantization" in sections]
    found += [("hpz", sections) for sections in [*few[:4], *SHARDED[2:]]]
    found += [("replicate", sections) for sections in few[:4]]
    return [pytest.param(strategy, sections, id=f"{strategy}-{sections}") for strategy, sections in found]


@pytest.mark.parametrize(("strategy", "sections"), pairs())
def test_a_value_under_a_strategy_gives_the_losses_of_one_process(
    run: Run, reference: Run, strategy: str, sections: Sections
) -> None:
    alone = {name: section for name, section in sections.items() if name != "parallel"}
    found, expected = run(strategy, **sections), reference(**alone)
    # blocks of 8-bit moments begin where a rank's part begins
    eight_bit = "8bit" in str(sections)
    assert found == pytest.approx(expected, rel=2e-3 if eight_bit else 1e-5)
    assert falling(found)


@pytest.mark.parametrize("strategy", RANKS)
def test_bf16_gives_the_losses_of_one_process_within_its_rounding(run: Run, reference: Run, strategy: str) -> None:
    sections = {"train": {"precision": "bf16", "learning_rate": 1e-3}}
    assert run(strategy, **sections) == pytest.approx(reference(**sections), rel=2e-3)


@pytest.mark.parametrize(
    ("sections", "start"),
    [
        ({"quantization": {"type": "int8"}}, "quantization.type: int8 does not train under zero3, which would shard"),
        ({"lora": {"dora": True}}, "lora.dora: needs each weight's norm, and zero3 holds no whole weights"),
    ],
    ids=str,
)
def test_what_needs_whole_weights_trains_under_zero2_and_is_refused_under_zero3(
    run: Run, reference: Run, run_file: RunFile, sections: Any, start: str
) -> None:
    assert run("zero2", **sections) == pytest.approx(reference(**sections), rel=1e-5)
    refused = run_file("refused", **sections, train={"micro_batch_size": 1}, parallel={"strategy": "zero3"})
    done = run_ranks(2, "train", refused)
    assert [one.code for one in done] == [2, 2]
    assert f"  {start}" in done[0].err


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_biases_train_alike_where_the_model_has_them(run: Run, tmp_path: Path, strategy: str, bias: str) -> None:
    make_llama(tmp_path / "biased", attention_bias=True, mlp_bias=True)
    make_tokenizer(tmp_path / "biased")
    sections = {"model": {"name": str(tmp_path / "biased")}, "lora": {"bias": bias}}
    expected = run(name="one", **sections)
    assert run(strategy, name="ranks", **sections) == pytest.approx(expected, rel=1e-5)
    written = load_file(tmp_path / "out/ranks/adapter/adapter_model.safetensors")
    biases = [tensor for name, tensor in written.items() if name.endswith("bias")]
    assert len(biases) == 14 and all(tensor.abs().sum() > 0 for tensor in biases)


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        (
            {"train": {"precision": "fp16"}},
            "train.precision: fp16 does not train on a CPU. Use auto, bf16 or fp32",
        ),
        (
            {"model": {"attention": "flash_attention_2"}, "train": {"micro_batch_size": 1}},
            "model.attention: flash_attention_2 needs a GPU. Use sdpa",
        ),
        (
            {"model": {"attention": "flash_attention_3"}, "train": {"micro_batch_size": 1}},
            "model.attention: flash_attention_3 needs a GPU. Use sdpa",
        ),
        (
            {"parallel": {"strategy": "hpz"}},
            "parallel.strategy: hpz replicates between nodes, and here is one. Use zero3",
        ),
        (
            {"parallel": {"strategy": "replicate", "offload_parameters": "cpu"}},
            "parallel.offload_parameters: replicate holds the base on every GPU. Use zero3",
        ),
        (
            {"parallel": {"strategy": "zero2", "max_live": 1}},
            "parallel.max_live: zero2 gathers no weights. Leave it out, or use zero3",
        ),
    ],
    ids=str,
)
def test_a_value_that_cannot_train_here_is_one_sentence_and_exit_code_2(
    run_file: RunFile, sections: Sections, fault: str
) -> None:
    (done,) = run_ranks(1, "train", run_file(**sections))
    assert done.code == 2
    assert f"  {fault}" in done.err.splitlines()
    assert "Traceback" not in done.err


@pytest.mark.parametrize("offload", ["none", "cpu"])
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_tied_embeddings_train_alike(
    run: Run, reference: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, strategy: str, offload: str
) -> None:
    make_llama(tmp_path / "tied", tie_word_embeddings=True)
    make_tokenizer(tmp_path / "tied")
    model = {"model": {"name": str(tmp_path / "tied")}}
    parallel = {"offload_parameters": offload} if strategy == "zero3" else {"offload_optimizer": offload}
    expected = run(name="alone", **model)
    assert run(strategy, name="ranks", **model, parallel=parallel) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_last_batch_with_fewer_sequences_than_ranks_is_learnt_like_any(
    run_file: RunFile, run: Run, strategy: str
) -> None:
    # 9 rows, one a sequence: 8 and 1, and then again
    sections: Any = {
        "data": {"packing": False},
        "train": {"global_batch_size": 8, "max_steps": 4, "micro_batch_size": 1},
        "parallel": {"strategy": strategy},
    }
    write_rows(run_file("any").parent / "rows.jsonl", alpaca_rows(9))
    expected = run(name="one", data=sections["data"], train=sections["train"])
    assert run(strategy, 4, name="four", **sections) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "hpz"])
def test_fewer_held_out_rows_than_ranks_and_the_best_adapter_are_those_of_one_process(
    run: Run, run_file: RunFile, strategy: str
) -> None:
    # an answer that becomes less likely the more the others are learnt, so that the last step is not the best
    odd = [{"instruction": "Count to 3.", "input": "", "output": "QXZJ#@%&*" * 6}]
    held_out = write_rows(run_file("any").parent / "held-out.jsonl", odd)
    sections: Any = {
        "train": {"max_steps": 6, "learning_rate": 3e-2, "warmup_steps": 0, "schedule": "constant"},
        "evaluation": {"file": str(held_out), "every_steps": 1, "keep_best": True},
    }
    outputs = []
    for name, ranked in (("one", None), ("ranks", strategy)):
        run(ranked, name=name, **sections)
        outputs.append(held_out.parent / "out" / name)
    one, ranks = ([row["eval_loss"] for row in metrics(output) if "eval_loss" in row] for output in outputs)
    assert ranks == pytest.approx(one, rel=1e-4)
    assert min(one[1:]) < one[-1], "the last is not the best"
    assert_same_adapter(*outputs, tolerance=1e-3)


def assert_same_adapter(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The adapters under two outputs have the same tensors."""
    expected, found = (load_file(output / "adapter/adapter_model.safetensors") for output in (one, other))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert tensor.numel() and tensor.abs().sum() > 0, name
        assert torch.allclose(found[name], tensor, rtol=tolerance, atol=tolerance), name


@pytest.mark.parametrize("strategy", RANKS)
def test_the_adapter_is_that_of_one_process_and_loads_in_plain_peft(
    run: Run, tiny_model: Path, tmp_path: Path, strategy: str
) -> None:
    # eps of 1e-8 would turn rounding of gradients near 0 into steps; a low rate keeps them small
    sections = {"train": {"learning_rate": 1e-4}}
    run(name="one", **sections)
    run(strategy, name="ranks", **sections)
    assert_same_adapter(tmp_path / "out/one", tmp_path / "out/ranks")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = base(ids).logits
        tuned = peft.PeftModel.from_pretrained(base, str(tmp_path / "out/ranks/adapter"))
        assert not torch.equal(tuned(ids).logits, before)
    found = peft.get_peft_model_state_dict(tuned)
    written = load_file(tmp_path / "out/ranks/adapter/adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in written.items())
    assert len(found) == len(written)
