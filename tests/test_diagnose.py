"""The diagnosis finds what was planted and stays quiet where nothing was; its numbers are those counted by hand."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from scipy import stats
from scipy.special import logsumexp

from fire_data.diagnose import CHECKS, LEVELS, Facts, Finding, Weighed, diagnose, measure, merge
from fire_data.diagnose.auroc import auroc, auroc_interval, auroc_within
from fire_data.diagnose.finding import plain
from fire_data.diagnose.measure import breaches, repeat_ratio
from fire_data.rules import RULES
from fire_data.run import Run, open_run
from fire_data.schemas.errors import DataError
from fire_data.shards import sealed
from fire_data.steps.diagnose import _joined, filters

from .conftest import Answer, flip, shard_files

VOCABULARY = 24
END = 0
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
FACTS = Facts(
    batch_size=16, sampling=PLAIN, vocabulary_size=VOCABULARY, templates=("a", "shared"), entropy_kind="exact",
    tokenizers={"shared": VOCABULARY, "conflicts": 0, "only_student": 0, "only_teacher": 0, "roles": {}},
    dtypes={"student": "float32", "teacher": "float32"},
)  # fmt: skip


def signals(rng: np.random.Generator, n: int) -> dict[str, list[Any]]:
    """`n` tokens sampled from a student of `VOCABULARY` ids, scored by it and by a teacher that resembles it."""
    student = rng.normal(scale=2, size=(n, VOCABULARY))
    teacher = student + rng.normal(scale=0.7, size=student.shape)
    p, q = (x - logsumexp(x, axis=1, keepdims=True) for x in (student, teacher))
    ids = np.array([rng.choice(VOCABULARY, p=np.exp(row)) for row in p], dtype=int).reshape(n)
    at = np.arange(n), ids
    found: dict[str, Any] = {"response_ids": ids, "rollout_logprob": p[at]}
    for who, x, mine in (("student", student, p), ("teacher", teacher, q)):
        found[f"{who}_logprob"] = mine[at]
        found[f"{who}_entropy"] = -(np.exp(mine) * mine).sum(1)
        found[f"{who}_max_logprob"] = mine.max(1)
        found[f"{who}_top1_id"] = x.argmax(1)
        found[f"{who}_rank"] = 1 + (x > x[at][:, None]).sum(1)
    found["reverse_kl"] = (np.exp(p) * (p - q)).sum(1)
    found["forward_kl"] = (np.exp(q) * (q - p)).sum(1)
    top = teacher[np.arange(n), student.argmax(1)]
    found["teacher_rank_of_student_top1"] = 1 + (teacher > top[:, None]).sum(1)
    return {k: v.tolist() for k, v in found.items()}


def scored(lengths: Sequence[int] | None = None, seed: int = 0, n: int = 4) -> pl.DataFrame:
    """A healthy table: `n` samples of each prompt, of the given lengths, all stopped, half of them right."""
    rng = np.random.default_rng(seed)
    if lengths is None:
        lengths = rng.integers(6, 20, 160).tolist()
    rows = len(lengths)
    frame: dict[str, Any] = {
        "trajectory_id": [f"t{i}" for i in range(rows)],
        "prompt_id": [f"p{i // n}" for i in range(rows)],
        "teacher": pl.Series([None] * rows, dtype=pl.String),
        "reward": pl.Series([float(i % 2) for i in range(rows)], dtype=pl.Float32),
        "finish_reason": ["stop"] * rows,
        "response": ["some words"] * rows,
        "teacher_prompt_ids": pl.Series([None] * rows, dtype=pl.List(pl.Int32)),
    }
    tokens = [signals(rng, length) for length in lengths]
    for name in signals(rng, 1):
        whole = name.endswith(("_id", "_ids", "_rank", "_top1"))
        frame[name] = pl.Series([t[name] for t in tokens], dtype=pl.List(pl.Int32 if whole else pl.Float32))
    return pl.DataFrame(frame)


CHECK_OF = {check(measure(scored([1]).clear()), FACTS).name: check for check in CHECKS}


@pytest.fixture(scope="module")
def healthy() -> pl.DataFrame:
    return scored()


def edit(frame: pl.DataFrame, column: str, change: Callable[[int, list[Any]], list[Any]]) -> pl.DataFrame:
    """The frame with every list of a column replaced by `change(row, values)`."""
    lists = [change(i, row) for i, row in enumerate(frame[column].to_list())]
    return frame.with_columns(pl.Series(column, lists, dtype=frame.schema[column]))


def look(frame: pl.DataFrame, name: str, **facts: Any) -> Finding:
    """One finding of a table."""
    return CHECK_OF[name](measure(frame), Facts(**{**FACTS.__dict__, **facts}))


def flat(frame: pl.DataFrame, column: str) -> np.ndarray:
    return np.concatenate([np.asarray(x, dtype=np.float64) for x in frame[column].to_list()])


def advantages(frame: pl.DataFrame) -> np.ndarray:
    return flat(frame, "teacher_logprob") - flat(frame, "student_logprob")


def by_pairs(score: Sequence[float], right: Sequence[bool]) -> float:
    pairs = [(a > b) + (a == b) / 2 for a, ya in zip(score, right, strict=True) if ya
             for b, yb in zip(score, right, strict=True) if not yb]  # fmt: skip
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize(("rows", "values"), [(2, 1), (3, 2), (20, 3), (60, 1000)])
def test_auroc_is_the_share_of_pairs_won_ties_counting_half(rows: int, values: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        score = rng.integers(0, values, rows).astype(float)
        right = np.arange(rows) % 3 == 0
        found = auroc(pl.Series(score), pl.Series(right))
        assert found == pytest.approx(by_pairs(score.tolist(), right.tolist()), abs=1e-12)
        u = stats.mannwhitneyu(score[right], score[~right]).statistic
        assert found == pytest.approx(u / (right.sum() * (~right).sum()), abs=1e-12)


def test_auroc_of_one_class_is_none() -> None:
    assert auroc(pl.Series([1.0, 2.0]), pl.Series([True, True])) is None
    assert auroc_interval(pl.Series([1.0, 2.0]), pl.Series([True, True]), pl.Series(["a", "b"]), 0) is None


def test_auroc_within_prompts_counts_pairs_of_a_prompt_only() -> None:
    score, right = [3.0, 1.0, 1.0, 9.0, 8.0, 5.0], [True, False, True, False, False, True]
    prompt = ["a", "a", "a", "b", "b", "c"]
    # a: 3 > 1 and 1 = 1; b has no right answer and c no wrong one.
    assert auroc_within(pl.Series(score), pl.Series(right), pl.Series(prompt)) == (0.75, 2)


def test_the_interval_is_seeded_and_that_of_a_plain_bootstrap_over_prompts() -> None:
    rng = np.random.default_rng(3)
    right = rng.random(300) < 0.4
    prompt = np.repeat(np.arange(100), 3)
    score = rng.normal(size=300) + right + rng.normal(size=100)[prompt]
    columns = pl.Series(score), pl.Series(right), pl.Series([f"p{i}" for i in prompt])
    found = auroc_interval(*columns, seed=1)
    assert found is not None
    assert found == auroc_interval(*columns, seed=1)
    assert found != auroc_interval(*columns, seed=2)
    areas = []
    for _ in range(400):
        rows = (3 * rng.integers(0, 100, 100)[:, None] + np.arange(3)).ravel()
        good, bad = score[rows][right[rows]], score[rows][~right[rows]]
        areas.append(stats.mannwhitneyu(good, bad).statistic / (len(good) * len(bad)))
    np.testing.assert_allclose([found.low, found.high], np.quantile(areas, [0.025, 0.975]), atol=0.015)


def test_copies_of_a_prompts_samples_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(0)
    right = rng.random(80) < 0.5
    score, prompt = rng.normal(size=80) + right, [f"p{i}" for i in range(80)]
    once = auroc_interval(pl.Series(score), pl.Series(right), pl.Series(prompt), 0)
    copied = auroc_interval(pl.Series(np.tile(score, 5)), pl.Series(np.tile(right, 5)), pl.Series(prompt * 5), 0)
    split = auroc_interval(
        pl.Series(np.tile(score, 5)), pl.Series(np.tile(right, 5)), pl.Series([str(i) for i in range(400)]), 0
    )
    assert once is not None
    assert copied is not None
    assert split is not None
    assert (copied.low, copied.high) == (once.low, once.high)
    assert split.high - split.low < 0.7 * (once.high - once.low)


def with_scores(right: np.ndarray, score: np.ndarray, seed: int = 0) -> pl.DataFrame:
    """A table whose mean teacher logprobs are `score - 10`, one sample per prompt."""
    frame = scored([2] * len(right), seed, n=1)
    frame = edit(frame, "teacher_logprob", lambda i, _: [float(score[i]) - 9, float(score[i]) - 11])
    return frame.with_columns(reward=pl.Series(right.astype(np.float32)))


def test_a_planted_auroc_of_point_nine_is_found_with_an_interval_around_it() -> None:
    rng = np.random.default_rng(0)
    right = np.arange(400) % 2 == 0
    # Two unit normals this far apart are told apart with an area of 0.9.
    score = rng.normal(size=400) + right * math.sqrt(2) * stats.norm.ppf(0.9)
    frame = with_scores(right, score)
    found = look(frame, "premise")
    assert found.level == "ok"
    means = [float(np.mean(x)) for x in frame["teacher_logprob"].to_list()]
    assert found.numbers["auroc"] == pytest.approx(by_pairs(means, right.tolist()), abs=1e-6)
    assert found.numbers["low"] < 0.9 < found.numbers["high"]
    assert found.numbers["low"] < found.numbers["auroc"] < found.numbers["high"]
    assert found.numbers["resampled"] == "prompts"
    assert (found.numbers["right"], found.numbers["wrong"]) == (200, 200)
    assert "400 prompts" in found.measured


@pytest.mark.parametrize(("shift", "level"), [(-1.5, "problem"), (0.0, "warning"), (0.5, "note"), (1.5, "ok")])
def test_the_premise_is_judged_by_its_interval(shift: float, level: str) -> None:
    right = np.arange(300) % 2 == 0
    score = np.random.default_rng(1).normal(size=300) + right * shift
    found = look(with_scores(right, score), "premise")
    assert found.level == level
    assert (found.do == "") == (level == "ok")


def test_a_premise_that_length_explains_as_well_is_a_note() -> None:
    frame = scored([5 + 10 * (i % 2) for i in range(80)], n=2)  # the wrong answers are the short ones
    frame = edit(frame, "teacher_logprob", lambda i, x: [-2.0 + (i % 2) + i / 500] * len(x))
    found = look(frame, "premise")
    assert found.numbers["auroc"] > 0.9
    assert found.numbers["auroc_short"] == 0.0
    assert found.level == "note"


def test_the_premise_without_rewards_says_how_to_get_them(healthy: pl.DataFrame) -> None:
    for name in ("premise", "outcome"):
        missing = look(healthy.with_columns(reward=pl.lit(None, dtype=pl.Float32)), name, run="runs/a", round=2)
        assert missing.level == "unknown"
        assert "fire verify runs/a --round 2" in missing.do
        for reward in (0.0, 1.0):
            one = look(healthy.with_columns(reward=pl.lit(reward, dtype=pl.Float32)), name)
            assert one.level == "unknown"
            assert ("right" if reward else "wrong") in one.measured


def test_the_premise_is_told_for_each_teacher() -> None:
    rng = np.random.default_rng(0)
    right, code = np.arange(200) % 2 == 0, np.arange(200) >= 100
    score = rng.normal(size=200) + right * np.where(code, 0.0, 3.0)
    frame = with_scores(right, score).with_columns(teacher=pl.Series(["code" if c else "math" for c in code.tolist()]))
    found = look(frame, "premise").numbers["by_teacher"]
    assert found["math"]["auroc"] > 0.95
    assert found["code"]["low"] < 0.5 < found["code"]["high"]


def test_the_filters_association_with_length_is_found_and_its_absence_too(healthy: pl.DataFrame) -> None:
    assert look(healthy, "filter").level == "ok"
    planted = edit(healthy, "teacher_logprob", lambda i, x: [-len(x) / 10 - (i % 7) / 50] * len(x))
    found = look(planted, "filter")
    assert found.level == "warning"
    means = [float(np.mean(x)) for x in planted["teacher_logprob"].to_list()]
    lengths = planted["response_ids"].list.len().to_list()
    assert found.numbers["spearman"]["length"] == pytest.approx(stats.spearmanr(means, lengths).statistic, abs=1e-5)


def test_without_weights_fires_filter_is_taken_over_the_steps(healthy: pl.DataFrame) -> None:
    found = look(healthy, "filter", batch_size=16)
    assert found.numbers["n_dropped"] == 10 * math.ceil(0.2 * 15)  # of 16 distinct values, a linear quantile
    assert "fire at 20 %" in found.measured
    means = np.array([float(np.mean(x)) for x in healthy["teacher_logprob"].to_list()]).reshape(10, 16)
    low = (means < np.quantile(means, 0.2, axis=1, keepdims=True)).ravel()
    lengths = healthy["response_ids"].list.len().to_numpy()
    assert found.numbers["dropped"]["length"] == pytest.approx(lengths[low].mean(), abs=1e-3)
    assert found.numbers["kept"]["length"] == pytest.approx(lengths[~low].mean(), abs=1e-3)


def test_with_weights_their_own_decisions_are_told(healthy: pl.DataFrame) -> None:
    cut = healthy.with_columns(
        keep=pl.int_range(pl.len()) >= 40,
        finish_reason=pl.when(pl.int_range(pl.len()) < 40).then(pl.lit("length")).otherwise(pl.lit("stop")),
    )
    found = look(cut, "filter", weighed=Weighed("mine", True))
    assert (found.numbers["n_dropped"], found.numbers["n_kept"]) == (40, 120)
    assert (found.numbers["dropped"]["truncated"], found.numbers["kept"]["truncated"]) == (1.0, 0.0)
    assert found.level == "note"
    assert "'mine'" in found.measured


def test_a_filter_that_drops_nothing_is_called_inert(healthy: pl.DataFrame) -> None:
    kept = healthy.with_columns(keep=pl.lit(True))
    inert = look(kept, "inert-filter", weighed=Weighed("fire-released", True))
    assert inert.level == "warning"
    assert "--scope step" in inert.do
    assert look(kept, "inert-filter", weighed=Weighed("uniform", False)).level == "ok"
    assert look(healthy, "inert-filter").level == "ok"
    assert look(healthy, "inert-filter", batch_size=1).level == "note"


def test_which_recorded_rules_must_drop_something() -> None:
    assert filters({"name": "fire", "percentile": 20.0})
    assert not filters({"name": "fire", "percentile": 0.0})
    assert not filters({"name": "soft-filter", "percentile": 20.0})
    assert not filters({"name": "uniform"})
    assert filters({"name": "a+b", "rules": [{"name": "uniform"}, {"name": "prompt-gate", "percentile": 20}]})
    assert not filters(None)


def test_signs_of_the_advantage_are_counted_by_reward(healthy: pl.DataFrame) -> None:
    def advantage(i: int, x: list[float]) -> list[float]:
        return [s + (1 if j % 3 or i % 2 else -1) for j, s in enumerate(healthy["student_logprob"][i])]

    planted = edit(healthy, "teacher_logprob", advantage)  # right rows (odd): all positive; wrong ones: two in three
    found = look(planted, "outcome")
    lengths = healthy["response_ids"].list.len().to_numpy()
    wrong = lengths[::2]
    assert found.numbers["positive_share"]["right"] == 1.0
    expected = (wrong - np.ceil(wrong / 3)).sum() / wrong.sum()
    assert found.numbers["positive_share"]["wrong"] == pytest.approx(expected, abs=1e-5)
    assert found.numbers["tokens"]["wrong"]["length"] == wrong.sum()
    assert found.level == "ok"
    swapped = look(planted.with_columns(reward=1 - pl.col("reward")), "outcome")
    assert swapped.level == "warning"


EARLY_ROUND = {
    "round": 0, "trajectories": 160, "tokens": 2000, "truncated": 0.0, "length_p50": 4.0, "length_p95": 20.0,
    "repeat": 0.01, "student_entropy": 9.0, "student_open": 0.5, "reward": 0.5,
}  # fmt: skip


def test_truncation_and_growing_lengths_are_found(healthy: pl.DataFrame) -> None:
    fine = look(healthy, "length")
    assert fine.level == "ok"
    lengths = healthy["response_ids"].list.len().to_numpy()
    assert fine.numbers["length_p50"] == np.quantile(lengths, 0.5)
    assert fine.numbers["length_p95"] == pytest.approx(np.quantile(lengths, 0.95))
    for share, level in ((0.1, "note"), (0.3, "warning")):
        cut = pl.when(pl.int_range(pl.len()) < share * pl.len()).then(pl.lit("length")).otherwise(pl.lit("stop"))
        found = look(healthy.with_columns(finish_reason=cut), "length")
        assert (found.level, found.numbers["truncated"]) == (level, share)
    grown = look(healthy, "length", earlier=(EARLY_ROUND,), round=1)
    assert grown.level == "warning"
    assert grown.numbers["growth"] == np.quantile(lengths, 0.5) / 4
    assert "4 (round 0) -> 12 (round 1)" in grown.measured.replace(f"{np.quantile(lengths, 0.5):g}", "12")


def repeats(ids: list[int], n: int = 4) -> float | None:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def test_the_repeat_ratio_is_that_of_plain_counting() -> None:
    rng = np.random.default_rng(0)
    lengths = [*range(10), 40, 90]
    frame = edit(
        scored(lengths), "response_ids", lambda i, x: rng.integers(0, 3 if i % 2 else 200_000, len(x)).tolist()
    )
    found = measure(frame).rows.select(repeat_ratio()).to_series().to_list()
    assert found == pytest.approx([repeats(x) for x in frame["response_ids"].to_list()])
    assert found[:4] == [None] * 4
    assert found[-1] > 0.05


def test_loops_are_found_in_tokens_and_in_text(healthy: pl.DataFrame) -> None:
    assert look(healthy, "repetition").level == "ok"
    looping = edit(healthy, "response_ids", lambda i, x: [5, 6] * (len(x) // 2) + [5] * (len(x) % 2) if i < 16 else x)
    found = look(looping, "repetition")
    assert found.level == "warning"
    assert found.numbers["looping_share"] == pytest.approx(0.1, abs=0.03)
    rng = np.random.default_rng(0)
    words = [" ".join(map(str, rng.integers(0, 10**6, 100))) for _ in range(160)]
    assert look(healthy.with_columns(response=pl.Series(words)), "repetition").level == "ok"
    words[:16] = ["and so on " * 60] * 16
    packed = look(healthy.with_columns(response=pl.Series(words)), "repetition")
    assert packed.level == "warning"
    assert packed.numbers["packed_share"] == 0.1


def test_agreement_on_loops_is_found_and_disagreement_on_them_is_not() -> None:
    frame = scored([70, 130, 200, 64] * 6)
    assert look(frame, "agreement-trap").level == "ok"
    loops = edit(frame, "response_ids", lambda i, x: [3] * len(x) if i % 4 == 2 else x)
    trapped = edit(loops, "reverse_kl", lambda i, x: [0.001] * len(x) if i % 4 == 2 else x)
    found = look(trapped, "agreement-trap")
    assert found.level == "warning"
    assert found.numbers["windows"] == 6 * (1 + 2 + 3 + 1)
    assert found.numbers["looping_share_low"] == 1.0
    assert found.numbers["longest_run_low"] == 3
    apart = edit(loops, "reverse_kl", lambda i, x: [9.0] * len(x) if i % 4 == 2 else x)
    assert look(apart, "agreement-trap").numbers["looping_share_low"] == 0.0
    assert look(scored([63] * 40), "agreement-trap").level == "unknown"


def test_an_end_the_teacher_does_not_share_is_found(healthy: pl.DataFrame) -> None:
    fine = look(healthy, "end-token")
    assert fine.level == "ok"
    last = [a[-1] - b[-1] for a, b in zip(healthy["teacher_logprob"], healthy["student_logprob"], strict=True)]
    assert fine.numbers["advantage_last"] == pytest.approx(np.mean(last), abs=1e-5)
    inner = advantages(healthy).sum() - np.sum(last)
    assert fine.numbers["advantage_others"] == pytest.approx(inner / (len(advantages(healthy)) - 160), abs=1e-5)
    ended = edit(healthy, "response_ids", lambda i, x: [*x[:-1], END])
    refused = edit(ended, "teacher_logprob", lambda i, x: [*x[:-1], -9.0])
    found = look(refused, "end-token")
    assert found.level == "problem"
    assert found.numbers["never_likely_to_teacher"] == [END]
    assert found.numbers["final_ids"][0]["count"] == 160
    assert "weigh.end_token=mask" in found.do
    unlike = edit(ended, "student_logprob", lambda i, x: [*x[:-1], -1.0])
    for teacher, level in ((-4.0, "warning"), (-2.0, "note"), (-0.01, "ok")):
        given = edit(unlike, "teacher_logprob", lambda i, x, t=teacher: [*x[:-1], t])
        assert look(given, "end-token").level == level
    roles = look(healthy, "end-token", tokenizers={"roles": {"eos": [0, 7]}})
    assert roles.level == "note"
    assert "eos is id 0 for the student, 7 for the teacher" in roles.measured
    assert look(healthy.with_columns(finish_reason=pl.lit("length")), "end-token").level == "unknown"


def test_entropy_collapse_is_falling_below_the_teacher(healthy: pl.DataFrame) -> None:
    fine = look(healthy, "entropy")
    assert fine.level == "ok"
    entropies = flat(healthy, "student_entropy")
    for q, value in fine.numbers["quantiles"].items():
        assert value == pytest.approx(np.quantile(entropies, float(q), method="inverted_cdf"), abs=6e-4)
    assert fine.numbers["student_open"] == pytest.approx((entropies > 1).mean(), abs=1e-6)
    near = look(healthy, "entropy", earlier=(EARLY_ROUND,))
    assert near.numbers["shrunk"] > 0.5
    sure = edit(healthy, "student_entropy", lambda i, x: [v / 10 for v in x])
    assert look(sure, "entropy", earlier=(EARLY_ROUND,)).level == "warning"
    assert look(sure, "entropy").level == "warning", "hardly an open token where the teacher has many"
    level = look(edit(healthy, "student_entropy", lambda i, x: [v + 1 for v in x]), "entropy", earlier=(EARLY_ROUND,))
    assert level.level == "ok", "less than in the first round, but more than the teacher's: that is distillation"


def test_outliers_are_measured_by_their_part_of_the_signal(healthy: pl.DataFrame) -> None:
    fine = look(healthy, "outliers")
    assert fine.level == "ok"
    sizes = np.sort(np.abs(advantages(healthy)))[::-1]
    top = math.ceil(0.01 * len(sizes))
    assert fine.numbers["share_of_top"]["0.01"] == pytest.approx(sizes[:top].sum() / sizes.sum(), rel=1e-5)
    for q, value in fine.numbers["quantiles"].items():
        assert value == pytest.approx(np.quantile(advantages(healthy), float(q)), rel=1e-4, abs=1e-6)
    spiked = edit(healthy, "teacher_logprob", lambda i, x: [-150.0, *x[1:]] if i < 20 else x)
    found = look(spiked, "outliers")
    assert found.level == "warning"
    assert found.numbers["top_in_first_tenth"]["0.001"] == 1.0
    assert found.numbers["share_of_top"]["0.01"] > 0.25
    assert max(found.numbers["mean_abs_by_tenth"]) == found.numbers["mean_abs_by_tenth"][0]
    assert (
        look(edit(healthy, "teacher_logprob", lambda i, x: healthy["student_logprob"][i]), "outliers").level
        == "unknown"
    )


def test_low_low_tokens_are_those_below_one_percent_under_both(healthy: pl.DataFrame) -> None:
    low = math.log(0.01)
    s, t = flat(healthy, "student_logprob"), flat(healthy, "teacher_logprob")
    both = (s <= low) & (t <= low)
    found = look(healthy, "low-low")
    assert found.numbers["tokens_share"] == pytest.approx(both.mean(), rel=1e-5)
    assert found.numbers["advantage_share"] == pytest.approx(np.abs(t - s)[both].sum() / np.abs(t - s).sum(), rel=1e-5)
    assert found.level == "ok"
    rare = edit(healthy, "student_logprob", lambda i, x: [-6.0 if j % 4 == 0 else v for j, v in enumerate(x)])
    rare = edit(rare, "teacher_logprob", lambda i, x: [-12.0 if j % 4 == 0 else v for j, v in enumerate(x)])
    assert look(rare, "low-low").level == "warning"
    one_sided = edit(rare, "student_logprob", lambda i, x: [-1.0 if v == -6 else v for v in x])
    assert look(one_sided, "low-low").level == "ok"


def test_decay_with_position_is_the_slope_of_the_tenths(healthy: pl.DataFrame) -> None:
    assert look(healthy, "teacher-decay").level == "ok"
    rising = edit(healthy, "teacher_entropy", lambda i, x: [0.5 + j / len(x) for j in range(len(x))])
    rising = edit(rising, "reverse_kl", lambda i, x: [0.1 + j / len(x) for j in range(len(x))])
    found = look(rising, "teacher-decay")
    assert found.level == "warning"
    tenths = np.concatenate([np.arange(n) * 10 // n for n in healthy["response_ids"].list.len()])
    means = [flat(rising, "teacher_entropy")[tenths == k].mean() for k in range(10)]
    assert found.numbers["by_tenth"]["teacher_entropy"] == pytest.approx(means, rel=1e-5)
    slope = np.polyfit((np.arange(10) + 0.5) / 10, means, 1)[0]
    assert found.numbers["slope"]["teacher_entropy"] == pytest.approx(slope, rel=1e-4)
    falling = edit(healthy, "teacher_entropy", lambda i, x: [1.5 - j / len(x) for j in range(len(x))])
    assert look(falling, "teacher-decay").level == "ok"
    alone = edit(rising, "reverse_kl", lambda i, x: [0.1] * len(x))
    assert look(alone, "teacher-decay").level == "note", "the teacher is unsure, but not further from the student"


def test_overlap_is_the_mean_share_of_common_candidates(healthy: pl.DataFrame) -> None:
    assert look(healthy, "topk-overlap").level == "unknown"
    assert "--add topk" in look(healthy, "topk-overlap").do
    lengths = healthy["response_ids"].list.len().to_list()

    def top(values: Callable[[int], list[int]]) -> pl.Series:
        lists = [[values(j) for j in range(n)] for n in lengths]
        return pl.Series(lists, dtype=pl.List(pl.List(pl.Int32)))

    mine = top(lambda j: [1, 2, 3, 4])
    alike = healthy.with_columns(student_topk_ids=mine, teacher_topk_ids=top(lambda j: [4, 3, 2, 9 if j % 2 else 1]))
    found = look(alike, "topk-overlap")
    odd = sum(n // 2 for n in lengths)
    assert found.numbers["mean"] == pytest.approx(1 - odd / 4 / sum(lengths), rel=1e-5)
    assert found.level == "ok"
    apart = healthy.with_columns(student_topk_ids=mine, teacher_topk_ids=top(lambda j: [4, 7, 8, 9]))
    assert look(apart, "topk-overlap").level == "warning"
    assert look(apart, "topk-overlap").numbers["mean"] == 0.25


def test_a_teacher_that_reads_nonsense_is_found(healthy: pl.DataFrame) -> None:
    assert look(healthy, "teacher-fit").level == "ok"
    lost = edit(healthy, "teacher_logprob", lambda i, x: [-9.0] * len(x))
    assert look(lost, "teacher-fit").level == "problem", "worse than guessing among 24"
    far = edit(healthy, "teacher_rank", lambda i, x: [5000 if j % 3 == 0 else v for j, v in enumerate(x)])
    assert look(far, "teacher-fit").level == "warning"


def test_signals_that_cannot_teach_are_found(healthy: pl.DataFrame) -> None:
    assert look(healthy, "degenerate").level == "ok"
    copied = edit(healthy, "teacher_logprob", lambda i, x: healthy["student_logprob"][i].to_list())
    found = look(copied, "degenerate")
    assert (found.level, found.numbers["zero_share"]) == ("problem", 1.0)
    partly = edit(healthy, "teacher_logprob", lambda i, x: healthy["student_logprob"][i].to_list() if i < 8 else x)
    assert look(partly, "degenerate").level == "warning"
    negative = edit(healthy, "teacher_logprob", lambda i, x: [s - 1 for s in healthy["student_logprob"][i]])
    assert look(negative, "degenerate").level == "problem", "a divergence used as a reward is never positive"
    sure = edit(healthy, "student_logprob", lambda i, x: [0.0 if j % 5 else v for j, v in enumerate(x)])
    sure = edit(sure, "teacher_logprob", lambda i, x: [0.0 if j % 5 else v for j, v in enumerate(x)])
    assert look(sure, "degenerate").level == "note", "certain tokens have no signal, and nothing is wrong with that"
    missing = look(healthy.with_columns(reward=pl.Series([None, 1.0] * 80, dtype=pl.Float32)), "degenerate")
    assert missing.numbers["missing"]["reward"] == 0.5


def test_drift_is_measured_where_the_distributions_are_the_same(healthy: pl.DataFrame) -> None:
    fine = look(healthy, "rollout-drift")
    assert (fine.level, fine.numbers["mean_abs"]) == ("ok", 0.0)
    entropies = healthy["student_entropy"].to_list()
    off = edit(healthy, "rollout_logprob", lambda i, x: [v + 0.2 * h for v, h in zip(x, entropies[i], strict=True)])
    found = look(off, "rollout-drift")
    assert found.level == "warning"
    assert found.numbers["slope_with_entropy"] == pytest.approx(0.2, rel=1e-3)
    assert found.numbers["mean_abs"] == pytest.approx(0.2 * flat(healthy, "student_entropy").mean(), rel=1e-3)
    assert found.numbers["max_abs"] == pytest.approx(0.2 * flat(healthy, "student_entropy").max(), rel=1e-3)
    small = edit(healthy, "student_entropy", lambda i, x: [h / 50 for h in x])
    tilted = edit(small, "rollout_logprob", lambda i, x: [v + 0.004 * h for v, h in zip(x, entropies[i], strict=True)])
    found = look(tilted, "rollout-drift")
    assert found.numbers["mean_abs"] < 0.01
    assert found.level == "note", "little, but it grows with entropy"
    far = edit(healthy, "rollout_logprob", lambda i, x: [x[0] - 3, *x[1:]] if i == 0 else x)
    assert look(far, "rollout-drift").level == "note"
    for changed in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 20}):
        unknown = look(off, "rollout-drift", sampling={**PLAIN, **changed})
        assert unknown.level == "unknown"
        assert f"{next(iter(changed))} {next(iter(changed.values()))}" in unknown.measured
    assert look(off, "rollout-drift", sampling=None).level == "unknown"


def roll(values: list[Any], by: int) -> list[Any]:
    return values[-by:] + values[:-by] if values else values


STUDENT = tuple(f"student_{c}" for c in ("logprob", "entropy", "max_logprob", "top1_id", "rank"))
TEACHER = tuple(f"teacher_{c}" for c in ("logprob", "entropy", "max_logprob", "top1_id", "rank"))


@pytest.mark.parametrize("by", [-1, 1])
@pytest.mark.parametrize(
    ("columns", "level", "named"),
    [
        (("rollout_logprob",), "problem", "rollout_logprob of the token"),
        (STUDENT, "problem", "the student's top-1 ids and ranks belong to the token"),
        (TEACHER, "problem", "the teacher's top-1 ids and ranks belong to the token"),
        (("teacher_logprob",), "warning", "teacher_logprob of the token"),
        (("student_logprob",), "problem", "rollout_logprob of the token"),
    ],
)
def test_a_column_shifted_by_one_token_is_found(
    healthy: pl.DataFrame, columns: tuple[str, ...], level: str, named: str, by: int
) -> None:
    shifted = healthy
    for column in columns:
        shifted = edit(shifted, column, lambda i, x: roll(x, by))
    found = look(shifted, "shift")
    assert found.level == level
    # A column moved to the right holds at each place what belongs to the token before.
    theirs = columns[0] in ("rollout_logprob", "teacher_logprob")
    side = "before" if (by > 0) != (theirs and len(columns) == 1) else "after"
    assert f"{named} {side}" in found.measured


def test_columns_in_their_place_are_not_called_shifted(healthy: pl.DataFrame) -> None:
    found = look(healthy, "shift")
    assert found.level == "ok"
    assert found.numbers["correlation_by_lag"]["rollout"]["0"] == pytest.approx(1.0)
    x, y = (
        np.concatenate([np.asarray(v[1:]) for v in healthy[c].to_list()])
        for c in ("student_logprob", "teacher_logprob")
    )
    assert found.numbers["correlation_by_lag"]["teacher"]["0"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-4)
    before = np.concatenate([np.asarray(v[:-1]) for v in healthy["teacher_logprob"].to_list()])
    assert found.numbers["correlation_by_lag"]["teacher"]["1"] == pytest.approx(np.corrcoef(x, before)[0, 1], abs=1e-4)
    cold = edit(healthy, "rollout_logprob", lambda i, x: [v / 0.6 + 0.1 for v in x])
    assert look(cold, "shift").level == "ok", "another temperature is no shift"
    few = edit(scored([2, 2, 2]), "rollout_logprob", lambda i, x: roll(x, 1))
    assert look(few, "shift").level != "problem", "three pairs of tokens prove nothing by correlation"
    constant = edit(healthy, "rollout_logprob", lambda i, x: [-3.0] * len(x))
    assert look(constant, "shift").numbers["correlation_by_lag"]["rollout"] == {"-1": None, "0": None, "1": None}


BROKEN: dict[str, tuple[str, Callable[[list[Any]], list[Any]]]] = {
    "student_logprob <= student_max_logprob <= 0": ("student_max_logprob", lambda x: [v - 20 for v in x]),
    "student_rank 1 has student_max_logprob": ("student_rank", lambda x: [1] * len(x)),
    "student_top1_id sampled has student_rank 1": ("student_rank", lambda x: [v + 1 for v in x]),
    "student_entropy >= -student_max_logprob": ("student_entropy", lambda x: [0.0] * len(x)),
    "student_entropy <= log(vocabulary)": ("student_entropy", lambda x: [*x[:-1], 3.3]),
    "student_max_logprob only at student_rank 1": ("student_logprob", lambda x: [0.0] * len(x)),
    "reverse_kl >= 0": ("reverse_kl", lambda x: [*x[:-1], -0.1]),
    "forward_kl >= 0": ("forward_kl", lambda x: [-v for v in x]),
    "teacher_rank_of_student_top1 is teacher_rank where student_top1_id was sampled": (
        "teacher_rank_of_student_top1", lambda x: [v + 1 for v in x],
    ),
}  # fmt: skip


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("relation", BROKEN)
def test_every_broken_relation_is_named(healthy: pl.DataFrame, relation: str, who: str) -> None:
    column, change = BROKEN[relation]
    if who == "teacher" and "student_" in relation and "teacher_" not in relation:
        relation, column = (t.replace("student", "teacher") for t in (relation, column))
    found = look(edit(healthy, column, lambda i, x: change(x)), "consistency")
    assert found.level == "problem"
    assert relation in found.numbers["broken"]
    assert relation in found.measured


def test_relations_hold_on_a_healthy_table_and_all_are_tried(healthy: pl.DataFrame) -> None:
    found = look(healthy, "consistency")
    assert (found.level, found.numbers["broken"]) == ("ok", {})
    tried = {r.replace("teacher", "student") for r in BROKEN}
    assert {r.replace("teacher", "student") for r in breaches()} <= tried
    off = edit(healthy, "student_max_logprob", lambda i, x: [v - 5e-4 for v in x])
    assert look(off, "consistency").numbers["broken"].keys() <= {"student_max_logprob only at student_rank 1"}


def test_what_the_manifests_record_is_told(healthy: pl.DataFrame) -> None:
    assert look(healthy, "sampling").level == "ok"
    cold = look(healthy, "sampling", sampling={**PLAIN, "temperature": 0.6, "top_p": 0.95})
    assert cold.level == "warning"
    assert "temperature 0.6, top_p 0.95" in cold.measured
    assert "rollout.temperature=1" in cold.do
    assert look(healthy, "tokenizers").level == "ok"
    record = {"shared": 20, "conflicts": 0, "only_student": 3, "only_teacher": 0, "roles": {"pad": [1, None]}}
    assert look(healthy, "tokenizers", tokenizers=record).level == "note"
    assert "3 only the student has" in look(healthy, "tokenizers", tokenizers=record).measured
    assert look(healthy, "tokenizers", tokenizers=None).level == "unknown"
    assert look(healthy, "scores").level == "ok"
    assert look(healthy, "scores", dtypes={"student": "bfloat16", "teacher": "float32"}).level == "note"
    faint = edit(healthy, "teacher_logprob", lambda i, x: [s + 1e-3 for s in healthy["student_logprob"][i]])
    assert look(faint, "scores", dtypes={"student": "bfloat16"}).level == "warning"
    assert look(healthy, "scores", entropy_kind="fake").level == "warning"
    assert look(healthy, "scores", entropy_kind="topk-lower-bound").level == "note"


def test_a_refused_first_token_points_to_the_template(healthy: pl.DataFrame) -> None:
    assert look(healthy, "first-tokens").level == "ok"
    refused = edit(healthy, "teacher_logprob", lambda i, x: [-12.0, *x[1:]])
    found = look(refused, "first-tokens")
    assert found.level == "warning"
    assert "score.teacher_prompt=own" in found.do
    own = healthy.with_columns(teacher_prompt_ids=pl.Series([[1], None] * 80, dtype=pl.List(pl.Int32)))
    assert look(own, "first-tokens", templates=("a", "b")).numbers["own_prompt_share"] == 0.5


def test_the_findings_do_not_depend_on_how_the_table_is_cut(healthy: pl.DataFrame) -> None:
    frame = pl.concat([healthy, scored([70, 0, 130, 1, 64] * 5, seed=5)])
    whole = diagnose(measure(frame), FACTS)
    in_parts = diagnose(
        merge([measure(frame[a:b]) for a, b in itertools.pairwise([0, 1, 50, 162, frame.height])]), FACTS
    )
    in_slices = diagnose(measure(frame, tokens_at_once=100), FACTS)
    for other in (in_parts, in_slices):
        assert [(f.name, f.level) for f in whole] == [(f.name, f.level) for f in other]
        for a, b in zip(whole, other, strict=True):
            assert json.dumps(a.numbers) == json.dumps(b.numbers), a.name
    assert measure(frame, tokens_at_once=100).windows.equals(measure(frame).windows)


def with_reward(frame: pl.DataFrame, value: float | None) -> pl.DataFrame:
    return frame.with_columns(reward=pl.lit(value, dtype=pl.Float32))


def all_equal() -> pl.DataFrame:
    frame = scored([6])
    return pl.concat([frame.with_columns(trajectory_id=pl.lit(f"t{i}")) for i in range(30)])


EDGES: dict[str, Callable[[], pl.DataFrame]] = {
    "no trajectory": lambda: scored([1]).clear(),
    "one token": lambda: scored([1]),
    "one trajectory": lambda: scored([200]),
    "one empty response": lambda: scored([0]),
    "empty responses": lambda: scored([0, 0, 0, 0, 0]),
    "some empty responses": lambda: scored([3, 0, 5, 0, 1, 0, 70]),
    "single tokens": lambda: scored([1] * 40),
    "rewards null": lambda: with_reward(scored(), None),
    "all right": lambda: with_reward(scored([9] * 8), 1.0),
    "all equal": all_equal,
    "no signal": lambda: scored([5] * 9).with_columns(
        pl.col(c).list.eval(pl.element() * 0) for c in (*STUDENT[:3], *TEACHER[:3], "rollout_logprob")
    ),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("facts", [Facts(), FACTS, Facts(earlier=(EARLY_ROUND, {**EARLY_ROUND, "round": 1}), round=2)])
def test_nothing_crashes_at_the_edges_and_everything_is_plain_json(edge: str, facts: Facts) -> None:
    found = diagnose(measure(EDGES[edge]()), facts)
    assert len({f.name for f in found}) == len(found) == 23
    for f in found:
        assert f.level in LEVELS
        assert f.measured
        assert f.why
        assert (f.do == "") == (f.level == "ok"), f.name
        assert json.loads(json.dumps(f.numbers, allow_nan=False)) == f.numbers, f.name
        assert "nan" not in f.measured.split()
        assert "None" not in f.measured


def test_numbers_are_rounded_and_what_is_no_number_is_null() -> None:
    given = {"a": 1 / 3, "b": [math.nan, 2, (math.inf, "x")], "c": {0.1: None, "d": True}, "e": 10**12}
    assert plain(given) == {"a": 0.333333, "b": [None, 2, [None, "x"]], "c": {"0.1": None, "d": True}, "e": 10**12}


def test_few_trajectories_give_no_warning_by_statistics() -> None:
    frame = edit(scored([5, 9, 13, 17]), "teacher_logprob", lambda i, x: [-float(len(x))] * len(x))
    frame = frame.with_columns(finish_reason=pl.lit("length"))
    assert look(frame, "length").level == "note"


def test_advice_names_rules_that_exist(healthy: pl.DataFrame) -> None:
    import inspect

    from fire_data.diagnose import checks, finding, premise, responses, signals

    text = "".join(inspect.getsource(m) for m in (checks, finding, premise, responses, signals))
    named = {w for call in re.findall(r"compare\(([^*)]*)", text) for w in re.findall(r"'([a-z-]+)'", call)}
    named |= {n for option in re.findall(r"--rule ([a-z+-]+)", text) for n in option.split("+")}
    named |= {*premise._CONTROLS, *signals._BOUND}
    assert len(named) > 15
    assert named <= RULES.keys()


Fire = Callable[..., Answer]
MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Run:
    """Two rounds of the real engines on the tiny world, with rewards; the second is weighed and not trained."""
    from fire_data.session import Session
    from fire_data.steps.refresh import refresh
    from fire_data.steps.rollout import rollout
    from fire_data.steps.score import score
    from fire_data.steps.weigh import weigh

    run = make_run(tmp_path_factory.mktemp("diagnosed") / "run", rollout={"verifier": "exact"}, eval={"prompts": None})
    session = Session(run)
    refresh(session, 1)
    rollout(session, 1)
    score(session, 1)
    weigh(run, 1)
    return run


def by_name(answer: Answer) -> dict[str, Any]:
    return {f["name"]: f for f in answer.json["findings"]}


def test_a_real_round_is_consistent_and_compared_with_the_one_before(real: Run, fire: Fire) -> None:
    answer = fire("diagnose", real.root, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["round"] == 1
    found = by_name(answer)
    for name in ("shift", "consistency", "rollout-drift", "sampling", "tokenizers", "scores", "first-tokens"):
        assert found[name]["level"] in ("ok", "note"), found[name]
    assert found["consistency"]["numbers"]["broken"] == {}
    assert found["rollout-drift"]["numbers"]["mean_abs"] < 1e-4
    assert [r["round"] for r in found["length"]["numbers"]["earlier"]] == [0]
    assert "(round 0) -> " in found["length"]["measured"]
    scores = real.scores(1).collect()
    entropy = flat(scores, "student_entropy")
    assert found["entropy"]["numbers"]["student_mean"] == pytest.approx(entropy.mean(), rel=1e-5)
    before = flat(real.scores(0).collect(), "student_entropy").mean()
    assert found["entropy"]["numbers"]["earlier"][0]["student_entropy"] == pytest.approx(before, rel=1e-5)
    assert found["outliers"]["numbers"]["quantiles"]["0.5"] == pytest.approx(np.median(advantages(scores)), rel=1e-4)
    dropped = (~real.weights(round=1).collect()["keep"]).sum()
    assert found["filter"]["numbers"]["n_dropped"] == dropped
    assert "the weights 'fire'" in found["filter"]["measured"]
    assert sum(answer.json["levels"].values()) == len(found)
    assert answer.json["levels"] == {k: Counter(f["level"] for f in found.values())[k] for k in LEVELS}


def test_the_table_for_people_has_the_worst_first_and_says_what_to_do(real: Run, fire: Fire) -> None:
    answer = fire("diagnose", real.root, "--round", 0)
    assert answer.code == 0
    table, *advice = answer.out.split("\n\n")
    lines = [line.split() for line in table.splitlines()]
    order = [LEVELS.index(w[0]) for w in lines if w and w[0] in LEVELS]
    assert len(order) == 23
    assert order == sorted(order)
    assert len(advice) == sum(level != LEVELS.index("ok") for level in order)
    for block in advice:
        assert re.fullmatch(r"[a-z-]+ \(\w+\)\n  why  .+\n  do   .+", block.strip())
    assert answer.err.strip().splitlines()[-1].startswith("next: fire ")
    assert "(round 0) ->" not in answer.out


def test_rollouts_at_another_temperature_are_told_and_drift_is_unknown(
    tmp_path: Path, make_run: MakeRun, fire: Fire
) -> None:
    root = make_run(tmp_path / "cold", rollout={"temperature": 0.7, "verifier": "exact"}).root
    assert fire("rollout", root).code == fire("score", root).code == 0
    found = by_name(fire("diagnose", root, "--json"))
    assert found["sampling"]["level"] == "warning"
    assert found["rollout-drift"]["level"] == "unknown"
    assert found["shift"]["level"] in ("ok", "warning")
    assert found["consistency"]["level"] == "ok"
    assert found["filter"]["numbers"]["source"] == "fire at 20 %"


def test_every_command_in_the_advice_is_one(real: Run, fire: Fire) -> None:
    from fire_data.cli.app import COMMANDS

    found = by_name(fire("diagnose", real.root, "--json"))
    edges = [f for e in EDGES.values() for f in diagnose(measure(e()), Facts(run=str(real.root)))]
    advice = [f["do"] for f in found.values()] + [f.do for f in edges]
    commands = [c for text in advice for c in re.findall(r"fire ([a-z]+) (\S+)", text)]
    assert len(commands) > 20
    for verb, run in commands:
        assert verb in COMMANDS
        assert run.rstrip(";,") == shlex.quote(str(real.root)) or verb == "rules"


def test_the_fake_engines_scores_are_called_meaningless(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    root = make_fake_run(tmp_path / "run").root
    answer = fire("diagnose", root)
    assert answer.code == 4
    assert answer.fix == f"fire rollout {root} --round 0"
    assert fire("rollout", root).code == 0
    answer = fire("diagnose", root)
    assert answer.code == 4
    assert answer.fix == f"fire score {root} --round 0"
    assert fire("score", root).code == 0
    answer = fire("diagnose", root, "--json")
    assert answer.code == 0, "a report, whatever it says"
    found = by_name(answer)
    assert found["scores"]["level"] == "warning"
    assert "fake" in found["scores"]["measured"]
    assert found["premise"]["level"] == "unknown"
    assert found["consistency"]["level"] == "problem"
    answer = fire("diagnose", root, "--name", "uniform")
    assert answer.code == 4
    assert answer.fix == f"fire weigh {root} --round 0 --rule uniform"
    assert fire("weigh", root, "--rule", "uniform").code == 0
    named = by_name(fire("diagnose", root, "--name", "uniform", "--json"))
    assert named["inert-filter"]["measured"] == "'uniform' has no filter by a quantile"
    assert fire("diagnose", root, "--round", 3).code == 4


def test_top_k_columns_are_read_where_they_were_added(tmp_path: Path, real: Run, fire: Fire) -> None:
    root = tmp_path / "run"
    shutil.copytree(real.root, root)
    answer = fire("score", root, "--round", 1, "--add", "topk")
    assert answer.code == 0, answer.err
    found = by_name(fire("diagnose", root, "--json"))["topk-overlap"]
    assert found["level"] != "unknown"
    rows = open_run(root).scores(1, add="topk").select("student_topk_ids", "teacher_topk_ids").collect().rows()
    shares = [len({*s} & {*t}) / len(s) for mine, theirs in rows for s, t in zip(mine, theirs, strict=True)]
    assert found["numbers"]["mean"] == pytest.approx(np.mean(shares), rel=1e-5)


def test_tables_about_other_trajectories_are_not_joined(real: Run) -> None:
    part = real.part("weights", 0)
    receipt = sealed(part).shards[0]
    rows = real.scores(0).select("trajectory_id").head(receipt.rows).collect()
    assert _joined(rows, part, receipt, ("keep",)).columns == ["trajectory_id", "keep"]
    with pytest.raises(DataError, match="different trajectories") as error:
        _joined(rows.reverse(), part, receipt, ("keep",))
    assert error.value.fix == f"{part.command} --redo"


def test_damaged_scores_are_not_diagnosed(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    run = make_fake_run(tmp_path / "run")
    assert fire("rollout", run.root).code == fire("score", run.root).code == 0
    shard = shard_files(run.part("scores", 0))[1]
    group = pq.read_metadata(shard).row_group(0)
    columns = (group.column(i) for i in range(group.num_columns))
    flip(shard, next(c.data_page_offset for c in columns if c.path_in_schema.startswith("teacher_entropy.")) + 50)
    answer = fire("diagnose", run.root)
    assert answer.code == 3
    assert answer.fix == f"fire score {run.root} --round 0"


def test_the_diagnosis_loads_no_model(real: Run) -> None:
    script = (
        f"import sys; sys.argv = {['fire', 'diagnose', str(real.root), '--json']!r}\n"
        "from fire_data.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "print('LOADED', sorted({'torch', 'transformers', 'scipy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.rpartition("LOADED ")[2].strip() == "[]"
