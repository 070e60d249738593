"""`fire explain`: why a trajectory was kept or dropped, and every factor of a token's coefficient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import guarded, say
from .options import Json, RunArg, Set, SomeRound, Weights, open_run
from .terminal import hint, show, show_one, stdout, text

if TYPE_CHECKING:
    from fire_data.explain import Explanation, Token
    from fire_data.explain.factors import Verdict
    from fire_data.explain.rule import Comparison, Line
    from fire_data.run import Run

_STRONGEST = 8  # tokens that are listed
_ENDS = {"max": "largest", "min": "smallest"}
_WIDE = 110  # cells in which formula and source have room beside each other
_GAP = 2  # blanks between columns
_LEAST = 24  # cells that a formula has, whatever the terminal: nothing is cropped


@guarded
def explain(
    run: RunArg,
    which: Annotated[str, typer.Argument(metavar="TRAJECTORY", help="row number or beginning of a trajectory_id")],
    token: Annotated[
        str | None,
        typer.Argument(metavar="TOKEN", help="position from 0; max, min: the largest, smallest coefficient"),
    ] = None,
    round: SomeRound = None,
    name: Weights = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Why a trajectory was kept, and where a coefficient comes from.

    Without TOKEN: what the rule's filter compared, the statistics behind it and
    the tokens that count most. With TOKEN: every factor of its coefficient, from
    log probabilities to the denominator, with formula and source. Everything is
    computed again from the scores and must agree with what is stored.
    """
    from fire_data.explain import explain as explained
    from fire_data.explain.weights import last_weighed

    opened = open_run(run, overrides)
    number = last_weighed(opened, name) if round is None else round
    found = explained(opened, number, which, name)
    position = None if token is None else found.position(token)
    if as_json:
        show_one(found.as_dict(position), True)
        return
    texts = _texts(opened, found.ids)
    options = [*(["--round", number] if round is not None else []), *(["--name", name] if name is not None else [])]
    if position is not None:
        chosen = f"{_ENDS[token]} {found.ranked_by}" if token in _ENDS else None
        _show_token(found, found.token(position), texts[position], chosen)
        hint("fire", "inspect", run, which, *options)
    else:
        _show_trajectory(found, texts)
        strongest = found.strongest(1)
        hint("fire", *(("explain", run, which, strongest[0]) if strongest else ("inspect", run, which)), *options)


def _texts(run: Run, ids: list[int]) -> list[str]:
    """What each token reads; those that only together make a character share its text with the first of them."""
    from fire_data.tokenview import pieces, student_tokenizer

    tokenizer, missing = student_tokenizer(run)
    if missing is not None:
        say(f"tokens are shown without their text: {missing}")
    texts = [""] * len(ids)
    for piece in pieces(tokenizer, ids):
        texts[piece.start] = piece.text
    return texts


def _show_trajectory(found: Explanation, texts: list[str]) -> None:
    weights, step = found.weights, found.step
    facts = {k: v for k, v in found.facts.items() if k not in ("keep", "drop_reason", "step") and v is not None}
    steps = f"{step['step']}: {step['trajectories']} trajectories, {step['kept_trajectories']} of them kept; "
    steps += f"{step['tokens']} tokens, {step['kept_tokens']} of them kept"
    about = {"weights": weights["name"], "rule": weights["rule"]["name"], "parameters": _parameters(weights["rule"])}
    show_one({**facts, "step": steps, **about, "policies": weights["policies"], "decision": _decision(found)}, False)
    _sections({
        "filters and policies": [line for verdict in found.verdicts for line in _verdict(verdict)],
        "of the trajectory and its populations": [*found.inputs, *found.statistics],
        "what its coefficients are divided by": [found.denominator],
    })  # fmt: skip
    largest = found.strongest(_STRONGEST)
    if largest:
        typer.echo()
        rows = [_strong(found.token(i), texts[i]) for i in largest]
        show(rows, False, title=f"largest coefficients of {len(found)} tokens")


def _parameters(rule: dict[str, Any]) -> dict[str, Any]:
    """Those of a rule, or of all that it is composed of."""
    if "rules" in rule:
        return {f"{one['name']}.{k}": v for one in rule["rules"] for k, v in _parameters(one).items()}
    return {k: v for k, v in rule.items() if k not in ("name", "matched") and v not in (None, {})}


def _decision(found: Explanation) -> str:
    if not found.facts["keep"]:
        return f"dropped: {found.facts['drop_reason']}"
    if not any(found.coefficients):
        return "kept, but every coefficient is 0"
    return "kept" if found.verdicts else "kept: there is no filter"


def _verdict(verdict: Verdict) -> list[Line]:
    """One line for what is said, and one for each comparison behind it."""
    from fire_data.explain.rule import Line

    said = Line(verdict.by, "keep" if verdict.keep else "drop", "" if verdict.keep else verdict.reason, verdict.source)
    return [said, *(Line("", c.holds, _compared(c), "") for c in verdict.comparisons)]


def _compared(comparison: Comparison) -> str:
    told = comparison.formula
    if comparison.operator is not None:
        told += f": {text(comparison.left)} {comparison.operator} {text(comparison.right)}"
    return told


def _strong(token: Token, reads: str) -> dict[str, Any]:
    values = {line.name: line.value for line in token.factors}
    numbers = {name: f"{values[name]:.4f}" for name in values if name in ("weight", "advantage")}
    if token.fkl_coefficient is not None:
        numbers["fkl_coefficient"] = f"{token.fkl_coefficient:.3e}"
    return {"": token.position, "token": reads, "id": token.id, "coefficient": f"{token.coefficient:+.3e}", **numbers}


def _show_token(found: Explanation, token: Token, reads: str, chosen: str | None) -> None:
    facts, weights = found.facts, found.weights
    place = f"{facts['trajectory_id']}, row {facts['row']} of round {facts['round']}, step {facts['step']}"
    about = {"token": f"{token.position} of {len(found)}, id {token.id}: {reads!r}", "trajectory": place}
    if chosen is not None:
        about["chosen"] = chosen if any(found.coefficients) else f"{chosen}: every coefficient is 0"
    show_one({**about, "weights": weights["name"], "decision": _decision(found)}, False)
    _sections({
        "of the token": token.inputs,
        "of the trajectory and its populations": [*found.inputs, *found.statistics],
        "on the way to the weight": token.terms,
        "weight": _product(token.weight_factors, "weight", token.factors[0].value),
        "coefficient": _product(token.factors, "coefficient", token.coefficient),
        "coefficient of the forward KL": _product(token.fkl_factors, "fkl_coefficient", token.fkl_coefficient),
    })  # fmt: skip


def _product(lines: list[Line], name: str, value: float | None) -> list[Line]:
    """Factors and what they multiply to; nothing for a lone one, which says it all where it is a factor itself."""
    from fire_data.explain.rule import Line

    return [*lines, Line(f"= {name}", value, "the product, as it is stored", "weights")] if len(lines) > 1 else []


def _sections(sections: dict[str, list[Line]]) -> None:
    """A table for each section that has lines, columns below columns; a narrow terminal has no column for sources."""
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    lines = [line for section in sections.values() for line in section]
    names, values = (max(cell_len(text(cell)) for cell in column) for column in list(zip(*lines, strict=True))[:2])
    room = stdout().width
    wide, console = room >= _WIDE, stdout(width=max(room, names + values + 2 * _GAP + _LEAST))
    for title, section in sections.items():
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, _GAP, 0, 0))
        table.add_column(width=names, no_wrap=True)
        table.add_column(width=values, no_wrap=True, justify="right")
        table.add_column(overflow="fold", ratio=3)
        if wide:
            table.add_column(overflow="fold", ratio=2, style="dim")
        for line in section:
            how, source = Text(text(line.formula)), text(line.source)
            if wide:
                table.add_row(text(line.name), text(line.value), how, source)
            else:
                table.add_row(text(line.name), text(line.value), how.append(f" ({source})" if source else "", "dim"))
        if section:
            typer.echo()
            console.print(Text(title, style="bold"))
            console.print(table)
