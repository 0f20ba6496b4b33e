"""Training rows read while training: global batches in an order that seed, epoch and block define, from any cursor on.

Only the first rank reads; it gives each batch's tokens to all, in the thread that asks for the batch.
"""

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from hashlib import sha256
from itertools import pairwise
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np

from job.config import RunConfig
from job.data.batches import Fits, GlobalBatch, MicroBatch, learnable, micro_batches
from job.data.blocks import Block, Position, read_blocks
from job.data.encode import Encoder, Tokens, nothing_to_learn
from job.data.rows import rows_of
from job.data.shards import Shard
from job.errors import DataError

T = TypeVar("T")
WITHIN = 1e-6
"""Share of an epoch that is the least between its start or end and what lies within."""
Share = Callable[[Callable[[], Any]], Any]
"""Has one rank do something and gives what comes of it to all."""
GOODBYE_S = 2.0
"""Seconds for which the end of a read that is under way is waited for."""

CURSOR = ("step", "epoch", "shard", "row", "block", "sequences")
"""What says where a stream goes on."""


class Stream:
    """The global batches of a run whose rows are read while it trains.

    A batch is the next `train.global_batch_size` sequences, wherever blocks end; an epoch's last may hold fewer.

    Args:
        shards: the files, in the order in which data.train names them.
        config: the settings.
        encoder: turns rows into tokens; None on a rank that does not read.
        share: called by all ranks once for each batch.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        config: RunConfig,
        encoder: Encoder | None,
        share: Share = lambda act: act(),
    ):
        self.shards, self.config, self.encoder, self._share = tuple(shards), config, encoder, share
        self.fate = Counter[str]()
        """Rows by what happened to them, of all blocks whose use began; empty on a rank that does not read."""
        self._fits: Fits = lambda largest, longest, rows: None

    def from_step(self, step: int, cursor: Mapping[str, Any] | None = None) -> Iterator[GlobalBatch]:
        """The batches from `step` on (the first is 0), without end, epoch after epoch.

        Args:
            cursor: the one of the batch before; without it the stream is read from its start and passed over.

        Raises:
            DataError: a shard or row is broken, a shard is shorter than it was, or an epoch has nothing to learn.
            JobError: the storage did not answer for too long.
        """
        made = self._batches(cursor or {}, step)

        def take() -> GlobalBatch:
            return next(made)

        try:
            while True:
                yield self._share(take)
        finally:
            made.close()

    def share(self, batch: GlobalBatch, rank: int, world_size: int, size: int) -> list[MicroBatch]:
        """This rank's micro-batches; see `micro_batches`."""
        assert batch.encoded is not None, "a batch of this stream"
        return micro_batches(batch.encoded, batch.sequences, rank, world_size, size)

    def steps(self, epochs: float) -> int:
        """A stream does not know how long it is.

        Raises:
            DataError: always.
        """
        raise DataError(f"data.streaming: nobody knows how many steps {epochs:g} epochs are. Set train.max_steps")

    def check(self, fits: Fits) -> None:
        """Have the rows judged: how long they may be now, so that a run is not refused days later, and each block."""
        fits(0, self.config.data.max_length, "streamed rows may have")
        self._fits = fits

    def report(self) -> str:
        """What will be read, in a sentence."""
        count, size = len(self.shards), sum(shard.size for shard in self.shards)
        files = "1 shard" if count == 1 else f"{count:,} shards"
        data = self.config.data
        order = f"shuffled among {data.shuffle_buffer:,} rows" if data.shuffle else "not shuffled"
        return f"streaming {files}, {size / 2**20:,.1f} MiB, {order}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' names and sizes: other files have another."""
        named = "".join(f"{shard.name}\n{shard.size}\n" for shard in self.shards)
        return sha256(named.encode()).hexdigest()

    def _batches(self, cursor: Mapping[str, Any], step: int) -> Generator[GlobalBatch, None, None]:
        at = cursor or dict.fromkeys(CURSOR, 0)
        if lacking := [name for name in CURSOR if name not in at]:
            raise DataError(f"data.train: the checkpoint's cursor lacks {', '.join(lacking)}. Remove that checkpoint")
        number, place = at["step"], at["sequences"]
        begin = Position(*(at[name] for name in ("epoch", "shard", "row", "block")))
        given_up = threading.Event()
        assert self.encoder is not None, "only a rank that reads asks for batches"
        blocks = _ahead(read_blocks(self.shards, self.config, self.encoder, begin, given_up, self._check))
        try:
            for batch in self._joined(blocks, number, place):
                if batch.step >= step:
                    yield batch
        finally:
            given_up.set()
            blocks.close()

    def _joined(self, blocks: Iterator[Block], number: int, skip: int) -> Iterator[GlobalBatch]:
        """Batches, each given when it is known where the sequence after it stands: that is what its cursor says."""
        pending: list[tuple[Block, int]] = []
        fate = Counter[str]()
        for block in blocks:
            fate += block.tokens.fate
            self.fate += block.tokens.fate
            if skip and skip >= len(block.order):
                raise DataError(
                    f"data.train: block {block.begin.block} of epoch {block.begin.epoch} has {len(block.order)} "
                    f"sequences, expected more than the {skip} that were trained on before the run stopped: the rows "
                    "are others. Put the files back that the run began with, or begin a new run at another output.url"
                )
            for place in range(skip, len(block.order)):
                if len(pending) == self.config.train.global_batch_size:
                    yield _batch(pending, number, _epoch(block, place), block.begin, place)
                    number, pending = number + 1, []
                pending.append((block, place))
            skip = 0
            if block.last:
                if not pending:
                    raise self._nothing(fate)
                epoch = block.begin.epoch + 1
                yield _batch(pending, number, float(epoch), Position(epoch), 0)
                number, pending, fate = number + 1, [], Counter()

    def _nothing(self, fate: Counter[str]) -> DataError:
        if not fate:
            return DataError(f"data.train: no rows in {len(self.shards)} files. Expected at least one")
        return DataError(f"data.train: {nothing_to_learn(fate)}")

    def _check(self, tokens: Tokens) -> None:
        if len(tokens):
            with rows_of("data.train"):
                self._fits(int(tokens.ids.max()), int(tokens.lengths.max()), "a row has")


def _epoch(block: Block, place: int) -> float:
    """Epochs passed before a sequence of a block: by the bytes of shards that were read through.

    It is a whole number nowhere: only the last batch of an epoch has one.
    """
    before, after = block.passed
    part = before + (after - before) * place / len(block.order)
    return block.begin.epoch + min(max(part, WITHIN), 1 - WITHIN)


def _batch(
    sequences: Sequence[tuple[Block, int]], number: int, epoch: float, begin: Position, place: int
) -> GlobalBatch:
    """The batch of these sequences; the one after it begins at sequence `place` of the block that begins at `begin`."""
    rows = [(block.tokens, row) for block, at in sequences for row in block.order[at]]
    pairs = [tokens[row] for tokens, row in rows]
    offsets = np.cumsum([0, *(len(ids) for ids, _ in pairs)])
    encoded = Tokens(
        np.concatenate([ids for ids, _ in pairs]),
        np.concatenate([learn for _, learn in pairs]),
        offsets,
        np.array([tokens.rows[row] for tokens, row in rows]),
    )
    ends = np.cumsum([0, *(len(block.order[at]) for block, at in sequences)])
    cursor = {
        **{"step": number + 1, "epoch": begin.epoch, "shard": begin.shard, "row": begin.row},
        **{"block": begin.block, "sequences": place},
    }
    return GlobalBatch(
        number,
        epoch,
        [list(range(start, stop)) for start, stop in pairwise(ends.tolist())],
        sum(learnable(learn) for _, learn in pairs),
        int(offsets[-1]),
        len(rows),
        cursor,
        encoded,
    )


def _ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The items; a thread makes the next one while one is in use, and no more."""
    wanted: SimpleQueue[bool] = SimpleQueue()
    made: SimpleQueue[tuple[list[T], BaseException | None]] = SimpleQueue()

    def work() -> None:
        while wanted.get():
            try:
                made.put(([next(items)], None))
            except BaseException as fault:  # the thread that waits for the item raises it
                made.put(([], fault))

    # a daemon: a storage that hangs keeps no process alive
    thread = threading.Thread(target=work, name="stream", daemon=True)
    thread.start()
    try:
        wanted.put(True)
        while True:
            item, fault = made.get()
            if fault:
                raise fault
            wanted.put(True)
            yield item.pop()
    finally:
        wanted.put(False)
        thread.join(GOODBYE_S)
