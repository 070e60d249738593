"""Targets that are tables: shards whose receipt is in order and whose columns are anybody's guess."""

from __future__ import annotations

import hashlib
import io
from functools import cache
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

import fire_data as fd
from fire_data import files
from fire_data.create import init_run
from fire_data.hub.pull import _examine
from fire_data.prepare import Weighing
from fire_data.rules import make_rule
from fire_data.run import Run
from fire_data.schemas.errors import FireError
from fire_data.schemas.manifest import Manifest, Receipt, Shard, digest
from fire_data.schemas.tables import columns_of, conform
from fire_data.shards import Part, _parsed, read_schema, read_shard
from fire_data.steps.weigh import ScoredRound
from tests.fuzz.target import Target, scratch, written
from tests.fuzz.values import tables
from tests.ragged import ragged


@cache
def valid() -> pa.Table:
    """A table of scores."""
    frame = ragged(4, 5, 4).to_arrow(compat_level=pl.CompatLevel.oldest())
    rows = frame.num_rows
    found: dict[str, Any] = {name: frame[name] for name in frame.column_names}
    lengths = [len(x) for x in frame["response_ids"].to_pylist()]
    made = {}
    for column in columns_of("scores"):
        if column.name in found:
            made[column.name] = found[column.name].cast(column.type)
        elif not column.nullable and not column.optional:
            made[column.name] = pa.array([_filler(column, n) for n in lengths], column.type)
    assert rows
    return conform(pa.table(made), "scores", "valid")


def _filler(column: Any, length: int) -> Any:
    if column.name == "messages":
        return [{"role": "user", "content": "x"}]
    if pa.types.is_list(column.type):
        return [1] * (2 if column.name == "prompt_ids" else length)
    return "x" if pa.types.is_string(column.type) else length


@cache
def _run() -> Run:
    return init_run(scratch() / "tables", {"student": {"model": "m"}, "teacher": {"model": "t"}})


def _shard(data: bytes) -> None:
    """A shard as `fire pull` gets it: looked at, then read, joined, weighed and exploded, if it was accepted."""
    run = _run()
    part = run.part("scores", 0)
    path = written(str(part.file("00000").relative_to(scratch())), data)
    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        rows = 0
    fields = {"format": 1}
    receipt = Receipt(
        shard="00000", sha256=hashlib.sha256(data).hexdigest(), bytes=len(data), rows=rows, tokens=0,
        fingerprint=digest(fields),
    )  # fmt: skip
    made = Manifest(
        stage="scores", round=0, state="sealed", fingerprint=digest(fields), fields=fields,
        plan=(Shard(name="00000", start=0, stop=rows),), shards=(receipt,),
    )  # fmt: skip
    _parsed(data, "scores")
    try:
        _examine(path, part, receipt)
    except (pa.ArrowException, OSError, UnicodeDecodeError, FireError):  # `_take` tells of these
        return
    files.replace_json(part.manifest_path, made.model_dump(mode="json"), part.tmp)
    _use(run, part, receipt)


def _use(run: Run, part: Part, receipt: Receipt) -> None:
    uses = (
        lambda: conform(read_shard(part, receipt), "scores", ""),
        lambda: fd.explode(run.scores(0)).collect(),
        lambda: fd.weigh(run.scores(0), "fire").collect(),
        lambda: fd.weigh(run.scores(0), "uniform", batch_size=2).collect(),
        lambda: _weighed(run),
    )
    read_schema(part, receipt)
    uses[int(receipt.sha256, 16) % len(uses)]()  # the input alone decides which one


def _weighed(run: Run) -> None:
    work = ScoredRound(run, 0, Weighing(make_rule("fire"), 2, samples_per_group=2))
    conform(work.weighted("00000").to_arrow(compat_level=pl.CompatLevel.oldest()), "weights", "")


def _file() -> bytes:
    sink = io.BytesIO()
    pq.write_table(valid(), sink, write_page_checksum=True)
    return sink.getvalue()


SHARDS: dict[str, Target] = {"shards": Target(_shard, lambda: [_file()], lambda: tables(valid()))}
