"""Chat templates in the style of well-known models, and small tokenizers that carry them."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import CHATML, make_tokenizer

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = false %}{% set turns = messages %}{% endif %}{% for message in turns %}"
    "{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles!') }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MODELS: dict[str, tuple[str | None, list[str], str]] = {
    "chatml": (CHATML, ["<|im_start|>"], "<|im_end|>"),
    "none": (None, ["<|im_start|>"], "<|im_end|>"),
    "llama-2": (LLAMA_2, ["<s>", "</s>"], "</s>"),
    "llama-3": (
        LLAMA_3,
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
        "<|eot_id|>",
    ),
    "mistral": (MISTRAL, ["<s>", "[INST]", "[/INST]", "</s>"], "</s>"),
    "gemma": (GEMMA, ["<bos>", "<end_of_turn>", "<start_of_turn>", "<eos>"], "<end_of_turn>"),
    "phi-3": (PHI_3, ["<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"], "<|end|>"),
    "smollm2": (None, ["<|im_start|>"], "<|im_end|>"),
    "sentencepiece": (LLAMA_2, ["<s>", "</s>"], "</s>"),
}
"""Chat template, special tokens (the first is bos, the last eos where it is not made for ChatML), end of a turn."""


def byte_level(folder: Path, name: str) -> None:
    """Write conftest's tokenizer with the template and special tokens of `name`."""
    template, specials, _ = MODELS[name]
    make_tokenizer(folder, template)
    if name in ("chatml", "none"):
        return
    inner = AutoTokenizer.from_pretrained(folder)
    inner.add_special_tokens({"bos_token": specials[0], "eos_token": specials[-1]})
    inner.add_special_tokens({"additional_special_tokens": specials})
    inner.save_pretrained(folder)


def sentencepiece(folder: Path) -> None:
    """A tokenizer that puts a space before every text, as Llama 2's does."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Inner(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_])
    inner.train_from_iterator(
        ["How many? Three. More? Yes, four. Be kind. [INST] [/INST] <<SYS>>\n<</SYS>>"] * 3, trainer
    )
    written = json.loads(inner.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if token["content"] not in bytes_]
    inner = Inner.from_str(json.dumps(written))
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = LLAMA_2
    made.save_pretrained(folder)
