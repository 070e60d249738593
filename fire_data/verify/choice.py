"""Multiple choice: which of the letters A to E a response chose, however it is written.

Forms, the surest first; a form counts only where none above it is found, and of one form the last wins:

1. boxed: `\\boxed{B}`, `\\boxed{\\text{(B)}}`;
2. said: `the answer is (B)`, `Answer: **B**`, `correct option: b)`, `I choose C`; a small letter only in
   brackets or before `)` or a full stop;
3. on a line of its own: `B`, `(B)`, `**B.**`, or at the start of the last line before its text: `B) Paris`;
4. in brackets anywhere: `... which makes (B) right`.

A letter inside a word, and the article "A" in running text, are no choice.
"""

from __future__ import annotations

import re

from fire_data.verify.answers import Graded, judged

_WRAP = r"(?:\\(?:text|mathrm|mathbf|textbf)\{)?[\s*_$`]{0,6}"  # what may stand around a letter
_ENDS = r"(?![\w'’])"
_IN_BRACKETS = r"[(\[]\s{0,2}([A-Ea-e])\s{0,2}[)\]]"
_BOXED = re.compile(rf"\\boxed\{{\s{{0,4}}{_WRAP}[(\[]?\s{{0,2}}([A-Ea-e]){_ENDS}")
_SAID = re.compile(
    r"\b(?:(?:answer|option|choice)(?:\s{1,3}(?:is|would\s+be|should\s+be))?|choose|pick|select)\s{0,3}:?\s{0,3}"
    rf"(?:option\s{{1,3}}|choice\s{{1,3}})?{_WRAP}(?:{_IN_BRACKETS}|([A-E]){_ENDS})",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"^[\s*_$`]{{0,4}}(?:{_IN_BRACKETS}|([A-E]))[.):]?[\s*_$`]{{0,4}}$", re.MULTILINE)
_LEADS = re.compile(rf"^[\s*_$`]{{0,4}}(?:{_IN_BRACKETS}|([A-E])[.):])\s")
_BRACKETS = re.compile(_IN_BRACKETS)


def chosen(text: str) -> str | None:
    """The letter that a response chose, as a capital; None if it chose none."""
    for found in (_matches(_BOXED, text), _said(text), _matches(_ALONE, text) or _last_line(text)):
        if found:
            return found[-1]
    return next(reversed(_matches(_BRACKETS, text)), None)


def _matches(form: re.Pattern[str], text: str) -> list[str]:
    return [letter.upper() for m in form.finditer(text) if (letter := next(filter(None, m.groups()), None))]


def _said(text: str) -> list[str]:
    # The words may be in any case, a bare letter may not: "the answer is a dog".
    found = [m for m in _SAID.finditer(text) if m[1] or m[2].isupper() or text[m.end() : m.end() + 1] in (")", ".")]
    return [(m[1] or m[2]).upper() for m in found]


def _last_line(text: str) -> list[str]:
    lines = text.strip().splitlines()
    return _matches(_LEADS, lines[-1] + " ") if lines else []


def gold(answer: str) -> str | None:
    """The letter that an answer is: `B`, `(b)`, `B.` or `B) Paris`; None if it is none."""
    found = re.match(r"\s*[(\[]?([A-Ea-e])(?:[)\].:]|\s*$)", answer)
    return found[1].upper() if found else None


def grade_choice(text: str | None, answer: str) -> Graded:
    """The letter chosen in a text against the right one."""
    letter = chosen(text) if text is not None else None
    return judged(letter is not None and letter == gold(answer), letter, letter)
