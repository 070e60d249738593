"""Runs models over finished rollouts and returns one column per signal, plus their per-row summaries.

Both models see the same batch of right-padded rows, made by length within a budget of padded tokens; only the hidden
states that predict response tokens are kept, packed without padding, and turned into signals chunk by chunk. Batches
depend on nothing but the rows' content, so equal shards give equal bytes. The top-k of both models comes from the same
pass where it is asked for. Units: nats; lengths in tokens. Legend: `_B` sequences, `_L` padded length, `_T` packed
response tokens, `_D` hidden, `_K` top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fire_data.models import head_of, hidden_states
from fire_data.packing import micro_batches, pad, response_index
from fire_data.schemas.errors import DataError
from fire_data.schemas.tables import ADDONS, EVALUATED, FLOAT_SIGNALS, SIGNALS, SUMMARIES, Column
from fire_data.signals import model_signals, token_signals
from fire_data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Array: TypeAlias = npt.NDArray[Any]
Columns: TypeAlias = dict[str, torch.Tensor]
Progress: TypeAlias = Callable[[int], None]


@dataclass(frozen=True)
class _Row:
    """Ids of one trajectory: the response, and what precedes it for each model."""

    index: int
    student_prompt: list[int]
    teacher_prompt: list[int]
    response: list[int]

    @property
    def length(self) -> int:
        return max(len(self.student_prompt), len(self.teacher_prompt)) + len(self.response)


@dataclass(frozen=True)
class TransformersScorer:
    """Exact scores from two transformers models. `tokens_per_batch` and `budget_bytes` bound memory, not the result."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    vocabulary: Vocabulary
    tokens_per_batch: int
    budget_bytes: int

    def score(
        self, rollouts: pa.Table, progress: Progress | None = None, *, k: int = 0, signals: bool = True
    ) -> pa.Table:
        """The columns of `tables.SIGNALS`, row by row as in `rollouts`.

        Args:
            rollouts: with `prompt_ids`, `response_ids` and, where the teacher's prompt differs, `teacher_prompt_ids`.
            progress: called with the number of rows finished after every batch.
            k: also the columns of `ADDONS["topk"]`, with so many tokens (at most the allowed ids), from the same pass.
            signals: false: those columns alone.

        Raises:
            DataError: a row has response tokens but no prompt tokens to predict the first from.
            EngineError: a model's head is not understood.
        """
        heads = head_of(self.student), head_of(self.teacher)

        def evaluate(rows: list[_Row]) -> Columns:
            student_TD = _predicting_states(self.student, [(r.student_prompt, r.response) for r in rows])
            teacher_TD = _predicting_states(self.teacher, [(r.teacher_prompt, r.response) for r in rows])
            ids_T = _response_ids(rows, student_TD.device)
            return token_signals(
                student_TD, heads[0], teacher_TD, heads[1], ids_T, self.vocabulary, self.budget_bytes,
                k=k, signals=signals,
            )  # fmt: skip

        columns = (*(SIGNALS if signals else ()), *(ADDONS["topk"] if k else ()))
        return _list_table(_by_rows(_read_rows(rollouts), self.tokens_per_batch, evaluate, progress), columns)


@dataclass(frozen=True)
class TransformersEvaluator:
    """One transformers model over given responses, exact. Bounds as for `TransformersScorer`."""

    model: PreTrainedModel
    vocabulary: Vocabulary
    tokens_per_batch: int
    budget_bytes: int
    entropy_kind: str = "exact"

    def evaluate(self, rows: pa.Table, progress: Progress | None = None) -> pa.Table:
        """The columns of `tables.EVALUATED` without `entropy_mass`. Raises as `TransformersScorer.score`."""
        head = head_of(self.model)

        def signals(batch: list[_Row]) -> Columns:
            hidden_TD = _predicting_states(self.model, [(r.student_prompt, r.response) for r in batch])
            ids_T = _response_ids(batch, hidden_TD.device)
            return model_signals(hidden_TD, head, ids_T, self.vocabulary, self.budget_bytes)

        read = _read_rows(rows.select(["prompt_ids", "response_ids"]))
        columns = [c for c in EVALUATED if c.name != "entropy_mass"]
        return _list_table(_by_rows(read, self.tokens_per_batch, signals, progress), columns)


def _by_rows(
    rows: list[_Row], tokens_per_batch: int, evaluate: Callable[[list[_Row]], Columns], progress: Progress | None
) -> list[dict[str, Array]]:
    """What `evaluate` gives for batches of rows, packed in their order, as one array per row and column."""
    ordered = sorted(rows, key=_content)  # of equal lengths: the order of rows in the table does not matter
    found: list[dict[str, Array]] = [{} for _ in rows]
    for batch in micro_batches([r.length for r in ordered], tokens_per_batch):
        chosen = [ordered[i] for i in batch if ordered[i].response]
        if chosen:
            with torch.inference_mode():
                columns = {name: values.cpu().numpy() for name, values in evaluate(chosen).items()}
            ends = np.cumsum([len(r.response) for r in chosen])[:-1]
            for name, values in columns.items():
                for row, part in zip(chosen, np.split(values, ends), strict=True):
                    found[row.index][name] = part
        if progress:
            progress(len(batch))
    return found


def summarise(table: pa.Table) -> pa.Table:
    """Append the columns of `tables.SUMMARIES`: length, sums and maxima of every float signal there is, in float64.

    Sums of the float32 columns are correctly rounded (`math.fsum`): they depend neither on order, threads nor machine.
    The maximum of an empty response is null.
    """
    lengths = pc.list_value_length(table["response_ids"]).to_numpy().astype(np.int64)
    columns = {name: _split(table[name], lengths) for name in FLOAT_SIGNALS if name in table.column_names}
    sums = {f"{name}_sum": [math.fsum(row) for row in rows] for name, rows in columns.items()}
    maxima = {f"{name}_max": [max(row, default=None) for row in rows] for name, rows in columns.items()}
    pairs = zip(columns["teacher_entropy"], columns["student_entropy"], strict=True)
    products = [math.fsum(t * s for t, s in zip(teacher, student, strict=True)) for teacher, student in pairs]
    values = {"length": lengths, **sums, **maxima, "entropy_product_sum": products}
    for column in SUMMARIES:
        if column.name in values:
            table = table.append_column(column.field(), pa.array(values[column.name], column.type))
    return table


def _split(column: pa.ChunkedArray, lengths: npt.NDArray[np.int64]) -> list[list[float]]:
    """One list of Python floats (float64) per row."""
    flat, ends = pc.list_flatten(column).to_pylist(), lengths.cumsum().tolist()
    return [flat[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]


def _read_rows(rollouts: pa.Table) -> list[_Row]:
    own = rollouts.column_names.count("teacher_prompt_ids") == 1
    prompts = rollouts["prompt_ids"].to_pylist()
    teachers = rollouts["teacher_prompt_ids"].to_pylist() if own else [None] * len(prompts)
    responses = rollouts["response_ids"].to_pylist()
    rows = []
    for index, (prompt, teacher, response) in enumerate(zip(prompts, teachers, responses, strict=True)):
        row = _Row(index, prompt, prompt if teacher is None else teacher, response)
        if response and not (row.student_prompt and row.teacher_prompt):
            text = "there is no prompt token to predict the first response token from"
            raise DataError(text, where=f"row {index}", fix="remove this prompt, or use a chat template")
        rows.append(row)
    return rows


def _content(row: _Row) -> tuple[list[int], list[int], list[int]]:
    return row.response, row.student_prompt, row.teacher_prompt


def _predicting_states(model: PreTrainedModel, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Hidden states [T, D] that predict the response tokens of (prompt, response) rows, row after row."""
    # The last response token predicts nothing that was sampled, so it is not fed.
    ids_BL, mask_BL = pad([prompt + response[:-1] for prompt, response in rows])
    row_T, position_T = response_index([len(p) for p, _ in rows], [len(r) for _, r in rows])
    states_BLD = hidden_states(model, ids_BL.to(model.device), mask_BL)
    return states_BLD[row_T.to(states_BLD.device), position_T.to(states_BLD.device)]


def _response_ids(rows: list[_Row], device: torch.device) -> torch.Tensor:
    return torch.tensor([i for r in rows for i in r.response], device=device)


def _list_table(rows: list[dict[str, Array]], columns: Sequence[Column]) -> pa.Table:
    """Arrays [T] or [T, K] of every row to list columns with the types of the schema; a row without has empty lists."""
    arrays = []
    for column in columns:
        parts = [row[column.name] for row in rows if column.name in row]
        counts = [len(row.get(column.name, ())) for row in rows]
        arrays.append(_nested(np.concatenate(parts) if parts else np.zeros((0, 0)), counts, column.type))
    return pa.Table.from_arrays(arrays, schema=pa.schema([c.field() for c in columns]))


def _nested(values: Array, counts: list[int], type_: pa.DataType) -> pa.ListArray:
    """Lists of `counts` elements each, cut from `values`; of lists, if the type says so and values are [T, K]."""
    inner = type_.value_type
    if pa.types.is_list(inner):
        items = _nested(values.reshape(-1), [values.shape[1]] * len(values), inner)
    else:
        items = pa.array(values.reshape(-1).astype(inner.to_pandas_dtype()))
    offsets = pa.array(np.cumsum([0, *counts], dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, items, type=type_)
