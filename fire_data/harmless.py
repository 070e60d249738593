"""Text of models, prompts and names for pages and figures: nothing in it can steer what shows it.

Everything that is shown goes through `shown`; escaping for HTML, JSON and SVG is left to what writes those. Figures
depend on it: the renderer of Vega ends the whole process over one control character.
"""

from __future__ import annotations

import unicodedata

# Marks that reorder what stands around them, and what XML cannot hold. Plain right-to-left letters are left alone.
_STEERING = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2028\u2029\u2066\u2067\u2068\u2069\ufeff\ufffe\uffff"
)


def shown(text: object, limit: int | None = None) -> str:
    """Text with its control characters and bidirectional marks as escapes, cut after `limit` characters.

    Line breaks and tabs are kept. Joiners are too: they hold emoji and letters of many scripts together.
    """
    found = str(text)
    cut = limit is not None and len(found) > limit
    escaped = "".join(c if _harmless(c) else _escape(c) for c in found[:limit])
    return f"{escaped}…" if cut else escaped


def _harmless(character: str) -> bool:
    if character in "\n\t":
        return True
    return character not in _STEERING and unicodedata.category(character) not in ("Cc", "Cs")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
