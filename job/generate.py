"""Answers of the base and of the tuned model, to prompts encoded exactly as in training."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from job import adapter
from job.chat import Encoded, encode, prompt_ids, stop_ids
from job.config import Change, RunConfig, changes
from job.config.learning import Generation, Quantization
from job.data.encode import Encoder
from job.data.load import make_encoder
from job.data.rows import Row
from job.data.split import read_split
from job.errors import DataError, InputError
from job.hardware import this_hardware
from job.matching import matched
from job.model import DTYPE, add_adapter, build, place
from job.plan import make_plan
from job.pretrained import base_name, fetch, fetch_weights, read_config, read_tensors
from job.run_folder import RunFolder
from job.tokenizer import Tokenizer
from job.turns import Segment
from job.weights import dequantized, stream
from job.world import World

ASKED_BY = ("model.", "quantization.", "lora.", "data.format", "data.template", "data.learn")
"""What an adapter answers as trained by: its base, quantization and scale, and the form of its prompts."""
Hear = Callable[[str], None]
SPLIT_BY = ("data.train", "evaluation.file", "evaluation.share", "train.seed")
"""What says which rows were held out."""


@dataclass(frozen=True)
class Answers:
    """One question with what was wanted (empty when unknown) and what base and tuned model say."""

    question: str
    wanted: str
    base: str
    tuned: str


class Speech:
    """An answer while it is made; transformers calls it a streamer, and puts the prompt first.

    Args:
        tokenizer: makes text of tokens.
        hear: hears each new piece of the text; no character comes in parts.
    """

    def __init__(self, tokenizer: Tokenizer, hear: Hear):
        self.tokenizer, self.hear = tokenizer, hear
        self.ids: list[int] | None = None
        self.heard = 0

    def put(self, tokens: torch.Tensor) -> None:
        """The next tokens."""
        if self.ids is None:
            self.ids = []
            return
        self.ids += tokens.tolist()
        said = self.tokenizer.said(self.ids)
        self.hear(said[self.heard :])
        self.heard = len(said)

    def end(self) -> None:
        """Nothing is kept back that could be said."""


class Responder:
    """The quantized base with the run's adapter, on the GPU when there is one.

    Args:
        config: the run's settings; the adapter is read from output.url.

    Raises:
        InputError: there is no model, no data, or no adapter that fits.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.run = run = RunFolder(config)
        fixed = [change for change in _differing(run, ASKED_BY) if change.rule == "fixed"]
        if fixed:
            raise InputError(f"{run.store.url}: the adapter was trained with other settings{_listed(fixed)}")
        if not run.store.child("adapter").exists(adapter.WEIGHTS):
            raise InputError(f"{run.store.url}/adapter: no adapter there. Run `qlora train` first")
        hardware = this_hardware(0)
        files, checkpoint = fetch(config.model, config.storage)
        architecture = read_config(files, config.model)
        plan = make_plan(config, World(), hardware, architecture.model_type)
        self.device = hardware.device
        # beyond its seq_length first-generation Qwen would need another attention
        self.positions: int = getattr(architecture, "seq_length", None) or _positions(architecture)
        self.tokenizer = Tokenizer(files, config.model.trust_remote_code)
        train, held_out = read_split(config)
        self.rows: Sequence[Row] = held_out or train
        self.encoder: Encoder = make_encoder(config, self.tokenizer, train[0])
        made = partial(build, architecture, config.model, config.quantization, plan.precision, plan.compute_dtype)
        base = made()
        checkpoint = fetch_weights(config.model, checkpoint, config.storage)
        tensors = read_tensors(files, checkpoint, config.model)
        base, wanted = matched(base, made, tensors, checkpoint, config.model.name)
        dtype = DTYPE[plan.precision]
        pieces = stream(checkpoint, wanted, config.quantization, dtype, self.device)
        if self.device == "cpu":
            # a CPU would dequantize every weight for every token (the demo: 216 s instead of 16 s on two cores,
            # 2026-11-21); these are the same values, made once
            plain = Quantization(type="none")
            base = build(architecture, config.model, plain, plan.precision, plan.compute_dtype)
            pieces = dequantized(pieces, dtype)
        place(base, pieces, self.device)
        self.model: Any = add_adapter(base, config.lora, config.train.seed, base_name(config.model), dtype)[0]
        adapter.load(self.model, run.store.child("adapter"))
        self.model.eval()

    def held_out(self) -> list[Row]:
        """Rows to ask about: evenly spaced held-out ones, or training rows when none are held out.

        Raises:
            InputError: they are not the run's: rows that were trained on could pose as held out.
        """
        differing = _differing(self.run, SPLIT_BY)
        if differing:
            raise InputError(
                f"{self.run.store.url}: the adapter was trained on other rows{_listed(differing)}, or ask with -q"
            )
        count = min(self.config.generation.rows, len(self.rows))
        return [self.rows[place * len(self.rows) // count] for place in range(count)]

    def compare_row(self, row: Row) -> Answers:
        """The answers to a row's last learnt turn.

        Raises:
            DataError: the row cannot be used.
        """
        segments = self.encoder.segments(row)
        try:
            segments = self.encoder.talks(segments)[-1]
            encoded = self._encoded(segments)
        except ValueError as fault:
            raise DataError(f"{row.where}: {fault}") from fault
        return self._compare(segments, encoded)

    def compare_question(self, question: str) -> Answers:
        """The answers to a question, put into the run's format.

        Raises:
            InputError: the question is no UTF-8, or the chat format refuses it.
        """
        segments = self.encoder.kind.ask(question)
        return self._compare(segments, self._asked(segments))

    def chat(self, turns: Sequence[Segment], hear: Hear = lambda text: None) -> str:
        """The tuned model's next turn; the last segment is the empty answer.

        Args:
            hear: hears the answer piece by piece, while it is made.

        Raises:
            InputError: a turn is no UTF-8, or the chat format refuses the turns.
        """
        return self._answer(self._asked(turns), tuned=True, hear=hear)

    def _asked(self, segments: Sequence[Segment]) -> list[Encoded]:
        """A person's own turns as ids. Bytes that are no UTF-8 come from a terminal as lone surrogates."""
        try:
            "".join(segment.content for segment in segments).encode()
        except UnicodeEncodeError as fault:
            raise InputError("the question is no UTF-8 text. Set the terminal to UTF-8 and ask again") from fault
        try:
            return self._encoded(segments)
        except ValueError as fault:
            raise InputError(
                f"the question cannot be asked: {fault}. Ask in other words, or without the turns before it"
            ) from fault

    def _encoded(self, segments: Sequence[Segment]) -> list[Encoded]:
        return encode(segments, self.tokenizer, self.encoder.chat)

    def _compare(self, segments: Sequence[Segment], encoded: Sequence[Encoded]) -> Answers:
        asked = [part.content for part in segments if part.role in ("user", "text") and not part.learn]
        wanted = [part.content for part in segments if part.learn]
        return Answers(
            asked[-1] if asked else "",
            wanted[-1] if wanted else "",
            self._answer(encoded, tuned=False),
            self._answer(encoded, tuned=True),
        )

    @torch.no_grad()
    def _answer(self, encoded: Sequence[Encoded], tuned: bool, hear: Hear = lambda text: None) -> str:
        # plain text has no prompt: without a bos it starts behind the end of another text
        ids = torch.tensor([prompt_ids(encoded) or [self.tokenizer.eos]], device=self.device)
        room = self.positions - ids.shape[1]
        if room < 1:
            raise InputError(
                f"the question has {ids.shape[1]} tokens, the model answers within {self.positions}. Ask in fewer words"
            )
        how = _sampling(self.config.generation) | {
            "max_new_tokens": min(self.config.generation.max_new_tokens, room),
            "eos_token_id": stop_ids(encoded, self.tokenizer, self.encoder.chat),
            "streamer": Speech(self.tokenizer, hear),
            "pad_token_id": self.tokenizer.eos,  # one sequence has no padding; transformers asks for it all the same
        }
        torch.manual_seed(self.config.train.seed)
        if tuned:
            out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
        else:
            with self.model.disable_adapter():
                out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
        return self.tokenizer.said(out[0, ids.shape[1] :].tolist())


def _positions(architecture: Any) -> int:
    return getattr(architecture, "max_position_embeddings", None) or sys.maxsize


def _differing(run: RunFolder, keys: tuple[str, ...]) -> list[Change]:
    """Which of these settings are not those that the adapter was trained with."""
    return [change for change in changes(run.old, run.config) if change.key.startswith(keys)] if run.old else []


def _listed(differing: Sequence[Change]) -> str:
    return "".join(f"\n  {change}" for change in differing) + "\n  Set these back"


def _sampling(generation: Generation) -> dict[str, Any]:
    """transformers' names of the settings; temperature 0 is its greedy search."""
    how: dict[str, Any] = {
        "max_new_tokens": generation.max_new_tokens,
        "repetition_penalty": generation.repetition_penalty,
        "do_sample": generation.temperature > 0,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
    if generation.temperature > 0:
        how |= {"temperature": generation.temperature, "top_p": generation.top_p, "top_k": generation.top_k}
    return how
