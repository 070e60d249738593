"""The factors of a trajectory's coefficients, and what its row says of itself: numbers that were made again, in words.

Of each token the product of `weight_factors` is its weight, that of `factors` its coefficient, and that of
`fkl_factors` the coefficient of the second stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import polars as pl

from fire_data.explain.formula import read
from fire_data.explain.rule import Comparison, Line, Look, Quantity, filled_in, place
from fire_data.explain.weights import Made
from fire_data.rules import Uniform
from fire_data.rules.base import STEP, plain_advantage, scope_keys
from fire_data.schemas.tables import addon_of, columns_of
from fire_data.teachers import MADE
from fire_data.weighing import MEAN


@dataclass(frozen=True)
class Verdict:
    """What a filter, or a policy, says of the trajectory."""

    by: str
    keep: bool
    reason: str
    comparisons: list[Comparison]
    source: str


@dataclass(frozen=True)
class Weighed:
    """A trajectory as it is stored and as it was made again: `mine`, of the shard `among`, with its token `columns`."""

    made: Made
    looks: list[Look]
    stored: dict[str, Any]
    mine: dict[str, Any]
    among: pl.DataFrame
    columns: dict[str, list[Any]]

    @property
    def length(self) -> int:
        return len(self.stored["response_ids"])

    def title(self, one: Look, name: str) -> str:
        """What a number of a rule is called: composed rules may call theirs the same."""
        return f"{one.label}: {name}" if len(self.looks) > 1 else name

    def of(self, one: Look, quantity: Quantity) -> Quantity:
        return replace(quantity, name=self.title(one, quantity.name))

    def same(self, name: str, value: float, text: str, source: str) -> Quantity:
        """A number that is the same for every token."""
        return Quantity(name, [value] * self.length, lambda _: text, source)


def verdicts(row: Weighed) -> Iterator[Verdict]:
    """Who has a say in whether the trajectory counts."""
    if not row.stored["length"]:
        yield Verdict("empty response", False, "empty response", [], "whatever the rule")
        return
    for one in row.looks:
        if "keep" in one.kept:
            reason = one.rule.parts().reason
            yield Verdict(f"rule {one.label}", one.kept["keep"], reason, one.comparisons(), one.source("keep"))
    if row.made.weighing.truncated == "drop":
        finish = row.stored["finish_reason"]
        whole = finish != "length"
        compared = [Comparison("finish_reason != 'length'", whole, finish, "!=", "length")]
        yield Verdict("truncated", whole, "truncated by max_new_tokens", compared, "weigh.truncated: drop")


def denominator(row: Weighed) -> Line:
    """What the coefficients are divided by."""
    kind, mine, step = row.made.weighing.divisor, row.mine, f"step {row.mine[STEP]}"
    each = f"{mine['_kept_trajectories']} kept trajectories of {step} * {mine['_kept']} kept tokens of this one"
    text = {
        "tokens": f"kept tokens of {step}",
        "all_tokens": f"response tokens of {step}, those of dropped trajectories included",
        "sequences": each,
        "constant": "a constant",
    }[kind]
    return Line("denominator", mine["_denominator"], text, f"weigh.denominator: {kind}")


def inputs(row: Weighed) -> list[Line]:
    """What the rules read of the trajectory as a whole."""
    found = {name: value for one in row.looks for name, value in one.inputs().items()}
    return [_column(name, value, row.made) for name, value in found.items()]


def statistics(row: Weighed) -> list[Line]:
    return [line._replace(name=row.title(one, line.name)) for one in row.looks for line in one.statistics()]


def signals(row: Weighed) -> list[Quantity]:
    """The token columns behind the coefficients, stored ones first."""
    found = row.columns | {name: values for one in row.looks for name, values in one.signals().items()}
    derived = {name: one for one in row.looks for name in one.rule.derived()}
    return [_signal(row, n, found[n], derived.get(n)) for n in sorted(found, key=lambda n: n in derived)]


def signal_columns(made: Made) -> list[str]:
    """The stored token columns that enter coefficients whatever the rule reads."""
    policies = [c for c in made.weighing.policy_columns if c == "rollout_logprob"]
    return ["student_logprob", "teacher_logprob", *policies, *made.weighing.combined]


def terms(row: Weighed) -> list[Quantity]:
    return [row.of(one, q) for one in row.looks for q in one.terms()]


def weight_factors(row: Weighed) -> list[Quantity]:
    """What the rules weigh a token with, and the mean that is divided by; none if they weigh all alike."""
    return [*(row.of(one, q) for one in row.looks for q in one.factors()), *_mean(row)]


def factors(row: Weighed) -> list[Quantity]:
    """Weight, advantage, filter, masks, correction and denominator, in this order."""
    return [_weight(row), _advantage(row), *_counts(row), *_rollout_is(row), _divisor(row)]


def fkl_factors(row: Weighed) -> list[Quantity]:
    """The same of the second stream; empty if there is none."""
    second = [row.of(one, q) for one in row.looks if (q := one.part("fkl_weight")) is not None]
    return [*second, *_counts(row), _divisor(row)] if "fkl_weight" in row.mine else []


def _weight(row: Weighed) -> Quantity:
    made = weight_factors(row)
    if not made:
        return row.same("weight", 1.0, "every token weighs the same", row.looks[0].source("weight"))
    if len(made) == 1:
        return replace(made[0], name="weight")
    return Quantity("weight", row.mine["weight"], lambda _: "the product of its factors", made[0].source)


def _mean(row: Weighed) -> list[Quantity]:
    mean, mine = row.made.weighing.rule.mean, row.mine
    if mean is None:
        return []
    keys = scope_keys(mean.scope, mean.by)
    if MEAN in row.made.fitted.stats:
        n = next(r["n"] for r in row.made.fitted.stats[MEAN] if all(r[k] == mine[k] for k in keys))
    else:
        counted = pl.col("length" if mean.over == "all" else "_kept").sum()
        n = row.among.filter(pl.col(k).eq_missing(mine[k]) for k in keys).select(counted).item()
    text = f"1 / {mine[MEAN]:.6g}: mean over the {n} {'kept ' if mean.over == 'kept' else ''}tokens of "
    text += place(mean.scope, mine) + (f", {mean.by} {mine[mean.by]}" if mean.by else "")
    owner = next((one for one in row.looks if one.rule.mean is not None), None)
    source = owner.source("mean") if owner else "normalise, of the composed rules"
    return [row.same("1 / mean weight", 1.0 / mine[MEAN], text, source)]


def _advantage(row: Weighed) -> Quantity:
    given = next(((one, q) for one in row.looks if (q := one.part("advantage")) is not None), None)
    if given is not None:
        return row.of(*given)
    return _expressed(row, "advantage", plain_advantage(), f"on-policy distillation, arXiv {Uniform.paper}")


def _counts(row: Weighed) -> list[Quantity]:
    """If the trajectory counts, and which of its tokens."""
    said = list(verdicts(row))
    drops = next((v for v in said if not v.keep), None)
    text = drops.reason if drops else "no filter drops it" if said else "there is no filter"
    source = (drops or said[0]).source if said else row.looks[0].source("keep")
    masks = [row.of(one, q) for one in row.looks if (q := one.part("token_keep")) is not None]
    found = [row.same("keep", float(row.mine["keep"]), text, source)]
    found += [replace(q, values=[float(v) for v in q.values]) for q in masks]
    return found + ([_end_token(row)] if row.made.weighing.end_token == "mask" else [])


def _end_token(row: Weighed) -> Quantity:
    end = row.length - 1 if row.stored["finish_reason"] == "stop" else None

    def text(token: int) -> str:
        return "the token that ended the response" if token == end else "not the token that ended the response"

    return Quantity("end_token", [float(i != end) for i in range(row.length)], text, "weigh.end_token: mask")


def _rollout_is(row: Weighed) -> list[Quantity]:
    cap = row.made.weighing.rollout_is_cap
    if cap is None:
        return []
    ratio = (pl.col("student_logprob") - pl.col("rollout_logprob")).exp().clip(upper_bound=cap)
    return [_expressed(row, "rollout_is", ratio, f"weigh.rollout_is_cap: {cap:g}")]


def _divisor(row: Weighed) -> Quantity:
    line = denominator(row)
    if not line.value:  # nothing is divided: the product is 0 by another factor
        return row.same("1 / denominator", 0.0, f"there are no {line.formula}", line.source)
    return row.same("1 / denominator", 1.0 / line.value, f"1 / {line.value:.10g}, {line.formula}", line.source)


def _expressed(row: Weighed, name: str, expression: pl.Expr, source: str) -> Quantity:
    """A number made from stored columns, the same for every rule."""
    formula = read(expression)

    def text(token: int) -> str:
        at = {c: values[token] for c, values in row.columns.items()}
        return str(expression) if formula is None else filled_in(formula, at)

    return Quantity(name, row.mine[name], text, source)


def _signal(row: Weighed, name: str, values: list[Any], derived: Look | None) -> Quantity:
    if derived is not None:
        return Quantity(name, values, lambda _: derived.derived(name), derived.source(name))
    line = _column(name, None, row.made)
    return Quantity(name, values, lambda _: line.formula, line.source)


def _column(name: str, value: Any, made: Made) -> Line:
    """A stored value: what it means, and the table it is in."""
    teachers, bound = made.weighing.teachers, made.bound(name)
    if not teachers.routed and name in MADE:
        text, source = f"{teachers.how} of {', '.join(teachers.names)}", f"weigh.teacher: {teachers.how}"
    else:
        addon = addon_of(name)  # `reward` may be in either, and that of the addon counts if it was there
        source = f"addons/{addon}" if addon in {part.name for part, _ in made.table.addons} else "scores"
        said = (", ".join(filter(None, (c.meaning, c.unit))) for c in columns_of(source) if c.name == name)
        text = next(said, "")
    return Line(name, value, f"{text}; {bound}" if bound else text, source)
