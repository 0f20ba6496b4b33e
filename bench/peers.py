"""Steps of other stacks on the model, rows and optimizer that `one_gpu.py` measures ours with, one stack a process.

    python -m bench.peers STACK MODEL LENGTH MICRO RECOMPUTE [ROWS]

Stacks: `unsloth`, as its documentation sets it up; `trainer`, what tutorials write (prepare_model_for_kbit_training,
peft, autocast); `trainer+liger`, the same with Liger Kernel's parts. Prints a line of JSON: tokens a second (the median
of the steps after the third) and the peak of memory while stepping. What they do besides steps is not in the figures.
With ROWS, a file of rows that `one_gpu.make_rows` wrote, each row is padded to LENGTH as tutorials do, and tokens are
those of rows.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

STEPS = 9
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def load(stack: str, folder: str, length: int, recompute: str) -> Any:
    """The 4-bit model with an adapter, as the stack makes it."""
    if stack == "unsloth":
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=length, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
        )
        again = "unsloth" if recompute == "full" else False
        return FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=again, random_state=0, **LORA)
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if stack == "trainer+liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four_bits, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa"
    )
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=recompute == "full",
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))  # type: ignore[arg-type]


def batches(length: int, micro: int, rows: str | None) -> Iterator[dict[str, torch.Tensor]]:
    """For each step ids, labels and, where rows are padded, a mask, all [micro, length]."""
    if rows is None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            ids = torch.randint(4, 32000, (micro, length), generator=generator)
            yield {"input_ids": ids, "labels": ids}
        return
    texts = [json.loads(line)["text"] for line in Path(rows).read_text().splitlines()]
    for step in range(len(texts) // micro):
        ids, mask = torch.full((micro, length), 3), torch.zeros(micro, length, dtype=torch.long)
        for place, text in enumerate(texts[step * micro :][:micro]):
            row = [int(word[1:]) + 4 for word in text.split()] + [2]
            ids[place, : len(row)], mask[place, : len(row)] = torch.tensor(row), 1
        yield {"input_ids": ids, "labels": ids.where(mask.bool(), -100), "attention_mask": mask}


def measure(stack: str, folder: str, length: int, micro: int, recompute: str, rows: str | None) -> dict[str, float]:
    """Tokens a second and the peak, GiB, of steps on random words."""
    model = load(stack, folder, length, recompute)
    model.train()
    import bitsandbytes  # behind unsloth, which wants to be first

    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = bitsandbytes.optim.PagedAdamW8bit(trained, lr=1e-4)
    seconds, tokens = [], []
    torch.cuda.reset_peak_memory_stats()
    for batch in batches(length, micro, rows):
        begun = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=stack != "unsloth"):
            loss = model(**{name: value.cuda() for name, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        tokens.append(int((batch["labels"] >= 0).sum()))
    return {
        "tokens_per_s": round(statistics.mean(tokens) / statistics.median(seconds[3:])),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


if __name__ == "__main__":
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    stack, folder, length, micro, recompute, *rest = sys.argv[1:]
    print(json.dumps(measure(stack, folder, int(length), int(micro), recompute, *(rest or [None]))))
