"""A Python file that a user names, as a module: run once per content; what it raises is told with its line.

A file is code and runs when it is named; nothing is ever loaded that was not named.
"""

from __future__ import annotations

import hashlib
import sys
from importlib.machinery import SourceFileLoader
from types import ModuleType

from fire_data.schemas.errors import ConfigError


def source(path: str, what: str) -> tuple[bytes, str]:
    """The bytes of a file and their sha256 (hex). Raises ConfigError if it cannot be read.

    `what` messages call it: a rule, say.
    """
    try:
        data = SourceFileLoader("fire_file", path).get_data(path)
    except OSError as error:
        text = f"the {what} file cannot be read: {error.strerror}"
        raise ConfigError(text, where=path, fix="name a file.py") from None
    return data, hashlib.sha256(data).hexdigest()


def load(path: str, what: str) -> ModuleType:
    """The file as a module, which has its digest as `__digest__`. Raises ConfigError for whatever its code raises."""
    data, digest = source(path, what)
    name = "fire_file_" + hashlib.sha256(f"{path} {digest}".encode()).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    module = ModuleType(name)
    vars(module).update(__file__=path, __digest__=digest)
    sys.modules[name] = module  # dataclasses look their module up here
    try:
        exec(SourceFileLoader(name, path).source_to_code(data, path), vars(module))  # noqa: S102 - named to be run
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever their code raises is theirs to see
        del sys.modules[name]
        raise ConfigError(told(error, path, what), where=path, fix="correct the file") from None
    return module


def told(error: BaseException, path: str, what: str) -> str:
    """What a user's code raised, and at which line of its file."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    if isinstance(error, SyntaxError):
        line = error.lineno
    place = f" at line {line}" if line else ""
    return f"the {what}'s code fails{place}: {type(error).__name__}: {error}"
