"""The commands: each reads options, calls one function of the library and shows what it returns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import entry, guarded, say
from .terminal import Terminal, hint, show, show_one

if TYPE_CHECKING:
    from fire_data.run import Run
    from fire_data.schemas.config import RayConfig

app = typer.Typer(
    name="fire",
    help="Offline-first on-policy distillation: roll out, score, weigh, train, with tables in between.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RunArg = Annotated[Path, typer.Argument(metavar="RUN", help="the run directory")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a field of fire.yaml")]
Round = Annotated[int | None, typer.Option("--round", min=0, help="default: the first round that is not trained")]
Redo = Annotated[bool, typer.Option("--redo", help="set the stage and all that was made from it aside first")]
Ray = Annotated[bool, typer.Option("--ray", help="place engines on a Ray cluster: ray.address, else one started here")]
Address = Annotated[
    str | None, typer.Option("--ray-address", metavar="HOST:PORT", help="place engines on this Ray cluster")
]
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"fire-opd {version('fire-opd')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Offline-first on-policy distillation: roll out, score, weigh, train, with tables in between."""


def _open(root: Path, overrides: list[str] | None = None) -> Run:
    from fire_data.run import open_run

    return open_run(root, tuple(overrides or ()))


def _cluster(run: Run, ray: bool, address: str | None) -> RayConfig | None:
    """The cluster that is asked for, with the other settings of the section `ray`."""
    if not ray and address is None:
        return None
    return run.config.ray.model_copy(update={"address": address} if address else {})


def _number(run: Run, chosen: int | None) -> int:
    return run.current_round() if chosen is None else chosen


def _shown(stats: dict[str, Any]) -> dict[str, Any]:
    """Statistics for people: routes by name, and only where there are several."""
    routes = {name or "-": rows for name, rows in stats.get("routes", [])}
    plain = {k: v for k, v in stats.items() if k != "routes"}
    return {**plain, "teachers": routes} if len(routes) > 1 else plain


@app.command()
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
        fork_run(_open(source), run, values)
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


@app.command()
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
    opened = _open(run, overrides)
    number = _number(opened, round)
    from fire_data.session import Session
    from fire_data.steps.rollout import rollout as step

    with Terminal() as terminal, Session(opened, terminal, _cluster(opened, ray, address)) as session:
        manifest = step(session, number, redo=redo)
    show_one({"round": number, **_shown(manifest.stats)}, as_json)
    hint("fire", "score", run)


@app.command()
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
    opened = _open(run, overrides)
    number = _number(opened, round)
    every = opened.teacher_addons(teachers) if teachers is not None else ()
    from fire_data.session import Session
    from fire_data.shards import sealed
    from fire_data.steps.score import score as step

    with Terminal() as terminal, Session(opened, terminal, _cluster(opened, ray, address)) as session:
        manifest = step(session, number, add=[*(add or ()), *every], redo=redo)
    added = {name: sealed(opened.part("addons", number, name)).stats for name in opened.addons(number)}
    show_one({"round": number, **_shown(manifest.stats), **added}, as_json)
    from fire_data.overview import next_command

    following = next_command(opened)
    hint(*((following,) if " --add " in following else ("fire", "weigh", run)))


@app.command()
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
    opened = with_rule(_open(run, [*(overrides or []), *chosen]), rule, name, param or [], scope, denominator)
    number = _number(opened, round)
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


@app.command()
@guarded
def train(run: RunArg, round: Round = None, redo: Redo = False, overrides: Set = None, as_json: Json = False) -> None:
    """Execute the coefficients and export the student."""
    opened = _open(run, overrides)
    number = _number(opened, round)
    from fire_data.session import Session
    from fire_data.steps.train import train as step

    with Terminal() as terminal, Session(opened, terminal) as session:
        manifest = step(session, number, redo=redo)
    checkpoint = str(opened.part("checkpoints", number).folder)
    show_one({"round": number, "checkpoint": checkpoint, **manifest.stats}, as_json)
    hint("fire", "run", run, "--rounds", number + 2)


@app.command("run")
@guarded
def run_rounds(
    run: RunArg,
    rounds: Annotated[int, typer.Option(min=1, help="rounds in all, not more rounds")] = 1,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Refresh rounds: rollout, score, weigh, train and evaluate, again and again."""
    opened = _open(run, overrides)
    from fire_data.session import Session
    from fire_data.steps.refresh import refresh

    with Terminal() as terminal, Session(opened, terminal) as session:
        table = refresh(session, rounds)
    show(table, as_json)
    hint("fire", "inspect", run)


@app.command("eval")
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
    opened = _open(run, overrides)
    from fire_data.session import Session
    from fire_data.steps.evaluate import evaluate as step

    last = opened.current_round() - 1
    number = None if start or (round is None and last < 0) else last if round is None else round
    with Terminal() as terminal, Session(opened, terminal) as session:
        manifest = step(session, number, redo=redo)
    show_one({"round": "start" if number is None else number, **manifest.stats}, as_json)


@app.command()
@guarded
def status(run: RunArg, as_json: Json = False) -> None:
    """Which stages of which rounds are done."""
    from fire_data import overview

    opened = _open(run)
    rows = overview.status(opened)
    if rows or as_json:
        show(rows, as_json)
    hint(overview.next_command(opened))


@app.command()
@guarded
def check(run: RunArg, as_json: Json = False) -> None:
    """Compare every finished file with its receipt; exit 3 if one differs."""
    from fire_data import overview

    opened = _open(run)
    damage = overview.check(opened)
    if damage or as_json:
        show(damage, as_json)
    if damage:
        say(f"damaged files: {len(damage)}")
        hint(damage[0]["fix"])
        raise typer.Exit(3)
    say("every file is as its receipt says")


@app.command()
@guarded
def inspect(
    run: RunArg,
    which: Annotated[
        str, typer.Argument(metavar="TRAJECTORY", help="row number or beginning of a trajectory_id")
    ] = "0",
    round: Annotated[int | None, typer.Option("--round", min=0, help="default: the last with rollouts")] = None,
    name: Annotated[str | None, typer.Option(help="folder under weights/")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="the columns of every table with units")] = False,
    as_json: Json = False,
) -> None:
    """Show one trajectory with its tokens coloured by weight and the numbers under them."""
    from .inspect import show_schema, show_trajectory

    if schema:
        show_schema(as_json)
        return
    opened = _open(run)
    show_trajectory(opened, opened.last_round() if round is None else round, which, name, as_json)


@app.command()
@guarded
def diagnose(
    run: RunArg,
    round: Annotated[int | None, typer.Option("--round", min=0, help="default: the last with scores")] = None,
    name: Annotated[str | None, typer.Option(metavar="WEIGHTS", help="folder under weights/")] = None,
    as_json: Json = False,
) -> None:
    """Check FiRe's premise and known pathologies on the scores; no model is loaded."""
    from .diagnose import show_diagnosis

    show_diagnosis(_open(run), round, name, as_json)


@app.command()
@guarded
def compare(
    run: RunArg,
    rules: Annotated[
        str | None,
        typer.Option(
            metavar="A,B,...",
            help="names, a+b or file.py:Class, each with parameters in square brackets; default: fire and controls",
        ),
    ] = None,
    round: Annotated[int | None, typer.Option("--round", min=0, help="default: the last with scores")] = None,
    late: Annotated[
        int | None, typer.Option(min=0, help="the first position that counts as late; default: by the 75 % quantile")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="draw it as .svg or .png")] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Compare rules on one scored table: what each keeps, where its signal is, how far they agree."""
    from .compare import show_comparison

    show_comparison(_open(run, overrides), round, rules, late, plot, as_json)


@app.command()
@guarded
def rules(
    name: Annotated[str | None, typer.Argument(help="one rule in full: a name, a+b, or file.py:Class")] = None,
    as_json: Json = False,
) -> None:
    """List the rules, or show one with formula, parameters and source."""
    from .rules import show_rule, show_rules

    if name is not None:
        show_rule(name, as_json)
        return
    show_rules(as_json)
    hint("fire rules NAME")


@app.command()
@guarded
def env(as_json: Json = False) -> None:
    """Versions, devices and threads: what to paste into a bug report."""
    from fire_data.environment import environment

    show_one(environment(), as_json)


@app.command()
@guarded
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="where the small world and its runs go")],
    rule: Annotated[str, typer.Option(help="the rule to run beside uniform")] = "fire",
    rounds: Annotated[int | None, typer.Option(min=1, help="refresh rounds of each arm")] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the world, the sampling and the order of prompts")] = 0,
    as_json: Json = False,
) -> None:
    """Make a small world, a teacher and a weak student, and distil: the whole loop in minutes on a CPU."""
    from fire_data.demo.arms import run_demo

    with Terminal() as terminal:
        result = run_demo(folder, rule=rule, rounds=rounds, seed=seed, report=terminal)
    if as_json:
        show(result.table, True)
    else:
        show(result.table, False, title=f"student of {folder}")
        say(f"learning curve: {result.page}")
        say(
            f"the demo took {result.seconds:.0f} s in all: "
            + ", ".join(f"{k} {v:.0f} s" for k, v in result.timing.items())
        )
    hint("fire", "inspect", result.run)


def main() -> None:
    """Entry of the script `fire`."""
    entry(app)
