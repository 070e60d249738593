"""Grades answers to maths problems with math-verify: equal values count, however they are written.

What is compared is the last `\\boxed{}` of a response, else what follows its last `####` or "answer is", else what
math-verify finds. Words are compared as words, not as products of letters. The package is imported where an answer is
graded, in a worker process: its own time limits rest on signals in a main thread, and sympy may not listen to them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from fire_data.verify.answers import Graded, judged, last_boxed

_SEPARATED = re.compile(r"(?<=\d)(?:\\[,!:; ]|\{,\})(?=\d{3}(?!\d))")  # 10\,000 and 10{,}000
_EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?!\w)")  # 6.02e23
_SAID = re.compile(r"(?:####|\banswer(?:\s+is\b|\s*:))[\s:*]*(\S[^\n]*)", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|textit)\s*\{([^{}]*)\}|[$*`]|\\[,;!: ]")
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s-]+[^\W\d_]+)*")
_DIGITS = 12  # of a number's value
_HIGH = 10_000  # powers whose value may take for ever
_APART = 1e-3
_FEW = 8  # words that may be an answer without being announced


def grader() -> Callable[[str | None, str, bool], Graded]:
    """A function of (text, answer, whether the text is the answer alone). Raises ImportError without math-verify."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of limits that are set here
    forms = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def parsed(text: str, alone: bool) -> list[Any]:
        text = _EXPONENT.sub(r"\1 \\times 10^{\2}", _SEPARATED.sub("", text))
        made: list[Any] = parse(f"\\boxed{{{text}}}" if alone else text, forms, parsing_timeout=None)
        return made

    def found(text: str, alone: bool) -> tuple[str, list[Any]]:
        """An answer as it is written, empty if there is none, and what math-verify reads in it."""
        marked = text if alone else last_boxed(text)
        if marked is not None:
            return marked.strip(), parsed(marked, True)
        sentence = said(text)
        made = parsed(sentence or text, False)
        words = sentence or (str(made[-1]) if made else _only_line(text))
        return words, made or (parsed(words, True) if words else [])

    def grade(text: str | None, answer: str, alone: bool) -> Graded:
        words, made = found(text, alone) if text is not None else ("", [])
        if not words:
            return judged(False, None, None)
        same = plain(words) == plain(answer)
        if _WORDS.fullmatch(plain(answer)):
            return judged(same, words, plain(words))
        if not same:
            gold = parsed(answer, True)
            same = verify(gold, made, allow_set_relation_comp=True, timeout_seconds=None)
            same = same and _alike(_value(gold), _value(made))
        return judged(same, words, _vote(made, words))

    return grade


def said(text: str) -> str:
    """What a response calls its answer in so many words, to the end of the sentence; empty if it does not."""
    found = [m[1] for m in _SAID.finditer(text)]
    return re.split(r"[.!?](?:\s|\**$)", found[-1])[0].strip("* ") if found else ""


def plain(text: str) -> str:
    """Words without the marks around them, in small letters."""
    return " ".join(_WRAPPED.sub(lambda m: m[1] or "", text).strip(" .").casefold().split())


def _only_line(text: str) -> str:
    """A response that is nothing but its answer; empty if it is more."""
    lines = text.strip().splitlines()
    return lines[0] if len(lines) == 1 and len(lines[0].split()) <= _FEW else ""


def _value(made: list[Any]) -> Any:
    """What was parsed, if it is a real number of which sympy can tell the decimals; else None."""
    number: Any = made[0] if made else None
    if not (getattr(number, "is_number", False) and number.is_real and number.is_finite):
        return None
    from sympy import Pow

    huge = any(not (p.exp.is_Rational and abs(p.exp) < _HIGH) for p in number.atoms(Pow))
    return None if huge else number.evalf(_DIGITS)


def _alike(gold: Any, value: Any) -> bool:
    """False for numbers that are plainly not equal: math-verify compares six decimals, so to it all tiny ones are."""
    if gold is None or value is None:
        return True
    return bool(abs(gold - value) <= _APART * max(abs(gold), abs(value)))


def _vote(made: list[Any], found: str) -> str:
    """Numbers count by their value, whatever they are written as; all else by its text."""
    value = _value(made)
    return plain(found) if value is None else str(value.evalf(_DIGITS))
