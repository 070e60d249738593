"""The commands of a round: make a run, roll out, score, weigh, train, and the loop over all of them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from . import completion
from .errors import guarded, say
from .launch import alone_or_member, launched, one_voice, refuse_members, speaks, train_on, trainer
from .options import (
    Address,
    Json,
    Launch,
    Ray,
    Redo,
    Round,
    Rule,
    RunArg,
    Set,
    TrackerName,
    carried,
    chosen,
    cluster,
    flag,
    open_run,
    round_of,
    with_tracker,
)
from .terminal import Terminal, hint, show, show_one


def _shown(stats: dict[str, Any]) -> dict[str, Any]:
    """Statistics for people: routes by name, and only where there are several."""
    routes = {name or "-": rows for name, rows in stats.get("routes", [])}
    plain = {k: v for k, v in stats.items() if k != "routes"}
    return {**plain, "teachers": routes} if len(routes) > 1 else plain


@guarded
def init(
    run: RunArg,
    student: Annotated[str | None, typer.Option(metavar="MODEL", help="who learns: Hub id or folder")] = None,
    teacher: Annotated[str | None, typer.Option(metavar="MODEL", help="from whom: Hub id or folder")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="JSONL, Parquet or hf://datasets/...")] = None,
    held_out: Annotated[str | None, typer.Option(metavar="FILE", help="prompts with answers, for `fire eval`")] = None,
    rule: Rule = None,
    raw: Annotated[bool | None, flag("--raw", help="no chat template (base models)")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="another run: its settings, and its round-0 rollouts and scores where they still fit",
            autocompletion=completion.runs,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a run: a folder with a commented fire.yaml.

    Every setting is in that file, with its default and a line of why. Nothing
    is downloaded or computed yet.
    """
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
    missing = missing_paths(run)
    for path in missing:
        say(f"warning: {path}")
    if as_json:
        show_one({"run": str(run), "config": str(run / "fire.yaml"), "missing": missing}, True)
    else:
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
    """The student answers the round's prompts.

    Reads the prompts, writes RUN/rollouts, shard by shard. What is finished
    stays: after a kill the same command continues.
    """
    opened = open_run(run, overrides)
    number = round_of(opened, round)
    from fire_data.session import Session
    from fire_data.steps.rollout import rollout as step

    with Terminal() as terminal, Session(opened, terminal, cluster(opened, ray, address)) as session:
        manifest = step(session, number, redo=redo)
    show_one({"round": number, **_shown(manifest.stats)}, as_json)
    hint("fire", "score", run, *carried(opened, overrides, round=number, ray=ray, address=address))


@guarded
def score(
    run: RunArg,
    add: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMNS",
            help="columns beside those of score.add: topk, base, pass-rate, teacher.NAME",
            autocompletion=completion.added,
        ),
    ] = None,
    teachers: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="score all rows with these teachers, or `all`, side by side",
            autocompletion=completion.teachers,
        ),
    ] = None,
    round: Round = None,
    redo: Annotated[
        bool, flag("--redo", help="set the scores, or the columns of --add, and all made from them aside first")
    ] = False,
    ray: Ray = False,
    address: Address = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Student and teacher rate every token the student wrote.

    Reads RUN/rollouts, writes RUN/scores: log probabilities, entropies and
    divergences of both models, in nats. Any rule can then be tried without a
    model. Columns of --add are stored beside the scores, where they lack.
    """
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

    following = shlex.split(next_command(opened))
    if "--add" in following:
        hint(*following, *carried(opened, overrides, ray=ray, address=address))
    elif following[1] == "verify":
        hint(*following, *carried(opened, overrides))
    else:
        hint("fire", "weigh", run, *carried(opened, overrides, round=number))


@guarded
def weigh(
    run: RunArg,
    rule: Annotated[
        str | None,
        typer.Option(
            metavar="RULE",
            help="a name from `fire rules`, several joined by +, or 'weight = ...; keep = ...'",
            autocompletion=completion.rules,
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="folder under weights/; default: the rule's name", autocompletion=completion.weights
        ),
    ] = None,
    param: Annotated[
        list[str] | None, typer.Option("--param", "-p", metavar="KEY=VALUE", help="a parameter of the rule")
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="SCOPE",
            help="trajectory, group, step or round, for every statistic",
            autocompletion=completion.scopes,
        ),
    ] = None,
    denominator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="tokens, all_tokens, sequences or constant", autocompletion=completion.denominators
        ),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="of several: routed, average, confident, token, or the name of one",
            autocompletion=completion.combinations,
        ),
    ] = None,
    round: Round = None,
    redo: Redo = False,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """A rule turns scores into one coefficient per token.

    Reads RUN/scores, writes RUN/weights/NAME: seconds on a CPU, and no model.
    Other rules can be tried on the same scores; what is trained stays what
    fire.yaml says.
    """
    from fire_data.create import with_rule
    from fire_data.steps.weigh import weigh as step

    configured = open_run(run, overrides)
    of = [f"weigh.teacher={teacher}"] if teacher is not None else []
    opened = with_rule(open_run(run, [*(overrides or []), *of]), rule, name, param or [], scope, denominator)
    number = round_of(opened, round)
    weights = opened.config.weights_name
    with Terminal() as terminal:
        manifest = step(opened, number, terminal, redo=redo)
    stats = {k: v for k, v in manifest.stats.items() if k not in ("rule", "steps", "weight_sum", "weight_squares")}
    show_one({"rule": weights, "round": number, **stats}, as_json)
    if opened.current_round() > number:
        hint("fire", "inspect", run, "--round", number, "--name", weights)
        return
    # Training compares what goes by the name it trains with the settings; weights of another name are as they are.
    same = weights == opened.config.trained_weights
    needed = chosen(configured, opened) if same else [f"train.weights={weights}"]
    hint("fire", "train", run, *carried(opened, [*(overrides or []), *needed], round=number))


@guarded
def train(
    run: RunArg,
    round: Round = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="HUB", help="hf://datasets/user/name: make RUN of this shared dataset first"),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="with --from: who wrote the dataset's responses, Hub id or folder"),
    ] = None,
    launch: Launch = 1,
    tracker: TrackerName = None,
    redo: Redo = False,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Train the student by its coefficients and export it.

    Reads RUN/scores and the weights named by train.weights, writes
    RUN/checkpoints, a model in Hugging Face format. Any number of processes gives
    the same model; torchrun may start them, too.
    """
    if source is not None:
        from fire_data.hub.start import start_from

        with Terminal() as terminal:
            round = start_from(run, source, student, round, terminal)
    elif student is not None:
        from fire_data.schemas.errors import ConfigError

        raise ConfigError("--student goes with --from", fix=f"fire train {run} --set student.model={student}")
    overrides = with_tracker(overrides, tracker)
    from fire_data.shards import is_sealed, sealed

    with one_voice():
        opened = open_run(run, overrides)
        number = round_of(opened, round)
        if not is_sealed(opened.part("scores", number)):
            sealed(opened.part("rollouts", number))  # of what is missing, the first is named
    if launch > 1:
        flags = [name for name, given in (("--redo", redo), ("--json", as_json)) if given]
        return train_on(launch, opened, number, overrides, *flags)
    from fire_data.session import Session
    from fire_data.steps.train import train as step

    with alone_or_member(opened) as report, Session(opened, report) as session:
        manifest = step(session, number, redo=redo)
    if not speaks():
        return None
    checkpoint = str(opened.part("checkpoints", number).folder)
    show_one({"round": number, "checkpoint": checkpoint, **manifest.stats}, as_json)
    from fire_data.create import missing_paths

    if opened.teachers and not missing_paths(run):
        hint("fire", "run", run, "--rounds", number + 2, *launched(), *carried(opened, overrides))
    else:  # of a shared run, say: what another round needs stayed elsewhere
        hint("fire", "inspect", run, "--round", number)


@guarded
def run_rounds(
    run: RunArg,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="rounds in all, not more rounds")] = 1,
    launch: Launch = 1,
    tracker: TrackerName = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Round after round: rollout, score, weigh, train, eval.

    Each round's student writes the next one's answers. Finished rounds are left
    alone, and after a kill the same command continues.
    """
    refuse_members()
    overrides = with_tracker(overrides, tracker)
    opened = open_run(run, overrides)
    from fire_data.session import Session
    from fire_data.steps.refresh import refresh
    from fire_data.steps.train import train as here

    with Terminal() as terminal, Session(opened, terminal) as session:
        table = refresh(session, rounds, here if launch == 1 else trainer(launch, overrides, terminal))
    show(table, as_json)
    hint("fire", "inspect", run)
