"""Which tensor of a checkpoint fills which parameter of a module, and how; all that does not fit is named."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from typing import Any

import bitsandbytes as bnb
from torch import nn

from job.errors import ModelError
from job.reading import REQUEST, Range, read_ahead
from job.shape import HEADS, IGNORED
from job.store import Store
from job.tensors import Tensor
from job.weights import TORCH_DTYPE, Share


def matched(
    model: Any,
    made: Callable[..., Any],
    headers: Mapping[str, Tensor],
    store: Store,
    name: str,
    storage_bytes: int = 1,
    agree: Callable[[Callable[[], bool]], bool] = lambda look: look(),
) -> tuple[Any, list[Share]]:
    """The module and its `shares` of the files; one with an output layer of its own in the place of a tied one, where
    the files hold other values for it.

    Args:
        made: makes the module, and with `untied` such a one.
        store: the files.
        agree: has one rank look for all.

    Raises:
        ModelError: as `shares`, and with JobError as `job.reading.read_ahead`.
    """
    if agree(lambda: _has_own_head(model, headers, store)):
        model = made(untied=True)
    return model, shares(model, headers, name, storage_bytes)


def shares(model: nn.Module, headers: Mapping[str, Tensor], name: str, storage_bytes: int = 1) -> list[Share]:
    """Each parameter whole, tied ones once, in the order in which they lie in the files.

    Args:
        headers: the checkpoint's tensors by name; those of a model without an output layer may lack its prefix.
        storage_bytes: bytes of the elements that hold packed 4-bit weights.

    Raises:
        ModelError: the checkpoint lacks a parameter, or one has another shape, or tensors are left over.
    """
    wanted, faults = [], []
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    used = set()
    for parameter, value in model.named_parameters(remove_duplicate=False):
        tensor = _find(model, parameter, headers)
        if tensor is None and parameter in tied:
            continue
        if tensor is None:  # some files name what is tied by the output layer alone
            twins = (_find(model, twin, headers) for twin, source in tied.items() if source == parameter)
            tensor = next(filter(None, twins), None)
        share = None if tensor is None else _share(model, parameter, tensor, storage_bytes)
        shape = _shape(model, parameter, value)
        if tensor is None or share is None or share.shape != shape or tensor.dtype not in TORCH_DTYPE:
            found = "is missing" if tensor is None else f"has shape {list(tensor.shape)} of {tensor.dtype}"
            faults.append(f"{parameter} {found}, expected {list(shape)} of 16- or 32-bit floats")
            continue
        used.add(tensor.name)
        if parameter not in tied:
            wanted.append(share)
    left = [key for key in headers if key not in used and not key.endswith(IGNORED)]
    faults += [f"{key} is in the checkpoint but not in the model" for key in left]
    if faults:
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(
            f"model.name: the weights of {name} do not fit its config.json\n  " + "\n  ".join(faults[:5]) + more
        )
    return sorted(wanted, key=lambda share: (share.tensor.file, share.tensor.start))


def _has_own_head(model: Any, headers: Mapping[str, Tensor], store: Store) -> bool:
    """Whether the files hold other values for what config.json ties to the embedding: then they are right, as for
    transformers. Both are read only where both are there, and no further than to the first difference."""
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        one, other = (_find(model, parameter, headers) for parameter in (name, source))
        if one is not None and other is not None and one.name != other.name and not _equal(one, other, store):
            return True
    return False


def _equal(one: Tensor, other: Tensor, store: Store) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if (one.file, one.start) == (other.file, other.start):
        return True
    ranges = [
        Range(tensor.file, tensor.start + start, tensor.start + min(start + REQUEST, one.nbytes))
        for start in range(0, one.nbytes, REQUEST)
        for tensor in (one, other)
    ]
    with closing(read_ahead(store, ranges)) as contents:
        return all(first == next(contents) for first in contents)


def _find(model: Any, parameter: str, headers: Mapping[str, Tensor]) -> Tensor | None:
    return next((headers[key] for key in _names(model, parameter) if key in headers), None)


def _names(model: Any, parameter: str) -> Iterator[str]:
    """What a checkpoint may call a parameter."""
    yield parameter
    yield parameter.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
    if parameter in HEADS:
        yield from HEADS


def _share(model: nn.Module, parameter: str, tensor: Tensor, storage_bytes: int) -> Share:
    module: Any = model.get_submodule(parameter.rpartition(".")[0])
    if not _is_quantized(module, parameter):
        return Share(parameter, tensor, 0, tensor.numel, False)
    # beside nn.Linear, transformers' Conv1D alone is made a quantized linear, and its weight is [in, out]
    transposed = getattr(module, "source_cls", nn.Linear) is not nn.Linear
    # a row of int8 has its scale
    unit = 2 * storage_bytes if isinstance(module, bnb.nn.Linear4bit) else module.in_features
    return Share(parameter, tensor, 0, tensor.numel, True, unit, transposed)


def _shape(model: nn.Module, parameter: str, value: Any) -> tuple[int, ...]:
    module: Any = model.get_submodule(parameter.rpartition(".")[0])
    return (module.out_features, module.in_features) if _is_quantized(module, parameter) else tuple(value.shape)


def _is_quantized(module: nn.Module, parameter: str) -> bool:
    return isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)) and parameter.endswith(".weight")
