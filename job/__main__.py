"""`python -m job` is the command `qlora`."""

from job.cli import main

main()
