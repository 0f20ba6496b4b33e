"""The run file: what the user asked for, typed, frozen and documented."""

from job.config.load import load_config, load_dotenv_file, parse_config
from job.config.run import RunConfig, fields, rule_of
from job.config.same_run import Change, changes, fixed_hash, without_signatures

__all__ = [
    "Change",
    "RunConfig",
    "changes",
    "fields",
    "fixed_hash",
    "load_config",
    "load_dotenv_file",
    "parse_config",
    "rule_of",
    "without_signatures",
]
