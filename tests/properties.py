"""Property tests that give the same answer every time, however busy the machine is."""

from hypothesis import HealthCheck, settings


def examples(count: int) -> settings:
    """A decorator: so many examples, the same in every run, and no limit of time."""
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
    )
