"""Rules compared on one scored table: reading which are asked for, counting what they do, and the plot.

All of it is pure; `fire_data.steps.compare` reads the run.
"""

from __future__ import annotations

from fire_data.compare.asked import DEFAULT, Asked, parse_rules
from fire_data.compare.tally import COLUMNS, PLACES, Tally, late_from

__all__ = ["COLUMNS", "DEFAULT", "PLACES", "Asked", "Tally", "late_from", "parse_rules"]
