"""Models that no disk here holds, under ZeRO-3 on the GPUs of one host: random weights from a synthetic source.

    python bench/big_models.py MODEL GPUS [--micro N] [--steps N] [--compute bf16 fp8] [--set KEY=VALUE...]

MODEL is 70b or 405b, Llama 3's shapes; tiny is for machines without a GPU. Prints tokens per second and GPU (median of
the steps after the third) and in all, the peak of rank 0, and how long the base took and what a rank read of it; each
figure is a run through `qlora train` as users start it. Results with date and hardware: bench/RESULTS.md.
"""

import argparse
import json
from pathlib import Path

import torch
from one_gpu import STEPS, make_tokenizer, measure
from synthetic_source import environment, prepare
from transformers import LlamaConfig

LENGTH = 2048
COMMON = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "num_key_value_heads": 8}
SHAPES = {
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("gpus", type=int)
    parser.add_argument("--micro", type=int, default=1, help="sequences a GPU and step")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--compute", nargs="+", choices=("bf16", "fp8"), default=["bf16"], help="a run for each")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the run's settings")
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench"))
    asked = parser.parse_args()
    folder = asked.work / asked.model
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    total = prepare(folder, LlamaConfig(bos_token_id=1, eos_token_id=2, **COMMON, **SHAPES[asked.model]))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{asked.gpus} x {name}, torch {torch.__version__}, {total / 1e9:.1f} GB in bf16", flush=True)
    length = LENGTH if torch.cuda.is_available() else 64
    how = [f"parallel.processes={asked.gpus}", "parallel.strategy=zero3", "lora.dropout=0.0", *asked.set]
    for compute in asked.compute:
        figures = measure(
            f"synthetic://{folder.resolve()}",
            asked.work,
            length,
            asked.micro,
            *how,
            f"train.base_compute={compute}",
            ranks=asked.gpus,
            steps=asked.steps,
            environment=environment(asked.work),
        )
        row = {"model": asked.model, "gpus": asked.gpus, "tokens": f"{asked.micro} x {length}", "compute": compute}
        each = round(figures["tokens_per_s"] / asked.gpus)
        print(json.dumps({**row, "tokens_per_s_a_gpu": each, **figures}), flush=True)


if __name__ == "__main__":
    main()
