"""Rules on one scored table, from Python: how much each trains on, how concentrated its signal is, how far it agrees.

python examples/compare_rules.py runs/demo/fire uniform fire tip
"""

from __future__ import annotations

import argparse
from pathlib import Path

import polars as pl

import fire_data as fd


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("rules", nargs="*", default=["uniform", "fire", "tip"], help="as for `fire weigh --rule`")
    parser.add_argument("--round", type=int, default=0)
    options = parser.parse_args()
    run = fd.open_run(options.run)
    scores = run.scores(round=options.round).collect()
    found = {}
    for rule in options.rules:
        weighed = fd.weigh(scores, rule, batch_size=run.config.train.batch_size)
        found[rule] = fd.explode(weighed).select("coefficient").collect()["coefficient"]
    table = pl.DataFrame([numbers(rule, found[rule], *next(iter(found.items()))) for rule in found])
    with pl.Config(tbl_formatting="MARKDOWN", tbl_rows=-1, tbl_hide_column_data_types=True, float_precision=4):
        print(table)


def numbers(rule: str, coefficient: pl.Series, first: str, reference: pl.Series) -> dict[str, str | float]:
    """One row: the share of tokens a rule trains on, how concentrated its signal is, how far it goes with `first`."""
    size = coefficient.abs()
    length = (coefficient.dot(coefficient) * reference.dot(reference)) ** 0.5
    return {
        "rule": rule,
        "trained tokens": (size > 0).mean(),
        "signal in the top 1 %": size.top_k(len(size) // 100 + 1).sum() / size.sum(),
        f"cosine with {first}": coefficient.dot(reference) / length,
    }


if __name__ == "__main__":
    main()
