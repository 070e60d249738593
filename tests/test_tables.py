"""The tables: `conform` names the row and column at fault, and every column says what it is."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from fire_data.schemas.errors import DataError
from fire_data.schemas.tables import (
    ADDONS,
    FLOAT_LISTS,
    FLOAT_SIGNALS,
    FORMAT,
    TABLES,
    Column,
    addon_of,
    arrow_schema,
    conform,
)

ROWS = 4


def example(column: Column, length: int) -> Any:
    """A valid value of a column; token columns have `length` elements."""
    if pa.types.is_list(column.type):
        if pa.types.is_struct(column.type.value_type):
            return [{"role": "user", "content": "hello"}]
        inner = column.type.value_type
        if pa.types.is_list(inner):
            return [[1, 2] if inner.value_type == pa.int32() else [-0.5, -1.5]] * length
        return [True if inner == pa.bool_() else 1 if inner == pa.int32() else -0.5] * length
    return {"string": "text", "int32": 1, "float": 1.0, "double": 1.0, "bool": True}[str(column.type)]


def table(name: str, **replaced: list[Any]) -> pa.Table:
    columns = TABLES[name]
    data = {c.name: pa.array([example(c, 2 + i) for i in range(ROWS)], c.type) for c in columns}
    return pa.table({**data, **{k: pa.array(v) for k, v in replaced.items()}})


@pytest.mark.parametrize("name", TABLES)
def test_every_column_says_its_unit_shape_and_meaning(name: str) -> None:
    schema = conform(table(name), name, "x").schema
    assert schema.equals(arrow_schema(name), check_metadata=True)
    for field in schema:
        assert set(field.metadata) == {b"unit", b"shape", b"meaning"}
        assert field.metadata[b"meaning"]
        assert field.metadata[b"shape"].startswith(b"one per ")
        if pa.types.is_list(field.type) and pa.types.is_floating(field.type.value_type):
            assert field.metadata[b"unit"] or field.name == "token_keep"
    assert schema.metadata[b"fire.table"] == name.encode()
    assert schema.metadata[b"fire.format"] == str(FORMAT).encode()


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_column_is_named_unless_it_may_be_null(name: str) -> None:
    for column in TABLES[name]:
        data = table(name).drop_columns([column.name])
        if column.optional:
            assert column.name not in conform(data, name, "x").column_names
        elif column.nullable:
            assert conform(data, name, "x")[column.name].null_count == ROWS
        else:
            with pytest.raises(DataError, match=f"column '{column.name}' is missing") as caught:
                conform(data, name, "rollouts round-000")
            assert caught.value.where == "rollouts round-000"


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_value_is_named_with_row_and_column(name: str) -> None:
    for column in TABLES[name]:
        values = [example(column, 2 + i) for i in range(ROWS)]
        values[2] = None
        data = table(name)
        data = data.set_column(data.column_names.index(column.name), column.name, pa.array(values, column.type))
        if column.nullable:
            assert conform(data, name, "x")[column.name].null_count == 1
            continue
        with pytest.raises(DataError, match=f"column '{column.name}' has no value") as caught:
            conform(data, name, "x")
        assert caught.value.where == "x, row 2"


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
@pytest.mark.parametrize("column", ["teacher_logprob", "rollout_logprob", "reverse_kl"])
def test_a_number_that_is_not_finite_is_named_with_row_column_and_token(
    column: str, value: float | None, chunks: bool
) -> None:
    values: list[list[float | None]] = [[-0.5] * (2 + i) for i in range(ROWS)]
    values[3][4] = value
    data = table("scores")
    array = pa.array(values, pa.list_(pa.float32()))
    parts = pa.chunked_array([array[:2], array[2:]] if chunks else [array])
    data = data.set_column(data.column_names.index(column), column, parts)
    with pytest.raises(DataError, match=f"column '{column}' holds .* at token 4") as caught:
        conform(data, "scores", "scores round-000, shard 00000")
    assert caught.value.where == "scores round-000, shard 00000, row 3"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ([[-0.5, -1.0], [-0.5, float("nan")]], "holds nan"),
        ([[-0.5, -1.0], [float("-inf"), -1.0]], "holds -inf"),
        ([[-0.5, -1.0], [-0.5, None]], "holds None"),
        ([[-0.5, -1.0], None], "holds None"),
        ([[-0.5, -1.0], [-0.5]], "holds 1 numbers where the row's first token has 2"),
        ([[-0.5, -1.0], []], "holds 0 numbers where the row's first token has 2"),
    ],
)
def test_a_wrong_list_among_the_lists_of_a_row_is_named_with_row_column_and_token(
    lists: list[Any], words: str, chunks: bool
) -> None:
    values: list[Any] = [[[-0.5, -1.0]] * (2 + i) for i in range(ROWS)]
    values[0], values[1] = [], [[-3.0]] * 3  # a row without tokens, and one with another k: both are right
    values[2][2:] = lists
    data = table("addons/topk")
    for column in ADDONS["topk"]:
        others = [[[1, 2]] * len(row) for row in values]
        data = data.set_column(data.column_names.index(column.name), column.name, pa.array(others, column.type))
    array = pa.array(values, FLOAT_LISTS)
    parts = pa.chunked_array([array[:1], array[1:]] if chunks else [array])
    data = data.set_column(data.column_names.index("teacher_topk_logprobs"), "teacher_topk_logprobs", parts)
    with pytest.raises(DataError, match=f"column 'teacher_topk_logprobs' {words} at token 3") as caught:
        conform(data, "addons/topk", "x")
    assert caught.value.where == "x, row 2"


def test_every_column_of_an_addon_names_the_addon_and_no_other_column_does() -> None:
    for name, columns in ADDONS.items():
        assert [c.name for c in TABLES[f"addons/{name}"]] == ["trajectory_id", *(c.name for c in columns)]
        assert {addon_of(c.name) for c in columns} == {name}
    columns = {c.name for t in ("rollouts", "scores", "weights") for c in TABLES[t]}
    assert {c for c in columns if addon_of(c) is not None} == {"reward"}  # that of the addon takes its place


def test_a_number_per_row_must_be_finite_too() -> None:
    for column in ("student_logprob_sum", "teacher_entropy_max", "entropy_product_sum", "reward"):
        with pytest.raises(DataError, match=f"column '{column}' holds nan") as caught:
            conform(table("scores", **{column: [1.0, float("nan"), 1.0, 1.0]}), "scores", "x")
        assert caught.value.where == "x, row 1"
    assert conform(table("scores", teacher_entropy_max=[1.0, None, 1.0, 1.0]), "scores", "x").num_rows == ROWS


@pytest.mark.parametrize(
    ("table_name", "column"),
    [("rollouts", "rollout_logprob"), *(("scores", c) for c in FLOAT_SIGNALS), ("weights", "coefficient")],
)
def test_token_columns_of_unequal_length_are_named_with_row_and_both_lengths(table_name: str, column: str) -> None:
    values = [[-0.5] * (2 + i) for i in range(ROWS)]
    values[1] = [-0.5]
    with pytest.raises(DataError, match=f"column '{column}' has 1 elements where '.*' has 3") as caught:
        conform(table(table_name, **{column: values}), table_name, "x")
    assert caught.value.where == "x, row 1"


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("round", ["one"] * ROWS),
        ("round", [2**40] * ROWS),
        ("sample", [1.5] * ROWS),
        ("response_ids", [["a"]] * ROWS),
        ("response_ids", ["text"] * ROWS),
        ("rollout_logprob", [1.0] * ROWS),
        ("trajectory_id", [[1]] * ROWS),
    ],
)
def test_a_wrong_type_is_named_with_column_and_both_types(column: str, values: list[Any]) -> None:
    wanted = arrow_schema("rollouts").field(column).type
    with pytest.raises(DataError) as caught:
        conform(table("rollouts", **{column: values}), "rollouts", "here")
    assert f"column '{column}'" in caught.value.what
    assert str(wanted) in caught.value.what
    assert caught.value.where == "here"


def test_wider_numbers_and_large_lists_are_converted() -> None:
    data = table("rollouts")
    for name, type_ in (
        ("round", pa.int64()),
        ("response", pa.large_string()),
        ("rollout_logprob", pa.large_list(pa.float64())),
        ("prompt_ids", pa.large_list(pa.int64())),
    ):
        data = data.set_column(data.column_names.index(name), name, data[name].cast(type_))
    assert conform(data, "rollouts", "x").schema.equals(arrow_schema("rollouts"), check_metadata=True)


def test_a_number_too_large_for_its_type_is_not_rounded_to_infinity() -> None:
    values = [[1e300] * (2 + i) for i in range(ROWS)]
    with pytest.raises(DataError, match="'rollout_logprob'"):
        conform(table("rollouts", rollout_logprob=values), "rollouts", "x")


def test_columns_that_are_not_of_the_table_are_dropped_and_the_order_is_the_tables() -> None:
    data = table("rollouts").append_column("surplus", pa.array([1] * ROWS))
    data = data.select(data.column_names[::-1])
    assert conform(data, "rollouts", "x").column_names == arrow_schema("rollouts").names


def test_a_column_that_is_there_twice_is_refused() -> None:
    data = table("rollouts")
    with pytest.raises(DataError, match="'answer' is there twice"):
        conform(data.append_column("answer", data["answer"]), "rollouts", "x")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_rows_conforms(name: str) -> None:
    result = conform(table(name).slice(0, 0), name, "x")
    assert result.num_rows == 0
    assert result.schema.equals(arrow_schema(name))


def test_responses_without_tokens_conform() -> None:
    empty: list[list[Any]] = [[] for _ in range(ROWS)]
    columns = {c.name: pa.array(empty, c.type) for c in TABLES["rollouts"] if c.per == "token"}
    data = table("rollouts")
    for name, array in columns.items():
        data = data.set_column(data.column_names.index(name), name, array)
    assert conform(data, "rollouts", "x").num_rows == ROWS
