"""From factors to coefficients: the product of weight, advantage, masks and scale, token by token, in double precision.

Few tokens are multiplied at a time, so that what lies between reading the factors and keeping the result never leaves
the cache of a core. `[T]` counts the tokens of neighbouring trajectories, one behind the other; `scale` is one over the
denominator, and 0 where nothing counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_BLOCK = 1 << 15  # tokens; a quarter of a MiB for each double-precision column


def multiply(values: Mapping[str, NDArray[Any]], cap: float | None) -> dict[str, Floats]:
    """Weight, advantage, coefficients and `rollout_is` of some tokens, [T], in double precision.

    A coefficient is the product of its factors in the order written here; where `scale` is 0, it is 0 whatever they
    are. `cap`: of the rollout correction, if there is one.
    """
    found = {n: values[n].astype(np.float64, copy=False) for n in ("weight", "advantage")}
    if "mean" in values:
        found["weight"] = found["weight"] / values["mean"]
    mask, ratio = [values["token_keep"]] if "token_keep" in values else [], []
    if cap is not None:
        log_ratio_T = np.subtract(values["student_logprob"], values["rollout_logprob"], dtype=np.float64)
        found["rollout_is"] = pl.Series(log_ratio_T).exp().clip(upper_bound=cap).to_numpy()
        ratio = [found["rollout_is"]]
    streams = {"coefficient": [found["weight"], found["advantage"], *mask, *ratio, values["scale"]]}
    if "fkl_weight" in values:
        streams["fkl_coefficient"] = [values["fkl_weight"], *mask, values["scale"]]
    for name, (first_T, second_T, *others) in streams.items():
        product_T = first_T * second_T
        for factor_T in others:
            product_T *= factor_T
        product_T[values["scale"] == 0.0] = 0.0
        product_T += 0.0  # 0.0 for the -0.0 of a masked token with a negative advantage
        found[name] = product_T
    return found


def blocks(
    lengths: NDArray[np.int64], rows: Mapping[str, NDArray[Any]]
) -> Iterator[tuple[slice, dict[str, NDArray[Any]]]]:
    """Whole trajectories of about `_BLOCK` tokens: where their tokens lie, and their numbers, repeated per token."""
    ends = lengths.cumsum()
    first, start = 0, 0
    while first < len(ends):
        last = min(int(np.searchsorted(ends, start + _BLOCK)) + 1, len(ends))
        repeated = {name: np.repeat(values[first:last], lengths[first:last]) for name, values in rows.items()}
        yield slice(start, int(ends[last - 1])), repeated
        first, start = last, int(ends[last - 1])
