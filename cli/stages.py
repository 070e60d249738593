"""The commands of a round: make a run, roll out, score, weigh, train, evaluate, and the loop over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import guarded, say
from .options import Address, Json, Ray, Redo, Round, RunArg, Set, cluster, open_run, round_of
from .terminal import Terminal, hint, show, show_one


def _shown(stats: dict[str, Any]) -> dict[str, Any]:
    """Statistics for people: routes by name, and only where there are several."""
    routes = {name or "-": rows for name, rows in stats.get("routes", [])}
    plain = {k: v for k, v in stats.items() if k != "routes"}
    return {**plain, "teachers": routes} if len(routes) > 1 else plain


@guarded
def init(
    run: RunArg,
    student: Annotated[str | None, typer.Option(help="Hub id or folder of the student")] = None,
    teacher: Annotated[str | None, typer.Option(help="Hub id or folder of the teacher")] = None,
    prompts: Annotated[str | None, typer.Option(help="JSONL, Parquet or hf://datasets/...")] = None,
    held_out: Annotated[str | None, typer.Option(help="prompts with answers for evaluation")] = None,
    rule: Annotated[str | None, typer.Option(help="a name from `fire rules`")] = None,
    raw: Annotated[bool | None, typer.Option("--raw", help="no chat template (base models)")] = None,
    source: Annotated[
        Path | None, typer.Option("--from", help="another run: reuse its round-0 rollouts and scores")
    ] = None,
) -> None:
    """Write a commented fire.yaml into a new run directory."""
    from fire_data.create import fork_run, init_run, missing_paths
    from fire_data.schemas.errors import ConfigError

    given: dict[str, dict[str, Any]] = {
        "student": {"model": student}, "teacher": {"model": teacher}, "prompts": {"path": prompts},
        "eval": {"prompts": held_out}, "weigh": {"rule": rule}, "rollout": {"raw": raw},
    }  # fmt: skip
    values = {s: kept for s, fields in given.items() if (kept := {k: v for k, v in fields.items() if v is not None})}
    if source is not None:
        if rule is not None:
            values["weigh"] |= {"params": {}, "name": None, "scope": None, "denominator": None}
            values["train"] = {"weights": None}
        fork_run(open_run(source), run, values)
    elif student is None:
        raise ConfigError(
            "a run needs a student", fix=f"fire init {run} --student FOLDER --teacher FOLDER --prompts FILE"
        )
    else:
        init_run(run, values)
    for missing in missing_paths(run):
        say(f"warning: {missing}")
    typer.echo(str(run / "fire.yaml"))
    hint(*(("fire", "rollout", run) if source is None else ("fire", "run", run, "--rounds", 1)))


@guarded
def rollout(
    run: RunArg,
    round: Round = None,
    redo: Redo = False,
    ray: Ray = False,
    address: Address = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Let the student answer the round's prompts."""
    opened = open_run(run, overrides)
    number = round_of(opened, round)
    from fire_data.session import Session
    from fire_data.steps.rollout import rollout as step

    with Terminal() as terminal, Session(opened, terminal, cluster(opened, ray, address)) as session:
        manifest = step(session, number, redo=redo)
    show_one({"round": number, **_shown(manifest.stats)}, as_json)
    hint("fire", "score", run)


@guarded
def score(
    run: RunArg,
    add: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMNS", help="columns beside those of score.add: topk, base, pass-rate, teacher.NAME"),
    ] = None,
    teachers: Annotated[
        str | None, typer.Option(metavar="NAMES", help="score all rows with these teachers, or `all`, side by side")
    ] = None,
    round: Round = None,
    redo: Annotated[
        bool, typer.Option("--redo", help="set the scores, or the columns of --add, and all made from them aside first")
    ] = False,
    ray: Ray = False,
    address: Address = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Evaluate student and teacher on every token the student wrote; further columns are made where they lack."""
    opened = open_run(run, overrides)
    number = round_of(opened, round)
    every = opened.teacher_addons(teachers) if teachers is not None else ()
    from fire_data.session import Session
    from fire_data.shards import sealed
    from fire_data.steps.score import score as step

    with Terminal() as terminal, Session(opened, terminal, cluster(opened, ray, address)) as session:
        manifest = step(session, number, add=[*(add or ()), *every], redo=redo)
    added = {name: sealed(opened.part("addons", number, name)).stats for name in opened.addons(number)}
    show_one({"round": number, **_shown(manifest.stats), **added}, as_json)
    from fire_data.overview import next_command

    following = next_command(opened)
    hint(*((following,) if " --add " in following else ("fire", "weigh", run)))


@guarded
def weigh(
    run: RunArg,
    rule: Annotated[str | None, typer.Option(help="a name from `fire rules`, or 'weight = ...; keep = ...'")] = None,
    name: Annotated[str | None, typer.Option(help="folder under weights/; default: the rule's name")] = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", metavar="KEY=VALUE", help="a parameter of the rule")
    ] = None,
    scope: Annotated[str | None, typer.Option(help="trajectory, group, step or round, for every statistic")] = None,
    denominator: Annotated[str | None, typer.Option(help="tokens, all_tokens, sequences or constant")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="of several: routed, average, confident, token, or the name of one")
    ] = None,
    round: Round = None,
    redo: Redo = False,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Turn scores into one coefficient per token by a rule; no model is loaded."""
    from fire_data.create import with_rule
    from fire_data.steps.weigh import weigh as step

    chosen = [f"weigh.teacher={teacher}"] if teacher is not None else []
    opened = with_rule(open_run(run, [*(overrides or []), *chosen]), rule, name, param or [], scope, denominator)
    number = round_of(opened, round)
    weights = opened.config.weights_name
    with Terminal() as terminal:
        manifest = step(opened, number, terminal, redo=redo)
    stats = {k: v for k, v in manifest.stats.items() if k not in ("rule", "steps", "weight_sum", "weight_squares")}
    show_one({"rule": weights, "round": number, **stats}, as_json)
    combined = [] if teacher is None else ["--set", f"weigh.teacher={teacher}"]
    trained = combined if weights == opened.config.trained_weights else ["--set", f"train.weights={weights}"]
    if opened.current_round() > number:
        hint("fire", "inspect", run, "--round", number, "--name", weights)
    else:
        hint("fire", "train", run, *trained)


@guarded
def train(run: RunArg, round: Round = None, redo: Redo = False, overrides: Set = None, as_json: Json = False) -> None:
    """Execute the coefficients and export the student."""
    opened = open_run(run, overrides)
    number = round_of(opened, round)
    from fire_data.session import Session
    from fire_data.steps.train import train as step

    with Terminal() as terminal, Session(opened, terminal) as session:
        manifest = step(session, number, redo=redo)
    checkpoint = str(opened.part("checkpoints", number).folder)
    show_one({"round": number, "checkpoint": checkpoint, **manifest.stats}, as_json)
    hint("fire", "run", run, "--rounds", number + 2)


@guarded
def run_rounds(
    run: RunArg,
    rounds: Annotated[int, typer.Option(min=1, help="rounds in all, not more rounds")] = 1,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Refresh rounds: rollout, score, weigh, train and evaluate, again and again."""
    opened = open_run(run, overrides)
    from fire_data.session import Session
    from fire_data.steps.refresh import refresh

    with Terminal() as terminal, Session(opened, terminal) as session:
        table = refresh(session, rounds)
    show(table, as_json)
    hint("fire", "inspect", run)


@guarded
def evaluate(
    run: RunArg,
    round: Annotated[
        int | None, typer.Option("--round", min=0, help="the student after this round; default: the last")
    ] = None,
    start: Annotated[bool, typer.Option("--start", help="the student before training")] = False,
    redo: Redo = False,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Accuracy on held-out prompts: greedy, avg@n, pass@k."""
    opened = open_run(run, overrides)
    from fire_data.session import Session
    from fire_data.steps.evaluate import evaluate as step

    last = opened.current_round() - 1
    number = None if start or (round is None and last < 0) else last if round is None else round
    with Terminal() as terminal, Session(opened, terminal) as session:
        manifest = step(session, number, redo=redo)
    show_one({"round": "start" if number is None else number, **manifest.stats}, as_json)
