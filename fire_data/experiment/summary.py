"""From the table of an experiment to what it says: arms per world, paired differences with intervals, tested claims.

Two arms are compared seed by seed at the same token budget: of both runs of a pair, the fewer rollout tokens. A curve's
value there lies straight between its evaluations. Tested is the metric that the specification names; its comparisons
over all worlds are one family, corrected by Holm. Claims are another. The other metrics have intervals and no p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import polars as pl

from fire_data.experiment.spec import METRICS, TEACHER, Claim, Spec
from fire_data.experiment.statistics import (
    LEVEL,
    Paired,
    area,
    at,
    holm,
    least_p,
    median_reached,
    paired,
    pairs_needed,
    reached,
    within,
)
from fire_data.verify.estimates import mean

Json = dict[str, Any]
Curve = dict[str, list[float]]  # of a cell: a list over its evaluations
Curves = dict[tuple[str, str, str], dict[int, Curve]]  # by (world, setting, arm), then by seed

_COLUMNS = ("round", "rollout_tokens", "steps", "sampled", "greedy", "retain_greedy")


def summarise(
    table: pl.DataFrame, spec: Spec, failures: dict[str, str] | None = None, worlds_cpu_seconds: float = 0.0
) -> Json:
    """Everything the report shows, JSON-ready. `failures`: cells by name with what went wrong."""
    curves = curves_of(table, spec.rounds)
    comparisons = _corrected(list(_comparisons(curves, spec)), spec.metric)
    return {
        "about": spec.about,
        "rounds": spec.rounds,
        "seeds": spec.seeds,
        "target": spec.target,
        "metric": spec.metric,
        "level": LEVEL,
        "teachers": _teachers(table),
        "arms": [_arm(key, seeds, spec, table) for key, seeds in curves.items()],
        "comparisons": comparisons,
        "tests": (tests := sum(c["metric"] == spec.metric for c in comparisons)),
        "least_p": least_p(len(spec.seeds)),
        "seeds_for_sign_flip": pairs_needed(max(1, tests), 1 - LEVEL),
        "claims": _claims(curves, spec),
        "failures": failures or {},
        "cpu_seconds": float(table["cpu_seconds"].sum()),
        "worlds_cpu_seconds": worlds_cpu_seconds,
    }


def curves_of(table: pl.DataFrame, rounds: int) -> Curves:
    """Evaluations of every finished cell, in the order of the table. A cell that has not come to the end has none."""
    found: Curves = {}
    for (world, setting, arm, seed), rows in table.group_by("world", "setting", "arm", "seed", maintain_order=True):
        seen = rows.sort("round").filter(pl.col("sampled").is_not_null() | pl.col("greedy").is_not_null())
        if seen.height and seen["round"][-1] >= rounds:
            curve = {name: seen[name].to_list() for name in _COLUMNS}
            found.setdefault((str(world), str(setting), str(arm)), {})[int(str(seed))] = curve
    return found


def _value(metric: str, curve: Curve, budget: float) -> float | None:
    """A metric of one run at a number of rollout tokens; None if it was not measured."""
    column = {"area": "sampled", "retain": "retain_greedy"}.get(metric, metric)
    if None in curve[column]:
        return None
    measure = area if metric == "area" else at
    return measure(curve["rollout_tokens"], curve[column], budget)


def differences(
    curves: Curves, group: tuple[str, str], arm: str, against: str, metric: str, against_setting: str | None = None
) -> dict[int, float]:
    """By seed: how much more an arm has of a metric than another, at the fewer rollout tokens of both."""
    world, setting = group
    mine, theirs = (curves.get(k, {}) for k in ((*group, arm), (world, against_setting or setting, against)))
    found = {}
    for seed in sorted(mine.keys() & theirs.keys()):
        budget = min(c["rollout_tokens"][-1] for c in (mine[seed], theirs[seed]))
        a, b = (_value(metric, c, budget) for c in (mine[seed], theirs[seed]))
        if a is not None and b is not None:
            found[seed] = a - b
    return found


def _comparisons(curves: Curves, spec: Spec) -> Iterable[Json]:
    groups = dict.fromkeys((world, setting) for world, setting, _ in curves)
    for world, setting in groups:
        for against in spec.against:
            for arm in spec.arms:
                if arm in spec.against and spec.against.index(arm) <= spec.against.index(against):
                    continue  # each pair of controls once
                for metric in METRICS:
                    found = differences(curves, (world, setting), arm, against, metric)
                    if found:
                        place = {"world": world, "setting": setting, "arm": arm, "against": against, "metric": metric}
                        yield {**place, **_plain(paired([*found.values()])), "differences": found}


def _plain(result: Paired) -> Json:
    """As JSON, which has no infinite bounds: those of a single pair are None."""
    return {k: v if math.isfinite(v) else None for k, v in result._asdict().items()}


def _corrected(comparisons: list[Json], metric: str) -> list[Json]:
    """With Holm's p over those of one metric; the others have no p at all."""
    tested = [c for c in comparisons if c["metric"] == metric]
    for one, p, flip in zip(tested, *(holm([c[k] for c in tested]) for k in ("p", "p_flip")), strict=True):
        one |= {"p_holm": p, "p_flip_holm": flip}
    return [
        c if c["metric"] == metric else {k: v for k, v in c.items() if k not in ("p", "p_flip")} for c in comparisons
    ]


def _claims(curves: Curves, spec: Spec) -> list[Json]:
    told = [_claim(curves, claim) for claim in spec.claims]
    corrected = holm([c["p"] for c in told])
    for one, p in zip(told, corrected, strict=True):
        one |= {"p_holm": p, "verdict": _verdict(one, p)}
    return told


def _claim(curves: Curves, claim: Claim) -> Json:
    place = (claim.world, claim.setting)
    found = differences(curves, place, claim.arm, claim.against, claim.metric, claim.against_setting)
    told: Json = {"claim": str(claim), "holds": claim.holds, "n": len(found), "p": 1.0, "differences": found}
    if not found:
        return told
    result = paired([*found.values()])
    p = within([*found.values()], claim.margin) if claim.holds == "within" else result.p
    return told | _plain(result) | {"p": p}


def _verdict(told: Json, p: float) -> str:
    """`supported`, `refuted` (significantly the other way) or `undecided`."""
    if not told["n"] or p >= 1 - LEVEL:
        return "undecided"
    if told["holds"] == "within":
        return "supported"
    return "supported" if (told["mean"] > 0) == (told["holds"] == "better") else "refuted"


def _teachers(table: pl.DataFrame) -> list[Json]:
    """Teachers on the same held-out prompts, means over seeds."""
    keys = ["world", "setting", "arm"]
    rows = table.filter(pl.col("arm").str.split("-").list.first() == TEACHER)
    values = [
        pl.len().alias("seeds"),
        pl.col("sampled", "greedy").mean(),
        pl.col("retain_greedy").mean().alias("retain"),
    ]
    return rows.group_by(keys, maintain_order=True).agg(values).to_dicts()


def _arm(key: tuple[str, str, str], seeds: dict[int, Curve], spec: Spec, table: pl.DataFrame) -> Json:
    """One arm in one world: means over seeds at the end, and what it took to come to the target."""
    world, setting, arm = key
    rows = table.filter(world=world, setting=setting, arm=arm)
    last = rows.filter(pl.col("round") == spec.rounds)

    def ends(measure: Callable[[Curve], float | None]) -> float | None:
        values = [measure(c) for c in seeds.values()]
        return mean([v for v in values if v is not None])

    told: Json = {"world": world, "setting": setting, "arm": arm, "seeds": len(seeds)}
    told |= {
        name: ends(lambda c, name=name: _value(name, c, c["rollout_tokens"][-1]))  # type: ignore[misc]
        for name in METRICS
    }
    for name in ("rollout_tokens", "steps"):
        whole = [c for c in seeds.values() if None not in c["sampled"]]
        told[f"{name}_to_target"] = median_reached([reached(c[name], c["sampled"], spec.target) for c in whole])
    starts = [c["sampled"][0] for c in seeds.values() if c["sampled"][0] is not None]
    told["start"] = mean(starts)
    told |= {name: last[name].mean() for name in ("rollout_tokens", "trained_tokens", "steps")}
    told |= {name: rows[name].mean() for name in ("response_length", "truncated", "kept_share")}
    return told | {"cpu_seconds": float(rows["cpu_seconds"].sum()) / len(seeds), "peak_mb": rows["peak_mb"].max()}
