"""The few errors this package raises on purpose; every message says what was found, what was expected, what to do."""

from collections.abc import Sequence


class JobError(Exception):
    """Something this package refuses or could not finish. `exit_code` is what the command ends with."""

    exit_code = 1


class InputError(JobError):
    """The user's input is wrong: settings, data, model folder, output URL. Raised before anything is written."""

    exit_code = 2


class ConfigError(InputError):
    """One or more settings are wrong.

    Args:
        source: where the settings came from, usually the path of the run file.
        faults: one `section.key: what is wrong and what to do` sentence each; all of them are shown together.
    """

    def __init__(self, source: str, faults: Sequence[str]):
        self.source, self.faults = source, tuple(faults)
        problems = "1 problem" if len(faults) == 1 else f"{len(faults)} problems"
        super().__init__("\n  ".join([f"{problems} in {source}", *faults]))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[str, tuple[str, ...]]]:
        return ConfigError, (self.source, self.faults)  # one rank's refusal travels to the others


class DataError(InputError):
    """A data file is missing, broken or has rows that cannot be used; names file, row and fields."""


class ModelError(InputError):
    """The model folder, its configuration or its weights cannot be used as asked."""


class OutputError(InputError):
    """The output URL cannot be written or holds something that this run must not touch."""


class AdapterError(JobError):
    """The adapter that was written is not the adapter that was trained (empty, wrong shape, not finite)."""


class Interrupted(JobError):
    """The run was asked to stop and stopped between two steps, its state written."""

    exit_code = 75
