"""Chat templates in the style of well-known models, and small tokenizers that carry them."""

import json
from collections.abc import Sequence
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
MISTRAL_3 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}"
)
QWEN_3 = (
    "{% set last = namespace(question=-1) %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{% set last.question = loop.index0 %}{% endif %}"
    "{% endfor %}{% for message in messages %}{% set said = message['content'] %}{% set thought = '' %}"
    "{% if message['role'] == 'assistant' and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.index0 > last.question and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + said.lstrip('\n') }}{% else %}{{ said }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GLM_4 = (
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') == (loop.index0 % 2) %}{{ raise_exception('Turns must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}"
    "{{ (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_4 = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
LLAMA_31 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% set today = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + today + '\n\n' + system + '<|eot_id|>' }}"
    "{% for message in turns %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GPT_OSS = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] }}"
    "{% if message['role'] == 'assistant' %}<|channel|>final{% endif %}{{ '<|message|>' + message['content'] }}"
    "{{ '<|return|>' if loop.last and message['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
DIALOGPT = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
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


FAMILIES: dict[str, tuple[str | None, list[str], str]] = {
    "llama-2": (LLAMA_2, ["<s>", "</s>"], "<s>[INST] Q [/INST]⟦ A </s>⟧<s>[INST] R [/INST]⟦ B </s>⟧"),
    "llama-3": (
        LLAMA_31,
        ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nR<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦B<|eot_id|>⟧",
    ),
    "mistral": (MISTRAL, ["<s>", "[INST]", "[/INST]", "</s>"], "<s>[INST] Q [/INST]⟦A</s>⟧[INST] R [/INST]⟦B</s>⟧"),
    "mistral-3": (MISTRAL_3, ["<s>", "[INST]", "[/INST]", "</s>"], "<s>[INST] Q[/INST]⟦ A</s>⟧[INST] R[/INST]⟦ B</s>⟧"),
    "qwen-2": (
        CHATML,
        ["<|im_start|>", "<|im_end|>"],
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n⟦B<|im_end|>⟧\n",
    ),
    "qwen-3": (
        QWEN_3,
        ["<|im_start|>", "<|im_end|>"],
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nB<|im_end|>⟧\n",
    ),
    "glm-4": (
        GLM_4,
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"],
        "[gMASK]<sop><|user|>\nQ<|assistant|>⟦\nA<|user|>⟧\nR<|assistant|>⟦\nB<|endoftext|>⟧",
    ),
    "gemma-2": (
        GEMMA,
        ["<bos>", "<end_of_turn>", "<start_of_turn>", "<eos>"],
        "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n⟦A<end_of_turn>⟧\n"
        "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\n⟦B<end_of_turn>⟧\n",
    ),
    "gemma-3": (
        GEMMA_3,
        ["<bos>", "<end_of_turn>", "<start_of_turn>", "<eos>"],
        "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n⟦A<end_of_turn>⟧\n"
        "<start_of_turn>user\nR<end_of_turn>\n<start_of_turn>model\n⟦B<end_of_turn>⟧\n",
    ),
    "phi-3": (
        PHI_3,
        ["<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"],
        "<|user|>\nQ<|end|>\n<|assistant|>\n⟦A<|end|>⟧\n<|user|>\nR<|end|>\n<|assistant|>\n⟦B<|end|>⟧\n<|endoftext|>",
    ),
    "phi-4": (
        PHI_4,
        ["<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"],
        "<|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>⟦A<|im_end|>⟧"
        "<|im_start|>user<|im_sep|>R<|im_end|><|im_start|>assistant<|im_sep|>⟦B<|im_end|>⟧",
    ),
    "gpt-oss": (
        GPT_OSS,
        ["<|startoftext|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"],
        "<|start|>user<|message|>Q<|end|><|start|>assistant⟦<|channel|>final<|message|>A<|end|>⟧"
        "<|start|>user<|message|>R<|end|><|start|>assistant⟦<|channel|>final<|message|>B<|return|>⟧",
    ),
    "dialogpt": (DIALOGPT, ["<|endoftext|>"], "Q<|endoftext|>⟦A<|endoftext|>⟧R<|endoftext|>⟦B<|endoftext|>⟧"),
    "gpt-2": (None, ["<|endoftext|>"], "User: Q\nAssistant:⟦ A<|endoftext|>⟧User: R\nAssistant:⟦ B<|endoftext|>⟧"),
    "opt": (None, ["</s>"], "</s>User: Q\nAssistant:⟦ A</s>⟧User: R\nAssistant:⟦ B</s>⟧"),
}
"""Template, special tokens (the first is bos, the last eos), and two rounds Q A R B with the learnt parts marked."""


def byte_level(folder: Path, name: str) -> None:
    """Write conftest's tokenizer with the template and special tokens of `name`."""
    template, specials, _ = MODELS[name]
    make_tokenizer(folder, template)
    if name not in ("chatml", "none"):
        _rename_specials(folder, specials)


def of_family(folder: Path, name: str, plain: Sequence[str] = ()) -> None:
    """Write conftest's tokenizer with template and special tokens of a family; `plain` are added tokens that are not
    marked as special."""
    template, specials, _ = FAMILIES[name]
    make_tokenizer(folder, template)
    _rename_specials(folder, specials, plain)


def _rename_specials(folder: Path, specials: Sequence[str], plain: Sequence[str] = ()) -> None:
    inner = AutoTokenizer.from_pretrained(folder)
    inner.add_special_tokens({"bos_token": specials[0], "eos_token": specials[-1]})
    inner.add_special_tokens({"additional_special_tokens": list(specials)})
    inner.add_tokens(list(plain))
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
