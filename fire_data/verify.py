"""Find the answer in a response and compare it; pass@k and accuracy over samples."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from fire_data.schemas.errors import ConfigError


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


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate that one of k samples is right, from `correct` of n (Chen et al. 2021, arXiv 2107.03374)."""
    return 1.0 if n - correct < k else 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def mean(values: Sequence[float]) -> float | None:
    """Correctly rounded mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None
