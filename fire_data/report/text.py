"""Text of models and prompts for a page: nothing in it can steer the page, and emoji stay whole.

Everything shown goes through `shown`; escaping for HTML and JSON is left to what writes those.
"""

from __future__ import annotations

import unicodedata

from fire_data.tokenview import Piece

# Marks that reorder what stands around them, and what XML cannot hold. Plain right-to-left letters are left alone.
_STEERING = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2028\u2029\u2066\u2067\u2068\u2069\ufeff\ufffe\uffff"
)
_JOINER = "\u200d"
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0020, 0xE0080)
_LONGEST_PIECE = 400  # characters of one run of tokens


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


def joined(pieces: list[Piece]) -> list[Piece]:
    """Pieces put together where a character that people see goes on: marks, joined emoji, skin tones, flags."""
    found: list[Piece] = []
    for piece in pieces:
        if found and _goes_on(found[-1].text, piece.text) and len(found[-1].text) < _LONGEST_PIECE:
            found[-1] = Piece(found[-1].text + piece.text, found[-1].start, piece.stop)
        else:
            found.append(piece)
    return found


def _goes_on(before: str, text: str) -> bool:
    """Whether the last character that people see of `before` takes in the beginning of `text`."""
    if not before or not text:
        return bool(before)  # a token without text of its own belongs to the one before it
    first = ord(text[0])
    if before.endswith(_JOINER) or text[0] == _JOINER or first in _SKIN_TONES or first in _TAGS:
        return True
    if first in _FLAG_LETTERS:
        flags = len(before) - len(before.rstrip("".join(map(chr, _FLAG_LETTERS))))
        return flags % 2 == 1
    return unicodedata.category(text[0]) in ("Mn", "Mc", "Me")
