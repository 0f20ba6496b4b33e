"""The batch scripts as shellcheck sees them; that they work is shown on a real SLURM, in tests/cluster."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import REPOSITORY

SCRIPTS = sorted(path for kind in ("*.sh", "*.sbatch", "*.sh.example") for path in (REPOSITORY / "slurm").glob(kind))


@pytest.mark.skipif(
    shutil.which("shellcheck") is None and "QLORA_TEST_CLUSTER" not in os.environ, reason="apt-get install shellcheck"
)
def test_shellcheck_has_nothing_to_say() -> None:
    assert {"job.sh", "site.sh.example", "zero3_2node.sbatch"} <= {path.name for path in SCRIPTS}
    done = subprocess.run(
        ["shellcheck", "-x", *SCRIPTS, REPOSITORY / ".ci/run"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout + done.stderr
