"""ZeRO-3 beside plain data parallelism on the GPUs of one host: a 7B Llama-2 shape with random weights.

    python bench/many_gpus.py GPUS [FOLDER]

Prints one line a variant: tokens per second and GPU (median of the steps after the third), peak memory of rank 0, and
the seconds that the whole command took besides its steps. Results with date and hardware: bench/RESULTS.md.
"""

import json
import sys
from pathlib import Path

import torch
from one_gpu import make_model, measure

VARIANTS = [
    (strategy, recompute, values)
    for recompute in ("full", "none")
    for strategy, values in (("replicate", "always"), ("zero3", "always"), ("replicate", "once"))
]
"""Strategy, recompute, and whether the values of the 4-bit base are made for every product, as zero3 has to."""
LENGTH, MICRO = 2048, 4


def main(gpus: int, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    model = work / "7b"
    make_model(model)
    print(f"{gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    for strategy, recompute, values in VARIANTS:
        how = [f"train.recompute={recompute}", f"train.dequantize={values}", "lora.dropout=0.0"]
        shape = [f"parallel.strategy={strategy}", f"parallel.processes={gpus}"]
        figures = measure(model, work, LENGTH, MICRO, *how, *shape, ranks=gpus)
        figures["tokens_per_s"] = round(figures["tokens_per_s"] / gpus)
        row = {"gpus": gpus, "strategy": strategy, "recompute": recompute, "dequantize": values, **figures}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "/tmp/bench"))
