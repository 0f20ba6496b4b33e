"""Speed and memory of a run on one GPU: a 7B Llama-2 shape with random weights (speed does not depend on them).

    python bench/one_gpu.py [FOLDER]

Prints one line a variant: tokens per second (median of the steps after the third) and peak memory from metrics.jsonl,
and the seconds from the start of `train` to the end of its first step. Results with date and hardware: bench/RESULTS.md.
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from job.config import RunConfig
from job.model import quiet_libraries
from job.train import train
from job.world import World

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
WORDS = 32000 - 4
STEPS = 9


def make_model(folder: Path) -> None:
    """The model and a tokenizer of one token a word."""
    if (folder / "config.json").exists():
        return
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=8192, eos_token_id=2, bos_token_id=1, **SHAPE)
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="2GB")
    torch.cuda.empty_cache()
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{i}": i + 4 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>").save_pretrained(folder)


def make_rows(path: Path, length: int, count: int) -> Path:
    """Rows of random words that fill a sequence each."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for _ in range(count):
        words = torch.randint(0, WORDS, (length - 1,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(f"w{i}" for i in words)}))
    path.write_text("\n".join(lines))
    return path


def measure(model: Path, work: Path, length: int, micro: int, **sections: dict[str, Any]) -> dict[str, Any]:
    """One run; its figures."""
    rows = make_rows(work / f"rows-{length}.jsonl", length, micro * STEPS)
    output = Path(tempfile.mkdtemp(dir=work)) / "out"
    values: dict[str, Any] = {
        "model": {"name": str(model)},
        "data": {"train": str(rows), "max_length": length},
        "train": {"max_steps": STEPS, "global_batch_size": micro, "micro_batch_size": micro, "learning_rate": 1e-4},
        "tracking": {"sinks": ["jsonl"]},
        "output": {"url": str(output)},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    torch.cuda.reset_peak_memory_stats()
    begun = time.time()
    train(RunConfig.model_validate(values), World(), lambda line: None)
    seconds = time.time() - begun
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    torch.cuda.empty_cache()
    return {
        "tokens_per_s": round(statistics.median(row["tokens_per_s"] for row in found[3:])),
        "peak_gib": found[-1]["memory_gib"],
        "whole_run_s": round(seconds, 1),
    }


def main(work: Path) -> None:
    quiet_libraries()
    work.mkdir(parents=True, exist_ok=True)
    model = work / "7b"
    make_model(model)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    variants = itertools.product(["full", "none"], [0.0, 0.05], ["adamw", "paged_adamw_8bit"])
    for recompute, dropout, optimizer in variants:
        if dropout and optimizer == "adamw":
            continue
        how = {"recompute": recompute, "optimizer": optimizer}
        figures = measure(model, work, 2048, 4, train=how, lora={"dropout": dropout})
        print(json.dumps({"shape": "4 x 2048", **how, "dropout": dropout, **figures}), flush=True)
    for length in (512, 8192):
        how = {"recompute": "full", "optimizer": "paged_adamw_8bit"}
        figures = measure(model, work, length, 1, train=how, lora={"dropout": 0.0})
        print(json.dumps({"shape": f"1 x {length}", **how, **figures}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/bench"))
