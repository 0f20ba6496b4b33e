"""A short `bench/chaos.py`: runs on S3 that are killed at random moments, or whose storage is slow and refuses."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos import DELAY_S, Killer, finish
from tests.faults import proxied
from tests.place import Place, run_file, some_rows
from tests.s3 import S3


@dataclass(frozen=True)
class Undisturbed:
    """A run without faults: where it lies, and its seconds until the first step and in all."""

    place: Place
    first_s: float
    all_s: float


@pytest.fixture(scope="module")
def undisturbed(s3_server: S3, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """What the others are compared with."""
    work, place = tmp_path_factory.mktemp("undisturbed"), Place(s3_server, "undisturbed")
    path = run_file(place, s3_server.storage, tiny_model, some_rows(work), work)
    return Undisturbed(place, *finish(path, s3_server.env))


def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(
    s3_server: S3, undisturbed: Undisturbed, tiny_model: Path, tmp_path: Path
) -> None:
    place = Place(s3_server, "killed")
    with proxied(s3_server) as (flaky, faults):
        faults.delay_s = DELAY_S
        path = run_file(place, flaky.storage, tiny_model, some_rows(tmp_path), tmp_path)
        killer = Killer(0, faults, undisturbed.first_s, undisturbed.all_s)
        killer.run(place, path, flaky.env, kills=3)
    assert place.result() == undisturbed.place.result()
    assert killer.tally.kills


def test_a_run_whose_storage_is_slow_and_refuses_a_tenth_of_all_ends_as_if_it_were_not(
    s3_server: S3, undisturbed: Undisturbed, tiny_model: Path, tmp_path: Path
) -> None:
    place = Place(s3_server, "refused")
    with proxied(s3_server, seed=1) as (flaky, faults):
        faults.delay_s, faults.share_503 = 0.2, 0.1
        finish(run_file(place, flaky.storage, tiny_model, some_rows(tmp_path), tmp_path), flaky.env)
        assert faults.given["share_503"] > 3 and faults.given["delay_s"] > 50
    place.check_tidy()
    assert place.result() == undisturbed.place.result()
