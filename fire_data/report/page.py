"""Writes the page: one HTML file without any request, whose security policy allows its own style and script alone.

What models and prompts wrote travels as JSON in blocks that are no script; the page's script puts it into the document
as text. Every trajectory has a block of its own, parsed when it is looked at, so that loading does not grow with them.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files as resources
from typing import Any

from fire_data.harmless import shown

MOST_BYTES = 10_000_000

# What could end the block or begin a comment; JSON reads the escapes as the same characters.
_ESCAPES = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&"})


def render(context: dict[str, Any], index: dict[str, Any], trajectories: list[dict[str, Any]]) -> tuple[bytes, int]:
    """The page and how many of the trajectories, the first, it has room for: at least one, whatever its size."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    style, script = (resource(name) for name in ("report.css", "report.js"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": shown, "svg": Markup, "value": _value, "number": _number}
    template = environment.from_string(resource("page.html.j2"))

    def page(blocks: list[str]) -> bytes:
        entries = [{"sort": t["sort"], **_summary(t)} for t in trajectories[: len(blocks)]]
        text = template.render(
            context,
            count=len(blocks),
            style=Markup(style),
            script=Markup(script),
            hashes={"style": digest(style), "script": digest(script)},
            index=Markup(as_json({**index, "entries": entries})),
            blocks=[Markup(b) for b in blocks],
        )
        return text.encode("utf-8")

    blocks = [as_json({"a": t["a"], "b": t["b"]}) for t in trajectories]
    made = page(blocks)
    while len(made) > MOST_BYTES and len(blocks) > 1:
        excess, dropped = len(made) - MOST_BYTES, 0
        while dropped < excess and len(blocks) > 1:
            dropped += len(blocks.pop().encode())
        made = page(blocks)
    return made, len(blocks)


def as_json(value: Any) -> str:
    """Compact JSON that can stand in a `script` element, in ASCII: browsers read other text at twice the cost.

    Raises ValueError for numbers that are none.
    """
    return json.dumps(value, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _summary(trajectory: dict[str, Any]) -> dict[str, Any]:
    """What the list of trajectories shows of one."""
    facts, prompt = trajectory["a"]["facts"], trajectory["a"]["prompt"]
    asked = next((text for role, text in reversed(prompt) if role == "user"), prompt[-1][1] if prompt else "")
    wanted = ("id", "teacher", "outcome", "keep", "length", "finish")
    return {k: facts.get(k) for k in wanted} | {"prompt": shown(" ".join(asked.split()), 90)}


def digest(text: str) -> str:
    """How a policy names the style or script that it allows."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def resource(name: str) -> str:
    """A file that lies beside this module."""
    return (resources("fire_data.report") / name).read_text(encoding="utf-8")


def _value(value: Any) -> str:
    """A value of the configuration, as YAML would have it in one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shown(text, 1_000)


def _number(value: Any, style: str = ".4g") -> str:
    """A number for a cell; a dash for nothing."""
    return "–" if value is None else format(value, style)
