"""What holds for every rule whatever the table: masks, means, shards, order, threads and denominators."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fire_data as fd
from fire_data import weighing
from fire_data.prepare import Pieces, Weighing, prepare
from fire_data.rules import RULES, make_rule
from fire_data.weighing import Fitted
from tests.ragged import edge_cases, populations, ragged, rows_of

NAMES = sorted(set(RULES) - {"expression"})
MADE = {"step", "keep", "drop_reason", "weight", "advantage", "coefficient", "token_keep", "fkl_coefficient"}
EDGES = edge_cases(topk=3)
few = settings(max_examples=3, derandomize=True, database=None)


@st.composite
def tables(draw: st.DrawFn, fewest: int = 1) -> pl.DataFrame:
    """A ragged table of whole prompts of two samples: ordinary, full of ties, or with extreme values."""
    prompts = draw(st.integers(fewest, 7))
    kind = draw(st.sampled_from([{}, {"bank": 2}, {"spread": 22.0}]))
    return ragged(2 * prompts, draw(st.integers(0, 2**20)), draw(st.integers(1, 9)), topk=3, **kind)


batches = st.sampled_from([None, 2, 4, 6])


def _numbers(column: pl.Series) -> list[np.ndarray]:
    return [np.asarray(x, dtype=np.float64) for x in column.to_list()]


def _masks(mine: pl.DataFrame) -> list[np.ndarray]:
    """Per row which tokens count: those of kept trajectories that the rule does not mask."""
    lengths = mine["weight"].list.len().to_list()
    tokens = mine["token_keep"].to_list() if "token_keep" in mine.columns else [[True] * n for n in lengths]
    return [np.array(m, dtype=bool) & k for m, k in zip(tokens, mine["keep"].to_list(), strict=True)]


def _check_weighed(frame: pl.DataFrame, name: str, batch_size: int | None, denominator: str) -> None:
    """Masked tokens are exactly 0, every number is finite, and coefficients are their definition."""
    before = frame.clone()
    mine = fd.weigh(frame, name, batch_size=batch_size, denominator=denominator, constant=37.0).collect()
    assert frame.equals(before)
    assert mine.select(frame.columns).equals(before), "columns given come back as they were"
    assert set(mine.columns) - set(frame.columns) <= MADE
    masks, weights, advantages, coefficients = (
        _masks(mine),
        *(_numbers(mine[c]) for c in ("weight", "advantage", "coefficient")),
    )
    second = _numbers(mine["fkl_coefficient"]) if "fkl_coefficient" in mine.columns else coefficients
    for mask, weight, *signed in zip(masks, weights, advantages, coefficients, second, strict=True):
        assert all(len(x) == len(mask) and np.isfinite(x).all() for x in (weight, *signed))
        assert (weight >= 0).all()
        assert not signed[1][~mask].any()
        assert not signed[2][~mask].any()
    rows = rows_of(frame)
    for members in populations(rows, "step", batch_size):
        counts = {i: int(masks[i].sum()) for i in members}
        for i in members:
            divisor = {
                "tokens": sum(counts.values()),
                "all_tokens": sum(rows[j]["length"] for j in members),
                "sequences": sum(counts[j] > 0 for j in members) * counts[i],
                "constant": 37.0,
            }[denominator]
            expected = weights[i] * advantages[i] * masks[i] / (divisor or 1)
            np.testing.assert_allclose(coefficients[i], expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", NAMES)
def test_coefficients_are_their_definition_and_zero_where_anything_is_dropped(name: str) -> None:
    @few
    @given(tables(), batches, st.sampled_from(["tokens", "all_tokens", "sequences", "constant"]))
    def check(frame: pl.DataFrame, batch_size: int | None, denominator: str) -> None:
        _check_weighed(frame, name, batch_size, denominator)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_stands_every_edge(name: str) -> None:
    for i, frame in enumerate(EDGES.values()):
        _check_weighed(frame, name, (None, 4)[i % 2], ("tokens", "sequences", "all_tokens")[i % 3])


def _has_mean(name: str) -> bool:
    rule = make_rule(name)
    return rule.mean is not None or "normalise" in {f.name for f in dataclasses.fields(rule)}


# Together with a filter and a mask, so that all tokens and the kept ones have different means.
COMPOSED = "pw-opsd+verified-only+dial"


@pytest.mark.parametrize("name", [*(n for n in NAMES if _has_mean(n)), COMPOSED])
def test_mean_weight_over_the_declared_population_is_one(name: str) -> None:
    fields = {f.name for f in dataclasses.fields(make_rule(name))}

    @few
    @given(tables(), batches, st.data())
    def check(frame: pl.DataFrame, batch_size: int | None, data: st.DataObject) -> None:
        params: dict[str, Any] = {}
        if "normalise" in fields:
            params["normalise"] = data.draw(st.sampled_from(["trajectory", "group", "step", "round"]))
            params["normalise_over"] = data.draw(st.sampled_from(["all", "kept"]))
        declared = make_rule(name, params).mean
        assert declared is not None
        mine = fd.weigh(frame, name, batch_size=batch_size, **params).collect()
        masks, weights = _masks(mine), _numbers(mine["weight"])
        for members in populations(rows_of(frame), declared.scope, batch_size, declared.by):
            chosen = [masks[i] if declared.over == "kept" else np.ones(len(masks[i]), dtype=bool) for i in members]
            counted = np.concatenate([weights[i][m] for i, m in zip(members, chosen, strict=True)])
            if counted.any():
                assert counted.mean() == pytest.approx(1.0, rel=1e-5)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_rows_may_come_in_any_order_within_a_step(name: str) -> None:
    @few
    @given(tables(fewest=3), st.sampled_from([4, 6, 8]), st.randoms(use_true_random=False))
    def check(frame: pl.DataFrame, batch_size: int, random: Any) -> None:
        order: list[int] = []
        for start in range(0, frame.height, batch_size):
            prompts = [[i, i + 1] for i in range(start, min(start + batch_size, frame.height), 2)]
            random.shuffle(prompts)
            order += [i for prompt in prompts for i in prompt]
        mine = fd.weigh(frame, name, batch_size=batch_size).collect()[order]
        moved = fd.weigh(frame[order], name, batch_size=batch_size).collect()
        for column in {"trajectory_id", "step", "keep", "drop_reason", "token_keep"} & set(mine.columns):
            assert moved[column].to_list() == mine[column].to_list()
        for column in {"weight", "advantage", "coefficient", "fkl_coefficient"} & set(mine.columns):
            for have, want in zip(_numbers(moved[column]), _numbers(mine[column]), strict=True):
                np.testing.assert_allclose(have, want, rtol=1e-6, atol=1e-12)

    check()


@pytest.mark.parametrize("name", NAMES)
def test_shards_change_no_bit(name: str) -> None:
    @few
    @given(tables(fewest=3), st.sampled_from([None, 4, 6]), st.sampled_from([2, 4, 6, 10]))
    def check(frame: pl.DataFrame, batch_size: int | None, size: int) -> None:
        rule = Weighing(make_rule(name), batch_size=batch_size, samples_per_group=2)
        prepared = prepare(frame.lazy(), rule)
        found = []
        for table in (Pieces(prepared), Pieces(prepared, size)):
            fitted = weighing.fit(table, rule)
            fitted = Fitted(json.loads(json.dumps(fitted.stats)), json.loads(json.dumps(fitted.steps)))
            found.append((fitted, pl.concat([weighing.apply(table, i, rule, fitted) for i in range(len(table))])))
        (once, whole), (piecewise, pieces) = found
        assert piecewise == once
        assert pieces.height == frame.height
        assert pieces.equals(whole)

    check()


_EVERY_RULE = """
import hashlib, json
import fire_data as fd
from fire_data.rules import RULES
from tests.ragged import ragged

frame = ragged(240, 9, longest=30, topk=4, bank=300)
for name in sorted(set(RULES) - {"expression"}):
    made = fd.weigh(frame, name, batch_size=80).collect().drop(frame.columns)
    text = json.dumps(made.to_dict(as_series=False))
    print(name, hashlib.sha256(text.encode()).hexdigest())
"""


def test_one_thread_and_two_give_the_same_bytes() -> None:
    where = Path(__file__).parents[1]
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _EVERY_RULE],
            env={**os.environ, "POLARS_MAX_THREADS": threads},
            cwd=where,
            stdout=subprocess.PIPE,
            text=True,
        )
        for threads in ("1", "2")
    ]
    one, two = (run.communicate()[0].splitlines() for run in runs)
    assert all(run.returncode == 0 for run in runs)
    assert [line.split()[0] for line in one] == NAMES
    assert one == two
