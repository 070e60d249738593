"""The demo's learning curves as a page that needs no script and no network, drawn and themed as a report is."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from fire_data.harmless import shown
from fire_data.report.page import digest, resource
from fire_data.report.plots import over_rounds

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src '{digest}'; img-src data:">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<title>fire demo</title><style>{style}</style></head><body>
<header><p class="kind">fire demo</p><h1>Accuracy on held-out prompts</h1>
<p class="lede">Arms start from the same student, seed and first rollouts. Exact match, by rounds of training.</p>
</header>
<main><section><div class="grid two">{figures}</div>
<div class="wide" tabindex="0" role="region" aria-label="The same in numbers"><table>{table}</table></div>
</section></main></body></html>
"""


def write_curve(folder: Path, tables: dict[str, list[dict[str, Any]]], sampled: str) -> Path:
    """Write `learning.html` and return it.

    Args:
        tables: of every arm `steps.rounds.round_table`: one row for the start, then one per round.
        sampled: the column of accuracy at temperature 1.
    """
    decodings = {"Greedy": "greedy", "Sampled, T = 1": sampled}
    arms = {str(i): arm for i, arm in enumerate(tables)}
    rounds = range(max(map(len, tables.values())))
    told = {
        title: [
            {"trained": n, **{i: tables[arm][n].get(key) if n < len(tables[arm]) else None for i, arm in arms.items()}}
            for n in rounds
        ]
        for title, key in decodings.items()
    }
    drawn = [(title, over_rounds(rows, arms, format=".0%", whole=True)) for title, rows in told.items()]
    figures = "".join(_figure(title, svg) for title, svg in drawn if svg)
    style = resource("report.css")
    page = folder / "learning.html"
    text = _PAGE.format(digest=digest(style), style=style, figures=figures, table=_table(told, arms))
    page.write_text(text, encoding="utf-8")
    return page


def _figure(title: str, svg: str) -> str:
    label = f'<figure role="group" aria-label="{title}"><figcaption>{title}</figcaption>'
    return f'{label}<div class="plot">{svg}</div></figure>'


def _table(told: dict[str, list[dict[str, Any]]], arms: dict[str, str]) -> str:
    """Rounds downwards; across, every arm below each decoding."""
    names = "".join(f"<th>{escape(shown(arm))}</th>" for arm in arms.values())
    above = "".join(f'<th colspan="{len(arms)}">{title}</th>' for title in told)
    head = f'<tr><th rowspan="2">rounds</th>{above}</tr><tr>{names * len(told)}</tr>'
    rows = []
    for n, _ in enumerate(next(iter(told.values()))):
        values = [points[n][i] for points in told.values() for i in arms]
        cells = "".join(f"<td>{'–' if v is None else f'{v:.1%}'}</td>" for v in values)
        rows.append(f'<tr><th scope="row">{n}</th>{cells}</tr>')
    return f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody>"
