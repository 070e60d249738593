"""Rows that were computed are kept until their stage is sealed: trusted only if whole, and asked for no second time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fire_data.engines import FakeGenerator, FakeScorer, tail_bound
from fire_data.kept import Kept
from fire_data.run import Run, open_run
from fire_data.schemas.errors import EngineError, PartialError
from fire_data.schemas.tables import FLOATS, IDS
from fire_data.session import Session
from fire_data.shards import Part
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score

from .conftest import Answer, shard_files

Fire = Callable[..., Answer]
MakeRun = Callable[..., Run]
SCORES = ("scores", 0, None)


def kept_in(root: Path, fingerprint: str = "a" * 64, stage: str = "scores") -> Kept:
    return Kept(Part(root, stage, 0), fingerprint)


def rows_named(names: str) -> pa.Table:
    """A row for every letter, with as many response tokens as the place of the letter."""
    ids = [[ord(name)] * (ord(name) - ord("a")) for name in names]
    return pa.table({"trajectory_id": list(names), "response_ids": pa.array(ids, IDS)})


def said_of(rows: pa.Table, salt: float = 0.0, rank: bool = True) -> pa.Table:
    """What an engine says of rows: a function of each row alone."""
    ids = rows["response_ids"].to_pylist()
    columns = {"logprob": pa.array([[salt - i / 7 for i in row] for row in ids], FLOATS)}
    return pa.table(columns | ({"rank": pa.array(ids, IDS)} if rank else {}))


class Engine:
    """Gives `said_of`; dies after `last` rows in all if told so. Remembers the names of the rows of every call."""

    def __init__(self, last: int | None = None, rank: bool = True) -> None:
        self.last, self.rank = last, rank
        self.asked: list[str] = []

    def __call__(self, rows: pa.Table) -> pa.Table:
        self.asked.append("".join(rows["trajectory_id"].to_pylist()))
        if self.last is not None and rows.num_rows > self.last:
            # In the order of finishing, which is not that of asking.
            done = rows.slice(0, self.last).take(pa.array(range(self.last), pa.int64())[::-1])
            named = said_of(done, rank=self.rank).append_column("trajectory_id", done["trajectory_id"])
            raise PartialError("it died", done=named)
        return said_of(rows, rank=self.rank)


def same(table: pa.Table, other: pa.Table) -> bool:
    """Equal rows in equal order, whatever the order of columns."""
    return bool(set(table.column_names) == set(other.column_names) and table.select(other.column_names).equals(other))


def whole(names: str, rank: bool = True) -> pa.Table:
    rows = rows_named(names)
    return said_of(rows, rank=rank).append_column("trajectory_id", rows["trajectory_id"])


def test_rows_are_given_back_to_their_stage_shard_and_name_alone(tmp_path: Path) -> None:
    kept = kept_in(tmp_path)
    kept.write("00000", "math", whole("abc"))
    found = kept.read("00000", "math")
    assert found is not None
    assert found.equals(whole("abc"))
    assert kept.read("00001", "math") is None
    assert kept.read("00000", "code") is None
    assert kept_in(tmp_path, "b" * 64).read("00000", "math") is None
    assert kept_in(tmp_path, stage="rollouts").read("00000", "math") is None
    assert Kept(Part(tmp_path, "scores", 1), kept.fingerprint).read("00000", "math") is None
    kept.write("00000", "math", whole("b"))
    assert same(kept.read("00000", "math") or whole(""), whole("b"))
    kept.write("00001", "math", whole("c"))
    kept.clear("00000")
    assert kept.read("00000", "math") is None
    assert kept.read("00001", "math") is not None
    kept.clear()
    assert kept.read("00001", "math") is None
    assert not kept.folder.exists()
    kept.clear()


def test_a_flipped_bit_anywhere_makes_kept_rows_as_good_as_none(tmp_path: Path) -> None:
    kept = kept_in(tmp_path)
    kept.write("00000", "math", whole("abc"))
    (path,) = kept.folder.iterdir()
    data = path.read_bytes()
    for i in range(len(data)):
        broken = bytearray(data)
        broken[i] ^= 1 << i % 8
        path.write_bytes(broken)
        assert kept.read("00000", "math") is None, f"byte {i} of {len(data)}"
    path.write_bytes(data)
    assert kept.read("00000", "math") is not None


def test_a_file_that_is_cut_or_longer_or_none_is_as_good_as_none(tmp_path: Path) -> None:
    kept = kept_in(tmp_path)
    kept.write("00000", "math", whole("abc"))
    (path,) = kept.folder.iterdir()
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert kept.read("00000", "math") is None, f"{length} of {len(data)} bytes"
    for text in (data + b"\0", b"\0" + data, data + data):
        path.write_bytes(text)
        assert kept.read("00000", "math") is None
    path.unlink()
    path.mkdir()
    assert kept.read("00000", "math") is None


@pytest.mark.parametrize("keep", [False, True])
def test_an_engine_that_dies_is_asked_only_for_the_rows_that_it_did_not_finish(tmp_path: Path, keep: bool) -> None:
    kept, rows = kept_in(tmp_path), rows_named("gcabfed")
    asked = []
    for last in (2, 0, 3, 1):
        engine = Engine(last)
        with pytest.raises(PartialError, match="it died"):
            kept.completed("00000", "math", rows, engine, keep=keep)
        asked += engine.asked
    engine = Engine()
    made = kept.completed("00000", "math", rows, engine, keep=keep)
    assert [*asked, *engine.asked] == ["gcabfed", "abfed", "abfed", "ed", "d"]
    assert same(made, whole("gcabfed"))
    (path,) = kept.folder.iterdir()
    written = path.stat().st_mtime_ns
    again = Engine()
    assert same(kept.completed("00000", "math", rows, again, keep=keep), whole("gcabfed"))
    assert again.asked == ([] if keep else ["d"])
    assert path.stat().st_mtime_ns == written, "what is whole is not written again"


def test_every_point_at_which_an_engine_dies_leaves_the_same_table(tmp_path: Path) -> None:
    for last in range(6):
        kept, rows, engine = kept_in(tmp_path / str(last)), rows_named("cabfed"), Engine()
        with pytest.raises(PartialError):
            kept.completed("00000", "math", rows, Engine(last))
        assert same(kept.completed("00000", "math", rows, engine), whole("cabfed"))
        assert engine.asked == ["cabfed"[last:]]


def test_rows_in_another_order_or_of_another_cut_are_taken_by_name(tmp_path: Path) -> None:
    kept, engine = kept_in(tmp_path), Engine()
    kept.write("00000", "math", whole("abcd"))
    assert same(kept.completed("00000", "math", rows_named("dbe"), engine), whole("dbe"))
    assert engine.asked == ["e"]


def test_an_error_that_finished_nothing_keeps_what_was_kept_before(tmp_path: Path) -> None:
    kept = kept_in(tmp_path)
    kept.write("00000", "math", whole("ab"))

    def fails(error: EngineError) -> Callable[[pa.Table], pa.Table]:
        def work(_: pa.Table) -> pa.Table:
            raise error

        return work

    none = whole("").slice(0, 0)
    for error in (EngineError("gone"), PartialError("gone"), PartialError("gone", done=none)):
        with pytest.raises(EngineError, match="gone"):
            kept.completed("00000", "math", rows_named("abc"), fails(error), keep=True)
        assert same(kept.read("00000", "math") or none, whole("ab"))


@pytest.mark.parametrize("keep", [False, True])
def test_no_rows_are_asked_for_once_to_learn_their_columns(tmp_path: Path, keep: bool) -> None:
    kept, engine = kept_in(tmp_path), Engine()
    made = kept.completed("00000", "math", rows_named(""), engine, keep=keep)
    assert (made.num_rows, set(made.column_names)) == (0, {"trajectory_id", "logprob", "rank"})
    assert engine.asked == [""]
    kept.completed("00000", "math", rows_named(""), engine, keep=keep)
    assert engine.asked == ([""] if keep else ["", ""])


@pytest.mark.parametrize("before", [True, False])
def test_rows_of_an_engine_that_gave_other_columns_are_asked_for_again(tmp_path: Path, before: bool) -> None:
    kept, engine = kept_in(tmp_path), Engine(rank=not before)
    with pytest.raises(PartialError):
        kept.completed("00000", "math", rows_named("abcd"), Engine(3, rank=before))
    made = kept.completed("00000", "math", rows_named("abcd"), engine, keep=True)
    assert same(made, whole("abcd", rank=not before))
    assert engine.asked == ["d", "abc"]
    assert same(kept.read("00000", "math") or made.slice(0, 0), made)


def test_an_engine_that_changes_its_columns_and_dies_leaves_rows_of_one_kind(tmp_path: Path) -> None:
    kept, engine = kept_in(tmp_path), Engine(rank=False)
    with pytest.raises(PartialError):
        kept.completed("00000", "math", rows_named("abcdef"), Engine(2))
    with pytest.raises(PartialError):
        kept.completed("00000", "math", rows_named("abcdef"), Engine(1, rank=False))
    assert same(kept.completed("00000", "math", rows_named("abcdef"), engine), whole("abcdef", rank=False))
    assert engine.asked == ["abdef"]


def test_an_engine_that_changes_its_columns_with_every_call_ends_in_an_error(tmp_path: Path) -> None:
    kept = kept_in(tmp_path)
    kept.write("00000", "math", whole("ab"))
    ranks = iter([False, True, False, True])
    with pytest.raises(EngineError, match="other columns with every call") as caught:
        kept.completed("00000", "math", rows_named("abc"), lambda rows: said_of(rows, rank=next(ranks)))
    assert "scores round-000, shard 00000" in str(caught.value.where)


# --- what stages make of it ----------------------------------------------------------------------------------------


class Dying:
    """Takes the place of a method of an engine: counts rows, and dies after so many of them with what it finished."""

    def __init__(self, real: Callable[..., pa.Table], after: int | None) -> None:
        self.real, self.after = real, after
        self.names: list[str] = []

    def __call__(self, engine: Any, rows: pa.Table, *arguments: Any, **options: Any) -> pa.Table:
        left = None if self.after is None else max(0, self.after - len(self.names))
        if left is None or rows.num_rows <= left:
            self.names += rows["trajectory_id"].to_pylist()
            return self.real(engine, rows, *arguments, **options)
        some = rows.slice(0, left)
        self.names += some["trajectory_id"].to_pylist()
        done = self.real(engine, some, *arguments, **options).append_column("trajectory_id", some["trajectory_id"])
        raise PartialError("the engine died as told", done=done)


@pytest.fixture
def dying(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Dying]:
    def make(kind: type, method: str, after: int | None = None) -> Dying:
        counted = Dying(originals[kind, method], after)
        monkeypatch.setattr(kind, method, lambda *a, **k: counted(*a, **k))
        return counted

    originals = {(k, m): getattr(k, m) for k, m in METHODS}
    return make


METHODS = ((FakeGenerator, "generate"), (FakeScorer, "score"), (FakeScorer, "evaluate"))


def bytes_of(run: Run) -> dict[str, bytes]:
    """Every visible table."""
    found = (p for p in sorted(run.root.rglob("*.parquet")) if ".fire" not in p.relative_to(run.root).parts)
    return {str(p.relative_to(run.root)): p.read_bytes() for p in found}


def kept_files(run: Run) -> list[Path]:
    return [p for p in (run.root / ".fire").rglob("*") if "kept" in p.parts and p.is_file()]


def make_rollouts(run: Run) -> None:
    rollout(Session(run), 0)


def make_scores(run: Run) -> None:
    score(Session(run), 0)


def make_base(run: Run) -> None:
    score(Session(run), 0, add=["base"])


@pytest.mark.parametrize(
    ("method", "before", "make", "stage"),
    [
        (METHODS[0], [], make_rollouts, ("rollouts", 0, None)),
        (METHODS[1], [make_rollouts], make_scores, SCORES),
        (METHODS[2], [make_rollouts, make_scores], make_base, ("addons", 0, "base")),
    ],
    ids=["rollouts", "scores", "base"],
)
def test_a_stage_whose_engine_dies_asks_the_next_time_only_for_the_rest(
    tmp_path: Path, make_fake_run: MakeRun, dying: Callable[..., Dying], method: tuple[type, str],
    before: list[Callable[[Run], None]], make: Callable[[Run], None], stage: tuple[str, int, str | None],
) -> None:  # fmt: skip
    run = make_fake_run(tmp_path / "run")
    for step in before:
        step(run)
    shutil.copytree(run.root, tmp_path / "whole")
    expected = open_run(tmp_path / "whole")
    everything = dying(*method)
    make(expected)
    asked: list[str] = []
    for after in (1, 4, 5):  # within the first shard of 4 rows, at the edge of one, and within the second
        counted = dying(*method, after)
        with pytest.raises(PartialError, match="the engine died as told"):
            make(run)
        asked += counted.names
        assert kept_files(run)
    counted = dying(*method)
    make(run)
    asked += counted.names
    assert asked == everything.names, "every row once, in the order of the rows"
    assert len(asked) == 12
    assert bytes_of(run) == bytes_of(expected)
    assert shard_files(run.part(*stage))
    assert not kept_files(run)


def test_rows_that_were_kept_under_other_settings_are_not_used(
    tmp_path: Path, make_fake_run: MakeRun, dying: Callable[..., Dying]
) -> None:
    run = make_fake_run(tmp_path / "run")
    rollout(Session(run), 0)
    shutil.copytree(run.root, tmp_path / "whole")
    other = ("score.entropy_topk=7",)
    dying(FakeScorer, "score", 3)
    with pytest.raises(PartialError):
        score(Session(run), 0)
    counted = dying(FakeScorer, "score", 3)
    with pytest.raises(PartialError):
        score(Session(open_run(run.root, other)), 0)
    assert len(counted.names) == 3
    counted = dying(FakeScorer, "score")
    score(Session(open_run(run.root, other)), 0)
    assert len(counted.names) == 9
    expected = open_run(tmp_path / "whole", other)
    score(Session(expected), 0)
    assert bytes_of(run) == bytes_of(expected)
    assert not kept_files(run)


@pytest.mark.parametrize("hurt", ["flip", "cut", "foreign"])
def test_damaged_kept_rows_are_computed_again(
    tmp_path: Path, make_fake_run: MakeRun, dying: Callable[..., Dying], hurt: str
) -> None:
    run = make_fake_run(tmp_path / "run")
    shutil.copytree(run.root, tmp_path / "whole")
    expected = open_run(tmp_path / "whole")
    rollout(Session(expected), 0)
    dying(FakeGenerator, "generate", 3)
    with pytest.raises(PartialError):
        rollout(Session(run), 0)
    (path,) = kept_files(run)
    data = bytearray(path.read_bytes())
    if hurt == "foreign":
        manifest = run.part("rollouts", 0)
        table = Kept(manifest, fingerprint_of(run)).read("00000", "student")
        assert table is not None
        ids = pa.array([[1]] * table.num_rows, IDS)
        swapped = table.set_column(table.column_names.index("response_ids"), "response_ids", ids)
        Kept(manifest, "of another stage").write("00000", "student", swapped)
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data if hurt == "flip" else data[:-1])
    counted = dying(FakeGenerator, "generate")
    rollout(Session(run), 0)
    assert len(counted.names) == 12
    assert bytes_of(run) == bytes_of(expected)


def fingerprint_of(run: Run) -> str:
    from fire_data.shards import read_manifest

    manifest = read_manifest(run.part("rollouts", 0))
    assert manifest is not None
    return manifest.fingerprint


@pytest.mark.parametrize(
    ("method", "before", "make", "redo"),
    [
        (METHODS[0], [], make_rollouts, lambda run: rollout(Session(run), 0, redo=True)),
        (METHODS[1], [make_rollouts], make_scores, lambda run: score(Session(run), 0, redo=True)),
        (
            METHODS[2],
            [make_rollouts, make_scores],
            make_base,
            lambda run: score(Session(run), 0, add=["base"], redo=True),
        ),
    ],
    ids=["rollouts", "scores", "base"],
)
def test_redo_asks_for_everything_whatever_was_kept(
    tmp_path: Path, make_fake_run: MakeRun, dying: Callable[..., Dying], method: tuple[type, str],
    before: list[Callable[[Run], None]], make: Callable[[Run], None], redo: Callable[[Run], object],
) -> None:  # fmt: skip
    """What was kept may be what is wrong: another model behind the same address."""
    run = make_fake_run(tmp_path / "run")
    for step in before:
        step(run)
    dying(*method, 5)
    with pytest.raises(PartialError):
        make(run)
    counted = dying(*method)
    redo(run)
    assert len(counted.names) == 12


# --- a bound where only some tokens are listed ---------------------------------------------------------------------


def distribution(rng: np.random.Generator, size: int, sharp: float) -> Any:
    logits = rng.standard_normal(size) * sharp
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def exact_entropy(logprobs: Any) -> float:
    p = np.exp(logprobs)
    return float(-(p * np.where(p > 0, logprobs, 0.0)).sum())


@pytest.mark.parametrize("sharp", [0.0, 0.1, 1.0, 5.0, 40.0])
def test_the_bound_is_never_above_the_entropy_and_meets_it_when_all_is_listed(sharp: float) -> None:
    rng = np.random.default_rng(int(sharp * 10))
    for size in (2, 5, 50):
        logprobs = distribution(rng, size, sharp)
        ordered, whole = np.sort(logprobs)[::-1], exact_entropy(logprobs)
        last = -1.0
        for k in range(1, size + 1):
            for sampled in {k, size - 1} - set(range(k)):
                listed = np.array([*ordered[:k], ordered[sampled] if sampled < size else -np.inf])
                bound, mass = tail_bound(listed, ordered[k - 1])
                assert bound <= whole + 1e-12
                assert mass == pytest.approx(min(1.0, np.exp(listed).sum()), abs=1e-15)
            bound, mass = tail_bound(ordered[:k], ordered[k - 1])
            assert last - 1e-12 <= bound <= whole + 1e-12, "more listed tokens make it better"
            last = float(bound)
        assert last == pytest.approx(whole, abs=1e-12)
        assert mass == pytest.approx(1.0, abs=1e-12)


def test_the_bound_is_met_by_the_distribution_that_spreads_its_rest_evenly() -> None:
    # 0.5, 0.25 and a rest of 0.25 in one token of 0.25: none of the unlisted has more than the least of the listed.
    bound, mass = tail_bound(np.log([0.5, 0.25]), np.log(0.25))
    assert mass == pytest.approx(0.75)
    assert bound == pytest.approx(exact_entropy(np.log([0.5, 0.25, 0.25])))


def test_the_bound_is_at_least_the_min_entropy_and_never_negative() -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        ordered = np.sort(distribution(rng, 30, 4.0))[::-1]
        bound, _ = tail_bound(ordered[:4], ordered[3])
        assert bound >= -ordered[0] - 1e-12
    assert tail_bound(np.array([0.0, -np.inf]), 0.0) == (0.0, 1.0)


def test_masses_above_one_by_rounding_are_one_and_make_no_entropy_negative() -> None:
    listed = np.log(np.array([0.6, 0.4])) + 1e-6
    bound, mass = tail_bound(listed, listed[1])
    assert mass == 1.0
    assert bound == pytest.approx(exact_entropy(np.log([0.6, 0.4])), abs=1e-5)
    bound, mass = tail_bound(np.array([1e-7]), 1e-7)
    assert (bound, mass) == (0.0, 1.0)


def test_bounds_of_many_positions_are_those_of_each() -> None:
    rng = np.random.default_rng(5)
    listed = np.sort(np.stack([distribution(rng, 9, 2.0) for _ in range(6)]).reshape(2, 3, 9))[..., ::-1][..., :4]
    listed = np.concatenate([listed, np.full((2, 3, 1), -np.inf)], -1)
    bounds, masses = tail_bound(listed, listed[..., 3])
    assert bounds.shape == masses.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            assert (bounds[i, j], masses[i, j]) == tail_bound(listed[i, j], listed[i, j, 3])


def test_tokens_without_any_probability_among_the_listed_make_the_bound_the_entropy() -> None:
    listed = np.array([np.log(0.7), np.log(0.3), -np.inf, -np.inf])
    bound, mass = tail_bound(listed, -np.inf)
    assert (bound, mass) == (pytest.approx(exact_entropy(np.log([0.7, 0.3]))), pytest.approx(1.0))
    bound, _ = tail_bound(listed - 1e-7, -np.inf)
    assert bound == pytest.approx(exact_entropy(np.log([0.7, 0.3])), abs=1e-5)
