"""The whole walk on a tiny model: same seed same losses, packed equals unpacked, plain peft equals ours."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from job import adapter
from job.config import parse_config
from job.engine import Engine
from job.errors import AdapterError, InputError, JobError, ModelError, OutputError
from job.report import summary
from job.train import train
from job.world import World
from tests.conftest import REPOSITORY, alpaca_rows, losses, make_llama, make_tokenizer, metrics, write_rows
from tests.ranks import run_ranks

RunFile = Callable[..., Path]
HALF = {"dropout": 0.5}


def run(path: Path, *overrides: str) -> Path:
    """Train in this process; returns the output folder."""
    config = parse_config(path.read_text(), overrides)
    train(config, World(), lambda line: None)
    return Path(config.output.url)


def close(found: list[float], expected: list[float], relative: float = 1e-5) -> bool:
    """Whether all losses agree."""
    return len(found) == len(expected) and all(
        math.isclose(a, b, rel_tol=relative) for a, b in zip(found, expected, strict=True)
    )


def test_a_run_leaves_settings_metrics_status_and_adapter(run_file: RunFile) -> None:
    out = run(run_file(evaluation={"share": 0.25}))
    rows = metrics(out)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3]
    keys = {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "tokens_per_s",
        "samples_per_s",
        "memory_gib",
    }
    assert all(set(row) == keys for row in rows if "loss" in row)
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["reason"], status["step"]) == ("finished", "", 3)
    assert (status["checkpoint"], status["restarts"]) == (3, 0)
    manifest = json.loads((out / "checkpoints/step-00000003/manifest.json").read_text())
    assert (manifest["step"], manifest["eval_loss"]) == (3, rows[-1]["eval_loss"])
    assert sorted(manifest["parts"]) == sorted(
        file.name for file in (out / "checkpoints/step-00000003").iterdir() if file.name != "manifest.json"
    )
    assert parse_config((out / "run.yaml").read_text()).train.max_steps == 3
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {
        f.name for f in (out / "adapter").iterdir()
    }


def refuse_to_load(*arguments: Any) -> None:
    raise AssertionError("a finished run needs no model")


def test_a_finished_run_is_left_alone_and_goes_on_when_it_shall_be_longer(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = {"schedule": "constant", "warmup_steps": 0}
    judged = {"share": 0.25, "every_steps": 1}
    whole = run(run_file("whole", lora=HALF, evaluation=judged, train={**flat, "max_steps": 5}))
    path = run_file("parts", lora=HALF, evaluation=judged, train={**flat, "max_steps": 3})
    out = run(path)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    with monkeypatch.context() as patched:
        patched.setattr("job.train.build", refuse_to_load)
        assert run(path) == out
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    with pytest.raises(
        OutputError, match=r"other fixed settings\n  train.seed: 42 there, 7 here\n  Use another output"
    ):
        run(path, "train.max_steps=5", "train.seed=7")
    run(path, "train.max_steps=5")
    assert timeless(out) == timeless(whole)
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    assert (out / "adapter/adapter_model.safetensors").read_bytes() == (
        whole / "adapter/adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    weights: list[dict[str, torch.Tensor]] = []
    before = Engine.train_step

    def watched(self: Engine, batch: Any, *others: Any) -> Any:
        loss_sum = self._loss_sum
        if batch.step == 1:
            monkeypatch.setattr(self, "_loss_sum", lambda micro_batch: loss_sum(micro_batch) * math.nan)
        weights.append(self.gather())
        step = before(self, batch, *others)
        weights.append(self.gather())
        monkeypatch.setattr(self, "_loss_sum", loss_sum)
        return step

    monkeypatch.setattr(Engine, "train_step", watched)
    out = run(run_file(train={"precision": precision, "max_steps": 4}))
    assert [row.get("left_out", 0) for row in metrics(out)] == [0, 1, 0, 0]
    assert [row["loss"] is None for row in metrics(out)] == [False, True, False, False]
    moved = [any(not torch.equal(one[name], other[name]) for name in one) for one, other in pairwise(weights)]
    assert moved == [True, False, False, False, True, False, True]
    assert all(tensor.isfinite().all() for tensor in weights[-1].values())
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["checkpoint"]) == ("finished", 4)


def timeless(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics without what differs between two equal runs."""
    return [{k: v for k, v in row.items() if "_s" not in k and k != "memory_gib"} for row in metrics(out)]


def test_the_same_seed_gives_the_same_losses_bit_for_bit_and_another_does_not(run_file: RunFile) -> None:
    first = run(run_file("a", lora=HALF, evaluation={"share": 0.25}))
    second = run(run_file("b", lora=HALF, evaluation={"share": 0.25}))
    assert timeless(first) == timeless(second)
    assert load_file(first / "adapter/adapter_model.safetensors").keys()
    assert (first / "adapter/adapter_model.safetensors").read_bytes() == (
        second / "adapter/adapter_model.safetensors"
    ).read_bytes()
    assert losses(run(run_file("c", lora=HALF, train={"seed": 7}))) != losses(first)


def test_accumulation_micro_batches_and_recomputation_never_change_a_loss_even_with_dropout(run_file: RunFile) -> None:
    one = losses(run(run_file("one", lora=HALF, train={"micro_batch_size": 1})))
    assert close(losses(run(run_file("four", lora=HALF, train={"micro_batch_size": 4}))), one)
    assert close(
        losses(run(run_file("again", lora=HALF, train={"micro_batch_size": 1, "recompute": "full"}))), one, 1e-7
    )


def test_a_packed_run_equals_the_unpacked_one(run_file: RunFile, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", alpaca_rows(7))  # all of them fit one sequence
    shared = {"max_length": 512, "shuffle": False}
    packed = run(run_file("packed", data=shared, train={"global_batch_size": 1, "micro_batch_size": 1, "max_steps": 5}))
    padded = run(
        run_file(
            "padded",
            data={**shared, "packing": False},
            train={"global_batch_size": 7, "micro_batch_size": 7, "max_steps": 5},
        )
    )
    assert [row["samples_per_s"] > 0 for row in metrics(packed)]
    assert {row["tokens"] for row in metrics(packed)} == {row["tokens"] for row in metrics(padded)}
    assert close(losses(packed), losses(padded))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_have_exactly_the_logits_they_have_alone(tiny_model: Path, attention: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, attn_implementation=attention
    )
    first, second = torch.arange(20)[None] + 3, torch.arange(31)[None] + 100
    packed = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(20), torch.arange(31)])[None]
    with torch.no_grad():
        together = model(packed, position_ids=positions, use_cache=False).logits
        alone = [
            model(ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False).logits for ids in (first, second)
        ]
    assert torch.allclose(together, torch.cat(alone, dim=1), rtol=0, atol=1e-6)


def reference(path: Path, packed_batches: Any, steps: int) -> list[float]:
    """The same run written with transformers, peft and torch alone: one row a forward, masked mean over all tokens."""
    config = parse_config(path.read_text())
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        config.model.name, dtype=torch.float32, quantization_config=quantization
    )
    start = load_file(Path(config.output.url).parent / "start/adapter/adapter_model.safetensors")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM"))
    peft.set_peft_model_state_dict(model, start)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    found = []
    for rows in packed_batches[:steps]:
        total, learnt = torch.zeros(()), 0
        for ids, learn in rows:
            labels = torch.where(torch.tensor(learn), torch.tensor(ids).long(), -100)[None]
            logits = model(torch.tensor(ids).long()[None], use_cache=False).logits
            total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
            learnt += int((labels[0, 1:] != -100).sum())
        loss = total / learnt
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_losses_equal_those_of_a_plain_loop_in_transformers_and_peft(run_file: RunFile) -> None:
    """Quantization, masking, loss, accumulation, clipping and optimizer at once."""
    from job.data.load import load_dataset
    from job.tokenizer import Tokenizer

    flat = {"schedule": "constant", "warmup_steps": 0, "max_steps": 4}
    run(run_file("start", train={**flat, "max_steps": 1, "learning_rate": 1e-30}))  # its adapter is the initial one
    path = run_file("ours", train=flat)
    ours = losses(run(path))
    config = parse_config(path.read_text())
    data = load_dataset(config, Tokenizer(config.model.name))
    batches = []
    for batch in data.train.from_step(0):
        batches.append([data.train.tokens[row] for sequence in batch.sequences for row in sequence])
        if len(batches) == 4:
            break
    assert close(ours, reference(path, batches, 4))
    assert ours[0] > ours[-1]


def test_the_adapter_in_plain_peft_equals_ours(run_file: RunFile, tiny_model: Path) -> None:
    path = run_file(train={"max_steps": 4})
    out = run(path)
    from job.generate import Responder

    ours = Responder(parse_config(path.read_text()))
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    named = json.loads((out / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tiny_model)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        named, dtype=torch.float32, quantization_config=quantization
    )
    for module in base.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    plain = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
    ids = torch.tensor([transformers.AutoTokenizer.from_pretrained(out / "adapter").encode("Count to seven in words.")])
    with torch.no_grad():
        tuned, theirs = ours.model(ids).logits, plain(ids).logits
        with plain.disable_adapter():
            untouched = plain(ids).logits
    assert (tuned - theirs).abs().max() < 1e-5
    assert (tuned - untouched).abs().max() > 1e-2


QUANTIZATIONS = [{"type": kind} for kind in ("nf4", "fp4", "int8", "none")] + [{"double_quant": False}]
OPTIMIZERS = ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
ADAPTERS = [
    {"rslora": True},
    {"dora": True},
    {"bias": "lora_only"},
    {"targets": ["q_proj", "v_proj"]},
    {"dropout": 0.1},
]


@pytest.mark.parametrize(
    "sections",
    [
        *({"quantization": value} for value in QUANTIZATIONS),
        *({"train": {"optimizer": value}} for value in OPTIMIZERS),
        *({"lora": value} for value in ADAPTERS),
        *({"train": {"precision": value}} for value in ("bf16", "fp32", "auto")),
        *({"train": {"schedule": value, "warmup_steps": 1}} for value in ("linear", "cosine", "constant")),
        {"quantization": {"compute_dtype": "bf16"}},
        {"train": {"max_grad_norm": 0.0, "weight_decay": 0.1}},
        {"model": {"attention": "eager"}},
        {"data": {"learn": "last", "workers": 2}},
        {"parallel": {"bucket": 1000, "strategy": "replicate", "processes": 1}},
    ],
    ids=str,
)
def test_every_value_of_every_setting_trains(run_file: RunFile, sections: dict[str, Any]) -> None:
    out = run(run_file(**sections), "train.max_steps=5")
    assert losses(out)[-1] < losses(out)[0]


def test_learning_rates_are_those_of_the_schedule(run_file: RunFile) -> None:
    out = run(run_file(train={"schedule": "linear", "warmup_steps": 2, "max_steps": 6}))
    assert [row["learning_rate"] for row in metrics(out)] == pytest.approx([5e-3, 1e-2, 1e-2, 7.5e-3, 5e-3, 2.5e-3])


def test_epochs_are_counted_in_whole_batches(run_file: RunFile) -> None:
    out = run(run_file(data={"packing": False}, train={"max_steps": None, "epochs": 1.5, "global_batch_size": 10}))
    assert [row["epoch"] for row in metrics(out)] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3], abs=1e-4)


def test_evaluations_come_every_n_steps_and_training_stops_when_they_get_no_better(run_file: RunFile) -> None:
    wild = {"learning_rate": 0.05, "max_steps": 12, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": 0.0}
    out = run(run_file(train=wild, evaluation={"share": 0.25, "every_steps": 1, "patience": 1}))
    found = [row["eval_loss"] for row in metrics(out) if "eval_loss" in row]
    status = json.loads((out / "status.json").read_text())
    assert found[-1] >= found[-2] and all(a > b for a, b in pairwise(found[:-1]))
    assert status["step"] == len(found) - 1 < 12
    assert status["state"] == "finished"
    assert status["reason"] == f"early: 1 evaluations without a lower loss than {found[-2]:.4f}"


def test_keep_best_keeps_the_lowest_trained_one_even_when_the_base_was_better(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = iter([1.0, 5.0, 6.0, 7.0])  # a run that only gets worse, whatever the weights
    monkeypatch.setattr("job.engine.Engine.evaluate", lambda *words: next(planned))
    path = run_file(evaluation={"share": 0.25, "every_steps": 1, "keep_best": True})
    done = train(parse_config(path.read_text()), World(), lambda line: None)
    assert (done.eval_before, done.eval_after) == (1.0, 5.0)


def test_an_adapter_is_not_compared_under_other_settings(run_file: RunFile) -> None:
    path = run_file()
    run(path)
    from job.generate import Responder

    with pytest.raises(InputError, match=r"trained with other settings\n  lora.alpha: 8 there, 800 here"):
        Responder(parse_config(path.read_text(), ["lora.alpha=800"]))


def test_keep_best_writes_the_adapter_of_the_lowest_evaluation_loss(run_file: RunFile) -> None:
    steps = {"learning_rate": 0.5, "schedule": "constant", "warmup_steps": 0, "max_grad_norm": 0.0}
    judged = {"share": 0.25, "every_steps": 1}
    best = run(run_file("best", train={**steps, "max_steps": 6}, evaluation={**judged, "keep_best": True}))
    found = {row["step"]: row["eval_loss"] for row in metrics(best) if "eval_loss" in row and row["step"]}
    lowest = min(found, key=found.__getitem__)
    assert lowest < 6, "the run must get worse for this test to say anything"
    stopped = run(run_file("stopped", train={**steps, "max_steps": lowest}, evaluation=judged))
    kept, expected = (load_file(out / "adapter/adapter_model.safetensors") for out in (best, stopped))
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    told = next(summary(parse_config((best / "run.yaml").read_text())))
    assert told.endswith(f"before, {found[lowest]:.4f} after {lowest} steps")


def test_two_ranks_have_the_losses_of_one(run_file: RunFile) -> None:
    evaluation = {"share": 0.25}
    alone = run(run_file("alone", lora=HALF, evaluation=evaluation, train={"micro_batch_size": 1}))
    path = run_file("pair", lora=HALF, evaluation=evaluation, train={"micro_batch_size": 1})
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "job", "train", str(path)]
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    pair = path.parent / "out/pair"
    assert close(losses(pair), losses(alone))
    assert close(*([row["eval_loss"] for row in metrics(out) if "eval_loss" in row] for out in (pair, alone)))


def test_rows_longer_than_the_models_positions_are_refused_before_anything_is_written(
    run_file: RunFile, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": "word " * 2000}])
    with pytest.raises(ModelError, match=r"a row has 600 tokens, the model has 512 positions. Lower data.max_length"):
        run(run_file(data={"max_length": 600}))
    assert not (tmp_path / "out").exists()


def test_long_rows_are_not_packed_where_positions_depend_on_their_length(run_file: RunFile, tmp_path: Path) -> None:
    folder = tmp_path / "longrope"
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10000.0}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 64, **factors}
    make_llama(folder, rope_parameters=scaling)
    make_tokenizer(folder)
    write_rows(tmp_path / "rows.jsonl", [{"text": "word " * 50}, {"text": "short"}])
    with pytest.raises(ModelError, match=r"above 64 positions its longrope scaling .* Set data.packing: false"):
        run(run_file(model={"name": str(folder)}))
    run(run_file(model={"name": str(folder)}, data={"packing": False}))


def test_a_gpu_that_runs_out_of_memory_is_one_sentence_with_the_cure(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore about it")

    monkeypatch.setattr("job.engine.Engine.train_step", full)
    expected = r"the GPU's memory ran out after step 0 \(CUDA out of memory.* GiB.\). Lower train.micro_batch_size"
    with pytest.raises(JobError, match=expected):
        run(run_file())
    status = json.loads((tmp_path / "out/run/status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 0) and "train.recompute: full" in status["reason"]


@pytest.mark.parametrize(
    "fault", [MemoryError("no more"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 TB")]
)
def test_a_host_that_runs_out_of_memory_is_one_sentence_with_the_cure(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def full(*arguments: Any) -> None:
        raise fault

    monkeypatch.setattr("job.engine.Engine.train_step", full)
    with pytest.raises(JobError, match=r"this machine's memory ran out after step 0 \(.*\). Lower lora.rank, "):
        run(run_file())


def test_a_batch_that_the_ranks_cannot_share_is_refused(run_file: RunFile) -> None:
    for done in run_ranks(3, "train", run_file()):
        assert done.code == 2
        assert "4 is not a multiple of 6 (2 per rank x 3 ranks). Try 6 or 12" in done.err


GOOD = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "the adapter has 0 tensors, expected 2"),
        ({**GOOD, "a.lora_B.weight": torch.ones(0)}, r"a.lora_B.weight has shape \[0\], expected \[3, 2\]"),
        ({**GOOD, "a.lora_A.weight": torch.full((2, 3), torch.nan)}, "a.lora_A.weight is not finite"),
        ({**GOOD, "a.lora_A.weight": torch.zeros(2, 3)}, "a.lora_A.weight differs from what was trained"),
    ],
)
def test_an_adapter_that_is_not_the_trained_one_is_refused(found: dict[str, torch.Tensor], message: str) -> None:
    adapter.prove(GOOD, GOOD, trained=True)
    with pytest.raises(AdapterError, match=message):
        adapter.prove(found, GOOD, trained=True)


def test_an_adapter_that_learnt_nothing_is_refused() -> None:
    untouched = {**GOOD, "a.lora_B.weight": torch.zeros(3, 2)}
    with pytest.raises(AdapterError, match="all B matrices are zero: nothing was learnt"):
        adapter.prove(untouched, untouched, trained=True)


def test_a_tokenizer_without_a_pad_token_is_saved_as_it_was(run_file: RunFile, tiny_model: Path) -> None:
    saved, given = (transformers.AutoTokenizer.from_pretrained(f) for f in (run(run_file()) / "adapter", tiny_model))
    assert saved.pad_token is None
    assert (saved.eos_token, saved.get_vocab(), saved.chat_template) == (
        given.eos_token,
        given.get_vocab(),
        given.chat_template,
    )


def test_losses_fall_on_a_pattern(run_file: RunFile) -> None:
    out = run(run_file(train={"max_steps": 20}))
    firsts, lasts = losses(out)[:5], losses(out)[-5:]
    assert sum(lasts) < 0.92 * sum(firsts)  # random weights: only how often tokens come can be learnt
    assert all(a != b for a, b in pairwise(losses(out)))
    assert yaml.safe_load((out / "run.yaml").read_text())["train"]["max_steps"] == 20
