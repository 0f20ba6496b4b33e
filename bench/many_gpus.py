"""ZeRO-3 beside plain data parallelism on the GPUs of one host: a 7B Llama-2 shape with random weights.

    python bench/many_gpus.py GPUS [--recompute full none] [--work FOLDER] [--table FILE]

Every figure is a run through `qlora train` as users start it, one after another on the same cards. Prints a line of
JSON for each and then the table: tokens per second and GPU (median of the steps after the third), their part of what
plain data parallelism does with values of the base made for every product too, and the peak of rank 0. Results with
date and hardware: bench/RESULTS.md.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from one_gpu import heading, make_model, measure

VARIANTS = [("replicate", "always"), ("zero3", "always"), ("replicate", "once")]
"""Strategy, and whether the values of the 4-bit base are made for every product, as zero3 has to."""
LENGTH, MICRO = 2048, 4


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a row a variant, in the order in which they were measured."""
    plain = {row["recompute"]: row for row in rows if (row["strategy"], row["dequantize"]) == VARIANTS[0]}
    lines = [heading(f"{rows[0]['gpus']} x "), "", f"{MICRO} x {LENGTH} tokens a GPU and step, adamw, dropout 0", ""]
    lines += ["| strategy | recompute | values | tok/s a GPU | of replicate | peak GiB |", "|---|---|---|---|---|---|"]
    for row in rows:
        beside = plain.get(row["recompute"], row)
        part = "" if row is beside else f"{row['tokens_per_s'] / beside['tokens_per_s']:.3f}"
        kept = "kept" if row["dequantize"] == "once" else "made"
        cells = (row["strategy"], row["recompute"], kept, f"{row['tokens_per_s']:,}", part, f"{row['peak_gib']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gpus", type=int)
    parser.add_argument("--recompute", nargs="+", choices=("full", "none"), default=["full", "none"])
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench"))
    parser.add_argument("--table", type=Path, help="where to write the table")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    model = asked.work / "7b"
    make_model(model)
    print(f"{asked.gpus} x {torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    rows = []
    for recompute in asked.recompute:
        for strategy, values in VARIANTS:
            how = [f"train.recompute={recompute}", f"train.dequantize={values}", "lora.dropout=0.0"]
            shape = [f"parallel.strategy={strategy}", f"parallel.processes={asked.gpus}"]
            figures = measure(model, asked.work, LENGTH, MICRO, *how, *shape, ranks=asked.gpus)
            figures["tokens_per_s"] = round(figures["tokens_per_s"] / asked.gpus)
            rows.append({"gpus": asked.gpus, "strategy": strategy, "recompute": recompute, "dequantize": values})
            rows[-1] |= figures
            print(json.dumps(rows[-1]), flush=True)
    print(table(rows))
    if asked.table:
        asked.table.write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
