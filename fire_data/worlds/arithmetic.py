"""A task: chain arithmetic modulo 7, written out step by step.

A problem is a chain such as ``3 * 2 - 4 + 5 * 6``, read strictly from left to right and modulo 7. Its clean
solution is one clause per operation and the answer after a single ``#``::

    | so 3 * 2 = 6 ; then 6 - 4 = 2 ; now 2 + 5 = 0 ; so 0 * 6 = 0 ; # 0

The linking word of each clause is drawn at random on purpose: a teacher that learnt this text is openly
uncertain at those words and sure at the arithmetic, so per-token entropies carry something for a rule to
work on.

Everything here is a pure function of its arguments and of the given ``random.Random``. Texts are words
separated by single blanks; one word is one token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MODULUS = 7
OPERATIONS_PER_PROBLEM = 4
DIGITS = tuple(str(digit) for digit in range(MODULUS))
OPERATORS = ("+", "-", "*")
LINKS = ("so", "then", "now", "next", "hence", "ok")
LINK_WEIGHTS = (6, 5, 4, 3, 2, 1)
START, EQUALS, END_OF_CLAUSE, ANSWER_MARK = "|", "=", ";", "#"
WORDS = (*DIGITS, *OPERATORS, *LINKS, START, EQUALS, END_OF_CLAUSE, ANSWER_MARK)

_LONGEST_PERIOD = 4  # words of a loop

ANSWER_PATTERN = r"#\s*(\S+)\s*$"


@dataclass(frozen=True)
class Corruption:
    """How far the texts that weaken the student are from the clean ones. Shares lie between 0 and 1."""

    misread: float = 0.6  # share of minus and times signs that are worked out as if they were plus
    derail: float = 0.15  # share of responses that break off into random words and a random answer
    derail_words: tuple[int, int] = (4, 24)  # fewest and most random words of a derailment
    loops: bool = False  # a derailment repeats its last words, one to four, instead of random ones


def make_problem(rng: random.Random) -> str:
    """Draws one problem: five digits with four operators between them, uniformly and independently."""
    words = [rng.choice(DIGITS)]
    for _ in range(OPERATIONS_PER_PROBLEM):
        words += [rng.choice(OPERATORS), rng.choice(DIGITS)]
    return " ".join(words)


def distinct_problems(rng: random.Random, count: int) -> list[str]:
    """Draws ``count`` problems, no two alike, in the order drawn. There are about 1.4 million."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make_problem(rng)] = None
    return list(found)


def apply_operator(left: int, operator: str, right: int) -> int:
    """One step of the chain, modulo 7."""
    if operator == "+":
        return (left + right) % MODULUS
    if operator == "-":
        return (left - right) % MODULUS
    if operator == "*":
        return (left * right) % MODULUS
    raise ValueError(f"unknown operator {operator!r}: expected one of {' '.join(OPERATORS)}")


def truth(problem: str) -> str:
    """The answer to ``problem`` as one digit."""
    words = problem.split()
    value = int(words[0])
    for operator, right in zip(words[1::2], words[2::2], strict=True):
        value = apply_operator(value, operator, int(right))
    return str(value)


def solution(problem: str, rng: random.Random, *, misread: float = 0.0) -> str:
    """The written-out solution with random linking words.

    With ``misread`` above 0, each minus or times sign is, with that probability, copied correctly but
    worked out as a plus. The mistake is carried on, so that the text stays consistent and only the facts
    are wrong.
    """
    words = problem.split()
    value = int(words[0])
    text = [START]
    for operator, right in zip(words[1::2], words[2::2], strict=True):
        link = rng.choices(LINKS, LINK_WEIGHTS)[0]
        worked = "+" if operator != "+" and rng.random() < misread else operator
        result = apply_operator(value, worked, int(right))
        text += [link, str(value), operator, right, EQUALS, str(result), END_OF_CLAUSE]
        value = result
    return " ".join([*text, ANSWER_MARK, str(value)])


def corrupted_solution(problem: str, rng: random.Random, corruption: Corruption | None = None) -> str:
    """A solution as the weak student is taught to write it: misread operators and, at times, a derailment.

    A derailed text is cut at a random word and goes on with random words (never ``#``, which stands once in
    every text) and a random answer.
    """
    corruption = corruption or Corruption()
    text = solution(problem, rng, misread=corruption.misread)
    words = text.split()
    return derailed(words, len(words) - 1, rng, corruption, WORDS, lambda: [rng.choice(DIGITS)])


def derailed(
    clean: Sequence[str],
    cut_before: int,
    rng: random.Random,
    corruption: Corruption,
    words: Sequence[str],
    answer: Callable[[], Sequence[str]],
) -> str:
    """A text as it is or, with probability ``corruption.derail``, its beginning, random words and an answer.

    ``cut_before``: the word that a beginning ends before, at the latest. ``answer`` draws the random answer.
    Where ``corruption.loops``, the last words of the beginning are repeated instead.
    """
    if rng.random() >= corruption.derail:
        return " ".join(clean)
    kept = clean[: rng.randrange(1, cut_before)]
    count = rng.randint(*corruption.derail_words)
    if corruption.loops:
        period = kept[-rng.randint(1, _LONGEST_PERIOD) :]
        noise = [period[at % len(period)] for at in range(count)]
    else:
        noise = rng.choices([word for word in words if word != ANSWER_MARK], k=count)
    return " ".join([*kept, *noise, ANSWER_MARK, *answer()])
