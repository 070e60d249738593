"""A task: short programs over a list of digits, carried out step by step.

A problem is a program of three operations and a list of four digits, such as ``rev inc swap : 3 1 4 2``. The
operations are done from left to right: ``rev`` turns the list round, ``rot`` moves its first digit to the end,
``swap`` exchanges its first two digits, ``inc`` adds one to every digit modulo 10. The clean solution is one
clause per operation with the list after it, and the last list again after a single ``#``::

    | so rev 2 4 1 3 ; then inc 3 5 2 4 ; so swap 5 3 2 4 ; # 5 3 2 4

It is built like the chain arithmetic of ``arithmetic`` on purpose: the same marks, the same linking words drawn at
random, about the same length. Only what is worked out differs, so that one small model can hold both and a
teacher of one is no help in the other.

Everything here is a pure function of its arguments and of the given ``random.Random``. Texts are words
separated by single blanks; one word is one token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from fire_data.worlds.arithmetic import (
    ANSWER_MARK,
    END_OF_CLAUSE,
    LINK_WEIGHTS,
    LINKS,
    START,
    Corruption,
    derailed,
)

MODULUS = 10
LENGTH = 4
OPERATIONS_PER_PROBLEM = 3
DIGITS = tuple(str(digit) for digit in range(MODULUS))
OPERATIONS = ("rev", "rot", "inc", "swap")
COLON = ":"
WORDS = (*DIGITS, *OPERATIONS, COLON, *LINKS, START, END_OF_CLAUSE, ANSWER_MARK)

ANSWER_PATTERN = r"#\s*([^#]*?)\s*$"  # an answer of any number of words: right for both tasks


def make_problem(rng: random.Random) -> str:
    """Draws one problem: operations and digits, uniformly and independently. There are 640,000."""
    program = rng.choices(OPERATIONS, k=OPERATIONS_PER_PROBLEM)
    return " ".join([*program, COLON, *rng.choices(DIGITS, k=LENGTH)])


def apply_operation(operation: str, digits: Sequence[int]) -> list[int]:
    """The list after one step of a program."""
    if operation == "rev":
        return [*reversed(digits)]
    if operation == "rot":
        return [*digits[1:], digits[0]]
    if operation == "inc":
        return [(digit + 1) % MODULUS for digit in digits]
    if operation == "swap":
        return [digits[1], digits[0], *digits[2:]]
    raise ValueError(f"unknown operation {operation!r}: expected one of {' '.join(OPERATIONS)}")


def truth(problem: str) -> str:
    """The answer to ``problem``: the digits of the last list, separated by blanks."""
    program, digits = _parse(problem)
    for operation in program:
        digits = apply_operation(operation, digits)
    return _text(digits)


def solution(problem: str, rng: random.Random, *, misread: float = 0.0) -> str:
    """The written-out solution with random linking words.

    With ``misread`` above 0, each operation other than ``rev`` is, with that probability, copied correctly but
    carried out as ``rev``. The mistake is carried on, so that the text stays consistent.
    """
    program, digits = _parse(problem)
    text = [START]
    for operation in program:
        link = rng.choices(LINKS, LINK_WEIGHTS)[0]
        done = "rev" if operation != "rev" and rng.random() < misread else operation
        digits = apply_operation(done, digits)
        text += [link, operation, _text(digits), END_OF_CLAUSE]
    return " ".join([*text, ANSWER_MARK, _text(digits)])


def corrupted_solution(problem: str, rng: random.Random, corruption: Corruption | None = None) -> str:
    """A solution as the weak student is taught to write it: misread operations and, at times, a derailment.

    A derailed text is cut at a random word before ``#`` and goes on with random words (never ``#``, which stands
    once in every text) and a random answer.
    """
    corruption = corruption or Corruption()
    words = solution(problem, rng, misread=corruption.misread).split()
    return derailed(words, words.index(ANSWER_MARK), rng, corruption, WORDS, lambda: rng.choices(DIGITS, k=LENGTH))


def _parse(problem: str) -> tuple[list[str], list[int]]:
    program, _, digits = problem.partition(f" {COLON} ")
    return program.split(), [int(digit) for digit in digits.split()]


def _text(digits: Sequence[int]) -> str:
    return " ".join(map(str, digits))
