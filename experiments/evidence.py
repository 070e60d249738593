"""Writes docs/evidence.md and its figures from the committed results: every number on that page is computed here.

    python experiments/evidence.py
    python experiments/evidence.py --take runs      # first copy runs/NAME/results.parquet of `fire experiment`

`results/NAME.parquet` is what `fire experiment experiments/NAME.yaml` found. Words are in `evidence.md.jinja`, where
`{{ sure(...) }}` names a claim with the verdict that a sentence rests on: if the results say otherwise, no page is
written. Needs the extra `report`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import polars as pl

from fire_data.experiment import table as tables
from fire_data.experiment.page import arm_row, claim_row, difference_row, markdown_table
from fire_data.experiment.spec import METRICS, Spec, load_spec
from fire_data.experiment.statistics import paired
from fire_data.experiment.summary import curves_of, differences, summarise

Json = dict[str, Any]

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "evidence.md"
PEERS = HERE / "results" / "peer.parquet"  # of bench/peer.py
FIGURES = PAGE.parent / "assets" / "evidence"
_ROOM = {"left": 30, "top": 5, "right": 30, "bottom": 5}  # fonts differ in width
_BLUE, _GREY, _ORANGE = "#0072b2", "#f3f3f3", "#d55e00"  # told apart by colour-blind eyes
_COLOURS = ["#000000", "#999999", "#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#e69f00"]  # Okabe and Ito


class Experiment(NamedTuple):
    spec: Spec
    table: pl.DataFrame
    told: Json


@cache
def experiment(name: str) -> Experiment:
    """What was found, computed anew from the committed table."""
    spec = load_spec(HERE / f"{name}.yaml")
    table, worlds = tables.read(HERE / "results" / f"{name}.parquet")
    return Experiment(spec, table, summarise(table, spec, worlds_cpu_seconds=worlds))


def names() -> list[str]:
    """Experiments that have results and a specification."""
    return sorted(p.stem for p in (HERE / "results").glob("*.parquet") if (HERE / f"{p.stem}.yaml").exists())


def page() -> str:
    """The text of docs/evidence.md."""
    loader = jinja2.FileSystemLoader(HERE)
    made = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True)
    tools: list[Callable[..., Any]] = [
        arm, diff, claims, sure, arms, against, after, teacher, size, hours, peers, beside, names,
    ]  # fmt: skip
    made.globals |= {tool.__name__: tool for tool in tools}
    return made.get_template("evidence.md.jinja").render() + "\n"


# What the template calls.


def arm(name: str, group: str, who: str, metric: str = "sampled") -> str:
    """An arm's mean at the end."""
    return _number(_arm(name, group, who)[metric])


def after(name: str, group: str, who: str, rounds: int, metric: str = "retain_greedy") -> str:
    """An arm's mean in the evaluation after so many rounds; ValueError if there is none."""
    world, setting = group.split("/")
    rows = experiment(name).table.filter(world=world, setting=setting, arm=who, round=rounds)
    if rows[metric].count() == 0:
        raise ValueError(f"{name} has no {metric} of {who} in {group} after {rounds} rounds")
    return _mean(rows[metric])


def teacher(name: str, group: str, who: str = "teacher", metric: str = "sampled") -> str:
    """A teacher's mean accuracy."""
    return _number(_one(experiment(name).told["teachers"], group, arm=who)[metric])


def diff(name: str, group: str, who: str, to: str = "uniform", metric: str = "sampled") -> str:
    """A paired difference with its interval."""
    return str(difference_row(_comparison(name, group, who, to, metric))["difference"])


def sure(name: str, claim: str, verdict: str) -> str:
    """The corrected p of a claim; ValueError if its verdict is another."""
    (told,) = [c for c in experiment(name).told["claims"] if c["claim"] == claim]
    if told["verdict"] != verdict:
        raise ValueError(f"the page says {verdict} of {name}: {claim}; the results say {told['verdict']}")
    row = claim_row(told)
    return f"{row['difference']}, p = {row['p (Holm)']}"


def claims(name: str) -> str:
    """All claims of an experiment."""
    return _lines([claim_row(c) for c in experiment(name).told["claims"]])


def arms(name: str, group: str) -> str:
    """All arms of one world and setting, with their difference to uniform."""
    told, rows = experiment(name).told, []
    for one in told["arms"]:
        if f"{one['world']}/{one['setting']}" == group:
            row, apart = arm_row(one), {"difference": "", "p (Holm)": ""}
            if one["arm"] != "uniform":
                apart = difference_row(_comparison(name, group, one["arm"], "uniform", "sampled"))
            columns = {"arm": row["arm"], "T=1": row["T=1"], "to uniform": apart["difference"], "p": apart["p (Holm)"]}
            columns |= {k: row[k] for k in ("greedy", "retained", "k tokens to target")}
            rows.append(columns)
    return _lines(rows)


def against(name: str, to: str = "uniform", metric: str = "sampled") -> str:
    """Differences of all arms in all worlds of an experiment, a column for each world."""
    told = experiment(name).told["comparisons"]
    chosen = [c for c in told if c["against"] == to and c["metric"] == metric]
    rows: dict[str, Json] = {}
    for c in chosen:
        bold = "**" if c["low"] is not None and (c["low"] > 0 or c["high"] < 0) else ""
        text = f"{bold}{c['mean']:+.3f}{bold}" if c["low"] is not None else f"{c['mean']:+.3f}"
        rows.setdefault(c["arm"], {"arm": c["arm"]})[_column(c)] = text
    return _lines([*rows.values()])


def peers() -> str:
    """Whole trainings by `bench/peer.py`: ours and TRL's at the end, means over seeds."""
    table, _ = tables.read(PEERS)
    rows = []
    for (who,), mine in table.group_by("arm", maintain_order=True):
        last = mine.filter(round=mine["round"].max())
        early = mine.filter(round=5)
        row = {
            "training": f"`{who}`",
            "T=1 after 5 rounds": _mean(early["sampled"]),
            "T=1 at the end": _mean(last["sampled"]),
        }
        row |= {"greedy at the end": _mean(last["greedy"]), "retained": _mean(last["retain_greedy"])}
        spent = mine.group_by("seed").agg(pl.col("cpu_seconds").sum(), pl.col("peak_mb").max())
        rows.append(row | {"CPU s": f"{spent['cpu_seconds'].mean():.1f}", "peak MB": f"{spent['peak_mb'].mean():.0f}"})
    return _lines(rows)


def beside(who: str, to: str, metric: str = "sampled") -> str:
    """The paired difference of two whole trainings at equal rollout tokens."""
    table, _ = tables.read(PEERS)
    found = differences(curves_of(table, int(table["round"].max())), ("chain", "single"), who, to, metric)  # type: ignore[arg-type]
    result = paired([*found.values()])
    return f"{result.mean:+.3f} [{result.low:+.3f}, {result.high:+.3f}]"


def size(name: str) -> str:
    """Seeds and rounds in words."""
    told = experiment(name).told
    done = {a["seeds"] for a in told["arms"]}
    seeds = str(*done) if len(done) == 1 else f"{min(done)} to {max(done)}"
    return f"{seeds} seeds, {told['rounds']} rounds"


def hours(*chosen: str) -> str:
    """CPU hours of experiments, worlds included; of all of them if none is named."""
    told = [experiment(name).told for name in chosen or names()]
    return f"{sum(t['cpu_seconds'] + t['worlds_cpu_seconds'] for t in told) / 3600:.1f}"


def _arm(name: str, group: str, who: str) -> Json:
    return _one(experiment(name).told["arms"], group, arm=who)


def _comparison(name: str, group: str, who: str, to: str, metric: str) -> Json:
    return _one(experiment(name).told["comparisons"], group, arm=who, against=to, metric=metric)


def _mean(values: pl.Series) -> str:
    return _number(values.mean())  # type: ignore[arg-type]


def _one(rows: Iterable[Json], group: str, **wanted: str) -> Json:
    world, setting = group.split("/")
    wanted |= {"world": world, "setting": setting}
    found = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows for {wanted}")
    return found[0]


def _column(c: Json) -> str:
    return str(c["world"]) if c["setting"] == "single" else f"{c['world']}/{c['setting']}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _lines(rows: list[Json]) -> str:
    return "\n".join(markdown_table(rows))


# Figures.


def figures() -> dict[str, Any]:
    """Altair charts by file name."""
    there, made = {*names()}, {}
    if "protection" in there:
        made["protection"] = curves("protection", "retain_greedy", "retained, greedy")
    if "open-unknown" in there:
        made["open-unknown"] = curves("open-unknown", "retain_greedy", "retained, greedy")
    if "main" in there:
        made["main"] = forest("main", "sampled", (-0.4, 0.2), 210)
    if "ablations" in there:
        made["ablations"] = forest("ablations", "sampled", (-0.3, 0.1), 360)
    if "stressors" in there:
        made["stressors"] = heat("stressors", {"sampled": "temperature 1", "retain": "what was known before"})
    return made


def forest(name: str, metric: str, span: tuple[float, float], width: int) -> Any:
    """Differences to uniform with intervals, a panel for each world and setting."""
    import altair as alt

    rows = [c for c in _compared(name, metric) if c["low"] is not None]
    groups = list(dict.fromkeys(c["column"] for c in rows))
    y = alt.Y("arm:N", sort=[c["arm"] for c in rows], title=None)
    panels = []
    for at, group in enumerate(groups):
        base = alt.Chart(_frame([c for c in rows if c["column"] == group]), width=width, title=group)
        shown = y if at == 0 else y.axis(None)
        bars = base.mark_rule(color=_BLUE, clip=True).encode(
            x=alt.X("low:Q", title=None, scale=alt.Scale(domain=span)), x2="high:Q", y=shown
        )
        dots = base.mark_circle(size=50, opacity=1, color=_BLUE, clip=True).encode(x="mean:Q", y=shown)
        zero = alt.Chart(pl.DataFrame({"x": [0.0]})).mark_rule(color="#999", strokeDash=[4, 3]).encode(x="x:Q")
        panels.append(zero + bars + dots)
    return alt.hconcat(*panels, title=f"difference to uniform in {METRICS[metric]}, 95 % intervals", padding=_ROOM)


def curves(name: str, column: str, label: str) -> Any:
    """A metric by rounds, a panel for each world: means over seeds, and every seed behind them."""
    import altair as alt

    found, panels = experiment(name), []
    for world, settings in found.spec.worlds.items():
        rows = found.table.filter(pl.col("world") == world, pl.col("arm").is_in([*found.spec.arms]))
        rows = rows.filter(pl.col(column).is_not_null()).select("setting", "arm", "seed", "round", y=column)
        legend = alt.Legend(symbolOpacity=1, symbolStrokeWidth=3)
        colour = alt.Color("arm:N", sort=None, scale=alt.Scale(range=_COLOURS), title=None, legend=legend)
        x = alt.X("round:Q", title="rounds", axis=alt.Axis(tickCount=4))
        y = alt.Y("y:Q", title=label, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"))
        for setting in settings:
            mine = alt.Chart(rows.filter(setting=setting), width=300, height=220, title=f"{world}/{setting}")
            each = mine.mark_line(opacity=0.25, strokeWidth=1).encode(x=x, y=y, color=colour, detail="seed:N")
            mean = mine.mark_line(strokeWidth=2.5).encode(x=x, y=y.aggregate("mean"), color=colour)
            panels.append(each + mean)
    return alt.hconcat(*panels, padding=_ROOM)


def heat(name: str, metrics: Mapping[str, str]) -> Any:
    """Differences to uniform as colours and numbers, a titled panel each; bold where the interval excludes 0."""
    import altair as alt

    panels = []
    for at, (metric, title) in enumerate(metrics.items()):
        rows = _frame(_compared(name, metric)).with_columns(
            text=pl.col("mean").map_elements(lambda v: f"{v:+.2f}".replace("-", "−"), pl.String),
            sure=(pl.col("low") > 0) | (pl.col("high") < 0),
            light=pl.col("mean").abs() < 0.2,
        )
        x = alt.X("column:N", sort=None, title=None, axis=alt.Axis(labelAngle=-40, orient="top"))
        y = alt.Y("arm:N", sort=None, title=None)
        base = alt.Chart(rows, title=title).encode(x=x, y=y.axis(None) if at else y)
        scale = alt.Scale(domain=[-0.3, 0, 0.3], range=[_ORANGE, _GREY, _BLUE], clamp=True)
        boxes = base.mark_rect().encode(color=alt.Color("mean:Q", scale=scale, legend=None))
        ink = alt.condition("datum.light", alt.value("black"), alt.value("white"))
        words = base.encode(text="text:N", color=ink)
        plain = words.transform_filter("!datum.sure").mark_text(fontSize=11)
        bold = words.transform_filter("datum.sure").mark_text(fontSize=11, fontWeight="bold")
        panels.append((boxes + plain + bold).properties(width=alt.Step(46), height=alt.Step(22)))
    return alt.hconcat(*panels, title="difference to uniform; bold: the 95 % interval excludes 0", padding=_ROOM)


def _compared(name: str, metric: str) -> list[Json]:
    told = experiment(name).told["comparisons"]
    chosen = [c for c in told if c["against"] == "uniform" and c["metric"] == metric]
    return [{"column": _column(c), **{k: c[k] for k in ("arm", "mean", "low", "high")}} for c in chosen]


def _frame(rows: list[Json]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema_overrides=dict.fromkeys(("mean", "low", "high"), pl.Float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", type=Path, metavar="RUNS", help="folder of experiments to take results from")
    chosen = parser.parse_args()
    if chosen.take is not None:
        (HERE / "results").mkdir(exist_ok=True)
        for spec in sorted(HERE.glob("*.yaml")):
            found = chosen.take / spec.stem / "results.parquet"
            if found.exists():
                shutil.copyfile(found, HERE / "results" / f"{spec.stem}.parquet")
    import vl_convert

    from fire_data.compare.plot import drawable

    PAGE.write_text(page(), encoding="utf-8")
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, chart in figures().items():
        (FIGURES / f"{name}.svg").write_text(str(vl_convert.vegalite_to_svg(drawable(chart))), encoding="utf-8")


if __name__ == "__main__":
    main()
