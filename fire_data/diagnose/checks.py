"""Whether the columns are what they claim: shifts by a token, broken relations, drift, and what the manifests record.

A column shifted by one token passes every check of shape and type. So relations that hold for every token are tested
with the ids in the row, and correlations at neighbouring positions. Thresholds are constants with their source. Nats.
"""

from __future__ import annotations

import math
from typing import Any

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
    text,
    total,
    worst,
)
from fire_data.diagnose.measure import LAGS, MODELS, PAIRS, Measured, breaches

DRIFT_NOTE, DRIFT_WARNING = 0.01, 0.05  # nats on average; bfloat16 alone gives about .01, `fire score` warns at .05
DRIFT_FAR = 1.0  # nats at one token that rounding does not explain (a judgement)
SLOPE = 0.05  # nats of drift per nat of entropy: a temperature or truncation that is not recorded (a judgement)
SHIFT_MARGIN, SHIFT_ERRORS = 0.1, 3.0  # a neighbour must fit better by this, and by so many standard errors
SHIFT_DIFFERS = 0.01  # share of tokens whose top-1 id and rank may disagree: ties of low-precision logits
TIES = 0.001  # share of tokens with the largest logprob at another rank than 1
FIRST_NOTE, FIRST_WARNING = -0.5, -2.0  # nats of the first token's advantage below the others' (a judgement)
HALF = ("bfloat16", "float16")
HALF_NOISE = 1e-3  # nats: what a forward pass in half precision is off per logprob
FAINT = 10.0  # a mean |advantage| under so many times the noise drowns in it (a judgement)

_SHORT = "there are no tokens"
_ROLL = "roll out prompts"


def drift(measured: Measured, facts: Facts) -> Finding:
    """Logprobs when sampling against logprobs when scoring, and whether the difference grows with entropy."""
    why = (
        "The engine that wrote must be the model that is scored; a difference that grows with entropy points to a "
        "temperature or truncation in one of them."
    )
    tokens, totals = measured.totals["tokens"], measured.totals
    if not comparable(facts):
        known = "it is not known how the rollouts were sampled" if facts.sampling is None else _sampled(facts)
        said = f"{known}: rollout_logprob is under another distribution than student_logprob"
        do = f"sample at temperature 1 without top-p and top-k: {_plainly(facts)}"
        return finding("rollout-drift", "unknown", said, {"sampling": facts.sampling}, why, do)
    if not tokens:
        return finding("rollout-drift", "unknown", _SHORT, {}, why, _ROLL)
    average, most = totals["drift_abs"] / tokens, totals["drift_max"]
    variance = totals["entropy_squares"] / tokens - (totals["entropy"] / tokens) ** 2
    covariance = totals["drift_entropy"] / tokens - totals["drift"] * totals["entropy"] / tokens**2
    slope = covariance / variance if variance > 1e-9 else None
    numbers: dict[str, Any] = {
        "mean_abs": average,
        "max_abs": most,
        "mean": totals["drift"] / tokens,
        "slope_with_entropy": slope,
    }
    level = grade(average, DRIFT_NOTE, DRIFT_WARNING)
    if most >= DRIFT_FAR or abs(slope or 0.0) >= SLOPE:
        level = worst(level, "note")
    said = (
        f"|student_logprob - rollout_logprob| {text(average)} nats on average, {text(most)} at most; "
        f"slope with entropy {text(slope)}"
    )
    do = f"weigh by the ratio: {facts.again('weigh', 'weigh.rollout_is_cap=5')}; score in the dtype that sampled"
    return finding("rollout-drift", level, said, numbers, why, do)


def comparable(facts: Facts) -> bool:
    """True if rollout_logprob and student_logprob are under the same distribution."""
    wanted = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    return facts.sampling is not None and all(facts.sampling.get(k) == v for k, v in wanted.items())


def _sampled(facts: Facts) -> str:
    return "sampled with " + ", ".join(f"{k} {v}" for k, v in (facts.sampling or {}).items())


def _plainly(facts: Facts) -> str:
    return facts.again("rollout", "rollout.temperature=1", "rollout.top_p=1", "rollout.top_k=0")


def shift(measured: Measured, facts: Facts) -> Finding:
    """Do the columns belong to these tokens, or to their neighbours?"""
    why = "Off by one is the commonest error of scoring code, and every loss still falls with it."
    totals, inner = measured.totals, measured.totals["inner"]
    if not inner:
        return finding(
            "shift", "unknown", "no response has two tokens", {"tokens": 0}, why, "roll out longer responses"
        )
    at_lags = {pair: {lag: _correlation(totals, inner, lag, pair) for lag in LAGS} for pair in PAIRS}
    ranked = [who for who in MODELS if f"lag0:{who}:differs" in totals]
    differs = {who: {lag: totals[f"lag{lag}:{who}:differs"] / inner for lag in LAGS} for who in ranked}
    found = _displaced(differs) + _fits_elsewhere(at_lags, max(SHIFT_MARGIN, SHIFT_ERRORS / math.sqrt(inner)))
    numbers: dict[str, Any] = {
        "tokens": inner,
        "correlation_by_lag": at_lags,
        "mean_abs_difference_by_lag": {
            pair: {lag: totals[f"lag{lag}:{pair}:off"] / inner for lag in LAGS} for pair in PAIRS
        },
        "rank_and_top1_disagree_by_lag": differs,
    }
    told = [
        f"correlation with {PAIRS[pair]} at lag -1, 0, +1: {', '.join(text(c[lag]) for lag in LAGS)}"
        for pair, c in at_lags.items()
        if c[0] is not None
    ]
    fine = "columns and ids belong together" + "".join(f"; {line}" for line in told)
    said = "; ".join(line for _, line in found) or fine
    level = worst("ok", *(severity for severity, _ in found))
    return finding("shift", level, said, numbers, why, f"score anew: {facts.again('score')}")


def _displaced(differs: dict[str, dict[int, float]]) -> list[tuple[Level, str]]:
    """Signals against ids: a token has rank 1 exactly where it is the top-1 id, or else the ids are a neighbour's."""
    found: list[tuple[Level, str]] = []
    for who, at in differs.items():
        neighbour = min((-1, 1), key=lambda lag: at[lag])
        if at[0] > SHIFT_DIFFERS and at[neighbour] < at[0] / 2:
            found.append(("problem", f"the {who}'s top-1 ids and ranks belong to the token {_side(neighbour)}"))
    return found


def _fits_elsewhere(at_lags: dict[str, dict[int, float | None]], margin: float) -> list[tuple[Level, str]]:
    """Logprobs of one token correlate more than those of neighbours, also where another temperature was sampled at."""
    found: list[tuple[Level, str]] = []
    for pair, at in at_lags.items():
        here, near = at[0], [(c, lag) for lag in (-1, 1) if (c := at[lag]) is not None]
        if here is None or not near or max(near)[0] <= here + margin:
            continue
        best, lag = max(near)
        # Another model's logprobs are weaker evidence than the same model's.
        level: Level = "problem" if pair == "rollout" else "warning"
        fits = f"student_logprob fits {PAIRS[pair]} of the token {_side(lag)}"
        found.append((level, f"{fits} (correlation {text(best)} against {text(here)})"))
    return found


def _side(lag: int) -> str:
    return "before" if lag > 0 else "after"


def _correlation(totals: dict[str, float], count: float, lag: int, pair: str) -> float | None:
    """Pearson's correlation from sums; None where a column is constant."""
    x, y, xx, yy, xy = (totals[f"lag{lag}:{pair}:{k}"] / count for k in ("x", "y", "xx", "yy", "xy"))
    spread = (xx - x * x, yy - y * y)
    # Below this a variance is what is left of rounding.
    if any(v <= 1e-9 * max(square, 1e-9) for v, square in zip(spread, (xx, yy), strict=True)):
        return None
    return (xy - x * y) / math.sqrt(spread[0] * spread[1])


def consistency(measured: Measured, facts: Facts) -> Finding:
    """Relations that hold between the columns of every token whatever the models are."""
    why = "A relation that cannot be broken is broken: a column is not what its name says, and neither is its weight."
    totals, tokens = measured.totals, measured.totals["tokens"]
    do = f"score anew: {facts.again('score')}"
    if not tokens:
        return finding("consistency", "unknown", _SHORT, {}, why, _ROLL)
    relations = [name for name in breaches() if name in totals]
    broken = {name: int(totals[name]) for name in relations if totals[name]}
    ranked = [who for who in MODELS if f"{who}_tied" in totals]
    for who in ranked:
        if totals[f"{who}_tied"] > TIES * tokens:
            broken[f"{who}_max_logprob only at {who}_rank 1"] = int(totals[f"{who}_tied"])
    limit = math.log(facts.vocabulary_size) if facts.vocabulary_size else math.inf
    for who in MODELS:
        if totals[f"{who}_entropy_max"] > limit + 1e-3:
            broken[f"{who}_entropy <= log(vocabulary)"] = 1
    checked = len(relations) + len(ranked) + (len(MODELS) if facts.vocabulary_size else 0)
    numbers: dict[str, Any] = {
        "relations": checked,
        "tokens": tokens,
        "broken": broken,
        "vocabulary_size": facts.vocabulary_size,
    }
    if not broken:
        said = f"{checked} relations hold at all {tokens:.0f} tokens"
        return finding("consistency", "ok", said, numbers, why)
    listed = "; ".join(f"{name} (not at {percent(count / tokens)} of tokens)" for name, count in broken.items())
    return finding("consistency", "problem", f"broken: {listed}", numbers, why, do)


def sampling(measured: Measured, facts: Facts) -> Finding:
    """Temperature, top-p and top-k of the rollouts."""
    why = "On-policy means samples of the policy that is trained: tempered or truncated samples are of another one."
    numbers: dict[str, Any] = {"sampling": facts.sampling}
    if facts.sampling is None:
        said = "it is not known how the rollouts were sampled"
        return finding("sampling", "unknown", said, numbers, why, f"make the rollouts anew: {facts.again('rollout')}")
    level: Level = "ok" if comparable(facts) else "warning"
    return finding("sampling", level, _sampled(facts), numbers, why, f"sample plainly: {_plainly(facts)}")


def tokenizers(measured: Measured, facts: Facts) -> Finding:
    """Special roles and ids in which the two tokenizers differ."""
    why = "Ids that one model lacks are masked in both, and a role with two ids is learnt as a disagreement."
    record = facts.tokenizers
    if record is None:
        do = f"score anew: {facts.again('score')}"
        return finding("tokenizers", "unknown", "it is not recorded how the tokenizers compare", {}, why, do)
    roles = record.get("roles") or {}
    lacking = {who: int(record.get(f"only_{who}") or 0) for who in MODELS}
    numbers: dict[str, Any] = {**record, "vocabulary_size": facts.vocabulary_size}
    level: Level = "note" if roles or any(lacking.values()) else "ok"
    if record.get("conflicts"):
        level = "problem"
    said = f"{record.get('shared')} shared ids; masked because one lacks them: "
    said += ", ".join(f"{count} only the {who} has" for who, count in lacking.items())
    for role, ids in roles.items():
        said += f"; {role} is id {ids[0]} for the student, {ids[1]} for the teacher"
    do = "see the finding end-token; use a teacher with the student's tokenizer if there is one"
    return finding("tokenizers", level, said, numbers, why, do)


def templates(measured: Measured, facts: Facts) -> Finding:
    """Whether the teacher reads the prompt as it knows it: templates, and the advantage of the first token."""
    why = (
        "A teacher under a foreign chat template, or with thinking switched otherwise, refuses the first tokens and "
        "judges the rest from a prompt it never saw."
    )
    rows = measured.rows.filter(measured.rows["length"] > 0)
    do = f"render the teacher's own template: {facts.again('score', 'score.teacher_prompt=own')}"
    if not rows.height:
        return finding("first-tokens", "unknown", _SHORT, {}, why, _ROLL)
    first = mean(rows["first_advantage"]) or 0.0
    rest = rows["teacher_logprob_sum"] - rows["student_logprob_sum"] - rows["first_advantage"]
    others = share(total(rest), int(rows["length"].sum()) - rows.height)
    own = mean(rows["own_prompt"])
    numbers: dict[str, Any] = {
        "advantage_first": first,
        "advantage_others": others,
        "own_prompt_share": own,
        "teacher_sees_students_prompt": facts.templates[1] == "shared" if facts.templates else None,
    }
    level = softened(grade((others or 0.0) - first, -FIRST_NOTE, -FIRST_WARNING), measured)
    said = f"advantage of the first token {text(first)} nats, of the others {text(others)}; the teacher sees "
    if facts.templates is None:
        said += "a prompt of its own" if own else "the student's prompt"
    elif facts.templates[1] == "shared":
        said += "the student's prompt"
    else:
        said += f"its own prompt in {percent(own)} of rows"
        do = f"look at both prompts: fire inspect {facts.run} --round {facts.round} --json"
    return finding("first-tokens", level, said, numbers, why, do)


def scores(measured: Measured, facts: Facts) -> Finding:
    """How exact the scores are: engine, kind of entropy, precision of the forward passes."""
    why = "Signals smaller than the noise of the arithmetic that made them are noise."
    tokens = measured.totals["tokens"]
    size = share(measured.totals["advantage_abs"], tokens)
    half = {who: dtype for who, dtype in facts.dtypes.items() if dtype in HALF}
    numbers: dict[str, Any] = {
        "entropy_kind": facts.entropy_kind,
        "dtypes": dict(facts.dtypes),
        "mean_abs_advantage": size,
    }
    if facts.entropy_kind is None:
        do = f"score anew: {facts.again('score')}"
        return finding("scores", "unknown", "it is not recorded how the scores were made", numbers, why, do)
    said = f"entropies are {facts.entropy_kind}; " + ", ".join(f"{k} in {v}" for k, v in facts.dtypes.items())
    said += f"; mean |advantage| {text(size)} nats"
    if facts.entropy_kind == "fake":
        do = f"score with real models: {facts.again('score', 'score.engine=transformers')}"
        return finding("scores", "warning", "the fake engine made these scores: they mean nothing", numbers, why, do)
    level: Level = "ok" if facts.entropy_kind == "exact" else "note"
    if half:
        faint = size is not None and size < FAINT * HALF_NOISE
        level = worst(level, "warning" if faint else "note")
    do = "score in float32 (student.dtype, teacher.dtype) if the advantages are small"
    return finding("scores", level, said, numbers, why, do)


def steps(measured: Measured, facts: Facts) -> Finding:
    """Optimizer steps of the round that were skipped because loss or gradient was not finite."""
    why = "A step that is skipped trains nothing: one may be an accident of rounding, several are a cause to look for."
    skipped = facts.nonfinite_steps
    numbers = {"nonfinite_steps": skipped}
    if skipped is None:
        train = f"fire train {facts.run} --round {facts.round}"
        return finding("training-steps", "unknown", "the round is not trained yet", numbers, why, f"train it: {train}")
    if not skipped:
        return finding("training-steps", "ok", "loss and gradient were finite in every step", numbers, why)
    said = f"{skipped} steps were skipped because loss or gradient was not finite"
    do = "find them by `nonfinite` in metrics.jsonl; lower train.lr, or train in float32 (train.compute_dtype)"
    return finding("training-steps", "warning", said, numbers, why, do)
