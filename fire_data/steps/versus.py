"""Two evaluations side by side: by how much one student is better on the same prompts, and how sure that is.

Both are compared prompt by prompt (paired bootstrap), which takes out that some prompts are harder than others. What
makes them less than comparable is said: other prompts, other settings.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fire_data.run import Run, open_run
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.schemas.manifest import Manifest, differences
from fire_data.shards import Part, is_sealed, read_shard, sealed
from fire_data.steps.evaluate import measured
from fire_data.verify import mean
from fire_data.verify.bootstrap import paired

_SETTINGS = ("eval", "max_new_tokens", "engine", "verify", "seed", "template", "vocabulary")


def other_evaluation(run: Run, text: str) -> tuple[Run, int | str]:
    """What `--against` names: `3` or `start` of the same run, `RUN:3` or `RUN:start` of another, or its last, `RUN`.

    Raises ConfigError if there is no such run, or it has no evaluation.
    """
    folder, _, which = text.rpartition(":")
    if not (which == "start" or which.isdecimal()):
        folder, which = text, ""
    other = open_run(Path(folder)) if folder else run
    if which:
        return other, int(which) if which.isdecimal() else which
    there = other.evaluations()
    if not there:
        raise ConfigError(f"{folder} has no evaluation", where="--against", fix=other.part("evals", "start").command)
    return other, there[-1].round


def require_other(other: Run, round: int | str, names: Iterable[str | None]) -> None:
    """Raise IncompleteError, before anything is evaluated, if another evaluation has none of these benchmarks."""
    parts = [other.part("evals", round, name) for name in names]
    if not any(map(is_sealed, parts)):
        sealed(parts[0])


def versus(mine: Part, theirs: Part, ks: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Every metric that two sealed evaluations both have, JSON-ready, with `notes` on what differs besides the model.

    Raises IncompleteError if one is missing, DataError if they have no prompt in common.
    """
    a, b = sealed(mine), sealed(theirs)
    keys = _answers(mine, a), _answers(theirs, b)
    common = {prompt for prompt, answer in keys[0].items() if keys[1].get(prompt, ...) == answer}
    if not common:
        text = f"{_place(mine)} and {_place(theirs)} have no prompt in common"
        raise DataError(text, where="--against", fix="evaluate both on the same prompts")
    values = measured(mine, a.shards, ks), measured(theirs, b.shards, ks)
    rows = []
    for metric in values[0]:
        prompts = [p for p in values[0][metric] if p in common and p in values[1].get(metric, {})]
        if not prompts:
            continue
        ours, others = ([v[metric][p] for p in prompts] for v in values)
        means = {"this": mean(ours), "against": mean(others)}
        rows.append({"metric": metric, "prompts": len(prompts), **means, **paired(ours, others, seed)._asdict()})
    missing = sorted(values[0].keys() ^ values[1].keys())
    notes = _notes(mine, theirs, a, b, tuple(map(len, keys)), len(common))
    notes += [f"only one of them has {', '.join(missing)}"] if missing else []
    return {"benchmark": mine.name, "this": _place(mine), "against": _place(theirs), "metrics": rows, "notes": notes}


def shared(
    run: Run, round: int | str, other: Run, other_round: int | str, names: list[str | None]
) -> list[tuple[Part, Part]]:
    """The evaluations of these benchmarks that both have; if there is none, the first, whose absence is then told."""
    pairs = [(run.part("evals", round, name), other.part("evals", other_round, name)) for name in names]
    return [pair for pair in pairs if all(map(is_sealed, pair))] or pairs[:1]


def _answers(part: Part, manifest: Manifest) -> dict[str, str | None]:
    tables = [read_shard(part, r, ["prompt_id", "answer"]) for r in manifest.shards]
    return {row["prompt_id"]: row["answer"] for table in tables for row in table.to_pylist()}


def _place(part: Part) -> str:
    return f"{part.root} {part.label}"


def _notes(mine: Part, theirs: Part, a: Manifest, b: Manifest, counts: tuple[int, ...], common: int) -> list[str]:
    notes = []
    if a.fields["prompts"] != b.fields["prompts"]:
        notes.append(
            f"the prompts differ: {counts[0]:,} in {_place(mine)}, {counts[1]:,} in {_place(theirs)}; "
            f"compared are the {common:,} with the same prompt_id and answer"
        )
    then, now = ({k: m.fields.get(k) for k in _SETTINGS} for m in (b, a))
    if changed := differences(then, now):
        notes.append(f"not only the models differ: {'; '.join(changed)}")
    return notes
