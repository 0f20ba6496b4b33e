"""What ZeRO-3's bookkeeping costs a step in CPU time: DeepSpeed's way with layers, and ours.

    python -m bench.layer_gathers

Two ranks on this machine's CPU over gloo, 32 decoder layers of seven linears with an adapter each, as a 7B Llama has
them, but of 32 features and one token, so that next to nothing is computed: what remains is what Python and torch do to
gather, release, reduce and step. Prints the median of the steps after the fourth of rank 0, in milliseconds of its
process's CPU time. On a GPU the same work has to be done before kernels can be started. Results with date and hardware:
bench/RESULTS.md.
"""

import json
import os
import statistics
import time

import deepspeed
import torch
import torch.multiprocessing as processes
from torch import nn

from job.all_at_once import step_all_at_once
from job.layer_gathers import gather_layers_at_once
from job.preflight.probe import free_port

LAYERS, LINEARS, WIDTH, RANK = 32, 7, 32, 2
STEPS, WARM_UP, RANKS = 20, 4, 2


class Adapted(nn.Module):
    """A frozen linear with LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x))  # type: ignore[no-any-return]


class Layer(nn.Sequential):
    """A unit of ZeRO-3's gathers."""

    def __init__(self) -> None:
        super().__init__(*(Adapted() for _ in range(LINEARS)))


def measure(rank: int, port: int, ours: bool) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    model = nn.Sequential(*(Layer() for _ in range(LAYERS)))
    deepspeed.utils.set_z3_leaf_modules(model, [Layer])
    trained = [value for value in model.parameters() if value.requires_grad]
    weights = LINEARS * WIDTH * WIDTH
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": WIDTH * RANK,
        "stage3_max_live_parameters": 2 * weights,
        "stage3_max_reuse_distance": 2 * weights,
        "stage3_prefetch_bucket_size": weights,
    }
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=config)
    step_all_at_once(engine.optimizer)
    if ours and not gather_layers_at_once(engine):
        raise SystemExit("the layers were left to DeepSpeed")
    seconds: dict[str, list[float]] = {"forward": [], "backward": [], "step": []}
    for _ in range(STEPS):
        x = torch.randn(1, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        begun = time.process_time()
        loss = engine(x).float().sum()
        after_forward = time.process_time()
        engine.backward(loss)
        after_backward = time.process_time()
        engine.step()
        seconds["forward"].append(after_forward - begun)
        seconds["backward"].append(after_backward - after_forward)
        seconds["step"].append(time.process_time() - after_backward)
    if rank == 0:
        medians = {name: round(1000 * statistics.median(values[WARM_UP:]), 1) for name, values in seconds.items()}
        print(json.dumps({"layers": "ours" if ours else "DeepSpeed's", **medians}), flush=True)


if __name__ == "__main__":
    for ours in (False, True, False, True):
        processes.spawn(measure, (free_port(29500), ours), nprocs=RANKS)
