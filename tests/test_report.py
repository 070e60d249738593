"""What a report shows: which trajectories, which numbers, no secret, no markup of a model's, never more than 10 MB."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

pytest.importorskip("transformers")
pytest.importorskip("jinja2")

from fire_data import files
from fire_data.compare import plot
from fire_data.harmless import shown
from fire_data.report import data, page, sample, settings, write_report
from fire_data.report.data import drop_reasons, histogram, kept_by, rounds
from fire_data.report.measure import COLUMNS, PARTS, Tally
from fire_data.report.page import as_json
from fire_data.report.plots import PAINT, filter_histogram, kept_bars, painted
from fire_data.report.tables import open_tables
from fire_data.report.text import joined
from fire_data.report.trajectories import load_words
from fire_data.run import Run, open_run
from fire_data.schemas.config import Config
from fire_data.schemas.errors import ConfigError, DamagedError, IncompleteError, StorageError
from fire_data.schemas.tables import JOINT, conform
from fire_data.stages import Stage, plan_shards, run_stage
from fire_data.steps.compare import compare
from fire_data.tokenview import Piece
from tests.conftest import Answer, edit_record, flip, shard_files
from tests.reported import Row, make_report_run, many

Fire = Callable[..., Answer]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """40 trajectories in five shards, filtered and weighed by `fire`."""
    return make_report_run(tmp_path_factory.mktemp("report") / "run", many(40))


@pytest.fixture(scope="module")
def html(run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(run, tmp_path_factory.mktemp("page") / "report.html").path.read_text(encoding="utf-8")


def index(html: str) -> dict[str, Any]:
    """What the page's script starts with."""
    found: dict[str, Any] = json.loads(re.findall(r'id="index">(.*?)</script>', html, re.S)[0])
    return found


def blocks(html: str) -> list[dict[str, Any]]:
    """The trajectories of a page."""
    return [json.loads(b) for b in re.findall(r'class="trajectory">(.*?)</script>', html, re.S)]


def tallied(run: Run, name: str | None = None) -> Tally:
    tables, tally = open_tables(run, 0, name), Tally()
    for shard in range(len(tables)):
        tally.add(tables.read(shard, COLUMNS), shard)
    return tally


def whole(run: Run) -> pl.DataFrame:
    return run.weights(round=0).collect()


# --- the numbers of the plots --------------------------------------------------------------------------------------


def test_concentration_and_effective_share_are_those_of_the_sorted_coefficients(run: Run) -> None:
    tally = tallied(run)
    sizes = np.sort(np.abs(whole(run)["coefficient"].explode().to_numpy().astype(np.float64)))[::-1]
    held = np.concatenate([[0.0], np.cumsum(sizes) / sizes.sum()])
    for point in tally.concentration():
        exact = np.interp(point["tokens"] * len(sizes), np.arange(len(sizes) + 1), held)
        assert point["mass"] == pytest.approx(exact, abs=1e-3)
    effective = sizes.sum() ** 2 / (sizes**2).sum() / len(sizes)
    assert tally.effective_signal_share == pytest.approx(effective, rel=1e-5)


def test_the_effective_signal_is_the_one_that_compare_names_so(run: Run, html: str) -> None:
    (rule,) = compare(run, 0, "fire")["rules"]
    share = f"{100 * rule['effective_signal_share']:.3g} %"
    assert f"<dt>effective signal</dt><dd>{share}</dd>" in html
    assert f"<td>{share}</td></tr>" in html
    assert "effective sample" not in html


def test_the_plane_counts_every_kept_token_once_in_its_cell_with_its_weight(run: Run) -> None:
    plane = tallied(run).plane
    assert plane is not None
    kept = whole(run).filter("keep")
    entropies = [kept[f"{who}_entropy"].explode().to_numpy() for who in ("teacher", "student")]
    weight = kept["weight"].explode().to_numpy()
    assert plane.tokens.sum() == len(weight)
    assert np.nansum(plane.tokens * plane.mean_weight) == pytest.approx(weight.sum(), rel=1e-6)
    assert all(values.max() < edges[-2] for values, edges in zip(entropies, plane.edges, strict=True)), "none beyond"
    by_hand, _, _ = np.histogram2d(entropies[0], entropies[1], bins=plane.edges)
    moved = np.abs(by_hand - plane.tokens).sum()
    assert moved <= 4, "but for a token on an edge, cells hold what lies between their edges"
    assert plane.tokens.shape[0] > 3


def test_positions_are_means_by_twentieths(run: Run) -> None:
    found = tallied(run).positions()
    sums = np.zeros((2, PARTS))
    for row in whole(run).iter_rows(named=True):
        for i, weight in enumerate(row["weight"]):
            sums[:, i * PARTS // len(row["weight"])] += 1, weight * row["keep"]
    expected = sums[1] / sums[0] / (sums[1].sum() / sums[0].sum())
    assert [p["weight"] for p in found] == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_tally_does_not_depend_on_how_rows_are_cut_into_shards(tmp_path: Path) -> None:
    one = tallied(make_report_run(tmp_path / "one", many(16), rows_per_shard=16))
    rows = make_report_run(tmp_path / "again", many(16), rows_per_shard=16).weights(round=0).collect()
    two = Tally()
    for shard, part in enumerate((rows[:5], rows[5:6], rows[6:])):
        two.add(part, shard)
    assert one.concentration() == two.concentration()
    for ours, theirs in zip(one.positions(), two.positions(), strict=True):
        assert ours == pytest.approx(theirs)
    assert one.rows.drop("shard", "row").equals(two.rows.drop("shard", "row"))


def test_the_histogram_holds_every_trajectory_once_and_its_bars_are_where_they_say(run: Run) -> None:
    rows = tallied(run).rows
    found = histogram(rows)
    assert found is not None
    assert sum(b["trajectories"] for b in found["bars"] if b["kept"]) == rows["keep"].sum()
    for bar in found["bars"][1:]:
        inside = pl.col("mean_teacher_logprob").is_between(bar["from"], bar["to"], closed="left")
        assert rows.filter(inside & (pl.col("keep") == bar["kept"])).height == bar["trajectories"]


def test_kept_shares_are_those_of_the_groups(run: Run) -> None:
    rows = tallied(run).rows
    found = {(g["by"], g["group"]): g for g in kept_by(rows)}
    right = rows.filter(pl.col("reward") == 1)
    assert found["outcome", "correct"]["kept"] == right["keep"].mean()
    assert found["teacher", "math"]["trajectories"] == 20
    assert sum(g["trajectories"] for (by, _), g in found.items() if by == "length") == 40
    assert sum(r["trajectories"] for r in drop_reasons(rows)) == (~rows["keep"]).sum() > 0


def test_rounds_have_the_numbers_of_their_tables(tmp_path: Path) -> None:
    run = make_report_run(tmp_path / "run", many(16), rounds=2)
    first, second = rounds(run, None)
    scores = run.scores(0).collect()
    assert (first["trained"], second["trained"]) == (0, 1)
    assert first["length"] == scores["length"].mean()
    assert first["truncated"] == (scores["finish_reason"] == "length").mean()
    assert first["reverse_kl"] == pytest.approx(scores["reverse_kl"].explode().mean(), rel=1e-5)
    assert first["student_entropy"] == pytest.approx(scores["student_entropy"].explode().mean(), rel=1e-5)
    assert first["kept_fraction"] == run.weights(round=0).collect()["keep"].mean()
    assert first["reverse_kl"] != second["reverse_kl"]


def tiles(path: Path) -> dict[str, tuple[str, str]]:
    """The numbers in the head of a page, each with its note."""
    found = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd><dd class=\"note\">(.*?)</dd>", path.read_text())
    return {label: (value, note) for label, value, note in found}


def test_accuracy_is_that_of_the_student_after_as_many_rounds(tmp_path: Path) -> None:
    run = make_report_run(tmp_path / "run", many(8), rounds=2)
    for place, rewards in (("start", [0.0, 0.0, 1.0, 0.0]), (0, [1.0, 1.0, 1.0, 0.0])):
        table = pa.table({
            "prompt_id": ["a", "b", "a", "b"], "mode": ["greedy", "greedy", "sampled", "sampled"], "sample": [0] * 4,
            "response": ["6"] * 4, "answer": ["6"] * 4, "reward": pa.array(rewards, pa.float32()), "length": [1] * 4,
            "finish_reason": ["stop"] * 4,
        })  # fmt: skip
        part = run.part("evals", place)
        run_stage(Stage(part, {}, plan_shards(4, 4)), lambda _, table=table: conform(table, "evals", "by hand"))
    found = [{k: v for k, v in r.items() if k.startswith(("trained", "accuracy"))} for r in rounds(run, None)]
    assert found == [
        {"trained": 0, "accuracy_greedy": 0.0, "accuracy_sampled": 0.5},
        {"trained": 1, "accuracy_greedy": 1.0, "accuracy_sampled": 0.5},
    ]
    first, second = (write_report(run, tmp_path / f"{n}.html", round=n).path for n in (0, 1))
    assert tiles(first)["accuracy, greedy"] == ("100 %", "after training on this round; before it 0 %")
    assert tiles(second)["accuracy, greedy"] == ("100 %", "before training on this round")
    assert "at the start" not in tiles(first)["KL to the teacher"][1]
    assert "at the start" in tiles(second)["KL to the teacher"][1]
    assert "There is no evaluation yet" not in first.read_text()


def test_a_divergence_that_no_engine_gave_is_estimated_and_said_to_be(tmp_path: Path) -> None:
    run = make_report_run(tmp_path / "run", many(8), without=JOINT)
    (row,) = rounds(run, None)
    scores = run.scores(0).collect()
    estimate = scores["student_logprob"].explode().mean() - scores["teacher_logprob"].explode().mean()
    assert row["reverse_kl"] == pytest.approx(estimate, rel=1e-5)
    assert "estimated from sampled tokens" in write_report(run, tmp_path / "report.html").path.read_text()


# --- which trajectories --------------------------------------------------------------------------------------------


def test_every_stratum_and_every_extreme_is_shown(run: Run) -> None:
    rows = tallied(run).rows
    found = sample.choose(rows, 24)
    everything = sample.choose(rows, 40).rows
    assert found.rows.height == 24
    assert found.total == 40
    assert found.rows["stratum"].n_unique() == everything["stratum"].n_unique() == found.strata > 6
    for column, largest in sample.ORDERS.values():
        most = rows.sort(column, descending=largest)[column][0]
        assert most in found.rows[column], column
    assert "24" not in found.how
    assert "strata" in found.how


def test_the_choice_is_the_same_whatever_the_order_of_rows(run: Run) -> None:
    rows = tallied(run).rows
    ids = sample.choose(rows, 12).rows["trajectory_id"].to_list()
    assert sample.choose(rows.reverse(), 12).rows["trajectory_id"].to_list() == ids
    assert sample.choose(rows, 20).rows["trajectory_id"].to_list()[:12] == ids


def test_short_trajectories_are_shown_in_larger_number_up_to_the_tokens_of_24_long_ones() -> None:
    def rows(length: int) -> pl.DataFrame:
        names = [f"{i:04}" for i in range(500)]
        return pl.DataFrame({"trajectory_id": names, "length": length, "reward": None, "teacher": None})

    assert sample.choose(rows(5000)).rows.height == sample.FEW
    assert sample.choose(rows(600)).rows.height == sample.FEW * sample.TOKENS // 600
    assert sample.choose(rows(3)).rows.height == sample.MANY


def test_rounds_are_paired_by_prompt_and_sample_else_by_stratum(tmp_path: Path) -> None:
    run = make_report_run(tmp_path / "run", many(16), rounds=2)
    write_report(run, tmp_path / "both.html", round=1, against=0)
    found = blocks((tmp_path / "both.html").read_text())
    assert len(found) == 16
    for both in found:
        assert [both["b"]["facts"][k] for k in ("prompt_id", "sample")] == [
            both["a"]["facts"][k] for k in ("prompt_id", "sample")
        ]
        assert (both["a"]["facts"]["round"], both["b"]["facts"]["round"]) == (1, 0)
    one, other = many(16), [Row(**{**r.__dict__, "prompt_id": f"q{r.prompt_id}"}) for r in many(16)]
    make_report_run(tmp_path / "alien", other)
    alien = make_report_run(tmp_path / "foreign", one)
    for stage in ("rollouts", "scores", "weights/fire"):  # round 1 of one run is round 0 of another
        for top in ("", ".fire/receipts/"):
            (tmp_path / "alien" / top / stage / "round-000").rename(alien.root / top / stage / "round-001")
        manifests = ".fire/manifests"
        source = tmp_path / "alien" / manifests / stage / "round-000.json"
        source.rename(alien.root / manifests / stage / "round-001.json")
        edit_record(alien.root / manifests / stage / "round-001.json", round=1)
    write_report(alien, tmp_path / "apart.html", round=0, against=1)
    html = (tmp_path / "apart.html").read_text()
    assert "share no prompt" in html
    for both in blocks(html):
        if both["b"] is not None:
            assert both["a"]["facts"]["prompt_id"] != both["b"]["facts"]["prompt_id"]
            same = ("keep", "outcome", "teacher")
            assert [both["a"]["facts"][k] for k in same] == [both["b"]["facts"][k] for k in same]


# --- the page ------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_page_are_those_of_the_tables_to_six_digits(run: Run, html: str) -> None:
    rows = {r["trajectory_id"]: r for r in whole(run).iter_rows(named=True)}
    words = load_words(run)
    for block in blocks(html):
        row, made = rows[block["a"]["facts"]["id"]], block["a"]
        assert made["ids"] == row["response_ids"]
        assert "".join(text for text, _ in made["pieces"]) == words.tokenizer.decode(row["response_ids"])
        assert sum(count for _, count in made["pieces"]) == len(row["response_ids"])
        assert {"weight", "coefficient", "advantage", "teacher_logprob", "student_rank"} <= made["columns"].keys()
        for name, values in made["columns"].items():
            assert values == [float(f"{v:.6g}") for v in row[name]], name


def test_the_same_run_gives_the_same_bytes(run: Run, html: str, tmp_path: Path) -> None:
    again = write_report(open_run(run.root), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html
    assert again.bytes == len(html.encode())


def test_a_page_never_exceeds_its_limit_and_says_how_many_it_shows(
    run: Run, html: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = len(html.encode()) - 40_000
    monkeypatch.setattr(page, "MOST_BYTES", limit)
    made = write_report(run, tmp_path / "less.html")
    less = (tmp_path / "less.html").read_text(encoding="utf-8")
    assert made.bytes == len(less.encode()) <= limit
    assert 1 < made.trajectories == len(blocks(less)) == len(index(less)["entries"]) < 40
    assert f"{made.trajectories} of 40: the first of" in less
    shown = [b["a"]["facts"]["id"] for b in blocks(html)]
    assert [b["a"]["facts"]["id"] for b in blocks(less)] == shown[: made.trajectories]


def test_long_responses_are_cut_and_keep_whole_characters(tmp_path: Path) -> None:
    text = "x" * 1_499 + "🙂" + "y" * 50
    run = make_report_run(tmp_path / "run", [Row(text, prompt="q" * 9_000)])
    write_report(run, tmp_path / "report.html")
    (block,) = blocks((tmp_path / "report.html").read_text())
    assert block["a"]["pieces"][-1] == ["🙂", 1]
    assert len(block["a"]["ids"]) == len(block["a"]["columns"]["weight"]) == 1_500
    assert block["a"]["facts"]["length"] == 1_499 + 4 + 50
    assert block["a"]["prompt"] == [["user", "q" * 4_000 + "…"]]
    assert block["a"]["prompt_cut"] is True


def test_nothing_a_model_wrote_can_end_a_block_or_begin_markup() -> None:
    text = as_json({"a": "</script><script>alert(1)</script><!-- &amp; \u2028 \u202e é"})
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text)["a"].startswith("</script>")


def test_other_weights_stand_beside_with_their_own_numbers_only(tmp_path: Path) -> None:
    other = make_report_run(tmp_path / "run", many(16), others=["uniform"])
    write_report(other, tmp_path / "two.html", against="uniform")
    html = (tmp_path / "two.html").read_text()
    assert index(html)["names"] == ["fire", "uniform"]
    for block in blocks(html):
        assert block["b"].keys() == {"facts", "columns"}
        assert set(block["b"]["columns"]) == {"weight", "advantage", "coefficient"}
        assert set(block["b"]["columns"]["weight"]) == {1}
        assert block["b"]["facts"]["keep"] is True
    with pytest.raises(ConfigError, match="what the report is about"):
        write_report(other, tmp_path / "no.html", against="fire")
    with pytest.raises(IncompleteError) as raised:
        write_report(other, tmp_path / "no.html", against="tip")
    assert "--rule tip" in str(raised.value.fix)
    assert not (tmp_path / "no.html").exists()


def test_rewards_that_were_added_take_the_place_of_those_of_the_rollouts(tmp_path: Path) -> None:
    run = make_report_run(tmp_path / "run", many(8))
    table = pa.table({
        "trajectory_id": run.scores(0).collect()["trajectory_id"].to_list(),
        "reward": pa.array([1.0] * 8, pa.float32()), "extracted": ["<b>6</b>"] * 8, "verdict": ["right"] * 8,
    })  # fmt: skip
    part = run.part("addons", 0, "reward")
    run_stage(Stage(part, {"rollouts": "by hand"}, plan_shards(8, 8)), lambda _: conform(table, part.table, "x"))
    write_report(run, tmp_path / "report.html")
    found = blocks((tmp_path / "report.html").read_text())
    assert {b["a"]["facts"]["outcome"] for b in found} == {"correct"}
    assert {b["a"]["facts"]["extracted"] for b in found} == {"<b>6</b>"}


def test_damage_is_told_and_the_old_report_stays(tmp_path: Path) -> None:
    run = make_report_run(tmp_path / "run", many(8))
    target = run.root / "report.html"
    target.write_text("old")
    flip(shard_files(run.part("scores", 0))[0], 3000)
    with pytest.raises(DamagedError):
        write_report(run)
    assert target.read_text() == "old"


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(StorageError, match="disk is full"):
        write_report(run, target)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# --- text, figures, settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\x1b[31mred\x1b[0m", r"a\x1b[31mred\x1b[0m"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("line\nnext\tcell\r", "line\nnext\tcell\\r"),
        ("👩‍👩‍👧 שלום e\u0301", "👩‍👩‍👧 שלום e\u0301"),
        ("\x00\x7f\x9b\ufeff\uffff", r"\x00\x7f\x9b\ufeff\uffff"),
    ],
)
def test_control_characters_and_marks_are_shown_and_text_of_all_scripts_is_left_alone(text: str, seen: str) -> None:
    assert shown(text) == seen
    assert shown(shown(text)) == seen
    assert shown("abcdef", 3) == "abc…"


@pytest.mark.parametrize(
    ("tokens", "characters"),
    [
        (["👩", "\u200d", "👩", "\u200d👧", "x"], ["👩\u200d👩\u200d👧", "x"]),
        (["👍", "🏽", "🇩", "🇪", "🇫", "🇷"], ["👍🏽", "🇩🇪", "🇫🇷"]),
        (["e", "\u0301", "", "a"], ["e\u0301", "a"]),
        ([" a", "b"], [" a", "b"]),
    ],
)
def test_what_people_see_as_one_character_is_one_piece(tokens: list[str], characters: list[str]) -> None:
    pieces = [Piece(text, i, i + 1) for i, text in enumerate(tokens)]
    found = joined(pieces)
    assert [p.text for p in found] == characters
    assert [p.start for p in found] == [0, *(p.stop for p in found[:-1])]
    assert found[-1].stop == len(tokens)


@pytest.mark.parametrize(
    "inside",
    [
        "<script>alert(1)</script>",
        '<image href="x"/>',
        '<path onclick="x" d=""/>',
        '<g style="x"/>',
        "<foreignObject/>",
    ],
)
def test_a_figure_with_more_than_shapes_and_text_is_refused(inside: str) -> None:
    with pytest.raises(ValueError, match="a figure holds"):
        painted(f"<svg>{inside}</svg>")


def test_figures_follow_the_theme_and_hold_hostile_names_as_text() -> None:
    name = '</text><script>alert(1)</script>" onload="x'
    groups = [{"by": "teacher", "group": name, "trajectories": 3, "kept": 0.5}]
    svg = kept_bars(groups)
    assert "&lt;/text&gt;" in svg
    assert "<script" not in svg
    assert "var(--kept)" in svg
    bars = [{"from": -1.0, "to": -0.5, "kept": True, "trajectories": 2}]
    assert not any(colour in filter_histogram({"bars": bars, "weighed": True}) for colour in PAINT.values())


def test_control_characters_in_a_figure_do_not_end_the_process(run: Run) -> None:
    found = compare(run, 0, "fire,uniform")
    told = json.loads(json.dumps(found).replace("uniform", "a\\u0007b"))
    assert "\x07" in told["rules"][1]["rule"]
    drawn = json.dumps(plot.drawable(plot.figure(told)))
    assert r"\u0007" not in drawn, "the renderer would abort"
    assert r"a\x07b" in plot.svg(told)
    assert r"a\x07b" in kept_bars([{"by": "teacher", "group": "a\x07b", "trajectories": 3, "kept": 0.5}])


def test_settings_show_no_secret_and_what_differs_from_the_defaults() -> None:
    config = Config.model_validate({
        "student": {"model": "s", "url": "http://user:hunter2@host/v1?api_key=hunter2&x=1", "api_key_env": "MY_KEY"},
        "teacher": {"model": "t", "chat_template_kwargs": {"note": "hf_abcdefghijklmnopqrst"}},
        "vllm": {"args": {"hf_token": "hunter2", "nested": {"password": 7, "list": ["sk-abcdefghijklmnop"]}}},
        "train": {"lr": 0.5},
    })  # fmt: skip
    rows = {r["key"]: r for r in settings.settings(config)}
    text = json.dumps(list(rows.values()))
    assert not re.search(r"hunter2|hf_abc|sk-abc|\b7\b", text)
    assert "host/v1" in rows["student.url"]["value"]
    assert rows["student.api_key_env"]["value"] == "MY_KEY"
    assert rows["weigh.end_token"]["value"] == "keep"
    changed = {k for k, r in rows.items() if r["changed"]}
    assert {"train.lr", "student.url", "teacher.model", "vllm.args.hf_token"} <= changed
    assert not {"train.clip", "teacher.dtype", "score.tokens_per_batch"} & changed
    assert rows["score.tokens_per_batch"]["value"] == 8192


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_the_report_and_names_it(run: Run, fire: Fire, tmp_path: Path) -> None:
    answer = fire("report", run.root, "--out", tmp_path / "a.html", "--trajectories", "3", "--json")
    assert answer.code == 0, answer.err
    assert answer.json == {
        "path": str(tmp_path / "a.html"), "bytes": (tmp_path / "a.html").stat().st_size,
        "round": 0, "trajectories": 3, "tokens": answer.json["tokens"], "of": 40,
    }  # fmt: skip
    assert answer.err.strip().endswith(str(tmp_path / "a.html"))
    plain = fire("report", run.root, "--out", tmp_path / "a.html")
    assert "40 of 40 trajectories of round 0" in plain.err
    assert plain.out == ""


def test_the_command_says_what_is_missing_and_how_to_make_it(
    make_fake_run: Callable[..., Run], tmp_path: Path, fire: Fire
) -> None:
    run = make_fake_run(tmp_path / "run")
    answer = fire("report", run.root)
    assert answer.code == 4
    assert answer.fix == f"fire rollout {run.root} --round 0"
    assert fire("rollout", run.root).code == 0
    assert fire("report", run.root, "--name", "tip").code == 4
    assert fire("report", run.root, "--trajectories", "0").code == 2
    answer = fire("report", run.root)
    assert answer.code == 0
    html = (run.root / "report.html").read_text()
    assert f"fire score {run.root} --round 0" in html
    assert f"fire eval {run.root}" in html


@pytest.mark.parametrize(("count", "words"), [(1, "1 that lies below it"), (2, "2 that lie below it")])
def test_the_first_bar_says_what_lies_below_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, words: str
) -> None:
    monkeypatch.setattr(data, "histogram", lambda rows: {**(histogram(rows) or {}), "below": count})
    assert f"The first bar also holds {words}." in write_report(run, tmp_path / "a.html").path.read_text()


def test_weights_of_no_round_are_answered_with_those_that_are_there(tmp_path: Path, fire: Fire) -> None:
    run = make_report_run(tmp_path / "run", many(8), others=["uniform"])
    for command in ("report RUN --name", "report RUN --against", "inspect RUN --name", "explain RUN 0 --name",
                    "diagnose RUN --name"):  # fmt: skip
        asked = command.replace("RUN", str(run.root)).split()
        answer = fire(*asked, "unifrom")
        assert answer.code == 4
        assert "there are no weights 'unifrom'; there are: uniform, fire" in answer.err, "the nearest first"
        assert answer.fix.startswith("one of these; ")
        assert fire(*asked, "tip").fix == f"fire weigh {run.root} --round 0 --rule tip", "a rule's name is no slip"


def test_without_the_extra_the_command_says_what_to_install(
    run: Run, fire: Fire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "vl_convert", None)
    answer = fire("report", run.root, "--out", tmp_path / "a.html")
    assert answer.code == 2
    assert "pip install 'fire-opd[report]'" in answer.fix
