"""The card of a shared dataset, generated from its sealed manifests: what it holds, how it was made, how to load it.

Nothing in it is a response or a prompt. Names and expressions are shown as code, so that none of them is markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from fire_data.hub.layout import FLAT, START, TAG, by_stage
from fire_data.precision import bits_of
from fire_data.schemas.config import TEACHER
from fire_data.schemas.errors import ConfigError
from fire_data.schemas.manifest import Manifest
from fire_data.schemas.tables import Column, columns_of

_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,49}")
_KINDS = {"exact": "exact, over the full vocabulary", "fake": "of the fake engine: no model was asked"}


def dataset_card(repo: str, manifests: Iterable[Manifest], licence: str | None) -> str:
    """The text of README.md. `licence`: an identifier of the Hub, or None if it is not known."""
    tables = by_stage(manifests)
    front: dict[str, Any] = {
        "license": licence,
        "tags": [TAG, "on-policy-distillation", "knowledge-distillation"],
        "configs": [
            {"config_name": _config(*key)[0], "data_files": [{"split": "train", "path": _globs(*key, found)}]}
            | ({"default": True} if key == ("scores", "") else {})
            for key, found in tables.items()
        ],
    }
    sections = [
        f"# {repo.partition('/')[2]}",
        _INTRODUCTION,
        "## How to load", _loading(repo, tables),
        "## Models", _models(tables),
        "## Sampling and signals", _signals(tables),
        "## Tables", _sizes(tables),
        "## Filter and weights", _weights(tables),
        "## Evaluations", evaluations(tables),
        "## Columns", _columns(tables),
        "## Licence", licence_text(licence),
    ]  # fmt: skip
    return front_matter(front) + "\n\n".join(sections) + "\n"


def front_matter(values: Mapping[str, Any]) -> str:
    """The metadata of a card; what is None is left out."""
    given = {k: v for k, v in values.items() if v is not None}
    return f"---\n{yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=10**9)}---\n\n"


def read_licence(card: str) -> str | None:
    """The licence that a card names; None if it names none, or is not a card."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    found = re.search(r"^license: (\S+)$", match[1], re.MULTILINE) if match else None
    return found[1] if found and _LICENCE.fullmatch(found[1]) else None


def require_licence(licence: str | None) -> None:
    """Raise ConfigError for what cannot be an identifier of a licence."""
    if licence is not None and not _LICENCE.fullmatch(licence):
        fix = "an identifier such as apache-2.0, cc-by-4.0 or other"
        raise ConfigError(f"{licence!r} is no identifier of a licence", where="--licence", fix=fix)


def licence_text(licence: str | None) -> str:
    """What a card says of the licence."""
    if licence is None:
        return "Not given: ask the author before you use this. The licences of the models may apply as well."
    return f"{code(licence)}, as its author says. The licences of the models may apply as well."


def code(value: object) -> str:
    """A value as inline code in a line or a table: no markup, no line break."""
    text = "".join(c if c.isprintable() else " " for c in str(value)).replace("`", "'").replace("|", "\\|")
    return f"`{text[:300]}`" if text.strip() else "-"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def number(value: object) -> str:
    """A statistic: whole numbers with separators, others with four digits, a dash for nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.4g}"


def teachers_of(scores: Manifest) -> list[tuple[str, str]]:
    """Role and name of the teachers that a table was scored with."""
    named = scores.recorded.get("teachers") or {}
    return [("teacher" if n == TEACHER else f"teacher {n}", str(m)) for n, m in named.items()]


def _config(stage: str, name: str) -> tuple[str, str]:
    """The name under which `load_dataset` finds a table, and its folder."""
    return (f"{stage}-{name}", f"{stage}/{name}") if name else (stage, stage)


def _globs(stage: str, name: str, found: list[Manifest]) -> str | list[str]:
    """Which files are a table: all below its folder, but named evaluations have folders beside those of rounds."""
    if (stage, name) != ("evals", ""):
        return f"{_config(stage, name)[1]}/**/*.parquet"
    kinds = {"start" if m.round == START else "round-*" for m in found}
    return [f"{stage}/{kind}/*.parquet" for kind in sorted(kinds)]


Tables = Mapping[tuple[str, str], list[Manifest]]

_INTRODUCTION = """On-policy distillation data made with the `fire` toolkit: a student wrote the responses, a teacher
scored every token of them, and rules turned the scores into one coefficient per token. One row is one trajectory;
columns of tokens are lists with one element per response token."""


def _loading(repo: str, tables: Tables) -> str:
    config, folder = _config(*next((t for t in tables if t[0] == "scores"), next(iter(tables), ("scores", ""))))
    return f"""```python
from datasets import load_dataset
rows = load_dataset("{repo}", "{config}", split="train")

import polars as pl
rows = pl.scan_parquet("hf://datasets/{repo}/{folder}/**/*.parquet")
```

```console
{_commands(repo, tables)}

Rows of `weights-*` and `addons-*` stand in the order of `scores`; `trajectory_id` says so in each. A file that
`fire/manifest.json` does not name is not part of the dataset."""


def _commands(repo: str, tables: Tables) -> str:
    """How `fire` uses it; where the student that wrote what is trained on is from a folder, what is to be named."""
    pull = f"$ fire pull {repo} RUN    # an ordinary run: status, inspect, weigh, train\n"
    first = next(iter(tables.get(("scores", ""), [])), None)
    weights = str((first.fields.get("student") or {}).get("weights")) if first is not None else "checkpoint:"
    if first is None or weights.startswith("checkpoint:"):
        return f"{pull}```"
    train = f"$ fire train RUN --from hf://datasets/{repo}"
    if weights.startswith("hub:"):
        return f"{pull}{train}    # train on it at once\n```"
    return f"""{pull}{train} --student FOLDER    # train on it at once
```

`FOLDER` is the very model that wrote the responses, {code(first.recorded.get("student"))} with the weights
{code(weights)}. It is not part of the dataset: ask its author."""


def _models(tables: Tables) -> str:
    rows: dict[tuple[str, ...], None] = {}
    for manifest in (m for found in tables.values() for m in found):
        recorded, fields = manifest.recorded, manifest.fields
        told = [(role, recorded.get(role), fields.get(role)) for role in ("student", "base")]
        named, models = recorded.get("teachers") or {}, fields.get("teachers") or {}
        told += [(role, model, models.get(n)) for n, (role, model) in zip(named, teachers_of(manifest), strict=True)]
        for role, model, made in told:
            weights = made.get("weights", "") if isinstance(made, dict) else ""
            if model and not str(weights).startswith("checkpoint:"):
                rows[role, code(model), code(weights), code(made.get("dtype") if isinstance(made, dict) else "")] = None
    trained = any(m.round > 0 for found in tables.values() for m in found)
    note = "\n\nIn later rounds the student is what training made of it in the round before." if trained else ""
    return table(("role", "model", "weights", "dtype"), rows) + note if rows else "Not recorded."


def _signals(tables: Tables) -> str:
    lines = []
    for manifest in tables.get(("rollouts", ""), [])[:1]:
        settings = manifest.fields.get("rollout") or {}
        shown = ("n", "temperature", "top_p", "top_k", "max_new_tokens", "raw", "verifier", "engine")
        lines.append("Sampling: " + ", ".join(f"{k} {code(settings[k])}" for k in shown if k in settings) + ".")
        lines.append(f"Chat template: {code(manifest.fields.get('template'))} (raw: none; else its fingerprint).")
    for manifest in tables.get(("scores", ""), [])[:1]:
        for who, kind in (manifest.recorded.get("entropy_kind") or {}).items():
            mass = manifest.stats.get(f"{'student' if who == 'student' else 'teacher'}_entropy_mass")
            bound = "" if kind in _KINDS else f", from tokens that hold {number(mass)} of the probability on average"
            lines.append(f"Entropies of {code(who)}: {_KINDS.get(kind, code(kind))}{bound}.")
        if bits := bits_of(manifest):
            exact = ", ".join(map(code, ("rollout_logprob", "student_logprob")))
            lines.append(
                f"Logprobs, entropies and KLs are rounded to {bits} mantissa bits, a relative error of at most "
                f"2^-{bits + 1}; {exact} are not."
            )
        lines.append("Logprobs and entropies are in nats, at temperature 1, over the vocabulary that all models share.")
    means = [[str(m.round), *(number(m.stats.get(k)) for k in _MEANS)] for m in tables.get(("scores", ""), [])]
    return "\n\n".join([*lines, *([table(("round", *(f"mean {k}" for k in _MEANS)), means)] if means else [])]) or "-"


_MEANS = ("student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy", "reverse_kl")


def _sizes(tables: Tables) -> str:
    rows = []
    for (stage, name), found in tables.items():
        receipts = [r for m in found for r in m.shards]
        rounds = ", ".join("start" if m.round == START else str(m.round) for m in found)
        rows.append([
            code(_config(stage, name)[0]), rounds, number(sum(r.rows for r in receipts)),
            number(sum(r.tokens for r in receipts)), number(sum(r.bytes for r in receipts)),
        ])  # fmt: skip
    return table(("configuration", "rounds", "rows", "tokens", "bytes"), rows)


_POLICIES = ("batch_size", "denominator", "truncated", "rollout_is_cap")
_WEIGHTS = ("kept_fraction", "kept_token_fraction", "n_dropped", "mean_weight", "weight_max", "effective_sample_share")


def _weights(tables: Tables) -> str:
    rows, rules = [], []
    for name, found in ((name, found) for (stage, name), found in tables.items() if stage == "weights"):
        for manifest in found:
            numbers = [len(manifest.stats.get("steps") or []), *(manifest.stats.get(k) for k in _WEIGHTS)]
            rows.append([code(name), str(manifest.round), *map(number, numbers)])
        fields = found[-1].fields
        settings = {**(fields.get("rule") or {}), **{k: fields.get(k) for k in _POLICIES}}
        told = ", ".join(f"{code(k)} {code(v)}" for k, v in settings.items() if v is not None)
        rules.append(f"- {code(name)}: {told}")
    if not rows:
        return "No rule was applied yet."
    head = ("weights", "round", "steps", *(k.replace("_", " ") for k in _WEIGHTS))
    return table(head, rows) + "\n\n" + "\n".join(rules)


def evaluations(tables: Tables) -> str:
    """Accuracies by benchmark, before training and after rounds."""
    rows = [
        (name, "start" if m.round == START else str(m.round), m.stats)
        for (stage, name), found in tables.items()
        for m in (found if stage == "evals" else ())
    ]
    shown = list(dict.fromkeys(k for *_, stats in rows for k, v in stats.items() if number(v) != "-"))
    cells = [[code(name), after, *(number(stats.get(k)) for k in shown)] for name, after, stats in rows]
    return table(("benchmark", "after round", *map(code, shown)), cells) if rows else "None."


def _columns(tables: Tables) -> str:
    """The columns of each kind of table, once: scores go on from rollouts, joined tables have none of their own."""
    kinds = dict.fromkeys(f"{stage}/{name}" if stage == "addons" else stage for stage, name in tables)
    sections = []
    for called in kinds:
        columns = columns_of(called) if called != FLAT else ()
        told = "The columns of `scores`, then those of the weights." if called == FLAT else ""
        if called == "scores" and "rollouts" in kinds:
            columns = tuple(c for c in columns if c not in columns_of("rollouts"))
            told = "The columns of `rollouts`, then:\n\n"
        rows = table(("column", "type", "unit", "meaning"), map(_column, columns)) if columns else ""
        sections.append(f"### {code(called)}\n\n{told}{rows}")
    return "\n\n".join(sections)


def _column(column: Column) -> tuple[str, ...]:
    optional = " (not always there)" if column.optional else ""
    return code(column.name), code(column.type), column.unit or "-", f"{column.meaning}{optional}".replace("|", "\\|")
