"""The time of a check before a run: one for all its stages, and what is said when it is over."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from job.config import load_config
from job.preflight.limit import Budget
from job.preflight.verb import Options
from job.world import World

RunFile = Callable[..., Path]


def test_the_stages_of_a_check_share_its_time() -> None:
    budget = Budget(40)
    assert 35 < budget.act_s < budget.left_s <= 40 and not budget.short
    budget.give(5)
    assert 0 < budget.act_s < budget.left_s <= 5 and budget.short, "too little to tell who hangs"
    budget.give(-1)
    assert budget.left_s == budget.act_s == 0 and budget.seconds == 40
    assert Budget(2).margin_s == 0.25 and not Budget(2).short


def test_a_check_whose_time_is_nearly_over_blames_nobody(run_file: RunFile, monkeypatch: pytest.MonkeyPatch) -> None:
    from job.preflight.collective import Asked, check

    monkeypatch.setattr(Budget, "short", True)
    verdict = check(Asked(load_config(str(run_file())), 30, (), 29500), World(), print)
    assert not verdict.ok and not verdict.bad
    assert verdict.lines() == [
        "the check stopped before its stage 'reports': of 30 s for all of them, arrival took 0 s. Give it more "
        "(--timeout; on SLURM QLORA_PREFLIGHT_S)"
    ]


def test_a_time_by_which_to_be_over_counts_instead_of_seconds() -> None:
    assert 17 < Options(False, 1, 45, (), None, time.time() + 20).limit_s <= 20
    assert Options(False, 1, 45, (), None, time.time() - 20).limit_s == 1
    assert Options(False, 1, 45, (), None).limit_s == 45
