"""A task to be known before and forgotten: write eight digits down again, each plus one, without working.

A problem is ``succ : 3 1 4 1 5 9 2 6``, its solution ``| # 4 2 5 2 6 0 3 7``. It shares its digits and marks with the
other tasks and none of what they work out, so a teacher of those is no help here, and accuracy here says how much
training on them wipes. Everything is a pure function of its arguments and of the given ``random.Random``.
"""

from __future__ import annotations

import random

from fire_data.worlds.arithmetic import ANSWER_MARK, START

LENGTH = 8
DIGITS = tuple(map(str, range(10)))
NAME, COLON = "succ", ":"
WORDS = (*DIGITS, NAME, COLON, START, ANSWER_MARK)


def make_problem(rng: random.Random) -> str:
    """Draws one problem: eight digits, uniformly and independently."""
    return " ".join([NAME, COLON, *rng.choices(DIGITS, k=LENGTH)])


def truth(problem: str) -> str:
    """The answer to ``problem``: its digits, each plus one modulo 10."""
    return " ".join(str((int(digit) + 1) % 10) for digit in problem.split()[2:])


def solution(problem: str, rng: random.Random) -> str:
    """The answer behind its mark: nothing in it is drawn."""
    return " ".join([START, ANSWER_MARK, truth(problem)])
