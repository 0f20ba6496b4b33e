"""A tiktoken vocabulary (`qwen.tiktoken`) as a tokenizer of the tokenizers library, without tiktoken.

Each line of the file is a token's bytes in base 64, and its rank, which is its id.
"""

import binascii
from base64 import b64decode

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from job.errors import ModelError
from job.tensors import refuse_lfs_pointer


def build(content: bytes, pattern: str, name: str) -> Tokenizer:
    """The tokenizer, which knows no special tokens yet.

    Args:
        content: the file.
        pattern: the regular expression whose matches are encoded apart.
        name: what a refusal calls it.

    Raises:
        ModelError: the file is damaged.
    """
    ranks = _read(content, name)
    vocabulary = {_letters(token): rank for token, rank in ranks.items()}
    # tiktoken takes a stretch that is a token as it is, and else joins any two tokens that together are one
    tokenizer = Tokenizer(models.BPE(vocabulary, _merges(ranks), ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _read(content: bytes, name: str) -> dict[bytes, int]:
    refuse_lfs_pointer(content, name)
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except (ValueError, binascii.Error) as fault:
        raise ModelError(f"{name} is damaged. Copy the file again") from fault
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ModelError(f"{name} is damaged: ranks or single bytes are missing. Copy the file again")
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[tuple[str, str]]:
    """Every two tokens that together are one, that of the lowest rank first."""
    ordered = sorted(ranks, key=lambda token: ranks[token])
    halves = ((token[:cut], token[cut:]) for token in ordered for cut in range(1, len(token)))
    return [(_letters(left), _letters(right)) for left, right in halves if left in ranks and right in ranks]


def _alphabet() -> list[str]:
    """The letter that stands for each byte: printable bytes are their own, the others take those beyond, in order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = {ord(letter): letter for letter in letters if ord(letter) < 256}
    others = iter(letters[len(own) :])
    return [own.get(byte) or next(others) for byte in range(256)]


_ALPHABET = _alphabet()


def _letters(token: bytes) -> str:
    return "".join(_ALPHABET[byte] for byte in token)
