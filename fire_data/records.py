"""Receipts and manifests on disk: JSON that ends with a checksum of itself, so that no changed byte is believed.

Shards are compared with their receipts; so what receipts and manifests say (counts of rows, settings, steps) has to be
as safe as the shards are. The checksum is that of the bytes before it: whoever reads compares without writing the
record anew. Records without one are from earlier versions and are read too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from fire_data import files
from fire_data.schemas.errors import DamagedError, DataError
from fire_data.schemas.manifest import problem
from fire_data.schemas.tables import FORMAT

KEY = "checksum"
_END = b"\n}\n"
_MARK = b',\n "%s": "' % KEY.encode()
_T = TypeVar("_T", bound=BaseModel)


def to_bytes(record: BaseModel) -> bytes:
    """A record as it lies on disk."""
    body = files.json_bytes(record.model_dump(mode="json")).removesuffix(_END)
    return body + _MARK + _checksum(body) + b'"' + _END


def read(kind: type[_T], path: Path, fix: str) -> _T | None:
    """The record in a file, None if there is no file.

    Raises DamagedError if it is not one or was changed, DataError if it is of a later version.
    """
    with files.storage_errors(path):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
    name = kind.__name__.lower()
    body, mark, rest = data.rpartition(_MARK)
    if mark and rest != _checksum(body) + b'"' + _END:
        raise DamagedError(f"the {name} is not as it was written", where=str(path), fix=fix)
    try:
        value = from_json(data, allow_inf_nan=False)  # stricter than Python's: no NaN, and text is Unicode
    except ValueError as error:
        raise DamagedError(f"the {name} is not readable: {error}", where=str(path), fix=fix) from None
    if not isinstance(value, dict):
        raise DamagedError(f"the {name} is not readable: it holds {type(value).__name__}", where=str(path), fix=fix)
    if KEY in value and not mark:
        raise DamagedError(f"the {name} was written again by something else", where=str(path), fix=fix)
    found = value.get("format")
    if isinstance(found, int) and found > FORMAT:
        text = f"format {found} is newer than this version reads ({FORMAT})"
        raise DataError(text, where=str(path), fix="pip install --upgrade fire-opd")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise DamagedError(f"not a {name}: {problem(error)}", where=str(path), fix=fix) from None


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()
