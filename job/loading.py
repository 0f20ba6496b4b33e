"""From a checkpoint to a filled module: each rank reads its share, and the strategy decides what becomes of it."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from job.cache import Cache
from job.config import RunConfig
from job.config.learning import Model, Quantization
from job.config.running import Storage
from job.convert import has_tokenizer
from job.endings import generation_config
from job.errors import InputError
from job.hardware import peak_memory_gib
from job.matching import matched
from job.model import DTYPE, build, place
from job.plan import Plan
from job.pretrained import fetch, fetch_weights, read_config, read_tensors
from job.sharding import Receipts, own_shares, partitioner, scales_of_all, whole
from job.sinks import LoadingBar
from job.store import Store
from job.tokenizer import Tokenizer
from job.weights import Share, stream
from job.world import World

T = TypeVar("T")


def fill(
    skeleton: Any,
    wanted: Sequence[Share],
    checkpoint: Store,
    config: RunConfig,
    plan: Plan,
    world: World,
    say: Callable[[str], None],
) -> Receipts:
    """Fill the module with the base, quantized on the way: whole on every rank, or this rank's partitions.

    Args:
        skeleton: the module on the meta device.
        wanted: its parameters in the checkpoint, whole.
        checkpoint: the folder with the weights.
        say: hears why a cache of the weights is not used.

    Returns:
        What this rank quantized, to prove that it is what every rank holds.

    Raises:
        ModelError: a file is missing or cut off.
        JobError: the storage failed.
    """
    begun, mine, receipts = time.monotonic(), own_shares(wanted, world), Receipts(world)
    with LoadingBar(sum(share.nbytes for share in mine), world.speaks) as bar:
        pieces = receipts.keep(
            stream(
                checkpoint,
                mine,
                config.quantization,
                DTYPE[plan.precision],
                plan.device,
                exchange=scales_of_all(world),
                progress=bar,
                cache=Cache.of(config.storage, say),
            )
        )
        if plan.zero.shards_base:
            place(skeleton, pieces, plan.device, hold=partitioner(plan, world, wanted))
        else:
            place(skeleton, whole(pieces, world), plan.device)
    read, total = (sum(share.nbytes for share in shares) / 1e9 for shares in (mine, wanted))
    seconds = time.monotonic() - begun
    said = f"base: {read:.2f} of {total:.2f} GB read by this rank, quantized and placed in {seconds:.1f} s"
    say(f"{said}; peak memory so far {peak_memory_gib('cpu'):.1f} GiB" + _on_gpu(plan))
    return receipts


def _on_gpu(plan: Plan) -> str:
    return f", {peak_memory_gib('cuda'):.1f} on the GPU" if plan.device == "cuda" else ""


def load_base(url: str, quantization: str = "none", dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """The frozen base, for one process, in evaluation mode: read as a run reads it.

    Args:
        url: folder, URL or hub id of a checkpoint, by transformers' names or by its authors' own.
        quantization: none, or nf4 with double quantization.
        dtype: float32, bfloat16 or float16, of all that is not quantized and of every product.
        device: where it is put, by torch's name.

    Returns:
        transformers' model, whose `generate` ends answers as its authors' did, and tokenizer; None for the tokenizer
        where the folder has none.

    Raises:
        InputError: an argument is none of these, or there is no model that can be read; a setting of config.json that
            cannot be represented is named before any weight is looked for.
    """
    precision = _one_of("dtype", dtype, {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"})
    model, storage = Model(name=url), Storage()
    how = _one_of("quantization", quantization, {name: Quantization(type=name) for name in ("none", "nf4")})
    files, store = fetch(model, storage)
    made = partial(build, read_config(files, model), model, how, precision, precision)
    base = made()
    tokenizer = Tokenizer(files) if has_tokenizer(Store(files).names()) else None
    answers = generation_config(files, model, base.config, tokenizer)
    checkpoint = fetch_weights(model, store, storage)
    base, wanted = matched(base, made, read_tensors(files, checkpoint, model), checkpoint, url)
    place(base, stream(checkpoint, wanted, how, DTYPE[precision], device), device)
    if base.can_generate():
        base.generation_config = answers
    return base.eval(), _for_others(tokenizer) if tokenizer else None


def _for_others(tokenizer: Tokenizer) -> Any:
    """transformers' tokenizer, to whose `apply_chat_template` the tokens of the template are special."""
    if tokenizer.family_chat:
        tokenizer.inner.split_special_tokens = False  # as in the saved one
    return tokenizer.inner


def _one_of(argument: str, value: str, known: dict[str, T]) -> T:
    if value not in known:
        raise InputError(f"load_base: {argument} is {value}, expected {', '.join(known)}")
    return known[value]
