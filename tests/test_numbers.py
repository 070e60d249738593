"""Numbers at the edge have defined results or typed errors in every stage: nothing kept, one token, NaN, infinity.

Elsewhere: rules at every edge (test_rule_properties), the diagnosis (test_diagnose), values in tables
(test_bad_inputs), steps that are not finite (test_nonfinite), shifted columns (test_ratio_check).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

import fire_data as fd
from fire_data.models import head_of
from fire_data.optim import make_optimizer
from fire_data.rules import RULES
from fire_data.run import Run
from fire_data.sampling import Sampling
from fire_data.schemas.tables import IDS
from fire_data.scoring import TransformersScorer
from fire_data.shards import sealed
from fire_data.training import StepBatch, train_step
from fire_data.vocabulary import Vocabulary
from tests.conftest import Answer
from tests.ragged import FLOATS, ragged
from tests.ragged import IDS as WHOLE
from tests.tinymodels import tiny_model, train_config

Fire = Callable[..., Answer]
MakeRun = Callable[..., Run]
LOOKS = ("status", "diagnose", "compare", "inspect", "report")


def everything_says_something(run: Run, fire: Fire) -> None:
    """All that look at a run end well, and what they give machines is JSON without NaN."""
    for command in LOOKS:
        answer = fire(command, run.root, *(["--json"] if command != "report" else []))
        assert answer.code == 0, (command, answer.err)
        if command != "report":
            json.loads(answer.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert fire("explain", run.root, "0").code == 0
    assert "NaN" not in (run.root / "metrics.jsonl").read_text()


# Nothing kept, one token


def test_a_round_of_which_nothing_is_kept_trains_nothing_and_every_command_says_so(
    tmp_path: Path, make_run: MakeRun, fire: Fire, tiny_world: Any
) -> None:
    run = make_run(tmp_path / "run", weigh={"rule": {"keep": "length < 0"}}, eval={"n": 0})
    answer = fire("run", run.root, "--rounds", 1)
    assert answer.code == 0, answer.err
    weights, checkpoint = sealed(run.part("weights", 0)).stats, sealed(run.part("checkpoints", 0)).stats
    assert weights["kept_fraction"] == 0
    assert len(weights["skipped_steps"]) == checkpoint["skipped_steps"] == checkpoint["steps"] == 3
    assert checkpoint["nonfinite_steps"] == 0
    assert "keeps no token in any step: nothing is learnt there" in answer.err
    trained = load_file(run.root / "checkpoints" / "round-000" / "model.safetensors")
    given = load_file(Path(tiny_world.student) / "model.safetensors")
    assert all(torch.equal(given[name].float(), tensor) for name, tensor in trained.items())
    everything_says_something(run, fire)


def test_responses_of_one_token_go_through_every_stage(tmp_path: Path, make_run: MakeRun, fire: Fire) -> None:
    run = make_run(tmp_path / "run", rollout={"max_new_tokens": 1, "n": 1}, eval={"n": 1})
    assert fire("run", run.root, "--rounds", 1).code == 0
    assert run.weights().select(pl.col("coefficient").list.len()).collect()["coefficient"].to_list() == [1] * 6
    everything_says_something(run, fire)


# A vocabulary of one token


ONLY = 5


def test_a_vocabulary_of_one_token_is_certain_everywhere() -> None:
    from fire_data.generate import TransformersGenerator

    model, allowed = tiny_model(dtype=torch.float64), np.zeros(40, dtype=np.bool_)
    allowed[ONLY] = True
    one = Vocabulary(40, allowed)
    (sample,) = TransformersGenerator(model, one, frozenset(), 1).samples(
        ["a"], [np.array([3, 4])], Sampling(0, max_new_tokens=4)
    )
    assert sample.ids.tolist() == [ONLY] * 4
    assert sample.logprobs.tolist() == [0.0] * 4
    rows = pa.table({
        "prompt_ids": pa.array([[3, 4]], IDS), "response_ids": pa.array([[ONLY] * 4], IDS),
        "teacher_prompt_ids": pa.array([None], IDS),
    })  # fmt: skip
    teacher = tiny_model(seed=1, dtype=torch.float64)
    found = TransformersScorer(model, teacher, one, 64, 1 << 20).score(rows)
    for name in (
        "student_logprob",
        "teacher_logprob",
        "student_entropy",
        "teacher_entropy",
        "reverse_kl",
        "forward_kl",
    ):
        assert found[name].to_pylist() == [[0.0] * 4], name
    for name in ("student_rank", "teacher_rank", "teacher_rank_of_student_top1"):
        assert found[name].to_pylist() == [[1] * 4], name
    cfg = train_config(compute_dtype="float64")
    batch = StepBatch(0, [[3, 4]], [[ONLY] * 4], [[0.0] * 4], [[0.3, -0.2, 0.1, 0.5]], 4)
    step = train_step(model, head_of(model), make_optimizer(model, cfg), batch, cfg, one, 0)
    assert (step["ratio_max"], step["drift_kl"], step["skipped"]) == (1.0, 0.0, False)
    assert step["grad_norm"] == pytest.approx(0.0, abs=1e-12)
    assert step["loss"] == pytest.approx(-0.7)


@pytest.mark.parametrize("name", sorted(set(RULES) - {"expression"}))
def test_every_rule_weighs_a_vocabulary_of_one_token(name: str) -> None:
    columns: dict[str, Any] = dict.fromkeys(FLOATS, 0.0) | dict.fromkeys(WHOLE, 1)
    lengths = [3, 1, 4, 2, 5, 1, 2, 3]
    for column in ("student_topk_logprobs", "teacher_topk_logprobs"):
        columns[column] = [[[0.0]] * n for n in lengths]
    for column in ("teacher_logprob_on_student_topk", "student_logprob_on_teacher_topk"):
        columns[column] = [[[0.0]] * n for n in lengths]
    for column in ("student_topk_ids", "teacher_topk_ids"):
        columns[column] = [[[1]] * n for n in lengths]
    made = fd.weigh(ragged(8, lengths=lengths, topk=1, **columns), name, batch_size=4).collect()
    for column in {"weight", "advantage", "coefficient", "fkl_coefficient"} & set(made.columns):
        assert all(math.isfinite(x) for x in made[column].explode()), column


# Models that compute no numbers


def spoil(model: str, folder: Path, value: float, name: str = "model.norm.weight") -> Path:
    """A copy of a model folder with a value in one of its tensors: by default no logit is a number."""
    shutil.copytree(model, folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-16:] = value
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_student_that_computes_no_numbers_writes_nothing(
    tmp_path: Path, make_run: MakeRun, fire: Fire, tiny_world: Any, value: float
) -> None:
    bad = spoil(tiny_world.student, tmp_path / "bad", value)
    run = make_run(tmp_path / "run", student={"model": str(bad)})
    for arguments in (("rollout", run.root), ("eval", run.root, "--start")):
        answer = fire(*arguments)
        assert answer.code == 1, answer.err
        assert "not finite" in answer.err
        assert answer.fix
    assert not list(run.root.rglob("*.parquet"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("tensor", "code", "words"),
    [
        ("model.norm.weight", 1, ["not one logit is finite"]),
        ("model.embed_tokens.weight", 3, ["'teacher_logprob'", "scores round-000, shard 00000, row 0"]),
    ],
)
def test_a_teacher_that_computes_no_numbers_scores_nothing(
    tmp_path: Path,
    make_run: MakeRun,
    fire: Fire,
    tiny_world: Any,
    tensor: str,
    code: int,
    words: list[str],
    value: float,
) -> None:
    bad = spoil(tiny_world.teacher, tmp_path / "bad", value, tensor)
    run = make_run(tmp_path / "run", teacher={"model": str(bad)})
    assert fire("rollout", run.root).code == 0
    answer = fire("score", run.root)
    assert answer.code == code, answer.err
    assert all(word in answer.err for word in words), answer.err
    assert answer.fix
    assert not list((run.root / "scores").rglob("*.parquet"))
    assert fire("weigh", run.root).code == 4
