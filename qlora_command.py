"""The command `qlora`, in front of the package.

Ray puts the folder that was uploaded with a job first on Python's path, and `job` is a common name for a folder: the
package that is installed is meant, whatever lies there.
"""

import os
import sys


def main() -> None:
    """Run the command of the installed package."""
    here = os.path.realpath(".")
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or here) != here]
    from job.cli import main as command

    command()
