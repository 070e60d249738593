"""Why a trajectory was kept or dropped, and every factor of its coefficients: their product is what is stored.

Weights are explained by making them again: the rule of the sealed manifest, with its statistics, on the scores they
were made from, through the functions that made them. If the product of what is shown is not the stored coefficient,
that is an error and not an explanation. Logprobs and entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import polars as pl

from fire_data import weighing
from fire_data.explain.factors import (
    Verdict,
    Weighed,
    denominator,
    factors,
    fkl_factors,
    inputs,
    signal_columns,
    signals,
    statistics,
    terms,
    verdicts,
    weight_factors,
)
from fire_data.explain.rule import Line, Quantity, look
from fire_data.explain.weights import Made, made_of
from fire_data.rules.base import ROW, STEP
from fire_data.run import Run
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.tokenview import trajectory as find

CLOSE = 1e-6
"""How far, relatively, what is shown may be from what is stored in single precision."""
_SMALLEST = 1e-37  # below, single precision has fewer digits
_FACTS = (
    "trajectory_id",
    "prompt_id",
    "round",
    "sample",
    "step",
    "finish_reason",
    "answer",
    "reward",
    "length",
    "keep",
)
_POLICIES = ("denominator", "constant", "truncated", "end_token", "rollout_is_cap", "batch_size", "teacher")


@dataclass(frozen=True)
class Token:
    """The product of `weight_factors` is the weight, the first of `factors`, whose product is `coefficient`.

    That of `fkl_factors` is `fkl_coefficient`, if there is one.
    """

    position: int
    id: int
    inputs: list[Line]
    terms: list[Line]
    weight_factors: list[Line]
    factors: list[Line]
    coefficient: float
    fkl_factors: list[Line]
    fkl_coefficient: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {k: _plain(v) for k, v in vars(self).items()}


@dataclass(frozen=True)
class Explanation:
    """A trajectory under one set of weights; its tokens are put into words when they are asked for."""

    facts: dict[str, Any]
    weights: dict[str, Any]
    verdicts: list[Verdict]
    inputs: list[Line]
    statistics: list[Line]
    step: dict[str, Any]
    denominator: Line
    ids: list[int]
    coefficients: list[float]
    fkl_coefficients: list[float] | None
    signals: list[Quantity]
    terms: list[Quantity]
    weight_factors: list[Quantity]
    factors: list[Quantity]
    fkl_factors: list[Quantity]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ranked_by(self) -> str:
        """What `max` and `min` go by: where every coefficient is 0, as of a dropped trajectory, what would make it."""
        return "coefficient" if any(self.coefficients) else "weight * advantage"

    def position(self, which: str) -> int:
        """The token that is meant by a position from 0, or by `max` or `min`: the largest or smallest of `ranked_by`.

        Raises ConfigError if there is none.
        """
        if which in ("max", "min") and self.ids:
            weight, advantage = (np.array(q.values) for q in self.factors[:2])
            ranked = self.coefficients if any(self.coefficients) else weight * advantage
            return int(np.argmax(ranked) if which == "max" else np.argmin(ranked))
        if not which.isdecimal() or int(which) >= len(self):
            fix = f"a position from 0 to {len(self) - 1}, max or min" if self.ids else "the response is empty"
            raise ConfigError(
                f"there is no token {which!r}", where=f"trajectory {self.facts['trajectory_id']}", fix=fix
            )
        return int(which)

    def strongest(self, count: int) -> list[int]:
        """The positions with the largest coefficients, whatever their sign; none that is 0."""
        order = sorted(range(len(self)), key=lambda i: -abs(self.coefficients[i]))
        return [i for i in order[:count] if self.coefficients[i]]

    def token(self, position: int) -> Token:
        """Every number behind the coefficient at a position."""

        def lines(quantities: Sequence[Quantity]) -> list[Line]:
            return [q.line(position) for q in quantities]

        return Token(
            position,
            self.ids[position],
            lines(self.signals),
            lines(self.terms),
            lines(self.weight_factors),
            lines(self.factors),
            self.coefficients[position],
            lines(self.fkl_factors),
            None if self.fkl_coefficients is None else self.fkl_coefficients[position],
        )

    def as_dict(self, token: int | None = None) -> dict[str, Any]:
        """JSON-ready, with this token or all of them."""
        chosen = range(len(self)) if token is None else [token]
        return {
            "trajectory": self.facts,
            "weights": self.weights,
            "verdicts": [{**asdict(v), "comparisons": _plain(v.comparisons)} for v in self.verdicts],
            "inputs": _plain(self.inputs),
            "statistics": _plain(self.statistics),
            "step": self.step,
            "denominator": self.denominator._asdict(),
            "ranked_by": self.ranked_by,
            "tokens": [self.token(i).as_dict() for i in chosen],
        }


def explain(run: Run, round: int, trajectory: str, name: str | None = None) -> Explanation:
    """Explain one trajectory of sealed weights; what is shown was compared with what is stored.

    Args:
        trajectory: row number in the round, or beginning of a trajectory_id.
        name: folder under weights/; None: the weights that are trained.

    Raises:
        IncompleteError: the weights, or what they are made from, are not sealed.
        ConfigError: there is no such trajectory, or the code of a rule of your own is not to be found.
        FingerprintError: scores or code are not those the weights were made from.
        DataError: the product of the factors is not the stored coefficient.
    """
    made = made_of(run, round, name)
    stored = find(run, round, trajectory, name)
    number = int(stored["row"])
    shard = next(i for i in range(len(made.table)) if number < sum(made.table.rows(i)))
    row = _weighed(made, stored, shard, number)
    fields = made.manifest.fields
    explained = Explanation(
        facts={"row": number, **{k: stored[k] for k in _FACTS}, "drop_reason": stored["drop_reason"]},
        weights={
            "name": made.part.name,
            "round": round,
            "rule": fields["rule"],
            "policies": {k: fields[k] for k in _POLICIES if fields.get(k) is not None},
        },
        verdicts=list(verdicts(row)),
        inputs=inputs(row),
        statistics=statistics(row),
        step=next(s for s in made.fitted.steps if s[STEP] == row.mine[STEP]),
        denominator=denominator(row),
        ids=stored["response_ids"],
        coefficients=stored["coefficient"],
        fkl_coefficients=stored.get("fkl_coefficient"),
        signals=signals(row),
        terms=terms(row),
        weight_factors=weight_factors(row),
        factors=factors(row),
        fkl_factors=fkl_factors(row),
    )
    _require_equal(explained, row)
    return explained


def _weighed(made: Made, stored: dict[str, Any], shard: int, number: int) -> Weighed:
    """The trajectory made again."""
    among = weighing.factored(made.table, shard, made.weighing, made.fitted)
    mine = among.filter(pl.col(ROW) == number).to_dicts()[0]
    looks = [look(made.table, shard, number, *component) for component in made.components()]
    columns = made.table.read(range(shard, shard + 1), [ROW, *signal_columns(made)]).filter(pl.col(ROW) == number)
    return Weighed(made, looks, stored, mine, among, columns.drop(ROW).to_dicts()[0])


def _require_equal(explained: Explanation, row: Weighed) -> None:
    """Raise DataError unless everything that is shown, multiplied, is what is stored."""
    shown = {
        "weight": explained.weight_factors or explained.factors[:1],
        "coefficient": explained.factors,
        "fkl_coefficient": explained.fkl_factors,
    }
    for column, quantities in shown.items():
        if column in row.stored:
            products = np.prod([np.array(q.values, dtype=np.float64) for q in quantities], axis=0)
            stored = np.array(row.stored[column], dtype=np.float64)
            for wrong in np.flatnonzero(~np.isclose(products, stored, rtol=CLOSE, atol=_SMALLEST)):
                text = (
                    f"{column} of token {wrong}: the factors give {products[wrong]:.9g}, stored is {stored[wrong]:.9g}"
                )
                raise _not_these(text, row)
    if row.mine["keep"] != row.stored["keep"]:
        raise _not_these(f"the rule {'keeps' if row.mine['keep'] else 'drops'} the trajectory", row)


def _not_these(text: str, row: Weighed) -> DataError:
    part = row.made.part
    where = f"{part.label}, trajectory {row.stored['trajectory_id']}"
    return DataError(f"the weights are not what their rule gives: {text}", where=where, fix=f"{part.command} --redo")


def _plain(value: Any) -> Any:
    """Lines as dictionaries."""
    return [v._asdict() for v in value] if isinstance(value, list) else value
