"""A sentencepiece BPE model (`tokenizer.model`) as a tokenizer of the tokenizers library, without sentencepiece.

The file is a protobuf message; its fields are those of sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers

from job.errors import ModelError
from job.tensors import refuse_lfs_pointer

SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
"""Kinds of pieces."""
_KNOWN = {NORMAL, UNKNOWN, CONTROL, BYTE}
_BPE = 2

Fields = dict[int, int | bytes]


class Piece(NamedTuple):
    """A piece of the vocabulary; its id is its place."""

    text: str
    score: float
    kind: int


def build(content: bytes, name: str) -> tuple[Tokenizer, list[Piece]]:
    """The tokenizer, which knows no special tokens yet, and its pieces.

    Args:
        content: the file.
        name: what a refusal calls it.

    Raises:
        ModelError: the file is damaged, or of a kind whose tokens would come out otherwise.
    """
    pieces = _read(content, name)
    vocabulary = {piece.text: place for place, piece in enumerate(pieces)}
    unknown = next(piece.text for piece in pieces if piece.kind == UNKNOWN)
    merges = _merges([piece for piece in pieces if piece.kind == NORMAL])
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer, pieces


def _merges(normal: list[Piece]) -> list[tuple[str, str]]:
    """Every two pieces that together are one, the best of these first: sentencepiece joins any such two. Pieces of
    other kinds are never joined from text, even where it reads like them."""
    texts = {piece.text for piece in normal}
    best_first = sorted((piece for piece in normal if len(piece.text) > 1), key=lambda piece: -piece.score)
    halves = ((text[:cut], text[cut:]) for text, *_ in best_first for cut in range(1, len(text)))
    return [(left, right) for left, right in halves if left in texts and right in texts]


def _read(content: bytes, name: str) -> list[Piece]:
    refuse_lfs_pointer(content, name)
    try:
        message = list(_fields(content))
        pieces = [_piece(dict(_fields(value))) for number, value in message if number == 1 and isinstance(value, bytes)]
        about = {number: dict(_fields(value)) for number, value in message if number != 1 and isinstance(value, bytes)}
    except (IndexError, ValueError, KeyError, struct.error) as fault:
        raise ModelError(f"{name} is damaged. Copy the file again") from fault
    trainer, normalizer = about.get(2, {}), about.get(3, {})
    odd = [
        *(["another algorithm than BPE"] if trainer.get(3, 1) != _BPE else []),
        *(["no byte fallback"] if not trainer.get(35, 0) else []),
        *(["spaces behind words"] if trainer.get(24, 0) else []),
        *(["a normalization"] if normalizer.get(2, b"") else []),
        *(["no space before the text"] if not normalizer.get(3, 1) else []),
        *(["spaces removed"] if normalizer.get(4, 1) else []),
        *(["spaces as they are"] if not normalizer.get(5, 1) else []),
        *(["pieces of the user's"] if {piece.kind for piece in pieces} - _KNOWN else []),
        *(["no piece for the unknown"] if UNKNOWN not in {piece.kind for piece in pieces} else []),
    ]
    if odd:
        raise ModelError(f"{name} has {', '.join(odd)}, which is not read. Put a tokenizer.json beside it")
    return pieces


def _piece(fields: Fields) -> Piece:
    text, score = fields[1], fields.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise ValueError("a piece without text")
    return Piece(text.decode(), struct.unpack("<f", score)[0], int(fields.get(3, NORMAL)))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protobuf message; fixed and nested ones as bytes."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(message, place)
            yield number, value
            continue
        length = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            length, place = _varint(message, place)
        if length is None or place + length > len(message):
            raise ValueError("no field")
        yield number, message[place : place + length]
        place += length


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    number = shift = 0
    while True:
        byte = message[place]
        number |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return number, place
