"""A sample of the fuzzing campaign: every target, its seeds and some tens of bent inputs, the same ones every time."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.attempt import finding
from tests.fuzz.targets import TARGETS

_SAMPLE = settings(max_examples=40, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", TARGETS)
def test_whatever_is_fed_gives_a_result_or_a_documented_error(name: str) -> None:
    target = TARGETS[name]

    @_SAMPLE
    @given(target.strategy())
    def fed(data: bytes) -> None:
        found = finding(target, data)
        assert found is None, f"{found[0]}\n{found[1]}\n{data[:2000]!r}"

    first, *others = target.seeds()
    target.run(first)  # a valid example is accepted
    assert [found for seed in others if (found := finding(target, seed))] == []
    fed()
