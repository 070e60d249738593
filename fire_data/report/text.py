"""Runs of tokens for a page: what people see as one character is one run, so that emoji stay whole."""

from __future__ import annotations

import unicodedata

from fire_data.tokenview import Piece

_JOINER = "\u200d"
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_FLAG_LETTERS = range(0x1F1E6, 0x1F200)
_TAGS = range(0xE0020, 0xE0080)
_LONGEST_PIECE = 400  # characters of one run of tokens


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
