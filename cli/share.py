"""`fire push` and `fire pull`: a run's tables, or a trained student, on the Hugging Face Hub."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import completion
from .errors import guarded, say
from .options import Json, RunArg, flag, open_run
from .terminal import Terminal, hint, show_one

if TYPE_CHECKING:
    from fire_data.run import Run

Repo = Annotated[str, typer.Argument(metavar="USER/NAME", help="the repository on the Hub")]
Rounds = Annotated[
    list[int] | None,
    typer.Option(
        "--round",
        min=0,
        metavar="N",
        help="this round; may be repeated; default: all",
        autocompletion=completion.rounds,
    ),
]


@guarded
def push(
    run: RunArg,
    repo: Repo,
    round: Rounds = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE",
            help="rollouts, scores, addons, weights, evals or one of them, weights/fire; may be repeated; "
            "default: all; alone: checkpoints, the student after a round as a model",
            autocompletion=completion.stages,
        ),
    ] = None,
    flat: Annotated[bool, flag("--flat", help="also weights joined with their scores as one table")] = False,
    public: Annotated[bool, flag("--public", help="everybody may see it; default: only you")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="default: main")] = None,
    licence: Annotated[
        str | None, typer.Option(metavar="ID", help="what the card says: apache-2.0, cc-by-4.0, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Share a run on the Hub, privately.

    Sealed tables become a dataset with a card, each table under the name it has
    in the run. After an interruption the same command continues.
    """
    from fire_data.hub import push as step

    opened = open_run(run)
    with Terminal() as terminal:
        done = step(
            opened, repo, rounds=round, stages=stage, flat=flat, private=not public, revision=revision,
            licence=licence, report=terminal,
        )  # fmt: skip
    _show(done, as_json)
    if stage == ["checkpoints"]:
        hint("fire", "init", "ANOTHER_RUN", "--student", repo, "--teacher", "MODEL", "--prompts", "FILE")
    else:
        hint("fire", "pull", repo, "ANOTHER_RUN", *(["--revision", revision] if revision else []))


@guarded
def pull(
    repo: Repo,
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="a new folder, or a run of these tables", autocompletion=completion.runs),
    ],
    round: Rounds = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STAGE",
            help="rollouts, scores, addons, weights, evals or one of them, weights/fire; may be repeated; default: all",
            autocompletion=completion.stages,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REVISION", help="branch, tag or commit; default: main")
    ] = None,
    redo: Annotated[bool, flag("--redo", help="set stages that were begun here and not finished aside first")] = False,
    as_json: Json = False,
) -> None:
    """Get a shared run from the Hub.

    Every file is compared with its receipt. What comes is an ordinary run, for
    status, inspect, weigh and train. After an interruption the same command
    continues.
    """
    from fire_data.hub import pull as step

    with Terminal() as terminal:
        done = step(repo, run, rounds=round, stages=stage, revision=revision, redo=redo, report=terminal)
    _show(done, as_json)
    from fire_data.create import missing_paths

    missing = [text.partition(":") for text in missing_paths(run)]
    for setting, _, what in missing:
        say(f"warning: {setting}:{what}: it stayed with who shared this\n  fix:   {_given(run, setting)}")
    _hint(open_run(run), {setting.partition(".")[0] for setting, *_ in missing})


def _show(done: dict[str, Any], as_json: bool) -> None:
    from fire_data.hub.layout import in_words

    show_one(done if as_json else {**done, "tables": in_words(done["tables"])}, as_json)


def _given(run: Path, setting: str) -> str:
    """The command that first needs what a setting names, with its place to be filled in."""
    verb = {"student": "train", "prompts": "rollout", "eval": "eval"}.get(setting.partition(".")[0], "score")
    place = "FILE" if verb in ("rollout", "eval") else "FOLDER"
    return shlex.join(["fire", verb, str(run), "--set", f"{setting}={place}"])


def _hint(run: Run, missing: set[str]) -> None:
    """What is next; where that needs something that is missing, a look, which needs nothing."""
    from fire_data.overview import next_command
    from fire_data.shards import is_sealed

    command = next_command(run)
    verb = shlex.split(command)[1]
    seen = [n for n in run.rounds() if any(is_sealed(run.part(stage, n)) for stage in ("rollouts", "scores"))]
    if verb == "weigh" or not missing or (verb == "train" and "student" not in missing):
        hint(command)
    elif seen:
        hint("fire", "inspect", run.root, "--round", seen[-1])
    else:
        hint("fire", "status", run.root)
