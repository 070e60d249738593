"""Builds what an experiment needs of a world for a seed: model folders, prompts and held-out prompts.

Each part appears when it is whole, so the same call after an interruption continues with what is missing, and worlds of
a seed that name the same part share it. Problems come from one pool for each task and seed: its first ones are held
out, the next are prompts, and no model was trained on any of them.

Layout: `models/PART/` are Hugging Face folders (fp32 safetensors, word-level tokenizer, chat template), `WORLD/` holds
`prompts.jsonl`, `main.jsonl` and `retain.jsonl` with `prompt_id`, `messages`, `answer` and, in prompts, `teacher`: the
name of the task, which is the route where there are several teachers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from fire_data.worlds import lost
from fire_data.worlds.registry import PARTS, TASKS, WORLDS, Part, World, is_lost
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

PROMPTS, MAIN, RETAIN = 2048, 256, 128
WORDS = tuple(dict.fromkeys([*(word for task in TASKS.values() for word in vars(task)["WORDS"]), *lost.JUNK]))
_REPLACED = 2  # words of a noisy prompt


@dataclass(frozen=True)
class Built:
    """Where the parts of a world lie; `teachers` are models by route, or one under the name `teacher`."""

    student: Path
    teachers: dict[str, Path]
    trusted: bool
    prompts: Path
    main: Path
    retain: Path


def build(folder: Path, name: str, setting: str, seed: int, report: Report | None = None) -> Built:
    """Build what is missing of a world under the folder of a seed, and say where its parts lie.

    Raises KeyError for an unknown world or setting, ConfigError if the folder holds one of another seed.
    """
    world, report = WORLDS[name], report or silent
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder / "seed.json", {"seed": seed, "words": list(WORDS)})
    pools = {task: _pool(task, seed) for task in TASKS}
    reserved = frozenset(problem for pool in pools.values() for problem in pool)
    chosen = world.teachers[setting]
    routes = chosen if isinstance(chosen, dict) else {"teacher": chosen}
    for part in (world.student, *routes.values()):
        _part(folder / "models", part, seed, reserved, report)
    place = folder / name
    place.mkdir(exist_ok=True)
    _write(place / "main.jsonl", _shared(world.main, pools, 0, MAIN), "main")
    _write(place / "retain.jsonl", _shared(world.retain, pools, 0, RETAIN), "retain")
    _write(place / "prompts.jsonl", _prompts(world, pools, stream(seed, f"prompts of {name}")), "train")
    return Built(
        student=folder / "models" / world.student,
        teachers={route: folder / "models" / part for route, part in routes.items()},
        trusted=is_lost(name, setting),
        prompts=place / "prompts.jsonl",
        main=place / "main.jsonl",
        retain=place / "retain.jsonl",
    )


def _pool(task: str, seed: int) -> list[str]:
    """Problems that no model is trained on: the first MAIN are held out."""
    rng, found = stream(seed, f"problems of {task}"), dict[str, None]()
    while len(found) < MAIN + PROMPTS:
        found[TASKS[task].make_problem(rng)] = None
    return list(found)


def _shared(tasks: Iterable[str], pools: dict[str, list[str]], first: int, count: int) -> list[tuple[str, str, str]]:
    """Rows of (task, problem as asked, answer), the tasks in turn."""
    names = list(tasks)
    rows = [(names[i % len(names)], i // len(names) + first) for i in range(count)]
    return [(task, pools[task][at], TASKS[task].truth(pools[task][at])) for task, at in rows]


def _prompts(world: World, pools: dict[str, list[str]], rng: random.Random) -> list[tuple[str, str, str]]:
    """Training prompts in random order, tasks by their shares to within one prompt."""
    bounds, total = [], 0.0
    for task, share in world.prompts.items():
        first, total = round(total * PROMPTS), total + share
        bounds.append((task, round(total * PROMPTS) - first))
    rows = [row for task, count in bounds for row in _shared([task], pools, MAIN, count)]
    rng.shuffle(rows)
    return [(task, _noisy(text, rng) if rng.random() < world.noise else text, answer) for task, text, answer in rows]


def _noisy(problem: str, rng: random.Random) -> str:
    words = problem.split()
    for at in rng.sample(range(len(words)), _REPLACED):
        words[at] = rng.choice([word for word in WORDS if word not in lost.JUNK and word != words[at]])
    return " ".join(words)


def _write(target: Path, rows: list[tuple[str, str, str]], prefix: str) -> None:
    if target.exists():
        return
    lines = (
        json.dumps({
            "prompt_id": f"{prefix}-{task}-{number:05d}",
            "messages": [{"role": "user", "content": text}],
            "answer": answer,
            "teacher": task,
        })
        for number, (task, text, answer) in enumerate(rows)
    )  # fmt: skip
    write_whole(target, "\n".join(lines) + "\n")


def _part(folder: Path, name: str, seed: int, reserved: frozenset[str], report: Report) -> None:
    """Train a model, after the one it starts from; a model that is there was made from the same recipe."""
    part, target, tokenizer = PARTS[name], folder / name, make_tokenizer(WORDS)
    folder.mkdir(exist_ok=True)
    claim(folder / f"{name}.json", json.loads(json.dumps(asdict(part))))
    if target.exists():
        return
    if part.start is not None:
        _part(folder, part.start, seed, reserved, report)
    with one_thread():
        if part.lost:
            assert part.start is not None
            lost.wrap(folder / part.start, target, tokenizer, next(iter(part.texts)))
        else:
            _train(part, name, folder, tokenizer, seed, reserved, report)


def _train(
    part: Part, name: str, folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, reserved: frozenset[str],
    report: Report,
) -> None:  # fmt: skip
    sizes = Sizes(hidden=part.hidden, layers=part.layers, intermediate=2 * part.hidden)
    model = load_model(folder / part.start) if part.start else new_model(tokenizer, sizes, seed)
    rng = stream(seed, name)
    tasks, shares = list(part.texts), list(part.texts.values())

    def draw() -> Example:
        task = rng.choices(tasks, shares)[0]
        kind: Any = TASKS[task]
        while (problem := kind.make_problem(rng)) in reserved:
            pass
        if task in part.weak:
            return problem, kind.corrupted_solution(problem, rng, part.corruption)
        return problem, kind.solution(problem, rng)

    fit(model, tokenizer, draw, sizes, part.steps, part.rate, partial(report, name))
    save(model, tokenizer, folder / name)
