"""What grading a response gives, and the plainest way to grade: find the answer by a pattern, compare it as text."""

from __future__ import annotations

import re
from typing import NamedTuple

from fire_data.schemas.errors import ConfigError

RIGHT, WRONG, NO_ANSWER, TIMEOUT, MEMORY = "right", "wrong", "no answer", "timeout", "memory"
UNGRADED = "ungraded"  # there is nothing to compare with


class Graded(NamedTuple):
    """What a verifier says of a response. `reward`: 0 to 1; None if it was not graded.

    `extracted`: the answer found in it. `vote`: what that counts as in a majority vote, None for an abstention.
    """

    reward: float | None
    verdict: str
    extracted: str | None = None
    vote: str | None = None


def compile_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """The configured answer pattern. Raises ConfigError if it is not a regular expression."""
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        text = f"verify.pattern is not a regular expression: {error}"
        raise ConfigError(text, where=repr(pattern), fix="--set verify.pattern='# (.*)'") from None


def extract(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """The answer in a response: the last match's first group (or the match); without a pattern, the stripped text."""
    if pattern is None:
        return text.strip()
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    group = matches[-1].group(1 if pattern.groups else 0)
    return group.strip() if group is not None else None


def exact(text: str, answer: str, pattern: re.Pattern[str] | None) -> float:
    """1.0 if the extracted answer equals `answer` up to blanks at its ends, else 0.0."""
    return grade(extract(text, pattern), answer)


def grade(found: str | None, answer: str) -> float:
    """1.0 if what was found is the answer up to blanks at its ends, else 0.0."""
    return float(found == answer.strip())


def last_boxed(text: str) -> str | None:
    """What is in the last `\\boxed{...}` (or `\\fbox{...}`) whose braces are balanced; None if there is none."""
    for start in reversed([m.end() for m in re.finditer(r"\\f?boxed?\s{0,3}\{", text)]):
        depth = 1
        for brace in re.finditer(r"[{}]", text[start:]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                return text[start : start + brace.start()]
    return None


def judged(right: bool, extracted: str | None, vote: str | None) -> Graded:
    """The verdict on an answer; nothing found is no answer."""
    if extracted is None:
        return Graded(0.0, NO_ANSWER)
    return Graded(float(right), RIGHT if right else WRONG, extracted, vote)


def grade_exact(found: str | None, answer: str) -> Graded:
    """An extracted answer, compared as text, which is also its vote."""
    return judged(bool(grade(found, answer)), found, found)
