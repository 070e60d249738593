"""The report's figures: altair charts as SVG that follows the page's theme and holds nothing but shapes and text.

Charts are painted with placeholder colours, which are replaced by the page's CSS variables, so one SVG serves the light
and the dark theme. Text is escaped by vega; what comes out is parsed and compared with what a figure may hold.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np

from fire_data.compare.plot import drawable, require_plots
from fire_data.report.measure import Plane

Json = dict[str, Any]

_NAMES = ("ink", "muted", "line", "paper", "one", "two", "three", "kept", "dropped", *(f"c{i}" for i in range(9)))
PAINT = {name: f"#0102{i:02x}" for i, name in enumerate(_NAMES)}
"""A placeholder colour for each CSS variable of the page that figures use."""

_TAGS = frozenset({"svg", "g", "path", "line", "text", "rect", "tspan"})
_DRAWN = frozenset({
    "width", "height", "viewBox", "fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-miterlimit",
    "stroke-opacity", "stroke-linecap", "stroke-linejoin", "fill-opacity", "opacity", "display", "transform", "d",
    "x", "y", "x1", "x2", "y1", "y2", "dx", "dy", "text-anchor", "font-size", "font-weight", "font-style",
})  # fmt: skip
_UNSEEN = frozenset(
    {"class", "version", "role", "aria-hidden", "aria-label", "aria-roledescription", "pointer-events", "font-family"}
)
_XMLNS = re.compile(r' xmlns(?::\w+)?="[^"]*"')
_DECIMALS = re.compile(r"\d+\.\d{3,}")
_PLACEHOLDER = re.compile('"(' + "|".join(PAINT.values()) + ')"')
_VARIABLES = {colour: name for name, colour in PAINT.items()}
_SMALL = (290, 110)  # pixels of a small figure's plane


def figure(chart: Any) -> str:
    """A chart as SVG markup for the page. Raises ConfigError without the extra `report`."""
    require_plots()
    import vl_convert

    chart = chart.configure(background="transparent", font="sans-serif", aria=False)
    chart = (
        chart.configure_view(stroke=None)
        .configure_axis(
            labelColor=PAINT["muted"],
            titleColor=PAINT["muted"],
            titleFontWeight="normal",
            gridColor=PAINT["line"],
            domainColor=PAINT["line"],
            tickColor=PAINT["line"],
            labelFontSize=11,
            titleFontSize=11,
            tickSize=4,
        )
        .configure_axisY(minExtent=36)
    )
    chart = chart.configure_legend(
        labelColor=PAINT["ink"], titleColor=PAINT["muted"], titleFontWeight="normal", labelFontSize=11, titleFontSize=11
    )
    return painted(str(vl_convert.vegalite_to_svg(drawable(chart))))


def painted(svg: str) -> str:
    """The SVG with CSS variables for placeholders, and without what vega notes for scripts alone: it loads faster so.

    Raises ValueError if it holds more than shapes and text.
    """
    root = ElementTree.fromstring(_XMLNS.sub("", svg))
    for element in list(root.iter()):
        strange = [a for a in element.attrib if a not in _DRAWN | _UNSEEN]
        if element.tag not in _TAGS or strange:
            raise ValueError(f"a figure holds <{element.tag} {' '.join(strange)}>")
        for name in _UNSEEN & element.attrib.keys():
            del element.attrib[name]
        for child in list(element):
            if child.tag == "path" and (child.get("d") in (None, "", "M0,0h0v0h0Z") or child.get("display") == "none"):
                element.remove(child)
        for name in ("d", "transform"):
            if name in element.attrib:
                element.set(name, _DECIMALS.sub(lambda m: f"{float(m[0]):.2f}", element.attrib[name]))
    root.set("aria-hidden", "true")
    svg = ElementTree.tostring(root, encoding="unicode")
    return _PLACEHOLDER.sub(lambda m: f'"var(--{_VARIABLES[m[1]]})"', svg)


def _frame(rows: Sequence[Json]) -> Any:
    import polars as pl

    return pl.DataFrame(list(rows), infer_schema_length=None)


def _number_axis(title: str | None, format: str = "~g", **options: Any) -> Any:
    import altair as alt

    return alt.Axis(title=title, format=format, tickCount=4, **options)


def over_rounds(rows: list[Json], lines: dict[str, str], *, format: str, whole: bool = False) -> str | None:
    """Columns of `data.rounds` over rounds trained, each with a label; None if none of them is there.

    The axis is that of all rounds, so that figures can be read one under the other.

    `whole`: the axis is that of a share, from 0 to 1.
    """
    import altair as alt

    points = [
        {"x": r["trained"], "y": r[c], "line": label}
        for c, label in lines.items()
        for r in rows
        if r.get(c) is not None
    ]
    if not points:
        return None
    labels = [label for label in lines.values() if any(p["line"] == label for p in points)]
    last = max(1, *(r["trained"] for r in rows))
    domain = alt.Scale(domain=[0, 1]) if whole else alt.Scale(zero=True, nice=True)
    ticks = list(range(0, last + 1, -(-last // 6)))
    x_axis = alt.Axis(title="rounds trained", values=ticks, format="d", grid=False)
    colours = alt.Scale(domain=labels, range=[PAINT[c] for c in ("one", "two", "three")[: len(labels)]])
    legend = alt.Legend(title=None, orient="top", symbolType="stroke", offset=4) if len(labels) > 1 else None
    base = alt.Chart(_frame(points), width=_SMALL[0], height=_SMALL[1]).encode(
        x=alt.X("x:Q", axis=x_axis, scale=alt.Scale(domain=[0, last], nice=False)),
        y=alt.Y("y:Q", axis=_number_axis(None, format), scale=domain),
        color=alt.Color("line:N", scale=colours, legend=legend, sort=labels),
    )
    return figure(base.mark_line(strokeWidth=1.8) + base.mark_circle(size=22, opacity=1))


def filter_histogram(found: Json) -> str:
    """Trajectories by mean teacher logprob, the dropped ones stacked on the kept."""
    import altair as alt

    labels = {True: "kept", False: "dropped"} if found["weighed"] else {True: "not weighed"}
    below: dict[float, int] = {}
    bars = []
    for bar in sorted(found["bars"], key=lambda b: not b["kept"]):
        foot = below.get(bar["from"], 0)
        top = below[bar["from"]] = foot + bar["trajectories"]
        bars.append({"x": bar["from"], "x2": bar["to"], "y": foot, "y2": top, "fate": labels[bar["kept"]]})
    scale = alt.Scale(domain=list(labels.values()), range=[PAINT["kept"], PAINT["dropped"]][: len(labels)])
    title = "mean teacher logprob of the trajectory, nats per token"
    chart = alt.Chart(_frame(bars), width=440, height=190).mark_rect(stroke=PAINT["paper"], strokeWidth=0.6)
    chart = chart.encode(
        x=alt.X("x:Q", axis=alt.Axis(title=title, grid=False), scale=alt.Scale(zero=False, nice=False)),
        x2="x2:Q",
        y=alt.Y("y:Q", axis=_number_axis("trajectories", "~s", tickMinStep=1)),
        y2="y2:Q",
        color=alt.Color("fate:N", scale=scale, legend=alt.Legend(title=None, orient="top", symbolType="square")),
    )
    return figure(chart)


def kept_bars(groups: list[Json]) -> str:
    """The kept share of each group as a bar, with its number of trajectories."""
    import altair as alt

    # Names cut short may be equal, so the axis is of positions, and names are drawn beside it.
    rows = [
        {
            "at": i,
            "kept": g["kept"],
            "whole": 1.0,
            "name": _short(g["group"]),
            "said": f"{g['kept']:.0%} of {g['trajectories']:,}",
        }
        for i, g in enumerate(groups)
    ]
    left, right = 132, 300
    base = alt.Chart(_frame(rows), width=right, height=22 * len(rows)).encode(y=alt.Y("at:O", axis=None))
    scale = alt.Scale(domain=[0, 1], range=[left, right])
    whole = base.mark_bar(color=PAINT["line"], height=10).encode(x=alt.X("whole:Q", axis=None, scale=scale))
    bars = base.mark_bar(color=PAINT["kept"], height=10).encode(x=alt.X("kept:Q", axis=None, scale=scale))
    name = base.mark_text(align="left", fontSize=11, limit=left - 24, color=PAINT["ink"])
    said = base.mark_text(align="left", fontSize=11, color=PAINT["muted"])
    name, said = name.encode(x=alt.value(0), text="name:N"), said.encode(x=alt.value(right + 8), text="said:N")
    return figure(whole + bars + name + said)


def plane(found: Plane, *, weights: bool) -> str:
    """Kept tokens over teacher entropy (confidence falls to the right) and student entropy (confusion grows upwards).

    Colour is the number of tokens in a cell, by powers, or (`weights`) their mean weight, in nine steps.
    """
    import altair as alt

    values = found.mean_weight if weights else np.where(found.tokens > 0, np.log(np.maximum(found.tokens, 1)), np.nan)
    steps, labels = _steps(values, (lambda v: f"{v:.3g}") if weights else (lambda v: f"{math.exp(v):,.0f}"))
    cells = [
        {
            "x": float(found.edges[0][i]),
            "x2": float(found.edges[0][i + 1]),
            "y": float(found.edges[1][j]),
            "y2": float(found.edges[1][j + 1]),
            "step": labels[steps[i, j]],
        }
        for i, j in np.argwhere(found.tokens > 0)
    ]
    title = "mean weight" if weights else "tokens"
    used = {c["step"] for c in cells}
    keys = [(label, PAINT[f"c{i * 8 // max(1, len(labels) - 1)}"]) for i, label in enumerate(labels) if label in used]
    keys = list(dict(keys).items())
    scale = alt.Scale(domain=[k for k, _ in keys], range=[c for _, c in keys])
    scales = [alt.Scale(type="sqrt", domain=[0, float(e[-1])], nice=False) for e in found.edges]
    legend = alt.Legend(title=title, symbolType="square", symbolSize=120, symbolStrokeWidth=0, offset=28)
    chart = alt.Chart(_frame(cells), width=270, height=235).mark_rect(stroke=PAINT["paper"], strokeWidth=0.4)
    chart = chart.encode(
        x=alt.X("x:Q", axis=_number_axis("teacher entropy, nats"), scale=scales[0]),
        x2="x2:Q",
        y=alt.Y("y:Q", axis=_number_axis("student entropy, nats"), scale=scales[1]),
        y2="y2:Q",
        color=alt.Color("step:N", scale=scale, sort=[k for k, _ in keys], legend=legend),
    )
    return figure(chart)


def _steps(values: np.ndarray, text: Any, count: int = 9) -> tuple[np.ndarray, list[str]]:
    """Nine equal steps from the least to the largest value: each value's step, and a label per step, its lower end."""
    known = values[~np.isnan(values)]
    low, high = float(known.min()), float(known.max())
    width = (high - low) / count
    if width <= 0:
        return np.zeros(values.shape, dtype=np.int64), [text(low)]
    index = np.clip(np.floor((np.nan_to_num(values, nan=low) - low) / width), 0, count - 1).astype(np.int64)
    ends = [text(low + i * width) for i in range(count + 1)]
    return index, [f"{a} to {b}" if a != b else a for a, b in itertools.pairwise(ends)]


def concentration(curves: dict[str, list[Json]]) -> str | None:
    """Share of sum |coefficient| held by the largest tokens, one line per weights; the diagonal: all tokens alike."""
    import altair as alt

    rows = [{**p, "name": _short(name)} for name, points in curves.items() for p in points]
    if not rows:
        return None
    names = list(dict.fromkeys(r["name"] for r in rows))
    x = alt.X("tokens:Q", axis=_number_axis("largest tokens, share of all", "%"), scale=alt.Scale(domain=[0, 1]))
    y = alt.Y("mass:Q", axis=_number_axis("share of Σ|coefficient|", "%"), scale=alt.Scale(domain=[0, 1]))
    colour = _by_name(names)
    lines = alt.Chart(_frame(rows), width=290, height=190).mark_line(strokeWidth=1.8).encode(x=x, y=y, color=colour)
    even = alt.Chart(_frame([{"tokens": 0.0, "mass": 0.0}, {"tokens": 1.0, "mass": 1.0}]))
    return figure(even.mark_line(strokeWidth=1, strokeDash=[3, 3], color=PAINT["muted"]).encode(x=x, y=y) + lines)


def positions(curves: dict[str, list[Json]], column: str) -> str | None:
    """`weight` or `coefficient` of `Tally.positions` by relative position, one line per weights; 1 is the mean."""
    import altair as alt

    rows = [{**p, "name": _short(name)} for name, points in curves.items() for p in points]
    if not rows:
        return None
    names = list(dict.fromkeys(r["name"] for r in rows))
    title = {"weight": "mean weight, over its mean", "coefficient": "mean |coefficient|, over its mean"}[column]
    base = alt.Chart(_frame(rows), width=290, height=190)
    x = alt.X("part:Q", axis=_number_axis("position in the response", "%"), scale=alt.Scale(domain=[0, 1]))
    y = alt.Y(f"{column}:Q", axis=_number_axis(title), scale=alt.Scale(zero=True))
    rule = alt.Chart(_frame([{column: 1.0}])).mark_rule(strokeDash=[3, 3], color=PAINT["muted"]).encode(y=y)
    return figure(rule + base.mark_line(strokeWidth=1.8).encode(x=x, y=y, color=_by_name(names)))


def _by_name(names: list[str]) -> Any:
    import altair as alt

    scale = alt.Scale(domain=names, range=[PAINT["one"], PAINT["two"]][: len(names)])
    legend = alt.Legend(title=None, orient="top", symbolType="stroke") if len(names) > 1 else None
    return alt.Color("name:N", scale=scale, legend=legend, sort=names)


def curve(records: list[Json], column: str, *, format: str, log: bool = False) -> str | None:
    """A number of the optimizer steps over `global_step`; None if no record has it. `log`: where all are positive."""
    import altair as alt

    rows = [
        {"step": r["global_step"], "value": float(r[column])}
        for r in records
        if isinstance(r.get(column), int | float) and math.isfinite(r[column])
    ]
    if not rows:
        return None
    values = [r["value"] for r in rows]
    axis, scale = _number_axis(None, format), alt.Scale(zero=True)
    if log and min(values) > 0:
        powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
        thinned = list(powers)[:: -(-len(powers) // 5)]
        axis, scale = alt.Axis(title=None, values=[10.0**p for p in thinned], format="~e"), alt.Scale(type="log")
    base = alt.Chart(_frame(rows), width=_SMALL[0], height=_SMALL[1]).encode(
        x=alt.X("step:Q", axis=alt.Axis(title="optimizer step", format="~s", tickCount=5, grid=False, tickMinStep=1)),
        y=alt.Y("value:Q", axis=axis, scale=scale),
    )
    line = base.mark_line(strokeWidth=1.5, color=PAINT["one"])
    return figure(line if len(rows) > 1 else base.mark_circle(size=30, opacity=1, color=PAINT["one"]))


def _short(name: str, limit: int = 28) -> str:
    return name if len(name) <= limit else f"{name[: limit - 1]}…"
