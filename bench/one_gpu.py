"""Speed and memory on one GPU, ours beside others: a 7B Llama-2 shape with random weights (speed does not depend on
them).

    python bench/one_gpu.py [--shapes NAME...] [--stacks NAME...] [--work FOLDER] [--table FILE]

Every figure is a process of its own, ours through `qlora train` as users start it, others (`peers.py`) in a bare loop;
all in one run, since machines differ. Prints a line of JSON for each and then the table: tokens per second (median of
the steps after the third) and peak memory. Stacks that are not installed are left out and named. Results with date and
hardware: bench/RESULTS.md.
"""

import argparse
import datetime
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
WORDS = 32000 - 4
STEPS = 9
SHAPES = [(2048, 4, "full"), (2048, 4, "none"), (512, 1, "none"), (8192, 1, "full"), (8192, 1, "none")]
"""Sequence length, sequences, recompute."""
NAMED = {f"{micro}x{length}-{recompute}": (length, micro, recompute) for length, micro, recompute in SHAPES}
OURS = {
    "ours": [],
    "ours, inputs on the host": ["train.offload_activations=true"],
    "ours, fp8": ["train.base_compute=fp8"],
    "ours, always dequantized": ["train.dequantize=always"],
    "ours, dropout 0.05": ["lora.dropout=0.05"],
    "ours, unfused": ["train.fused=false"],
}
PEERS = {"unsloth": "unsloth", "trainer": "bitsandbytes", "trainer+liger": "liger_kernel"}
"""Stacks, and the package without which there is none."""


def make_model(folder: Path) -> None:
    """The model and a tokenizer of one token a word."""
    if (folder / "config.json").exists():
        return
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=8192, eos_token_id=2, bos_token_id=1, **SHAPE)
    with torch.device("cuda"):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="2GB")
    torch.cuda.empty_cache()
    make_tokenizer(folder)


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of one token a word."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{i}": i + 4 for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>"
    ).save_pretrained(folder)


def make_rows(path: Path, *lengths: int) -> Path:
    """Rows of random words; each has so many tokens, its end included."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for length in lengths:
        words = torch.randint(0, WORDS, (length - 1,), generator=generator).tolist()
        lines.append(json.dumps({"text": " ".join(f"w{i}" for i in words)}))
    path.write_text("\n".join(lines))
    return path


def measure(
    model: Path | str,
    work: Path,
    length: int,
    micro: int,
    *overrides: str,
    ranks: int = 1,
    steps: int = STEPS,
    rows: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """One run in a process of its own, as users start it; its figures.

    Args:
        rows: those to train on; without, as many as the steps take, each of which fills a sequence.
    """
    rows = rows or make_rows(work / f"rows-{length}.jsonl", *[length] * (micro * ranks * steps))
    output = Path(tempfile.mkdtemp(dir=work)) / "out"
    values = {
        "model": {"name": str(model)},
        "data": {"train": str(rows), "max_length": length},
        "train": {
            "max_steps": steps,
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
    said = output.with_name("said.txt")
    with said.open("w") as file:
        run = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=file, env=environment)
        first_step = _first_written(output / "metrics.jsonl", run) - begun
    if run.wait():
        raise SystemExit(said.read_text())
    seconds = time.time() - begun
    read = re.search(r"base: ([\d.]+) of ([\d.]+) GB read by this rank, .* in ([\d.]+) s", said.read_text())
    assert read, said.read_text()
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    stepping = sum(row["tokens"] / row["tokens_per_s"] for row in found)
    return {
        "tokens_per_s": round(statistics.median(row["tokens_per_s"] for row in found[3:])),
        "peak_gib": found[-1]["memory_gib"],
        "loss": round(found[-1]["loss"], 4),
        "first_step_s": round(first_step, 1),
        "besides_steps_s": round(seconds - stepping, 1),
        "read_gb": float(read[1]),
        "read_s": float(read[3]),
    }


def _first_written(metrics: Path, run: subprocess.Popen[bytes]) -> float:
    """When the first step's row was there, or the run had ended."""
    while not (metrics.exists() and metrics.stat().st_size) and run.poll() is None:
        time.sleep(0.05)
    return time.time()


def measure_peer(
    stack: str, model: Path, length: int, micro: int, recompute: str, rows: Path | None = None
) -> dict[str, float]:
    """The figures of another stack; what it wrote last, where it failed."""
    words = [sys.executable, "-m", "bench.peers", stack, str(model.resolve()), str(length), str(micro), recompute]
    words += [str(rows.resolve())] if rows else []
    done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"{stack} failed: {(done.stderr or done.stdout)[-500:]}", file=sys.stderr)
        return {}
    found: dict[str, float] = json.loads(lines[-1])
    return found


def heading(count: str = "") -> str:
    """What measures: so many of the GPU, versions of what is installed, and the day."""
    packages = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "unsloth", "liger-kernel")
    versions = ", ".join(f"{name} {version(name)}" for name in packages if find_spec(name.replace("-", "_")))
    return f"{count}{torch.cuda.get_device_name()}, {versions}, {datetime.date.today()}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a stack and shape."""
    lines = [heading(), ""]
    lines += ["| tokens a step | recompute | stack | tok/s | peak GiB |", "|---|---|---|---|---|"]
    for row in rows:
        speed, peak = f"{row['tokens_per_s']:,}", f"{row['peak_gib']:.1f}"
        lines.append(f"| {row['tokens']} | {row['recompute']} | {row['stack']} | {speed} | {peak} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stacks", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--shapes", nargs="+", choices=NAMED, default=[*NAMED], help="tokens a step and recompute")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench"))
    parser.add_argument("--table", type=Path, help="where to write the table")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    model = asked.work / "7b"
    make_model(model)
    rows = []
    for length, micro, recompute in map(NAMED.__getitem__, asked.shapes):
        # what is measured with full recomputation is what little memory allows
        kept = "always" if recompute == "full" else "auto"
        how = [f"train.recompute={recompute}", f"train.dequantize={kept}", "train.optimizer=paged_adamw_8bit"]
        for stack in asked.stacks:
            if recompute == "none" and stack == "ours, inputs on the host":
                continue
            if stack in PEERS and not find_spec(PEERS[stack]):
                print(f"{stack} is not installed", file=sys.stderr)
                continue
            if stack in OURS:
                figures = measure(model, asked.work, length, micro, *how, "lora.dropout=0", *OURS[stack])
            else:
                figures = measure_peer(stack, model, length, micro, recompute)
            if figures:
                rows.append({"stack": stack, "tokens": f"{micro} x {length}", "recompute": recompute, **figures})
                print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if asked.table:
        asked.table.write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
