"""Model families: a file of plain data each, and this table of them.

A model that is in none of them but that transformers knows is read by what its modules are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from job.families.chatglm import CHATGLM
from job.families.family import Family
from job.families.gemma import GEMMA, GEMMA3
from job.families.glm import GLM
from job.families.gpt2 import GPT2
from job.families.gpt_neox import GPT_NEOX
from job.families.llama import LLAMA
from job.families.mistral import MISTRAL
from job.families.mixtral import MIXTRAL
from job.families.olmoe import OLMOE
from job.families.opt import OPT
from job.families.phi import PHI
from job.families.qwen import QWEN
from job.families.qwen2 import QWEN2, QWEN2_MOE, QWEN3_MOE

FAMILIES = (
    LLAMA,
    MISTRAL,
    MIXTRAL,
    OLMOE,
    QWEN2,
    QWEN2_MOE,
    QWEN3_MOE,
    QWEN,
    GLM,
    CHATGLM,
    GEMMA,
    GEMMA3,
    PHI,
    OPT,
    GPT2,
    GPT_NEOX,
)
"""Every family."""


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family that a parsed config.json belongs to; None for one that is in no file here."""
    return next((family for family in FAMILIES if config.get("model_type") in family.model_types), None)


def unread_experts(model_type: str) -> str:
    """Why a Mixture-of-Experts of none of these families is not read."""
    known = ", ".join(family.name for family in FAMILIES if family.experts)
    return (
        f"transformers makes the fused experts of {model_type} of other tensors in its files, which is done here for "
        f"{known} alone. Use one of these, or a dense model"
    )


def adapted(targets: str | Sequence[str], model_type: str) -> tuple[str, ...] | None:
    """The linears, by last name, that get an adapter.

    Args:
        targets: lora.targets; a text is the family's own choice. A name that the model's authors had, where they had
            others than transformers, is the linears that it became: query_key_value is q_proj, k_proj and v_proj.
        model_type: transformers' name of the architecture.

    Returns:
        None for every linear in the layers, of a model that is in no family.
    """
    if isinstance(targets, str):
        family = family_of({"model_type": model_type})
        return family.targets if family else None
    names = [part for name in targets for part in _parts(name, model_type)]
    return tuple(dict.fromkeys(names))


def fused(model_type: str) -> tuple[tuple[str, ...], ...]:
    """The linears, by last name, that are one in the authors' own naming of transformers' architecture: by groups."""
    return tuple(parts for family in _authors(model_type) for parts in family.fused)


def _authors(model_type: str) -> list[Family]:
    return [family for family in FAMILIES if family.native_type == model_type]


def _parts(name: str, model_type: str) -> tuple[str, ...]:
    return next((parts for family in _authors(model_type) if (parts := family.parts(name))), (name,))
