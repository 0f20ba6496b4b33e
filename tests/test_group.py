"""What ranks agree on."""

import pickle
import re
from typing import Any

import pytest

from job import group
from job.errors import ConfigError, InputError
from job.world import Hardware, World

BIG = Hardware("cuda", "A", True, 80.0, 2)
SMALL = Hardware("cuda", "B", False, 24.0, 1, rows="plain")


def test_ranks_plan_by_the_least_that_any_of_them_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "everyone", lambda world, mine: [(2, BIG), (2, BIG), (1, SMALL)])
    world, hardware = group.agree_on_hardware(World(0, 3, 0, local_world_size=2), BIG)
    assert (hardware.memory_gib, hardware.bf16, hardware.rows, hardware.name) == (24.0, False, "plain", "A")
    assert (world.ranks_per_node, world.even) == (2, False)


def test_ranks_with_and_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    none = Hardware("cpu", "4 CPU cores", True, 8.0)
    monkeypatch.setattr(group, "everyone", lambda world, mine: [(1, BIG), (1, none)])
    expected = "some ranks have a GPU and others none (rank 0 A, rank 1 4 CPU cores). Give all of them the same"
    with pytest.raises(InputError, match=re.escape(expected)):
        group.agree_on_hardware(World(0, 2), BIG)


@pytest.mark.parametrize(
    ("env", "said"),
    [({}, "MASTER_ADDR is not set and MASTER_PORT is not set"), ({"MASTER_PORT": "abc"}, "MASTER_PORT is abc")],
)
def test_ranks_that_cannot_find_each_other_are_told_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, Any], said: str
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"MASTER_ADDR": "127.0.0.1"} | env if env else {}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=said):
        group._check_address()


def test_a_refusal_travels_between_ranks_as_it_is() -> None:
    fault = ConfigError("a.yaml", ["lora.rank: 0 is wrong", "train.seed: x is wrong"])
    again = pickle.loads(pickle.dumps(fault))
    assert (type(again), str(again), again.faults) == (ConfigError, str(fault), fault.faults)
