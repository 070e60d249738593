"""The example configurations: each holds the paper's numbers and nothing idle, and its small twin runs as it is."""

from __future__ import annotations

import fnmatch
import json
import re
import runpy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from pydantic import BaseModel

from fire_data.prompts import read_prompts
from fire_data.rules.fire import Fire
from fire_data.run import Run, open_run
from fire_data.schemas.config import Config, ModelConfig, load_config
from fire_data.shards import sealed

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PAPER = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
NAMES = ("strong-to-weak", "single-teacher", "multi-teacher")
FILES = (*NAMES, *(f"tiny/{name}" for name in NAMES))

NAMED_ALTHOUGH_DEFAULT = {"rollout.temperature", "train.lr", "train.clip"}
"""The paper's numbers stand in the files even where they are the defaults of today."""

DIFFERS_IN_SMALL = {
    "threads", "*.model", "*.dtype", "*.chat_template_kwargs", "prompts.path", "verify.pattern",
    "rollout.engine", "rollout.prompts_per_round", "rollout.prompts_per_shard", "rollout.max_new_tokens",
    "train.batch_size", "train.lr", "train.compute_dtype", "train.export_dtype",
}  # fmt: skip
"""All in which a twin may differ from its big one: models, prompts, sizes, engine and precision."""

OF_THE_PAPER = {
    "train.batch_size": 1024,
    "train.lr": 1e-6,
    "train.warmup_steps": 0,
    "train.schedule": "constant",
    "train.epochs": 1,
    "train.clip": 0.2,
    "train.dual_clip": None,
    "train.weight_decay": 0.01,
    "train.max_grad_norm": 1.0,
    "rollout.n": 1,
    "rollout.prompts_per_round": 1024,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "rollout.max_prompt_tokens": 2048,
    "rollout.max_new_tokens": 16384,
    "rollout.long_prompts": "skip",
    "score.teacher_prompt": "shared",
    "weigh.rule": "fire",
    "weigh.params": {"percentile": 20.0, "alpha": 1.0, "beta": 1.0},
    "weigh.rollout_is_cap": 5.0,
    "weigh.truncated": "keep",
    "weigh.end_token": "keep",
    "eval.n": 8,
    "eval.temperature": 1.0,
    "student.chat_template_kwargs": {"enable_thinking": False},
}


def given(name: str) -> dict[str, Any]:
    """What a file says, by dotted key; mappings that are values stay whole."""
    return dict(_flat(yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")), ""))


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and key not in ("params", "chat_template_kwargs"):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def config(name: str) -> Config:
    return load_config(EXAMPLES / f"{name}.yaml")


def value(cfg: Config, key: str) -> Any:
    found: Any = cfg
    for part in key.split("."):
        found = getattr(found, part)
    return found


def default(key: str) -> Any:
    """The default of a dotted key; of a required one, what no value equals."""
    *sections, last = key.split(".")
    model: type[BaseModel] = ModelConfig if sections and sections[0] in ("student", "teacher", "teachers") else Config
    if model is Config and sections:
        model = type(Config.model_fields[sections[0]].default)
    field = model.model_fields[last]
    return object() if field.is_required() else field.default


def models(cfg: Config) -> list[ModelConfig]:
    return [m for m in (cfg.student, cfg.teacher, cfg.base, *cfg.teachers.values()) if m is not None]


def differing(name: str) -> set[str]:
    big, small = given(name), given(f"tiny/{name}")
    nothing = object()
    return {k for k in big | small if big.get(k, nothing) != small.get(k, nothing)}


@pytest.mark.parametrize("name", FILES)
def test_every_configuration_is_valid_and_names_no_idle_key(name: str) -> None:
    cfg = config(name)
    for key, said in given(name).items():
        assert said != default(key) or key in NAMED_ALTHOUGH_DEFAULT, f"{key} is the default"
    assert (cfg.teacher is None) == bool(cfg.teachers)


def test_what_is_named_although_it_is_the_default_is_so_in_every_big_configuration() -> None:
    for name in NAMES:
        assert {k for k, v in given(name).items() if v == default(k)} == NAMED_ALTHOUGH_DEFAULT


@pytest.mark.parametrize("key", OF_THE_PAPER)
@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_are_those_of_the_paper(name: str, key: str) -> None:
    assert value(config(name), key) == OF_THE_PAPER[key]


@pytest.mark.parametrize("name", FILES)
def test_the_rule_is_fire_with_every_statistic_over_the_step_and_a_round_is_one_step(name: str) -> None:
    cfg = config(name)
    rule = Run(EXAMPLES, cfg).rule()
    assert isinstance(rule, Fire)
    assert (rule.percentile, rule.alpha, rule.beta, rule.by, rule.normaliser) == (20.0, 1.0, 1.0, None, "max")
    assert {rule.filter_scope, rule.max_scope, rule.mean_scope} == {"step"}
    assert rule.denominator == "tokens"
    assert cfg.rollout.prompts_per_round is not None
    assert cfg.train.batch_size == cfg.rollout.prompts_per_round * cfg.rollout.n


@pytest.mark.parametrize("name", NAMES)
def test_the_big_configurations_name_hub_models_of_one_family_and_score_exactly(name: str) -> None:
    cfg = config(name)
    for model in models(cfg):
        assert re.fullmatch(r"(Qwen|Keven16)/Qwen3-[\w.-]+", model.model)
        assert model.dtype == "bfloat16"
    assert cfg.student.model == "Qwen/Qwen3-4B"
    assert (cfg.rollout.engine, cfg.score.engine, cfg.weigh.entropy) == ("vllm", "transformers", "exact")


def test_the_three_settings_differ_in_their_teachers_and_prompts_alone() -> None:
    strong, single, multi = (given(name) for name in NAMES)
    mine = {"teacher.model", "teacher.chat_template_kwargs"}
    assert {k for k in strong | single if strong.get(k) != single.get(k)} == mine
    changed = {k for k in single | multi if single.get(k) != multi.get(k)}
    assert {k for k in changed if not k.startswith("teacher")} == {"prompts.path"}
    assert sorted(config("multi-teacher").teachers) == ["code", "math"]


@pytest.mark.parametrize("name", FILES)
def test_no_configuration_runs_code_of_a_repository(name: str) -> None:
    assert not any(model.trust_remote_code for model in models(config(name)))
    assert "trust_remote_code" not in (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_differs_from_its_big_one_in_models_prompts_sizes_and_engine_alone(name: str) -> None:
    for key in differing(name):
        assert any(fnmatch.fnmatch(key, pattern) for pattern in DIFFERS_IN_SMALL), key


def test_every_difference_that_is_allowed_is_one() -> None:
    found = set().union(*(differing(name) for name in NAMES))
    assert {p for p in DIFFERS_IN_SMALL if not fnmatch.filter(found, p)} == set()


@pytest.mark.parametrize("name", FILES)
def test_the_head_of_a_file_says_how_it_is_used(name: str) -> None:
    head = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8").partition("\n\n")[0]
    folder = re.search(rf"mkdir -p (\S+) && cp examples/{name}\.yaml (\S+)/fire\.yaml\n", head)
    assert folder is not None
    assert folder[1] == folder[2]
    assert f"fire run {folder[1]} --rounds " in head
    assert all(line.startswith("#") for line in head.splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_a_run_without_its_prompts_is_told_so_before_a_model_is_looked_for(
    name: str, tmp_path: Path, fire: Callable[..., Any]
) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(EXAMPLES / f"{name}.yaml", tmp_path / "run" / "fire.yaml")
    answer = fire("run", tmp_path / "run", "--rounds", 1)
    assert answer.code == 2
    assert "the prompts file does not exist" in answer.err
    assert config(name).prompts.path.removeprefix("../") in answer.err


def test_every_row_of_the_papers_table_in_the_docs_is_what_the_configurations_say() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([^|]+) \| `([a-z_.]+)`", PAPER, re.MULTILINE)
    said = {key: _plain(text.strip().strip("`")) for text, key in rows}
    assert said.keys() >= OF_THE_PAPER.keys() - {"train.epochs", "train.dual_clip", "rollout.top_k", "eval.temperature"}
    for key, text in said.items():
        for name in NAMES:
            assert value(config(name), key) == text, key


def _plain(text: str) -> Any:
    try:
        return yaml.safe_load(text) if text.startswith("{") else json.loads(text)
    except ValueError:
        return text


def test_the_prompts_that_the_docs_make_are_read_and_their_routes_are_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented code on stand-ins of the Hub's files, which have verl's columns."""
    code = re.search(r"```python\n(.*?)```", PAPER, re.DOTALL)
    assert code is not None
    files = set(re.findall(r"[\w-]+/[\w-]+\.parquet", code[1]))
    assert len(files) == 4
    for file in files:
        rows = [
            {
                "data_source": file,
                "prompt": [{"content": f"{file} {i}", "role": "user"}],
                "ability": "math",
                "reward_model": {"ground_truth": f"{i}", "style": "rule"},
                "extra_info": {"index": i},
            }
            for i in range(3)
        ]
        (tmp_path / "hub" / file).parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(rows).write_parquet(tmp_path / "hub" / file)
    hub = "hf://datasets/Keven16/G-OPD-Training-Data"
    assert hub in code[1]
    run = tmp_path / "runs" / "run"
    run.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "documented.py").write_text(code[1].replace(hub, "hub"), encoding="utf-8")
    runpy.run_path("documented.py")
    for name in NAMES:
        cfg = config(name)
        prompts = read_prompts(cfg.prompts.path, run).to_pylist()
        assert {p["teacher"] for p in prompts} == (set(cfg.teachers) or {None})
        assert all(p["messages"][0]["role"] == "user" for p in prompts)
        assert {p["answer"] for p in prompts if p["teacher"] != "code"} == {"0", "1", "2"}
    evaluated = re.search(r"--set eval\.prompts=(\S+\.jsonl)", PAPER)
    assert evaluated is not None
    assert read_prompts(evaluated[1], run, need_answer=True).num_rows == 6


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so it is \boxed{204}.", "204"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}} at last", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a}{b}}}", r"\sqrt{\frac{a}{b}}"),
        ("no box", None),
    ],
)
def test_the_answer_of_a_response_is_its_last_box(response: str, answer: str | None) -> None:
    from fire_data.verify import compile_pattern, extract

    for name in NAMES:
        assert extract(response, compile_pattern(config(name).verify.pattern)) == answer


@pytest.fixture(scope="module")
def small_worlds(tmp_path_factory: pytest.TempPathFactory, tiny_world: Any) -> Path:
    """The folders that the twins name, beside which a run lies: the demo's world and that of two tasks, both tiny."""
    from fire_data.worlds.two_domains import TwoSizes, build_two_domains

    folder = tmp_path_factory.mktemp("runs")
    (folder / "demo").mkdir()
    (folder / "demo" / "world").symlink_to(tiny_world.student.parent)
    sizes = TwoSizes(
        hidden=32, heads=2, intermediate=32, batch=8, teacher_steps=2, both_steps=12, student_steps=4, tuned_steps=4
    )
    build_two_domains(folder / "two-domains", prompts=12, held_out=6, sizes=sizes)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_runs_as_it_is_and_its_settings_take_effect(
    name: str, small_worlds: Path, fire: Callable[..., Any]
) -> None:
    root = small_worlds / name
    root.mkdir()
    shutil.copy(EXAMPLES / "tiny" / f"{name}.yaml", root / "fire.yaml")
    answer = fire("run", root, "--rounds", 2, "--json")
    assert answer.code == 0, answer.err
    run = open_run(root)
    size = run.config.rollout.prompts_per_round or 0
    for number, row in enumerate(answer.json[1:]):
        assert row["global_step"] == number + 1, "one optimizer step per round"
        weights = sealed(run.part("weights", number))
        assert weights.fields["rule"].items() >= OF_THE_PAPER["weigh.params"].items()
        assert weights.fields["rollout_is_cap"] == 5.0
        assert weights.stats["trajectories"] == size
        assert 0.7 < weights.stats["kept_fraction"] == row["kept"] < 0.85, "the filter drops about a fifth"
        assert [step["trajectories"] for step in weights.stats["steps"]] == [size]
        assert [stat["n"] for stat in weights.stats["rule"]["threshold"]] == [size], "over the whole batch"
    frame = run.weights(round=1).collect()
    corrections = frame["rollout_is"].explode()
    assert corrections.is_between(0.0, 5.0).all()
    assert (corrections - 1).abs().max() < 1e-3, "one engine samples and scores"
    kept, dropped = frame.filter("keep"), frame.filter(~pl.col("keep"))
    assert dropped["coefficient"].explode().eq(0.0).all()
    assert "20 % quantile of its step" in dropped["drop_reason"][0]
    assert kept["weight"].explode().n_unique() > 1
    trained = sealed(run.part("checkpoints", 1)).fields["train"]
    assert (trained["weight_decay"], trained["clip"], trained["epochs"]) == (0.01, 0.2, 1)
    assert frame.height == size == frame.n_unique("trajectory_id")
    routes = set(run.config.teachers) or {None}
    assert set(frame["teacher"].to_list()) == routes


def test_the_twin_with_two_teachers_asks_each_for_its_own_prompts(small_worlds: Path, fire: Callable[..., Any]) -> None:
    root = small_worlds / "routes"
    root.mkdir()
    shutil.copy(EXAMPLES / "tiny" / "multi-teacher.yaml", root / "fire.yaml")
    smaller = ("--set", "rollout.prompts_per_round=12", "--set", "train.batch_size=12")
    assert fire("rollout", root, *smaller).code == 0
    assert fire("score", root, "--add", "teacher.math", *smaller).code == 0
    run = open_run(root)
    by_teacher = sealed(run.part("scores", 0)).stats["teachers"]
    assert {name: of["trajectories"] for name, of in by_teacher.items()} == {"math": 6, "code": 6}
    frame = run.scores(0, add="teacher.math").collect()
    same = frame["teacher_logprob"] == frame["teacher_logprob.math"]
    assert same.to_list() == [teacher == "math" for teacher in frame["teacher"]]
