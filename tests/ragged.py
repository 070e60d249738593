"""Random ragged scored tables, exact and consistent, their edge cases, and the plain-numpy frame of a rule's formula.

Every token is a pair of real categorical distributions over a small vocabulary, so entropies, divergences, ranks and
top-k lists belong to each other as in a scored run. Values are computed in double precision and stored as float32,
as the tables are; a reference reads the stored numbers back as float64. Nothing here imports a rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

import fire_data as fd

VOCABULARY = 40
FLOATS = (
    "student_logprob",
    "student_entropy",
    "teacher_logprob",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "student_max_logprob",
    "teacher_max_logprob",
    "rollout_logprob",
    "base_logprob",
)
IDS = (
    "response_ids",
    "student_top1_id",
    "teacher_top1_id",
    "student_rank",
    "teacher_rank",
    "teacher_rank_of_student_top1",
)
TOPK_IDS = ("student_topk_ids", "teacher_topk_ids")
TOPK_FLOATS = (
    "student_topk_logprobs",
    "teacher_topk_logprobs",
    "teacher_logprob_on_student_topk",
    "student_logprob_on_teacher_topk",
)
Row = dict[str, Any]
Lists = list[np.ndarray]


def ragged(
    rows: int,
    seed: int = 0,
    longest: int = 9,
    n: int = 2,
    *,
    lengths: Sequence[int] | None = None,
    topk: int | None = None,
    spread: float = 2.0,
    bank: int | None = None,
    certain: float = 0.0,
    **special: Any,
) -> pl.DataFrame:
    """A scored table of `rows` trajectories, `n` neighbouring samples per prompt (the last prompt may have fewer).

    `spread` scales the logits (2: ordinary, 25: logprobs down to about -80); `certain` is added to one logit of each
    distribution; `bank` draws all tokens from that many different ones, so that values tie exactly; `topk` adds the
    top-k columns. `special` replaces columns: one value for all rows (and tokens), or one entry per row.
    """
    rng = np.random.default_rng(seed)
    sizes = list(lengths) if lengths is not None else rng.integers(1, longest + 1, rows).tolist()
    tokens = [_token(rng, spread, certain, topk) for _ in range(bank if bank is not None else sum(sizes))]
    picked = rng.integers(0, len(tokens), sum(sizes)) if bank is not None else np.arange(sum(sizes))
    ends = np.cumsum(sizes)
    spans = [picked[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    data: dict[str, Any] = {
        "trajectory_id": [f"{x:08x}" for x in rng.choice(2**31, rows, replace=False)],
        "prompt_id": [f"p{i // n}" for i in range(rows)],
        "sample": [i % n for i in range(rows)],
        "round": [0] * rows,
        "teacher": [("math", "code")[i // n % 2] for i in range(rows)],
        "finish_reason": [("stop", "length")[int(x)] for x in rng.random(rows) < 0.3],
        "reward": rng.integers(0, 2, rows).astype(float).tolist(),
        "teacher_pass_rate": np.repeat(rng.integers(0, 4, rows // n + 1) / 3, n)[:rows].tolist(),
    }
    names = (*FLOATS, *IDS, *(TOPK_FLOATS + TOPK_IDS if topk else ()))
    data |= {name: [[tokens[j][name] for j in span] for span in spans] for name in names}
    for name, value in special.items():
        data[name] = _filled(value, sizes, name in names)
    return pl.DataFrame(data, schema_overrides={k: v for k, v in _types().items() if k in data})


def _types() -> dict[str, Any]:
    i32, f32 = pl.Int32, pl.Float32
    return {
        "sample": i32,
        "round": i32,
        "reward": f32,
        "teacher_pass_rate": f32,
        **dict.fromkeys(FLOATS, pl.List(f32)),
        **dict.fromkeys(IDS, pl.List(i32)),
        **dict.fromkeys(TOPK_FLOATS, pl.List(pl.List(f32))),
        **dict.fromkeys(TOPK_IDS, pl.List(pl.List(i32))),
    }


def _filled(value: Any, sizes: list[int], per_token: bool) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        return [[value] * size if per_token else value for size in sizes]
    return list(value)


def _token(rng: np.random.Generator, spread: float, certain: float, topk: int | None) -> Row:
    """One sampled token with every signal of both models, from two related distributions and a third, the base."""
    shared = rng.normal(size=VOCABULARY)
    logits = [spread * (0.7 * shared + 0.7 * rng.normal(size=VOCABULARY)) for _ in range(3)]
    for x in logits:
        x[rng.integers(VOCABULARY)] += certain
    student, teacher, base = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in logits)
    p, q = np.exp(student), np.exp(teacher)
    y = int(rng.choice(VOCABULARY, p=p / p.sum()) if rng.random() < 0.7 else rng.integers(VOCABULARY))
    hot = 1.25 * logits[0]  # what temperature 0.8 samples from
    top = int(student.argmax())
    made = {
        "student_logprob": student[y],
        "student_entropy": max(0.0, -(p * student).sum()),
        "teacher_logprob": teacher[y],
        "teacher_entropy": max(0.0, -(q * teacher).sum()),
        "reverse_kl": max(0.0, (p * (student - teacher)).sum()),
        "forward_kl": max(0.0, (q * (teacher - student)).sum()),
        "student_max_logprob": student.max(),
        "teacher_max_logprob": teacher.max(),
        "rollout_logprob": hot[y] - hot.max() - math.log(np.exp(hot - hot.max()).sum()),
        "base_logprob": base[y],
        "response_ids": y,
        "student_top1_id": top,
        "teacher_top1_id": int(teacher.argmax()),
        "student_rank": 1 + int((student > student[y]).sum()),
        "teacher_rank": 1 + int((teacher > teacher[y]).sum()),
        "teacher_rank_of_student_top1": 1 + int((teacher > teacher[top]).sum()),
    }
    if topk:
        mine, theirs = (np.argsort(-x, kind="stable")[:topk] for x in (student, teacher))
        made |= {"student_topk_ids": mine.tolist(), "teacher_topk_ids": theirs.tolist()}
        made |= {"student_topk_logprobs": student[mine].tolist(), "teacher_topk_logprobs": teacher[theirs].tolist()}
        made |= {"teacher_logprob_on_student_topk": teacher[mine].tolist()}
        made |= {"student_logprob_on_teacher_topk": student[theirs].tolist()}
    return made


def edge_cases(**options: Any) -> dict[str, pl.DataFrame]:
    """Named tables at the edges; `options` (such as `topk=4`) go to every one of them."""

    def of(rows: int, seed: int, **more: Any) -> pl.DataFrame:
        return ragged(rows, seed, **(options | more))

    halves = [float(i // 2 % 2) for i in range(12)]
    return {
        "ordinary": of(24, 1),
        "one token each": of(8, 2, longest=1),
        "one trajectory": of(1, 3, n=1, lengths=[7]),
        "one trajectory of one token": of(1, 4, n=1, lengths=[1]),
        "long and short": of(8, 5, lengths=[60, 1, 1, 40, 2, 3, 1, 130]),
        "all equal": of(8, 6, bank=1, lengths=[4] * 8, reward=1.0, finish_reason="stop"),
        "ties": of(16, 7, bank=3),
        "all wrong": of(8, 8, reward=0.0),
        "all right": of(8, 9, reward=1.0),
        "one class per prompt": of(12, 10, reward=halves),
        "groups of one": of(7, 11, n=1),
        "last group smaller": of(10, 12, n=4),
        "extreme": of(12, 13, spread=17.0),
        "certain": of(8, 14, spread=0.5, certain=78.0, student_entropy=0.0, teacher_entropy=0.0, reverse_kl=0.0),
        "student agrees with the teacher": of(
            8, 15, student_logprob=-0.5, teacher_logprob=-0.5, student_max_logprob=-0.4, teacher_max_logprob=-0.4
        ),
        "empty responses": of(12, 16, lengths=[3, 0, 5, 1, 0, 0, 0, 0, 4, 2, 6, 0]),
    }


def together(cases: dict[str, pl.DataFrame], batch_size: int = 4) -> pl.DataFrame:
    """All cases as one table with a `step` column: no step and no prompt holds trajectories of two cases."""
    frames, first = [], 0
    for name, frame in cases.items():
        step = first + pl.int_range(pl.len()) // batch_size
        prompt = pl.format("{}/{}", pl.lit(name), "prompt_id")
        frames.append(frame.with_columns(step=step.cast(pl.Int32), prompt_id=prompt))
        first += math.ceil(frame.height / batch_size)
    return pl.concat(frames)


def rows_of(frame: pl.DataFrame) -> list[Row]:
    """One dict per trajectory, token columns as float64 arrays (top-k columns as tokens x k), and `length`."""
    found = []
    for row in frame.iter_rows(named=True):
        arrays = {k: np.asarray(v, dtype=np.float64) for k, v in row.items() if isinstance(v, list)}
        found.append({**row, **arrays, "length": len(row["student_logprob"])})
    return found


def populations(rows: list[Row], scope: str, batch_size: int | None = None, by: str | None = None) -> list[list[int]]:
    """The rows of each population of a scope, in order; empty responses belong to none.

    Without `batch_size` a table's own `step` column counts, else everything is one step.
    """
    found: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        step = i // batch_size if batch_size else row.get("step", 0)
        key = {"trajectory": i, "group": row["prompt_id"], "step": step, "round": 0}[scope]
        if row["length"]:
            found.setdefault((key, row[by] if by else None), []).append(i)
    return list(found.values())


def normalised(
    rows: list[Row], weight: Lists, scope: str, batch_size: int | None = None, kept: Lists | None = None
) -> Lists:
    """Weights divided by their mean over each population: over all tokens, or over those where `kept` is true.

    A population without a token to count, or with weights that are all 0, is left as it is.
    """
    result = [np.array(w, dtype=np.float64) for w in weight]
    if scope == "none":
        return result
    for members in populations(rows, scope, batch_size):
        counted = [w for i in members for t, w in enumerate(weight[i]) if kept is None or kept[i][t]]
        mean = (math.fsum(counted) / len(counted) if counted else 0.0) or 1.0
        for i in members:
            result[i] = np.array([w / mean for w in weight[i]])
    return result


def check(
    frame: pl.DataFrame,
    rule: str,
    *,
    batch_size: int | None = None,
    keep: Sequence[bool] | None = None,
    weight: Sequence[Any] | None = None,
    advantage: Sequence[Any] | None = None,
    token_keep: Sequence[Any] | None = None,
    fkl_weight: Sequence[Any] | None = None,
    divisor: str = "tokens",
    rtol: float = 1e-5,
    **params: Any,
) -> pl.DataFrame:
    """Weigh `frame` and compare every column with what is expected (None: what a rule that says nothing gives).

    `divisor` is the denominator expected; pass `denominator=` among `params` to ask for another than the rule's own.
    """
    mine = fd.weigh(frame, rule, batch_size=batch_size, **params).collect()
    rows = rows_of(frame)
    alive = [bool(row["length"]) for row in rows]
    kept = [a and bool(k) for a, k in zip(alive, keep if keep is not None else alive, strict=True)]
    ones = [np.ones(row["length"]) for row in rows]
    masks = [np.asarray(m, dtype=bool) for m in (token_keep if token_keep is not None else ones)]
    weights = [np.asarray(w, dtype=np.float64) for w in (weight if weight is not None else ones)]
    plain = [row["teacher_logprob"] - row["student_logprob"] for row in rows]
    advantages = [np.asarray(a, dtype=np.float64) for a in (advantage if advantage is not None else plain)]

    assert mine["keep"].to_list() == kept
    assert [reason is None for reason in mine["drop_reason"]] == kept
    if token_keep is not None or "token_keep" in mine.columns:
        counted = [i for i, k in enumerate(kept) if k]
        assert [mine["token_keep"][i].to_list() for i in counted] == [masks[i].tolist() for i in counted]
    _same(mine["weight"], weights, rtol)
    _same(mine["advantage"], advantages, rtol)
    counts = [int(m.sum()) if k else 0 for k, m in zip(kept, masks, strict=True)]
    for members in populations(rows, "step", batch_size):
        tokens, all_tokens = sum(counts[i] for i in members), sum(rows[i]["length"] for i in members)
        sequences = sum(counts[i] > 0 for i in members)
        for i in members:
            over = {"tokens": tokens, "all_tokens": all_tokens, "sequences": sequences * counts[i]}[divisor]
            factor = masks[i] / over if counts[i] else 0.0 * masks[i]
            np.testing.assert_allclose(
                mine["coefficient"][i], weights[i] * advantages[i] * factor, rtol=rtol, atol=1e-9, err_msg=f"row {i}"
            )
            if fkl_weight is not None:
                second = np.asarray(fkl_weight[i], dtype=np.float64) * factor
                np.testing.assert_allclose(mine["fkl_coefficient"][i], second, rtol=rtol, atol=1e-9)
    return mine


def _same(column: pl.Series, expected: Lists, rtol: float) -> None:
    for i, (have, want) in enumerate(zip(column.to_list(), expected, strict=True)):
        np.testing.assert_allclose(have, want, rtol=rtol, atol=1e-7, err_msg=f"{column.name}, row {i}")
