"""Which prompts a round takes and what its trajectories are called: a pure function of the seed.

Round r takes positions [rP, (r+1)P) of an endless stream: the data set reshuffled by (seed, pass). No path, clock or
uuid enters a name, so runs with the same seed can be paired trajectory by trajectory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from fire_data.schemas.manifest import canonical


class Slot(NamedTuple):
    """One prompt of a round: its row in the prompts table, and how often the round has had it before."""

    row: int
    repeat: int


def hash_text(*parts: object, size: int = 16) -> str:
    """blake2b (hex) of the canonical JSON of `parts`."""
    return hashlib.blake2b(canonical(list(parts)).encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()


def round_slots(prompt_ids: Sequence[str], seed: int, round_: int, per_round: int | None) -> list[Slot]:
    """The prompts of a round in order. `per_round` None: the whole set, once, reshuffled every round."""
    count = len(prompt_ids)
    size = per_round or count
    slots: list[Slot] = []
    seen: dict[int, int] = {}
    orders: dict[int, list[int]] = {}
    for position in range(round_ * size, (round_ + 1) * size):
        pass_, offset = divmod(position, count)
        if pass_ not in orders:
            orders[pass_] = sorted(range(count), key=lambda i: hash_text(seed, pass_, prompt_ids[i]))
        index = orders[pass_][offset]
        slots.append(Slot(index, seen.get(index, 0)))
        seen[index] = seen.get(index, 0) + 1
    return slots


def trajectory_id(seed: int, round_: int, prompt_id: str, sample: int) -> str:
    """The name of one sample: 32 hex digits that depend on nothing else."""
    return hash_text(seed, round_, prompt_id, sample)
