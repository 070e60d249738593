"""Builds a world of two tasks: teachers that are right in one each, one that knows both, a student weak in both.

Why: several teachers are of use where none is right everywhere. A teacher that is right in its own task alone may be
of no use for the other in two ways, and both are here. ``alone``: it was trained from nothing on its own task and has
never seen the other; there it writes what it knows, which is wrong. ``tuned``: it is the weak student, tuned on clean
solutions of its own task; in the other it is about as weak as the student, and no further from it. ``both`` has learnt
both tasks well: the best single teacher there could be, as a reference. The student is ``both`` tuned on corrupted
solutions of both tasks: it has seen every fact and mostly acts on wrong ones.

Layout: ``alone-math/``, ``alone-code/``, ``both/``, ``student/``, ``tuned-math/`` and ``tuned-code/`` are Hugging Face
folders with one tokenizer over the words of both tasks; ``prompts.jsonl`` and ``held_out.jsonl`` hold the tasks in
turn, one object per line with ``prompt_id`` (which begins with the task), ``messages``, ``answer`` and ``teacher``: the
route, ``math`` or ``code``. As in ``world``, each part appears when it is whole, and the same call continues with what
is missing.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from fire_data.worlds import arithmetic as tasks
from fire_data.worlds import lists
from fire_data.worlds.world import (
    Example,
    Report,
    Sizes,
    claim,
    fit,
    load_model,
    make_tokenizer,
    new_model,
    one_thread,
    save,
    silent,
    stream,
    write_whole,
)

WORDS = tuple(dict.fromkeys((*tasks.WORDS, *lists.WORDS)))
ANSWER_PATTERN = lists.ANSWER_PATTERN


class Domain(Protocol):
    """What a module with a task offers."""

    def make_problem(self, rng: random.Random) -> str: ...
    def truth(self, problem: str) -> str: ...
    def solution(self, problem: str, rng: random.Random) -> str: ...
    def corrupted_solution(self, problem: str, rng: random.Random, corruption: tasks.Corruption) -> str: ...


DOMAINS: dict[str, Domain] = {"math": tasks, "code": lists}


@dataclasses.dataclass(frozen=True)
class TwoDomains:
    """Where the parts of a built world lie; ``alone`` and ``tuned`` are teachers by the name of their task."""

    alone: dict[str, Path]
    tuned: dict[str, Path]
    both: Path
    student: Path
    prompts: Path
    held_out: Path


@dataclasses.dataclass(frozen=True)
class TwoSizes(Sizes):
    """As in ``world``, where ``teacher_steps`` are those of a teacher alone.

    The defaults take longer than there, as there are more words to learn: after 600 steps one teacher of arithmetic in
    six still got two problems of five wrong, and after 900 steps so did one of five models of both tasks.
    """

    teacher_steps: int = 900
    both_steps: int = 1400
    tuned_steps: int = 100
    tuned_rate: float = 1e-3


def build_two_domains(
    folder: Path,
    *,
    seed: int = 0,
    prompts: int = 2048,
    held_out: int = 512,
    sizes: TwoSizes | None = None,
    report: Report | None = None,
) -> TwoDomains:
    """Builds what is missing of the world under ``folder`` and says where its parts lie.

    Args:
        folder: made if absent.
        seed: decides every random choice; equal seed, processor type and library versions give equal files.
        prompts: number of training prompts; the tasks take turns, ``math`` first.
        held_out: number of evaluation prompts, which go on in turn. No model was built on either kind.
        sizes: model and training sizes, for tests and experiments.
        report: called as ``report(what, done, total)`` after each part or optimizer step, for a progress bar.

    Raises:
        ConfigError: ``folder`` holds a world built from other arguments.
    """
    sizes, report = sizes or TwoSizes(), report or silent
    world = TwoDomains(
        alone={name: folder / f"alone-{name}" for name in DOMAINS},
        tuned={name: folder / f"tuned-{name}" for name in DOMAINS},
        both=folder / "both",
        student=folder / "student",
        prompts=folder / "prompts.jsonl",
        held_out=folder / "held_out.jsonl",
    )
    folder.mkdir(parents=True, exist_ok=True)
    counts = {"domains": list(DOMAINS), "seed": seed, "prompts": prompts, "held_out": held_out}
    claim(folder / "world.json", counts | dataclasses.asdict(sizes))
    rows = _draw_rows(stream(seed, "two domains, problems"), prompts + held_out)
    _write_rows(world.prompts, rows[:prompts], "train")
    _write_rows(world.held_out, rows[prompts:], "held-out")
    report("prompts", 1, 1)
    build = partial(_build, seed=seed, sizes=sizes, reserved=frozenset(problem for _, problem in rows), report=report)
    with one_thread():
        for name, target in world.alone.items():
            build(target, [name], sizes.teacher_steps, sizes.teacher_rate)
        build(world.both, list(DOMAINS), sizes.both_steps, sizes.teacher_rate)
        build(
            world.student, list(DOMAINS), sizes.student_steps, sizes.student_rate, start=world.both,
            corruption=sizes.corruption,
        )  # fmt: skip
        for name, target in world.tuned.items():
            build(target, [name], sizes.tuned_steps, sizes.tuned_rate, start=world.student)
    return world


def _build(
    target: Path,
    names: Sequence[str],
    steps: int,
    rate: float,
    *,
    start: Path | None = None,
    corruption: tasks.Corruption | None = None,
    seed: int,
    sizes: TwoSizes,
    reserved: frozenset[str],
    report: Report,
) -> None:
    """Trains a model on texts of the named tasks, drawn with equal shares, from ``start`` or from nothing."""
    if target.exists():
        return
    tokenizer = make_tokenizer(WORDS)
    model = load_model(start) if start is not None else new_model(tokenizer, sizes, seed)
    rng = stream(seed, f"two domains, {target.name}")

    def draw() -> Example:
        domain = DOMAINS[rng.choice(names)]
        while (problem := domain.make_problem(rng)) in reserved:
            pass
        if corruption is None:
            return problem, domain.solution(problem, rng)
        return problem, domain.corrupted_solution(problem, rng, corruption)

    fit(model, tokenizer, draw, sizes, steps, rate, partial(report, target.name))
    save(model, tokenizer, target)


def _draw_rows(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """``count`` pairs of task and problem, the tasks in turn, no two problems alike."""
    rows: dict[str, str] = {}
    names = list(DOMAINS)
    while len(rows) < count:
        name = names[len(rows) % len(names)]
        rows[DOMAINS[name].make_problem(rng)] = name
    return [(name, problem) for problem, name in rows.items()]


def _write_rows(target: Path, rows: list[tuple[str, str]], prefix: str) -> None:
    lines = (
        json.dumps(
            {
                "prompt_id": f"{name}-{prefix}-{number:05d}",
                "messages": [{"role": "user", "content": problem}],
                "answer": DOMAINS[name].truth(problem),
                "teacher": name,
            }
        )
        for number, (name, problem) in enumerate(rows)
    )
    write_whole(target, "\n".join(lines) + "\n")
