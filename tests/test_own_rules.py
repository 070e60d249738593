"""A rule of a user's own works wherever a built-in one works, and its mistakes are told in words."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import fire_data as fd
from fire_data.rules import Statistic, make_rule, own
from fire_data.schemas.errors import ConfigError, DataError
from tests.ragged import ragged

HEAD = """from dataclasses import dataclass
import polars as pl
from fire_data.rules import Parts, Rule, Statistic

S = pl.col("student_entropy")

"""
SHARP = '''@dataclass(frozen=True)
class Sharp(Rule):
    """weight: 1 + gain where H_S > share of its maximum over the step."""
    gain: float = 1.0
    share: float = 0.5

    def statistics(self):
        return (Statistic("highest", S, "max"),)

    def parts(self):
        return Parts(weight=1 + self.gain * (S > self.share * pl.col("highest")))
'''


def _file(folder: Path, text: str, name: str = "mine.py") -> str:
    path = folder / name
    path.write_text(HEAD + text, encoding="utf-8")
    return str(path)


def _body(parts: str) -> str:
    return f"@dataclass(frozen=True)\nclass Mine(Rule):\n    def parts(self):\n        return {parts}\n"


def _sharp_weights(frame: pl.DataFrame, size: int, gain: float, share: float = 0.5) -> list[np.ndarray]:
    entropies = [np.array(x) for x in frame["student_entropy"].to_list()]
    highest = [max(x.max() for x in entropies[i // size * size : i // size * size + size]) for i in range(len(frame))]
    return [1 + gain * (x > share * m) for x, m in zip(entropies, highest, strict=True)]


def test_a_rule_in_a_file_computes_what_it_says_with_its_parameters(tmp_path: Path) -> None:
    frame = ragged(12, seed=1)
    for name, params in ((_file(tmp_path, SHARP), {}), (f"{tmp_path}/mine.py:Sharp", {"gain": 3.0})):
        mine = fd.weigh(frame, name, batch_size=4, **params).collect()
        expected = _sharp_weights(frame, 4, params.get("gain", 1.0))
        for row, want in zip(mine["weight"].to_list(), expected, strict=True):
            np.testing.assert_allclose(row, want, rtol=1e-6)


def test_a_rule_in_a_file_runs_in_every_command(
    tmp_path: Path, make_fake_run: Callable[..., Any], fire: Callable[..., Any]
) -> None:
    name = f"{_file(tmp_path, SHARP)}:Sharp"
    run = make_fake_run(tmp_path / "run")
    assert fire("rules", name).code == 0
    assert fire("rollout", run.root).code == 0
    assert fire("score", run.root).code == 0
    answer = fire("weigh", run.root, "--rule", f"fire+{name}", "-p", "sharp.gain=2", "--json")
    assert answer.code == 0, answer.err
    weights = run.weights("fire+sharp", round=0).collect()
    fire_alone = fd.weigh(run.scores(0), "fire-filter", batch_size=4).collect()
    assert weights["keep"].to_list() == fire_alone["keep"].to_list()
    assert fire("compare", run.root, "--rules", f"uniform,{name}").code == 0


def test_a_rule_in_fire_yaml_is_named_relative_to_the_run(
    tmp_path: Path, make_fake_run: Callable[..., Any], fire: Callable[..., Any]
) -> None:
    _file(tmp_path, SHARP)
    run = make_fake_run(tmp_path / "run", weigh={"rule": "../mine.py:Sharp", "params": {"gain": 2}})
    for command in ("rollout", "score", "weigh"):
        answer = fire(command, run.root)
        assert answer.code == 0, answer.err
    assert (run.root / "weights" / "sharp" / "round-000").is_dir()


def test_a_changed_rule_is_another_rule(
    tmp_path: Path, make_fake_run: Callable[..., Any], fire: Callable[..., Any]
) -> None:
    name = _file(tmp_path, SHARP)
    run = make_fake_run(tmp_path / "run", weigh={"rule": name})
    assert [fire(c, run.root).code for c in ("rollout", "score", "weigh", "weigh")] == [0, 0, 0, 0]
    _file(tmp_path, SHARP.replace("S > self.share", "S >= self.share"))
    again = fire("weigh", run.root)
    assert again.code == 2
    assert "code.sharp" in again.err
    assert fire("weigh", run.root, "--redo").code == 0


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (_body('Parts(weight=pl.col("student_entrpy"))'), ConfigError, "did you mean 'student_entropy'"),
        (_body("Parts(weight=S - 100)"), DataError, "weight is negative"),
        (_body("Parts(weight=S.head(3))"), ConfigError, "length 3"),
        (_body("Parts(weight=(S - 100).log())"), DataError, "weight is not finite"),
        (_body("Parts(advantage=pl.lit(None))"), DataError, "advantage is not finite"),
        (_body("Parts(advantage=S * 1e300)"), DataError, "not finite"),
        (_body('Parts(token_keep=pl.when(pl.col("position") > 0).then(True))'), DataError, "neither true nor false"),
        (_body("Parts(weight=S / S.max())"), ConfigError, "aggregates over the table \\(max\\)"),
        (_body("Parts(keep=pl.col('length') >= pl.len())"), ConfigError, "aggregates over the table \\(len\\)"),
        (_body("Parts(weight=S / S.max().over('step'))"), ConfigError, "over neither '_row' nor '_group'"),
        (_body("Parts(weight=S.shift(1).fill_null(0))"), ConfigError, "depends on which rows are read together"),
        (_body("Parts(weight=2.0)"), ConfigError, "weight is 2.0, not an expression"),
        (_body("Parts(keep=pl.lit(None))"), DataError, "keep of the rule mine is neither true nor false"),
        (_body("Parts(weight=pl.lit(1e30), advantage=pl.lit(1e30))"), DataError, "coefficient is not finite"),
        (_body("Parts(weight=S.map_batches(lambda s: 1 / 0))"), ConfigError, "ZeroDivisionError|cannot be computed"),
        ("raise SystemExit(0)\n", ConfigError, "line 7: SystemExit"),
        (SHARP.replace('"max"', '"median"'), ConfigError, "reduce of a statistic is one of"),
        (SHARP.replace('"max")', '"max", "batch")'), ConfigError, "scope of a statistic is one of"),
        (SHARP.replace('"max")', '"quantile")'), ConfigError, "a quantile needs `at`"),
        (SHARP.replace('"highest"', '"_highest"'), ConfigError, "begins with _"),
        (SHARP.replace("gain: float = 1.0", "gain: pl.Expr = None"), ConfigError, "type that cannot be checked"),
        (_body('Parts(weight=pl.col("prompt_id"))'), ConfigError, "gives String"),
        (_body("Parts(keep=S > 1)"), ConfigError, "once per trajectory"),
        (_body("Parts(weight=1 / 0)"), ConfigError, "line 10: ZeroDivisionError"),
        (_body("S"), ConfigError, "gives no Parts"),
        ("class Mine(Rule):\n    def parts(self):\n        return Parts()\n", ConfigError, "not a frozen dataclass"),
        ("class Mine:\n    pass\n", ConfigError, "has 0 rules"),
        ("def broken(:\n", ConfigError, "SyntaxError"),
        ("import nosuchmodule\n", ConfigError, "line 7: ModuleNotFoundError"),
        (SHARP.replace('"highest"', '"student_entropy"'), ConfigError, "is called 'student_entropy', as a column is"),
        (SHARP.replace('pl.col("highest")', 'pl.col("higest")'), ConfigError, "did you mean 'highest'"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_rule_is_told(tmp_path: Path, body: str, error: type[Exception], words: str) -> None:
    name = _file(tmp_path, body)
    with pytest.raises(error, match=words):
        fd.weigh(ragged(12, seed=2), name, batch_size=4).collect()


def test_a_mistake_names_the_file_or_the_row(tmp_path: Path) -> None:
    name = _file(tmp_path, _body("Parts(weight=S - S.over('_row').max())".replace("S.over('_row').max()", "100")))
    with pytest.raises(DataError) as caught:
        fd.weigh(ragged(4, seed=3), name).collect()
    assert caught.value.where is not None
    assert caught.value.where.startswith("row 0, trajectory ")
    assert caught.value.fix == f"correct the class Mine in {name}"


@pytest.mark.parametrize("name", ["nosuch.py", "nosuch.py:Rule", "."])
def test_a_file_that_is_not_there_is_told(tmp_path: Path, name: str) -> None:
    words = "no rule '.'" if name == "." else "cannot be read: No such file"
    with pytest.raises(ConfigError, match=words):
        make_rule(f"{tmp_path}/{name}" if name != "." else ".")


def test_a_file_of_several_rules_needs_the_class(tmp_path: Path) -> None:
    name = _file(tmp_path, SHARP + "\n\n" + SHARP.replace("Sharp", "Sharper"))
    with pytest.raises(ConfigError, match="has 2 rules: Sharp, Sharper"):
        make_rule(name)
    assert make_rule(f"{name}:Sharper").name == "sharper"
    with pytest.raises(ConfigError, match="there is no Blunt"):
        make_rule(f"{name}:Blunt")


def test_two_rules_of_one_name_are_not_one(tmp_path: Path) -> None:
    one, other = _file(tmp_path, SHARP, "one.py"), _file(tmp_path, SHARP, "other.py")
    named = _file(tmp_path, SHARP.replace("    gain", "    name = 'fire'\n    gain"), "named.py")
    for text in (f"{one}+{other}", f"fire+{named}"):
        with pytest.raises(ConfigError, match="two of the rules are called"):
            make_rule(text)


@pytest.mark.parametrize("folder", ["lr=1e-5", "a+b", "with blank", "x=1+y"])
def test_a_path_may_hold_what_paths_hold(
    tmp_path: Path, folder: str, make_fake_run: Callable[..., Any], fire: Callable[..., Any]
) -> None:
    place = tmp_path / folder
    place.mkdir()
    _file(place, SHARP)
    run = make_fake_run(place / "run", weigh={"rule": "./../mine.py:Sharp+length-guard"})
    for command in ("rollout", "score", "weigh"):
        answer = fire(command, run.root)
        assert answer.code == 0, answer.err
    assert (run.root / "weights" / "sharp+length-guard" / "round-000").is_dir()
    assert "weights/sharp+length-guard" in [row["stage"] for row in fire("status", run.root, "--json").json]


def test_a_changed_file_behind_random_is_another_rule(
    tmp_path: Path, make_fake_run: Callable[..., Any], fire: Callable[..., Any]
) -> None:
    keep = _body("Parts(keep=pl.col('length') > 3)")
    name = _file(tmp_path, keep)
    run = make_fake_run(tmp_path / "run")
    for command in ("rollout", "score"):
        assert fire(command, run.root).code == 0
    weigh = ("weigh", run.root, "--rule", "random", "-p", f"match={name}", "--name", "matched")
    assert [fire(*weigh).code, fire(*weigh).code] == [0, 0]
    _file(tmp_path, keep.replace("> 3", "> 4"))
    assert fire(*weigh).code == 2


class _Point:
    """What importlib.metadata gives for an installed rule."""

    def __init__(self, name: str, value: Any) -> None:
        self.name, self.value, self.given = name, "package:Thing", value

    def load(self) -> Any:
        if isinstance(self.given, Exception):
            raise self.given
        return self.given


def test_installed_packages_offer_rules_by_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fire: Callable[..., Any]
) -> None:
    sharp = own.from_file(_file(tmp_path, SHARP)).cls
    points = [_Point("keen", sharp), _Point("broken", ImportError("no such thing")), _Point("number", 3)]

    def entry_points(group: str) -> list[_Point]:
        return points if group == "fire.rules" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    weight = fd.weigh(ragged(4, seed=1), "keen", gain=2.0).collect()["weight"][0].to_list()
    np.testing.assert_allclose(weight, _sharp_weights(ragged(4, seed=1), 4, 2.0)[0])
    for name, words in (("broken", "no such thing"), ("number", "is not a dataclass"), ("kean", "did you mean 'keen'")):
        with pytest.raises(ConfigError, match=words):
            make_rule(name)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points[:1])
    assert "keen" in fire("rules").out
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    listed = fire("rules")
    assert listed.code == 0
    assert "keen" in listed.out
    assert "no such thing" in listed.err


def test_a_statistic_of_a_user_may_build_on_another(tmp_path: Path) -> None:
    text = SHARP.replace(
        'return (Statistic("highest", S, "max"),)',
        'return (Statistic("mean_s", S, "mean", "round"), Statistic("highest", S - pl.col("mean_s"), "max"))',
    )
    frame = ragged(12, seed=4)
    mine = fd.weigh(frame, _file(tmp_path, text), batch_size=4).collect()
    entropies = [np.array(x) for x in frame["student_entropy"].to_list()]
    mean = np.concatenate(entropies).mean()
    for i, row in enumerate(mine["weight"].to_list()):
        highest = max((x - mean).max() for x in entropies[i // 4 * 4 : i // 4 * 4 + 4])
        np.testing.assert_allclose(row, 1 + (entropies[i] > 0.5 * highest), rtol=1e-6)


def test_statistics_are_what_their_names_say() -> None:
    from fire_data.rules.expression import Expression
    from fire_data.rules.statistics import fit_statistics

    class Probe(Expression):
        def statistics(self) -> tuple[Statistic, ...]:
            value, where = pl.col("student_entropy"), pl.col("position") > 0
            reduces = ("sum", "mean", "std", "min", "max", "count", "n_unique", "quantile")
            return tuple(Statistic(f"its_{r}", value, r, "step", at=0.3, where=where) for r in reduces)  # type: ignore[arg-type]

    frame = ragged(8, seed=5)
    prepared = frame.with_columns(
        _row=pl.int_range(8, dtype=pl.UInt32), _group=pl.col("prompt_id"), step=pl.int_range(8) // 4,
        length=pl.col("student_entropy").list.len(),
    )  # fmt: skip
    stats = fit_statistics(Probe(weight="1"), lambda columns: iter([prepared[:3], prepared[3:5], prepared[5:]]))
    for step in range(2):
        values = np.concatenate([np.array(x[1:]) for x in frame["student_entropy"].to_list()[step * 4 : step * 4 + 4]])
        expected = {
            "sum": values.sum(), "mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max(),
            "count": len(values), "n_unique": len(np.unique(values)), "quantile": np.quantile(values, 0.3),
        }  # fmt: skip
        for name, want in expected.items():
            row = next(r for r in stats[f"its_{name}"] if r["step"] == step)
            assert row[f"its_{name}"] == pytest.approx(want, rel=1e-9), name
