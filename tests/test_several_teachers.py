"""Several teachers: each row goes to its own, each model is loaded once, what one said is not asked again."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import fire_data as fd
from fire_data import models, scoring, stages, verify
from fire_data.create import fork_run, init_run, missing_paths
from fire_data.diagnose import diagnose, measure
from fire_data.engines import FakeScorer, tail_bound
from fire_data.outside import Outside
from fire_data.overview import check, status
from fire_data.run import Run, open_run
from fire_data.schedule import round_slots
from fire_data.schemas.config import ModelConfig, parse_config, parse_yaml, render_config
from fire_data.schemas.errors import (
    ConfigError,
    DamagedError,
    EngineError,
    FingerprintError,
    IncompleteError,
    PartialError,
)
from fire_data.schemas.tables import FLOATS, IDS, JOINT, TABLES
from fire_data.scoring import TransformersEvaluator, TransformersScorer
from fire_data.session import Session
from fire_data.shards import sealed
from fire_data.stages import Silent
from fire_data.steps.columns import add_columns
from fire_data.steps.diagnose import diagnose_round
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh

from .conftest import Answer, flip, shard_files

Fire = Callable[..., Answer]
MakeRun = Callable[..., Run]

# By place in round 0, two prompts to a shard of four rows: one shard without `code`, a mixed one, one without `math`.
PLACES = ("math", "math", "math", "code", "code", "code")
ROWS = 12
LOAD = models.load_model  # before a test puts something else in its place
URL = "http://127.0.0.1:9/v1"  # never asked: its place is taken by a model in this process
MATH = (f"teachers.math.url={URL}",)
BOTH = (*MATH, f"teachers.code.url={URL}")
TEMPLATE = (
    "{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{ '| ' + m['content'] + ' | ' }}"
    "{%- else -%}{{ '<user> ' + m['content'] + ' so ' }}{%- endif -%}{%- endfor -%}<assistant>"
)


class Heard(Silent):
    """A Reporter that keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def with_routes(source: Path, target: Path, routes: Sequence[str | None]) -> Path:
    """The prompts of a world, routed by their place in round 0."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    names = [row["prompt_id"] for row in rows]
    for place, slot in enumerate(round_slots(names, 0, 0, None)):
        rows[slot.row]["teacher"] = routes[place % len(routes)]
    target.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_world: Any) -> Path:
    """Three models that differ, `student`, `math` and `code`, and prompts that go to both teachers."""
    root = tmp_path_factory.mktemp("places")
    for name, source in (("student", "student"), ("math", "teacher"), ("code", "teacher")):
        shutil.copytree(getattr(tiny_world, source), root / name)
    torch.manual_seed(7)
    weights = {k: v + 0.1 * torch.randn_like(v) for k, v in load_file(root / "code" / "model.safetensors").items()}
    save_file(weights, root / "code" / "model.safetensors", {"format": "pt"})
    with_routes(tiny_world.prompts, root / "prompts.jsonl", PLACES)
    (root / "template.jinja").write_text(TEMPLATE)
    return root


def on_two(places: Path, **more: Any) -> dict[str, Any]:
    """What `make_run` is given for two teachers."""
    teachers = {name: {"model": str(places / name)} for name in ("math", "code")}
    return {
        "student": {"model": str(places / "student")}, "teacher": None, "teachers": teachers,
        "prompts": {"path": str(places / "prompts.jsonl")}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def rolled_once(tmp_path_factory: pytest.TempPathFactory, places: Path, make_run: MakeRun) -> Path:
    run = make_run(tmp_path_factory.mktemp("rolled") / "run", **on_two(places))
    rollout(Session(run), 0)
    return run.root


@pytest.fixture(scope="module")
def scored_once(tmp_path_factory: pytest.TempPathFactory, rolled_once: Path) -> Path:
    folder = tmp_path_factory.mktemp("scored") / "run"
    shutil.copytree(rolled_once, folder)
    score(Session(open_run(folder)), 0)
    return folder


@pytest.fixture
def rolled(tmp_path: Path, rolled_once: Path) -> Run:
    """A run of real models with rollouts for two teachers, 3 shards."""
    return copied(rolled_once, tmp_path / "run")


@pytest.fixture
def scored(tmp_path: Path, scored_once: Path) -> Run:
    """The same with the scores of both teachers, each beside the student."""
    return copied(scored_once, tmp_path / "scored")


@pytest.fixture
def fake(tmp_path: Path, places: Path, make_fake_run: MakeRun) -> Run:
    """A dry run with rollouts for two teachers, 3 shards."""
    run = make_fake_run(tmp_path / "fake", **on_two(places))
    rollout(Session(run), 0)
    return run


def copied(root: Path, folder: Path, *overrides: str) -> Run:
    shutil.copytree(root, folder)
    return open_run(folder, overrides)


def tables_of(run: Run) -> dict[str, bytes]:
    """Every visible table."""
    found = (p for p in sorted(run.root.rglob("*.parquet")) if ".fire" not in p.relative_to(run.root).parts)
    return {str(p.relative_to(run.root)): p.read_bytes() for p in found}


def kept_files(run: Run) -> list[Path]:
    return [p for p in sorted((run.root / ".fire").rglob("*")) if "kept" in p.parts and p.is_file()]


def table_of(run: Run, add: Sequence[str] = ()) -> pa.Table:
    return run.scores(0, add=add).collect().to_arrow()


def goes_to(table: pa.Table, name: str) -> pa.Table:
    return table.filter(pa.array([route == name for route in table["teacher"].to_pylist()]))


def flat(column: pa.ChunkedArray) -> Any:
    return np.concatenate([np.asarray(row) for row in column.to_pylist()])


# --- routes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders of all models and tokenizers that are loaded, in order; tokenizers in brackets."""
    seen: list[str] = []
    for name, form in (("load_model", "{}"), ("load_tokenizer", "({})")):

        def spied(cfg: Any, *args: Any, real: Any = getattr(models, name), form: str = form, **options: Any) -> Any:
            seen.append(form.format(Path(cfg.model).name))
            return real(cfg, *args, **options)

        monkeypatch.setattr(models, name, spied)
    return seen


@pytest.mark.parametrize(
    ("routes", "words"),
    [(("math", "phys"), ["'phys'", "math, code"]), (("code", None), ["names no teacher", "math, code"])],
    ids=["unknown", "missing"],
)
def test_a_route_that_leads_nowhere_is_told_by_rollout_before_anything_is_loaded(
    tmp_path: Path, places: Path, make_run: MakeRun, fire: Fire, loads: list[str], routes: tuple[str | None, ...],
    words: list[str],
) -> None:  # fmt: skip
    prompts = with_routes(places / "prompts.jsonl", tmp_path / "p.jsonl", routes)
    run = make_run(tmp_path / "run", **on_two(places, prompts={"path": str(prompts)}))
    answer = fire("rollout", run.root)
    assert answer.code == 2
    assert all(word in answer.err for word in (*words, "prompts, field `teacher`")), answer.err
    assert loads == []
    assert not (run.root / ".fire" / "manifests").exists()
    assert fire("rollout", run.root, *repair(answer, places)).code == 0


def repair(answer: Answer, places: Path) -> list[str]:
    """The option that an error names, with the model `code` for its folder."""
    option = re.search(r"--set ([a-z.]+=)FOLDER", answer.fix)
    assert option, answer.err
    return ["--set", f"{option[1]}{places / 'code'}"]


@pytest.mark.parametrize("routes", [("math", "phys"), ("code", None)], ids=["unknown", "missing"])
def test_a_route_that_leads_nowhere_is_told_by_score_before_anything_is_loaded(
    tmp_path: Path, places: Path, make_fake_run: MakeRun, fire: Fire, loads: list[str], routes: tuple[str | None, ...]
) -> None:
    prompts = with_routes(places / "prompts.jsonl", tmp_path / "p.jsonl", routes)
    run = make_fake_run(tmp_path / "run", **on_two(places, prompts={"path": str(prompts)}, teachers={}))
    assert fire("rollout", run.root).code == 0  # without any teacher no route is needed
    loads.clear()
    two = [f"--set=teachers.{name}.model={places / name}" for name in ("math", "code")]
    answer = fire("score", run.root, *two)
    assert answer.code == 2
    assert "there are" in answer.err
    assert "math, code" in answer.err
    assert loads == []
    assert not (run.root / ".fire" / "manifests" / "scores").exists()
    named = repair(answer, places)
    assert fire("score", run.root, *two, *named).code == 0
    used = {"math": "math", "phys": "phys", "code": "code", None: "teacher"}
    assert set(sealed(run.part("scores", 0)).fields["teachers"]) == {used[route] for route in routes}


def test_prompts_without_a_route_go_to_the_default_teacher_and_an_unknown_route_still_leads_nowhere(
    tmp_path: Path, places: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    prompts = with_routes(places / "prompts.jsonl", tmp_path / "p.jsonl", (None, "math", "teacher"))
    teacher = {"model": str(places / "code")}
    run = make_fake_run(tmp_path / "run", **on_two(places, prompts={"path": str(prompts)}, teacher=teacher))
    session = Session(run)
    rollout(session, 0)
    manifest = score(session, 0)
    assert manifest.stats["teachers"].keys() == {"teacher", "math"}
    assert {name: told["trajectories"] for name, told in manifest.stats["teachers"].items()} == {
        "teacher": 8,
        "math": 4,
    }
    table = table_of(run)
    for route, name in ((None, "teacher"), ("teacher", "teacher"), ("math", "math")):
        rows = goes_to(table, route)
        alone = FakeScorer(session.vocabulary, name).score(rows)
        assert rows["teacher_logprob"].to_pylist() == alone["teacher_logprob"].to_pylist()
    with_routes(prompts, prompts, (None, "phys"))
    assert fire("rollout", run.root, "--redo").code == 2


def test_prompts_that_name_teachers_go_to_the_only_one_with_a_warning(
    tmp_path: Path, places: Path, make_fake_run: MakeRun
) -> None:
    values = on_two(places, teachers={}, teacher={"model": str(places / "math")})
    run = make_fake_run(tmp_path / "run", **values)
    heard = Heard()
    session = Session(run, heard)
    rollout(session, 0)
    assert [w for w in heard.warnings if "name teachers" in w and "math" in w and "code" in w]
    manifest = score(session, 0)
    assert set(manifest.fields["teachers"]) == {"teacher"}
    table = table_of(run)
    assert set(table["teacher"].to_pylist()) == {"math", "code"}, "what the prompts say is kept"
    assert table["teacher_logprob"].to_pylist() == (
        FakeScorer(session.vocabulary).score(table)["teacher_logprob"].to_pylist()
    )


@pytest.mark.parametrize(
    "name",
    ["teacher", "student", "base", "routed", "average", "confident", "token", "all", "", "a b", "a.b", "../a", "a/b",
     "-a", "_a", "ü", "a\n", "a" * 51],
)  # fmt: skip
def test_what_cannot_be_the_name_of_a_teacher_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a teacher") as caught:
        parse_config({"student": {"model": "s"}, "teachers": {name: {"model": "t"}}}, "fire.yaml")
    assert repr(name) in caught.value.what
    assert "teachers" in caught.value.what


@pytest.mark.parametrize("name", ["no", "on", "1", "007", "1e5", "null", "True", "2024-01-01", "0x1", "math"])
def test_a_name_that_yaml_would_read_otherwise_is_written_as_text(tmp_path: Path, name: str) -> None:
    values = {"student": {"model": "s"}, "teachers": {name: {"model": "t"}}}
    run = init_run(tmp_path / "run", values)
    assert list(open_run(run.root).config.teachers) == [name]
    assert list(fork_run(run, tmp_path / "fork", {}).config.teachers) == [name]
    assert list(open_run(run.root, (f"teachers.{name}.model=u",)).config.teachers) == [name]


def test_a_configuration_with_teachers_reads_back_equal_and_every_field_of_theirs_is_there() -> None:
    values = {
        "student": {"model": "s"},
        "teachers": {
            "math": {"model": "org/m", "dtype": "bfloat16", "url": "http://h:1/v1", "api_key_env": "KEY"},
            "Code-2_b": {"model": "c: # not a comment", "chat_template_kwargs": {"enable_thinking": False}},
        },
        "score": {"add": ["teacher.math", "topk"]},
        "weigh": {"teacher": "math"},
    }
    text = render_config(values)
    config = parse_config(values, "here")
    assert parse_config(parse_yaml(text, "text"), "there") == config
    assert list(parse_yaml(text, "text")["teachers"]) == ["math", "Code-2_b"]
    for key in type(config.teachers["math"]).model_fields:
        assert len(re.findall(rf"^    {key}:.*#", text, re.MULTILINE)) == 2, key


@pytest.mark.parametrize("added", ["teacher.phys", "teacher.", "teacher", "math", "topk.math"])
def test_columns_of_a_teacher_that_is_not_there_are_refused_by_the_configuration(added: str) -> None:
    values = {"student": {"model": "s"}, "teachers": {"math": {"model": "t"}}, "score": {"add": [added]}}
    with pytest.raises(ConfigError, match=r"teacher\.math") as caught:
        parse_config(values, "fire.yaml")
    assert repr(added) in caught.value.what


def test_settings_of_teachers_are_given_on_the_command_line(rolled: Run) -> None:
    def teachers(*overrides: str) -> dict[str, Any]:
        return open_run(rolled.root, overrides).config.teachers

    assert teachers("teachers.math.model=007")["math"].model == "007", "text is taken as it is"
    assert teachers("teachers.math.dtype=bfloat16")["math"].model == teachers()["math"].model
    assert list(teachers("teachers.phys.model=there")) == ["math", "code", "phys"]
    assert teachers("teachers.code.url=null")["code"].url is None
    assert teachers("teachers={}") == {}
    for wrong in (
        "teachers.phys.url=http://h",
        "teachers.math=there",
        "teachers.math.modell=there",
        "teachers.a b.model=x",
    ):
        with pytest.raises(ConfigError, match="teachers"):
            teachers(wrong)


def test_relative_paths_of_teachers_are_found_from_a_new_run_and_from_a_fork(
    tmp_path: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(places, tmp_path / "models")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    values = {
        "student": {"model": "models/student"},
        "teachers": {
            "math": {"model": "models/math", "chat_template": "models/template.jinja"},
            "hub": {"model": "a/b"},
        },
        "prompts": {"path": "models/prompts.jsonl"},
    }
    run = init_run(Path("runs/first"), values)
    monkeypatch.chdir(tmp_path / "elsewhere")
    fork = fork_run(open_run("../runs/first"), Path("deep/er/second"), {"seed": 1})
    for made in (tmp_path / "runs" / "first", tmp_path / "elsewhere" / "deep" / "er" / "second"):
        math = open_run(made).config.teachers["math"]
        assert not Path(math.model).is_absolute()
        assert (made / math.model).resolve() == (tmp_path / "models" / "math").resolve()
        assert (made / str(math.chat_template)).resolve() == (tmp_path / "models" / "template.jinja").resolve()
        assert open_run(made).config.teachers["hub"].model == "a/b"
        assert missing_paths(made) == []
    assert fork.config.teachers.keys() == run.config.teachers.keys()
    gone = init_run(tmp_path / "gone", values | {"teachers": {"math": {"model": "./not/there"}}})
    assert [line for line in missing_paths(gone.root) if line.startswith("teachers.math.model: there is no")]


# --- one load per model and round ----------------------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Rows that went through each model, by the id of the model."""
    rows: Counter[int] = Counter()
    real = scoring._predicting_states

    def counted(model: Any, batch: list[Any]) -> Any:
        rows[id(model)] += len(batch)
        return real(model, batch)

    monkeypatch.setattr(scoring, "_predicting_states", counted)
    return rows


def test_models_are_loaded_once_in_a_round_and_see_every_row_once(
    tmp_path: Path, places: Path, make_run: MakeRun, loads: list[str], forwards: Counter[int]
) -> None:
    run = make_run(tmp_path / "run", **on_two(places, score={"topk": 3}))
    session = Session(run)
    rollout(session, 0)
    score(session, 0, add=["topk"])
    by_name = {name: session.teacher(name) for name in ("math", "code")}
    seen = {name: forwards[id(model)] for name, model in by_name.items()}
    assert forwards[id(session.student(0))] == ROWS
    assert seen == {"math": ROWS // 2, "code": ROWS // 2}
    score(session, 0, add=["teacher.math", "teacher.code", "base"])
    assert forwards[id(session.student(0))] == 2 * ROWS, "once more, as the reference model"
    assert {name: forwards[id(model)] for name, model in by_name.items()} == {"math": ROWS, "code": ROWS}
    assert Counter(name for name in loads if "(" not in name) == {"student": 1, "math": 1, "code": 1}
    assert Counter(name for name in loads if "(" in name) == {"(student)": 1, "(math)": 1, "(code)": 1}


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Callable[[Session], list[tuple[str, set[str]]]]:
    """Models run here, and seem to be on an accelerator. Gives, for every load, who was there already."""
    resolve, load = models.resolve_device, models.load_model

    def watch(session: Session) -> list[tuple[str, set[str]]]:
        found: list[tuple[str, set[str]]] = []

        def loaded(cfg: Any, base: Path, **options: Any) -> Any:
            found.append((Path(cfg.model).name, set(session._models)))
            return load(cfg.model_copy(update={"device": "cpu"}), base, **options)

        monkeypatch.setattr(models, "load_model", loaded)
        monkeypatch.setattr(
            models, "resolve_device", lambda name: resolve("cpu") if name == "cpu" else torch.device("cuda")
        )
        return found

    return watch


def test_on_an_accelerator_each_teacher_makes_room_for_the_next(
    rolled: Run, scored: Run, accelerated: Callable[[Session], list[tuple[str, set[str]]]]
) -> None:
    session = Session(rolled)
    found = accelerated(session)
    score(session, 0)
    assert found == [("student", set()), ("math", {"student"}), ("code", {"student"})]
    assert set(session._models) == {"student"}, "which may train next"
    assert tables_of(rolled) == tables_of(scored)


# --- models behind a url, which run here -----------------------------------------------------------------------------


class Exact:
    """The place of a server: exact, with ranks. Counts the rows it was asked for; fails in a call if told so."""

    entropy_kind, holds_gpu = "exact", False
    rank = True

    def __init__(self, inner: TransformersEvaluator, farm: Farm) -> None:
        self.inner, self.farm, self.lock = inner, farm, threading.Lock()
        self.closed = False

    def evaluate(self, rows: pa.Table, progress: Any = None) -> pa.Table:
        with self.lock:  # a model in this process can be asked by one thread at a time
            assert not self.closed
            return self.farm.meter(rows, self.signals)

    def signals(self, rows: pa.Table) -> pa.Table:
        if not self.farm.alone or rows.num_rows < 2:
            return self.inner.evaluate(rows)
        return pa.concat_tables([self.inner.evaluate(rows.slice(i, 1)) for i in range(rows.num_rows)])

    def close(self) -> None:
        self.closed = True


class Listing(Exact):
    """As a server that lists the 4 most likely tokens: no ranks, and a bound of the entropy with its mass."""

    entropy_kind = "topk-lower-bound"
    rank = False

    def signals(self, rows: pa.Table) -> pa.Table:
        exact = self.inner.evaluate(rows)
        pairs = zip(rows["prompt_ids"].to_pylist(), rows["response_ids"].to_pylist(), strict=True)
        bounds = [listed_bound(plain_logprobs(self.inner, *pair), pair[1]) for pair in pairs]
        columns = {"entropy": [b.tolist() for b, _ in bounds], "entropy_mass": [m.tolist() for _, m in bounds]}
        kept = {c: exact[c] for c in ("logprob", "max_logprob", "top1_id")}
        return pa.table(kept | {c: pa.array(v, FLOATS) for c, v in columns.items()})


def plain_logprobs(evaluator: TransformersEvaluator, prompt: list[int], response: list[int]) -> Any:
    """One plain forward pass of one row: logprobs [T, V] over the shared vocabulary."""
    ids = evaluator.vocabulary
    with torch.no_grad():
        logits = evaluator.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, : ids.size]
    return logits.masked_fill(~torch.tensor(ids.allowed), -torch.inf).double().log_softmax(-1).numpy()


def listed_bound(logprobs_TV: Any, response: list[int]) -> tuple[Any, Any]:
    """Bound and mass from the 4 most likely tokens and the sampled one."""
    order = np.argsort(-logprobs_TV, axis=1, kind="stable")[:, :4]
    listed, own = np.take_along_axis(logprobs_TV, order, 1), logprobs_TV[np.arange(len(response)), response]
    apart = np.where((order == np.array(response)[:, None]).any(1), -np.inf, own)
    return tail_bound(np.concatenate([listed, apart[:, None]], 1), listed[:, -1])


@dataclass
class Farm:
    """All servers: of which kind they are, how often they were asked, and in which call the next one fails."""

    kinds: dict[str, type[Exact]] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    calls: int = 0
    fails_at: int | None = None
    finishes: int = 0  # rows of the call that fails
    alone: bool = False  # each row in a batch of its own, so that bits do not depend on what else is asked

    def meter(self, rows: pa.Table, work: Callable[[pa.Table], pa.Table]) -> pa.Table:
        self.calls += 1
        if self.fails_at is not None and self.calls >= self.fails_at:
            done = rows.slice(0, self.finishes)
            self.asked += done["trajectory_id"].to_pylist()
            raise PartialError("the server died", done=work(done).append_column("trajectory_id", done["trajectory_id"]))
        self.asked += rows["trajectory_id"].to_pylist()
        return work(rows)

    def open(self, who: str, cfg: ModelConfig, ids: Any) -> Any:
        """The engine of a model in a folder."""
        self.opened.append(who)
        if cfg.model not in self.models:
            self.models[cfg.model] = LOAD(cfg.model_copy(update={"device": "cpu"}), Path())
        return self.kinds.get(who, Exact)(TransformersEvaluator(self.models[cfg.model], ids, 8192, 1 << 28), self)

    def restart(self, fails_at: int | None = None, finishes: int = 0) -> list[str]:
        """Count anew. Gives the rows that were asked for since."""
        asked, self.asked, self.calls, self.fails_at, self.finishes = self.asked, [], 0, fails_at, finishes
        return asked


@pytest.fixture
def farm(monkeypatch: pytest.MonkeyPatch) -> Farm:
    """Stands in for every server of a teacher: its model, loaded here."""
    made = Farm()

    def server(self: Outside, who: str, cfg: Any, ids: Any, *_: Any) -> Any:
        if who not in self._engines:
            self._engines[who] = (cfg.model, made.open(who, cfg, ids))
        return self._engines[who][1]

    monkeypatch.setattr(Outside, "server", server)
    monkeypatch.setattr(Outside, "process", server)
    return made


def test_where_one_teacher_is_elsewhere_the_student_is_still_loaded_once(
    rolled_once: Path, tmp_path: Path, farm: Farm, accelerated: Callable[[Session], list[tuple[str, set[str]]]],
    forwards: Counter[int],
) -> None:  # fmt: skip
    run = copied(rolled_once, tmp_path / "run", *MATH)
    session = Session(run)
    found = accelerated(session)
    score(session, 0)
    assert found == [("student", set()), ("code", {"student"})]
    assert farm.opened == ["math"]
    assert sorted(forwards.values()) == [ROWS // 2, ROWS // 2, ROWS]
    assert not session._models, "nobody needs them any more"
    assert not kept_files(run)


def test_added_teachers_make_room_for_each_other(
    scored: Run, accelerated: Callable[[Session], list[tuple[str, set[str]]]]
) -> None:
    session = Session(scored)
    found = accelerated(session)
    score(session, 0, add=["teacher.math", "teacher.code"])
    assert found == [("math", set()), ("code", set())]


@pytest.mark.parametrize(
    ("settings", "method", "names"),
    [(BOTH, "server", ["math", "code"]), (("score.engine=vllm",), "process", ["student", "math", "code"])],
    ids=["servers", "processes"],
)
def test_an_engine_is_made_once_whichever_thread_needs_it_first(
    tmp_path: Path, rolled_once: Path, farm: Farm, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...],
    method: str, names: list[str],
) -> None:  # fmt: skip
    """Two shards are made at a time where another process answers, and both need its engine at once."""
    run = copied(rolled_once, tmp_path / "run", *settings)
    inside, most = [0], [0]

    class Slow:
        """A model of the farm behind what stands for a process or a server, and takes its time to open."""

        def __init__(self, source: Any, *_: Any, model: Any = None, vocabulary: Any, **more: Any) -> None:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            threading.Event().wait(0.02)
            who = more.get("who") or more["log"].stem.removeprefix("vllm-")
            self.inner = farm.open(who, ModelConfig(model=str(model or source)), vocabulary)
            inside[0] -= 1

        def probe(self, *_: Any) -> dict[str, Any]:
            return {}

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    monkeypatch.undo()
    monkeypatch.setattr("fire_data.http_engine.HttpEngine", Slow)
    monkeypatch.setattr("fire_data.vllm_engine.VllmEngine", Slow)
    score(Session(run), 0)
    assert farm.opened == names
    farm.opened.clear()
    score(Session(run), 0, add=["teacher.math", "teacher.code", *(["base"] if method == "process" else [])])
    assert farm.opened == ["math", "code", *(["base"] if method == "process" else [])]
    assert most == [1]


# --- the scores are those of each teacher alone --------------------------------------------------------------------


def test_routed_scores_are_those_of_runs_with_each_teacher_alone_bit_by_bit(
    tmp_path: Path, rolled_once: Path, scored: Run, places: Path
) -> None:
    routed = table_of(scored)
    assert routed.num_rows == ROWS
    for name in ("math", "code"):
        run = copied(rolled_once, tmp_path / name, "teachers={}", f"teacher.model={places / name}")
        score(Session(run), 0)
        mine, theirs = goes_to(routed, name), goes_to(table_of(run), name)
        assert mine.num_rows == ROWS // 2
        assert mine.schema.names == theirs.schema.names
        assert [c for c in mine.schema.names if not mine[c].equals(theirs[c])] == []
        others = goes_to(table_of(run), "math" if name == "code" else "code")
        assert not others["teacher_logprob"].equals(
            goes_to(routed, "math" if name == "code" else "code")["teacher_logprob"]
        )


def test_routed_scores_equal_both_models_run_by_hand(scored: Run, places: Path) -> None:
    session = Session(scored)
    table = table_of(scored)
    for name in ("math", "code"):
        rows = goes_to(table, name)
        scorer = TransformersScorer(session.student(0), session.teacher(name), session.vocabulary, 300, 1 << 20)
        again = scorer.score(rows.select(["prompt_ids", "response_ids"]))
        for column in again.column_names:
            np.testing.assert_allclose(flat(rows[column]), flat(again[column]), rtol=1e-4, atol=1e-5, err_msg=column)


def test_dry_runs_score_each_row_as_its_teacher_alone_would(fake: Run) -> None:
    session = Session(fake)
    manifest = score(session, 0)
    table = table_of(fake)
    for name in ("math", "code"):
        rows = goes_to(table, name)
        alone = FakeScorer(session.vocabulary, name).score(rows)
        assert [c for c in alone.column_names if rows[c].to_pylist() != alone[c].to_pylist()] == []
    assert manifest.recorded["entropy_kind"] == {"student": "fake", "math": "fake", "code": "fake"}


# --- killed or failed anywhere -------------------------------------------------------------------------------------


@dataclass
class Counted:
    """Rows that a fake scorer was asked for; it fails in the call with this number."""

    rows: list[str] = field(default_factory=list)
    calls: int = 0
    fails_at: int | None = None


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    state = Counted()
    for method in ("score", "evaluate"):

        def spied(self: FakeScorer, rows: pa.Table, *a: Any, real: Any = getattr(FakeScorer, method), **k: Any) -> Any:
            state.calls += 1
            if state.calls == state.fails_at:
                raise EngineError("failed as told")
            state.rows += rows["trajectory_id"].to_pylist()
            return real(self, rows, *a, **k)

        monkeypatch.setattr(FakeScorer, method, spied)
    return state


def test_a_failure_in_any_call_of_any_pass_costs_that_call_alone(tmp_path: Path, fake: Run, counted: Counted) -> None:
    whole = copied(fake.root, tmp_path / "whole")
    score(Session(whole), 0)
    calls = counted.calls
    assert calls == 6, "two passes over three shards"
    names = Counter(counted.rows)
    for n in range(1, calls + 1):
        run = copied(fake.root, tmp_path / str(n))
        counted.rows, counted.calls, counted.fails_at = [], 0, n
        with pytest.raises(EngineError, match="failed as told"):
            score(Session(run), 0)
        assert len(kept_files(run)) == n - 1
        assert tables_of(run).keys() == tables_of(fake).keys(), "no score is visible before all teachers have spoken"
        counted.calls, counted.fails_at = 0, None
        score(Session(run), 0)
        assert counted.calls == calls - n + 1
        assert Counter(counted.rows) == names, "every row once"
        assert tables_of(run) == tables_of(whole)
        assert not kept_files(run)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_failure_while_shards_are_put_together_computes_nothing_again(
    tmp_path: Path, fake: Run, counted: Counted, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    whole = copied(fake.root, tmp_path / "whole")
    score(Session(whole), 0)
    run = copied(fake.root, tmp_path / "run")
    real = stages.write_shard

    def write(part: Any, shard: Any, *rest: Any) -> Any:
        if shard.name == f"{lost:05d}":
            raise EngineError("failed as told")
        return real(part, shard, *rest)

    with monkeypatch.context() as context:
        context.setattr(stages, "write_shard", write)
        with pytest.raises(EngineError):
            score(Session(run), 0)
    assert len(shard_files(run.part("scores", 0))) == lost
    counted.rows, counted.calls = [], 0
    score(Session(run), 0)
    assert counted.rows == []
    assert tables_of(run) == tables_of(whole)
    assert not kept_files(run)


def test_only_the_missing_shard_is_computed_again(fake: Run, counted: Counted, tmp_path: Path) -> None:
    score(Session(fake), 0)
    before = tables_of(fake)
    path = shard_files(fake.part("scores", 0))[1]
    names = pq.read_table(path)["trajectory_id"].to_pylist()
    flip(path, path.stat().st_size // 2)
    counted.rows = []
    score(Session(fake), 0)
    assert Counter(counted.rows) == Counter(names)
    assert tables_of(fake) == before


@pytest.mark.parametrize("hurt", ["flip", "cut"])
def test_damaged_kept_rows_of_one_teacher_are_computed_again_and_no_others(
    tmp_path: Path, fake: Run, counted: Counted, hurt: str
) -> None:
    whole = copied(fake.root, tmp_path / "whole")
    score(Session(whole), 0)
    counted.rows, counted.calls, counted.fails_at = [], 0, 6
    with pytest.raises(EngineError):
        score(Session(fake), 0)
    (path,) = (p for p in kept_files(fake) if "math" in p.name and p.name.startswith("00001"))
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    path.write_bytes(data if hurt == "flip" else data[: len(data) // 2])
    counted.rows, counted.fails_at = [], None
    score(Session(fake), 0)
    table = table_of(fake)
    again = [(row["trajectory_id"]) for row in goes_to(table.slice(4, 4), "math").to_pylist()]
    rest = [(row["trajectory_id"]) for row in goes_to(table.slice(8, 4), "code").to_pylist()]
    assert Counter(counted.rows) == Counter(again + rest)
    assert tables_of(fake) == tables_of(whole)


def test_teachers_elsewhere_that_die_anywhere_lose_only_what_they_had_not_finished(
    tmp_path: Path, rolled_once: Path, farm: Farm
) -> None:
    farm.alone = True
    whole = copied(rolled_once, tmp_path / "whole", *BOTH)
    score(Session(whole), 0)
    calls, names = farm.calls, Counter(farm.restart())
    assert (calls, set(names.values())) == (6, {1})
    for n, finishes in ((1, 3), (2, 0), (2, 1), (5, 1), (6, 2)):
        run = copied(rolled_once, tmp_path / f"{n}-{finishes}", *BOTH)
        farm.restart(n, finishes)
        with pytest.raises(PartialError, match="the server died"):
            score(Session(run), 0)
        asked = farm.restart()
        score(Session(run), 0)
        assert Counter(asked + farm.restart()) == names
        assert tables_of(run) == tables_of(whole)
        assert not kept_files(run)


# --- addons: one teacher over all rows ------------------------------------------------------------------------------


def numbers(table: pa.Table, name: str) -> dict[str, Any]:
    return {c: flat(table[f"teacher_{c}.{name}"]) for c in ("logprob", "entropy")}


def test_an_added_teacher_keeps_its_own_scores_bit_by_bit_and_reads_the_other_rows(scored: Run) -> None:
    session = Session(scored)
    before = tables_of(scored)
    score(session, 0, add=["teacher.math", "teacher.code"])
    table = table_of(scored, ["teacher.math", "teacher.code"])
    assert {k: v for k, v in tables_of(scored).items() if k in before} == before, "sealed shards stay as they are"
    for name in ("math", "code"):
        rows = goes_to(table, name)
        for column in ("logprob", "entropy"):
            assert rows[f"teacher_{column}.{name}"].equals(rows[f"teacher_{column}"])
        evaluator = TransformersEvaluator(session.teacher(name), session.vocabulary, 300, 1 << 20)
        again = evaluator.evaluate(table)
        for column, values in numbers(table, name).items():
            np.testing.assert_allclose(values, flat(again[column]), rtol=1e-4, atol=1e-5)
        assert table[f"teacher_prompt_ids.{name}"].null_count == ROWS
        plain = [plain_logprobs(evaluator, r["prompt_ids"], r["response_ids"]) for r in table.to_pylist()]
        own = [p[np.arange(len(p)), r] for p, r in zip(plain, table["response_ids"].to_pylist(), strict=True)]
        entropies = [-(np.exp(p) * np.where(np.isfinite(p), p, 0.0)).sum(1) for p in plain]
        np.testing.assert_allclose(numbers(table, name)["logprob"], np.concatenate(own), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(numbers(table, name)["entropy"], np.concatenate(entropies), rtol=1e-4, atol=1e-5)
    manifest = sealed(scored.part("addons", 0, "teacher.math"))
    assert manifest.stats["teacher_logprob"] == pytest.approx(numbers(table, "math")["logprob"].mean())
    assert manifest.recorded["entropy_kind"] == "exact"


def test_an_added_teacher_reads_all_rows_behind_its_own_prompt(tmp_path: Path, places: Path, make_run: MakeRun) -> None:
    values = on_two(places, score={"teacher_prompt": "own"})
    values["teachers"]["math"] |= {"chat_template": str(places / "template.jinja"), "system": "then hence"}
    run = make_run(tmp_path / "run", **values)
    session = Session(run)
    rollout(session, 0)
    score(session, 0, add=["teacher.math", "teacher.code"])
    table = table_of(run, ["teacher.math", "teacher.code"])
    tokenizer = session.teacher_tokenizer("math")
    prompts = [
        tokenizer(f"| then hence | <user> {m[0]['content']} so <assistant>", add_special_tokens=False)["input_ids"]
        for m in table["messages"].to_pylist()
    ]
    assert table["teacher_prompt_ids.math"].to_pylist() == prompts
    assert table["teacher_prompt_ids.code"].null_count == ROWS, "its prompt is the student's"
    mine = goes_to(table, "math")
    assert mine["teacher_prompt_ids"].equals(mine["teacher_prompt_ids.math"])
    assert mine["teacher_logprob"].equals(mine["teacher_logprob.math"])
    assert goes_to(table, "code")["teacher_prompt_ids"].null_count == ROWS // 2
    evaluator = TransformersEvaluator(session.teacher("math"), session.vocabulary, 8192, 1 << 28)
    rows = table.select(["trajectory_id", "response_ids"]).append_column("prompt_ids", pa.array(prompts, IDS))
    again = evaluator.evaluate(rows)
    np.testing.assert_allclose(numbers(table, "math")["logprob"], flat(again["logprob"]), rtol=1e-4, atol=1e-5)
    shared = evaluator.evaluate(table)
    assert np.abs(flat(shared["logprob"]) - flat(again["logprob"])).max() > 1e-3, "the prompt matters"


@pytest.mark.parametrize(
    ("options", "made"),
    [
        (["--teachers", "all"], ["teacher.math", "teacher.code"]),
        (["--teachers", "math"], ["teacher.math"]),
        (["--teachers", "code, math"], ["teacher.math", "teacher.code"]),
        (["--add", "teacher.code"], ["teacher.code"]),
        (["--add", "teacher.math", "--teachers", "math", "--add", "base"], ["base", "teacher.math"]),
        (["--set", "score.add=[teacher.code]"], ["teacher.code"]),
    ],
    ids=["all", "one", "two", "add", "both", "configured"],
)
def test_teachers_are_added_by_name(fake: Run, fire: Fire, options: list[str], made: list[str]) -> None:
    answer = fire("score", fake.root, "--json", *options)
    assert answer.code == 0
    assert list(fake.addons(0)) == made
    assert {k for k in answer.json if k.startswith(("teacher.", "base"))} == set(made)
    assert fire("score", fake.root, *options).code == 0, "a finished one is left as it is"
    assert fire("check", fake.root).code == 0


@pytest.mark.parametrize(
    "options",
    [["--teachers", "phys"], ["--teachers", "math,phys"], ["--add", "teacher.phys"], ["--teachers", "teacher"]],
)
def test_a_teacher_that_is_not_there_is_refused_before_anything_is_made(
    fake: Run, fire: Fire, counted: Counted, options: list[str]
) -> None:
    answer = fire("score", fake.root, *options)
    assert answer.code == 2
    assert "math" in answer.err
    assert "code" in answer.err
    assert counted.calls == 0
    assert not (fake.root / ".fire" / "manifests" / "scores").exists()


def test_the_only_teacher_can_be_added_too(tmp_path: Path, make_fake_run: MakeRun, counted: Counted) -> None:
    run = make_fake_run(tmp_path / "run")
    rollout(Session(run), 0)
    score(Session(run), 0)
    calls = counted.calls
    score(Session(run), 0, add=run.teacher_addons("all"))
    assert counted.calls == calls, "all its numbers are there"
    table = table_of(run, ["teacher.teacher"])
    assert table["teacher_logprob.teacher"].equals(table["teacher_logprob"])


def test_redo_of_an_added_teacher_makes_it_alone_anew(fake: Run, fire: Fire, counted: Counted) -> None:
    score(Session(fake), 0, add=["teacher.math", "teacher.code"])
    before = tables_of(fake)
    places = [fake.root / ".fire" / "receipts" / "scores", fake.root / "scores", fake.root / "addons" / "teacher.code"]
    times = {p: p.stat().st_mtime_ns for place in places for p in place.rglob("*") if p.is_file()}
    counted.rows = []
    assert fire("score", fake.root, "--add", "teacher.math", "--redo").code == 0
    assert len(counted.rows) == ROWS // 2, "those of the other teacher"
    assert tables_of(fake) == before
    assert {p: p.stat().st_mtime_ns for p in times} == times
    counted.rows = []
    assert fire("score", fake.root, "--redo").code == 0
    assert len(counted.rows) == ROWS
    assert fake.addons(0) == (), "they were made from the scores"


def test_added_teachers_are_joined_to_scores_and_weights_and_exploded(fake: Run, fire: Fire) -> None:
    score(Session(fake), 0)
    with pytest.raises(IncompleteError) as caught:
        fake.scores(0, add="teacher.math")
    assert caught.value.fix is not None
    assert caught.value.fix.endswith("--add teacher.math")
    assert fire(*caught.value.fix.split()[1:]).code == 0
    with pytest.raises(ConfigError, match=r"teacher\.code"):
        fake.scores(0, add="teacher.phys")
    scores = fake.scores(add="teacher.math")
    weigh(fake, 0)
    for frame in (scores, fake.weights(add=["teacher.math"])):
        tokens = fd.explode(frame).collect()
        rows = frame.collect()
        assert tokens.height == int(rows["length"].sum())
        for column in ("teacher_logprob.math", "teacher_entropy.math"):
            assert tokens[column].to_list() == rows[column].explode().to_list()
        assert "teacher_prompt_ids.math" not in tokens.columns


def test_a_damaged_shard_of_an_added_teacher_is_found_and_made_again(fake: Run, fire: Fire, counted: Counted) -> None:
    score(Session(fake), 0, add=["teacher.math"])
    before = tables_of(fake)
    path = shard_files(fake.part("addons", 0, "teacher.math"))[1]
    flip(path, path.stat().st_size // 2)
    answer = fire("check", fake.root, "--json")
    assert answer.code == 3
    (damage,) = check(fake)
    assert damage["stage"] == "addons/teacher.math round-000"
    assert damage["fix"].endswith("--add teacher.math")
    with pytest.raises(DamagedError):
        fake.scores(0, add="teacher.math")
    counted.rows = []
    assert fire(*damage["fix"].split()[1:]).code == 0
    assert len(counted.rows) == 2, "the rows of the other teacher in this shard"
    assert tables_of(fake) == before
    assert check(fake) == []


def test_an_added_teacher_that_fails_asks_only_for_the_rest(tmp_path: Path, rolled_once: Path, farm: Farm) -> None:
    farm.alone = True
    run = copied(rolled_once, tmp_path / "run", *BOTH)
    score(Session(run), 0)
    whole = copied(run.root, tmp_path / "whole", *BOTH)
    farm.restart()
    score(Session(whole), 0, add=["teacher.math"])
    names = Counter(farm.restart(1, 1))
    assert sum(names.values()) == ROWS // 2
    with pytest.raises(PartialError):
        score(Session(run), 0, add=["teacher.math"])
    asked = farm.restart()
    score(Session(run), 0, add=["teacher.math"])
    assert Counter(asked + farm.restart()) == names
    assert tables_of(run) == tables_of(whole)
    assert not kept_files(run)


# --- columns that not every engine gives ----------------------------------------------------------------------------


def columns_of(run: Run) -> set[str]:
    """The columns of all shards of scores, which are the same in each."""
    schemas = [pq.read_schema(path).names for path in shard_files(run.part("scores", 0))]
    assert all(names == schemas[0] for names in schemas)
    return set(schemas[0])


@pytest.mark.parametrize("urls", [BOTH, MATH], ids=["all", "one"])
def test_scores_of_models_apart_lack_what_needs_both_and_equal_the_joint_ones_else(
    tmp_path: Path, rolled_once: Path, scored: Run, farm: Farm, urls: tuple[str, ...]
) -> None:
    run = copied(rolled_once, tmp_path / "run", *urls)
    manifest = score(Session(run), 0)
    lost = {*JOINT, *(f"{c}_{kind}" for c in ("reverse_kl", "forward_kl") for kind in ("sum", "max"))}
    assert columns_of(scored) - columns_of(run) == lost
    assert columns_of(run) < columns_of(scored)
    joint, apart = table_of(scored), table_of(run)
    assert [c for c in apart.column_names if not apart[c].equals(joint[c])] == []
    assert manifest.recorded["entropy_kind"] == {"student": "exact", "math": "exact", "code": "exact"}
    means = sealed(scored.part("scores", 0)).stats
    assert {k: v for k, v in manifest.stats.items() if "kl" not in k} == {
        k: v for k, v in means.items() if "kl" not in k
    }
    assert (manifest.stats["reverse_kl"], manifest.stats["forward_kl"]) == (None, None)


def test_a_teacher_elsewhere_reads_each_row_behind_its_own_prompt(
    tmp_path: Path, places: Path, make_run: MakeRun, farm: Farm
) -> None:
    values = on_two(places, score={"teacher_prompt": "own"})
    values["teachers"]["math"] |= {"chat_template": str(places / "template.jinja"), "system": "then hence"}
    joint = make_run(tmp_path / "joint", **values)
    rollout(Session(joint), 0)
    apart = copied(joint.root, tmp_path / "apart", *BOTH)
    score(Session(joint), 0)
    score(Session(apart), 0)
    one, other = table_of(joint), table_of(apart)
    assert one["teacher_prompt_ids"].null_count == ROWS // 2
    assert one["teacher_prompt_ids"].equals(other["teacher_prompt_ids"])
    for column in ("student_logprob", "teacher_logprob", "teacher_entropy"):
        np.testing.assert_allclose(flat(one[column]), flat(other[column]), rtol=1e-4, atol=1e-5)


def test_models_of_unequal_dtypes_apart_equal_the_joint_scores_within_rounding(
    tmp_path: Path, rolled_once: Path, farm: Farm
) -> None:
    double = ("teachers.code.dtype=float64",)
    joint = copied(rolled_once, tmp_path / "joint", *double)
    score(Session(joint), 0)
    apart = copied(rolled_once, tmp_path / "apart", *double, *BOTH)
    score(Session(apart), 0)
    one, other = table_of(joint), table_of(apart)
    for column in ("logprob", "entropy", "max_logprob"):
        for who in ("student", "teacher"):
            np.testing.assert_allclose(flat(one[f"{who}_{column}"]), flat(other[f"{who}_{column}"]), atol=1e-6)
    for column in ("student_top1_id", "teacher_top1_id", "student_rank", "teacher_rank"):
        assert one[column].equals(other[column]), column


def test_a_bound_beside_exact_entropies_has_its_mass_and_the_exact_ones_have_one(
    tmp_path: Path, rolled_once: Path, scored: Run, farm: Farm
) -> None:
    farm.kinds = {"code": Listing}
    run = copied(rolled_once, tmp_path / "run", f"teachers.code.url={URL}")
    manifest = score(Session(run), 0, add=["teacher.math", "teacher.code"])
    columns = columns_of(run)
    assert "teacher_entropy_mass" in columns
    assert "student_rank" in columns
    assert not columns & {"student_entropy_mass", "teacher_rank", *JOINT}
    assert manifest.recorded["entropy_kind"] == {"student": "exact", "math": "exact", "code": "topk-lower-bound"}
    table, exact = table_of(run), table_of(scored)
    math, code = goes_to(table, "math"), goes_to(table, "code")
    assert (flat(math["teacher_entropy_mass"]) == 1.0).all()
    masses = flat(code["teacher_entropy_mass"])
    assert ((masses > 0) & (masses < 1)).all()
    assert math["teacher_entropy"].equals(goes_to(exact, "math")["teacher_entropy"])
    bounds, entropies = flat(code["teacher_entropy"]), flat(goes_to(exact, "code")["teacher_entropy"])
    assert (bounds < entropies + 1e-5).all()
    assert (bounds < entropies - 1e-3).any()
    for column in ("teacher_logprob", "teacher_max_logprob", "student_entropy", "student_rank", "teacher_top1_id"):
        assert table[column].equals(exact[column]), column
    assert manifest.stats["teacher_entropy_mass"] == pytest.approx(flat(table["teacher_entropy_mass"]).mean())
    added = table_of(run, ["teacher.math", "teacher.code"])
    assert "teacher_entropy_mass.math" not in added.column_names, "all of its entropies are exact"
    assert (flat(added["teacher_entropy_mass.code"]) < 1).all()
    own = goes_to(added, "code")
    assert own["teacher_entropy_mass.code"].equals(own["teacher_entropy_mass"])
    kinds = {name: sealed(run.part("addons", 0, f"teacher.{name}")) for name in ("math", "code")}
    assert kinds["math"].recorded["entropy_kind"] == "exact"
    assert kinds["code"].recorded["entropy_kind"] == "topk-lower-bound"
    assert kinds["code"].stats["teacher_entropy_mass"] == pytest.approx(flat(added["teacher_entropy_mass.code"]).mean())


def test_a_teacher_without_rows_of_its_own_is_added_with_its_bound(
    tmp_path: Path, rolled_once: Path, places: Path, farm: Farm
) -> None:
    farm.kinds = {"phys": Listing}
    phys = (f"teachers.phys.model={places / 'math'}", f"teachers.phys.url={URL}")
    run = copied(rolled_once, tmp_path / "run", *phys)
    session = Session(run)
    manifest = score(session, 0, add=["teacher.phys"])
    assert set(manifest.fields["teachers"]) == {"math", "code"}
    table = table_of(run, ["teacher.phys"])
    assert (flat(table["teacher_entropy_mass.phys"]) < 1).all()
    assert sealed(run.part("addons", 0, "teacher.phys")).recorded["entropy_kind"] == "topk-lower-bound"


def test_a_server_that_came_back_with_other_columns_is_asked_again_for_what_was_kept(
    tmp_path: Path, places: Path, make_run: MakeRun, farm: Farm
) -> None:
    urls = (f"teachers.code.url={URL}",)
    made = make_run(tmp_path / "made", **on_two(places, rollout={"prompts_per_shard": 6}))
    rollout(Session(made), 0)
    farm.kinds, farm.alone = {"code": Listing}, True
    whole = copied(made.root, tmp_path / "whole", *urls)
    score(Session(whole), 0)
    run = copied(made.root, tmp_path / "run", *urls)
    farm.restart(1, 2)
    farm.kinds = {}
    with pytest.raises(PartialError):
        score(Session(run), 0)
    assert len(farm.restart()) == 2
    farm.kinds = {"code": Listing}
    score(Session(run), 0)
    assert len(farm.restart()) == ROWS // 2
    assert tables_of(run) == tables_of(whole)


def test_shards_with_other_columns_than_the_first_are_refused(tmp_path: Path, rolled_once: Path, farm: Farm) -> None:
    run = copied(rolled_once, tmp_path / "run", *BOTH)
    score(Session(run), 0, add=["teacher.math"])
    before = tables_of(run)
    path = shard_files(run.part("scores", 0))[1]
    path.unlink()
    farm.kinds = {"math": Listing}
    with pytest.raises(FingerprintError, match="gives other columns than when this stage was begun") as caught:
        score(Session(run), 0)
    assert all(word in caught.value.what for word in ("00000 has teacher_rank", "00001 has teacher_entropy_mass"))
    assert caught.value.where == "scores round-000, shard 00001"
    assert not path.exists()
    farm.kinds = {}
    score(Session(run), 0)
    assert tables_of(run) == before


def test_a_bound_is_not_stored_beside_exact_scores_of_the_same_teacher(
    tmp_path: Path, rolled_once: Path, farm: Farm
) -> None:
    run = copied(rolled_once, tmp_path / "run", *BOTH)
    score(Session(run), 0)
    farm.kinds = {"math": Listing}
    with pytest.raises(FingerprintError, match="teacher math now gives only bounds") as caught:
        score(Session(run), 0, add=["teacher.math"])
    assert "fire score" in str(caught.value.fix)
    farm.kinds = {}
    score(Session(run), 0, add=["teacher.math"])
    assert "teacher_entropy_mass.math" not in table_of(run, ["teacher.math"]).column_names


def test_topk_of_a_teacher_elsewhere_is_refused_in_words(rolled: Run, fire: Fire, farm: Farm) -> None:
    for options in (["--add", "topk"], ["--set", "score.add=[topk]"]):
        answer = fire("score", rolled.root, *options, *(f"--set={url}" for url in MATH))
        assert answer.code == 2
        assert "top-k needs the logits of student and teacher math together" in answer.err
        assert "score.engine=transformers" in answer.fix
        assert "url" in answer.fix
    assert not (rolled.root / ".fire" / "manifests" / "scores").exists()
    assert farm.asked == []


def test_commands_read_scores_that_lack_columns(tmp_path: Path, rolled_once: Path, fire: Fire, farm: Farm) -> None:
    run = copied(rolled_once, tmp_path / "run", *BOTH)
    score(Session(run), 0)
    assert [row["state"] for row in status(run)] == ["sealed", "sealed"]
    assert check(run) == []
    for command in ("status", "check", "inspect", "weigh", "compare", "diagnose"):
        answer = fire(command, run.root)
        assert answer.code == 0, answer.err
    row = fire("inspect", run.root, "--json").json
    assert "teacher_rank" in row
    assert "reverse_kl" not in row
    assert fd.explode(run.weights()).collect().height == sealed(run.part("scores", 0)).stats["tokens"]
    assert fire("diagnose", run.root, "--json").json["levels"]["problem"] == 0


def test_a_rule_that_needs_both_models_together_says_what_gives_it(
    tmp_path: Path, rolled_once: Path, fire: Fire, farm: Farm
) -> None:
    run = copied(rolled_once, tmp_path / "run", *BOTH)
    score(Session(run), 0)
    for rule, column in (("tip", "reverse_kl"), ("selectkd", "teacher_rank_of_student_top1")):
        answer = fire("weigh", run.root, "--rule", rule)
        assert answer.code == 2
        assert f"'{column}', which is not there" in answer.err
        assert "--redo --set score.engine=transformers" in answer.fix
    words = answer.fix.partition(",")[0].split()[1:]
    assert fire(*words).code == 0, "as it is without a url"
    assert fire("weigh", run.root, "--rule", "tip").code == 0


def test_findings_of_scores_without_ranks_and_divergences_are_those_of_all_columns_where_they_need_none(
    tmp_path: Path, rolled_once: Path, scored: Run, farm: Farm
) -> None:
    farm.kinds = {"math": Listing, "code": Listing}
    run = copied(rolled_once, tmp_path / "run", *BOTH)
    score(Session(run), 0)
    found = {f.name: f for f in diagnose_round(run, 0)}
    whole = {f.name: f for f in diagnose_round(scored, 0)}
    assert found.keys() == whole.keys()
    for name in ("premise", "outliers", "low-low", "length", "repetition", "end-token", "rollout-drift"):
        for fact in ("level", "measured", "numbers"):
            assert getattr(found[name], fact) == getattr(whole[name], fact), name
    assert found["teacher-fit"].numbers["teacher_rank_1_share"] is None
    assert found["teacher-fit"].numbers["student_rank_1_share"] == whole["teacher-fit"].numbers["student_rank_1_share"]
    assert "reverse_kl" not in found["teacher-decay"].numbers["slope"]
    assert set(found["shift"].numbers["rank_and_top1_disagree_by_lag"]) == {"student"}
    assert found["consistency"].level == "ok", found["consistency"].measured
    assert found["consistency"].numbers["relations"] < whole["consistency"].numbers["relations"]


def test_agreement_of_models_apart_is_not_known(tmp_path: Path, rolled_once: Path, scored: Run) -> None:
    frame = scored.scores(0).collect()
    longer = frame.with_columns(
        pl.col(c).list.eval(pl.element().repeat_by(20).explode()) for c in frame.columns if token_column(c)
    )
    known, unknown = measure(longer), measure(longer.drop([*JOINT, "teacher_rank"]))
    assert known.windows.height == unknown.windows.height > 0
    assert unknown.totals.keys() < known.totals.keys()
    assert {k: v for k, v in known.totals.items() if k in unknown.totals} == unknown.totals
    finding = next(f for f in diagnose(unknown) if f.name == "agreement-trap")
    assert finding.level == "unknown"
    assert "there is no reverse_kl" in finding.measured


def token_column(name: str) -> bool:
    return any(c.name == name and c.per == "token" for c in TABLES["scores"])


def test_a_table_without_ranks_can_be_looked_at(tmp_path: Path, rolled_once: Path, fire: Fire, farm: Farm) -> None:
    farm.kinds = {"math": Listing, "code": Listing}
    run = copied(rolled_once, tmp_path / "run", *BOTH)
    score(Session(run), 0)
    answer = fire("inspect", run.root)
    assert answer.code == 0
    assert "rank" not in answer.out
    assert "H T" in answer.out
    assert fire("weigh", run.root, "--set", "weigh.entropy=any").code == 0
    refused = fire("weigh", run.root, "--redo")
    assert refused.code == 2
    assert "topk-lower-bound" in refused.err


def test_rounds_with_different_optional_columns_are_read_together(
    tmp_path: Path, rolled_once: Path, fire: Fire, farm: Farm
) -> None:
    apart = copied(rolled_once, tmp_path / "run", *BOTH)
    session = Session(apart)
    score(session, 0, add=["teacher.math"])
    weigh(apart, 0)
    train(session, 0)
    joint = open_run(apart.root)
    session = Session(joint)
    rollout(session, 1)
    score(session, 1, add=["teacher.math"])
    weigh(joint, 1)
    both = joint.scores(add="teacher.math").collect()
    assert both.height == 2 * ROWS
    by_round = both.group_by("round", maintain_order=True).agg(pl.col("reverse_kl").null_count())
    assert by_round.rows() == [(0, ROWS), (1, 0)]
    for number in (0, 1):
        alone = joint.scores(number, add="teacher.math").collect()
        part = both.filter(pl.col("round") == number).select(alone.columns)
        assert part.equals(alone)
    assert joint.weights().collect().height == 2 * ROWS
    assert ("reverse_kl" in joint.scores(0).collect_schema(), "reverse_kl" in joint.scores(1).collect_schema()) == (
        False,
        True,
    )


# --- the pass rate of each prompt's own teacher ----------------------------------------------------------------------


def test_the_pass_rate_is_that_of_the_prompts_own_teacher(fake: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fire_data.steps import passrate

    session = Session(fake)
    tokenizer = session.tokenizer
    rows = fake.rollouts(0).collect().to_arrow().to_pylist()
    answers = {
        tuple(row["prompt_ids"]): tokenizer(row["answer"], add_special_tokens=False)["input_ids"] for row in rows
    }
    assert len(answers) == len(PLACES)
    asked: dict[str, list[tuple[int, ...]]] = {}

    class Knows:
        """Right where the name of the teacher is `math`, else never."""

        def __init__(self, name: str) -> None:
            self.name = name

        def generate(self, requests: pa.Table, *_: Any) -> pa.Table:
            prompts = [tuple(ids) for ids in requests["prompt_ids"].to_pylist()]
            asked.setdefault(self.name, []).extend(prompts)
            texts = [answers[p] if self.name == "math" else [answers[p][0]] * 7 for p in prompts]
            zeros = pa.array([[0.0] * len(t) for t in texts], FLOATS)
            return pa.table({
                "response_ids": pa.array(texts, IDS), "rollout_logprob": zeros, "finish_reason": ["stop"] * len(texts),
            })  # fmt: skip

    monkeypatch.setattr(passrate, "teacher_generator", lambda _, name: Knows(name))
    add_columns(session, 0, "pass-rate")
    score(session, 0)
    table = table_of(fake, ["pass-rate"])
    rates = {"math": {1.0}, "code": {0.0}}
    for name, wanted in rates.items():
        mine = goes_to(table, name)
        assert set(mine["teacher_pass_rate"].to_pylist()) == wanted
        prompts = {tuple(ids) for ids in mine["prompt_ids"].to_pylist()}
        assert Counter(asked[name]) == dict.fromkeys(prompts, fake.config.score.pass_rate_samples)
    stats = sealed(fake.part("addons", 0, "pass-rate")).stats
    assert (stats["teacher_pass_rate"], stats["never_right"], stats["always_right"]) == (0.5, 0.5, 0.5)


def test_every_teacher_writes_its_answers_itself(fake: Run) -> None:
    """Not as the student: each has noise of its own prompts, and grades by hand are those that are stored."""
    from fire_data.engines import FakeGenerator
    from fire_data.schedule import hash_text
    from fire_data.steps.engines import sampling, teacher_generator

    session = Session(fake)
    score(session, 0, add=["pass-rate"])
    for name in ("math", "code"):
        generator = teacher_generator(session, name)
        assert isinstance(generator, FakeGenerator)
        assert generator.ids.tolist() == session.teacher_vocabulary(name).allowed.nonzero()[0].tolist()
    for row in table_of(fake, ["pass-rate"]).to_pylist():
        names = [hash_text(0, "pass-rate", row["prompt_id"], j) for j in range(fake.config.score.pass_rate_samples)]
        requests = pa.table({"trajectory_id": names, "prompt_ids": pa.array([row["prompt_ids"]] * len(names), IDS)})
        made = teacher_generator(session, row["teacher"]).generate(requests, sampling(session))
        texts = session.tokenizer.batch_decode(made["response_ids"].to_pylist(), skip_special_tokens=True)
        pattern = verify.compile_pattern(None)
        right = [verify.exact(text, row["answer"], pattern) for text in texts]
        assert row["teacher_pass_rate"] == pytest.approx(sum(right) / len(right))


# Teachers that write.


def test_a_teacher_that_writes_answers_the_prompts_of_its_route_and_the_student_is_trained_on_that(
    tmp_path: Path, places: Path, make_run: MakeRun
) -> None:
    """`rollout_logprob` is that of the writer: its own score of the same tokens. No drift is told, but a warning is."""
    heard = Heard()
    imitation = {"rule": {"advantage": "1"}}
    run = make_run(tmp_path / "run", **on_two(places, rollout={"writer": "teacher"}, weigh=imitation))
    session = Session(run, heard)
    rollout(session, 0)
    assert any("writer teacher" in text for text in heard.warnings)
    manifest = score(session, 0)
    assert manifest.stats["rollout_drift"] is None
    table = table_of(run)
    assert {*table["teacher"].to_pylist()} == {"math", "code"}
    np.testing.assert_allclose(flat(table["rollout_logprob"]), flat(table["teacher_logprob"]), atol=1e-4)
    assert np.abs(flat(table["rollout_logprob"]) - flat(table["student_logprob"])).mean() > 0.01
    weigh(run, 0)
    tokens = table["student_logprob"].to_pylist()
    coefficients = [c for row in run.weights(round=0).collect()["coefficient"].to_list() for c in row]
    assert len(coefficients) == sum(map(len, tokens))
    assert min(coefficients) > 0
    train(session, 0)
    assert {*sealed(run.part("rollouts", 0)).fields["writers"]} == {"math", "code"}
    assert check(run) == []


def test_who_writes_is_not_in_the_fingerprint_of_rollouts_that_the_student_wrote(rolled: Run) -> None:
    fields = sealed(rolled.part("rollouts", 0)).fields
    assert "writer" not in fields["rollout"]
    assert "writers" not in fields


def test_a_teacher_with_a_prompt_of_its_own_does_not_write(places: Path) -> None:
    values = {"student": {"model": "m"}, "rollout": {"writer": "teacher"}, "score": {"teacher_prompt": "own"}}
    with pytest.raises(ConfigError, match=r"writer: teacher needs score\.teacher_prompt: shared"):
        parse_config(values, "here")
