"""A sample of the fuzzing campaign: every target, its seeds and some tens of bent inputs, the same ones every time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.exceptions import PanicException

from fire_data.schemas.errors import FireError
from tests.fuzz import attempt
from tests.fuzz.__main__ import NAMES
from tests.fuzz.attempt import finding
from tests.fuzz.target import Target
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


def test_the_command_knows_every_target() -> None:
    assert tuple(TARGETS) == NAMES


def _raises(data: bytes) -> None:
    raise FireError("x") if data == b"fine" else KeyError("x")


def _hangs(data: bytes) -> None:
    while True:
        pass


def _panics(data: bytes) -> None:
    raise PanicException("x")


@pytest.mark.parametrize(("run", "told"), [(_raises, "KeyError"), (_hangs, "TooSlow"), (_panics, "PanicException")])
def test_what_is_no_documented_error_is_a_finding(
    run: Callable[[bytes], None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempt, "SECONDS", 0.05)
    target = Target(run, list, st.binary)
    found = finding(target, b"x")
    assert found is not None
    assert found[0].startswith(told)
    assert "Traceback" in found[1]
    assert finding(Target(_raises, list, st.binary), b"fine") is None
