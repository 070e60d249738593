"""A task: the sum of two numbers digit by digit from the right, with the carry written out.

A problem is ``4 7 2 + 3 8 9``. The clean solution is one clause per digit, ``left digit + right digit + carry = digit
carry carry``, then the sum after a single ``#`` with its leading digit, which may be 0::

    | so 2 + 9 + 0 = 1 carry 1 ; then 7 + 8 + 1 = 6 carry 1 ; now 4 + 3 + 1 = 8 carry 0 ; # 0 8 6 1

It has the marks and random linking words of chain arithmetic. What is worked out needs facts of two digits and a carry,
so a student may know the facts and still forget to carry. Everything is a pure function of its arguments and of the
given ``random.Random``; texts are words separated by single blanks; one word is one token.
"""

from __future__ import annotations

import random

from fire_data.worlds.arithmetic import (
    ANSWER_MARK,
    END_OF_CLAUSE,
    EQUALS,
    LINK_WEIGHTS,
    LINKS,
    START,
    Corruption,
    derailed,
)

LENGTH = 3
DIGITS = tuple(map(str, range(10)))
PLUS, CARRY = "+", "carry"
WORDS = (*DIGITS, PLUS, CARRY, *LINKS, START, EQUALS, END_OF_CLAUSE, ANSWER_MARK)


def make_problem(rng: random.Random) -> str:
    """Draws one problem: two numbers of three digits, uniformly. There are a million."""
    left, right = (" ".join(rng.choices(DIGITS, k=LENGTH)) for _ in range(2))
    return f"{left} {PLUS} {right}"


def truth(problem: str) -> str:
    """The answer to ``problem``: four digits, separated by blanks."""
    left, right = (int(side.replace(" ", "")) for side in problem.split(PLUS))
    return " ".join(f"{left + right:0{LENGTH + 1}d}")


def solution(problem: str, rng: random.Random, *, misread: float = 0.0) -> str:
    """The written-out solution with random linking words.

    With ``misread`` above 0, each carry of 1 is, with that probability, written as 0. The mistake is carried on, so
    that the text stays consistent.
    """
    left, right = (side.split() for side in problem.split(PLUS))
    carry, digits, text = 0, [], [START]
    for a, b in zip(reversed(left), reversed(right), strict=True):
        over, digit = divmod(int(a) + int(b) + carry, 10)
        over = 0 if over and rng.random() < misread else over
        link = rng.choices(LINKS, LINK_WEIGHTS)[0]
        text += [link, a, PLUS, b, PLUS, str(carry), EQUALS, str(digit), CARRY, str(over), END_OF_CLAUSE]
        digits.append(str(digit))
        carry = over
    return " ".join([*text, ANSWER_MARK, str(carry), *reversed(digits)])


def corrupted_solution(problem: str, rng: random.Random, corruption: Corruption | None = None) -> str:
    """A solution as the weak student is taught to write it: forgotten carries and, at times, a derailment."""
    corruption = corruption or Corruption()
    words = solution(problem, rng, misread=corruption.misread).split()
    return derailed(words, words.index(ANSWER_MARK), rng, corruption, WORDS, lambda: rng.choices(DIGITS, k=LENGTH + 1))
