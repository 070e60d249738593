"""Puts together everything that a report shows: the sections of the page, and the trajectories for its browser."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import Any

import polars as pl

from fire_data.harmless import shown
from fire_data.report import data, plots
from fire_data.report.measure import COLUMNS, Tally
from fire_data.report.sample import ORDERS, TOKENS, Sample, choose
from fire_data.report.settings import settings
from fire_data.report.tables import Tables, open_tables
from fire_data.report.trajectories import Scales, Words, load_words, numbers, read, read_weights
from fire_data.run import Run
from fire_data.schemas.errors import ConfigError
from fire_data.stages import Reporter
from fire_data.steps.diagnose import last_scored

Json = dict[str, Any]
_CURVES: dict[str, tuple[str, str, bool]] = {
    "loss": ("Loss", "~g", False),
    "grad_norm": ("Gradient norm", "~g", True),
    "ratio_mean_abs": ("Mean |log ratio| to the policy that wrote", "~g", True),
    "clip_fraction": ("Share of clipped tokens", "~%", False),
    "lr": ("Learning rate", "~e", False),
    "tokens_per_second": ("Tokens per second", "~s", False),
}
"""Numbers of optimizer steps that are drawn: title, format, and whether on a logarithmic axis."""


@dataclass(frozen=True)
class Gathered:
    """What the template shows, what the page's script starts with, and the trajectories in the order of choice."""

    context: Json
    index: Json
    trajectories: list[Json]


def gather(
    run: Run, round: int | None, name: str | None, against: str | int | None, limit: int | None, report: Reporter
) -> Gathered:
    """Read what the arguments of `write_report` ask for."""
    tables = open_tables(run, last_scored(run) if round is None else round, name)
    other = _other(run, tables, against)
    both = (tables,) if other is None else (tables, other)
    report.start("report", sum(len(t) for t in both), "shards")
    tallies = [_tally(t, report) for t in both]
    rows = tallies[0].rows
    sample, beside = _beside(both, tallies, limit)
    words, scales = load_words(run), Scales()
    trajectories = _trajectories(both, sample, beside, words, scales)
    rounds = data.rounds(run, tables.name)
    evaluated = any(k.startswith("accuracy") for r in rounds for k in r)
    missing = data.missing(run, tables, evaluated)
    names = _names(both)
    context: Json = {
        "run": shown(run.root.resolve().name, 80),
        "round": tables.round,
        "weights": None if tables.name is None else shown(tables.name, 80),
        "against": None if other is None else shown(names[1], 80),
        "total": tables.trajectories,
        "tokens": tables.tokens,
        "models": data.models(run),
        "missing": missing,
        "tiles": _tiles(rounds, tables.round, tallies[0]),
        "rounds": rounds,
        "glance": _glance(rounds),
        "filter": _filter(rows),
        "weighing": _weighing(tallies, names),
        "curves": _drawn(data.curves(run)),
        "ended_early": data.ended_early(run),
        "findings": data.findings(run, tables, report),
        "sample": sample,
        "longest": TOKENS,
        "note": words.note,
        "settings": settings(run.config),
        "stages": data.stages(run),
        "versions": data.versions(tables),
        "root": shlex.quote(str(run.root)),
    }
    index: Json = {
        "round": tables.round,
        "total": tables.trajectories,
        "names": None if other is None else [shown(n, 80) for n in names],
        "same": other is not None and other.round == tables.round,
        "signals": scales.signals(),
        "numbers": numbers(),
        "orders": {k: v for k, v in ORDERS.items() if v[0] in sample.rows.columns},
    }
    return Gathered(context, index, trajectories)


def _other(run: Run, tables: Tables, against: str | int | None) -> Tables | None:
    """The tables to compare with: of another round, with the same name of weights, or other weights of this one."""
    if against is None:
        return None
    if isinstance(against, int) or against.isdecimal():
        other = open_tables(run, int(against), tables.name)
    else:
        other = open_tables(run, tables.round, against)
    if (other.round, other.name) == (tables.round, tables.name):
        raise ConfigError(f"--against {against} is what the report is about", fix="name other weights or another round")
    return other


def _names(both: tuple[Tables, ...]) -> list[str]:
    """How the sides of a comparison are told apart."""
    if len(both) == 2 and both[0].round != both[1].round:
        return [f"round {t.round}" for t in both]
    return [str(t.name) for t in both]


def _tally(tables: Tables, report: Reporter) -> Tally:
    tally = Tally()
    for shard in range(len(tables)):
        tally.add(tables.read(shard, COLUMNS), shard)
        report.advance(1)
    return tally


def _beside(both: tuple[Tables, ...], tallies: list[Tally], limit: int | None) -> tuple[Sample, dict[str, Json]]:
    """What is shown, and for chosen rows the row of another round that stands beside: `trajectory_id` to that row.

    That is the same prompt and sample, where the rounds share some, else any of the same stratum.
    """
    rows = tallies[0].rows
    if len(both) == 1 or both[0].round == both[1].round:
        return choose(rows, limit), {}
    others = {(r["prompt_id"], r["sample"]): r for r in tallies[1].rows.iter_rows(named=True)}
    sample = choose(rows, limit, others.keys())
    pairs = {r["trajectory_id"]: others.get((r["prompt_id"], r["sample"])) for r in sample.rows.iter_rows(named=True)}
    if any(pairs.values()):
        return sample, {k: v for k, v in pairs.items() if v is not None}
    alike = choose(tallies[1].rows, tallies[1].rows.height).rows.partition_by("stratum", as_dict=True)
    free = {stratum: part.iter_rows(named=True) for (stratum,), part in alike.items()}
    found = {
        r["trajectory_id"]: next(free.get(r["stratum"], iter(())), None) for r in sample.rows.iter_rows(named=True)
    }
    how = f"{sample.how}; the rounds share no prompt, so beside each is one of the same stratum"
    return dataclasses.replace(sample, how=how), {k: v for k, v in found.items() if v is not None}


def _trajectories(
    both: tuple[Tables, ...], sample: Sample, beside: dict[str, Json], words: Words, scales: Scales
) -> list[Json]:
    """For every chosen row `a`, `b` (the other side, if there is one), and the numbers that it is sorted by."""
    a = read(both[0], sample.rows, words, scales)
    b: dict[str, Json] = {}
    if beside:
        made = read(both[1], pl.DataFrame(list(beside.values())), words, scales)
        b = {k: made[v["trajectory_id"]] for k, v in beside.items()}
    elif len(both) == 2 and both[0].round == both[1].round:
        b = read_weights(both[1], sample.rows, scales)
    keys = [column for column, _ in ORDERS.values() if column in sample.rows.columns]
    return [
        {"a": a[row["trajectory_id"]], "b": b.get(row["trajectory_id"]), "sort": {k: row[k] for k in keys}}
        for row in sample.rows.iter_rows(named=True)
    ]


def _tiles(rounds: list[Json], number: int, tally: Tally) -> list[Json]:
    """The few numbers that a reader wants first: what is known of this round, and where the student came from.

    Accuracy is that of the student after it was trained on the round, else of the one that wrote it.
    """
    now = next((r for r in rounds if r["trained"] == number), {})
    start = rounds[0] if rounds and rounds[0] is not now else {}
    after = next((r for r in rounds if r["trained"] == number + 1), {})
    tiles = []
    for mode in ("greedy", "sampled"):
        first, last = (r.get(f"accuracy_{mode}") for r in (now, after))
        if (first, last) != (None, None):
            note = "before training on this round"
            if last is not None:
                note = f"after training on this round; before it {_percent(first)}"
            tiles.append(
                {"label": f"accuracy, {mode}", "value": _percent(first if last is None else last), "note": note}
            )
            break
    if now.get("reverse_kl") is not None:
        first = start.get("reverse_kl")
        note = f"nats per token, {now['kl_kind']}" + (f"; at the start {first:.3g}" if first is not None else "")
        tiles.append({"label": "KL to the teacher", "value": f"{now['reverse_kl']:.3g}", "note": note})
    if now.get("kept_fraction") is not None:
        note = f"of trajectories; {_percent(now.get('kept_token_fraction'))} of tokens"
        tiles.append({"label": "kept", "value": _percent(now["kept_fraction"]), "note": note})
    if tally.effective_signal_share is not None:
        tiles.append({"label": "effective signal", "value": _percent(tally.effective_signal_share),
                      "note": "of all tokens: (Σ|c|)² / (N Σc²)"})  # fmt: skip
    if now.get("length") is not None:
        note = f"tokens; {_percent(now['truncated'])} truncated"
        tiles.append({"label": "mean length", "value": f"{now['length']:.4g}", "note": note})
    if now.get("student_entropy") is not None:
        note = f"nats per token; the teacher's is {now['teacher_entropy']:.3g}"
        tiles.append({"label": "student entropy", "value": f"{now['student_entropy']:.3g}", "note": note})
    return tiles


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.3g} %"


def _glance(rounds: list[Json]) -> list[Json]:
    charts = [
        ("Accuracy on held-out prompts", {"accuracy_greedy": "greedy", "accuracy_sampled": "sampled"}, ".0%", True),
        ("KL(student ‖ teacher), nats per token", {"reverse_kl": "KL"}, "~g", False),
        ("Kept share", {"kept_fraction": "trajectories", "kept_token_fraction": "tokens"}, ".0%", True),
        ("Mean response length, tokens", {"length": "length"}, "~s", False),
        ("Entropy, nats per token", {"student_entropy": "student", "teacher_entropy": "teacher"}, "~g", False),
        ("Truncated share", {"truncated": "truncated"}, ".0%", True),
    ]
    drawn = [(title, plots.over_rounds(rounds, lines, format=f, whole=w)) for title, lines, f, w in charts]
    return [{"title": title, "svg": svg} for title, svg in drawn if svg]


def _filter(rows: pl.DataFrame) -> Json:
    found = data.histogram(rows)
    groups = [{**g, "group": shown(g["group"], 60)} for g in data.kept_by(rows)]
    titles = {"outcome": "by correctness", "teacher": "by teacher", "length": "by length"}
    bars = {title: [g for g in groups if g["by"] == by] for by, title in titles.items()}
    return {
        "histogram": None if found is None else plots.filter_histogram(found),
        "below": found["below"] if found else 0,
        "bars": [{"title": title, "svg": plots.kept_bars(g), "rows": g} for title, g in bars.items() if g],
        "reasons": data.drop_reasons(rows),
    }


def _weighing(tallies: list[Tally], names: list[str]) -> Json | None:
    plane = tallies[0].plane
    if plane is None:
        return None
    named = dict(zip((shown(n) for n in names), tallies, strict=True))
    curves = {n: t.concentration() for n, t in named.items()}
    places = {n: t.positions() for n, t in named.items()}
    shares = (0.001, 0.01, 0.05, 0.1, 0.2, 0.5)
    return {
        "tokens": plots.plane(plane, weights=False),
        "weights": plots.plane(plane, weights=True),
        "concentration": plots.concentration(curves),
        "weight by position": plots.positions(places, "weight"),
        "coefficient by position": plots.positions(places, "coefficient"),
        "shares": shares,
        "held": [
            {
                "name": n,
                "effective": named[n].effective_signal_share,
                "top": [next(p["mass"] for p in points if p["tokens"] >= s - 1e-9) for s in shares],
            }
            for n, points in curves.items()
            if points
        ],
    }


def _drawn(records: list[Json]) -> list[Json]:
    drawn = [(title, plots.curve(records, c, format=f, log=log)) for c, (title, f, log) in _CURVES.items()]
    return [{"title": title, "svg": svg} for title, svg in drawn if svg]
