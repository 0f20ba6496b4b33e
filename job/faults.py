"""Settings that do not go with each other or with the machine, one `section.key: sentence` each."""

from job.config import RunConfig
from job.families import family_of, unread_experts
from job.shape import Shape
from job.world import Hardware, World


def one_round(config: RunConfig, world: World) -> int:
    """Rows that all ranks take at once."""
    return config.train.micro_batch_size * world.world_size


def batch_faults(config: RunConfig, world: World) -> list[str]:
    """Batches that do not divide."""
    train, together = config.train, one_round(config, world)
    if not train.global_batch_size % together:
        return []
    below = max(train.global_batch_size - train.global_batch_size % together, together)
    return [
        f"train.global_batch_size: {train.global_batch_size} is not a multiple of {together} "
        f"({train.micro_batch_size} per rank x {world.world_size} ranks). Try {below} or {below + together}"
    ]


def expert_faults(config: RunConfig, model_type: str, shape: Shape | None) -> list[str]:
    """Experts that quantization would not reach."""
    family = family_of({"model_type": model_type})
    reached = family is not None and family.experts
    if shape is None or shape.experts_per_token <= 1 or config.quantization.type == "none" or reached:
        return []
    if any("*" in linear.path for linear in shape.linears):  # apart in the files
        return [f"model.name: {unread_experts(model_type)}"]
    return [
        f"quantization.type: {config.quantization.type} does not reach the experts of {model_type}, which are "
        "fused and would stay in 16 bits. Use a dense model, or none"
    ]


def attention_faults(config: RunConfig, hardware: Hardware) -> list[str]:
    """Attention that is not there, or would let packed rows see each other."""
    attention, faults = config.model.attention, []
    if attention.startswith("flash") and hardware.device == "cpu":
        faults.append(f"model.attention: {attention} needs a GPU. Use sdpa")
    if attention.startswith("flash") and max(config.train.micro_batch_size, config.evaluation.micro_batch_size) > 1:
        faults.append(
            f"model.attention: {attention} keeps packed rows apart only at train.micro_batch_size and "
            "evaluation.micro_batch_size 1. Set both to 1, or use sdpa"
        )
    return faults


def offload_faults(config: RunConfig, hardware: Hardware) -> list[str]:
    """Activations that there are none of to offload, or nowhere to."""
    if not config.train.offload_activations:
        return []
    faults = []
    if hardware.device == "cpu":
        faults.append("train.offload_activations: here is no GPU whose memory it would spare. Use false")
    if config.train.recompute == "none":
        faults.append("train.offload_activations: recompute none keeps all on the GPU. Use train.recompute: full")
    return faults


def fp8_faults(config: RunConfig, hardware: Hardware, precision: str) -> list[str]:
    """What FP8 products do not go with."""
    if config.train.base_compute != "fp8":
        return []
    faults = []
    if not hardware.fp8 or hardware.device == "cpu":
        faults.append(f"train.base_compute: {hardware.name} has no FP8 units, as GPUs from Hopper on have. Use bf16")
    elif precision != "bf16":
        faults.append(f"train.base_compute: fp8 goes with train.precision bf16, and here it is {precision}. Use bf16")
    others = {
        "train.fused: false": not config.train.fused,
        "lora.dora: true": config.lora.dora,
        "quantization.type: int8": config.quantization.type == "int8",
    }
    faults += [
        f"{name} has products that are not in FP8. Use another value, or train.base_compute: bf16"
        for name, wrong in others.items()
        if wrong
    ]
    return faults


def value_faults(config: RunConfig, shards_base: bool) -> list[str]:
    """Values of the base that cannot be kept."""
    if config.train.dequantize != "once":
        return []
    if not config.train.fused or config.lora.dora or config.quantization.type not in ("nf4", "fp4"):
        return ["train.dequantize: once is for 4-bit weights, train.fused: true and no DoRA. Use auto, or set these"]
    if shards_base:
        return ["train.dequantize: once keeps the values of a whole base, and here it is sharded. Use auto, or always"]
    return []
