"""ZeRO-3's decoder layers gathered in one collective each: DeepSpeed's numbers, and no more than two layers whole."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Executor, ProcessPoolExecutor, wait
from datetime import timedelta
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from job.layer_gathers import gather_layers_at_once
from tests.ranks import free_port

WIDTH, LAYERS, TRAINED = 16, 5, 4
RANKS = 2
HEADS = ("is read back", "takes the loss", "learns")
"""What the backward pass has to do with the head."""


class Layer(nn.Module):
    """A frozen linear, a frozen norm that stays whole, and a narrow pair that learns."""

    def __init__(self, width: int):
        super().__init__()
        self.base = nn.Linear(WIDTH, width, bias=False).requires_grad_(False)
        self.back = nn.Linear(width, WIDTH, bias=False).requires_grad_(False)
        self.norm = nn.LayerNorm(WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, TRAINED, bias=False), nn.Linear(TRAINED, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.tanh(self.base(self.norm(x)))
        # autograd keeps a view of this weight; for linears DeepSpeed has a function of its own that does not
        return x + torch.tanh(wide @ self.back.weight.t() + self.up(self.down(x)))


class Head(nn.Linear):
    """One that can do without its weight in the backward pass, as one that takes the loss does."""

    took_loss = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.detach() @ self.weight.detach().t() if self.took_loss else super().forward(x)


class Model(nn.Module):
    """Layers between linears and an embedding that are no layers; not all layers are equally large."""

    def __init__(self, again: bool):
        super().__init__()
        self.words, self.first = nn.Embedding(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Layer(width) for width in (31, 31, 31, 48, 31)[:LAYERS])
        self.last = Head(WIDTH, WIDTH)
        self.again = again
        self.words.register_forward_hook(lambda *given: given[-1].requires_grad_())  # enable_input_require_grads
        self.requires_grad_(False)
        for layer in self.layers:
            layer.down.requires_grad_(True)
            layer.up.requires_grad_(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + self.words((x[:, 0] > 0).long())
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.again and self.training else layer(x)
        return self.last(x)


@pytest.fixture(scope="module")
def ranks() -> Iterator[list[Executor]]:
    """Two processes, each a rank of DeepSpeed's."""
    port, spawn = free_port(), multiprocessing.get_context("spawn")
    shared = {"WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    found = [
        ProcessPoolExecutor(1, spawn, _begin, ({"RANK": rank, "LOCAL_RANK": rank, **shared},)) for rank in range(RANKS)
    ]
    yield found
    for one in found:
        one.shutdown()


def _begin(names: dict[str, Any]) -> None:
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    # where one rank fails, the other is not to wait for it for long
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=120))


def everywhere(ranks: list[Executor], what: Any, *args: Any) -> None:
    done, _ = wait([one.submit(what, *args) for one in ranks], timeout=600, return_when=FIRST_EXCEPTION)
    assert done
    for future in done:
        future.result()
    assert len(done) == len(ranks)


def engine(
    again: bool, ours: bool, ahead: bool = True, persistence: int = TRAINED * WIDTH, head: str = "is read back"
) -> Any:
    """DeepSpeed's, of a model whose head is one of HEADS."""
    torch.manual_seed(0)
    model = Model(again)
    model.last.took_loss = head == "takes the loss"
    model.last.weight.requires_grad_(head == "learns")
    deepspeed.utils.set_z3_leaf_modules(model, [Layer])
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": persistence},
    }
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    made, *_ = deepspeed.initialize(model=model, model_parameters=trained, optimizer=optimizer, config=config)
    if ours:
        assert gather_layers_at_once(made, ahead) == (persistence == TRAINED * WIDTH)
    return made


def batch(step: int) -> torch.Tensor:
    own = torch.Generator().manual_seed(10 * step + torch.distributed.get_rank())
    return torch.randn(4, WIDTH, generator=own).bfloat16()


def stepped(made: Any, step: int) -> tuple[list[float], list[torch.Tensor]]:
    """The losses of two micro-batches and of an evaluation after them, and what is learnt then."""
    found = []
    for part in range(2):
        made.train()
        made.set_gradient_accumulation_boundary(part == 1)
        loss = (made(batch(2 * step + part).requires_grad_()).float() ** 2).sum()
        made.backward(loss)
        made.step()
        found.append(float(loss))
    made.eval()
    with torch.no_grad():
        found.append(float((made(batch(99)).float() ** 2).sum()))
    trained = [value for value in made.module.parameters() if value.requires_grad]
    return found, [value.detach().clone() for value in trained]


def gathered_now(made: Any) -> int:
    """Layers whose frozen weights are whole."""
    return sum(layer.base.weight.numel() > 0 for layer in made.module.layers)


def same(again: bool, ahead: bool, head: str) -> None:
    theirs, ours = engine(again, ours=False, head=head), engine(again, ours=True, ahead=ahead, head=head)
    for step in range(4):
        expected, found = stepped(theirs, step), stepped(ours, step)
        assert found[0] == expected[0]
        assert all(torch.equal(one, other) for one, other in zip(found[1], expected[1], strict=True))
        assert gathered_now(ours) == 0, "weights stay whole between steps"


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("ahead", [True, False], ids=["one ahead", "none ahead"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_losses_and_what_is_learnt_are_deepspeeds_bit_for_bit(
    ranks: list[Executor], again: bool, ahead: bool, head: str
) -> None:
    everywhere(ranks, same, again, ahead, head)


def counted(again: bool, ahead: bool, took_loss: bool) -> None:
    made = engine(again, ours=True, ahead=ahead, head=HEADS[took_loss])
    layers = made.optimizer.parameter_offload.get_param_coordinator().layers
    begun: list[int] = []
    most: list[int] = []
    begin = layers._begin

    def seen(place: int) -> Any:
        begun.append(place)
        found = begin(place)
        most.append(len(layers.held))
        return found

    layers._begin = seen
    made.train()
    loss = (made(batch(0).requires_grad_()).float() ** 2).sum()
    everything = range(LAYERS + 2)  # the embedding before the layers, the head behind them
    # behind a head that took the loss the last layer is on its way again
    assert begun == [*everything, *([LAYERS] if took_loss and ahead else [])]
    assert max(most[: LAYERS + 2]) == 1 + ahead
    made.backward(loss)
    # the head stays for its backward pass if it has one, the embedding has none
    assert begun == [*everything, *reversed(everything[1:-1])]
    assert max(most[len(everything) :]) == 1 + ahead and not layers.held
    by_deepspeed: list[Any] = []
    gather = deepspeed.comm.all_gather_into_tensor
    deepspeed.comm.all_gather_into_tensor = lambda *given, **how: by_deepspeed.append(given) or gather(*given, **how)
    made.step()
    deepspeed.comm.all_gather_into_tensor = gather
    assert len(by_deepspeed) == 1, "more than the bias of the first linear was gathered by itself"
    assert all(layer.up.weight.numel() == TRAINED * WIDTH for layer in made.module.layers)


@pytest.mark.parametrize("took_loss", [False, True])
@pytest.mark.parametrize("ahead", [True, False], ids=["one ahead", "none ahead"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_each_layer_is_gathered_once_forward_and_once_back(
    ranks: list[Executor], again: bool, ahead: bool, took_loss: bool
) -> None:
    everywhere(ranks, counted, again, ahead, took_loss)


def beside_layers(took_loss: bool) -> None:
    made = engine(again=False, ours=True, head=HEADS[took_loss])
    module, layers, head = made.module, made.optimizer.parameter_offload.get_param_coordinator().layers, LAYERS + 1
    words, last = module.words.weight, module.last.weight  # who asks a module for them, gets them gathered
    begun: list[int] = []
    begin, release = layers._begin, layers.release

    def noted(place: int) -> Any:
        begun.append(place)
        # where there are most activations the head is whole alone, and before, two layers
        assert place != head or not layers.held or not module.training
        return begin(place)

    seen: list[tuple[bool, bool]] = []
    after_last: list[list[int]] = []

    def released(one: nn.Module, forward: bool) -> None:
        release(one, forward)
        if one is module.layers[-1] and forward:
            after_last.append([*layers.held])

    layers._begin, layers.release = noted, released
    for layer in module.layers:
        layer.register_forward_pre_hook(lambda *_: seen.append((words.numel() > 0, head in layers.held)))
        layer.register_full_backward_pre_hook(lambda *_: seen.append((words.numel() > 0, head in layers.held)))
    for step in range(2):
        made.train()
        loss = (made(batch(step).requires_grad_()).float() ** 2).sum()
        assert seen == [(False, False)] * LAYERS and after_last == [[head]]
        # the head stays for a backward pass that reads it; with it the last layer comes again, or behind it
        assert (last.numel() > 0) == (not took_loss)
        assert begun == [*range(LAYERS + 2), *([LAYERS] if took_loss else [])]
        made.backward(loss)
        assert seen == [(False, False)] * 2 * LAYERS and last.numel() == 0
        assert begun == [*range(LAYERS + 2), *reversed(range(1, LAYERS + 1))]
        made.step()
        made.eval()
        with torch.no_grad():
            made(batch(step))
        assert not layers.held, "what an evaluation gathered stays"
        assert seen[2 * LAYERS :] == [(False, False)] * (LAYERS - 1) + [(False, True)], "the head is on its way there"
        for each in (seen, after_last, begun):
            each.clear()


@pytest.mark.parametrize("took_loss", [True, False])
def test_embedding_and_head_do_not_wait_for_each_other(ranks: list[Executor], took_loss: bool) -> None:
    everywhere(ranks, beside_layers, took_loss)


def asked_for() -> None:
    """An embedding that a layer asks its owner for is let go after the step too."""
    made = engine(again=False, ours=True)
    module, words, asked = made.module, made.module.words.weight, []
    module.layers[1].register_forward_pre_hook(lambda *_: asked.append(module.words.weight.sum()))
    made.train()
    made.backward((made(batch(0).requires_grad_()).float() ** 2).sum())
    here = words.numel()
    made.step()
    assert asked and here and not words.numel()


def test_what_a_layer_asks_another_module_for_is_let_go(ranks: list[Executor]) -> None:
    everywhere(ranks, asked_for)


def left_to_deepspeed() -> None:
    made = engine(again=False, ours=True, persistence=0)  # what is trained is spread too
    assert not hasattr(made.optimizer.parameter_offload.get_param_coordinator(), "layers")
    assert stepped(made, 0)[0] == stepped(engine(again=False, ours=False, persistence=0), 0)[0]


def test_layers_whose_trained_parameters_are_spread_stay_deepspeeds(ranks: list[Executor]) -> None:
    everywhere(ranks, left_to_deepspeed)


def gathered_by_name() -> None:
    """What is read between steps, as checkpoints and the proof of the base do, is whole."""
    from job.sharding import gathered

    made = engine(again=False, ours=True)
    stepped(made, 0)
    torch.manual_seed(0)
    expected = dict(Model(False).bfloat16().named_parameters())
    for name, value in gathered(made.module.named_parameters()):
        if not expected[name].requires_grad:
            assert torch.equal(value, expected[name])
    assert min(stepped(made, 1)[0]) > 0 and gathered_now(made) == 0


def test_a_parameter_can_be_gathered_by_itself_between_steps(ranks: list[Executor]) -> None:
    everywhere(ranks, gathered_by_name)
