"""Where the learning signal sits: outliers, tokens that neither model expects, late positions, no signal at all.

The advantage is teacher minus student logprob of the sampled token. Thresholds are constants with their source.
Units: nats; positions are tenths of the response.
"""

from __future__ import annotations

import math
from typing import Any

import polars as pl

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
from fire_data.diagnose.measure import MODELS, TENTHS, Measured

TOP = (0.001, 0.01)  # shares of tokens whose part of the signal is told
TOP_NOTE, TOP_WARNING = (0.1, 0.25), (0.25, 0.5)  # their part of sum |advantage|; an exponential tail has .008 and .056
EARLY = 0.3  # part of the top 1 % tokens in the first tenth: three times its due (a judgement)
FAR = -20.0  # nats of the least advantage; published tails reach about -50 (2606.17199)
LOW_NOTE, LOW_WARNING = 0.1, 0.38  # part of sum |advantage|; .38 to .50 in DIAL-OPD 2610.11659, section 3.3
RISE_NOTE, RISE_WARNING = 0.1, 0.3  # nats of teacher entropy from the first to the last tenth (a judgement)
OVERLAP = 0.7  # top-k overlap at the start below which thinking patterns do not fit, 2604.13016 (success: .72 to .91)
FOREIGN_NOTE, FOREIGN_WARNING = 0.05, 0.2  # share of tokens beyond the teacher's first hundred (a judgement)
SILENT = 0.5  # share of tokens without any signal (a judgement)
COPIED = 0.001  # share of uncertain tokens with equal logprobs: two models hardly ever agree to the last bit
MANY = 100  # tokens from which one sign everywhere is no chance

_NO_TOKENS = "there are no tokens"
_ROLL = "roll out prompts"
_BOUND = ("fire", "clip", "tanh", "poweropd", "soft-log")


def outliers(measured: Measured, facts: Facts) -> Finding:
    """Quantiles of the advantage, how much of the signal few tokens carry, and where they lie."""
    why = (
        "A few extreme log-ratios set the gradient's direction, early in the response and in every round (2606.17199)."
    )
    tokens = measured.tokens.select(size=pl.col("advantage").abs(), tenth="tenth")
    everything = total(tokens["size"])
    if not everything:
        return finding("outliers", "unknown", "there is no advantage other than 0", {}, why, _ROLL)
    quantiles = {q: _quantile(measured, q) for q in (0.0, 0.001, 0.01, 0.05, 0.5, 0.95, 0.99, 0.999, 1.0)}
    parts, early = {}, {}
    for top in TOP:
        head = _largest(tokens, top)
        parts[top] = total(head["size"]) / everything
        early[top] = mean(head["tenth"] == 0)
    levels = [grade(parts[top], note, warning) for top, note, warning in zip(TOP, TOP_NOTE, TOP_WARNING, strict=True)]
    # One token can be the top 1 % of a short table, and a student near its teacher has few corrections left.
    level = worst(*levels) if tokens.height >= MANY else "ok"
    if quantiles[0.0] > FAR and level == "warning":
        level = "note"
    if quantiles[0.0] <= FAR or ((early[0.01] or 0.0) >= EARLY and tokens.height >= MANY):
        level = worst(level, "note")
    numbers: dict[str, Any] = {
        "quantiles": {f"{q:g}": v for q, v in quantiles.items()},
        "share_of_top": {f"{top:g}": v for top, v in parts.items()},
        "top_in_first_tenth": {f"{top:g}": v for top, v in early.items()},
        "mean_abs_by_tenth": (measured.tenths["advantage"] / measured.tenths["tokens"]).to_list(),
    }
    said = (
        f"advantage from {text(quantiles[0.0])} to {text(quantiles[1.0])} nats (p0.1 {text(quantiles[0.001])}, median "
        f"{text(quantiles[0.5])}); the top 0.1 % of tokens carry {percent(parts[0.001])} of sum |advantage|, the "
        f"top 1 % {percent(parts[0.01])}, {percent(early[0.01])} of those in the first tenth"
    )
    return finding("outliers", level, said, numbers, why, f"bound the advantage: {facts.compare(*_BOUND)}")


def _largest(tokens: pl.DataFrame, fraction: float) -> pl.DataFrame:
    """The tokens of largest size, the earlier of equals; only those near the edge are sorted."""
    edge = tokens["size"].quantile(max(0.0, 1 - 2 * fraction), "lower")
    ordered = tokens.filter(pl.col("size") >= edge).sort("size", descending=True, maintain_order=True)
    return ordered.head(math.ceil(fraction * tokens.height))


def _quantile(measured: Measured, q: float) -> float:
    value = measured.tokens["advantage"].quantile(q, "linear")
    return math.nan if value is None else float(value)


def low_low(measured: Measured, facts: Facts) -> Finding:
    """Tokens that both models find improbable, and their part of the signal."""
    why = (
        "Where neither model expects the token, the log-ratio compares two tails: noise with a large amplitude "
        "(2610.11659)."
    )
    totals = measured.totals
    tokens, part = share(totals["low"], totals["tokens"]), share(totals["low_abs"], totals["advantage_abs"])
    numbers: dict[str, Any] = {
        "tokens_share": tokens,
        "advantage_share": part,
        "tokens": int(totals["low"]),
        "probability": 0.01,
    }
    if tokens is None:
        return finding("low-low", "unknown", _NO_TOKENS, numbers, why, _ROLL)
    said = f"{percent(tokens)} of tokens have probability 0.01 or less under both; {percent(part)} of sum |advantage|"
    do = f"leave them out or weigh by probability: {facts.compare('fire', 'dial', 'poweropd', 'uniform')}"
    return finding("low-low", grade(part, LOW_NOTE, LOW_WARNING), said, numbers, why, do)


def decay(measured: Measured, facts: Facts) -> Finding:
    """Teacher entropy, largest logprob and reverse KL by tenth of the response, and their slopes."""
    why = "On long prefixes that it would not have written the teacher is an unreliable judge (2605.30833, 2605.27028)."
    tenths = measured.tenths
    if tenths.height < 2:
        said = "responses are too short to compare positions" if tenths.height else _NO_TOKENS
        return finding("teacher-decay", "unknown", said, {"tenths": tenths.height}, why, _ROLL)
    titles = {"teacher_entropy": "teacher entropy", "teacher_max_logprob": "teacher max logprob"}
    titles |= {"reverse_kl": "reverse KL"} if "reverse_kl" in tenths.columns else {}
    means = {c: tenths.select("tenth", value=pl.col(c) / pl.col("tokens")) for c in titles}
    slopes = {c: _slope(frame) for c, frame in means.items()}
    numbers: dict[str, Any] = {
        "by_tenth": {c: frame["value"].to_list() for c, frame in means.items()},
        "tenths": tenths["tenth"].to_list(),
        "slope": slopes,
    }
    rise = slopes["teacher_entropy"] * (TENTHS - 1) / TENTHS
    level = grade(rise, RISE_NOTE, RISE_WARNING)
    if level == "warning" and slopes.get("reverse_kl", 1.0) <= 0:
        level = "note"  # uncertain, but not further apart from the student
    ends = {c: (frame["value"][0], frame["value"][-1]) for c, frame in means.items()}
    said = "first to last tenth: " + ", ".join(
        f"{title} {text(ends[c][0])} -> {text(ends[c][1])} (slope {text(slopes[c])})" for c, title in titles.items()
    )
    do = f"learn from beginnings: {facts.compare('fire', 'esr', 'iw-opd', 'cut-at-surprise')}"
    return finding("teacher-decay", softened(level, measured), said, numbers, why, do)


def _slope(frame: pl.DataFrame) -> float:
    """Least-squares change of `value` over the whole response, tenths at their middle."""
    x = (pl.col("tenth").cast(pl.Float64) + 0.5) / TENTHS
    y = pl.col("value")
    top, bottom = frame.select(((x - x.mean()) * (y - y.mean())).sum(), b=((x - x.mean()) ** 2).sum()).row(0)
    return float(top / bottom)


def overlap(measured: Measured, facts: Facts) -> Finding:
    """Mean share of the student's top-k that is in the teacher's, by tenth."""
    why = "A student whose likely tokens are not the teacher's is hard to guide: success starts at 72 % (2604.13016)."
    if "overlap" not in measured.tenths.columns:
        do = f"fire score {facts.run} --round {facts.round} --add topk"
        return finding("topk-overlap", "unknown", "there are no top-k columns", {}, why, do)
    tenths = measured.tenths.with_columns(value=pl.col("overlap") / pl.col("tokens"))
    if not tenths.height:
        return finding("topk-overlap", "unknown", _NO_TOKENS, {}, why, _ROLL)
    overall = share(total(tenths["overlap"]), total(tenths["tokens"]))
    first, last = tenths["value"][0], tenths["value"][-1]
    numbers: dict[str, Any] = {
        "mean": overall,
        "by_tenth": tenths["value"].to_list(),
        "tenths": tenths["tenth"].to_list(),
    }
    level: Level = "ok" if min(first, overall or 0.0) >= OVERLAP else "warning"
    said = f"top-k overlap {percent(overall)}; first tenth {percent(first)}, last {percent(last)}"
    do = "use a closer teacher, or tune the student on some of the teacher's answers first"
    return finding("topk-overlap", softened(level, measured), said, numbers, why, do)


def teacher_fit(measured: Measured, facts: Facts) -> Finding:
    """Whether the teacher understands what it reads at all: ranks and logprobs of the student's tokens."""
    why = "Ids of another tokenizer, or a prompt the teacher cannot read, give nonsense logprobs without any error."
    totals, tokens = measured.totals, measured.totals["tokens"]
    if not tokens:
        return finding("teacher-fit", "unknown", _NO_TOKENS, {}, why, _ROLL)
    means = {who: totals[f"{who}_logprob"] / tokens for who in MODELS}
    ranked: dict[str, float] = {
        k: totals[k] / tokens for k in ("student_first", "teacher_first", "teacher_rank_100") if k in totals
    }
    far = ranked.get("teacher_rank_100")
    numbers: dict[str, Any] = {
        **{f"{who}_logprob": means[who] for who in MODELS},
        **{f"{who}_rank_1_share": ranked.get(f"{who}_first") for who in MODELS},
        "teacher_rank_over_100_share": far,
        "log_vocabulary": math.log(facts.vocabulary_size) if facts.vocabulary_size else None,
    }
    level = grade(far, FOREIGN_NOTE, FOREIGN_WARNING)
    if facts.vocabulary_size and means["teacher"] < -math.log(facts.vocabulary_size):
        level = "problem"
    said = (
        f"mean logprob of the student's tokens: student {text(means['student'])}, teacher {text(means['teacher'])} "
        f"nats; the teacher's first choice {percent(numbers['teacher_rank_1_share'])}, beyond its first hundred "
        f"{percent(far)}"
    )
    do = (
        f"read what the teacher sees: fire inspect {facts.run} --round {facts.round}; check tokenizer and chat template"
    )
    return finding("teacher-fit", level, said, numbers, why, do)


def degenerate(measured: Measured, facts: Facts) -> Finding:
    """Advantages that are exactly zero, of one sign only, and values that are missing."""
    why = "A stale or copied column, or a divergence used as a reward, trains without an error and teaches nothing."
    totals, tokens, rows = measured.totals, measured.totals["tokens"], measured.rows
    missing = {c: share(rows[c].null_count(), rows.height) for c in ("reward", "teacher")}
    if not tokens:
        numbers: dict[str, Any] = {"missing": missing}
        return finding("degenerate", "unknown", _NO_TOKENS, numbers, why, _ROLL)
    zero, copied = totals["zero"] / tokens, share(totals["zero_unsure"], totals["unsure"])
    positive = total(rows["positive"]) / tokens
    negative = total(rows["negative"]) / tokens
    numbers = {
        "zero_share": zero,
        "zero_share_where_student_is_unsure": copied,
        "positive_share": positive,
        "negative_share": negative,
        "missing": missing,
    }
    level = grade(zero, SILENT, math.inf)
    if copied is not None and copied >= COPIED:
        level = "problem" if copied >= SILENT else worst(level, "warning")
    if tokens >= MANY and zero < 1 and not positive * negative:
        level = "problem"
    said = (
        f"advantage exactly 0 at {percent(zero)} of tokens ({percent(copied)} where the student is not certain), "
        f"positive at {percent(positive)}, negative at {percent(negative)}; without reward {percent(missing['reward'])}"
    )
    do = f"see that student and teacher are two models, then score anew: {facts.again('score')}"
    if level == "note":
        do = "nothing is wrong, but most tokens teach nothing: fewer tokens may do (fire rules tip, fire rules dial)"
    return finding("degenerate", level, said, numbers, why, do)
