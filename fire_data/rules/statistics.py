"""Statistics of a rule over their populations: fitted once over a round in shards, or taken where they are needed.

Those of a trajectory or a group are taken on the spot, as both are always whole. Those of a step or a round are fitted
over all shards in order, in as many passes as they build on each other, and a step's numbers are closed as soon as it
has gone by: what is held is a shard, plus one column of a population where an exact quantile needs it. Sums are
correctly rounded (`math.fsum` over trajectories), so neither threads, shard boundaries nor the order of rows matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import polars as pl

from fire_data.rules.base import GROUP, ROW, STEP, TIES, Rule, Statistic, Stats, number_of
from fire_data.rules.tokens import fold, token_frame

Frames = Callable[[Sequence[str]], Iterator[pl.DataFrame]]
"""The shards of a round in order, each with the asked-for columns (those it has) and the keys."""
KEYS = (ROW, GROUP, STEP, "length", "trajectory_id")
_WIDE = ("step", "round")


def fit_statistics(rule: Rule, frames: Frames) -> Stats:
    """All statistics of `rule` whose scope is a step or the round, as rows with their keys."""
    declared = rule.declared
    stats: Stats = {}
    for stage in _stages(declared):
        wide = [s for s in stage if s.scope in _WIDE]
        open_: dict[str, list[pl.DataFrame]] = {s.name: [] for s in wide}
        rows: dict[str, list[pl.DataFrame]] = {s.name: [] for s in wide}
        for shard in frames(table_columns(rule, [e for s in wide for e in s.expressions()], wide)):
            frame = without_empty(shard)
            filled = attach(frame, rule, stats, {r for s in wide for r in _used(s)})
            for name, part in _partials(filled, rule, wide).items():
                open_[name].append(part)
            for s in wide:
                if s.scope == "step" and frame.height:
                    _close(s, open_[s.name], rows[s.name], before=frame[STEP][-1])
        for s in wide:
            rows[s.name].append(_finish(s, open_[s.name]))
            stats[s.name] = pl.concat([r for r in rows[s.name] if r.height] or rows[s.name][:1]).to_dicts()
    return stats


def without_empty(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.filter(pl.col("length") > 0) if (frame["length"] == 0).any() else frame


def _used(statistic: Statistic) -> set[str]:
    roots = {r for e in statistic.expressions() for r in e.meta.root_names()}
    return roots | ({statistic.at} if isinstance(statistic.at, str) else set())


def _provided(statistic: Statistic) -> set[str]:
    return {statistic.name, *(f"{statistic.name}_{x}" for x in TIES)}


def _needed(declared: Sequence[Statistic], used: set[str]) -> list[Statistic]:
    """The statistics behind these columns, those they build on first."""
    found: list[Statistic] = []
    wanted = set(used)
    for s in reversed(declared):
        if _provided(s) & wanted:
            found.insert(0, s)
            wanted |= _used(s)
    return found


def _stages(declared: Sequence[Statistic]) -> list[list[Statistic]]:
    """Statistics by the pass over the table in which they can be taken."""
    level: dict[str, int] = {}
    for i, s in enumerate(declared):
        before = [d for d in declared[:i] if _provided(d) & _used(s)]
        level[s.name] = max((level[d.name] + (d.scope in _WIDE) for d in before), default=0)
    last = max((level[s.name] for s in declared if s.scope in _WIDE), default=-1)
    return [[s for s in declared if level[s.name] == i] for i in range(last + 1)]


def table_columns(rule: Rule, expressions: Iterable[pl.Expr], statistics: Iterable[Statistic] = ()) -> list[str]:
    """The columns of the table that expressions need, also through statistics they use."""
    used = {r for e in expressions for r in e.meta.root_names()}
    used |= {s.at for s in statistics if isinstance(s.at, str)}
    needed = _needed(rule.declared, used)
    for s in (*needed, *statistics):
        used |= _used(s) | ({s.by} if s.by else set())
    derived = rule.derived()
    used |= {r for n, e in derived.items() if n in used for r in e.meta.root_names()}
    mine = {c for s in rule.declared for c in _provided(s)} | {"position", *rule.fitted, *derived}
    return sorted(used - mine)


def attach(
    frame: pl.DataFrame, rule: Rule, stats: Stats, used: set[str], taken: dict[str, pl.DataFrame] | None = None
) -> pl.DataFrame:
    """The frame with the statistics behind `used`: fitted ones joined, those of trajectory and group taken here.

    The latter, as rows with their keys and `n`, are put into `taken`.
    """
    waiting: list[Statistic] = []

    def take() -> None:
        nonlocal frame
        for name, part in _partials(frame, rule, waiting).items():
            statistic = next(s for s in waiting if s.name == name)
            rows = _finish(statistic, [part])
            frame = join_rows(frame, rows, statistic.keys)
            if taken is not None:
                taken[name] = rows
        waiting.clear()

    declared = rule.declared
    for s in _needed(declared, used):
        if any(_provided(w) & _used(s) for w in waiting):
            take()
        if s.scope in _WIDE:
            frame = join_rows(frame, read_rows(stats[s.name] or [_nothing(s)], frame.schema), s.keys)
        else:
            waiting.append(s)
    take()
    for name in sorted(used & set(rule.fitted)):
        rows = read_rows(stats[name], frame.schema)
        keys = [c for c in rows.columns if c in (STEP, GROUP, "teacher")]
        frame = join_rows(frame, rows.select(*keys, name), keys)
    return frame


def _nothing(s: Statistic) -> dict[str, Any]:
    """The row of a statistic over a population that no row of the table is in."""
    return dict.fromkeys([*s.keys, *sorted(_provided(s) if s.reduce == "largest" else {s.name})])


def join_rows(frame: pl.DataFrame, rows: pl.DataFrame, keys: list[str]) -> pl.DataFrame:
    values = [c for c in rows.columns if c not in keys and c != "n"]
    if not keys:
        first = rows.row(0, named=True) if rows.height else dict.fromkeys(values)
        return frame.with_columns(pl.lit(first[c], dtype=rows.schema[c]).alias(c) for c in values)
    if keys == [ROW] and rows.height == frame.height:
        return frame.with_columns(rows[c] for c in values)
    return frame.join(rows.select(*keys, *values), on=keys, how="left", maintain_order="left", nulls_equal=True)


def read_rows(rows: list[dict[str, Any]], like: pl.Schema) -> pl.DataFrame:
    """Statistics read back from JSON, key columns with the types of the table they are joined to."""
    names = rows[0].keys() if rows else ()
    types = {k: like[k] if k in like else _stored_type(k, rows) for k in names}
    return pl.DataFrame(rows, schema=types)


def _stored_type(name: str, rows: list[dict[str, Any]]) -> Any:
    first = next((r[name] for r in rows if r[name] is not None), "" if name.endswith("_id") else None)
    return pl.String if isinstance(first, str) else pl.Int64 if isinstance(first, int) else pl.Float64


def _partials(frame: pl.DataFrame, rule: Rule, statistics: Sequence[Statistic]) -> dict[str, pl.DataFrame]:
    """What a shard contributes to each statistic: one row per trajectory, or per value where all are needed."""
    per_token = [s for s in statistics if s.of == "tokens"]
    flat = None
    if per_token:
        tokens = token_frame(frame, [e for s in per_token for e in s.expressions()], rule.derived())
        flat = _values(tokens, per_token)
    rows = _values(frame, [s for s in statistics if s.of == "trajectories"])
    found = {}
    for s in statistics:
        keys = frame.select(k for k in dict.fromkeys([*s.keys, ROW, "trajectory_id"]))
        if isinstance(s.at, str):
            keys = keys.with_columns(frame[s.at].alias("_number"))
        values = rows if s.of == "trajectories" or flat is None else flat
        value, where = values[f"{s.name} value"], values[f"{s.name} where"]
        found[s.name] = _partial(s, keys, value, where, frame["length"] if s.of == "tokens" else None)
    return found


def _values(frame: pl.DataFrame, statistics: Sequence[Statistic]) -> pl.DataFrame:
    """Value and condition of each statistic, one row per token or trajectory."""
    value = {f"{s.name} value": s.value if s.reduce == "n_unique" else s.value.cast(pl.Float64) for s in statistics}
    where = {f"{s.name} where": pl.lit(True) if s.where is None else s.where.fill_null(False) for s in statistics}
    return frame.with_columns(**value, **where)


def _partial(
    s: Statistic, keys: pl.DataFrame, value: pl.Series, where: pl.Series, lengths: pl.Series | None
) -> pl.DataFrame:
    if s.reduce in ("quantile", "largest", "n_unique"):
        data = pl.DataFrame({"v": value, "_where": where})
        kept = [*s.keys, *(["trajectory_id"] if s.reduce == "largest" else []), *({"_number"} & {*keys.columns})]
        if kept:
            sizes = pl.Series("_length", [1] * keys.height) if lengths is None else lengths.rename("_length")
            position = pl.int_ranges(pl.col("_length"), dtype=pl.UInt32).alias("position")
            repeated = keys.select(*kept, sizes).with_columns(position).explode("position").drop("_length")
            data = pl.concat([repeated, data], how="horizontal")
        return data.filter(pl.col("_where") & pl.col("v").is_not_null()).drop("_where")
    masked = pl.DataFrame({"v": value, "w": where})
    v, w = pl.col("v"), pl.col("w")
    if s.reduce in ("min", "max"):
        chosen = masked.select(v=pl.when(w).then(v))["v"]
        if lengths is not None:
            folded = fold(chosen, lengths)
            chosen = folded.list.min() if s.reduce == "min" else folded.list.max()
        return keys.with_columns(chosen.alias("v"))
    columns = masked.select(v=pl.when(w).then(v).otherwise(0.0), n=w.cast(pl.Float64))
    if lengths is None:
        return keys.with_columns(columns["v"], columns["n"], q=pl.lit(0.0))
    lists = pl.DataFrame({c.name: fold(c, lengths) for c in columns})
    rows = lists.select(v=v.list.sum(), n=pl.col("n").list.sum())
    keys = keys.hstack(rows)
    if s.reduce != "std":
        return keys
    # Squares around the trajectory's own mean: around 0 they would lose the digits of a small deviation.
    off = (lists["v"] - (rows["v"] / rows["n"]).fill_nan(0.0)) * lists["n"]
    return keys.with_columns((off * off).list.sum().alias("q"))


def _close(s: Statistic, open_: list[pl.DataFrame], rows: list[pl.DataFrame], before: Any) -> None:
    """Finish the steps that have gone by, so that no more than the open one is held."""
    data = pl.concat(open_)
    if data.height and data[STEP][0] != before:
        done = data.filter(pl.col(STEP) != before)
        rows.append(_finish(s, [done]))
        open_[:] = [data.filter(pl.col(STEP) == before)]
    else:
        open_[:] = [data]


def _finish(s: Statistic, parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """The statistic per population: its keys, its value, and `n`, how many rows it is about."""
    data = pl.concat(parts)
    if s.reduce == "largest":
        return _largest(s, data)
    if s.reduce in ("quantile", "min", "max", "n_unique"):
        v = pl.col("v")
        made = {
            "quantile": v.quantile(float(s.at or 0.0) if not isinstance(s.at, str) else 0.0, "linear"),
            "min": v.min(),
            "max": v.max(),
            "n_unique": v.n_unique(),
        }[s.reduce]
        return grouped(data, s.keys, made.alias(s.name), v.count().cast(pl.Int64).alias("n"))
    v, n = pl.col("v"), pl.col("n")
    total = data if s.keys == [ROW] and s.of == "tokens" else exact_sums(data, s.keys, ["v", "n"])
    if s.reduce == "std":
        total = total.with_columns(_deviation(s, data, total))
    value = {"sum": v, "count": n, "mean": pl.when(n > 0).then(v / n), "std": pl.col("std")}[s.reduce]
    return total.select(*s.keys, value.alias(s.name), n=n.cast(pl.Int64))


def _deviation(s: Statistic, data: pl.DataFrame, total: pl.DataFrame) -> pl.Series:
    """The standard deviation per population: squares within trajectories, and of their means around the whole's."""
    means = total.select(*s.keys, mean=pl.col("v") / pl.col("n"))
    off = pl.when(pl.col("n") > 0).then(pl.col("n") * (pl.col("v") / pl.col("n") - pl.col("mean")) ** 2).otherwise(0.0)
    squares = exact_sums(join_rows(data, means, s.keys).with_columns(q=pl.col("q") + off), s.keys, ["q"])
    some = pl.when(total["n"] > 0)
    return total.select(std=some.then((squares["q"] / total["n"]).sqrt()))["std"]


def _largest(s: Statistic, data: pl.DataFrame) -> pl.DataFrame:
    """Per population the smallest value that `top` still takes, and the last row taken of those that tie with it."""
    position, identity = (f"{s.name}_{x}" for x in TIES)
    keys = s.keys or ["_all"]
    data = data if s.keys else data.with_columns(_all=pl.lit(0))
    given = pl.col("_number").first() if "_number" in data.columns else pl.lit(None, dtype=pl.Float64)
    sizes = data.group_by(keys, maintain_order=True).agg(pl.len().alias("size"), given.alias("given"), "v")
    number = pl.Series("n", [number_of(s, n, g) for n, g in sizes.select("size", "given").iter_rows()], dtype=pl.Int64)
    ranked = pl.col("v").list.sort(descending=True)
    edges = sizes.with_columns(number).with_columns(ranked.list.get(pl.col("n") - 1, null_on_oob=True).alias(s.name))
    edges = edges.with_columns(pl.when(pl.col("n") > 0).then(s.name).alias(s.name))
    joined = data.join(edges.select(*keys, s.name, "n"), on=keys, how="left", maintain_order="left", nulls_equal=True)
    ahead = joined.group_by(keys, maintain_order=True).agg((pl.col("v") > pl.col(s.name)).sum().alias("_ahead"))
    tied = joined.filter(pl.col("v") == pl.col(s.name)).sort("position", "trajectory_id")
    tied = tied.join(ahead, on=keys, how="left", maintain_order="left", nulls_equal=True)
    last = (pl.col("n").first() - pl.col("_ahead").first() - 1).cast(pl.Int64)
    ends = tied.group_by(keys, maintain_order=True).agg(
        pl.col("position").get(last).alias(position), pl.col("trajectory_id").get(last).alias(identity)
    )
    made = edges.select(*keys, s.name, "n").join(ends, on=keys, how="left", maintain_order="left", nulls_equal=True)
    return made.select(*s.keys, s.name, position, identity, "n")


def grouped(frame: pl.DataFrame, keys: list[str], *aggregates: pl.Expr) -> pl.DataFrame:
    """One row per population, in order of first appearance; one row in all when `keys` is empty."""
    if not keys:
        return frame.select(aggregates)
    return frame.group_by(keys, maintain_order=True).agg(aggregates)


def exact_sums(frame: pl.DataFrame, keys: list[str], columns: list[str]) -> pl.DataFrame:
    """Correctly rounded sums of float columns per population."""
    lists = grouped(frame, keys, *(pl.col(c) if keys else pl.col(c).implode() for c in columns))
    sums = [pl.Series(c, [math.fsum(x) for x in lists[c].to_list()], dtype=pl.Float64) for c in columns]
    return lists.with_columns(sums)
