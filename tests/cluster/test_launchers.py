"""A run over several hosts has the losses of one process, whoever starts it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.hosts import Host
from tests.cluster.launching import Launched, over_ssh, with_torchrun, without_ssh
from tests.conftest import losses, qlora

RunFile = Callable[..., Path]


@pytest.fixture(scope="module")
def expected(run_of: RunFile) -> list[float]:
    """Losses of one process."""
    config = run_of("alone")
    done = qlora("train", config)
    assert done.returncode == 0, done.stderr
    return losses(config.with_suffix(""))


@pytest.mark.parametrize(
    ("launch", "strategy"),
    [(over_ssh, "zero3"), (over_ssh, "replicate"), (without_ssh, "zero3"), (with_torchrun, "replicate")],
)
def test_two_hosts_give_the_losses_of_one_process(
    run_of: RunFile,
    expected: list[float],
    two_hosts: list[Host],
    tmp_path: Path,
    launch: Callable[..., Launched],
    strategy: str,
) -> None:
    config = run_of(f"{launch.__name__}-{strategy}", strategy=strategy)
    launched = launch(tmp_path, two_hosts, "job", "train", config)
    assert not any(launched.codes()), launched.said()
    assert losses(config.with_suffix("")) == pytest.approx(expected, rel=1e-5)


def test_two_ranks_on_each_host_shard_within_it(
    run_of: RunFile, expected: list[float], two_hosts: list[Host], tmp_path: Path
) -> None:
    config = run_of("hpz", strategy="hpz", persistence=0)
    launched = over_ssh(tmp_path, two_hosts, "job", "train", config, slots=2)
    assert launched.codes() == [0], launched.said()
    assert losses(config.with_suffix("")) == pytest.approx(expected, rel=1e-5)


def test_ranks_know_their_host_from_deepspeeds_variables(two_hosts: list[Host], tmp_path: Path) -> None:
    launched = over_ssh(tmp_path, two_hosts, "tests.cluster.woke", slots=2)
    assert launched.codes() == [0], launched.said()
    woke = [line.partition("woke ")[2] for line in launched.said().splitlines() if "woke " in line]
    assert sorted(woke) == ["0 4 0 2 2", "1 4 1 2 2", "2 4 0 2 2", "3 4 1 2 2"]
