"""`fire compare`: rules side by side as tables for people, everything as JSON, and the figure."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .errors import say, visible
from .terminal import Terminal, hint, show, show_one

if TYPE_CHECKING:
    from fire_data.run import Run

_MATRIX = 8  # rules up to which the correlations of all of them are shown
_SIGNAL = {"low-low": "low-low", "last": "last token", "late": "late"}


def show_comparison(
    run: Run,
    round: int | None,
    rules: str | None,
    late: int | None,
    plot: Path | None,
    as_json: bool,
    carried: list[str],
) -> None:
    """Compare rules on a round (default: the last that is scored), show what was found, and draw it if asked to.

    `carried`: what the next command needs of the options that were given.
    """
    from fire_data.compare import DEFAULT
    from fire_data.steps.compare import check_plot, compare, write_plot
    from fire_data.steps.diagnose import last_scored

    if plot is not None:
        check_plot(plot)
    number = last_scored(run) if round is None else round
    with Terminal() as terminal:
        found = compare(run, number, rules or DEFAULT, late, terminal)
    if plot is not None:
        write_plot(found, plot)
    if as_json:
        show_one(found, True)
    else:
        _show_kept(found)
        _show_signal(found)
        _show_matrix(found)
        _show_remarks(found)
    if plot is not None:
        say(f"plot: {plot}")
    hint(*shlex.split(found["next"]), *carried)


def _show_kept(found: dict[str, Any]) -> None:
    """What each rule keeps, how its weights are spread, and what the kept trajectories are like."""
    rewarded = found["right"] is not None
    second = any(r["forward_kl_tokens"] for r in found["rules"])
    rows = [
        {
            "rule": r["rule"],
            "rows kept": _number(r["kept_fraction"]),
            "tokens kept": _number(r["kept_token_fraction"]),
            "coef not 0": _number(r["nonzero_fraction"]),
            "mean weight": _number(r["mean_weight"]),
            "eff. sample": _number(r["effective_sample_share"]),
            "eff. signal": _number(r["effective_signal_share"]),
            "mean length": _number(r["length"], 1),
            "repeats": _number(r["repetition"]),
            **({"right kept": _number(r["kept_right"]), "wrong kept": _number(r["kept_wrong"])} if rewarded else {}),
            **({"fwd KL": _number(r["forward_kl_tokens"])} if second else {}),
            "": ", ".join(r["flags"]),
        }
        for r in found["rules"]
    ]
    right = f", {_number(found['right'])} right" if rewarded else ""
    title = (
        f"round {found['round']}: {found['trajectories']:,} trajectories, {found['tokens']:,} tokens, "
        f"mean length {_number(found['length'], 1)}, {_number(found['repetition'])} of 4-grams repeat{right}"
    )
    show(rows, False, title)


def _show_signal(found: dict[str, Any]) -> None:
    """Where the signal of each rule is, beside how many tokens are there, and how far it agrees with the first."""
    from fire_data.compare.tally import HEAD

    first = found["agreement"]["rules"][0]
    rows: list[dict[str, Any]] = [
        {
            "rule": r["rule"],
            "top 1%": _number(r["signal_in_top"]),
            "positive": _number(r["signal_positive"]),
            **{title: _number(r["signal_in"][place]) for place, title in _SIGNAL.items()},
            "same rows": _number(found["agreement"]["kept"][0][i]),
            "same top 5%": _number(found["agreement"]["top"][0][i]),
            "correlation": _number(found["agreement"]["correlation"][0][i]),
        }
        for i, r in enumerate(found["rules"])
    ]
    places = {title: _number(found["places"][place]["tokens"]) for place, title in _SIGNAL.items()}
    rows.append({"rule": "(of tokens)", "top 1%": _number(HEAD), **places})
    late = found["places"]["late"]["from"]
    typer.echo()
    title = f"shares of the signal, sum |coefficient|; late: from position {late} on; agreement with {first}"
    show(rows, False, title)


def _show_matrix(found: dict[str, Any]) -> None:
    """Correlations of coefficients between all rules, where these are few."""
    names = found["agreement"]["rules"]
    if not 2 < len(names) <= _MATRIX:
        return
    rows = [
        {"rule": f"{i + 1} {name}", **{str(j + 1): _number(r) for j, r in enumerate(line)}}
        for i, (name, line) in enumerate(zip(names, found["agreement"]["correlation"], strict=True))
    ]
    typer.echo()
    show(rows, False, "correlation of coefficients over all tokens")


def _show_remarks(found: dict[str, Any]) -> None:
    """What the flags mean here, one line for all rules that have the same, and what could not be computed."""
    remarks: dict[str, list[str]] = {}
    for r in found["rules"]:
        for flag, why in r["flags"].items():
            remarks.setdefault(f"{flag}: {why}", []).append(r["rule"])
    if remarks or found["not_computable"]:
        typer.echo()
    for why, names in remarks.items():
        typer.echo(visible(f"{why} ({', '.join(names)})"))
    for lost in found["not_computable"]:
        typer.echo(visible(f"{lost['rule']} cannot be computed: {lost['why']}"))
        if lost["fix"]:
            typer.echo(visible(f"  fix: {lost['fix']}"))


def _number(value: float | None, digits: int = 3) -> str | None:
    return None if value is None else f"{value:.{digits}f}"
