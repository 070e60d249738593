"""Prompts from a dataset in TRL's format: `prompt` (text or a conversation) and an answer under any name.

python examples/from_trl.py train.parquet prompts.jsonl --answer solution
python examples/from_trl.py hf://datasets/user/name/train.parquet prompts.jsonl
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import polars as pl


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="Parquet or JSON lines, here or at hf://datasets/...")
    parser.add_argument("target", help="the JSON lines that `fire init --prompts` takes")
    parser.add_argument("--answer", help="the column with the right answer")
    options = parser.parse_args()
    scan = pl.scan_parquet if options.source.endswith(".parquet") else pl.scan_ndjson
    rows = scan(options.source).collect().to_dicts()
    with open(options.target, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(converted(row, options.answer), ensure_ascii=False, default=str) + "\n")
    print(f"{len(rows)} prompts in {options.target}")


def converted(row: dict[str, Any], answer: str | None) -> dict[str, Any]:
    """One prompt: a conversation is called `messages` here, its last answer, if there is one, is left out."""
    found = {k: v for k, v in row.items() if k not in ("prompt", "messages", "completion", answer)}
    prompt = row["prompt"] if "prompt" in row else row["messages"]
    if isinstance(prompt, str):
        found["prompt"] = prompt
    else:
        messages = [{"role": m["role"], "content": m["content"]} for m in prompt]
        found["messages"] = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    return found | ({"answer": row[answer]} if answer else {})


if __name__ == "__main__":
    main()
