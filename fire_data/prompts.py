"""Read prompts from JSONL or Parquet, here or on the Hub, into one table, with errors that name the line.

A prompt has `messages` or `prompt`, or as benchmarks call it `problem` or `question`; `answer` and `teacher` are
optional; all other fields are kept as JSON in `extra`. The answer behind `####` (GSM8K) is taken out of its working,
and one that is only in the `\\boxed{}` of a `solution` (MATH) out of that.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fire_data import files
from fire_data.schedule import hash_text
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.schemas.manifest import digest
from fire_data.schemas.tables import arrow_schema, conform
from fire_data.verify.answers import last_boxed

_HUB = "hf://datasets/"
_CORRECT = "correct the prompts file, or take this prompt out"
_KNOWN = ("prompt_id", "messages", "prompt", "answer", "teacher")
_ASKED = ("problem", "question")  # what benchmarks call a prompt
_WORKED = "\n####"  # between working and answer


def read_prompts(path: str, base: Path, *, need_answer: bool = False, setting: str = "prompts.path") -> pa.Table:
    """The prompts table of a file: `.jsonl`, `.json` lines or `.parquet`; local (relative to `base`) or hf://datasets/….

    Raises ConfigError for a file that is not there, DataError naming the line for everything inside it.
    """
    file = _download(path) if path.startswith(_HUB) else _local(path, base, setting)
    path = path if path.startswith(_HUB) else str(file)
    given = _parquet_rows(file, path) if file.suffix == ".parquet" else _jsonl_rows(file, path)
    rows, places = [], []
    with files.storage_errors(path):
        for values, where in given:
            rows.append(_row(values, where, need_answer))
            places.append(where)
    if not rows:
        raise DataError("there is no prompt in the file", where=path, fix='one JSON object a line: {"messages": [...]}')
    _name(rows, places)
    return conform(pa.Table.from_pylist(rows, schema=arrow_schema("prompts")), "prompts", path)


def prompts_digest(prompts: pa.Table) -> str:
    """Identifies the content of a prompts table, whatever file or order it came from."""
    return digest(sorted(digest(row) for row in prompts.to_pylist()))


def as_messages(prompt: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation of a prompt row; a plain `prompt` is one user message."""
    messages: list[dict[str, str]] | None = prompt["messages"]
    return messages if messages is not None else [{"role": "user", "content": prompt["prompt"]}]


def _local(path: str, base: Path, setting: str) -> Path:
    file = base / Path(path).expanduser()
    if not file.is_file():
        what = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise ConfigError(
            f"the prompts file {what}",
            where=str(file),
            fix=f"--set {setting}=FILE (absolute, or relative to the run folder)",
        )
    return file


def _download(path: str) -> Path:
    """A Hub file in the local cache: hf://datasets/user/name[@revision]/path/in/repo."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    from fire_data.hub.client import line_of

    owner, _, rest = path.removeprefix(_HUB).partition("/")
    name, _, inside = rest.partition("/")
    name, _, revision = name.partition("@")
    if not (owner and name and inside) or {"", ".", ".."} & {*inside.split("/")}:
        raise ConfigError("a Hub path names a file", where=path, fix="hf://datasets/user/name/file.jsonl")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", inside, repo_type="dataset", revision=revision or None))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        text = f"the Hub did not give the prompts: {line_of(error)}"
        raise DataError(text, where=path, fix="check the name, the network and `hf auth login`") from None


def _jsonl_rows(file: Path, path: str) -> Iterator[tuple[Any, str]]:
    with file.open("rb") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield json.loads(line, parse_constant=_no_number), where
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"not valid JSON: {error}", where=where, fix="one JSON object per line, UTF-8"
                ) from None


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _parquet_rows(file: Path, path: str) -> Iterator[tuple[Any, str]]:
    try:
        rows = pq.read_table(file, page_checksum_verification=True).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # names that are no UTF-8, dates before 1
        fix = "copy the file again, or name a .jsonl file"
        raise DataError(f"not a readable Parquet file: {error}", where=path, fix=fix) from None
    for number, row in enumerate(rows):
        # NaN is how data frames write a missing value, and the one value that differs from itself.
        yield {k: v for k, v in row.items() if v is not None and v == v}, f"{path}, row {number}"


def _row(values: Any, where: str, need_answer: bool) -> dict[str, Any]:
    if not isinstance(values, dict):
        fix = 'one JSON object a line: {"messages": [...]}'
        raise DataError(f"a prompt is an object, not {type(values).__name__}", where=where, fix=fix)
    values = _as_prompt(values, where)
    messages, prompt = values.get("messages"), values.get("prompt")
    if (messages is None) == (prompt is None):
        what = "none of `messages`, `prompt`, `problem` and `question`"
        what = what if messages is None else "both `messages` and `prompt`"
        raise DataError(
            f"the prompt has {what}; it has: {', '.join(values) or 'no field'}",
            where=where,
            fix="give `messages` or `prompt`",
        )
    if prompt is not None and not isinstance(prompt, str):
        raise DataError(f"`prompt` must be text, not {type(prompt).__name__}", where=where, fix=_CORRECT)
    if messages is not None:
        _check_messages(messages, where)
    answer = values.get("answer")
    if answer is None and need_answer:
        raise DataError(
            "the prompt has no `answer`, which the verifier compares with, and no `solution` with a \\boxed{} one",
            where=where,
            fix="add it, or --set rollout.verifier=none",
        )
    extra = {k: v for k, v in values.items() if k not in _KNOWN}
    row = {
        "prompt_id": _scalar(values.get("prompt_id"), "prompt_id", where),
        "messages": [{"role": m["role"], "content": m["content"]} for m in messages] if messages is not None else None,
        "prompt": prompt,
        "answer": _scalar(answer, "answer", where),
        "teacher": _scalar(values.get("teacher"), "teacher", where),
        "extra": _as_json(extra, where),
    }
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        text = "the prompt holds half of a surrogate pair, which is not text"
        raise DataError(text, where=where, fix=_CORRECT) from None
    return row


def _as_prompt(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a benchmark by the names of a prompt's. Those of a prompt are left alone."""
    values = dict(values)
    asked = [name for name in _ASKED if values.get(name) is not None]
    if asked and values.get("messages") is None and values.get("prompt") is None:
        if len(asked) > 1:
            text = "the prompt has both `problem` and `question`"
            raise DataError(text, where=where, fix="give the one that is asked as `prompt`")
        values["prompt"] = values.pop(asked[0])
    answer, solution = values.get("answer"), values.get("solution")
    if isinstance(answer, str) and _WORKED in f"\n{answer}":
        values |= {"answer": f"\n{answer}".rpartition(_WORKED)[2].strip(), "worked_answer": answer}
    elif answer is None and isinstance(solution, str) and (boxed := last_boxed(solution)) is not None:
        values["answer"] = boxed.strip()
    return values


def _as_json(extra: dict[str, Any], where: str) -> str | None:
    try:
        return json.dumps(extra, ensure_ascii=False, sort_keys=True, default=str, allow_nan=False) if extra else None
    except (TypeError, ValueError, RecursionError) as error:
        text = f"the other fields ({', '.join(extra)}) cannot be kept as JSON: {error}"
        raise DataError(text, where=where, fix=_CORRECT) from None


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError("`messages` must be a list with at least one message", where=where, fix=_CORRECT)
    for i, message in enumerate(messages):
        ok = (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        )
        if not ok:
            raise DataError(f"message {i} needs `role` and `content`, both text", where=where, fix=_CORRECT)
        more = sorted(k for k, v in message.items() if k not in ("role", "content") and v is not None)
        if more:
            text = f"message {i} has `{more[0]}`; only `role` and `content` reach the chat template"
            raise DataError(text, where=where, fix="remove it, or put it beside `messages`: it is kept in `extra`")


def _scalar(value: Any, name: str, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"`{name}` must be text or a number, not {type(value).__name__}", where=where, fix=_CORRECT)


def _name(rows: list[dict[str, Any]], places: list[str]) -> None:
    """Give prompts without an id a hash of messages and teacher, repeats a suffix; refuse explicit duplicates."""
    taken: dict[str, str] = {}
    for row, where in zip(rows, places, strict=True):
        if row["prompt_id"] is not None:
            if row["prompt_id"] in taken:
                text = f"prompt_id {row['prompt_id']!r} is given twice, first in {taken[row['prompt_id']]}"
                raise DataError(text, where=where, fix="make prompt_id unique, or leave it out")
            taken[row["prompt_id"]] = where
    seen: collections.Counter[str] = collections.Counter()
    for row, where in zip(rows, places, strict=True):
        if row["prompt_id"] is None:
            name = hash_text(as_messages(row), row["teacher"])
            # An explicit id may look like a hash, for example in prompts that were exported from a run.
            while (candidate := name if seen[name] == 0 else f"{name}-{seen[name] + 1}") in taken:
                seen[name] += 1
            row["prompt_id"] = candidate
            taken[candidate] = where
