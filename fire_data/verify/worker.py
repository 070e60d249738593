"""What runs in a process that grades: it reads batches of responses as JSON lines and writes a line for each response.

Nothing here needs to be quick to end: the process may be killed at any moment, and is when a response takes too long.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
from collections.abc import Callable
from typing import Any, NoReturn

from fire_data import pyfile
from fire_data.schemas.errors import ConfigError, FireError
from fire_data.verify import program, sandbox
from fire_data.verify.answers import (
    MEMORY,
    NO_ANSWER,
    RIGHT,
    TIMEOUT,
    WRONG,
    Graded,
    compile_pattern,
    extract,
    grade_exact,
)
from fire_data.verify.choice import grade_choice

Task = dict[str, Any]
Grader = Callable[[Task], Graded]
_FUNCTION = "grading function"


def main(recipe: str) -> None:
    """Grade what comes in until the pipe is closed. `recipe` (JSON): kind, pattern, limits, scratch folder."""
    told = json.loads(recipe)
    tasks, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)  # what a user's function prints is no answer

    def say(message: Task) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        answers.flush()

    try:
        grade, facts = _MAKERS.get(told["kind"], _own)(told, tasks.fileno())
    except FireError as error:
        say({"error": {"what": error.what, "where": error.where, "fix": error.fix}})
        return
    say({"ready": facts})
    if told["kind"] != "code":  # whose programs have limits of their own
        _limit_memory(told["memory_mb"])
    for line in tasks:
        for task in json.loads(line):
            try:
                say({"graded": grade(task)})
            except MemoryError:
                say({"graded": Graded(0.0, MEMORY), "last": True})
                _leave()
            except FireError as error:
                say({"error": {"what": error.what, "where": error.where, "fix": error.fix}})
                _leave()


def _leave() -> NoReturn:
    """End without taking the interpreter apart, for which there may be no memory."""
    os._exit(0)


def _limit_memory(megabytes: int) -> None:
    """So much beside what the process has now, its libraries loaded."""
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        most = now + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _picked(grade: Callable[[str | None, str], Graded]) -> Callable[[Task, int], tuple[Grader, Task]]:
    """A maker for a verifier that compares the text that the pattern finds."""

    def make(told: Task, _: int) -> tuple[Grader, Task]:
        pattern = compile_pattern(told["pattern"])
        return (lambda task: grade(extract(task["text"], pattern), task["answer"])), {}

    return make


def _math(told: Task, _: int) -> tuple[Grader, Task]:
    from fire_data.verify import maths

    try:
        grade = maths.grader()
    except ImportError as error:
        text = f"verify.kind math needs math-verify: {error}"
        raise ConfigError(text, where="verify.kind", fix="pip install 'fire-opd[verify]'") from None
    pattern = compile_pattern(told["pattern"])
    alone = pattern is not None

    def graded(task: Task) -> Graded:
        return grade(extract(task["text"], pattern) if alone else task["text"], task["answer"], alone)

    return graded, {}


def _code(told: Task, alive: int) -> tuple[Grader, Task]:
    """Programs of responses, run by this process, which adopts and kills whatever they start."""
    isolation, scratch = sandbox.probe(told["scratch"]), told["scratch"]

    def graded(task: Task) -> Graded:
        suite = program.read_tests(task["extra"])
        code = program.code_in(task["text"], suite.entry_point)
        if code is None:
            return Graded(0.0, NO_ANSWER)
        left = float(told["timeout_s"])
        for trial in program.trials(code, suite, os.urandom(16).hex()):
            limits = sandbox.Limits(left, told["memory_mb"])
            end = sandbox.run(trial.source, trial.stdin, limits, isolation, scratch, alive)
            left -= end.seconds
            if end.how in ("timeout", "memory") or left <= 0:
                return Graded(0.0, MEMORY if end.how == "memory" else TIMEOUT, code)
            if end.how != "exited" or not trial.passed(end.code, end.stdout):
                return Graded(0.0, WRONG, code)
        return Graded(1.0, RIGHT, code)

    return graded, {"isolation": isolation}


def _own(told: Task, _: int) -> tuple[Grader, Task]:
    """A user's function of response, answer and the prompt's other fields."""
    path, _, name = told["kind"].rpartition(":")
    module = pyfile.load(path, _FUNCTION)
    function = getattr(module, name, None)
    if not callable(function):
        there = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise ConfigError(f"there is no function {name}", where=path, fix=f"there is: {', '.join(there) or 'none'}")

    def graded(task: Task) -> Graded:
        try:
            value = function(task["text"], task["answer"], json.loads(task["extra"] or "{}"))
        except MemoryError:
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever their code raises is theirs to see
            raise ConfigError(pyfile.told(error, path, _FUNCTION), where=path, fix=f"correct {name}") from None
        if not isinstance(value, int | float) or not math.isfinite(value) or not 0 <= value <= 1:
            raise ConfigError(
                f"{name} gave {value!r}, which is no number from 0 to 1", where=path, fix="return a float"
            )
        return Graded(float(value), RIGHT if value > 0.5 else WRONG)

    return graded, {}


_MAKERS = {"exact": _picked(grade_exact), "choice": _picked(grade_choice), "math": _math, "code": _code}
