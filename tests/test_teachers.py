"""Several teachers combined when weighing: every value by hand, no bound passed off as exact, routed runs untouched."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import fire_data as fd
from fire_data import weighing
from fire_data.compare import COLUMNS
from fire_data.prepare import Pieces, Weighing, check_values, looked_at, prepare, require_columns
from fire_data.rules import RULES, describe_rule, make_rule
from fire_data.rules.base import ROW
from fire_data.run import Run, open_run
from fire_data.schemas.errors import ConfigError, DataError, IncompleteError
from fire_data.schemas.manifest import Manifest
from fire_data.shards import sealed
from fire_data.stages import Silent
from fire_data.steps.weigh import ScoredRound, configured, weigh
from fire_data.teachers import OWN_ONLY, Bound, Teachers, combined_bounds, in_columns, stored_bounds

from .conftest import Answer, edit_record, flip
from .ragged import VOCABULARY, ragged

Fire = Callable[..., Answer]
Lists = list[np.ndarray]

TWO, THREE = ("math", "code"), ("math", "code", "law")
HOW = ("average", "confident", "token", "code")
BOTH = ("teacher_logprob", "teacher_entropy")
UNROUTED = sorted(n for n in RULES if n != "expression" and not {*make_rule(n).columns} & OWN_ONLY)


def several(rows: int = 24, names: Sequence[str] = TWO, seed: int = 3, **options: Any) -> pl.DataFrame:
    """A scored table with the columns of several teachers; the plain ones hold those of the row's own, in turns."""
    frame = ragged(rows, seed, topk=4, **options)
    rng = np.random.default_rng(seed)
    mixed = [names[i // 2 % len(names)] for i in range(rows)]
    columns: dict[str, list[list[float]]] = {f"{c}.{n}": [] for n in names for c in BOTH}
    for size in frame["response_ids"].list.len():
        for n in names:
            columns[f"teacher_logprob.{n}"].append(rng.uniform(-6, 0, size).tolist())
            columns[f"teacher_entropy.{n}"].append(rng.uniform(0, 3, size).tolist())
    frame = frame.with_columns(pl.Series(n, v, dtype=pl.List(pl.Float32)) for n, v in columns.items())
    own = {c: [frame[f"{c}.{n}"][i] for i, n in enumerate(mixed)] for c in BOTH}
    return frame.with_columns(
        pl.Series("teacher", mixed), *(pl.Series(c, v, dtype=pl.List(pl.Float32)) for c, v in own.items())
    )


def by_hand(frame: pl.DataFrame, how: str, names: Sequence[str]) -> tuple[Lists, Lists]:
    """`teacher_logprob` and `teacher_entropy` of a combination, trajectory by trajectory in plain numpy."""
    logprobs, entropies = [], []
    for row in frame.iter_rows(named=True):
        p, h = (np.array([row[f"{c}.{n}"] for n in names], dtype=np.float64) for c in BOTH)
        if how == "average":
            logprobs.append(np.log(np.exp(p).sum(axis=0) / len(names)))
            entropies.append(h.sum(axis=0) / len(names))
            continue
        if how == "token":
            chosen = np.array([min(range(len(names)), key=lambda i, t=t: h[i, t]) for t in range(h.shape[1])], int)
        else:
            least = min(range(len(names)), key=lambda i: h[i].mean()) if h.shape[1] else 0
            chosen = np.full(h.shape[1], least if how == "confident" else names.index(how))
        logprobs.append(p[chosen, np.arange(h.shape[1])])
        entropies.append(h[chosen, np.arange(h.shape[1])])
    return logprobs, entropies


def replaced(frame: pl.DataFrame, how: str, names: Sequence[str]) -> pl.DataFrame:
    """The table as if it had been scored with the combination alone."""
    made = dict(zip(BOTH, by_hand(frame, how, names), strict=True))
    gone = [c for c in frame.columns if "." in c or c in OWN_ONLY]
    return frame.drop(gone).with_columns(
        pl.Series(c, [x.tolist() for x in v], dtype=pl.List(pl.Float64)) for c, v in made.items()
    )


def flat(column: pl.Series) -> np.ndarray:
    return np.array([x for row in column.to_list() for x in row], dtype=np.float64)


def weighs(rule: str, how: str, names: Sequence[str] = TWO, entropy: str = "any", **more: Any) -> Weighing:
    teachers = Teachers(how, (how,) if how in names else tuple(names))
    return Weighing(make_rule(rule), teachers=teachers, entropy=entropy, **more)


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("names", [TWO, THREE])
def test_combined_columns_and_their_sums_are_those_computed_by_hand(how: str, names: tuple[str, ...]) -> None:
    frame = several(names=names, lengths=[5, 0, 1, 9, 0, 2] * 4)
    stale = {c: pl.lit(1e9) for c in ("teacher_logprob_sum", "teacher_entropy_max", "entropy_product_sum")}
    made = prepare(frame.with_columns(**stale).lazy(), weighs("uniform", how, names)).collect()
    logprobs, entropies = by_hand(frame, how, names)
    for mine, expected in ((made[c], x) for c, x in zip(BOTH, (logprobs, entropies), strict=True)):
        assert mine.list.len().to_list() == [len(x) for x in expected]
        np.testing.assert_allclose(flat(mine), np.concatenate(expected), rtol=1e-12, atol=1e-12)
    student = [np.array(x) for x in frame["student_entropy"].to_list()]
    sums = {
        "teacher_logprob_sum": [x.sum() for x in logprobs],
        "teacher_entropy_sum": [x.sum() for x in entropies],
        "entropy_product_sum": [(x * y).sum() for x, y in zip(entropies, student, strict=True)],
    }
    for name, expected in sums.items():
        np.testing.assert_allclose(made[name].to_numpy(), expected, rtol=1e-12, atol=1e-12)
    for name, lists in (("teacher_logprob_max", logprobs), ("teacher_entropy_max", entropies)):
        assert made[name].is_null().to_list() == [len(x) == 0 for x in lists]
        largest = [x.max() for x in lists if len(x)]
        np.testing.assert_allclose(made[name].drop_nulls().to_numpy(), largest, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("rule", "params"),
    [
        ("fire", {"batch_size": 8}),
        ("fire-paper", {"batch_size": 8}),
        ("fire", {"scope": "group"}),
        ("fire", {"batch_size": 6, "by": "teacher"}),
        ("fire", {"scope": "round", "batch_size": 8}),
        ("fire+length-guard", {"batch_size": 8, "rollout_is_cap": 5.0}),
        ("pw-opsd+verified-only", {"pw-opsd.normalise": "trajectory"}),
        ("random", {"match": "fire", "batch_size": 12}),
        ("uniform", {"truncated": "drop", "end_token": "mask"}),
        ("weight = 1 + teacher_entropy * student_entropy; keep = teacher_logprob_sum / length > -3", {}),
    ],
)
def test_a_rule_decides_as_if_the_combination_was_scored_alone(rule: str, params: dict[str, Any], how: str) -> None:
    frame = several(names=THREE)
    mine = fd.weigh(frame, rule, teacher=how, entropy="any", **params).collect()
    expected = fd.weigh(replaced(frame, how, THREE), rule, **params).collect()
    assert mine["keep"].to_list() == expected["keep"].to_list()
    assert mine["drop_reason"].to_list() == expected["drop_reason"].to_list()
    for column in ("weight", "advantage", "coefficient"):
        np.testing.assert_allclose(flat(mine[column]), flat(expected[column]), rtol=2e-6, atol=1e-9)
    routed = fd.weigh(frame, rule, **params).collect()
    assert not np.array_equal(flat(mine["coefficient"]), flat(routed["coefficient"]))
    assert mine.select(frame.columns).equals(frame)


@pytest.mark.parametrize("rule", UNROUTED)
def test_one_teacher_by_name_gives_the_bytes_of_a_table_scored_with_it_alone(rule: str) -> None:
    frame = several(names=THREE, seed=5)
    alone = frame.with_columns(pl.col(f"{c}.law").alias(c) for c in BOTH).drop([c for c in frame.columns if "." in c])
    mine = fd.weigh(frame, rule, batch_size=8, teacher="law").collect()
    expected = fd.weigh(alone.drop(OWN_ONLY & {*alone.columns}), rule, batch_size=8).collect()
    columns = [c for c in expected.columns if c not in frame.columns]
    assert mine.select(columns).equals(expected.select(columns))


def test_rows_that_all_go_to_one_teacher_weigh_the_same_routed_or_by_its_name() -> None:
    frame = several(names=TWO).with_columns(pl.col(f"{c}.math").alias(c) for c in BOTH)
    routed, named = (fd.weigh(frame, "fire", batch_size=8, teacher=how).collect() for how in ("routed", "math"))
    assert routed.equals(named)


@pytest.mark.parametrize("name", ["fire", "random", "tip", "eopd", "uniform"])
def test_routed_reads_nothing_of_other_teachers(name: str) -> None:
    frame = several()
    bare = frame.drop([c for c in frame.columns if "." in c])
    broken = frame.with_columns(pl.lit(None, dtype=pl.List(pl.Float32)).alias("teacher_logprob.code"))
    expected = fd.weigh(bare, name, batch_size=8).collect()
    for mine in (fd.weigh(broken, name, batch_size=8), fd.weigh(broken, name, batch_size=8, teacher="routed")):
        assert mine.collect().select(expected.columns).equals(expected)


def test_the_average_is_the_logprob_of_the_mixture_and_its_entropy_a_lower_bound() -> None:
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.full(VOCABULARY, 0.3), (3, 50))
    ids = rng.integers(0, VOCABULARY, 50)
    mixture = p.mean(axis=0)
    made_of = {
        "teacher_logprob": np.log(p[:, np.arange(50), ids]),
        "teacher_entropy": (-p * np.log(p)).sum(axis=2),
    }
    columns = (pl.Series(f"{c}.{n}", [v[i].tolist()]) for c, v in made_of.items() for i, n in enumerate(THREE))
    frame = several(1, THREE, lengths=[50], n=1).with_columns(columns)
    made = prepare(frame.lazy(), weighs("uniform", "average", THREE)).collect()
    np.testing.assert_allclose(flat(made["teacher_logprob"]), np.log(mixture[np.arange(50), ids]), rtol=1e-10)
    assert (flat(made["teacher_entropy"]) <= -(mixture * np.log(mixture)).sum(axis=1)).all()


def test_tokens_too_unlikely_for_a_double_are_averaged() -> None:
    far = several(1, TWO, lengths=[2], n=1).with_columns(
        pl.Series("teacher_logprob.math", [[-800.0, -900.0]]), pl.Series("teacher_logprob.code", [[-1000.0, -900.0]])
    )
    made = prepare(far.lazy(), weighs("uniform", "average")).collect()
    np.testing.assert_allclose(flat(made["teacher_logprob"]), [-800 - math.log(2), -900.0], rtol=1e-14)


@pytest.mark.parametrize("how", ["confident", "token"])
@pytest.mark.parametrize("names", [TWO, TWO[::-1], ("law", "code", "math")])
def test_of_equally_sure_teachers_the_first_is_taken(how: str, names: tuple[str, ...]) -> None:
    frame = several(names=THREE).with_columns(
        pl.col("teacher_entropy.math").alias(f"teacher_entropy.{n}") for n in THREE
    )
    made = prepare(frame.lazy(), weighs("uniform", how, names)).collect()
    assert flat(made["teacher_logprob"]).tolist() == flat(frame[f"teacher_logprob.{names[0]}"]).tolist()


def test_the_surest_of_a_trajectory_need_not_be_that_of_a_token() -> None:
    columns = {"math": ([0.1, 2.0], [-1.0, -2.0]), "code": ([0.5, 0.5], [-3.0, -4.0])}
    frame = several(1, TWO, lengths=[2], n=1).with_columns(
        pl.Series(f"{c}.{n}", [columns[n][1 - i]]) for n in TWO for i, c in enumerate(BOTH)
    )
    made = {how: prepare(frame.lazy(), weighs("uniform", how)).collect() for how in ("confident", "token")}
    assert flat(made["confident"]["teacher_logprob"]).tolist() == [-3.0, -4.0]
    assert flat(made["token"]["teacher_logprob"]).tolist() == [-1.0, -4.0]
    assert flat(made["token"]["teacher_entropy"]).tolist() == [0.1, 0.5]


@pytest.mark.parametrize("how", HOW)
def test_shards_change_no_bit_of_a_combination(how: str) -> None:
    frame = several(30, THREE, lengths=[7, 0, 3, 1, 12, 5] * 5)
    for rule in ("fire", "random", "fire-paper+length-guard"):
        around = weighs(rule, how, THREE, batch_size=8, samples_per_group=2)
        prepared = prepare(frame.lazy(), around)
        found = []
        for table in (Pieces(prepared), Pieces(prepared, 6), Pieces(prepared, 2)):
            fitted = weighing.fit(table, around)
            found.append(pl.concat([weighing.apply(table, i, around, fitted) for i in range(len(table))]))
        assert found[1].equals(found[0])
        assert found[2].equals(found[0])


_EVERY_COMBINATION = """
import hashlib, json
import fire_data as fd
from tests.test_teachers import HOW, THREE, several

frame = several(300, THREE, longest=30)
for how in HOW:
    for rule in ("fire", "random", "uniform"):
        made = fd.weigh(frame, rule, batch_size=60, teacher=how, entropy="any").collect().drop(frame.columns)
        print(how, rule, hashlib.sha256(json.dumps(made.to_dict(as_series=False)).encode()).hexdigest())
"""


def test_one_thread_and_two_give_the_same_bytes() -> None:
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _EVERY_COMBINATION],
            env={**os.environ, "POLARS_MAX_THREADS": threads},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        for threads in ("1", "2")
    ]
    one, two = (run.communicate()[0].splitlines() for run in runs)
    assert all(run.returncode == 0 for run in runs)
    assert len({line.split()[2] for line in one}) == len(one) == 12
    assert one == two


# --- columns -------------------------------------------------------------------------------------------------------


def test_what_is_stored_of_the_rows_own_teacher_alone_is_known() -> None:
    assert {"reverse_kl", "forward_kl", "teacher_rank", "teacher_top1_id", "teacher_max_logprob"} <= OWN_ONLY
    assert {
        "teacher_topk_ids",
        "student_logprob_on_teacher_topk",
        "teacher_pass_rate",
        "teacher_prompt_ids",
    } <= OWN_ONLY
    assert not OWN_ONLY & {*BOTH, "teacher", "student_logprob", "student_topk_ids", "base_logprob", "student_rank"}
    assert len(UNROUTED) > 20


@pytest.mark.parametrize(
    ("rule", "leaf", "column"),
    [
        ("tip", "tip", "reverse_kl"),
        ("fire+tip", "tip", "reverse_kl"),
        ("eopd", "eopd", "teacher_topk_ids"),
        ("weight = 1 + forward_kl", "expression", "forward_kl"),
        ("keep = reverse_kl_sum / length < 1", "expression", "reverse_kl"),
        ("keep = teacher_pass_rate > 0.5", "expression", "teacher_pass_rate"),
    ],
)
@pytest.mark.parametrize("how", HOW)
def test_a_rule_that_needs_the_rows_own_teacher_is_refused_by_name(how: str, rule: str, leaf: str, column: str) -> None:
    frame = several()
    fd.weigh(frame, rule).collect()
    with pytest.raises(ConfigError) as caught:
        fd.weigh(frame, rule, teacher=how, entropy="any")
    assert caught.value.what.startswith(f"the rule {leaf} reads {column!r}, which is stored of each row's own teacher")
    assert caught.value.what.endswith(f"weigh.teacher is {how}")
    assert caught.value.fix == "--set weigh.teacher=routed"


def test_a_rule_matched_to_one_that_needs_the_rows_own_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match="the rule tip reads 'reverse_kl'") as caught:
        Weighing(make_rule("random", {"match": "tip"}), teachers=Teachers("math", ("math",)))
    assert caught.value.where == "rule random"


def test_an_unknown_teacher_and_one_without_columns_are_told() -> None:
    frame = several()
    with pytest.raises(ConfigError, match="routed, average, confident, token, math, code, not 'maths'") as caught:
        fd.weigh(frame, "uniform", teacher="maths")
    assert caught.value.fix == "--set weigh.teacher=math"
    with pytest.raises(IncompleteError, match="needs the columns of several teachers"):
        fd.weigh(ragged(4), "uniform", teacher="average")
    with pytest.raises(IncompleteError, match=r"'teacher_entropy\.code', which is not stored yet") as missing:
        fd.weigh(frame.drop("teacher_entropy.code"), "uniform", teacher="token")
    assert str(missing.value.fix) == "fire score RUN --add teacher.code"
    mine = fd.weigh(frame.drop("teacher_entropy.code"), "uniform", teacher="average").collect()
    expected = fd.weigh(frame, "uniform", teacher="average").collect()
    assert mine["coefficient"].equals(expected["coefficient"])


def test_missing_teachers_are_named_together_and_never_replaced_by_the_routed_one() -> None:
    frame = several(names=THREE).drop([f"{c}.{n}" for n in ("code", "law") for c in BOTH])
    around = weighs("uniform", "average", THREE)
    prepared = prepare(frame.lazy(), around)
    assert "teacher_logprob" not in prepared.collect_schema()
    with pytest.raises(IncompleteError) as caught:
        require_columns(prepared, around, "runs/x --round 2")
    assert caught.value.fix == "fire score runs/x --round 2 --add teacher.code --add teacher.law"


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("teacher_logprob.code", [[float("nan")] * 4], "'teacher_logprob.code' holds a value that is not finite"),
        ("teacher_entropy.code", [[0.5] * 3], "'teacher_entropy.code' has 3 elements where others have 4"),
        ("teacher_entropy.math", [None], "'teacher_entropy.math' holds a value that is not finite"),
    ],
)
def test_bad_values_of_a_teacher_are_told_with_its_column(column: str, value: list[Any], words: str) -> None:
    frame = several(1, TWO, lengths=[4], n=1).with_columns(pl.Series(column, value, dtype=pl.List(pl.Float32)))
    for how in ("average", "token", "confident"):
        with pytest.raises(DataError, match=words) as caught:
            fd.weigh(frame, "fire", teacher=how, entropy="any")
        assert caught.value.fix == f"fire score RUN --add teacher.{column.partition('.')[2]} --redo"
        around = weighs("fire", how)
        with pytest.raises(DataError, match=words):
            check_values(prepare(frame.lazy(), around).select(ROW, "length", *looked_at(around)).collect(), around)


def test_teachers_are_those_of_the_columns_in_their_order() -> None:
    columns = ["teacher_entropy.b", "teacher_logprob.b", "teacher", "teacher_logprob.a", "teacher_logprob"]
    assert in_columns(columns, "token") == Teachers("token", ("b", "a"))
    assert in_columns(columns, "a") == Teachers("a", ("a",))
    assert in_columns(columns).routed


# --- entropies that are not exact ----------------------------------------------------------------------------------


READING = [
    ("fire", {}, "fire"),
    ("random", {}, "fire"),
    ("length-guard+fire-weights", {}, "fire"),
    ("weight = 1 + teacher_entropy", {}, "expression"),
    ("keep = teacher_entropy_max < 2", {}, "expression"),
    ("keep = teacher_entropy_sum / length < 2", {}, "expression"),
    ("keep = entropy_product_sum > 0", {}, "expression"),
]


@pytest.mark.parametrize(("rule", "params", "leaf"), READING)
def test_the_mean_of_entropies_is_not_passed_off_as_that_of_the_average(
    rule: str, params: dict[str, Any], leaf: str
) -> None:
    frame = several()
    with pytest.raises(ConfigError) as caught:
        fd.weigh(frame, rule, teacher="average", **params)
    bound = "only a lower bound (mean-of-teachers: the mean of those of math, code)"
    assert caught.value.what == f"the rule {leaf} reads teacher_entropy, which is {bound}"
    assert str(caught.value.fix).startswith("--set weigh.entropy=any")
    for how in ("token", "confident", "math", "routed"):
        fd.weigh(frame, rule, teacher=how, **params)
    fd.weigh(frame, rule, teacher="average", entropy="any", **params)


def test_rules_that_read_no_entropy_run_on_the_average_without_question() -> None:
    frame, ran = several(), 0
    for name in UNROUTED:
        if describe_rule(name)["entropies"] in ([], ["student_entropy"]):
            fd.weigh(frame, name, teacher="average")
            ran += 1
    assert ran > 10


def test_the_average_of_one_teacher_is_that_teacher_and_exact() -> None:
    frame = several().drop([f"{c}.code" for c in BOTH])
    one, other = (fd.weigh(frame, "fire", teacher=how).collect() for how in ("average", "math"))
    assert one.equals(other)
    for how in ("confident", "token"):
        assert fd.weigh(frame, "fire", teacher=how).collect().equals(one)


def test_entropies_of_a_frame_that_come_with_a_mass_are_bounds() -> None:
    frame = several(lengths=[3] * 24)
    mass = pl.Series([[0.5, 0.75, 1.0]] * 24, dtype=pl.List(pl.Float32))
    for column, reader in (("student_entropy_mass", "student_entropy"), ("teacher_entropy_mass", "teacher_entropy")):
        marked = frame.with_columns(mass.alias(column))
        with pytest.raises(ConfigError, match=f"the rule fire reads {reader}, which .* hold 0.75 of the probability"):
            fd.weigh(marked, "fire")
        fd.weigh(marked, "fire", entropy="any")
        fd.weigh(marked, "uniform")
        fd.weigh(frame.with_columns(pl.lit(None, mass.dtype).alias(column)), "fire")
    marked = frame.with_columns(mass.alias("teacher_entropy_mass.code"))
    fd.weigh(marked, "fire")
    fd.weigh(marked, "fire", teacher="math")
    with pytest.raises(ConfigError, match=r"topk-lower-bound of code, from tokens that hold 0\.75"):
        fd.weigh(marked, "fire", teacher="code")
    for how in ("token", "confident"):
        with pytest.raises(ConfigError, match=f"weigh.teacher {how} chooses by teacher_entropy, .* of code"):
            fd.weigh(marked, "uniform", teacher=how)
    asked = """weight = 1 + "teacher_entropy.code" """
    with pytest.raises(ConfigError, match=r"the rule expression reads teacher_entropy\.code, which is only"):
        fd.weigh(marked, asked)
    fd.weigh(frame, asked, teacher="math")
    with pytest.raises(ConfigError, match="'exac'"):
        fd.weigh(frame, "fire", entropy="exac")


def test_a_combination_with_one_bound_in_it_is_a_bound() -> None:
    bound = {"teacher_entropy.code": Bound("topk-lower-bound", ("code",), 0.9), "student_entropy": Bound("x")}
    made = {how: combined_bounds(bound, Teachers(how, TWO)) for how in ("average", "token", "confident")}
    assert made["average"]["teacher_entropy"] == Bound("mean-of-teachers", TWO, 0.9)
    assert made["token"]["teacher_entropy"] == made["confident"]["teacher_entropy"] == bound["teacher_entropy.code"]
    assert all(b["student_entropy"] == Bound("x") for b in made.values())
    assert "teacher_entropy" not in combined_bounds(bound, Teachers("math", ("math",)))
    assert combined_bounds(bound, Teachers("code", ("code",)))["teacher_entropy"].of == ("code",)


def manifest(kinds: Any, **stats: float) -> Manifest:
    recorded = {} if kinds is None else {"entropy_kind": kinds}
    return Manifest(stage="scores", round=0, fingerprint="", fields={}, plan=(), stats=stats, recorded=recorded)


def test_what_manifests_say_of_entropies() -> None:
    exact = {"student": "exact", "math": "exact", "code": "fake"}
    assert stored_bounds(manifest(exact), {"math": manifest(None), "code": manifest("exact")}) == {}
    for older in (None, "exact", "fake"):
        assert stored_bounds(manifest(older), {}) == {}
    mixed = {**exact, "code": "topk-lower-bound"}
    code = Bound("topk-lower-bound", ("code",), 0.97)
    assert stored_bounds(manifest(mixed, teacher_entropy_mass=0.97), {}) == {"teacher_entropy": code}
    added = stored_bounds(manifest(mixed), {"math": manifest(None), "code": manifest(None, teacher_entropy_mass=0.8)})
    assert added["teacher_entropy.code"] == Bound("topk-lower-bound", ("code",), 0.8)
    assert "teacher_entropy.math" not in added
    students = stored_bounds(manifest({**exact, "student": "topk-lower-bound"}, student_entropy_mass=0.9), {})
    assert students == {"student_entropy": Bound("topk-lower-bound", (), 0.9)}


def test_what_a_manifest_lacks_a_mass_tells() -> None:
    exact = {"student": "exact", "math": "exact"}
    assert stored_bounds(manifest(exact, teacher_entropy_mass=0.9), {})["teacher_entropy"].kind == "topk-lower-bound"
    assert stored_bounds(manifest(None, student_entropy_mass=0.9), {}).keys() == {"student_entropy"}
    found = stored_bounds(manifest(exact), {"law": manifest(None)}, {"teacher_entropy_mass.law"})
    assert found == {"teacher_entropy.law": Bound("topk-lower-bound", ("law",))}
    for kinds in (exact, {"student": "fake", "math": "fake"}):
        found = stored_bounds(manifest(kinds), {"math": manifest({"math": "topk-lower-bound"})})
        assert found.keys() == {"teacher_entropy.math"}


def test_a_rule_says_whether_it_needs_exact_entropies(fire: Fire) -> None:
    assert describe_rule("fire")["entropies"] == ["teacher_entropy", "student_entropy"]
    assert describe_rule("random")["entropies"] == describe_rule("length-guard+fire")["entropies"]
    assert describe_rule("uniform")["entropies"] == describe_rule("length-guard")["entropies"] == []
    assert "entropies     teacher_entropy, student_entropy: exact ones" in fire("rules", "fire").out
    assert "entropies " not in fire("rules", "uniform").out


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(make_run: Callable[..., Run], tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the fake engine with two teachers, prompts for each in turns, and the columns of both."""
    return scored_run(make_run, tiny_world, tmp_path_factory.mktemp("teachers"), "fake").root


def scored_run(make_run: Callable[..., Run], tiny_world: Any, folder: Path, engine: str) -> Run:
    from fire_data.session import Session
    from fire_data.steps.rollout import rollout
    from fire_data.steps.score import score

    rows = [json.loads(line) for line in Path(tiny_world.prompts).read_text().splitlines()]
    lines = [json.dumps(row | {"teacher": TWO[i % 2]}) for i, row in enumerate(rows)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    teachers = {"math": {"model": str(tiny_world.teacher)}, "code": {"model": str(tiny_world.student)}}
    run = make_run(
        folder / "run",
        teacher=None,
        teachers=teachers,
        prompts={"path": str(folder / "prompts.jsonl")},
        rollout={"engine": engine},
        score={"engine": engine},
    )
    session = Session(run, Silent())
    rollout(session, 0)
    score(session, 0, add=["topk", "teacher.code", "teacher.math"])
    return run


@pytest.fixture
def run(scored: Path, tmp_path: Path) -> Run:
    shutil.copytree(scored, tmp_path / "run")
    return open_run(tmp_path / "run")


def opened(run: Run, **fields: str) -> Run:
    return open_run(run.root, tuple(f"weigh.{k}={v}" for k, v in fields.items()))


def edit(run: Run, place: str, **changes: Any) -> None:
    """Change a sealed manifest."""
    path = run.root / ".fire" / "manifests" / place / "round-000.json"
    values = json.loads(path.read_text())
    edit_record(path, **{k: values[k] | v for k, v in changes.items()})


class Heard(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rule", ["fire", "uniform"])
def test_weights_of_a_run_are_those_of_its_table_in_memory(run: Run, how: str, rule: str) -> None:
    chosen = opened(run, teacher=how, rule=rule, entropy="any")
    made = weigh(chosen, 0)
    frame = run.scores(0, add=["teacher.math", "teacher.code"]).collect()
    expected = fd.weigh(replaced(frame, how, TWO), rule, batch_size=4).collect()
    mine = chosen.weights(round=0).collect()
    assert mine["keep"].to_list() == expected["keep"].to_list()
    np.testing.assert_allclose(flat(mine["coefficient"]), flat(expected["coefficient"]), rtol=1e-5, atol=1e-9)
    names = ["code"] if how == "code" else ["math", "code"]  # in the order of the configuration
    assert made.fields["teacher"] == {"how": how, "names": names}
    assert made.fields["addons"] == {
        f"teacher.{n}": sealed(run.part("addons", 0, f"teacher.{n}")).digest for n in names
    }


def test_routed_weights_have_the_fields_and_bytes_they_always_had(run: Run) -> None:
    made = weigh(run, 0)
    assert made.fields.keys() == {
        "format", "rule", "batch_size", "denominator", "constant", "truncated", "end_token", "rollout_is_cap", "n",
        "scores",
    }  # fmt: skip
    assert "entropy" not in made.recorded
    shutil.rmtree(run.root / "addons")
    shutil.rmtree(run.root / ".fire" / "manifests" / "addons")
    again = weigh(opened(run, name="again"), 0)
    assert (again.digest, again.fields) == (made.digest, made.fields)


def test_another_combination_is_another_fingerprint_and_needs_another_name(run: Run, fire: Fire) -> None:
    assert fire("weigh", run.root, "--set", "weigh.teacher=token").code == 0
    assert fire("weigh", run.root, "--set", "weigh.teacher=token").code == 0
    answer = fire("weigh", run.root, "--set", "weigh.teacher=confident")
    assert answer.code == 2
    assert 'teacher.how: "token" -> "confident"' in answer.err
    assert fire("weigh", run.root, "--set", "weigh.teacher=confident", "--name", "other").code == 0
    answer = fire("train", run.root)
    assert answer.code == 2
    assert 'teacher: {"how":"token","names":["math","code"]} -> null' in answer.err
    found = fire("score", run.root, "--add", "teacher.math", "--redo")
    assert "set aside" in found.err
    assert "weights/fire" in found.err
    assert "weights/other" in found.err


def test_missing_teachers_of_a_run_are_added_by_the_command_it_names(run: Run, fire: Fire) -> None:
    for name in TWO:
        for place in ("addons", ".fire/manifests/addons", ".fire/receipts/addons"):
            shutil.rmtree(run.root / place / f"teacher.{name}")
    before = sealed(run.part("scores", 0)).digest
    answer = fire("weigh", run.root, "--set", "weigh.teacher=token")
    assert answer.code == 4
    assert "weigh.teacher token needs 'teacher_logprob.math', which is not stored yet" in answer.err
    assert answer.fix == f"fire score {run.root} --round 0 --add teacher.math --add teacher.code"
    assert fire(*shlex.split(answer.fix)[1:]).code == 0
    assert fire("weigh", run.root, "--set", "weigh.teacher=token").code == 0
    assert sealed(run.part("scores", 0)).digest == before


def test_a_rule_that_a_combination_cannot_have_is_refused_before_anything_is_read(run: Run, fire: Fire) -> None:
    shutil.rmtree(run.root / "scores")
    answer = fire("weigh", run.root, "--rule", "tip", "--set", "weigh.teacher=average")
    assert (answer.code, answer.fix) == (2, "--set weigh.teacher=routed")
    with pytest.raises(ConfigError, match="mean-of-teachers"):
        configured(opened(run, teacher="average"))


BOUND_CODE = {"entropy_kind": {"student": "exact", "math": "exact", "code": "topk-lower-bound"}}


def test_a_rule_does_not_read_the_bounds_of_a_server_unasked(run: Run, fire: Fire) -> None:
    edit(run, "scores", recorded=BOUND_CODE, stats={"teacher_entropy_mass": 0.953})
    answer = fire("weigh", run.root)
    assert answer.code == 2
    what = (
        "the rule fire reads teacher_entropy, which is only a lower bound "
        "(topk-lower-bound of code, from tokens that hold 0.953 of the probability)"
    )
    assert what in answer.err
    assert "scores round-000" in answer.err
    assert answer.fix.startswith("--set weigh.entropy=any")
    assert not run.part("weights", 0).manifest_path.exists()
    heard = Heard()
    made = weigh(opened(run, entropy="any"), 0, heard)
    told = [w for w in heard.warnings if "bound" in w]
    assert len(told) == 1
    assert "teacher_entropy is only a lower bound (topk-lower-bound of code" in told[0]
    said = {"teacher_entropy": {"kind": "topk-lower-bound", "of": ["code"], "mass": 0.953}}
    assert sealed(run.part("weights", 0)).recorded["entropy"] == made.recorded["entropy"] == said
    assert fire("weigh", run.root).code == 2
    assert fire("weigh", run.root, "--set", "weigh.entropy=any").code == 0


def test_what_needs_no_entropy_runs_beside_bounds_and_is_not_marked(run: Run) -> None:
    edit(run, "scores", recorded=BOUND_CODE, stats={"teacher_entropy_mass": 0.953})
    heard = Heard()
    made = weigh(opened(run, rule="uniform"), 0, heard)
    assert heard.warnings == []
    assert "entropy" not in made.recorded
    assert "entropy" not in weigh(opened(run, name="math", teacher="math"), 0).recorded
    assert "entropy" not in weigh(opened(run, name="any", teacher="math", entropy="any"), 0).recorded
    with pytest.raises(ConfigError, match=r"reads teacher_entropy, which is .* \(topk-lower-bound of code"):
        weigh(opened(run, name="code", teacher="code"), 0)
    with pytest.raises(ConfigError, match=r"weigh\.teacher token chooses by teacher_entropy"):
        weigh(opened(run, rule="uniform", teacher="token", name="token"), 0)


def test_a_dry_run_asks_for_the_same_consent_for_an_average(run: Run) -> None:
    with pytest.raises(ConfigError, match="mean-of-teachers"):
        weigh(opened(run, teacher="average"), 0)
    made = weigh(opened(run, teacher="average", entropy="any"), 0)
    assert made.recorded["entropy"]["teacher_entropy"] == {"kind": "mean-of-teachers", "of": [*TWO], "mass": None}


def test_compare_is_about_the_teachers_that_count(run: Run, fire: Fire) -> None:
    options = ("--rules", "uniform,fire,tip", "--set", "weigh.teacher=average", "--json")
    found = fire("compare", run.root, *options).json
    assert [r["rule"] for r in found["rules"]] == ["uniform"]
    told = {r["rule"]: r for r in found["not_computable"]}
    assert "mean-of-teachers" in told["fire"]["why"]
    assert told["tip"]["fix"] == "--set weigh.teacher=routed"
    assert found["policies"]["teacher"] == "average"
    assert found["next"].endswith("--rule uniform --set weigh.teacher=average")
    chosen = opened(run, teacher="average", rule="uniform")
    weigh(chosen, 0)
    signal = np.abs(flat(chosen.weights(round=0).collect()["coefficient"])).sum()
    assert found["rules"][0]["signal"] == pytest.approx(signal)
    frame = run.scores(0, add=["teacher.math", "teacher.code"]).collect()
    work = ScoredRound(chosen, 0, configured(chosen))
    counted = work.read(range(len(work)), COLUMNS)
    np.testing.assert_allclose(flat(counted["teacher_logprob"]), np.concatenate(by_hand(frame, "average", TWO)[0]))


def test_compare_says_which_rules_rest_on_bounds(run: Run, fire: Fire) -> None:
    options = ("--set", "weigh.teacher=average", "--set", "weigh.entropy=any", "--json")
    found = fire("compare", run.root, "--rules", "uniform,fire", *options).json
    flags = {r["rule"]: r["flags"] for r in found["rules"]}
    assert "mean-of-teachers" in flags["fire"]["bound"]
    assert "bound" not in flags["uniform"]
    made = shlex.split(found["next"])
    assert fire(*made[1:]).code == 0
    assert sealed(run.part("weights", 0, "fire")).fields["teacher"]["how"] == "average"


def test_a_damaged_column_of_a_teacher_is_found_before_it_counts(run: Run, fire: Fire) -> None:
    path = run.part("addons", 0, "teacher.code").file("00001")
    flip(path, path.stat().st_size // 2)
    answer = fire("weigh", run.root, "--set", "weigh.teacher=token")
    assert answer.code == 3
    assert "addons/teacher.code" in answer.err
    assert fire("weigh", run.root).code == 0


def test_a_student_is_trained_on_a_combination(
    make_run: Callable[..., Run], tiny_world: Any, tmp_path: Path, fire: Fire
) -> None:
    run = scored_run(make_run, tiny_world, tmp_path, "transformers")
    frame = run.scores(0, add=["teacher.math", "teacher.code"]).collect()
    chosen = ("--set", "weigh.teacher=average", "--set", "weigh.entropy=any")
    assert fire("weigh", run.root, *chosen).code == 0
    advantages = flat(run.weights(round=0).collect()["advantage"])
    expected = np.concatenate(by_hand(frame, "average", TWO)[0]) - flat(frame["student_logprob"])
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-6)
    answer = fire("train", run.root, *chosen)
    assert answer.code == 0, answer.err
    assert sealed(run.part("checkpoints", 0)).stats["skipped_steps"] == 0
