"""Evaluates a rule on rows of the table: keep, weights, advantages and masks, checked; its mistakes told in words.

Expressions over tokens run on one flat row per token and are folded back to one list per trajectory.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import polars as pl
from polars.exceptions import PanicException, PolarsError

from fire_data.rules import own
from fire_data.rules.base import RESERVED, ROW, Rule, Stats
from fire_data.rules.statistics import attach, table_columns, without_empty
from fire_data.rules.tokens import fold, token_frame
from fire_data.schemas.errors import ConfigError, DataError, FireError, IncompleteError
from fire_data.schemas.tables import addon_of

PER_TRAJECTORY = ("keep", "weight_sum")


def decide(frame: pl.DataFrame, rule: Rule, stats: Stats, want: Iterable[str]) -> pl.DataFrame:
    """Per row of `frame`: `keep`, `drop_reason`, and those of `want` that the rule has, token parts as lists.

    An empty response is dropped whatever the rule says and enters no statistic.
    """
    with own.told(rule, "the rule"):
        return _decide(frame, rule, stats, want)


def _decide(frame: pl.DataFrame, rule: Rule, stats: Stats, want: Iterable[str]) -> pl.DataFrame:
    parts = rule.said
    wanted = {n: e for n, e in parts.expressions().items() if n in want or n == "keep"}
    whole = without_empty(frame)
    filled = attach(whole, rule, stats, {r for e in wanted.values() for r in e.meta.root_names()})
    rows = {n: e for n, e in wanted.items() if n in PER_TRAJECTORY}
    tokens = {n: e for n, e in wanted.items() if n not in PER_TRAJECTORY}
    rows.setdefault("keep", pl.lit(True))
    made = _evaluate(filled, rows, rule)
    if made["keep"].is_null().any():
        row = int(made["keep"].is_null().arg_max() or 0)
        where = f"row {filled[ROW][row]}, trajectory {filled['trajectory_id'][row]}"
        raise DataError(f"keep of the rule {rule.name} is neither true nor false", where=where, fix=own.remedy(rule))
    reason = pl.when("keep").then(pl.lit(None, dtype=pl.String)).otherwise(pl.lit(parts.reason))
    made = made.with_columns(drop_reason=reason)
    if tokens:
        flat = _evaluate(token_frame(filled, tokens.values(), rule.derived()), tokens, rule)
        _check_made(flat, filled, rule)
        made = made.with_columns(fold(flat[n], filled["length"]).alias(n) for n in tokens)
    if whole is frame:
        return made
    made = frame.select(ROW).join(made.with_columns(filled[ROW]), on=ROW, how="left", maintain_order="left")
    empty = [pl.col(n).fill_null(pl.lit([], dtype=made.schema[n])) for n in tokens]
    reasons = pl.when(frame["length"] == 0).then(pl.lit("empty response")).otherwise(pl.col("drop_reason"))
    numbers = [pl.col("weight_sum").fill_null(0.0)] if "weight_sum" in rows else []
    return made.drop(ROW).with_columns(pl.col("keep").fill_null(False), *empty, *numbers, drop_reason=reasons)


def _check_made(flat: pl.DataFrame, frame: pl.DataFrame, rule: Rule) -> None:
    """Weights and advantages must be finite in single precision, weights not negative. Raises DataError."""
    for name in flat.columns:
        value = flat[name]
        if _is_sound(name, value):
            continue
        if _kinds(name) == "truth":
            wrong, what = value.is_null(), "gives neither true nor false"
        else:
            wrong, what = ~(value.abs() <= LARGEST).fill_null(False), "is not finite"
            if not wrong.any():
                wrong, what = value < 0, "is negative"
        at = int(wrong.arg_max() or 0)
        ends = frame["length"].cast(pl.Int64).cum_sum()
        row = int((ends <= at).sum())
        token = at - (int(ends[row - 1]) if row else 0)
        text = f"{name} {what}: the rule {rule.name} gives {value[at]}"
        where = f"row {frame[ROW][row]}, trajectory {frame['trajectory_id'][row]}, token {token}"
        raise DataError(text, where=where, fix=own.remedy(rule))


def _is_sound(name: str, value: pl.Series) -> bool:
    """If the values are as `_check_made` wants them, found without a column of answers."""
    if value.null_count() or _kinds(name) == "truth" or not len(value):
        return not value.null_count()
    numbers = value.to_numpy()  # whose extremes, unlike those of Polars, are nan where there is one
    lowest = -LARGEST if name == "advantage" else 0.0
    return bool(numbers.min() >= lowest and numbers.max() <= LARGEST)


LARGEST = 3.4e38  # what float32, in which weights are stored, can hold


def check(rule: Rule, schema: pl.Schema, missing: Callable[[str], tuple[str, str] | None]) -> None:
    """Raise ConfigError if an expression uses an unknown column or cannot be computed on columns of these types,
    IncompleteError if it uses one that a command adds.

    `missing(column)` is what to say of a column that a table could have, and the command that adds it.
    """
    declared: dict[str, Any] = {c: pl.Float64 for s in rule.declared for c in (s.name, f"{s.name}_position")}
    declared |= {f"{s.name}_id": pl.String for s in rule.declared} | dict.fromkeys(rule.fitted, pl.Float64)
    clash = sorted(declared.keys() & ({*schema.names()} | RESERVED))
    if clash:
        text = f"a statistic is called {clash[0]!r}, as a column is"
        raise ConfigError(text, where=f"rule {rule.name}", fix="give it another name")
    known = {**schema, **declared, "position": pl.Int64}
    trajectories = pl.DataFrame(schema={**schema, **declared})
    tokens = pl.DataFrame(schema={n: _scalar(t) for n, t in known.items()})
    for name, expression in rule.derived().items():
        for root in expression.meta.root_names():
            if root not in known:
                raise _unknown(rule, name, root, list(known), missing(root))
        tokens = tokens.with_columns(expression.alias(name))
    known |= dict.fromkeys(rule.derived(), pl.Float64)
    for title, expression, per_token in _labelled(rule):
        for name in expression.meta.root_names():
            if name not in known or (name == "position" and not per_token):
                raise _unknown(rule, title, name, list(known), missing(name))
        kind = "number" if title.startswith("statistic") else _kinds(title)
        try:
            made = (tokens if per_token else trajectories).select(expression).dtypes[0]
            if kind == "number" and not (made.is_numeric() or made in (pl.Boolean, pl.Null)):
                raise PolarsError(f"it gives {made}, not numbers")
            if kind == "truth" and not (made.is_numeric() or made in (pl.Boolean, pl.Null)):
                raise PolarsError(f"it gives {made}, not true or false")
        except (PolarsError, PanicException) as error:
            raise _cannot(rule, title, error, per_token) from None


def _labelled(rule: Rule) -> Iterator[tuple[str, pl.Expr, bool]]:
    for s in rule.declared:
        for e in s.expressions():
            yield f"statistic {s.name}", e, s.of == "tokens"
    for name, expression in rule.said.expressions().items():
        yield name, expression, name not in PER_TRAJECTORY


def _unknown(rule: Rule, title: str, name: str, known: list[str], missing: tuple[str, str] | None) -> FireError:
    where = f"rule {rule.name}, {title}"
    if missing is not None:
        what, fix = missing
        kind = ConfigError if addon_of(name) is None else IncompleteError
        return kind(f"the rule needs the column {what}", where=where, fix=fix)
    near = difflib.get_close_matches(name, [k for k in known if not k.startswith("_") and k != name], n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{title} uses the unknown column {name!r}{hint}", where=where, fix="fire inspect RUN --schema")


def _cannot(rule: Rule, title: str, error: Exception, per_token: bool) -> ConfigError:
    unit = "token, signals are numbers" if per_token else "trajectory, signals are lists: use _sum or _max"
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].replace("_made_", "")
    text = f"{title} cannot be computed: {line} ({title} is evaluated once per {unit})"
    return ConfigError(text, where=f"rule {rule.name}", fix=own.remedy(rule))


def _scalar(type_: pl.DataType | Any) -> Any:
    inner = type_.inner if isinstance(type_, pl.List) else type_
    return pl.Float64 if inner == pl.Float32 else inner


def _kinds(part: str) -> str:
    return "truth" if part in ("keep", "token_keep") else "number"


def _evaluate(frame: pl.DataFrame, parts: dict[str, pl.Expr], rule: Rule) -> pl.DataFrame:
    """The parts as columns, one row per row of `frame`; a constant is repeated, any other length is an error."""
    typed = {f"_made_{n}": e.cast(pl.Boolean if _kinds(n) == "truth" else pl.Float64) for n, e in parts.items()}
    try:
        made = frame.with_columns(**typed)
    except (PolarsError, PanicException) as error:
        raise _cannot(rule, ", ".join(parts), error, "position" in frame.columns) from None
    return made.select(pl.col(f"_made_{n}").alias(n) for n in parts)


def part_columns(rule: Rule, want: Iterable[str]) -> list[str]:
    """The columns of the table that `decide` needs for these parts."""
    parts = rule.said.expressions()
    return table_columns(rule, [e for n, e in parts.items() if n in want or n == "keep"])
