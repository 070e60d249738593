"""What the student writes: length and truncation, repetition, agreement without content, and how responses end.

Students distilled on-policy can grow longer each round until the length cap cuts them, or fall into loops that the
teacher, seeing the loop, finds likely too. Thresholds are constants with their source. Units: tokens, nats.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from fire_data.diagnose.measure import OPEN, ROW, UNLIKELY, WINDOW, Measured, repeat_ratio

CUT_NOTE, CUT_WARNING = 0.05, 0.19  # truncated share; .19 is where a published log collapsed (2604.08527 and others)
GROWTH_NOTE, GROWTH_WARNING = 1.5, 2.5  # median length against the first round; that log grew 2.5-fold in 3 steps
LOOPING = 0.5  # repeat ratio of 4-grams from which a response counts as looping, as the repetition guard
PACKED = 0.2  # zlib ratio of the end below which it repeats itself; plain English is at 0.4 to 0.5 (a judgement)
LOOPS_NOTE, LOOPS_WARNING = 0.01, 0.05  # share of looping responses (a judgement)
LOW_QUANTILE = 0.2  # windows with the lowest reverse KL: those of agreement
LEAST_WINDOWS = 20  # of which a fifth are those of agreement
TRAP_NOTE, TRAP_WARNING = 0.05, 0.2  # share of looping windows among them (a judgement)
END_NOTE, END_WARNING = -0.5, -2.0  # nats of the last token's advantage below that of the others (a judgement)
STOPS = 0.05  # share of the stops from which an end token counts (a judgement)


def summary(rows: pl.DataFrame, round: int) -> dict[str, Any]:
    """The numbers by which rounds are compared, from one row per trajectory."""
    tokens = int(rows["length"].sum())
    quantiles = rows.select(
        p50=pl.col("length").quantile(0.5, "linear"), p95=pl.col("length").quantile(0.95, "linear")
    ).row(0)
    return {
        "round": round,
        "trajectories": rows.height,
        "tokens": tokens,
        "truncated": mean(rows["finish_reason"] == "length"),
        "length_p50": quantiles[0],
        "length_p95": quantiles[1],
        "repeat": mean(rows.select(repeat_ratio()).to_series()),
        "student_entropy": share(total(rows["entropy_sum"]), tokens),
        "student_open": share(total(rows["entropy_open"]), tokens),
        "reward": mean(rows["reward"]),
    }


def over_rounds(facts: Facts, now: Mapping[str, Any], name: str) -> str:
    """How a number of the summary went from round to round, for a sentence; empty in the first."""
    if not facts.earlier:
        return ""
    steps = " -> ".join(f"{text(r[name])} (round {r['round']})" for r in (*facts.earlier, now))
    return f"; over rounds {steps}"


def length(measured: Measured, facts: Facts) -> Finding:
    """Share of truncated responses, their lengths, and how both went over rounds."""
    why = (
        "A truncated response has no end to learn from, and rising length with rising truncation is how runs collapse "
        "(2604.08527, 2607.13399)."
    )
    now = summary(measured.rows, facts.round)
    if now["truncated"] is None:
        return finding("length", "unknown", "there are no trajectories", now, why, "roll out prompts")
    first = facts.earlier[0]["length_p50"] if facts.earlier else None
    growth = now["length_p50"] / first if first else None
    level = worst(grade(now["truncated"], CUT_NOTE, CUT_WARNING), grade(growth, GROWTH_NOTE, GROWTH_WARNING))
    empty = int((measured.rows["length"] == 0).sum())
    numbers: dict[str, Any] = {**now, "growth": growth, "empty": empty, "earlier": [dict(r) for r in facts.earlier]}
    said = (
        f"{percent(now['truncated'])} truncated; length p50 {text(now['length_p50'])}, p95 {text(now['length_p95'])} "
        f"tokens{over_rounds(facts, now, 'length_p50')}"
    )
    if empty:
        said += f"; {empty} empty responses"
    do = (
        "raise rollout.max_new_tokens, or leave truncated ones out: "
        f"{facts.again('weigh', 'weigh.truncated=drop')}; a guard: --rule fire+length-guard"
    )
    return finding("length", softened(level, measured), said, numbers, why, do)


def repetition(measured: Measured, facts: Facts) -> Finding:
    """How much responses repeat themselves: 4-grams over the response, and how well the end of its text compresses."""
    why = "Loops are cheap to predict: the teacher finds them likely and the student is rewarded for them (2604.08527)."
    rows = measured.rows.select(pl.col("tail_ratio"), repeat=repeat_ratio())
    now = summary(measured.rows, facts.round)
    looping = mean(rows["repeat"].drop_nulls() > LOOPING)
    packed = mean(rows["tail_ratio"].drop_nulls() < PACKED)
    numbers: dict[str, Any] = {
        "repeat_mean": mean(rows["repeat"]),
        "repeat_max": rows["repeat"].max(),
        "looping_share": looping,
        "tail_ratio_mean": mean(rows["tail_ratio"]),
        "tail_ratio_min": rows["tail_ratio"].min(),
        "packed_share": packed,
        "responses_with_tail": int(rows["tail_ratio"].count()),
        "earlier": [{"round": r["round"], "repeat": r["repeat"]} for r in facts.earlier],
    }
    if looping is None:
        return finding("repetition", "unknown", "no response is as long as an n-gram", numbers, why, "roll out prompts")
    level = grade(max(looping, packed or 0.0), LOOPS_NOTE, LOOPS_WARNING)
    said = (
        f"{percent(numbers['repeat_mean'])} of 4-grams repeat an earlier one; {percent(looping)} of responses loop "
        f"(more than {LOOPING:g})"
    )
    if packed is not None:
        said += f"; zlib ratio of the end {text(numbers['tail_ratio_mean'])}, {percent(packed)} below {PACKED:g}"
    said += over_rounds(facts, now, "repeat")
    do = f"drop them: fire weigh {facts.run} --round {facts.round} --rule fire+repetition-guard"
    return finding("repetition", softened(level, measured), said, numbers, why, do)


def agreement_trap(measured: Measured, facts: Facts) -> Finding:
    """Windows in which student and teacher agree because the text repeats itself."""
    why = "A low KL is no sign of quality where both models only continue a loop (2606.09471)."
    if measured.windows.height and not measured.windows["reverse_kl"].count():
        said = "there is no reverse_kl: the models were evaluated apart"
        return finding("agreement-trap", "unknown", said, {}, why, facts.again("score", "score.engine=transformers"))
    windows = measured.windows.drop_nulls()
    do = f"drop or shorten them: fire weigh {facts.run} --round {facts.round} --rule fire+repetition-guard"
    if windows.height < LEAST_WINDOWS:
        said = f"{windows.height} whole windows of {WINDOW} tokens, {LEAST_WINDOWS} are needed: responses are too short"
        return finding(
            "agreement-trap", "unknown", said, {"windows": windows.height}, why, "nothing: it needs longer responses"
        )
    bound = windows["reverse_kl"].quantile(LOW_QUANTILE, "linear")
    windows = windows.with_columns(low=pl.col("reverse_kl") <= bound, looping=pl.col("repeat") > LOOPING)
    low = windows.filter("low")
    # Neighbouring windows of one trajectory are neighbouring rows.
    run = windows.group_by(pl.struct(ROW, "low").rle_id()).agg(pl.col("low").first(), pl.len()).filter("low")
    numbers: dict[str, Any] = {
        "windows": windows.height,
        "reverse_kl_bound": bound,
        "looping_share": mean(windows["looping"]),
        "looping_share_low": mean(low["looping"]),
        "longest_run_low": run["len"].max(),
        "mean_reverse_kl_low": mean(low["reverse_kl"]),
    }
    level = grade(numbers["looping_share_low"], TRAP_NOTE, TRAP_WARNING)
    said = (
        f"{percent(numbers['looping_share_low'])} of the {low.height} windows of {WINDOW} tokens with the lowest "
        f"reverse KL (up to {text(bound)} nats) loop, {percent(numbers['looping_share'])} of all; longest run of them "
        f"{numbers['longest_run_low']}"
    )
    return finding("agreement-trap", softened(level, measured), said, numbers, why, do)


def end_token(measured: Measured, facts: Facts) -> Finding:
    """Whether the teacher would end a response as the student does."""
    why = (
        "A base student and a chat teacher end differently; then every stop is punished and responses grow without end "
        "(2609.20511)."
    )
    roles = ((facts.tokenizers or {}).get("roles") or {}).get("eos")
    do = f"leave the end token out: {facts.again('weigh', 'weigh.end_token=mask')}, or use a teacher that ends alike"
    stopped = measured.rows.filter((pl.col("finish_reason") == "stop") & (pl.col("length") > 0))
    if not stopped.height:
        numbers: dict[str, Any] = {"stopped": 0, "eos_roles": roles}
        do = "raise rollout.max_new_tokens, and see that the student's generation config names its end token"
        return finding("end-token", "unknown", "no response ended by itself", numbers, why, do)
    inner = stopped["teacher_logprob_sum"] - stopped["student_logprob_sum"] - stopped["last_advantage"]
    others = share(total(inner), int(stopped["length"].sum()) - stopped.height)
    last = mean(stopped["last_advantage"]) or 0.0
    ids = (
        stopped.group_by(id="last_id")
        .agg(
            count=pl.len(),
            advantage=pl.col("last_advantage").mean(),
            teacher_logprob_max=pl.col("last_teacher_logprob").max(),
        )
        .sort("count", "id", descending=[True, False])
    )
    never = ids.filter((pl.col("teacher_logprob_max") <= UNLIKELY) & (pl.col("count") >= STOPS * stopped.height))
    gap = last - (others or 0.0)
    numbers = {
        "stopped": stopped.height,
        "advantage_last": last,
        "advantage_others": others,
        "teacher_unlikely_share": mean(stopped["last_teacher_logprob"] <= UNLIKELY),
        "final_ids": ids.head(5).to_dicts(),
        "never_likely_to_teacher": never["id"].to_list(),
        "eos_roles": roles,
    }
    level: Level = grade(-gap, -END_NOTE, -END_WARNING)
    if roles is not None:
        level = worst(level, "note")
    if never.height:
        level = "problem" if never["count"].sum() > stopped.height / 2 else worst(level, "warning")
    listed = ", ".join(f"{r['id']} ({r['count']})" for r in ids.head(3).to_dicts())
    said = f"advantage of the token that ends a response {text(last)} nats, of the others {text(others)}"
    said += f"; final ids {listed}"
    if never.height:
        said += f"; the teacher never gives id {', '.join(map(str, never['id'].to_list()))} a probability over 0.01"
    if roles is not None:
        said += f"; eos is id {roles[0]} for the student, {roles[1]} for the teacher"
    return finding("end-token", level, said, numbers, why, do)


SHRINK_NOTE, SHRINK_WARNING = 0.25, 0.5  # part of the first round's student entropy that is gone (a judgement)
NARROW_NOTE, NARROW_WARNING = 0.5, 0.37  # student's share of open tokens by teacher's; 6.8 % / 18.5 % in 2603.07079
OPEN_TOKENS = 0.01  # share of the teacher's open tokens from which the ratio is told (a judgement)


def entropy(measured: Measured, facts: Facts) -> Finding:
    """Quantiles of the student's entropy, its open tokens beside the teacher's, and how both went over rounds."""
    why = "A student that has no doubts left explores nothing: pass@k falls while avg@k still rises (2603.07079)."
    totals, tokens = measured.totals, measured.totals["tokens"]
    do = f"rules for uncertain tokens: {facts.compare('fire', 'tip', 'uniform')}, and eopd, for which add topk columns"
    if not tokens:
        return finding("entropy", "unknown", "there are no tokens", {}, why, "roll out prompts")
    now = summary(measured.rows, facts.round)
    mine, theirs = (totals[f"{who}_open"] / tokens for who in ("student", "teacher"))
    first = facts.earlier[0]["student_entropy"] if facts.earlier else None
    shrunk = 1 - now["student_entropy"] / first if first else None
    numbers: dict[str, Any] = {
        "quantiles": {f"{q:g}": _entropy_quantile(measured, q) for q in (0.05, 0.25, 0.5, 0.75, 0.95)},
        "student_mean": totals["student_entropy"] / tokens,
        "teacher_mean": totals["teacher_entropy"] / tokens,
        "gap_abs_mean": totals["entropy_gap_abs"] / tokens,
        "student_open": mine,
        "teacher_open": theirs,
        "open_from": OPEN,
        "shrunk": shrunk,
        "earlier": [{k: r[k] for k in ("round", "student_entropy", "student_open")} for r in facts.earlier],
    }
    # Falling towards the teacher's entropy is what distillation does; falling below it is collapse.
    below = numbers["student_mean"] < numbers["teacher_mean"]
    level = grade(shrunk, SHRINK_NOTE, SHRINK_WARNING) if below else "ok"
    if theirs >= OPEN_TOKENS:
        level = worst(level, grade(-mine / theirs, -NARROW_NOTE, -NARROW_WARNING))
    said = (
        f"student entropy p50 {text(numbers['quantiles']['0.5'])}, p95 {text(numbers['quantiles']['0.95'])}, mean "
        f"{text(numbers['student_mean'])} (teacher {text(numbers['teacher_mean'])}) nats; tokens over {OPEN:g} nat: "
        f"student {percent(mine)}, teacher {percent(theirs)}{over_rounds(facts, now, 'student_entropy')}"
    )
    return finding("entropy", softened(level, measured), said, numbers, why, do)


def _entropy_quantile(measured: Measured, q: float) -> float:
    """The smallest entropy, to a thousandth of a nat, that a share `q` of the tokens does not exceed."""
    counts = measured.entropies
    least = q * measured.totals["tokens"]
    return float(counts.filter(pl.col("tokens").cum_sum() >= least)["entropy"][0]) / 1000
