"""The worlds of experiments by name: what prompts ask, what student and teachers were trained on, what is stressed.

A world has tasks in its prompts, a weak student, and teachers by *setting*: `single` (one, as large as the student,
trained better), `strong` (one that is larger), `multi` (one for each task, prompts name theirs). `main` accuracy is
over the tasks to be learnt. `retain` is over what the student knew before: writing digits plus one, which no teacher
knows and which only the unknown-domain worlds have among their prompts.

Models are *parts*, built once for each seed and shared by all worlds that name them: all worlds have one tokenizer. The
weak students were trained until they knew everything, then tuned on corrupted texts, so that they mostly act on wrong
facts and still sample right ones: on-policy distillation teaches no fact that is never sampled.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Protocol

from fire_data.worlds import addition, arithmetic, lists, successor
from fire_data.worlds.arithmetic import Corruption


class Task(Protocol):
    """What a module with a task offers; those that students are weak in have `corrupted_solution` too."""

    def make_problem(self, rng: random.Random) -> str: ...
    def truth(self, problem: str) -> str: ...
    def solution(self, problem: str, rng: random.Random) -> str: ...


TASKS: dict[str, Task] = {"chain": arithmetic, "addition": addition, "lists": lists, "successor": successor}
ANSWER_PATTERN = lists.ANSWER_PATTERN  # an answer of any number of words


@dataclass(frozen=True)
class Part:
    """A model: trained for `steps` on texts of these tasks, drawn by share, from nothing or from another part.

    Texts of the tasks in `weak` are corrupted. `lost`: not trained at all but wrapped, see `worlds.lost`.
    """

    texts: dict[str, float]
    steps: int = 900
    rate: float = 6e-3
    start: str | None = None
    weak: tuple[str, ...] = ()
    corruption: Corruption = field(default_factory=Corruption)
    hidden: int = 64
    layers: int = 2
    lost: bool = False


@dataclass(frozen=True)
class World:
    """What a world is made of. `prompts` are shares of tasks; `noise` is the share of prompts with two words replaced;
    `config` are its settings over those of all worlds."""

    about: str
    prompts: dict[str, float]
    student: str
    teachers: dict[str, str | dict[str, str]]
    main: tuple[str, ...]
    retain: tuple[str, ...] = ("successor",)
    noise: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)


def _weak(task: str, start: str, **changes: Any) -> Part:
    """A student: tuned on corrupted texts of a task, while what it is to retain is kept up."""
    return Part({task: 0.7, "successor": 0.3}, 150, 2e-3, start, (task,), **changes)


_LARGE: dict[str, Any] = {"hidden": 96, "layers": 3, "rate": 4e-3}

PARTS: dict[str, Part] = {
    "chain-teacher": Part({"chain": 1.0}),
    "chain-large": Part({"chain": 1.0}, **_LARGE),
    "chain-lost": Part({"chain": 1.0}, start="chain-teacher", lost=True),
    "chain-base": Part({"chain": 0.6, "successor": 0.4}, 1400),
    "chain-student": _weak("chain", "chain-base"),
    "chain-rambler": _weak("chain", "chain-base", corruption=Corruption(derail_words=(20, 60))),
    "chain-looper": _weak("chain", "chain-base", corruption=Corruption(derail_words=(40, 70), loops=True)),
    "addition-teacher": Part({"addition": 1.0}, 1600),
    "addition-large": Part({"addition": 1.0}, 1200, **_LARGE),
    "addition-base": Part({"addition": 0.6, "successor": 0.4}, 1600),
    "addition-student": _weak("addition", "addition-base"),
    "lists-teacher": Part({"lists": 1.0}),
    "lists-base": Part({"lists": 0.6, "successor": 0.4}, 1400),
    "lists-student": _weak("lists", "lists-base"),
    "both-teacher": Part({"chain": 0.5, "lists": 0.5}, 1400),
    "both-base": Part({"chain": 0.4, "lists": 0.4, "successor": 0.2}, 1800),
    "both-student": Part(
        {"chain": 0.4, "lists": 0.4, "successor": 0.2}, 150, 2e-3, "both-base", ("chain", "lists")
    ),
}  # fmt: skip


def is_lost(world: str, setting: str) -> bool:
    """Whether a teacher of this world is one that scores and cannot write."""
    chosen = WORLDS[world].teachers[setting]
    return any(PARTS[part].lost for part in (chosen.values() if isinstance(chosen, dict) else [chosen]))


_CHAIN: dict[str, Any] = {"student": "chain-student", "main": ("chain",)}
_TEACHERS: dict[str, str | dict[str, str]] = {"single": "chain-teacher", "strong": "chain-large"}


_LISTS: dict[str, Any] = {"student": "lists-student", "main": ("lists",)}


def _mixed(share: float) -> dict[str, Any]:
    return {**_CHAIN, "prompts": {"chain": 1 - share, "successor": share}, "teachers": _TEACHERS}


WORLDS: dict[str, World] = {
    "chain": World("chain arithmetic modulo 7 with written-out steps", {"chain": 1.0}, teachers=_TEACHERS, **_CHAIN),
    "addition": World(
        "sums of three digits with a scratchpad; the student forgets carries", {"addition": 1.0}, "addition-student",
        {"single": "addition-teacher", "strong": "addition-large"}, ("addition",),
    ),
    "lists": World("programs over a list of digits, step by step", teachers={"single": "lists-teacher"}, **_LISTS,
                   prompts={"lists": 1.0}),
    "two-tasks": World(
        "chain arithmetic and list programs in equal parts", {"chain": 0.5, "lists": 0.5}, "both-student",
        {
            "single": "both-teacher", "multi": {"chain": "chain-teacher", "lists": "lists-teacher"},
            "only-chain": "chain-teacher", "only-lists": "lists-teacher",
        },
        ("chain", "lists"),
    ),
    "lost": World(
        "the teacher spreads 90 % over junk words behind the first mistake", {"chain": 1.0},
        teachers={"single": "chain-lost"}, **_CHAIN,
    ),
    "unknown-10": World("10 % of the prompts are of a task that no teacher knows and the student does", **_mixed(0.1)),
    "unknown-25": World("25 % of the prompts are of a task that no teacher knows and the student does", **_mixed(0.25)),
    "lists-unknown-10": World(
        "list programs, and 10 % of the prompts of a task that no teacher knows and the student does",
        {"lists": 0.9, "successor": 0.1}, teachers={"single": "lists-teacher"}, **_LISTS,
    ),
    "addition-unknown-10": World(
        "sums, and 10 % of the prompts of a task that no teacher knows and the student does",
        {"addition": 0.9, "successor": 0.1}, "addition-student", {"single": "addition-teacher"}, ("addition",),
    ),
    "loops": World(
        "the student falls into repeating its last one to four words, cut at 64", {"chain": 1.0}, "chain-looper",
        _TEACHERS, ("chain",), config={"rollout": {"max_new_tokens": 64}},
    ),
    "rambles": World(
        "the student derails into 20 to 60 words, cut at 64", {"chain": 1.0}, "chain-rambler", _TEACHERS, ("chain",),
        config={"rollout": {"max_new_tokens": 64}},
    ),
    "stale": World(
        "four passes over every round at twice the learning rate", {"chain": 1.0}, teachers=_TEACHERS,
        config={"train": {"epochs": 4, "lr": 1e-3}}, **_CHAIN,
    ),
    "fast": World(
        "four times the learning rate", {"chain": 1.0}, teachers=_TEACHERS, config={"train": {"lr": 2e-3}}, **_CHAIN,
    ),
    "noisy": World(
        "in a third of the prompts two words are replaced by others", {"chain": 1.0}, teachers=_TEACHERS, noise=1 / 3,
        **_CHAIN,
    ),
    "truncated": World(
        "rollouts are cut at 24 words, before the answer; held-out answers are not", {"chain": 1.0},
        teachers=_TEACHERS, config={"rollout": {"max_new_tokens": 24}, "eval": {"max_new_tokens": 48}}, **_CHAIN,
    ),
    "few": World(
        "16 prompts a round with one sample each", {"chain": 1.0}, teachers=_TEACHERS,
        config={"rollout": {"prompts_per_round": 16, "n": 1}, "train": {"batch_size": 16}}, **_CHAIN,
    ),
}  # fmt: skip
