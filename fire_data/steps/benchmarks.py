"""Which held-out prompts there are, by the names of their evaluations, and whether those were made. Needs no engine."""

from __future__ import annotations

import re
from pathlib import Path

from fire_data.run import Run
from fire_data.schemas.config import is_benchmark
from fire_data.schemas.errors import ConfigError
from fire_data.shards import is_sealed, read_manifest

PROMPTS_PER_SHARD = 256


def benchmarks(run: Run, asked: str | None = None) -> dict[str | None, str]:
    """Held-out prompts by the name of their evaluation. A single file in `eval.prompts` has none.

    `asked`: "gsm8k,test.jsonl": names in `eval.prompts`, files (named after themselves), or names evaluated before.
    Raises ConfigError for what is none of these.
    """
    given = run.config.eval.prompts
    if asked is None:
        if given is None:
            fix = "--set eval.prompts=held_out.jsonl, or --prompts held_out.jsonl"
            raise ConfigError("there are no held-out prompts", where=str(run.root / "fire.yaml"), fix=fix)
        return {str(name): path for name, path in given.items()} if isinstance(given, dict) else {None: given}
    known = given if isinstance(given, dict) else {}
    found: dict[str | None, str] = {}
    for word in filter(None, map(str.strip, asked.split(","))):
        name, path = (word, known[word]) if word in known else _named(run, word)
        if found.setdefault(name, path) != path:
            text = f"two benchmarks are called {name}: {found[name]} and {path}"
            raise ConfigError(text, fix="name them in fire.yaml, eval.prompts: {NAME: FILE}")
    return found


def _named(run: Run, word: str) -> tuple[str, str]:
    """A file with a name made of its own, or an earlier evaluation with the file that it was made from."""
    if word in run.names("evals"):
        rounds: list[int | str] = ["start", *run.rounds()]
        manifests = (m for number in rounds if (m := read_manifest(run.part("evals", number, word))) is not None)
        path = next((m.recorded["prompts"] for m in manifests if "prompts" in m.recorded), None)
        if path is not None:
            return word, str(path)
    here = Path.cwd() / Path(word).expanduser()
    name = re.sub(r"[^A-Za-z0-9._+-]+", "-", Path(word).stem).strip("-")
    if not (word.startswith("hf://") or here.is_file()) or not is_benchmark(name):
        there = ", ".join(map(str, run.config.eval.prompts)) if isinstance(run.config.eval.prompts, dict) else "none"
        text = f"there is neither a file nor a benchmark {word!r}; benchmarks of eval.prompts: {there}"
        raise ConfigError(text, where="--prompts", fix="--prompts FILE.jsonl")
    return name, word if word.startswith("hf://") else str(here)


def evaluated(run: Run, round: int | None) -> bool:
    """True if all evaluations of `eval.prompts` are there for the student after a round."""
    number = "start" if round is None else round
    return all(is_sealed(run.part("evals", number, name)) for name in benchmarks(run))
