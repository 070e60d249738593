"""The table of all targets by name."""

from __future__ import annotations

from tests.fuzz.records import RECORDS
from tests.fuzz.server import SERVER
from tests.fuzz.shards import SHARDS
from tests.fuzz.target import Target
from tests.fuzz.texts import TEXTS

TARGETS: dict[str, Target] = {**TEXTS, **SERVER, **RECORDS, **SHARDS}
