"""The demo's learning curve as SVG, and as a page that needs no script and no network."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>fire demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff }}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
svg {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px }}
td, th {{ padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
div {{ overflow-x: auto }}
</style></head><body><h1>Accuracy on held-out prompts, round by round</h1>
<p>Arms start from the same student, seed and first rollouts. Solid: greedy. Dashed: sampled at temperature 1.</p>
{svg}<div><table><tr>{head}</tr>{body}</table></div></body></html>
"""


def write_curve(folder: Path, tables: dict[str, list[dict[str, Any]]], sampled: str) -> Path:
    """Write `learning.svg` and `learning.html` and return the page; `sampled` names the temperature-1 column."""
    import altair as alt
    import polars as pl

    points = [
        {"arm": arm, "round": i, "decoding": decoding, "accuracy": row[key]}
        for arm, table in tables.items()
        for i, row in enumerate(table)
        for decoding, key in (("greedy", "greedy"), ("temperature 1", sampled))
        if row.get(key) is not None
    ]
    scale = alt.Scale(domain=list(tables), range=["#d55e00", "#0072b2"][: len(tables)])  # safe for colour-blind eyes
    stroke = alt.Legend(symbolType="stroke", symbolStrokeWidth=3)
    base = alt.Chart(pl.DataFrame(points), width=640, height=340).encode(
        x=alt.X("round:Q", title="rounds trained", axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("accuracy:Q", title="exact match", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%")),
        color=alt.Color("arm:N", scale=scale, title="rule", legend=stroke),
        detail="decoding:N",
    )
    dash = alt.StrokeDash("decoding:N", sort=["greedy", "temperature 1"], title="decoding")
    chart = base.mark_line().encode(strokeDash=dash) + base.mark_point(filled=True)
    chart.save(folder / "learning.svg")
    svg = (folder / "learning.svg").read_text(encoding="utf-8")
    page = folder / "learning.html"
    page.write_text(_PAGE.format(svg=svg, **_table(tables, sampled)), encoding="utf-8")
    return page


def _table(tables: dict[str, list[dict[str, Any]]], sampled: str) -> dict[str, str]:
    names = [f"{arm} {what}" for arm in tables for what in ("greedy", "T=1")]
    head = "".join(f"<th>{escape(n)}</th>" for n in ["round", *names])
    rows = []
    for i in range(max(map(len, tables.values()))):
        values = [t[i].get(k) if i < len(t) else None for t in tables.values() for k in ("greedy", sampled)]
        cells = ["start" if i == 0 else str(i - 1), *("–" if v is None else f"{v:.1%}" for v in values)]
        rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    return {"head": head, "body": "".join(rows)}
