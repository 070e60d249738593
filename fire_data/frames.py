"""From one row per trajectory to one row per token."""

from __future__ import annotations

import polars as pl

from fire_data.schemas.tables import ADDONS, SCORES, WEIGHTS, addon_columns, addon_of

_ADDED = tuple(c for columns in ADDONS.values() for c in columns)
_TOKEN_COLUMNS = tuple(c.name for c in (*SCORES, *WEIGHTS, *_ADDED) if c.per == "token")
_PROMPT_COLUMNS = ("prompt_ids", "teacher_prompt_ids", "messages")


def explode(frame: pl.DataFrame | pl.LazyFrame) -> pl.LazyFrame:
    """One row per response token: `position` (from 0), every token column as a scalar, trajectory columns repeated.

    Of the top-k columns each token has its list of k.
    Columns about the prompt are left out. Trajectories without tokens have no row.
    """
    lf = frame.lazy()
    schema = lf.collect_schema()
    teachers = {c: _per(c) for c in schema.names() if "." in c}
    lists = [*(c for c in _TOKEN_COLUMNS if c in schema), *(c for c, per in teachers.items() if per == "token")]
    prompts = [*(c for c in _PROMPT_COLUMNS if c in schema), *(c for c, per in teachers.items() if per == "prompt")]
    position = pl.int_ranges(pl.col(lists[0]).list.len(), dtype=pl.Int32)
    return (
        lf.drop(prompts)
        .filter(pl.col(lists[0]).list.len() > 0)
        .with_columns(position=position)
        .explode("position", *lists)
    )


def _per(column: str) -> str | None:
    """What a column of one teacher of several has an element for; None for any other column."""
    addon = addon_of(column)
    return next((c.per for c in addon_columns(addon) or () if c.name == column), None) if addon else None
