"""What products in FP8 do to learning: the error of each kind of layer's output, and the evaluation loss of whole runs.

    python -m bench.fp8_learning [--steps 300] [--seeds 3] [--first-seed 1] [--at-once 1] [--ways WAY...]

Rows are documentation of Python's standard library: a function's head is the instruction, its docstring the answer;
rows of evaluation come from modules that no training row is of. Layers' inputs and gradients are those of the model on
such rows, in the type of its weights. Every run is a process of its own, in bf16 and in FP8 of the same seeds: FP8 does
no harm where the two differ, seed by seed, by less than seeds do. With `--ways bf16 forward backward` FP8 is in one
direction alone, and bf16 in the other; with `fixed` weights are rounded alike in every step, with `every` otherwise in
every one, with `exact_sums` products are added up in fp32. Without FP8 units torch computes the same products on the
CPU, slowly.
Results with date and hardware: bench/RESULTS.md.
"""

import argparse
import ast
import json
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bitsandbytes.functional as F
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from job import fp8
from job.linear import dequantized_anew

MODEL = Path("models/SmolLM2-135M-Instruct")
HELD_OUT = 12
"""One module in so many is for evaluation."""
EVALUATION_ROWS = 120
RANGE = (60, 900)
"""Characters of docstrings that become rows."""
WAYS = ("bf16", "fp8", "forward", "backward", "fixed", "every", "exact_sums")
"""Of the products with the base: none in FP8, all, those of one direction; all, with weights rounded alike in every
step, or otherwise in every one, or with sums in fp32."""


def documented() -> Iterator[tuple[str, str, str]]:
    """Module, head and docstring of the functions and classes in the standard library of this Python."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")]):
        if "test" in path.parts[-2] or path.parts[-2] in ("idlelib", "site-packages", "dist-packages"):
            continue
        module = ".".join(path.relative_to(library).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            text = ast.get_docstring(node) or ""
            if RANGE[0] <= len(text) <= RANGE[1]:
                head = f"def {node.name}({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else node.name
                yield module, head, text


def make_rows(work: Path) -> tuple[Path, Path]:
    """Rows for training and evaluation, in an order of their own."""
    sides: dict[bool, list[str]] = {True: [], False: []}
    modules: dict[str, int] = {}
    for module, head, text in documented():
        place = modules.setdefault(module, len(modules))
        row = {"instruction": f"Document this of Python's module {module}.", "input": head, "output": text}
        sides[place % HELD_OUT == 0].append(json.dumps(row))
    for rows in sides.values():
        random.Random(0).shuffle(rows)
    train, held_out = work / "train.jsonl", work / "heldout.jsonl"
    train.write_text("\n".join(sides[False]))
    held_out.write_text("\n".join(sides[True][:EVALUATION_ROWS]))
    return train, held_out


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def layer_errors(weight: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> dict[str, float]:
    """How far x W' and dy W are from the products with the weight as it was before it was quantized.

    Args:
        weight: [out, in].
        x: [N, in].
        dy: [N, out], the gradient of the output.
    """
    packed, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    exact_y, exact_dx = x.double() @ weight.double().T, dy.double() @ weight.double()
    rounded = F.dequantize_4bit(packed, state)
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    fp8.forward(fp8.scaled(x), packed, state, y)
    fp8.backward(fp8.scaled(dy), packed, state, dx)
    return {
        "y nf4": distance(x @ rounded.T, exact_y),
        "y nf4, fp8": distance(y, exact_y),
        "dx nf4": distance(dy @ rounded, exact_dx),
        "dx nf4, fp8": distance(dx, exact_dx),
    }


def errors_by_kind(folder: Path, rows: Path, device: str) -> dict[str, dict[str, list[float]]]:
    """The errors of each kind of linear in the decoder layers, a figure a layer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).requires_grad_(False)
    model.enable_input_require_grads()
    inputs: dict[str, torch.Tensor] = {}
    slopes: dict[str, torch.Tensor] = {}
    linears = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear) and "layers." in name}
    for name, one in linears.items():
        one.register_forward_hook(lambda _, given, __, name=name: inputs.update({name: given[0][0].detach()}))
        one.register_full_backward_hook(lambda _, __, grads, name=name: slopes.update({name: grads[0][0]}))
    texts = [json.loads(line) for line in rows.read_text().splitlines()[:8]]
    text = "\n\n".join("\n".join(row.values()) for row in texts)
    together = torch.tensor([tokenizer(text).input_ids[:1024]], device=device)
    model(input_ids=together, labels=together).loss.backward()
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, one in linears.items():
        for what, value in layer_errors(one.weight.data, inputs[name], slopes[name]).items():
            found[name.rpartition(".")[2]][what].append(value)
    return found


def in_one_direction(way: str) -> None:
    """Have products in the other direction take what they are given, and values of the base, as they are."""
    scaled, forward, backward = fp8.scaled, fp8.forward, fp8.backward

    def onward(x: Any, weight: torch.Tensor, state: Any, out: torch.Tensor, wider: float) -> None:
        if way == "forward":
            forward(scaled(x), weight, state, out, wider)
        else:
            torch.mm(x, dequantized_anew(weight.detach(), state, out.dtype).T, out=out)

    def back(dy: Any, weight: torch.Tensor, state: Any, out: torch.Tensor, wider: float) -> None:
        if way == "backward":
            backward(scaled(dy), weight, state, out, wider)
        else:
            torch.mm(dy, dequantized_anew(weight.detach(), state, out.dtype), out=out)

    fp8.scaled, fp8.forward, fp8.backward = lambda x: x, onward, back  # type: ignore[assignment,return-value]


def train(config: Path, way: str) -> None:
    """`qlora train`, where there are no FP8 units too."""
    from job import plan
    from job.cli import main

    if way in ("forward", "backward"):
        in_one_direction(way)
    if way == "fixed":
        fp8.widened = lambda step: 1.0
    if way == "every":
        fp8.STEPS = 1
    if way == "exact_sums":
        product = torch._scaled_mm
        torch._scaled_mm = lambda *given, **named: product(*given, **named | {"use_fast_accum": False})  # type: ignore[assignment]
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)):
        plan.fp8_faults = lambda *_: []
    sys.argv = ["qlora", "train", str(config)]
    main()


def evaluated(asked: argparse.Namespace, rows: tuple[Path, Path], way: str, seed: int) -> list[float]:
    """Evaluation losses of one run: before it, and after its steps."""
    output = Path(tempfile.mkdtemp(dir=asked.work)) / "out"
    values = {
        "model": {"name": str(asked.model.resolve())},
        "data": {"train": str(rows[0]), "max_length": asked.max_length},
        "evaluation": {"file": str(rows[1])},
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.0},
        "train": {
            "max_steps": asked.steps,
            "learning_rate": 3e-4,
            "warmup_steps": 10,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "recompute": "none",
            "seed": seed,
            "precision": "bf16",
            "base_compute": "bf16" if way == "bf16" else "fp8",
            "dequantize": "once",
        },
        "tracking": {"sinks": ["jsonl"]},
        "output": {"url": str(output)},
    }
    config = asked.work / f"{way}-{seed}.yaml"
    config.write_text(json.dumps(values))  # JSON is YAML
    words = [sys.executable, "-m", "bench.fp8_learning", "--train", str(config), "--ways", way]
    done = subprocess.run(words, stderr=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["eval_loss"] for row in found if "eval_loss" in row]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=1, help="runs beside each other")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--work", type=Path, default=Path("/tmp/bench-fp8"))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["bf16", "fp8"], help="each against the first")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.train:
        train(asked.train, *asked.ways)
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    rows = make_rows(asked.work)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| layer | " + " | ".join(("y nf4", "y nf4, fp8", "dx nf4", "dx nf4, fp8")) + " |\n|---|---|---|---|---|")
    for kind, errors in errors_by_kind(asked.model, rows[1], device).items():
        cells = (f"{statistics.median(all_):.2%}, {max(all_):.2%}" for all_ in errors.values())
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
    last: dict[str, list[float]] = {way: [] for way in asked.ways}
    seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
    runs = [(way, seed) for seed in seeds for way in asked.ways]
    with ThreadPoolExecutor(asked.at_once) as pool:
        found = pool.map(lambda run: evaluated(asked, rows, *run), runs)
        for (way, seed), (before, *_, after) in zip(runs, found, strict=True):
            last[way].append(after)
            print(json.dumps({"way": way, "seed": seed, "before": before, "after": after}), flush=True)
    first, *others = asked.ways
    for way in others:
        apart = [round(one - other, 4) for one, other in zip(last[way], last[first], strict=True)]
        print(json.dumps({f"{way} minus {first}, by seed": apart}))
    spread = round(max(last[first]) - min(last[first]), 4)
    print(json.dumps({f"largest minus smallest of {first}'s seeds": spread}))


if __name__ == "__main__":
    main()
