"""How many cases the properties of this folder are tried on: 300 in all in the quick suite, 10,000 in the slow one."""

import hypothesis
import pytest

CASES = pytest.mark.parametrize("cases", [25, pytest.param(840, marks=pytest.mark.slow)])
"""For each of the folder's twelve properties."""


def tried(cases: int) -> hypothesis.settings:
    """The same cases in every quick run, new ones in every slow run."""
    return hypothesis.settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=cases < 100,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
