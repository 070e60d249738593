"""A rule of your own in a file: tokens count the more, the further both models are apart, up to a cap.

fire weigh RUN --rule examples/write_a_rule.py:Surprise -p cap=4
fire compare RUN --rules uniform,fire,examples/write_a_rule.py:Surprise
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from fire_data.rules import Parts, Rule, Statistic, plain_advantage


@dataclass(frozen=True)
class Surprise(Rule):
    """weight: |log p_T - log p_S| over its mean in the step, at most `cap`."""

    cap: float = 3.0

    def __post_init__(self) -> None:
        if self.cap <= 0:
            raise ValueError(f"cap must be more than 0, not {self.cap}")

    def statistics(self) -> tuple[Statistic, ...]:
        return (Statistic("usual", plain_advantage().abs(), "mean", scope="step"),)

    def parts(self) -> Parts:
        return Parts(weight=(plain_advantage().abs() / pl.col("usual")).clip(upper_bound=self.cap))
