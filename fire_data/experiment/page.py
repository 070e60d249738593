"""The report of an experiment: `report.md` with tables and figures as SVG beside it. Figures need altair."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl

from fire_data import files
from fire_data.experiment.spec import METRICS

Json = dict[str, Any]
_SIZE = (380, 240)  # pixels of a panel


def write_page(summary: Json, table: pl.DataFrame, out: Path) -> Path:
    """Write the report in place of the one that is there."""
    figures = _figures(summary, table) if importlib.util.find_spec("altair") and summary["arms"] else {}
    for name, svg in figures.items():
        files.replace_bytes(out / name, svg.encode(), out / ".tmp")
    files.replace_bytes(out / "report.md", markdown(summary, figures).encode(), out / ".tmp")
    return out / "report.md"


def markdown(summary: Json, figures: Iterable[str] = ()) -> str:
    """The text of the report."""
    seeds, tests = len(summary["seeds"]), summary["tests"]
    lines = ["# Experiment", "", summary["about"], ""] if summary["about"] else ["# Experiment", ""]
    lines += [
        f"{summary['rounds']} rounds, {seeds} seeds, {summary['cpu_seconds'] / 3600:.2f} CPU hours for the cells "
        f"and {summary['worlds_cpu_seconds'] / 3600:.2f} for their worlds.",
        "",
        *_claims(summary),
        *(f"![{name}]({name})" for name in figures),
        "",
        "## Arms",
        "",
        "Means over seeds after the last round. `to target`: median over seeds of what was spent until accuracy at "
        f"temperature 1 was {summary['target']:g}, and how many seeds came there.",
        "",
        *markdown_table([arm_row(arm) for arm in summary["arms"]]),
        "",
        *_teachers(summary),
        "## Differences",
        "",
        f"Paired by seed at equal rollout tokens. Intervals: {summary['level']:.0%}, Student's t on the differences, "
        f"each for itself. p: t test on {METRICS[summary['metric']]} alone, corrected by Holm for the {tests} "
        "comparisons of this table. Sign flip: the exact test that does not assume normality, corrected alike; with "
        f"{seeds} seeds it cannot be below {summary['least_p']:.4g} before correction, and {tests} comparisons need "
        f"{summary['seeds_for_sign_flip']} seeds for it to say anything at 5 %.",
        "",
        *markdown_table([difference_row(c) for c in summary["comparisons"]]),
        *_failures(summary["failures"]),
    ]
    return "\n".join(lines) + "\n"


def _claims(summary: Json) -> list[str]:
    if not summary["claims"]:
        return []
    rows = [claim_row(c) for c in summary["claims"]]
    about = f"Stated in the specification; {len(rows)} tests, corrected by Holm. Not significant is undecided."
    return ["## Claims", "", about, "", *markdown_table(rows), ""]


def _teachers(summary: Json) -> list[str]:
    if not summary["teachers"]:
        return []
    return ["## Teachers", "", *markdown_table([teacher_row(t) for t in summary["teachers"]]), ""]


def teacher_row(told: Json) -> Json:
    """A teacher as people read it."""
    row = {"world": f"{told['world']}/{told['setting']}", "teacher": told["arm"], "seeds": told["seeds"]}
    return row | {
        name: _share(told[k]) for name, k in (("T=1", "sampled"), ("greedy", "greedy"), ("retained", "retain"))
    }


def claim_row(told: Json) -> Json:
    """A claim as people read it."""
    row = {"claim": told["claim"], "difference": _interval(told), "seeds": told["n"]}
    return row | {"p (Holm)": f"{told['p_holm']:.3g}", "verdict": told["verdict"]}


def arm_row(arm: Json) -> Json:
    """An arm in one world as people read it."""

    def target(name: str, unit: float) -> str:
        told = arm[f"{name}_to_target"]
        middle = "never" if told["median"] is None else f"{told['median'] / unit:.3g}"
        return f"{middle} ({told['seeds']}/{told['of']})"

    return {
        "world": f"{arm['world']}/{arm['setting']}",
        "arm": arm["arm"],
        "seeds": arm["seeds"],
        "start": _share(arm["start"]),
        "T=1": _share(arm["sampled"]),
        "greedy": _share(arm["greedy"]),
        "area": _share(arm["area"]),
        "retained": _share(arm["retain"]),
        "k tokens to target": target("rollout_tokens", 1000),
        "steps to target": target("steps", 1),
        "k tokens": f"{arm['rollout_tokens'] / 1000:.1f}",
        "trained": _share(arm["trained_tokens"] / arm["rollout_tokens"]),
        "length": f"{arm['response_length']:.1f}",
        "CPU s": f"{arm['cpu_seconds']:.0f}",
        "MB": "–" if arm["peak_mb"] is None else f"{arm['peak_mb']:.0f}",
    }


def difference_row(c: Json) -> Json:
    """A comparison as people read it."""

    def p(name: str) -> str:
        return f"{c[name]:.3g}" if name in c else ""

    return {
        "world": f"{c['world']}/{c['setting']}",
        "arm": c["arm"],
        "against": c["against"],
        "metric": c["metric"],
        "difference": _interval(c),
        "better": f"{c['better']}/{c['n']}",
        "p (Holm)": p("p_holm"),
        "sign flip (Holm)": p("p_flip_holm"),
    }


def _interval(told: Json) -> str:
    if not told["n"]:
        return "no pairs"
    if told["low"] is None:
        return f"{told['mean']:+.3f}"
    return f"{told['mean']:+.3f} [{told['low']:+.3f}, {told['high']:+.3f}]"


def _failures(failures: dict[str, str]) -> list[str]:
    if not failures:
        return []
    rows = [{"cell": cell, "error": error} for cell, error in failures.items()]
    return ["", "## Failed cells", "", *markdown_table(rows)]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def markdown_table(rows: list[Json]) -> list[str]:
    """The lines of a Markdown table; all rows have the keys of the first."""
    if not rows:
        return ["None."]

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(" ".join(str(c).replace("|", "\\|").split()) for c in cells) + " |"

    return [line(rows[0]), line("---" for _ in rows[0]), *(line(row.values()) for row in rows)]


def _figures(summary: Json, table: pl.DataFrame) -> dict[str, str]:
    """SVG by file name: learning curves of every world, and all tested differences."""
    import vl_convert

    from fire_data.compare.plot import drawable

    groups = dict.fromkeys((arm["world"], arm["setting"]) for arm in summary["arms"])
    charts = {f"curves-{w}-{s}.svg": _curves(table.filter(world=w, setting=s), f"{w}/{s}") for w, s in groups}
    tested = [c for c in summary["comparisons"] if c["metric"] == summary["metric"] and c["low"] is not None]
    charts |= {"differences.svg": _forest(tested, METRICS[summary["metric"]])} if tested else {}
    return {name: str(vl_convert.vegalite_to_svg(drawable(chart))) for name, chart in charts.items()}


def _curves(table: pl.DataFrame, title: str) -> Any:
    """Means over seeds by rollout tokens: what is learnt, greedy and sampled, and what is retained."""
    import altair as alt

    columns = {"sampled": "accuracy, T = 1", "greedy": "accuracy, greedy", "retain_greedy": "retained, greedy"}
    seen = table.filter(pl.any_horizontal(pl.col(*columns).is_not_null()))
    means = seen.group_by("arm", "round", maintain_order=True).agg(pl.col("rollout_tokens", *columns).mean())
    panels = []
    for column, label in columns.items():
        if means[column].is_null().all():
            continue
        y = alt.Y(f"{column}:Q", title=label, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"))
        x = alt.X("rollout_tokens:Q", title="rollout tokens", axis=alt.Axis(format="~s", tickCount=5))
        colour = alt.Color("arm:N", sort=None, scale=alt.Scale(scheme="tableau20"))
        chart = alt.Chart(means.select("arm", "rollout_tokens", column), width=_SIZE[0], height=_SIZE[1])
        panels.append(chart.mark_line(point=True).encode(x=x, y=y, color=colour))
    return alt.hconcat(*panels, title=title)


def _forest(tested: list[Json], metric: str) -> Any:
    import altair as alt

    names = [f"{c['world']}/{c['setting']}: {c['arm']} − {c['against']}" for c in tested]
    rows = pl.DataFrame({"name": names, **{k: [c[k] for c in tested] for k in ("mean", "low", "high")}})
    base = alt.Chart(rows, width=520, height=18 * len(rows) + 10)
    y = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=420))
    bars = base.mark_rule().encode(x=alt.X("low:Q", title=f"difference in {metric}"), x2="high:Q", y=y)
    dots = base.mark_circle(size=50, opacity=1).encode(x="mean:Q", y=y)
    zero = alt.Chart(pl.DataFrame({"x": [0.0]})).mark_rule(color="#999", strokeDash=[4, 3]).encode(x="x:Q")
    return bars + dots + zero
