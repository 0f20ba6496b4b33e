"""This process among its peers, read from the environment alone."""

from collections.abc import Mapping

import pytest

from job.errors import InputError
from job.world import World

SLURM = {"SLURM_JOB_ID": "77", "SLURM_PROCID": "5", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("env", "local_rank", "world"),
    [
        ({}, None, World()),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, None, World(3, 8, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8"}, 2, World(3, 8, 2)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 2, World(3, 8, 1)),
        ({}, 0, World()),
        (SLURM, None, World(job_id="77", attempt=0)),
        (SLURM | {"SLURM_RESTART_COUNT": "2"}, None, World(job_id="77", attempt=2)),
    ],
    ids=[
        "alone",
        "torchrun",
        "deepspeed's argument",
        "variable before argument",
        "argument 0",
        "slurm names the job",
        "slurm restarts",
    ],
)
def test_the_launcher_s_variables_say_who_this_is(env: Mapping[str, str], local_rank: int | None, world: World) -> None:
    assert World.from_env(env, local_rank) == world


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "one"}, "The environment's RANK is 'one', expected a number. Unset it or use a launcher"),
        ({"WORLD_SIZE": "-1"}, "The environment's WORLD_SIZE is '-1', expected a number. Unset it or use a launcher"),
        ({"LOCAL_RANK": ""}, "The environment's LOCAL_RANK is '', expected a number. Unset it or use a launcher"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 of WORLD_SIZE 2, expected less"),
        ({"RANK": "1"}, "RANK is 1 of WORLD_SIZE 1, expected less"),
        ({"WORLD_SIZE": "0"}, "RANK is 0 of WORLD_SIZE 0, expected less"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(env: Mapping[str, str], message: str) -> None:
    with pytest.raises(InputError) as refused:
        World.from_env(env)
    assert str(refused.value) == message


def test_only_the_first_rank_speaks() -> None:
    assert [World(rank, 3).speaks for rank in range(3)] == [True, False, False]


def test_our_own_launchers_name_of_a_job_wins_over_a_schedulers() -> None:
    env = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "3", "QLORA_JOB_ID": "ray-1", "QLORA_JOB_ATTEMPT": "2"}
    world = World.from_env(env)
    assert (world.job_id, world.attempt) == ("ray-1", 2)
    with pytest.raises(InputError, match="QLORA_JOB_ATTEMPT is 'x'"):
        World.from_env({**env, "QLORA_JOB_ATTEMPT": "x"})
