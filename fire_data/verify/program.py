"""The code in a response and the tests of its prompt, as programs to run and what they must write.

Tests are other fields of the prompt, any of:

- `tests`, `test_list` or `test`: Python text, or a list of it, run behind the response's code; an `AssertionError`, or
  any other, fails. `test_setup_code` runs before the code. With `entry_point`, a function `check` that the tests define
  is called with the function of that name.
- `tests` as a list of `{"input": ..., "output": ...}`, or `input_output` as `{"inputs": [...], "outputs": [...]}`: what
  the program reads, and what it must print, compared word by word.

Tests run in the process that runs the code. Code that exits early fails, because the word that says "passed" is read
after it ran; code that goes looking for that word could still find it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*(\w*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.MULTILINE | re.DOTALL)
_PYTHON = ("", "python", "py", "python3")
_FORMS = 'tests: ["assert f(1) == 2"], or tests: [{"input": "1", "output": "2"}]'


class Suite(NamedTuple):
    """The tests of a prompt: Python to run behind the code, or pairs of standard input and output."""

    setup: str = ""
    checks: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    entry_point: str | None = None


class NoTestsError(ValueError):
    """The fields of a prompt hold no tests that could be run; the text says why, behind the prompt's name."""


def read_tests(extra: str | None) -> Suite:
    """The tests in a prompt's other fields (JSON). Raises NoTestsError."""
    fields = json.loads(extra) if extra else {}
    given = next(((k, fields[k]) for k in ("tests", "test_list", "test", "input_output") if fields.get(k)), None)
    if given is None:
        raise NoTestsError(f"has no tests; give it {_FORMS}")
    name, value = given
    if name == "input_output":
        value = _pairs(value)
    entry = fields.get("entry_point")
    items = value if isinstance(value, list) else [value]
    if all(isinstance(i, dict) and isinstance(i.get("input"), str) and isinstance(i.get("output"), str) for i in items):
        return Suite(pairs=tuple((i["input"], i["output"]) for i in items))
    if not all(isinstance(i, str) for i in items):
        raise NoTestsError(f"has `{name}` that are neither Python nor pairs of input and output; give it {_FORMS}")
    setup = fields.get("test_setup_code") or ""
    for text in (setup, *items):
        try:
            compile(text, name, "exec")
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise NoTestsError(f"has `{name}` that are not Python: {error}") from None
    return Suite(setup, tuple(items), entry_point=entry if isinstance(entry, str) else None)


def _pairs(value: Any) -> Any:
    """`{"inputs": [...], "outputs": [...]}`, as it is or as JSON text, as a list of pairs."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
        return [{"input": i, "output": o} for i, o in zip(found["inputs"], found["outputs"], strict=True)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise NoTestsError("has an `input_output` that is not {inputs: [...], outputs: [...]}, equally many") from None


def code_in(text: str, entry_point: str | None = None) -> str | None:
    """The code of a response: its last fenced block of Python, of several the last that defines `entry_point`.

    A response without any fence is code itself if it can be compiled, else there is none.
    """
    blocks = [m[3] for m in _FENCE.finditer(text) if m[2].lower() in _PYTHON]
    if blocks:
        defining = [
            b for b in blocks if entry_point and re.search(rf"^def {re.escape(entry_point)}\b", b, re.MULTILINE)
        ]
        return (defining or blocks)[-1]
    if _FENCE.search(text) or not text.strip():
        return None
    try:
        compile(text, "response", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return text


class Trial(NamedTuple):
    """One run: the program, what it reads, and what its standard output must be."""

    source: str
    stdin: bytes
    expected: str

    def passed(self, code: int, stdout: bytes) -> bool:
        """Exit code 0, and the expected words in this order."""
        return code == 0 and stdout.decode(errors="replace").split() == self.expected.split()


def trials(code: str, suite: Suite, token: str) -> list[Trial]:
    """The runs that code must pass. `token`: a word nobody can guess, written when all checks have passed."""
    if suite.pairs:
        return [Trial(code, given.encode(), expected) for given, expected in suite.pairs]
    called = f"\ncheck({suite.entry_point})\n" if suite.entry_point and _defines_check(suite.checks) else ""
    told: list[dict[str, Any]] = [
        {"setup": suite.setup, "code": code},
        {"checks": [*suite.checks, *([called] if called else [])], "token": token},
    ]
    return [Trial(_RUNNER, b"".join(json.dumps(t).encode() + b"\n" for t in told), token)]


def _defines_check(checks: Sequence[str]) -> bool:
    return any(re.search(r"^def check\(", text, re.MULTILINE) for text in checks)


# Runs inside of the sandbox. What is behind the first line is read when the code has run.
_RUNNER = """\
import json, os, sys

told = os.fdopen(os.dup(0), "rb", buffering=0)
passed = os.dup(1)
nothing = os.open(os.devnull, os.O_RDWR)
os.dup2(nothing, 0)
os.dup2(nothing, 1)
first = json.loads(told.readline())
space = {"__name__": "solution"}
exec(compile(first["setup"], "setup", "exec"), space)
exec(compile(first["code"], "solution", "exec"), space)
second = json.loads(told.readline())
for i, check in enumerate(second["checks"]):
    exec(compile(check, f"test {i}", "exec"), space)
os.write(passed, second["token"].encode())
os._exit(0)
"""
