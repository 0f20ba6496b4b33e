"""Optional libraries: what pip installs them with."""

from importlib import metadata

from packaging.requirements import Requirement


def extra_of(module: str) -> str | None:
    """What pip installs an optional module with; None for any other module."""
    try:
        asked = [Requirement(line) for line in metadata.requires("qlora-job") or ()]
    except metadata.PackageNotFoundError:  # run from its sources, it does not know
        return None
    found = (one for one in asked if one.name == module.partition(".")[0] and one.marker)
    return next((f"{one.name}{_listed(one.extras)}{one.specifier}" for one in found), None)


def _listed(extras: set[str]) -> str:
    return f"[{','.join(sorted(extras))}]" if extras else ""
