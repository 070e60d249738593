"""Losses of a tiny training and weights by every rule are what they were: a change that should not alter results.

`python -m tests.test_golden` writes tests/golden/results.json anew. Do that only for a change that is meant to alter
them, and say why beside it. Weights, ids and tables are made without a random generator, whose numbers another version
of a library might change; tolerances leave room for another processor's rounding.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import fire_data as fd
from fire_data.rules import RULES

PATH = Path(__file__).parent / "golden" / "results.json"
NAMES = sorted(set(RULES) - {"expression"})
# Where most weights and advantages are: round numbers, as many rules give, lie inside a bar.
BARS = (0.04, 0.3, 0.6, 0.8, 0.95, 1.05, 1.25, 1.7, 2.6, 7.0, 20.0)
EDGES = (*(-x for x in reversed(BARS)), *BARS)
TRAININGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "float64, cosine, decay, dual clip": {
        "compute_dtype": "float64", "schedule": "cosine", "warmup_steps": 2, "total_steps": 8, "weight_decay": 0.1,
        "dual_clip": 1.5, "clip": 0.1, "max_grad_norm": 0.5,
    },
}  # fmt: skip
TOLERANCE = {"bfloat16": 5e-2}


def spread(count: int, salt: int) -> np.ndarray:
    """Numbers in [0, 1) that look random and are the same everywhere: a multiplicative hash of their place."""
    place = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(salt) * np.uint64(40503)
    mixed = (place ^ (place >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(2**32)
    return np.asarray((mixed ^ (mixed >> np.uint64(13))) % np.uint64(2**32), dtype=np.float64) / 2**32


# Training


def losses(settings: dict[str, Any]) -> dict[str, list[float]]:
    """Numbers of eight steps, two epochs over four, of a model whose weights are a formula."""
    import torch

    from fire_data.models import head_of
    from fire_data.optim import make_optimizer
    from fire_data.training import StepBatch, train_step
    from tests.tinymodels import VOCABULARY, plain_logprobs, tiny_model, train_config

    cfg = train_config(lr=5e-4, **settings)
    model = tiny_model(dtype=torch.float64 if cfg.compute_dtype == "float64" else torch.float32)
    with torch.no_grad():
        for salt, parameter in enumerate(model.parameters()):
            if parameter.ndim > 1:
                parameter.copy_(torch.from_numpy(spread(parameter.numel(), salt) - 0.5).view_as(parameter))
    allowed = np.flatnonzero(VOCABULARY.allowed)
    batches = []
    for step in range(4):
        rows = [allowed[(spread(4 + (3 * step + i) % 9, 10 * step + i) * len(allowed)).astype(int)] for i in range(5)]
        prompts, responses = [r[:2] for r in rows], [r[2:] for r in rows]
        old = [plain_logprobs(model, p, r) for p, r in zip(prompts, responses, strict=True)]
        coefficient = [(spread(len(r), 100 + i) - 0.4) / 10 for i, r in enumerate(responses)]
        batches.append(StepBatch(step, prompts, responses, old, coefficient, sum(map(len, responses))))
    optimizer, head = make_optimizer(model, cfg), head_of(model)
    found = [train_step(model, head, optimizer, replace(batches[i % 4], step=i), cfg, VOCABULARY, i) for i in range(8)]
    return {name: [float(r[name]) for r in found] for name in ("loss", "grad_norm", "drift_kl", "lr")}


# Weights


def table() -> pl.DataFrame:
    """24 trajectories with all columns that rules read, of pairs of distributions over 12 ids; one repeats itself."""
    lengths = [1 + (5 * i) % 12 for i in range(23)] + [110]
    tokens = [_token(t % 150) for t in range(sum(lengths))]
    tokens[-110:] = tokens[:2] * 55
    ends = np.cumsum(lengths)
    spans = [tokens[end - n : end] for end, n in zip(ends, lengths, strict=True)]
    rows = range(len(lengths))
    frame: dict[str, Any] = {
        "trajectory_id": [f"{7919 * i % 2**16:08x}" for i in rows],
        "prompt_id": [f"p{i // 4}" for i in rows],
        "sample": pl.Series([i % 4 for i in rows], dtype=pl.Int32),
        "round": pl.Series([0] * len(lengths), dtype=pl.Int32),
        "teacher": [("math", "code")[i // 8 % 2] for i in rows],
        "finish_reason": [("stop", "stop", "length")[i % 3] for i in rows],
        "reward": pl.Series([float(i % 7 in (1, 2, 4)) for i in rows], dtype=pl.Float32),
        "teacher_pass_rate": pl.Series([i // 4 % 4 / 3 for i in rows], dtype=pl.Float32),
    }
    for name, value in tokens[0].items():
        inner: Any = pl.Int32 if isinstance(np.asarray(value).flat[0], np.integer) else pl.Float32
        kind = pl.List(pl.List(inner)) if isinstance(value, np.ndarray) else pl.List(inner)
        values = [[np.asarray(t[name]).tolist() for t in span] for span in spans]
        frame[name] = pl.Series(values, dtype=kind)
    return pl.DataFrame(frame)


def _token(t: int) -> dict[str, Any]:
    """Every signal of one token."""
    logits = {who: 9 * spread(12, 3 * t + i) for i, who in enumerate(("student", "teacher", "base"))}
    logits["teacher"] = (logits["teacher"] + logits["student"]) * 0.8
    p = {who: x - x.max() - math.log(np.exp(x - x.max()).sum()) for who, x in logits.items()}
    order = {who: np.argsort(-x, kind="stable") for who, x in p.items()}
    y = int(order["student"][int(spread(1, 7 * t)[0] ** 1.5 * 12)])
    top = int(order["student"][0])
    found: dict[str, Any] = {"response_ids": np.int32(y), "rollout_logprob": p["student"][y] - 0.01 * (t % 5)}
    found |= {f"{who}_logprob": x[y] for who, x in p.items()}
    for who, other in (("student", "teacher"), ("teacher", "student")):
        mine, k = p[who], order[who][:3]
        found |= {f"{who}_entropy": -(np.exp(mine) * mine).sum(), f"{who}_max_logprob": mine.max()}
        found |= {f"{who}_top1_id": np.int32(order[who][0]), f"{who}_rank": np.int32(1 + (mine > mine[y]).sum())}
        found |= {f"{who}_topk_ids": k.astype(np.int32), f"{who}_topk_logprobs": mine[k]}
        found[f"{other}_logprob_on_{who}_topk"] = p[other][k]
    student, teacher = p["student"], p["teacher"]
    return found | {
        "reverse_kl": (np.exp(student) * (student - teacher)).sum(),
        "forward_kl": (np.exp(teacher) * (teacher - student)).sum(),
        "teacher_rank_of_student_top1": np.int32(1 + (teacher > teacher[top]).sum()),
    }


def weighed(frame: pl.DataFrame, name: str) -> dict[str, Any]:
    """What a rule made of the table, at two steps of 12 trajectories: counts, histograms, sums and largest values."""
    made = fd.weigh(frame, name, batch_size=12).collect()
    weight, coefficient = (made[c].explode().to_numpy().astype(np.float64) for c in ("weight", "coefficient"))
    scaled = coefficient * len(coefficient) / 2  # of the order of an advantage, whatever the size of a step
    found: dict[str, Any] = {"kept": int(made["keep"].sum()), "tokens": int((coefficient != 0).sum())}
    columns = {"weight": weight, "coefficient": scaled}
    if "fkl_coefficient" in made.columns:
        columns["fkl_coefficient"] = made["fkl_coefficient"].explode().to_numpy() * len(coefficient) / 2
    for column, values in columns.items():
        found[column] = {
            "histogram": _histogram(values),
            "sums": [float(values.sum()), float((values**2).sum()), float(values.min()), float(values.max())],
        }
    return found


def _histogram(values: np.ndarray) -> list[int]:
    counts = np.bincount(np.searchsorted(EDGES, values), minlength=len(EDGES) + 1)
    return [int(n) for n in counts]


def golden() -> dict[str, Any]:
    """Everything that is compared, as it is now."""
    frame = table()
    return {
        "losses": {name: losses(settings) for name, settings in TRAININGS.items()},
        "weights": {name: weighed(frame, name) for name in NAMES},
    }


# Promises


@pytest.fixture(scope="module")
def before() -> Any:
    return json.loads(PATH.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return table()


@pytest.mark.parametrize("name", TRAININGS)
def test_losses_and_gradient_norms_are_what_they_were(name: str, before: Any) -> None:
    pytest.importorskip("transformers")
    tolerance = TOLERANCE.get(name, 1e-4)
    then, now = before["losses"][name], losses(TRAININGS[name])
    assert now.keys() == then.keys()
    for column, values in now.items():
        assert values == pytest.approx(then[column], rel=tolerance, abs=tolerance / 10), f"{column}: {_AGAIN}"


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_coefficients_are_what_they_were(name: str, before: Any, frame: pl.DataFrame) -> None:
    then, now = before["weights"][name], weighed(frame, name)
    for column in now.keys() & {"weight", "coefficient", "fkl_coefficient"}:
        assert now[column].pop("sums") == pytest.approx(then[column].pop("sums"), rel=1e-5, abs=1e-6), _AGAIN
    assert now == then, _AGAIN


def test_every_rule_is_held_to_what_it_was(before: Any) -> None:
    assert (sorted(before["weights"]), sorted(before["losses"])) == (NAMES, sorted(TRAININGS)), _AGAIN


_AGAIN = f"if that is meant: {Path(sys.executable).name} -m tests.test_golden"

if __name__ == "__main__":
    text = ",\n".join(
        f'"{part}": {{\n' + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()) + "\n}"
        for part, values in golden().items()
    )
    PATH.write_text("{" + text + "}\n", encoding="utf-8")
