"""Whether the teacher's likelihood knows right from wrong, and what a filter by it drops besides.

FiRe drops trajectories with a low mean teacher logprob. That pays only if the score tells right from wrong, and not
length, repetition or truncation under another name. Thresholds are constants with their source. Units: nats.
"""

from __future__ import annotations

from typing import Any

import polars as pl

import fire_data as fd
from fire_data.diagnose.auroc import REPLICATES, auroc, auroc_interval, auroc_within
from fire_data.diagnose.finding import (
    Facts,
    Finding,
    Level,
    finding,
    grade,
    mean,
    percent,
    share,
    softened,
    spearman,
    text,
    worst,
)
from fire_data.diagnose.measure import Measured, mean_of, repeat_ratio

ANCHOR = (0.73, 0.75)  # AUROC on mathematics: 2604.13016; 0.741 measured again by an independent study
WEAK = 0.65  # AUROC well below the anchor; code is reported at 0.51 (2609.02998). A judgement
RHO_NOTE, RHO_WARNING = 0.3, 0.5  # medium and large correlations by Cohen's convention
SHARE_GAP = 0.2  # difference of shares between dropped and kept that is worth a word (a judgement)
PERCENTILE = 20.0  # what FiRe drops, 2606.02684
FAILURE = 0.68  # share of a wrong answer's tokens that teacher and student agree on, 2607.23731
SAME = 0.02  # difference of two shares that tells nothing (a judgement)

_WHY_PREMISE = (
    "The filter drops the responses the teacher finds least likely. If that likelihood does not separate right from "
    "wrong, it drops at random at best, and corrections of derailed answers at worst."
)
_REWARDS = "grade the answers, for which prompts need `answer`: "


def premise(measured: Measured, facts: Facts) -> Finding:
    """AUROC of mean teacher logprob against the reward, with an interval over prompts; entropy and length beside it."""
    rows = _graded(measured)
    good = int(rows["right"].sum())
    counts = {"right": good, "wrong": rows.height - good, "rewards_missing": measured.rows["reward"].null_count()}
    do = _REWARDS + facts.verify
    if not rows.height:
        return finding("premise", "unknown", "no trajectory has a reward", counts, _WHY_PREMISE, do)
    if good in (0, rows.height):
        which = "right" if good else "wrong"
        do = "roll out more prompts, or of another difficulty; see what the verifier reads: "
        do += f"fire inspect {facts.run} --round {facts.round}"
        return finding("premise", "unknown", f"all {rows.height} answers are {which}", counts, _WHY_PREMISE, do)
    numbers: dict[str, Any] = {**counts, **_separation(rows, facts.seed), "anchor": ANCHOR}
    if rows["teacher"].n_unique() > 1:
        by = {
            k[0] or "default": _separation(part, facts.seed)
            for k, part in rows.group_by("teacher", maintain_order=True)
        }
        numbers["by_teacher"] = by
    level = _premise_level(numbers)
    measured_text = (
        f"AUROC of mean teacher logprob {text(numbers['auroc'])} ({_interval(numbers)}; {good} right, "
        f"{counts['wrong']} wrong; literature {ANCHOR[0]}-{ANCHOR[1]}); "
        f"within prompts {text(numbers['within_prompts'])}, of low teacher entropy "
        f"{text(numbers['auroc_low_entropy'])}, of shortness {text(numbers['auroc_short'])}"
    )
    for teacher, found in numbers.get("by_teacher", {}).items():
        measured_text += f"; teacher {teacher} {text(found['auroc'])} ({_interval(found)})"
    do = "compare with rules that do not rest on it, and with a random filter: " + facts.compare(
        "fire", "fire-weights", "keep-corrections", "prompt-gate", "random", "uniform"
    )
    return finding("premise", level, measured_text, numbers, _WHY_PREMISE, do)


def _graded(measured: Measured) -> pl.DataFrame:
    """Trajectories with a reward and at least one token, with the scores that are compared."""
    rows = measured.rows.filter(pl.col("reward").is_not_null() & (pl.col("length") > 0))
    return rows.with_columns(
        right=pl.col("reward") > 0.5,
        score=mean_of("teacher_logprob"),
        certainty=-mean_of("teacher_entropy"),
        shortness=-pl.col("length").cast(pl.Float64),
    )


def _separation(rows: pl.DataFrame, seed: int) -> dict[str, Any]:
    right, prompt = rows["right"], rows["prompt_id"]
    interval = auroc_interval(rows["score"], right, prompt, seed)
    within, pairs = auroc_within(rows["score"], right, prompt)
    return {
        "auroc": auroc(rows["score"], right),
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "prompts": prompt.n_unique(),
        "replicates": interval.replicates if interval else 0,
        "resampled": "prompts",
        "within_prompts": within,
        "pairs_within_prompts": pairs,
        "auroc_low_entropy": auroc(rows["certainty"], right),
        "auroc_short": auroc(rows["shortness"], right),
    }


def _interval(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return "no interval: too few prompts"
    return f"95 % {text(found['low'])}-{text(found['high'])} over {REPLICATES} resamples of {found['prompts']} prompts"


def _premise_level(numbers: dict[str, Any]) -> Level:
    area, low, high = numbers["auroc"], numbers["low"], numbers["high"]
    if low is None:
        return "unknown"
    if high < 0.5:
        return "problem"
    if low <= 0.5:
        return "warning"
    baseline = max(numbers["auroc_short"], 1 - numbers["auroc_short"])
    return "note" if area < WEAK or baseline >= area else "ok"


def filter_effect(measured: Measured, facts: Facts) -> Finding:
    """What the filter's score and its decision go along with: length, repetition, truncation, the reward."""
    why = (
        "A filter that follows length, repetition or truncation selects a style, and takes away the negative "
        "advantages that would correct derailed answers."
    )
    rows = _decided(measured, facts)
    source = f"the weights '{facts.weighed.name}'" if facts.weighed else f"fire at {PERCENTILE:g} %"
    if rows.height < 2:
        return finding("filter", "unknown", "there are fewer than two responses with tokens", {}, why, _MORE)
    score = rows["score"]
    # Samples of a prompt are alike: a correlation is believed beyond two standard errors for that many prompts.
    least = 2 / max(1, rows["prompt_id"].n_unique()) ** 0.5
    rho = {name: spearman(score, rows[name]) for name in ("length", "repeat", "truncated")}
    kept, dropped = rows.filter("keep"), rows.filter(~pl.col("keep"))
    sides = {k: {c: mean(side[c]) for c in _COMPARED} for k, side in (("kept", kept), ("dropped", dropped))}
    strongest = max((abs(r) for r in rho.values() if r is not None), default=0.0)
    level = grade(strongest if strongest >= least else 0.0, RHO_NOTE, RHO_WARNING)
    gaps = {c: _gap(sides["dropped"][c], sides["kept"][c]) for c in ("truncated", "repeat")}
    if any(abs(g or 0.0) >= SHARE_GAP for g in gaps.values()):
        level = worst(level, "note")
    numbers: dict[str, Any] = {
        "source": source, "spearman": rho, "spearman_believed_from": least,
        "n_kept": kept.height, "n_dropped": dropped.height, **sides,
    }  # fmt: skip
    measured_text = (
        f"rank correlation of mean teacher logprob with length {text(rho['length'])}, "
        f"repetition {text(rho['repeat'])}, truncation {text(rho['truncated'])}; {source} "
        f"drops {dropped.height} of {rows.height}"
    )
    if dropped.height and kept.height:
        measured_text += f" ({_both(sides)}: dropped against kept)"
    do = f"look at what it drops and at guards that say so: {facts.compare('fire', 'length-guard', *_CONTROLS)}"
    return finding("filter", softened(level, measured), measured_text, numbers, why, do)


_COMPARED = ("length", "repeat", "truncated", "reward")
_CONTROLS = ("repetition-guard", "keep-corrections", "prompt-gate", "random")
_MORE = "roll out more prompts"


def _both(sides: dict[str, dict[str, float | None]]) -> str:
    pairs = ((c, sides["dropped"][c], sides["kept"][c]) for c in _COMPARED)
    return ", ".join(f"{c} {text(d)}/{text(k)}" for c, d, k in pairs if d is not None and k is not None)


def _gap(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _decided(measured: Measured, facts: Facts) -> pl.DataFrame:
    """Responses with tokens, their score, and whether the sealed weights, or else FiRe's filter, keep them."""
    rows = measured.rows
    if "keep" not in rows.columns:
        rows = rows.with_columns(keep=_fire_keeps(rows, facts.batch_size))
    return rows.filter(pl.col("length") > 0).with_columns(
        score=mean_of("teacher_logprob"),
        repeat=repeat_ratio(),
        truncated=(pl.col("finish_reason") == "length").cast(pl.Float64),
    )


def _fire_keeps(rows: pl.DataFrame, batch_size: int | None) -> pl.Series:
    """FiRe's filter sees means alone: trajectories of one token with these means get the same decision."""
    signals = ("teacher_logprob", "student_logprob", "teacher_entropy", "student_entropy")
    if not rows.height:
        return pl.Series("keep", [], dtype=pl.Boolean)
    short = rows.select(
        "trajectory_id",
        "prompt_id",
        *(pl.concat_list(mean_of(s)).list.drop_nulls().alias(s) for s in signals),
    )
    return fd.weigh(short, "fire-filter", batch_size=batch_size, percentile=PERCENTILE).select("keep").collect()["keep"]


def inert_filter(measured: Measured, facts: Facts) -> Finding:
    """A filter that drops nothing although the rule has one."""
    why = (
        "A quantile over one value is that value: a filter fitted within a trajectory or a micro-batch of one keeps "
        "everything, silently, as the scripts released with FiRe do."
    )
    rows = _decided(measured, facts)
    weighed = facts.weighed
    name = weighed.name if weighed else f"fire at {PERCENTILE:g} %"
    dropped = int((~rows["keep"]).sum())
    numbers: dict[str, Any] = {"rule": name, "n_dropped": dropped, "trajectories": measured.rows.height}
    if weighed is not None and not weighed.filters:
        return finding("inert-filter", "ok", f"'{name}' has no filter by a quantile", numbers, why)
    said = f"{'' if weighed else 'with no weights yet, '}{name} drops {dropped} of {measured.rows.height} trajectories"
    level: Level = "ok" if dropped else "warning" if weighed else "note"
    if measured.rows.height < 2:
        level = "unknown"
    do = f"fit the filter over the step or the round: fire weigh {facts.run} --round {facts.round} --scope step --redo"
    return finding("inert-filter", level, said, numbers, why, do)


def outcome(measured: Measured, facts: Facts) -> Finding:
    """Sign of the advantage against the reward: is a wrong answer pushed down more than a right one?"""
    why = (
        "Where the teacher agrees with most tokens of wrong answers, gates and filters on the sign of the advantage "
        "mix up how usual a token is and how good it is."
    )
    rows = _graded(measured)
    table = {
        name: {k: int(part[k].sum()) for k in ("positive", "negative", "length")}
        for name, part in (("right", rows.filter("right")), ("wrong", rows.filter(~pl.col("right"))))
    }
    up = {name: share(t["positive"], t["length"]) for name, t in table.items()}
    numbers: dict[str, Any] = {
        "tokens": {n: {**t, "zero": t["length"] - t["positive"] - t["negative"]} for n, t in table.items()},
        "positive_share": up,
        "agreement_in_failure_literature": FAILURE,
    }
    if not rows.height:
        do = _REWARDS + facts.verify
        return finding("outcome", "unknown", "no trajectory has a reward", numbers, why, do)
    if up["right"] is None or up["wrong"] is None:
        said = f"all answers are {'wrong' if up['right'] is None else 'right'}"
        return finding("outcome", "unknown", said, numbers, why, _MORE)
    gap = up["right"] - up["wrong"]
    level: Level = "warning" if gap < -SAME else "note" if gap <= SAME else "ok"
    said = (
        f"the advantage is positive at {percent(up['right'])} of the tokens of right answers and at "
        f"{percent(up['wrong'])} of wrong ones (teacher and student agree in failure; literature {percent(FAILURE)})"
    )
    do = f"compare gates by the verifier: {facts.compare('uniform', 'opdvr', 'sg-opd', 'ra-opd', 'verified-only')}"
    return finding("outcome", softened(level, measured), said, numbers, why, do)
