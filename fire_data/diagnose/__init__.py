"""The premise check and the known pathologies of distillation, on scored tables alone: what, why, and what to do.

`measure` reduces shards of scores, `merge` adds them, `diagnose` turns the result and a few facts into findings. All
of it is pure; `fire_data.steps.diagnose` reads the run. Units: nats, tokens.
"""

from __future__ import annotations

from fire_data.diagnose import checks, premise, responses, signals
from fire_data.diagnose.finding import LEVELS, Facts, Finding, Weighed
from fire_data.diagnose.measure import Measured, measure, merge

__all__ = ["LEVELS", "Facts", "Finding", "Measured", "Weighed", "diagnose", "measure", "merge"]

CHECKS = (
    premise.premise,
    premise.filter_effect,
    premise.inert_filter,
    premise.outcome,
    responses.length,
    responses.repetition,
    responses.agreement_trap,
    responses.end_token,
    responses.entropy,
    signals.outliers,
    signals.low_low,
    signals.decay,
    signals.overlap,
    signals.teacher_fit,
    signals.degenerate,
    checks.scores,
    checks.sampling,
    checks.tokenizers,
    checks.templates,
    checks.drift,
    checks.shift,
    checks.consistency,
    checks.steps,
)


def diagnose(measured: Measured, facts: Facts | None = None) -> list[Finding]:
    """Every finding, in a fixed order. What cannot be measured is there too, with the reason."""
    return [check(measured, facts or Facts()) for check in CHECKS]
