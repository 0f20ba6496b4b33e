"""Adapters on the parts of what a model's authors fused: an A each, or one for all of them."""

import json
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import job
from job import adapter
from job.config import parse_config
from job.config.learning import Lora
from job.errors import ConfigError
from job.model import add_adapter, lora_targets
from job.store import Store
from job.train import train
from job.trained import trained_elements
from job.world import World
from tests.conftest import alpaca_rows, losses, settings, write_rows
from tests.native_models import LEGACY, tiny
from tests.ranks import run_ranks
from tests.test_shape import shape_of


@pytest.mark.parametrize("share_a", [False, True])
def test_an_adapter_is_put_on_the_parts_of_a_fused_linear_and_counted_so(share_a: bool) -> None:
    lora = Lora(rank=4, targets=["query_key_value"], dropout=0, share_a=share_a)
    base, _ = job.load_base(str(LEGACY / "chatglm3"))
    before = torch.get_rng_state()
    tuned, _ = add_adapter(base, lora, 1, "base", torch.float32)
    assert torch.equal(torch.get_rng_state(), before), "numbers were drawn that are replaced"
    trained = {name: value.numel() for name, value in tuned.named_parameters() if value.requires_grad}
    owners = Counter(tuple(name.split(".")[-4:-2]) for name in trained)
    names = [("q_proj", "lora_A"), *(() if share_a else [("k_proj", "lora_A"), ("v_proj", "lora_A")])]
    assert owners == dict.fromkeys([*names, ("q_proj", "lora_B"), ("k_proj", "lora_B"), ("v_proj", "lora_B")], 2)
    shape = shape_of(LEGACY / "chatglm3")
    assert trained_elements(shape, 4, ["query_key_value"], share_a=share_a) == sum(trained.values())


def test_a_shared_a_is_trained_once_written_for_each_part_and_read_by_plain_peft(tmp_path: Path) -> None:
    folder = tiny("chatglm3", tmp_path / "chatglm3")
    rows = write_rows(tmp_path / "rows.jsonl", alpaca_rows(24))
    lora = {"rank": 4, "alpha": 8, "targets": ["query_key_value", "dense"], "share_a": True, "dropout": 0.1}
    found = []
    for ranks, parallel in ((1, {}), (2, {"strategy": "zero3", "persistence": 0})):
        values = settings(folder, rows, tmp_path / f"{ranks}", lora=lora, parallel=parallel)
        (tmp_path / "run.yaml").write_text(json.dumps(values))
        done = run_ranks(ranks, "train", tmp_path / "run.yaml")
        assert [one.code for one in done] == [0] * ranks, done[0].err
        found.append(losses(tmp_path / f"{ranks}"))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    for steps in (2, 3):  # stopped after two, and resumed
        values = settings(folder, rows, tmp_path / "resumed", lora=lora, train={"max_steps": steps})
        train(parse_config(json.dumps(values), []), World(), lambda line: None)
    assert losses(tmp_path / "resumed")[2] == pytest.approx(found[0][2], rel=1e-2)  # the schedule was a shorter one
    written = load_file(tmp_path / "2/adapter/adapter_model.safetensors")
    for layer in (0, 1):
        place = f"base_model.model.model.layers.{layer}.self_attn"
        one, two, three = (written[f"{place}.{part}_proj.lora_A.weight"] for part in "qkv")
        assert torch.equal(one, two) and torch.equal(one, three)
    plain = peft.PeftModel.from_pretrained(job.load_base(str(folder))[0], tmp_path / "2/adapter").eval()
    ours, _ = add_adapter(job.load_base(str(folder))[0], Lora.model_validate(lora), 1, "base", torch.float32)
    adapter.load(ours, Store(str(tmp_path / "2/adapter")))
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(ours.eval()(ids).logits, plain(ids).logits)


def test_names_that_no_linear_has_are_refused_with_those_of_the_authors_too() -> None:
    base, _ = job.load_base(str(LEGACY / "qwen1"))
    with pytest.raises(ConfigError) as refused:
        lora_targets(base, ["c_attn", "query_key_value"])
    assert refused.value.faults == (
        "lora.targets: query_key_value: no such linear in this model. It has down_proj, gate_proj, k_proj, o_proj, "
        "q_proj, up_proj, v_proj; by its authors' names c_attn (q_proj, k_proj, v_proj), c_proj (o_proj, down_proj), "
        "w1 (up_proj), w2 (gate_proj)",
    )


def test_an_a_to_share_is_refused_where_nothing_was_fused(tiny_model: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        add_adapter(job.load_base(str(tiny_model))[0], Lora(share_a=True), 1, "base", torch.float32)
    assert refused.value.faults == (
        "lora.share_a: the authors of llama fused no linears that are parted here. Set it to false",
    )
