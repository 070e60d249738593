"""The comparison of rules as one figure: what they keep, how far they agree, and where their signal is.

Colours are told apart by colour-blind eyes, and every one of them is named in a legend. Needs the extra `report`.
"""

from __future__ import annotations

import math
from typing import Any

import polars as pl

from fire_data.compare.tally import PLACES
from fire_data.harmless import shown
from fire_data.schemas.errors import ConfigError

COLOURS = ("#0072b2", "#d55e00", "#009e73")  # Okabe and Ito
_LETTER, _LINE = 5.4, 12  # pixels of a label's letter and line at font size 10
_VALUES = 12  # rules up to which the heat map shows its numbers
_ROOM = 1.3  # where the axis of a share ends, so that names have room beside 1
_LONGEST = 34  # characters of a name beside its point
_NEAR = 9  # pixels from a point to its name that need no line
_DIRECTIONS = 16  # in which a name may lie from its point

Box = tuple[float, float, float, float]


def require_plots() -> None:
    """Raise ConfigError if the packages that draw are not installed."""
    try:
        import altair  # noqa: F401
        import vl_convert  # noqa: F401
    except ModuleNotFoundError as error:
        text = f"a plot needs the package {error.name}, which is not installed"
        raise ConfigError(text, fix="pip install 'fire-opd[report]'") from None


def figure(comparison: dict[str, Any]) -> Any:
    """The Altair chart of what `fire_data.steps.compare.compare` found: three panels side by side."""
    import altair as alt

    names = [r["rule"] for r in comparison["rules"]]
    height = max(280, 18 * len(names))
    panels = _kept(comparison, max(380, height), height), _agreement(comparison, height), _places(comparison, height)
    title = (
        f"{len(names)} rules on round {comparison['round']}: {comparison['trajectories']:,} trajectories, "
        f"{comparison['tokens']:,} tokens"
    )
    chart = alt.hconcat(*panels, spacing=36, title=alt.TitleParams(title, anchor="start", fontSize=14))
    chart = chart.resolve_scale(color="independent", y="independent")
    return chart.configure_view(stroke="#bbb").configure_axis(labelLimit=200, grid=False)


def drawable(chart: Any) -> dict[str, Any]:
    """An Altair chart as what `vl_convert` draws: every text in it is harmless, or the renderer ends the process."""
    found: dict[str, Any] = _harmless(chart.to_dict())
    return found


def _harmless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _harmless(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_harmless(v) for v in value]
    return shown(value) if isinstance(value, str) else value


def svg(comparison: dict[str, Any]) -> str:
    """The figure as SVG. Raises ConfigError without the extra `report`."""
    require_plots()
    import vl_convert

    return str(vl_convert.vegalite_to_svg(drawable(figure(comparison))))


def png(comparison: dict[str, Any]) -> bytes:
    """The figure as PNG, twice its size. Raises ConfigError without the extra `report`."""
    require_plots()
    import vl_convert

    return bytes(vl_convert.vegalite_to_png(drawable(figure(comparison)), scale=2))


def _kept(comparison: dict[str, Any], width: int, height: int) -> Any:
    """Kept tokens against the effective signal, each point with its name."""
    import altair as alt

    told = [r for r in comparison["rules"] if r["effective_signal_share"] is not None]
    scale = width / _ROOM, height
    points = [
        (r["kept_token_fraction"] * scale[0], (1 - math.sqrt(r["effective_signal_share"])) * scale[1]) for r in told
    ]
    names = [_short(r["rule"]) for r in told]
    labels = beside(points, names, width, height)
    ends = [_edge(p, at, name) for p, at, name in zip(points, labels, names, strict=True)]
    rows = pl.DataFrame({
        "rule": names,
        "kept": [r["kept_token_fraction"] for r in told],
        "effective": [r["effective_signal_share"] for r in told],
        "inert": ["inert rule" if "inert" in r["flags"] else "rule" for r in told],
        "x": [x / scale[0] for x, _ in labels],
        "y": [(1 - y / scale[1]) ** 2 for _, y in labels],
        "end x": [x / scale[0] for x, _ in ends],
        "end y": [(1 - y / scale[1]) ** 2 for _, y in ends],
    }, schema_overrides={"rule": pl.String, "inert": pl.String})  # fmt: skip
    shares: dict[str, Any] = {"format": "%", "grid": True, "gridColor": "#eee"}
    across = alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1], **shares)
    down = alt.Axis(values=[0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1], **shares)
    x_scale = alt.Scale(domain=[0, _ROOM], nice=False)
    y_scale = alt.Scale(type="sqrt", domain=[0, 1], nice=False)
    x = alt.X("kept:Q", title="kept tokens", scale=x_scale, axis=across)
    y = alt.Y("effective:Q", title="effective signal, (Σ|c|)² / (N Σc²) of all tokens", scale=y_scale, axis=down)
    # The effective signal is never above the kept share, so the legend's corner is empty.
    legend = alt.Legend(orient="top-left", symbolType="circle", symbolOpacity=1, fillColor="white", padding=4)
    meaning = alt.Scale(domain=["rule", "inert rule"], range=[COLOURS[0], "#767676"])
    colour = alt.Color("inert:N", title=None, scale=meaning, legend=legend)
    base = alt.Chart(rows, width=width, height=height, title="What is kept, and how many tokens carry it")
    lines = base.mark_rule(color="#aaa", strokeWidth=0.7).encode(x=x, y=y, x2="end x:Q", y2="end y:Q")
    dots = base.mark_circle(size=55, opacity=1, stroke="white", strokeWidth=0.6).encode(x=x, y=y, color=colour)
    at: dict[str, Any] = {"x": alt.X("x:Q", scale=x_scale), "y": alt.Y("y:Q", scale=y_scale), "text": "rule:N"}
    halo = base.mark_text(fontSize=10, baseline="middle", stroke="white", strokeWidth=3).encode(**at)
    text = base.mark_text(fontSize=10, baseline="middle").encode(**at, color=colour)
    return lines + dots + halo + text


def _agreement(comparison: dict[str, Any], height: int) -> Any:
    """Correlation of coefficients of any two rules; grey where one is constant."""
    import altair as alt

    names = comparison["agreement"]["rules"]
    matrix = comparison["agreement"]["correlation"]
    cells = pl.DataFrame(
        [{"a": a, "b": b, "r": matrix[i][j]} for i, a in enumerate(names) for j, b in enumerate(names)],
        schema={"a": pl.String, "b": pl.String, "r": pl.Float64},
    ).with_columns(value=pl.col("r").round(2).cast(pl.String))
    colour = alt.Color(
        "r:Q",
        title="r",
        scale=alt.Scale(domain=[-1, 0, 1], range=[COLOURS[1], "#f7f7f7", COLOURS[0]], interpolate="lab"),
        legend=alt.Legend(gradientLength=min(height, 200)),
    )
    x = alt.X("a:N", sort=names, title=None, axis=alt.Axis(labelAngle=-60, labelPadding=4))
    y = alt.Y("b:N", sort=names, title=None)
    base = alt.Chart(cells, width=height, height=height, title="Correlation of coefficients over all tokens")
    known = alt.condition("isValid(datum.r)", colour, alt.value("#cccccc"))
    map_ = base.mark_rect(stroke="white", strokeWidth=0.5).encode(x=x, y=y, color=known)
    if len(names) > _VALUES:
        return map_
    shade = alt.condition("abs(datum.r) > 0.75", alt.value("white"), alt.value("black"))
    return map_ + base.mark_text(fontSize=10).encode(x=x, y=y, text=alt.Text("r:Q", format=".2f"), color=shade)


def _places(comparison: dict[str, Any], height: int) -> Any:
    """The share of each rule's signal in each place as bars, and of the tokens that lie there as dashed lines."""
    import altair as alt

    names = [r["rule"] for r in comparison["rules"]]
    late = comparison["places"]["late"]["from"]
    titles = {"low-low": "low-low tokens", "last": "last tokens", "late": f"from position {late} on"}
    bars = pl.DataFrame(
        [
            {"rule": r["rule"], "place": titles[place], "share": r["signal_in"][place]}
            for r in comparison["rules"]
            for place in PLACES
        ],
        schema={"rule": pl.String, "place": pl.String, "share": pl.Float64},
    )
    due = pl.DataFrame(
        [{"place": titles[p], "share": comparison["places"][p]["tokens"]} for p in PLACES],
        schema={"place": pl.String, "share": pl.Float64},
    )
    order = list(titles.values())
    colour = alt.Color(
        "place:N",
        title=["bars: share of |c|", "dashed: of tokens"],
        sort=order,
        scale=alt.Scale(domain=order, range=list(COLOURS)),
    )
    x = alt.X("share:Q", title="share of Σ|c|", axis=alt.Axis(format="%", grid=True, gridColor="#eee"))
    base = alt.Chart(bars, width=320, height=height, title="Signal in places known to be bad")
    drawn = base.mark_bar().encode(
        x=x, y=alt.Y("rule:N", sort=names, title=None), yOffset=alt.YOffset("place:N", sort=order), color=colour
    )
    lines = alt.Chart(due).mark_rule(strokeDash=[4, 3], strokeWidth=1.2).encode(x=x, color=colour)
    return drawn + lines


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def beside(
    points: list[tuple[float, float]], names: list[str], width: float, height: float
) -> list[tuple[float, float]]:
    """Where the middle of each name goes, in pixels: no two overlap, none covers a point or leaves the panel.

    Each takes the nearest free place around its point, the most crowded points first; if all is full, the least bad.
    """
    crowd = [sum(math.dist(p, q) < 40 for q in points) for p in points]
    dots = [(x - 4.0, y - 4.0, x + 4.0, y + 4.0) for x, y in points]
    taken: list[Box] = []
    placed: dict[int, tuple[float, float]] = {}
    for i in sorted(range(len(points)), key=lambda i: (crowd[i], i)):
        half = len(names[i]) * _LETTER / 2
        around = _around(points[i], half, width, height)
        free = next((c for c in around if not _covered(c[0], dots, taken)), None)
        box, placed[i] = free or min(around, key=lambda c: _covered(c[0], dots, taken))
        taken.append(box)
    return [placed[i] for i in range(len(points))]


def _around(
    point: tuple[float, float], half: float, width: float, height: float
) -> list[tuple[Box, tuple[float, float]]]:
    """Places for a name of half-width `half`, the nearest first: the box it fills, and its middle."""
    found = []
    for ring in range(40):
        for k in range(_DIRECTIONS):
            angle = 2 * math.pi * k / _DIRECTIONS
            across, down = math.cos(angle), math.sin(angle)
            away = 7 + 8 * ring
            x = point[0] + across * away + (half if across > 1e-9 else -half if across < -1e-9 else 0.0)
            y = point[1] + down * away
            if half <= x <= width - half and _LINE / 2 <= y <= height - _LINE / 2:
                found.append((_box(x, y, half), (x, y)))
    x = min(max(point[0], half), width - half)
    return found or [(_box(x, _LINE / 2, half), (x, _LINE / 2))]


def _box(x: float, y: float, half: float) -> Box:
    return (x - half, y - _LINE / 2, x + half, y + _LINE / 2)


def _edge(point: tuple[float, float], middle: tuple[float, float], name: str) -> tuple[float, float]:
    """Where the line from a point to its name ends: at the name's edge, or where it starts if that is near."""
    left, top, right, bottom = _box(*middle, len(name) * _LETTER / 2)
    end = min(max(point[0], left), right), min(max(point[1], top), bottom)
    return end if math.dist(point, end) > _NEAR else point


def _covered(box: Box, dots: list[Box], taken: list[Box]) -> float:
    """How much of other names and points a box covers, in square pixels."""
    return sum(_overlap(box, other) for other in (*dots, *taken))


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
