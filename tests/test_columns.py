"""Further columns: beside sealed scores that stay as they are, only what is missing, in one pass with the scores."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fire_data as fd
from fire_data import scoring
from fire_data.create import fork_run, init_run, missing_paths
from fire_data.engines import FakeScorer
from fire_data.overview import next_command
from fire_data.run import Run, open_run
from fire_data.sampling import Sampling
from fire_data.schedule import hash_text, trajectory_id
from fire_data.schemas import tables
from fire_data.schemas.errors import (
    ConfigError,
    DamagedError,
    DataError,
    EngineError,
    FingerprintError,
    IncompleteError,
)
from fire_data.schemas.manifest import Manifest
from fire_data.schemas.tables import MASSES, REWARD, TABLES
from fire_data.session import Session
from fire_data.shards import read_manifest, read_shard, sealed
from fire_data.stages import Silent
from fire_data.steps import columns
from fire_data.steps.columns import add_columns
from fire_data.steps.engines import teacher_generator
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score

from .conftest import Answer, flip, shard_files

Fire = Callable[..., Answer]
MakeRun = Callable[..., Run]
ADDONS = {name: columns for name, columns in tables.ADDONS.items() if name != REWARD}  # of models
PATTERN = r"(\d)\D*$"  # the last digit: one of seven, so that an untrained model is right now and then
TEMPLATE = "| {% for m in messages %}{{ m['content'] }} {% endfor %}so"


@pytest.fixture
def rolled(tmp_path: Path, make_fake_run: MakeRun) -> Run:
    """A run of the fake engine with rollouts: 3 shards of 2 prompts, 2 samples each."""
    run = make_fake_run(tmp_path / "run", score={"topk": 3}, verify={"pattern": PATTERN})
    rollout(Session(run), 0)
    return run


@pytest.fixture(scope="module")
def real_once(tmp_path_factory: pytest.TempPathFactory, make_run: MakeRun) -> Path:
    folder = tmp_path_factory.mktemp("columns")
    (folder / "template.jinja").write_text(TEMPLATE)
    run = make_run(
        folder / "run",
        verify={"pattern": PATTERN},
        score={"topk": 4, "pass_rate_samples": 6, "teacher_prompt": "own"},
        rollout={"n": 2, "prompts_per_round": 4, "prompts_per_shard": 2, "max_new_tokens": 12},
    )
    text = (run.root / "fire.yaml").read_text()
    teacher = text.index("teacher:")
    at = text.index("chat_template: null", teacher)
    text = text[:at] + "chat_template: template.jinja" + text[at + len("chat_template: null") :]
    (run.root / "fire.yaml").write_text(text)
    shutil.copy(folder / "template.jinja", run.root / "template.jinja")
    run = open_run(run.root)
    rollout(Session(run), 0)
    return run.root


@pytest.fixture
def real(tmp_path: Path, real_once: Path) -> Run:
    """A run of the real engines with rollouts, 2 shards; the teacher sees its own prompts."""
    shutil.copytree(real_once, tmp_path / "run")
    return open_run(tmp_path / "run")


def bytes_of(run: Run) -> dict[str, bytes]:
    """Every table of a run."""
    found = (p for p in sorted(run.root.rglob("*.parquet")) if ".fire" not in p.relative_to(run.root).parts)
    return {str(p.relative_to(run.root)): p.read_bytes() for p in found}


def touched(run: Run, stage: str) -> dict[str, int]:
    """When the shards, receipts and manifests of a stage last changed."""
    places = [run.root / stage, run.root / ".fire" / "receipts" / stage, run.root / ".fire" / "manifests" / stage]
    found = (p for place in places for p in place.rglob("*") if p.is_file())
    return {str(p.relative_to(run.root)): p.stat().st_mtime_ns for p in found}


def manifest_of(run: Run, stage: str, name: str | None = None) -> Manifest:
    return sealed(run.part(stage, 0, name))


def test_columns_added_later_have_the_bytes_of_those_made_together_and_leave_the_scores_alone(
    rolled: Run, tmp_path: Path
) -> None:
    shutil.copytree(rolled.root, tmp_path / "other")
    together = open_run(tmp_path / "other")
    score(Session(together), 0, add=tuple(ADDONS))
    score(Session(rolled), 0)
    before = touched(rolled, "scores")
    for name in reversed(ADDONS):
        add_columns(Session(rolled), 0, name)
    assert touched(rolled, "scores") == before
    assert bytes_of(rolled) == bytes_of(together)
    assert len(bytes_of(rolled)) == 3 * (2 + len(ADDONS))


def test_every_table_conforms_and_stands_row_by_row_beside_the_scores(rolled: Run) -> None:
    score(Session(rolled), 0, add=tuple(ADDONS))
    for name, wanted in ADDONS.items():
        part, manifest = rolled.addon(0, name)
        for mine, theirs in zip(manifest.shards, manifest_of(rolled, "scores").shards, strict=True):
            table, scores = read_shard(part, mine), read_shard(rolled.part("scores", 0), theirs)
            assert table.schema.names == [c.name for c in TABLES[f"addons/{name}"]]
            assert table["trajectory_id"].equals(scores["trajectory_id"])
            assert mine.tokens == (theirs.tokens if wanted[0].per == "token" else 0)
            assert table.schema.metadata[b"fire.table"] == f"addons/{name}".encode()


def test_floats_of_lists_of_lists_are_stored_byte_by_byte(rolled: Run) -> None:
    score(Session(rolled), 0, add=["topk"])
    group = pq.read_metadata(shard_files(rolled.part("addons", 0, "topk"))[0]).row_group(0)
    encodings = {(c := group.column(i)).path_in_schema.split(".")[0]: c.encodings for i in range(group.num_columns)}
    for column in ADDONS["topk"]:
        assert ("BYTE_STREAM_SPLIT" in encodings[column.name]) == (not column.name.endswith("_ids")), column.name


def test_scores_and_topk_that_are_both_missing_take_one_pass_of_both_models(
    real: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    made_of: list[tuple[int, bool]] = []
    plain, token_signals = scoring.hidden_states, scoring.token_signals

    def spy(*args: Any, k: int, signals: bool) -> Any:
        made_of.append((k, signals))
        return token_signals(*args, k=k, signals=signals)

    monkeypatch.setattr(scoring, "hidden_states", lambda *a: calls.append(1) or plain(*a))
    monkeypatch.setattr(scoring, "token_signals", spy)
    score(Session(real), 0, add=["topk"])
    assert len(calls) == 2 * len(manifest_of(real, "scores").shards)
    assert set(made_of) == {(4, True)}
    made_of.clear()
    made, calls[:] = bytes_of(real), []
    topk, scores = real.part("addons", 0, "topk"), real.part("scores", 0)
    for part, name in ((topk, "00000"), (scores, "00001")):
        part.file(name).unlink()
        part.receipt_path(name).unlink()
    score(Session(real), 0, add=["topk"])
    assert len(calls) == 4
    assert made_of == [(0, True), (4, False)], "the shard that lacks its scores, then the one that lacks its top-k"
    assert bytes_of(real) == made
    calls.clear()
    score(Session(real), 0, add=["topk"])
    assert calls == []


def test_the_topk_is_of_the_teachers_own_prompt(real: Run) -> None:
    score(Session(real), 0, add=["topk"])
    assert manifest_of(real, "addons", "topk").fields["score"]["teacher_prompt"] == "own"
    frame = real.scores(0, add="topk").collect()
    assert frame["teacher_prompt_ids"].null_count() == 0
    for row in frame.iter_rows(named=True):
        for at, token in enumerate(row["response_ids"]):
            for who in ("student", "teacher"):
                ids, logprobs = row[f"{who}_topk_ids"][at], row[f"{who}_topk_logprobs"][at]
                assert ids[0] == row[f"{who}_top1_id"][at]
                assert logprobs[0] == row[f"{who}_max_logprob"][at]
                assert len(ids) == len(set(ids)) == 4
                assert row[f"{who}_rank"][at] > 4 or logprobs[ids.index(token)] == pytest.approx(
                    row[f"{who}_logprob"][at], abs=1e-5
                )
            assert (
                row["teacher_rank_of_student_top1"][at]
                == 1 + sum(x > row["teacher_logprob_on_student_topk"][at][0] for x in row["teacher_topk_logprobs"][at])
                or row["teacher_rank_of_student_top1"][at] > 4
            )
    stats = manifest_of(real, "addons", "topk").stats
    mass = [math.fsum(map(math.exp, k)) for r in frame["teacher_topk_logprobs"].to_list() for k in r]
    assert stats["teacher_topk_mass"] == pytest.approx(math.fsum(mass) / len(mass))
    assert stats["teacher_mass_on_student_topk"] <= stats["teacher_topk_mass"] <= 1


def test_k_is_at_most_the_vocabulary_and_then_the_lists_hold_all_of_it(real: Run) -> None:
    run = open_run(real.root, ("score.topk=1000",))
    stats = add_columns(Session(run), 0, "topk").stats
    assert stats["k"] == int(Session(run).vocabulary.allowed.sum()) < 100
    assert stats["student_topk_mass"] == pytest.approx(1)
    assert stats["teacher_mass_on_student_topk"] == pytest.approx(1)


class Failing(FakeScorer):
    """Fails after so many calls."""

    left = 0

    def score(self, rollouts: pa.Table, progress: Any = None, *, k: int = 0, signals: bool = True) -> pa.Table:
        Failing.left -= 1
        if Failing.left < 0:
            raise EngineError("stopped")
        return super().score(rollouts, progress, k=k, signals=signals)


@pytest.mark.parametrize("together", [True, False])
def test_an_addon_that_was_interrupted_anywhere_ends_in_the_same_bytes(
    rolled: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    if not together:
        score(Session(rolled), 0)
    shutil.copytree(rolled.root, tmp_path / "whole")
    score(Session(whole := open_run(tmp_path / "whole")), 0, add=["topk"])
    expected = bytes_of(whole)
    monkeypatch.setattr("fire_data.steps.engines.FakeScorer", Failing)
    for moment in range(3):
        shutil.rmtree(tmp_path / "cut", ignore_errors=True)
        shutil.copytree(rolled.root, tmp_path / "cut")
        run = open_run(tmp_path / "cut")
        Failing.left = moment
        with pytest.raises(EngineError):
            score(Session(run), 0, add=["topk"])
        assert read_manifest(run.part("addons", 0, "topk")) is not None
        with pytest.raises(IncompleteError):
            run.addon(0, "topk")
        if together and moment:
            # Killed between the two files of a shard: the top-k is there, its scores are not.
            scores = run.part("scores", 0)
            scores.file(f"{moment - 1:05d}").unlink()
            scores.receipt_path(f"{moment - 1:05d}").unlink()
        Failing.left = 100
        score(Session(run), 0, add=["topk"])
        assert bytes_of(run) == expected


@pytest.mark.parametrize("name", ADDONS)
def test_a_shard_of_an_addon_without_receipt_is_adopted_and_a_torn_one_made_again(rolled: Run, name: str) -> None:
    score(Session(rolled), 0, add=[name])
    part, before = rolled.part("addons", 0, name), bytes_of(rolled)
    part.receipt_path("00001").unlink()
    adopted = part.file("00001").stat().st_mtime_ns
    add_columns(Session(rolled), 0, name)
    assert part.file("00001").stat().st_mtime_ns == adopted
    part.receipt_path("00001").unlink()
    part.file("00001").write_bytes(part.file("00001").read_bytes()[:-9])
    add_columns(Session(rolled), 0, name)
    assert bytes_of(rolled) == before


@pytest.mark.parametrize("name", ADDONS)
def test_a_damaged_shard_of_an_addon_is_refused_and_made_again_by_the_command_it_names(
    rolled: Run, fire: Fire, name: str
) -> None:
    score(Session(rolled), 0, add=[name])
    before, untouched = bytes_of(rolled), touched(rolled, "scores")
    path = rolled.part("addons", 0, name).file("00001")
    flip(path, path.stat().st_size // 2)
    with pytest.raises(DamagedError) as caught:
        rolled.scores(0, add=[name])
    assert caught.value.fix == f"fire score {rolled.root} --round 0 --add {name}"
    check = fire("check", rolled.root, "--json")
    assert (check.code, [d["path"] for d in check.json]) == (3, [str(path)])
    assert check.json[0]["fix"] == caught.value.fix
    assert fire(*shlex.split(caught.value.fix)[1:]).code == 0
    assert bytes_of(rolled) == before
    assert touched(rolled, "scores") == untouched
    assert fire("check", rolled.root).code == 0


def test_a_missing_addon_names_the_command_that_adds_it_and_that_command_does(rolled: Run, fire: Fire) -> None:
    score(Session(rolled), 0)
    with pytest.raises(IncompleteError, match="addons/base round-000 is not started") as caught:
        rolled.scores(add=["base"])
    assert fire(*shlex.split(str(caught.value.fix))[1:]).code == 0
    assert "base_logprob" in rolled.scores(add=["base"]).collect_schema()
    assert "base_logprob" not in rolled.scores().collect_schema()
    assert rolled.addons(0) == ("base",)
    with pytest.raises(ConfigError, match="'rewards'; there are: topk, base, pass-rate, reward"):
        rolled.scores(0, add=["rewards"])
    answer = fire("score", rolled.root, "--add", "top-k")
    assert answer.code == 2
    assert "'top-k'; there are: topk, base, pass-rate" in answer.err


def test_weights_and_scores_are_joined_with_addons_and_exploded_token_by_token(rolled: Run) -> None:
    score(Session(rolled), 0, add=tuple(ADDONS))
    frame = rolled.scores(0, add=tuple(ADDONS)).collect()
    assert frame.width == sum(c not in MASSES for c in TABLES["scores"]) + sum(map(len, ADDONS.values()))
    tokens = fd.explode(frame).collect()
    assert tokens.height == frame["length"].sum()
    assert tokens.schema["student_topk_ids"] == pl.List(pl.Int32)
    assert tokens.schema["base_logprob"] == pl.Float32
    row = frame.row(5, named=True)
    mine = tokens.filter(pl.col("trajectory_id") == row["trajectory_id"])
    for column in ADDONS["topk"]:
        assert mine[column.name].to_list() == row[column.name]
    assert mine["base_logprob"].to_list() == row["base_logprob"]
    assert mine["teacher_pass_rate"].to_list() == [row["teacher_pass_rate"]] * row["length"]


def test_weights_come_with_the_addons_that_are_named(rolled: Run, fire: Fire) -> None:
    score(Session(rolled), 0, add=["topk", "base"])
    assert fire("weigh", rolled.root).code == 0
    plain, more = rolled.weights().collect(), rolled.weights(add=["base", "topk"]).collect()
    added = [c.name for name in ("base", "topk") for c in ADDONS[name]]
    assert [c for c in more.columns if c not in plain.columns] == added
    assert more.select(plain.columns).equals(plain)
    assert more["base_logprob"].equals(rolled.scores(add="base").collect()["base_logprob"])


def test_a_relative_base_is_found_from_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    run = init_run(Path("run"), {"student": {"model": "some/hub-id"}, "base": {"model": "model"}})
    assert run.config.base is not None
    assert run.config.base.model == "../model"
    assert [m for m in missing_paths(run.root) if "base" in m] == []
    (tmp_path / "model").rmdir()
    assert any(m.startswith("base.model: there is no") for m in missing_paths(run.root))


def test_tables_of_other_trajectories_are_not_joined(rolled: Run) -> None:
    score(Session(rolled), 0, add=["base"])
    path = rolled.part("addons", 0, "base").manifest_path
    whole = path.read_text()
    other = (
        manifest_of(rolled, "addons", "base")
        .model_dump_json()
        .replace(manifest_of(rolled, "rollouts").digest, "0" * 64)
    )
    path.write_text(other)
    with pytest.raises(DataError, match="for other rollouts") as caught:
        rolled.scores(0, add=["base"])
    assert caught.value.fix == f"fire score {rolled.root} --round 0 --add base --redo"
    path.write_text(whole)
    manifest = manifest_of(rolled, "addons", "base")
    swapped = manifest.model_copy(update={"shards": manifest.shards[::-1]})
    path.write_text(swapped.model_dump_json())
    with pytest.raises(DataError, match="different trajectories"):
        rolled.scores(0, add=["base"])


class Told(Silent):
    """Keeps what a step says, in order."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def start(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self.lines.append(("start", what))

    def note(self, text: str) -> None:
        self.lines.append(("note", text))

    def warn(self, text: str) -> None:
        self.lines.append(("warn", text))


def test_the_storage_cost_is_told_before_the_work(rolled: Run) -> None:
    told = Told()
    score(Session(open_run(rolled.root, ("score.topk=16",)), told), 0, add=tuple(ADDONS))
    tokens = sum(r.tokens for r in manifest_of(rolled, "rollouts").shards)
    notes = [text for kind, text in told.lines if kind == "note"]
    size = f"{384 * tokens / 1000:.3g} kB for {tokens:,} tokens"
    assert notes[0] == f"topk with k=16 stores about 384 bytes per response token before compression: {size}"
    assert notes[1].startswith("base stores about 4 bytes per response token before compression: ")
    assert notes[2].startswith("pass-rate stores about 4 bytes per trajectory before compression: 48 bytes for 12 traj")
    assert notes[2].endswith("the teacher writes 3 answers to each of 6 prompts")
    kinds = [kind for kind, text in told.lines if kind != "warn"]
    assert kinds[: len(notes)] == ["note"] * 3
    assert next(text for kind, text in told.lines if kind == "start") == "scores round-000"
    again = Told()
    score(Session(open_run(rolled.root, ("score.topk=16",)), again), 0, add=tuple(ADDONS))
    assert not [text for _, text in again.lines if "stores about" in text], "what is there costs nothing"
    assert columns._cost("topk", _with_tokens(manifest_of(rolled, "rollouts"), 32_000), 16).endswith(
        "12.3 MB for 32,000 tokens"
    )


def _with_tokens(manifest: Manifest, tokens: int) -> Manifest:
    receipt = manifest.shards[0].model_copy(update={"tokens": tokens})
    return manifest.model_copy(update={"shards": (receipt,)})


def test_settings_of_addons_do_not_touch_sealed_scores(rolled: Run, fire: Fire) -> None:
    score(Session(rolled), 0)
    before = touched(rolled, "scores")
    assert manifest_of(rolled, "scores").fields["score"] == {
        "engine": "fake", "teacher_prompt": "shared", "entropy_topk": 20,
    }  # fmt: skip
    options = ["score.topk=5", "score.pass_rate_samples=1", "score.add=[topk, base]"]
    options += [f"base.model={rolled.config.teacher and rolled.config.teacher.model}"]
    answer = fire("score", rolled.root, *(x for o in options for x in ("--set", o)))
    assert answer.code == 0, answer.err
    assert touched(rolled, "scores") == before
    assert rolled.addons(0) == ("topk", "base")
    assert manifest_of(rolled, "addons", "topk").fields["k"] == 5


@pytest.mark.parametrize(
    ("name", "option", "field"),
    [
        ("topk", "score.topk=5", "k: 3 -> 5"),
        ("base", "base.model=TEACHER", "base.weights"),
        ("pass-rate", "score.pass_rate_samples=1", "samples: 3 -> 1"),
        ("pass-rate", "seed=0", None),
        ("pass-rate", "verify.pattern=x(.)", "verify.pattern"),
        ("topk", "verify.pattern=x(.)", None),
        ("base", "teacher.dtype=float64", None),
        ("topk", "teacher.dtype=float64", "teacher.dtype"),
    ],
)
def test_an_addon_of_other_settings_is_refused_by_name_and_made_anew_alone(
    rolled: Run, name: str, option: str, field: str | None, fire: Fire
) -> None:
    score(Session(rolled), 0, add=tuple(ADDONS))
    before = bytes_of(rolled)
    assert rolled.config.teacher is not None
    run = open_run(rolled.root, (option.replace("TEACHER", rolled.config.teacher.model),))
    if field is None:
        add_columns(Session(run), 0, name)
        assert bytes_of(rolled) == before
        return
    with pytest.raises(FingerprintError, match=re.escape(field)) as caught:
        add_columns(Session(run), 0, name)
    assert bytes_of(rolled) == before
    assert caught.value.fix == f"set them back, or: {rolled.part('addons', 0, name).command} --redo"
    add_columns(Session(run), 0, name, redo=True)
    after = bytes_of(rolled)
    assert {k for k in before if before[k] != after[k]} <= {k for k in before if k.startswith(f"addons/{name}/")}
    assert manifest_of(rolled, "addons", name).fingerprint not in str(before[f"addons/{name}/round-000/00000.parquet"])


def test_redo_of_what_is_above_sets_addons_aside_and_redo_of_an_addon_only_what_used_it(
    rolled: Run, fire: Fire
) -> None:
    def states() -> dict[str, str]:
        return {row["stage"]: row["state"] for row in fire("status", rolled.root, "--json").json}

    score(Session(rolled), 0, add=["topk", "base"])
    names = {"rollouts": None, "scores": None, "addons/base": None, "addons/topk": None}
    assert states().keys() == names.keys()
    for weights, used in (("reader", {"topk": "x"}), ("other", {"base": "x"}), ("plain", None)):
        fields = {} if used is None else {"addons": used}
        manifest = manifest_of(rolled, "scores").model_copy(
            update={"stage": "weights", "name": weights, "shards": (), "fields": fields}
        )
        path = rolled.part("weights", 0, weights).manifest_path
        path.parent.mkdir(parents=True)
        path.write_text(manifest.model_dump_json())
    answer = fire("score", rolled.root, "--add", "topk", "--redo")
    assert answer.code == 0, answer.err
    assert "set aside" in answer.err
    assert states().keys() == names.keys() | {"weights/other", "weights/plain"}
    assert set(states().values()) == {"sealed"}
    assert fire("score", rolled.root, "--redo").code == 0
    assert states().keys() == {"rollouts", "scores"}
    assert fire("score", rolled.root, "--add", "base").code == 0
    assert fire("rollout", rolled.root, "--redo").code == 0
    assert states().keys() == {"rollouts"}


def test_configured_addons_are_made_by_every_score_and_are_the_next_command_until_then(rolled: Run, fire: Fire) -> None:
    text = (rolled.root / "fire.yaml").read_text()
    score(Session(rolled), 0)
    assert next_command(rolled) == f"fire weigh {rolled.root}"
    (rolled.root / "fire.yaml").write_text(text.replace("  add: []", "  add: [pass-rate, topk]"))
    run = open_run(rolled.root)
    assert next_command(run) == f"fire score {rolled.root}"
    answer = fire("score", run.root, "--json")
    assert answer.json["topk"]["k"] == 3
    assert 0 <= answer.json["pass-rate"]["teacher_pass_rate"] <= 1
    assert run.addons(0) == ("topk", "pass-rate")
    assert next_command(run) == f"fire weigh {rolled.root}"
    shown = {row["stage"]: row for row in fire("status", run.root, "--json").json}
    assert shown["addons/topk"]["tokens"] == shown["scores"]["tokens"]
    assert {row["table"] for row in fire("inspect", run.root, "--schema", "--json").json} >= {"addons/topk"}


def test_a_fork_links_the_sealed_addons(rolled: Run, tmp_path: Path) -> None:
    score(Session(rolled), 0, add=["topk", "pass-rate"])
    arm = fork_run(rolled, tmp_path / "arm", {"weigh": {"rule": "uniform"}})
    assert arm.addons(0) == ("topk", "pass-rate")
    for name in arm.addons(0):
        mine, theirs = (shard_files(run.part("addons", 0, name)) for run in (arm, rolled))
        assert [p.stat().st_ino for p in mine] == [p.stat().st_ino for p in theirs]
    before = touched(arm, "addons")
    score(Session(arm), 0, add=["topk", "pass-rate"])
    assert touched(arm, "addons") == before
    other = fork_run(rolled, tmp_path / "other", {"rollout": {"n": 3}})
    assert other.addons(0) == ()


def test_pass_rates_equal_answers_of_the_teacher_graded_by_hand(real: Run) -> None:
    stats = add_columns(Session(real), 0, "pass-rate").stats
    frame = pl.from_arrow(pa.concat_tables([read_shard(*x) for x in _shards(real, "pass-rate")]))
    assert isinstance(frame, pl.DataFrame)
    rates = frame["teacher_pass_rate"].to_list()
    session = Session(real)
    teacher, cfg, rollouts = teacher_generator(session, "teacher"), real.config, real.rollouts(0).collect()
    by_hand: dict[str, float] = {}
    for row in rollouts.unique("prompt_id").iter_rows(named=True):
        text = "| " + "".join(f"{m['content']} " for m in row["messages"]) + "so"
        ids = session.teacher_tokenizer("teacher")(text, add_special_tokens=False)["input_ids"]
        assert ids != row["prompt_ids"]
        right = 0
        for j in range(6):
            name = hash_text(cfg.seed, "pass-rate", row["prompt_id"], j)
            request = pa.table({"trajectory_id": [name], "prompt_ids": pa.array([ids], pa.list_(pa.int32()))})
            answer = teacher.generate(request, Sampling(cfg.seed, max_new_tokens=12))["response_ids"][0].as_py()
            found = re.findall(PATTERN, session.teacher_tokenizer("teacher").decode(answer, skip_special_tokens=True))
            right += found[-1:] == [row["answer"]]
        by_hand[row["prompt_id"]] = right / 6
    assert rates == [pytest.approx(by_hand[p]) for p in rollouts["prompt_id"]]
    assert any(0 < r < 1 for r in rates), "a test of all zeros would show nothing"
    assert stats["teacher_pass_rate"] == pytest.approx(np.mean(rates))
    assert stats["never_right"] == pytest.approx(np.mean([r == 0 for r in rates]))


def _shards(run: Run, name: str) -> list[Any]:
    part, manifest = run.part("addons", 0, name), manifest_of(run, "addons", name)
    return [(part, receipt) for receipt in manifest.shards]


def test_the_teachers_answers_have_noise_of_their_own() -> None:
    names = {hash_text(0, "pass-rate", "p", j) for j in range(9)}
    assert len(names) == 9
    assert not names & {trajectory_id(0, r, "p", j) for r in range(3) for j in range(9)}


def test_a_pass_rate_without_answers_is_refused_before_anything_is_made(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt_id": "q", "prompt": "1 + 2"}\n')
    run = make_fake_run(
        tmp_path / "run",
        prompts={"path": str(tmp_path / "prompts.jsonl")},
        rollout={"prompts_per_round": 1},
    )
    assert fire("rollout", run.root).code == 0
    answer = fire("score", run.root, "--add", "pass-rate")
    assert answer.code == 3
    assert "prompt 'q' has no answer" in answer.err
    assert answer.fix.startswith("correct the prompts")
    assert not (run.root / "scores").exists()


def test_the_base_is_by_default_the_given_student_in_every_round(real: Run) -> None:
    assert real.base() is real.config.student
    session = Session(real)
    score(session, 0, add=["base"])
    frame = real.scores(0, add="base").collect()
    for ours, student in zip(frame["base_logprob"], frame["student_logprob"], strict=True):
        np.testing.assert_allclose(ours, student, atol=1e-5)
    assert session.base() is session.student(0)
    assert manifest_of(real, "addons", "base").fields["base"] == session.student_fields(0)


def test_the_base_stays_the_given_student_when_the_student_was_trained(tmp_path: Path, make_run: MakeRun) -> None:
    from fire_data.steps.refresh import refresh

    run = make_run(
        tmp_path / "run", score={"add": ["base"]}, eval={"prompts": None}, weigh={"rule": "uniform"},
        train={"batch_size": 4, "lr": 1e-2, "export_dtype": "float32"},
        rollout={"prompts_per_round": 2, "max_new_tokens": 8},
    )  # fmt: skip
    refresh(Session(run), 2)
    later = run.scores(1, add="base").collect()
    off = [
        abs(a - b)
        for x, y in zip(later["base_logprob"], later["student_logprob"], strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    assert max(off) > 1e-3, "the student has moved"
    from fire_data.models import load_model
    from fire_data.scoring import TransformersEvaluator

    session = Session(run)
    model = load_model(run.config.student, run.root)
    expected = TransformersEvaluator(model, session.vocabulary, 1, 1).evaluate(
        pa.concat_tables([read_shard(run.part("rollouts", 1), r) for r in sealed(run.part("rollouts", 1)).shards])
    )
    for ours, theirs in zip(later["base_logprob"].to_list(), expected["logprob"].to_pylist(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    fields = [sealed(run.part("addons", r, "base")).fields["base"] for r in (0, 1)]
    assert fields[0] == fields[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [("words", "gives ids another meaning than the student's"), ("rows", "which the base model lacks")],
)
def test_a_base_that_reads_ids_otherwise_is_refused(
    rolled: Run, tmp_path: Path, fire: Fire, change: str, words: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(rolled.config.student.model, base)
    name = {"words": "tokenizer.json", "rows": "config.json"}[change]
    spec = json.loads((base / name).read_text())
    if change == "words":
        vocab = spec["model"]["vocab"]
        vocab["so"], vocab["then"] = vocab["then"], vocab["so"]
    else:
        spec["vocab_size"] = 12
    (base / name).write_text(json.dumps(spec))
    answer = fire("score", rolled.root, "--add", "base", "--set", f"base.model={base}")
    assert answer.code not in (0, 1), answer.err
    assert words in answer.err
    assert "base" in answer.fix
    assert not list(rolled.root.glob("addons/base/*/*"))


def test_a_base_may_read_prompt_ids_that_only_the_student_has(
    tmp_path: Path, tiny_world: Any, make_fake_run: MakeRun
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_world.teacher, teacher)
    spec = json.loads((teacher / "tokenizer.json").read_text())
    lost = spec["model"]["vocab"].pop("<user>")
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["id"] != lost]
    (teacher / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((teacher / "tokenizer_config.json").read_text())
    kept = {k: v for k, v in config.items() if "<user>" not in json.dumps(v)}
    (teacher / "tokenizer_config.json").write_text(json.dumps(kept))
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    run = make_fake_run(
        tmp_path / "run",
        teacher={"model": str(teacher), "chat_template": str(tmp_path / "template.jinja")},
        score={"teacher_prompt": "own"},
    )
    rollout(Session(run), 0)
    assert all(lost in ids for ids in run.rollouts(0).collect()["prompt_ids"].to_list())
    assert not Session(run).base_vocabulary.allowed[lost]
    score(Session(run), 0, add=["base", "topk"])
    assert run.addons(0) == ("topk", "base")


def test_another_base_gives_its_own_logprobs(real: Run) -> None:
    assert real.config.teacher is not None
    run = open_run(real.root, (f"base.model={real.config.teacher.model}", "score.teacher_prompt=shared"))
    score(Session(run), 0, add=["base"])
    frame = run.scores(0, add="base").collect()
    for ours, teacher in zip(frame["base_logprob"], frame["teacher_logprob"], strict=True):
        np.testing.assert_allclose(ours, teacher, atol=1e-5)
    assert frame["base_logprob"].to_list() != frame["student_logprob"].to_list()
