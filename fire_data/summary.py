"""What a rule did, in numbers that can be added shard by shard: what is kept, how weights are spread."""

from __future__ import annotations

import polars as pl

from fire_data.rules.statistics import exact_sums
from fire_data.rules.tokens import flatten, fold


def summarise(weights: pl.DataFrame, lengths: pl.Series) -> dict[str, float]:
    """Sums over weighted rows that can be added shard by shard: what the rule did, in numbers.

    Weight statistics are over kept tokens.
    """
    sizes = weights["weight"].list.len()
    weight = flatten(weights["weight"]).cast(pl.Float64)
    if "token_keep" in weights.columns:
        weight = weight * flatten(weights["token_keep"]).cast(pl.Float64)
        lengths_kept = weights["token_keep"].list.sum()
    else:
        lengths_kept = lengths
    lists, squares = fold(weight, sizes), fold(weight * weight, sizes)
    nonzero = fold(flatten(weights["coefficient"]) != 0, sizes)
    frame = weights.select("keep").with_columns(
        weight_sum=lists.list.sum(),
        weight_squares=squares.list.sum(),
        weight_max=lists.list.max(),
        nonzero=nonzero.list.sum().cast(pl.Float64),
        kept=lengths_kept.cast(pl.Float64),
    )
    rows = frame.filter("keep")
    sums = exact_sums(rows, [], ["weight_sum", "weight_squares", "kept", "nonzero"]).row(0, named=True)
    return {
        "trajectories": float(frame.height),
        "kept_trajectories": float(rows.height),
        "tokens": float(lengths.sum()),
        "kept_tokens": sums["kept"],
        "nonzero_tokens": sums["nonzero"],
        "weight_sum": sums["weight_sum"],
        "weight_squares": sums["weight_squares"],
        "weight_max": float(rows["weight_max"].max() or 0.0),  # type: ignore[arg-type]
    }


def merge_summaries(parts: list[dict[str, float]]) -> dict[str, float]:
    """Add the summaries of all shards, in shard order, and derive fractions, mean weight and effective sample size.

    Effective sample size (Kish) is (sum w)^2 / sum w^2 over kept tokens, reported as a share of them.
    """
    total = {k: max(p[k] for p in parts) if k == "weight_max" else sum(p[k] for p in parts) for k in parts[0]}
    kept, squares = total["kept_tokens"], total["weight_squares"]
    return {
        **total,
        "n_dropped": total["trajectories"] - total["kept_trajectories"],
        "kept_fraction": total["kept_trajectories"] / total["trajectories"] if total["trajectories"] else 0.0,
        "kept_token_fraction": kept / total["tokens"] if total["tokens"] else 0.0,
        "mean_weight": total["weight_sum"] / kept if kept else 0.0,
        "effective_sample_share": total["weight_sum"] ** 2 / squares / kept if squares and kept else 0.0,
    }
