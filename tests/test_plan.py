"""`fire plan`: what it says the stages would make is what they make; it loads no model and leaves no trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fire_data.engines import FakeGenerator
from fire_data.plan import plan
from fire_data.plan.models import dense, parameters
from fire_data.run import Run, open_run
from fire_data.sampling import Sampling
from fire_data.schemas.config import ModelConfig
from fire_data.schemas.errors import ConfigError, FingerprintError
from fire_data.session import Session
from fire_data.shards import sealed
from fire_data.steps import rollout as rollout_step
from fire_data.steps.refresh import refresh
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh
from tests.conftest import Answer

MakeRun = Callable[..., Run]
Fire = Callable[..., Answer]
LENGTH = 5


class Constant(FakeGenerator):
    """Every response has the same length, so that planned tokens can be compared exactly."""

    def generate(self, requests: pa.Table, sampling: Sampling, progress: Any = None) -> pa.Table:
        made = super().generate(requests, sampling, progress)
        count = requests.num_rows
        columns = {
            "response_ids": pa.array([[int(self.ids[0])] * LENGTH] * count, made["response_ids"].type),
            "rollout_logprob": pa.array([[-1.0] * LENGTH] * count, made["rollout_logprob"].type),
            "finish_reason": ["length"] * count,
        }
        return pa.table(columns)


@pytest.fixture
def constant(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(session: Session, round: int) -> Constant:
        return Constant(session.vocabulary, session.stop_ids)

    monkeypatch.setattr(rollout_step, "make_generator", made)


def stages(run: Run, **options: Any) -> dict[str, dict[str, Any]]:
    """The rows of the plan for one round, by stage."""
    return {row["stage"]: row for row in plan(run, **options)["stages"]}


def files(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(root.rglob("*"))}


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=st.integers(1, 16),
    per_shard=st.integers(1, 7),
    n=st.integers(1, 3),
    batch=st.none() | st.integers(1, 3),
    epochs=st.integers(1, 2),
)
def test_planned_shards_rows_tokens_and_steps_are_what_the_stages_then_make(
    prompts: int, per_shard: int, n: int, batch: int | None, epochs: int,
    constant: None, make_fake_run: MakeRun, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    run = make_fake_run(
        tmp_path_factory.mktemp("plan") / "run",
        rollout={"n": n, "prompts_per_round": prompts, "prompts_per_shard": per_shard, "max_new_tokens": 8},
        train={"batch_size": batch and batch * n, "epochs": epochs},
        weigh={"rule": "uniform"},
    )
    before = stages(run, length=LENGTH)
    session = Session(run)
    rollout(session, 0)
    score(session, 0)
    made = {"rollouts": None, "scores": None, "weights/uniform": weigh(run, 0)}
    for stage in made:
        manifest = made[stage] or sealed(run.part(stage, 0))
        row = before[stage]
        assert row["action"] == "make"
        assert row["shards"] == {"planned": len(manifest.shards), "done": 0, "to_make": len(manifest.shards)}
        assert row["trajectories"]["value"] == sum(r.rows for r in manifest.shards)
        assert row["tokens"]["value"] == sum(r.tokens for r in manifest.shards)
    weights = sealed(run.part("weights", 0))
    assert before["checkpoints"]["steps"]["planned"] == len(weights.stats["steps"]) * epochs
    assert before["checkpoints"]["tokens"]["value"] == epochs * prompts * n * LENGTH
    again = stages(run)
    assert {again[stage]["action"] for stage in made} == {"nothing"}
    assert again["checkpoints"]["tokens"] == before["checkpoints"]["tokens"] | {
        k: again["checkpoints"]["tokens"][k] for k in ("origin", "how")
    }
    assert again["checkpoints"]["tokens"]["origin"] == "measured"


def test_the_next_round_and_held_out_prompts_are_planned_from_what_was_measured(
    tmp_path: Path, make_run: MakeRun
) -> None:
    run = make_run(tmp_path / "run")
    refresh(Session(run), 1)
    found = plan(run, 2)
    rows = {row["stage"]: row for row in found["stages"]}
    assert found["rounds"] == {"finished": 1, "planned": [1]}
    rollouts = sealed(run.part("rollouts", 0))
    assert found["length"]["origin"] == "measured"
    assert found["length"]["value"] == rollouts.stats["mean_length"]
    evals = sealed(run.part("evals", 0))
    assert rows["evals"]["trajectories"]["value"] == sum(r.rows for r in evals.shards)
    for name in ("rollouts", "scores", "weights/fire", "checkpoints"):
        assert rows[name]["seconds"]["origin"] == "measured", name
        assert rows[name]["seconds"]["value"] > 0
        assert rows[name]["bytes"]["origin"] == "measured", name
    checkpoint = sealed(run.part("checkpoints", 0))
    assert rows["checkpoints"]["bytes"]["value"] == sum(r.bytes for r in checkpoint.shards), "the state is replaced"
    assert found["bottleneck"]["what"].startswith("time of ")
    refresh(Session(run), 2)
    assert plan(run, 2)["stages"] == []
    assert plan(run, 2)["bottleneck"]["what"] == "nothing"


def test_half_done_stages_count_what_is_left(tmp_path: Path, make_fake_run: MakeRun) -> None:
    run = make_fake_run(tmp_path / "run")
    rollout(Session(run), 0)
    part = run.part("rollouts", 0)
    sealed_rollouts = sealed(part)
    part.file("00001").unlink()
    row = stages(run)["rollouts"]
    assert (row["action"], row["shards"]) == ("continue", {"planned": 3, "done": 2, "to_make": 1})
    assert row["why"] == "damaged or missing shards are made again"
    part.receipt_path("00001").unlink()
    part.manifest_path.write_text(
        json.dumps(sealed_rollouts.model_copy(update={"state": "open", "shards": (), "stats": {}}).model_dump())
    )
    row = stages(run)["rollouts"]
    assert (row["action"], row["why"]) == ("continue", "2 of 3 shards are there")
    assert stages(run)["scores"]["shards"]["to_make"] == 3


def _changes() -> list[Any]:
    return [
        pytest.param("rollouts", ("rollout.temperature=0.5",), lambda s: rollout(s, 0), id="sampling"),
        pytest.param("rollouts", ("seed=3",), lambda s: rollout(s, 0), id="seed"),
        pytest.param("scores", ("score.entropy_topk=3",), lambda s: score(s, 0), id="scoring"),
        pytest.param("weights/fire", ("weigh.params={percentile: 30}",), lambda s: weigh(s.run, 0), id="rule"),
        pytest.param("checkpoints", ("train.lr=0.5",), lambda s: train(s, 0), id="training"),
    ]


@pytest.fixture(scope="module")
def trained(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose first round is done, but for a checkpoint that is not sealed: every stage may still be looked at."""
    run = make_run(tmp_path_factory.mktemp("trained") / "run")
    refresh(Session(run), 1)
    part = run.part("checkpoints", 0)
    manifest = sealed(part).model_copy(update={"state": "open", "shards": (), "stats": {}})
    part.manifest_path.write_text(json.dumps(manifest.model_dump()))
    return run


@pytest.mark.parametrize(("stage", "overrides", "run_it"), _changes())
def test_what_it_says_is_refused_is_refused_by_the_stage_and_nothing_before_it(
    stage: str, overrides: tuple[str, ...], run_it: Callable[[Session], Any], trained: Run
) -> None:
    assert all(row["action"] in ("nothing", "continue") for row in stages(trained).values())
    changed = open_run(trained.root, overrides)
    rows = stages(changed)
    assert rows[stage]["action"] == "refused"
    assert overrides[0].partition("=")[0].rpartition(".")[2].replace("params", "percentile") in rows[stage]["why"]
    order = list(rows)
    assert "refused" not in {rows[name]["action"] for name in order[: order.index(stage)]}
    with pytest.raises(FingerprintError):
        run_it(Session(changed))


def test_what_is_wrong_with_the_settings_is_said_where_it_would_be(tmp_path: Path, make_fake_run: MakeRun) -> None:
    run = make_fake_run(tmp_path / "run")
    for override, stage, told in {
        ("prompts.path=gone.jsonl", "rollouts", "does not exist"),
        ("weigh.rule=no-such-rule", "weights/no-such-rule", "no-such-rule"),
        ("teacher=null", "scores", "teacher"),
    }:
        row = stages(open_run(run.root, (override,)))[stage]
        assert row["action"] == "refused", override
        assert told in row["why"]
    missing = open_run(run.root, ("student.model=./nowhere", "rollout.engine=transformers"))
    assert "no such model folder" in stages(missing)["rollouts"]["why"]
    assert plan(missing)["bottleneck"]["what"] == "rollouts of round 0 is refused"


def test_every_number_says_where_it_is_from(tmp_path: Path, make_fake_run: MakeRun) -> None:
    run = make_fake_run(tmp_path / "run")

    def figures(value: Any) -> list[dict[str, Any]]:
        if isinstance(value, list):
            return [f for inner in value for f in figures(inner)]
        if not isinstance(value, dict):
            return []
        return [value] if "origin" in value else [f for inner in value.values() for f in figures(inner)]

    found = plan(run)
    assert len(figures(found)) > 40
    for figure in figures(json.loads(json.dumps(found))):
        assert set(figure) == {"value", "unit", "origin", "how"}
        assert figure["origin"] in ("measured", "given", "assumed")
        assert figure["unit"]
        assert figure["how"]
    assert found["length"]["origin"] == "assumed"
    assert found["length"]["value"] == run.config.rollout.max_new_tokens, "an upper bound"
    rows = stages(run, length=7.5, speeds={"rollout": 100.0})
    assert rows["rollouts"]["seconds"] == {
        "value": 6 * 2 * 7.5 / 100, "unit": "seconds", "origin": "given",
        "how": "tokens by tokens per second: --tokens-per-s rollout=100",
    }  # fmt: skip
    assert rows["scores"]["seconds"]["value"] is None
    assert "--tokens-per-s score=N" in rows["scores"]["seconds"]["how"]
    assert rows["scores"]["tokens"]["value"] == 90
    for speeds in ({"cook": 1.0}, {"train": 0.0}):
        with pytest.raises(ConfigError):
            plan(run, speeds=speeds)


def test_gpu_hours_are_hours_of_models_alone(tmp_path: Path, make_fake_run: MakeRun) -> None:
    run = make_fake_run(
        tmp_path / "run", student={"device": "cuda"}, rollout={"engine": "vllm"}, score={"engine": "transformers"}
    )
    run = open_run(run.root, ("vllm.tensor_parallel_size=2",))
    rows = stages(run, length=6.0, speeds=dict.fromkeys(("rollout", "score", "weigh", "train", "eval"), 0.1))
    hours = 6 * 2 * 6.0 / 0.1 / 3600
    assert rows["rollouts"]["gpu_hours"]["value"] == pytest.approx(2 * hours)
    assert rows["scores"]["gpu_hours"]["value"] == pytest.approx(hours)
    assert rows["weights/fire"]["gpu_hours"]["value"] == 0
    assert rows["checkpoints"]["gpu_hours"]["origin"] == "assumed", "device: auto may be a CPU"
    assert stages(run, speeds={"rollout": 1.0})["evals"]["gpu_hours"]["value"] is None


def test_parameters_are_counted_in_the_files_and_estimated_without_them(tiny_world: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tiny_world.student)
    count = parameters(ModelConfig(model=str(tiny_world.student)), tmp_path)
    assert (count.value, count.origin) == (sum(p.numel() for p in loaded.parameters()), "measured")
    config = Qwen3Config(
        vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        real = sum(p.numel() for p in Qwen3ForCausalLM(config).parameters())
    assert dense(config.to_dict()) == pytest.approx(real, rel=0.01), "norms are left out"
    config.save_pretrained(tmp_path / "light")
    assert parameters(ModelConfig(model="./light"), tmp_path).origin == "assumed"
    assert parameters(ModelConfig(model="some/model"), tmp_path).value is None


def test_it_loads_no_model_and_changes_nothing(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(tmp_path / "run")
    with Session(run) as session:
        rollout(session, 0)
    before = files(run.root)
    script = (
        "import sys; sys.argv = ['fire', 'plan', *sys.argv[1:]]\nfrom fire_data.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        # Polars leaves an empty stand-in for torch itself.
        "print(sorted({'torch.nn', 'transformers', 'vllm', 'ray'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(run.root), "--rounds", "3", "--json"],
        capture_output=True, text=True, check=True, env=os.environ, timeout=120,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "[]"
    assert [row["stage"] for row in json.loads(done.stdout)["stages"]][:2] == ["evals", "rollouts"]
    assert files(run.root) == before


def test_the_table_says_what_it_rests_on(tmp_path: Path, make_fake_run: MakeRun, fire: Fire) -> None:
    root = make_fake_run(tmp_path / "run").root
    answer = fire("plan", root, "--tokens-per-s", "rollout=50")
    assert answer.code == 0, answer.err
    assert "3 of 3 shards" in answer.out
    assert "~192" in answer.out, "12 responses of at most 16 tokens"
    assert "(assumed, as long as rollout.max_new_tokens allows: an upper bound (--length N))" in answer.out
    assert "bottleneck: time, which is not known" in answer.out
    assert answer.err.splitlines()[-1] == f"next: fire rollout {root}"
    wrong = fire("plan", root, "--tokens-per-s", "rollout=fast")
    assert wrong.code == 2
    fire("rollout", root)
    refused = fire("plan", root, "--set", "rollout.n=3")
    assert refused.code == 0
    assert "rollouts of round 0 would be refused" in refused.err
    assert "rollout.n: 2 -> 3" in " ".join(refused.out.split())
