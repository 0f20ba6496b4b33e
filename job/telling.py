"""What storage drivers raise, told in our sentences: every one of them has its own errors."""

from collections.abc import Iterator
from contextlib import contextmanager

from job.errors import JobError
from job.store import reason

CHECK, CHECK_BUCKET = "Check the URL and storage.endpoint", "Check the URL, the bucket and storage.endpoint"


@contextmanager
def telling(kind: type[JobError], what: str, cure: str = CHECK) -> Iterator[None]:
    """Raise what a storage driver raises inside as `kind`: what was done to what, the `reason`, and a cure."""
    try:
        yield
    except JobError:  # a sentence already
        raise
    except Exception as fault:  # every driver has its own errors
        raise kind(f"{what}: {reason(fault)}{cure and '. '}{cure}") from fault
