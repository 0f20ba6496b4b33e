"""What five tutorials of QLoRA set, by the run file in configs/ that does the same."""

from typing import Any

import yaml

CHATGLM2 = """
model: {name: THUDM/chatglm2-6b}
lora: {rank: 8, alpha: 32, dropout: 0.05, targets: [query_key_value]}
data: {train: data/alpaca_zh.json, max_length: 512, packing: false}
train: {epochs: 3, learning_rate: 2.0e-4, schedule: linear, warmup_steps: 0, max_grad_norm: 1.0, micro_batch_size: 1}
checkpoint: {every_epoch: true}
tracking: {every_steps: 10}
"""
CHATGLM2_ON_ONE = """
train: {global_batch_size: 8, precision: fp16}
parallel: {strategy: zero2, offload_optimizer: cpu}
generation: {max_new_tokens: 100}
"""
CHATGLM2_ON_TWO_HOSTS = """
train: {global_batch_size: 64, precision: bf16, recompute: full}
parallel:
  {strategy: zero3, offload_optimizer: cpu, offload_parameters: cpu, bucket: 50000000, prefetch: 50000000,
   persistence: 100000, overlap_comm: true, contiguous_gradients: true}
"""
PROJECT = """
lora: {rank: 16, alpha: 32, dropout: 0.1}
data: {train: data/sample_data.json, max_length: 512}
evaluation: {share: 0.1}
train: {epochs: 3, learning_rate: 2.0e-4, micro_batch_size: 4, precision: auto, recompute: full}
parallel: {strategy: zero3, offload_optimizer: cpu, offload_parameters: cpu}
"""
PRACTICE = """
quantization: {type: nf4, double_quant: true}
lora: {rank: 16, alpha: 32, dropout: 0.05, targets: all}
data: {train: data/train.jsonl, max_length: 512, packing: false, workers: 4}
evaluation: {file: data/eval.jsonl, every_steps: 100, micro_batch_size: 1, keep_best: true}
train:
  {epochs: 3, learning_rate: 3.0e-4, schedule: linear, warmup_steps: 100, micro_batch_size: 2, global_batch_size: 8,
   precision: fp16, optimizer: paged_adamw_8bit, seed: 42}
checkpoint: {every_steps: 100, keep: 3}
generation: {max_new_tokens: 512, temperature: 0.7, top_p: 0.9, top_k: 20, repetition_penalty: 1.1}
tracking: {every_steps: 10}
"""
ONE_A_FORWARD = "train: {micro_batch_size: 1, global_batch_size: 4}"
BF16 = "train: {precision: bf16}"
ADVERTISING = """
quantization: {type: nf4, double_quant: true, compute_dtype: bf16}
lora: {rank: 8, alpha: 32, dropout: 0.05}
data: {max_length: 512, packing: false}
train:
  {epochs: 1, learning_rate: 2.0e-4, schedule: cosine, warmup_steps: 0.05, micro_batch_size: 1, global_batch_size: 4,
   precision: bf16, optimizer: paged_adamw_8bit}
checkpoint: {every_steps: 100}
generation: {max_new_tokens: 100}
tracking: {every_steps: 10}
"""
CHATGLM3_ON_ADGEN = """
model: {name: THUDM/chatglm3-6b}
lora: {targets: [query_key_value, dense, dense_h_to_4h, dense_4h_to_h]}
data: {train: "HasturOfficial/adgen:train[:1%]"}
"""


def values(*texts: str) -> dict[str, Any]:
    """Settings as section.key, later texts over earlier ones."""
    read = [yaml.safe_load(text) for text in texts]
    return {f"{section}.{key}": value for each in read for section in each for key, value in each[section].items()}


def model(name: str) -> str:
    return f"model: {{name: {name}}}"


TUTORIALS = {
    "chatglm2-6b-zero2-1x16g": values(CHATGLM2, CHATGLM2_ON_ONE),
    "chatglm2-6b-zero3-2x4x24g": values(CHATGLM2, CHATGLM2_ON_TWO_HOSTS),
    "dialogpt-medium-zero3-2x8g": values(PROJECT, model("microsoft/DialoGPT-medium")),
    "mistral-7b-zero3-2x16g": values(PROJECT),
    "qwen-7b-chat-qlora-1x24g": values(PRACTICE, model("Qwen/Qwen-7B-Chat"), BF16),
    "qwen-14b-chat-qlora-1x24g": values(PRACTICE, model("Qwen/Qwen-14B-Chat"), BF16, ONE_A_FORWARD),
    "llama-2-7b-chat-qlora-1x24g": values(PRACTICE, model("meta-llama/Llama-2-7b-chat-hf")),
    "llama-2-13b-chat-qlora-1x24g": values(PRACTICE, model("meta-llama/Llama-2-13b-chat-hf"), ONE_A_FORWARD),
    "chatglm3-6b-qlora-1x24g": values(PRACTICE, model("THUDM/chatglm3-6b"), "lora: {rank: 8}"),
    "chatglm3-6b-adgen-1x16g": values(ADVERTISING, CHATGLM3_ON_ADGEN),
    "opt-1.3b-qlora-1x8g": values(ADVERTISING, "lora: {targets: [q_proj, k_proj, v_proj, out_proj]}"),
}
"""BF16 stands where theirs is fp16, and the run file says why."""
PRACTICED = [name for name in TUTORIALS if TUTORIALS[name].get("data.workers")]
SHARDED = [name for name in TUTORIALS if TUTORIALS[name].get("parallel.strategy") == "zero3"]
