"""Reads the rules to compare from one line of text: names, compositions, files and expressions, with parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fire_data.rules import own
from fire_data.schemas.config import is_expression, parse_yaml, split_rule
from fire_data.schemas.errors import ConfigError

DEFAULT = "uniform,fire,fire-paper,fire-released,random"
_OF_THE_WHOLE = ("normalise", "normalise_over", "denominator")  # parameters of a composition, not of its parts
_CLOSES = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Asked:
    """A rule to compare: as it was written, the name for `make_rule`, its parameters, and these as -p takes them."""

    label: str
    rule: str
    params: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()


def parse_rules(text: str) -> list[Asked]:
    """`a,b[percentile=30],c+d[most=0.4],my.py:Class` as rules; commas inside brackets or quotes do not part them.

    Values are YAML. Brackets belong to the name before them; of a composition, `normalise`, `normalise_over` and
    `denominator` belong to the whole. A text with `=` outside brackets is an expression. Raises ConfigError.
    """
    asked = [_asked(piece.strip(), text) for piece in _split(text, ",")]
    labels = [a.label for a in asked]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise _unreadable(text, f"{twice!r} is there twice", "name each rule once")
    return asked


def _asked(text: str, whole: str) -> Asked:
    if not text:
        raise _unreadable(whole, "there is no name" + " beside a comma" * bool(whole.strip()), f"--rules {DEFAULT}")
    label = " ".join(text.split())
    if len(_split(text, "=")) > 1 and is_expression(text):
        return Asked(label, text)
    plain, bodies = _without_brackets(text)
    names = split_rule(plain)
    params: dict[str, Any] = {}
    options = []
    for offset, body in bodies:
        after = plain[offset:].lstrip()
        if after and not after.startswith("+"):
            raise _unreadable(text, f"{after!r} follows the brackets", "name[parameter=value]")
        name = split_rule(plain[:offset])[-1]
        if len(names) > 1 and own.is_file(name):
            name = own.from_file(name).cls.name  # what a composition calls it
        for piece in _split(body, ","):
            key, value = _parameter(piece, text)
            prefixed = len(names) > 1 and "." not in key and key not in _OF_THE_WHOLE
            key = f"{name}.{key}" if prefixed else key
            if key in params:
                raise _unreadable(text, f"the parameter {key!r} is there twice", "give it once")
            params[key] = parse_yaml(value, f"the value of {key}", where=f"--rules {text}")
            options.append(f"{key}={value}")
    return Asked(label, plain.strip(), params, tuple(options))


def _parameter(piece: str, where: str) -> tuple[str, str]:
    key, equals, value = (x.strip() for x in piece.partition("="))
    if not (equals and key and value):
        raise _unreadable(where, f"{piece.strip()!r} is no parameter", "name[parameter=value,parameter=value]")
    return key, value


def _without_brackets(text: str) -> tuple[str, list[tuple[int, str]]]:
    """The text without its outermost [...], and for each of these where it was cut out and what it held."""
    plain, bodies, start = "", [], 0
    for i, char, depth in _scan(text):
        if char == "[" and depth == 1:
            plain, start = plain + text[start:i], i + 1
        elif char == "]" and depth == 0:
            bodies.append((len(plain), text[start:i]))
            start = i + 1
    return plain + text[start:], bodies


def _split(text: str, at: str) -> list[str]:
    """Parted at a character outside brackets and quotes."""
    cuts = [i for i, char, depth in _scan(text) if char == at and depth == 0]
    return [text[a:b] for a, b in zip([0, *(c + 1 for c in cuts)], [*cuts, len(text)], strict=True)]


def _scan(text: str) -> Iterator[tuple[int, str, int]]:
    """Every character outside quotes with its place and how many brackets are open after it."""
    open_: list[str] = []
    quote = ""
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
            continue
        if char in "'\"":
            quote = char
        elif char in _CLOSES:
            open_.append(_CLOSES[char])
        elif char in _CLOSES.values() and (not open_ or open_.pop() != char):
            raise _unreadable(text, f"{char!r} closes nothing", "name[parameter=value]")
        yield i, char, len(open_)
    if open_ or quote:
        raise _unreadable(text, f"{(quote or open_[-1])!r} is missing at the end", "name[parameter=value]")


def _unreadable(text: str, why: str, fix: str) -> ConfigError:
    return ConfigError(f"cannot read the rules: {why}", where=f"--rules {text}", fix=fix)
