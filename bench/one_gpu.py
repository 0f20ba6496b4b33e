"""Speed and memory of a run on one GPU: a 7B Llama-2 shape with random weights (speed does not depend on them).

    python bench/one_gpu.py [FOLDER]

Prints one line a variant: tokens per second (median of the steps after the third) and peak memory from metrics.jsonl,
and the seconds that the whole command took besides its steps. Results with date and hardware: bench/RESULTS.md.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
WORDS = 32000 - 4
STEPS = 9
VARIANTS = [
    (2048, 4, "full", 0.0),
    (2048, 4, "full", 0.05),
    (2048, 4, "none", 0.0),
    (2048, 4, "none", 0.05),
    (512, 1, "none", 0.0),
    (8192, 1, "full", 0.0),
    (8192, 1, "none", 0.0),
]
"""Sequence length, sequences, recompute, dropout; each is measured with train.fused and without."""


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


def measure(model: Path, work: Path, length: int, micro: int, *overrides: str, ranks: int = 1) -> dict[str, float]:
    """One run in a process of its own, as users start it; its figures."""
    rows = make_rows(work / f"rows-{length}.jsonl", length, micro * ranks * STEPS)
    output = Path(tempfile.mkdtemp(dir=work)) / "out"
    values = {
        "model": {"name": str(model)},
        "data": {"train": str(rows), "max_length": length},
        "train": {
            "max_steps": STEPS,
            "global_batch_size": micro * ranks,
            "micro_batch_size": micro,
            "learning_rate": 1e-4,
        },
        "tracking": {"sinks": ["jsonl"]},
        "output": {"url": str(output)},
    }
    config = work / "run.yaml"
    config.write_text(json.dumps(values))  # JSON is YAML
    begun = time.time()
    words = [sys.executable, "-m", "job", "train", str(config), *overrides]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds = time.time() - begun
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    stepping = sum(row["tokens"] / row["tokens_per_s"] for row in found)
    return {
        "tokens_per_s": round(statistics.median(row["tokens_per_s"] for row in found[3:])),
        "peak_gib": found[-1]["memory_gib"],
        "loss": round(found[-1]["loss"], 4),
        "besides_steps_s": round(seconds - stepping, 1),
    }


def main(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    model = work / "7b"
    make_model(model)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for length, micro, recompute, dropout in VARIANTS:
        how = [f"train.recompute={recompute}", f"lora.dropout={dropout}", "train.optimizer=paged_adamw_8bit"]
        for fused in ("true", "false"):
            figures = measure(model, work, length, micro, *how, f"train.fused={fused}")
            row = {
                "tokens": f"{micro} x {length}",
                "recompute": recompute,
                "dropout": dropout,
                "fused": fused,
                **figures,
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "/tmp/bench"))
