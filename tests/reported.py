"""Runs with sealed tables of hand-made rows for the tests of reports: any text, byte by byte, with made-up signals.

The tokenizer has one token per byte, so a character beyond ASCII is several tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fire_data.create import init_run
from fire_data.run import Run, open_run
from fire_data.schemas.manifest import Shard
from fire_data.schemas.tables import FLOATS, ROLLOUTS, SCORES, conform
from fire_data.scoring import summarise
from fire_data.stages import Stage, plan_shards, run_stage
from fire_data.steps.weigh import weigh

VOCABULARY = 256


@dataclass(frozen=True)
class Row:
    """One trajectory: what was asked, what was written, and what is known about it."""

    response: str
    prompt: str = "What is it?"
    reward: float | None = None
    teacher: str | None = None
    answer: str | None = None
    finish: str = "stop"
    prompt_id: str | None = None
    sample: int = 0


def many(count: int, seed: int = 0) -> list[Row]:
    """Rows of several lengths, right and wrong, of two teachers, two samples a prompt."""
    rng = np.random.default_rng(seed)
    words = ("so", "then", "4", "+", "2", "=", "6", "né", "和", "🙂", "hence\n")
    rows = []
    for i in range(count):
        text = " ".join(rng.choice(words, size=int(rng.integers(3, 30))))
        reward, teacher, finish = float(i % 3 == 0), ("math", "code")[i % 2], ("stop", "length")[i % 5 == 4]
        rows.append(Row(text, f"Sum {i // 2}", reward, teacher, "6", finish, f"p{i // 2}", i % 2))
    return rows


@functools.cache
def byte_tokenizer() -> Any:
    """A tokenizer with a token for each of the 256 bytes and no other."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def make_report_run(
    folder: Path,
    rows: Sequence[Row],
    *,
    stages: Sequence[str] = ("rollouts", "scores", "weights"),
    rule: str | dict[str, str] = "fire",
    name: str | None = None,
    others: Sequence[str] = (),
    rounds: int = 1,
    rows_per_shard: int = 8,
    without: Sequence[str] = (),
    **sections: Any,
) -> Run:
    """A run whose rounds have these rows, in shards, and which of the stages. `others`: rules of further weights.

    `without`: columns that the scores do not have.
    """
    student = folder.parent / f"{folder.name}-student"
    byte_tokenizer().save_pretrained(student)
    values: dict[str, Any] = {"student": {"model": str(student)}, "weigh": {"rule": rule, "name": name}, **sections}
    run = init_run(folder, values | {"train": {"batch_size": rows_per_shard}})
    plan = plan_shards(len(rows), rows_per_shard)
    for number in range(rounds):
        table = functools.partial(scored, rows, number, without)
        fields = {"made": "by hand", "rollouts": "by hand", "student": {"dtype": "float32"}}
        if "scores" in stages:
            run_stage(Stage(run.part("scores", number), fields, plan), table)
        if "weights" in stages:
            weigh(run, number)
            for other in others:
                weigh(open_run(folder, (f"weigh.rule={other}", "weigh.name=null")), number)
        if "rollouts" in stages:  # last: `weigh` would compare how both were made
            stage = Stage(run.part("rollouts", number), {"made": "by hand"}, plan)
            run_stage(stage, functools.partial(_written, table))
    return run


def _written(make: Callable[[Shard], pa.Table], shard: Shard) -> pa.Table:
    return conform(make(shard).select([c.name for c in ROLLOUTS]), "rollouts", "rows made by hand")


def scored(rows: Sequence[Row], number: int, without: Sequence[str], shard: Shard) -> pa.Table:
    """The rows of a shard with plausible signals, the same for the same rows and round."""
    chosen = rows[shard.start : shard.stop]
    rng = np.random.default_rng((number, shard.start))
    ids = [byte_tokenizer()(row.response, add_special_tokens=False)["input_ids"] for row in chosen]
    offsets = pa.array(np.cumsum([0, *map(len, ids)]), pa.int32())
    columns: dict[str, Any] = {}
    for column in SCORES:
        if column.per == "token" and not column.name.endswith("_mass") and column.name not in without:
            values: Any = rng.exponential(size=offsets[-1].as_py()).astype(np.float32)
            values = -values if "logprob" in column.name else values
            flat = values if column.type == FLOATS else (1 + values * 3).astype(np.int32)
            columns[column.name] = pa.ListArray.from_arrays(offsets, pa.array(flat, column.type.value_type))
    columns["response_ids"] = ids
    places = range(shard.start, shard.stop)
    columns |= {
        "trajectory_id": [f"{number}{(place * 2654435761) % 2**32:08x}" for place in places],
        "prompt_id": [row.prompt_id or f"p{place}" for place, row in zip(places, chosen, strict=True)],
        "round": [number] * len(chosen),
        "sample": [row.sample for row in chosen],
        "messages": [[{"role": "user", "content": row.prompt}] for row in chosen],
        "prompt_ids": [[1, 2, 3]] * len(chosen),
        "response": [row.response for row in chosen],
        "finish_reason": [row.finish for row in chosen],
        "answer": pa.array([row.answer for row in chosen], pa.string()),
        "teacher": pa.array([row.teacher for row in chosen], pa.string()),
        "reward": pa.array([row.reward for row in chosen], pa.float32()),
    }
    return conform(summarise(pa.table(columns)), "scores", "rows made by hand")
