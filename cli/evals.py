"""`fire eval` and `fire verify`: how good the student is on held-out prompts, and rewards for what it wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import guarded, say, visible
from .options import Address, Json, Ray, Redo, Round, RunArg, Set, carried, cluster, flag, open_run, round_of
from .terminal import Terminal, hint, show, show_one

_NO_ROW = ("intervals", "verdicts")  # of the statistics, what has a form of its own
_BOUNDS = (("low", "low 95%"), ("high", "high 95%"))


@guarded
def evaluate(
    run: RunArg,
    round: Annotated[
        int | None,
        typer.Option("--round", min=0, metavar="N", help="the student after this round; default: the last"),
    ] = None,
    start: Annotated[bool, flag("--start", help="the student before training")] = False,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="names in eval.prompts, or files: JSONL, Parquet, hf://...; default: all"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="WHICH", help="compare with another evaluation: start, a round, or RUN2:3, RUN2:start"),
    ] = None,
    redo: Annotated[bool, flag("--redo", help="set these evaluations aside first")] = False,
    ray: Ray = False,
    address: Address = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Accuracy on held-out prompts: greedy, avg@n, pass@k, maj@k.

    Every number has a 95 % interval (bootstrap over prompts). verify.kind says
    how an answer is judged. --against adds the difference to another checkpoint.
    """
    opened = open_run(run, overrides)
    from fire_data.schemas.errors import ConfigError
    from fire_data.session import Session
    from fire_data.shards import is_sealed
    from fire_data.steps.benchmarks import benchmarks
    from fire_data.steps.evaluate import evaluate as step
    from fire_data.steps.versus import other_evaluation, require_other, shared, versus

    if start and round is not None:
        raise ConfigError("the start is no round", where=f"--round {round} --start", fix="give one of them")
    last = opened.current_round() - 1
    number = None if start or (round is None and last < 0) else last if round is None else round
    where = "start" if number is None else number
    other = other_evaluation(opened, against) if against is not None else None
    if other is not None and other != (opened, where):
        require_other(*other, benchmarks(opened, prompts))
    with Terminal() as terminal, Session(opened, terminal, cluster(opened, ray, address)) as session:
        made = step(session, number, prompts, redo=redo)
    found: list[dict[str, Any]] = []
    if other is not None:
        pairs = shared(opened, where, *other, list(made))
        found = [versus(mine, theirs, opened.config.eval.k, opened.config.seed) for mine, theirs in pairs]
    stats = {name: manifest.stats for name, manifest in made.items()}
    if as_json:
        named = {str(name): values for name, values in stats.items() if name is not None}
        more = {**({"benchmarks": named} if named else {}), **({"against": found} if against is not None else {})}
        show_one({"round": where, **stats.get(None, {}), **more}, True)
    else:
        _show_metrics(where, stats)
        for pair in found:
            _show_difference(pair)
    if other is None and where != "start" and any(is_sealed(opened.part("evals", "start", name)) for name in made):
        same = ["--prompts", prompts] if prompts else []
        hint("fire", "eval", run, *carried(opened, overrides), "--round", where, *same, "--against", "start")


def _show_metrics(where: int | str, stats: dict[str | None, dict[str, Any]]) -> None:
    for name, values in stats.items():
        metrics = [k for k in values if k == "greedy" or "@" in k]
        intervals = values.get("intervals", {})
        rows = [
            {
                "metric": k,
                "value": values[k],
                **dict(zip((title for _, title in _BOUNDS), intervals.get(k, (None, None)), strict=True)),
            }
            for k in metrics
        ]
        title = f"student {'before training' if where == 'start' else f'after round {where}'}"
        show(rows, False, title if name is None else f"{name}, {title}")
        show_one({k: v for k, v in values.items() if k not in (*_NO_ROW, *metrics)}, False)
        if verdicts := values.get("verdicts"):
            typer.echo(visible("verdicts: " + ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())))


def _show_difference(pair: dict[str, Any]) -> None:
    rows = [
        {
            "metric": row["metric"],
            **{k: row[k] for k in ("this", "against")},
            **{title: f"{row[k]:+.4f}" for k, title in (("difference", "difference"), *_BOUNDS)},
            "p": "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}",
            "prompts": row["prompts"],
        }
        for row in pair["metrics"]
    ]
    typer.echo()
    show(rows, False, f"{pair['this']} against {pair['against']}, paired over prompts")
    for note in pair["notes"]:
        say(f"note: {note}")


@guarded
def verify(
    run: RunArg,
    round: Round = None,
    kind: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="exact, math, choice, code or FILE.py:function; default: verify.kind"),
    ] = None,
    redo: Redo = False,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Grade what the student wrote; no model is loaded.

    The rewards lie beside the rollouts, and rules that ask whether an answer is
    right read them: verified-only, ra-opd, rg-opd and others.
    """
    from fire_data.rules import own
    from fire_data.steps.verify import verify as step

    # A file on the command line is named from here, one in fire.yaml from the run.
    chosen = [] if kind is None else [f"verify.kind={own.moved(kind, lambda file: str(Path.cwd() / file))}"]
    opened = open_run(run, [*(overrides or []), *chosen])
    number = round_of(opened, round)
    with Terminal() as terminal:
        manifest = step(opened, number, terminal, redo=redo)
    show_one({"round": number, **manifest.stats}, as_json)
    from fire_data.shards import is_sealed

    following = "weigh" if is_sealed(opened.part("scores", number)) else "score"
    hint("fire", following, run, *carried(opened, overrides, round=number))
