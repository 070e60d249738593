"""What a report says beside its trajectories, as plain dicts: rounds, filter, training, findings, fingerprints.

A part that is not there is `{"missing": what, "fix": the command that makes it}`.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from typing import Any

import polars as pl

from fire_data import metrics
from fire_data.diagnose import LEVELS
from fire_data.overview import parts
from fire_data.report.measure import outcome
from fire_data.report.tables import Tables
from fire_data.run import Run
from fire_data.schemas.config import TEACHER
from fire_data.schemas.errors import ConfigError, IncompleteError
from fire_data.schemas.manifest import Receipt
from fire_data.shards import Part, is_sealed, read_manifest, read_shard, sealed
from fire_data.stages import Reporter
from fire_data.steps.diagnose import diagnose_round

Json = dict[str, Any]
_SUMMED = ("student_entropy_sum", "teacher_entropy_sum", "reverse_kl_sum", "student_logprob_sum", "teacher_logprob_sum")
_POINTS = 400  # of one training curve
_BARS = 40  # of the histogram, at most
_TAIL = 0.005  # share of trajectories whose logprob may lie below its first bar
_GROUPS = 12  # teachers that have a bar of their own


def rounds(run: Run, name: str | None) -> list[Json]:
    """One row per round with rollouts: what was written, how far from the teacher, how much was kept, how good it was.

    `trained`: rounds of training behind the student. It wrote the round's rollouts; `accuracy` is its own, too.
    """
    accuracy = _accuracy(run)
    found = {n: _round(run, n, name) for n in run.rounds() if is_sealed(run.part("rollouts", n))}
    trained = sorted({*found, *accuracy})
    return [{"trained": n, **found.get(n, {}), **accuracy.get(n, {})} for n in trained]


def _accuracy(run: Run) -> dict[int, Json]:
    """Mean reward on held-out prompts by rounds trained and mode."""
    try:
        frame = run.evals().group_by("round", "mode").agg(pl.col("reward").mean(), pl.len()).collect()
    except IncompleteError:
        return {}
    found: dict[int, Json] = {}
    for row in frame.iter_rows(named=True):
        found.setdefault(row["round"] + 1, {})[f"accuracy_{row['mode']}"] = row["reward"]
    return found


def _round(run: Run, number: int, name: str | None) -> Json:
    part = run.part("scores", number)
    scored = is_sealed(part)
    part = part if scored else run.part("rollouts", number)
    rows = pl.concat([_scalars(part, receipt) for receipt in sealed(part).shards], how="diagonal")
    tokens = int(rows["length"].sum())
    found: Json = {
        "trajectories": rows.height,
        "tokens": tokens,
        "length": rows["length"].mean(),
        "truncated": (rows["finish_reason"] == "length").mean(),
    }
    if scored and tokens:
        found |= {c.removesuffix("_sum"): rows[c].sum() / tokens for c in _SUMMED if c in rows.columns}
        # Of a sampled token, the log-ratio is an unbiased estimate of the divergence.
        found.setdefault("reverse_kl", found["student_logprob"] - found["teacher_logprob"])
        found["kl_kind"] = "exact" if "reverse_kl_sum" in rows.columns else "estimated from sampled tokens"
    weights = run.part("weights", number, name)
    if is_sealed(weights):
        stats = sealed(weights).stats
        found |= {k: stats.get(k) for k in ("kept_fraction", "kept_token_fraction", "effective_sample_share")}
    return found


def _scalars(part: Part, receipt: Receipt) -> pl.DataFrame:
    """A shard's rows with one number per trajectory and no token."""
    if part.stage == "scores":
        frame = pl.from_arrow(read_shard(part, receipt, ["length", "finish_reason"], optional=_SUMMED))
    else:
        frame = pl.from_arrow(read_shard(part, receipt, ["response_ids", "finish_reason"]))
    assert isinstance(frame, pl.DataFrame)
    return (
        frame if "length" in frame.columns else frame.select("finish_reason", length=pl.col("response_ids").list.len())
    )


def histogram(rows: pl.DataFrame) -> Json | None:
    """Trajectories by mean teacher logprob, kept and dropped; None without scores. `below`: in the first bar, too."""
    if "mean_teacher_logprob" not in rows.columns:
        return None
    told = rows.filter(pl.col("mean_teacher_logprob").is_not_null())
    if not told.height:
        return None
    values = told["mean_teacher_logprob"]
    low, high = (float(values.quantile(q, "linear") or 0.0) for q in (_TAIL, 1.0))
    step = _round_step((high - low) / _BARS)
    first = math.floor(low / step)
    bins = (values / step).floor().cast(pl.Int64).clip(lower_bound=first)
    kept = told["keep"] if "keep" in told.columns else pl.Series([True] * told.height)
    counted = pl.DataFrame({"bin": bins, "kept": kept}).group_by("bin", "kept").len().sort("bin", "kept")
    bars = [{"from": step * b, "to": step * (b + 1), "kept": k, "trajectories": n} for b, k, n in counted.iter_rows()]
    return {"bars": bars, "below": int((values < step * first).sum()), "weighed": "keep" in told.columns}


def _round_step(width: float) -> float:
    """The least of 1, 2 or 5 times a power of ten that is not below `width`."""
    if width <= 0:
        return 0.1
    power = 10.0 ** math.floor(math.log10(width))
    return next(power * m for m in (1, 2, 5, 10) if power * m >= width)


def kept_by(rows: pl.DataFrame) -> list[Json]:
    """Kept share by teacher, correctness and length (quarters of the round), with how many there are; [] unweighed."""
    if "keep" not in rows.columns or not rows.height:
        return []
    lengths = rows["length"].cast(pl.Int64).sort().to_list()
    edges = sorted({lengths[(len(lengths) - 1) * i // 4] for i in range(1, 5)})
    spans = {
        e: f"{low:,} to {e:,} tokens" for e, low in zip(edges, [lengths[0], *(e + 1 for e in edges)], strict=False)
    }
    frame = rows.select(
        "keep",
        teacher=pl.col("teacher").fill_null(TEACHER),
        outcome=pl.Series(outcome(rows["reward"]), dtype=pl.String),
        length=pl.Series([next(e for e in edges if n <= e) for n in rows["length"]]),
    )
    found: list[Json] = []
    for by in ("outcome", "teacher", "length"):
        groups = frame.group_by(by).agg(pl.len(), pl.col("keep").mean()).sort(by).rows()
        if by == "teacher":
            groups = sorted(groups, key=lambda g: -g[1])[:_GROUPS]
        for group, n, kept in groups:
            found.append({"by": by, "group": spans.get(group, str(group)), "trajectories": n, "kept": kept})
    return found


def drop_reasons(rows: pl.DataFrame) -> list[Json]:
    """How many trajectories were dropped for which reason, the most frequent first."""
    if "keep" not in rows.columns:
        return []
    counted = rows.filter(~pl.col("keep")).group_by("drop_reason").len().sort("len", "drop_reason", descending=True)
    return [{"reason": reason or "(no reason given)", "trajectories": n} for reason, n in counted.iter_rows()]


def curves(run: Run) -> list[Json]:
    """Records of optimizer steps, at most some hundreds, evenly thinned; the last is always there."""
    records = [r for r in metrics.steps(run.root / "metrics.jsonl") if isinstance(r.get("global_step"), int)]
    step = -(-len(records) // _POINTS) or 1
    return records[::-1][::step][::-1]


def ended_early(run: Run) -> list[Json]:
    """The rounds that ended before their last step because the student had moved too far, and by which bound."""
    made = {n: m.stats for n in run.rounds() if (m := read_manifest(run.part("checkpoints", n))) is not None}
    return [
        {"round": n, "setting": f"train.{s['stopped_by']}", "steps": s["steps"], "unused_steps": s["unused_steps"]}
        for n, s in made.items()
        if "stopped_by" in s
    ]


def findings(run: Run, tables: Tables, report: Reporter) -> list[Json] | Json:
    """What `fire diagnose` finds in the round, the worst first; or what is missing for it."""
    if not tables.scored:
        part = run.part("scores", tables.round)
        return {"missing": "There are no scores to diagnose.", "fix": part.command}
    try:
        found = diagnose_round(run, tables.round, tables.name, report)
    except (IncompleteError, ConfigError) as error:
        return {"missing": error.what, "fix": error.fix}
    return [dataclasses.asdict(f) for f in sorted(found, key=lambda f: LEVELS.index(f.level))]


def stages(run: Run) -> list[Json]:
    """Every stage that was started, with its fingerprint and size."""
    found = []
    for part in parts(run):
        manifest = read_manifest(part)
        assert manifest is not None
        found.append({
            "stage": part.label,
            "state": manifest.state,
            "shards": len(manifest.shards),
            "rows": sum(r.rows for r in manifest.shards),
            "tokens": sum(r.tokens for r in manifest.shards),
            "bytes": sum(r.bytes for r in manifest.shards),
            "fingerprint": manifest.fingerprint,
        })  # fmt: skip
    return found


def versions(tables: Tables) -> dict[str, str]:
    """The library versions that wrote the rows shown."""
    receipts = tables.rows[1].shards
    return dict(receipts[0].versions) if receipts else {}


def models(run: Run) -> Json:
    """Who writes and who judges, by the names in the configuration."""
    return {"student": run.config.student.model, "teachers": {k: m.model for k, m in run.teachers.items()}}


def missing(run: Run, tables: Tables, evaluated: bool) -> dict[str, Json | None]:
    """The parts that a report of this run has to do without, with the commands that make them; None: it is there."""
    found: dict[str, Json | None] = dict.fromkeys(("scores", "weights", "evals", "training"))
    if not tables.scored:
        found["scores"] = _gap("This round is not scored yet.", run.part("scores", tables.round).command)
    if tables.weights is None:
        command = run.part("scores" if not tables.scored else "weights", tables.round).command
        found["weights"] = _gap("This round has no weights yet.", command)
    if not evaluated:
        text = "There is no evaluation yet."
        if run.config.eval.prompts is None:
            text += " It needs held-out prompts with answers: eval.prompts in fire.yaml."
        found["evals"] = _gap(text, f"fire eval {shlex.quote(str(run.root))}")
    if not (run.root / "metrics.jsonl").exists():
        found["training"] = _gap("Nothing was trained yet.", run.part("checkpoints", tables.round).command)
    return found


def _gap(text: str, fix: str) -> Json:
    return {"missing": text, "fix": fix}
