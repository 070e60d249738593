"""`score.precision: reduced`: what is rounded, by how much, what stays exact, and what follows from it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from fire_data.hub.card import dataset_card
from fire_data.plan.figures import bytes_per_token
from fire_data.precision import ERROR, reduced, round_to, said
from fire_data.reference.columns import page
from fire_data.run import Run, open_run
from fire_data.schemas.config import REDUCED_BITS, ScoreConfig
from fire_data.schemas.errors import FingerprintError
from fire_data.schemas.tables import ADDONS, PRECISION, columns_of
from fire_data.session import Session
from fire_data.shards import adopt, read_manifest, read_receipt, sealed, write_parquet
from fire_data.steps.diagnose import diagnose_round
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh

MakeRun = Callable[..., Run]
ADDED = ("topk", "base")
REDUCE = ("score.precision=reduced",)


@pytest.fixture(scope="module")
def both_once(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> tuple[Path, Path]:
    """Two runs of the real engines with the same rollouts, scored exactly and reduced, and weighed."""
    folder = tmp_path_factory.mktemp("precision")
    run = make_run(
        folder / "exact", score={"topk": 4}, train={"batch_size": 4, "lr": 1e-3, "export_dtype": "float32"},
        rollout={"n": 2, "prompts_per_round": 4, "prompts_per_shard": 2, "max_new_tokens": 12},
    )  # fmt: skip
    rollout(Session(run), 0)
    shutil.copytree(run.root, folder / "reduced")
    for name, overrides in (("exact", ()), ("reduced", REDUCE)):
        made = open_run(folder / name, overrides)
        score(Session(made), 0, add=ADDED)
        weigh(made, 0)
    return folder / "exact", folder / "reduced"


@pytest.fixture
def both(tmp_path: Path, both_once: tuple[Path, Path]) -> tuple[Run, Run]:
    """Copies of them."""
    for root in both_once:
        shutil.copytree(root, tmp_path / root.name)
    return open_run(tmp_path / "exact"), open_run(tmp_path / "reduced", REDUCE)


def tables_of(run: Run) -> dict[str, pa.Table]:
    parts = [run.part("scores", 0), *(run.part("addons", 0, name) for name in ADDED)]
    return {p.table: pa.concat_tables(pq.read_table(p.file(r.shard)) for r in sealed(p).shards) for p in parts}


def numbers(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    while pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    return np.asarray(column.to_numpy())


@pytest.mark.parametrize("bits", [7, REDUCED_BITS, 16, 22])
def test_rounding_is_to_the_nearest_keeps_the_order_and_changes_nothing_twice(bits: int) -> None:
    rng = np.random.default_rng(bits)
    size = np.exp(rng.uniform(-80, 80, 20_000)) * rng.choice([-1, 1], 20_000)
    edges = [0.0, -0.0, 1.0, -1.0, 1.17549435e-38, 3.4028234e38, -3.4028234e38, np.inf, -np.inf]
    values = np.sort(np.array([*size, *edges], dtype=np.float32))
    rounded = round_to(values, bits)
    finite = np.isfinite(values) & (np.abs(values) < 3e38)
    off = np.abs(rounded[finite].astype(np.float64) - values[finite])
    assert (off <= 2.0 ** -(bits + 1) * np.abs(values[finite].astype(np.float64))).all()
    assert off.any()
    assert (np.diff(rounded) >= 0).all()
    assert (rounded.view(np.uint32)[finite] & ((1 << (23 - bits)) - 1) == 0).all()
    np.testing.assert_array_equal(round_to(rounded, bits).view(np.uint32), rounded.view(np.uint32))
    np.testing.assert_array_equal(np.isfinite(rounded), np.isfinite(values))
    assert np.isnan(round_to(np.array([np.nan], dtype=np.float32), bits)).all()


def test_two_numbers_equally_near_do_not_both_go_up() -> None:
    step = np.float32(2.0**-REDUCED_BITS)
    halfway = np.float32(1) + (np.arange(8, dtype=np.float32) + np.float32(0.5)) * step
    assert (round_to(halfway, REDUCED_BITS) > halfway).sum() == 4


def test_slices_and_lists_of_lists_are_rounded_in_their_place() -> None:
    lists = pa.chunked_array([[[[0.1, 0.2]], []], [[[0.3, 0.4], [0.5, 0.6]]]], columns_of("addons/topk")[2].type)
    table = pa.table({"student_topk_logprobs": lists, "trajectory_id": ["a", "b", "c"]})
    whole = reduced(table, "addons/topk")
    assert whole.slice(1).to_pylist() == reduced(table.slice(1), "addons/topk").to_pylist()
    assert [len(x) for x in whole["student_topk_logprobs"].to_pylist()] == [1, 0, 2]
    expected = round_to(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32), REDUCED_BITS)
    np.testing.assert_array_equal(numbers(whole["student_topk_logprobs"]), expected)


def test_wider_numbers_of_an_engine_are_rounded_too() -> None:
    table = reduced(pa.table({"teacher_logprob": pa.array([[-0.1, -1.7]], pa.list_(pa.float64()))}), "scores")
    assert table["teacher_logprob"].type == pa.list_(pa.float32())
    assert (numbers(table["teacher_logprob"]).view(np.uint32) & 0x1FFF == 0).all()


def test_reducible_columns_are_within_the_bound_and_all_others_equal(both: tuple[Run, Run]) -> None:
    exact, rounded = (tables_of(run) for run in both)
    found = set()
    for name, table in exact.items():
        assert table.column_names == rounded[name].column_names
        summed = [c for c in table.column_names if c.endswith(("_sum", "_max"))]
        for column in (c for c in columns_of(name) if c.name in table.column_names and c.name not in summed):
            before, after = table[column.name], rounded[name][column.name]
            assert before.type == after.type
            if not column.reducible:
                assert before.equals(after), column.name
                assert PRECISION.encode() not in rounded[name].field(column.name).metadata
                continue
            found.add(column.name)
            a, b = numbers(before), numbers(after)
            assert (np.abs(a.astype(np.float64) - b) <= ERROR * np.abs(a)).all(), column.name
            np.testing.assert_array_equal(b, round_to(a, REDUCED_BITS))
            assert rounded[name].field(column.name).metadata[PRECISION.encode()].decode() == said(REDUCED_BITS)
            assert PRECISION.encode() not in table.field(column.name).metadata
    lists = [c.name for name in ADDED for c in ADDONS[name] if "logprob" in c.name]
    assert {"teacher_logprob", "teacher_entropy", "reverse_kl", *lists} <= found
    assert not {"student_logprob", "rollout_logprob"} & found


def test_sums_are_those_of_the_numbers_beside_them(both: tuple[Run, Run]) -> None:
    scores = both[1].scores(0).collect()
    for column in ("teacher_logprob", "teacher_entropy", "student_entropy"):
        lists = scores[column].cast(pl.List(pl.Float64))
        np.testing.assert_allclose(scores[f"{column}_sum"], lists.list.sum(), rtol=1e-12)
        np.testing.assert_array_equal(scores[f"{column}_max"], lists.list.max())


def test_a_coefficient_of_fire_moves_by_no_more_than_its_formula_allows(both: tuple[Run, Run]) -> None:
    exact, rounded = (run.weights(round=0).collect() for run in both)
    scores = both[0].scores(0).collect()
    assert exact["keep"].equals(rounded["keep"])
    assert exact["keep"].any()
    a, b, weight = (
        frame.explode(column)[column].to_numpy().astype(np.float64)
        for frame, column in ((exact, "coefficient"), (rounded, "coefficient"), (exact, "weight"))
    )
    teacher = scores.explode("teacher_logprob")["teacher_logprob"].to_numpy().astype(np.float64)
    tokens = exact.filter("keep").group_by("step").agg(n=pl.col("weight").list.len().sum())
    count = exact.join(tokens, on="step", how="left", maintain_order="left")
    count = count.select("n", "weight").explode("weight")["n"].fill_null(1).to_numpy()
    # Each factor 1 + a (1 - H / max H) is at least 1, and H / max H moves by at most 2 errors of itself; the mean
    # weight by as much again. The advantage moves by the error of the teacher's logprob.
    of_weight = 2 * 2 * 2 * ERROR * 1.01
    bound = np.abs(a) * of_weight + weight / count * ERROR * np.abs(teacher) * (1 + of_weight) + 1e-7 * np.abs(a)
    assert (np.abs(a - b) <= bound).all()
    assert (a != b).any()


def test_a_reduced_run_trains_within_the_tolerance_of_exact_logprobs(both: tuple[Run, Run]) -> None:
    found = train(Session(both[1]), 0)
    assert found.stats["ratio_check"] < 1e-5


def test_relations_between_columns_hold_within_the_bound(both: tuple[Run, Run]) -> None:
    for run in both:
        found = {f.name: f for f in diagnose_round(run, 0)}["consistency"]
        assert found.level == "ok", found


def test_another_precision_is_another_stage_and_exact_scores_are_named_as_before(both: tuple[Run, Run]) -> None:
    exact, rounded = both
    assert "precision" not in ScoreConfig().results()
    rounding = {"precision": {"mantissa_bits": REDUCED_BITS}}
    assert ScoreConfig(precision="reduced").results() == {**ScoreConfig().results(), **rounding}
    with pytest.raises(FingerprintError, match=re.escape('score.precision: null -> {"mantissa_bits":10}')):
        score(Session(open_run(exact.root, REDUCE)), 0)
    with pytest.raises(FingerprintError, match=re.escape('score.precision: {"mantissa_bits":10} -> null')):
        score(Session(open_run(rounded.root, ("score.precision=exact",))), 0)
    for part in (rounded.part("scores", 0), *(rounded.part("addons", 0, name) for name in ADDED)):
        fields = sealed(part).fields
        assert {**fields, **fields.get("score", {})}["precision"] == rounding["precision"]


def test_a_reduced_shard_that_lost_its_receipt_is_adopted(both: tuple[Run, Run]) -> None:
    for part in (both[1].part("scores", 0), both[1].part("addons", 0, "topk")):
        manifest = read_manifest(part)
        assert manifest is not None
        shard = manifest.plan[0]
        before = read_receipt(part, shard.name)
        part.receipt_path(shard.name).unlink()
        after = adopt(part, shard, manifest.fingerprint)
        assert after is not None
        assert before is not None
        assert after.sha256 == before.sha256


def test_a_reduced_list_takes_two_fifths_less_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    size = rng.exponential(size=100_000) * np.where(rng.random(100_000) < 0.5, 1e-3, 1.0)
    lists = pa.ListArray.from_arrays(pa.array(range(0, 100_001, 500), pa.int32()), pa.array(-size, pa.float32()))
    exact = pa.table({"teacher_logprob": lists})
    sizes = []
    for table in (exact, reduced(exact, "scores")):
        write_parquet(tmp_path / "file.parquet", table, "")
        sizes.append((tmp_path / "file.parquet").stat().st_size)
    assert sizes[1] < 0.61 * sizes[0]


def test_plan_card_and_reference_say_it(both: tuple[Run, Run], tmp_path: Path, make_fake_run: MakeRun) -> None:
    fresh = make_fake_run(tmp_path / "fresh")
    sizes = [bytes_per_token(run, "scores", None).value for run in (open_run(fresh.root, REDUCE), fresh)]
    assert sizes[0] < 0.8 * sizes[1]
    cards = [dataset_card("somebody/run", [sealed(run.part("scores", 0))], None) for run in both]
    assert ["mantissa bits" in text for text in cards] == [False, True]
    assert f"2^-{REDUCED_BITS + 1}" in cards[1]
    scores = page().partition("## scores")[2].partition("##")[0]
    marked = {line.split("`")[1] for line in scores.splitlines() if "reducible" in line}
    assert marked == {c.name for c in columns_of("scores") if c.reducible}
    assert "reducible" not in page().partition("## rollouts")[2].partition("##")[0]
    assert "reducible" not in page().partition("## weights")[2].partition("##")[0]
