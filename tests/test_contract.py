"""Tables, tokenizers, templates and system messages fit together, or `weigh` and `train` refuse by name."""

from __future__ import annotations

import functools
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from transformers import AutoTokenizer

from fire_data import contract
from fire_data.run import Run, open_run
from fire_data.schemas.config import ModelConfig
from fire_data.schemas.errors import FingerprintError
from fire_data.session import Session
from fire_data.shards import sealed
from fire_data.stages import Silent
from fire_data.steps.rollout import rollout
from fire_data.steps.score import score
from fire_data.steps.train import train
from fire_data.steps.weigh import weigh

from .conftest import Answer

Fire = Callable[..., Answer]
MakeRun = Callable[..., Run]

OTHER = (
    "{%- for m in messages -%}{%- if m['role'] == 'system' -%}{{ '| ' + m['content'] + ' | ' }}"
    "{%- else -%}{{ '<user> now ' + m['content'] + ' ' }}{%- endif -%}{%- endfor -%}<assistant>"
)
PLAIN = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


class Heard(Silent):
    """A Reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def places(tmp_path: Path, tiny_world: Any) -> Path:
    """Folders `student`, `math` and `code` with models of their own, and prompts that go to both teachers in turn."""
    root = tmp_path / "models"
    for name, source in (("student", "student"), ("math", "teacher"), ("code", "student")):
        shutil.copytree(getattr(tiny_world, source), root / name)
    rows = [json.loads(line) for line in tiny_world.prompts.read_text().splitlines()]
    routed = [{**row, "teacher": ("math", "code")[i % 2]} for i, row in enumerate(rows)]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in routed))
    return root


def on_two(places: Path, **more: Any) -> dict[str, Any]:
    """What `make_run` is given for two teachers."""
    teachers = {name: {"model": str(places / name)} for name in ("math", "code")}
    return {
        "student": {"model": str(places / "student")}, "teacher": None, "teachers": teachers,
        "prompts": {"path": str(places / "prompts.jsonl")}, **more,
    }  # fmt: skip


@pytest.fixture
def scored(tmp_path: Path, places: Path, make_fake_run: MakeRun, fire: Fire) -> Run:
    """A dry run with two teachers, up to the scores; no weights are under it yet."""
    run = make_fake_run(tmp_path / "run", **on_two(places, score={"teacher_prompt": "own"}))
    for stage in ("rollout", "score"):
        assert fire(stage, run.root).code == 0
    return run


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    value.pop("checksum", None)  # as earlier versions wrote records, which vouch for nothing
    path.write_text(json.dumps(change(value) or value))


def other_end(folder: Path) -> None:
    """The same ids, another one of them ends a response."""
    edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token="<user>", extra_special_tokens=["<eos>"]))


def other_ids(folder: Path) -> None:
    """Two tokens change places."""
    edit(folder / "tokenizer.json", lambda t: t["model"]["vocab"].update({"0": 6, "1": 5}))


def fewer_rows(folder: Path) -> None:
    """The model no longer predicts the last id."""
    edit(folder / "config.json", lambda c: c.update(vocab_size=c["vocab_size"] - 1))


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<user> ", "<user> | "))


@pytest.mark.parametrize(
    ("who", "change", "names", "redo"),
    [
        ("student", other_end, {"student.tokenizer"}, "rollout"),
        ("student math code", other_ids, {"student.tokenizer"}, "rollout"),
        ("student", other_template, {"student.chat_template"}, "rollout"),
        ("math", other_end, {"teachers.math.tokenizer"}, "score"),
        ("math", fewer_rows, {"vocabulary.size", "vocabulary.allowed"}, "rollout"),
        ("code", other_template, {"teachers.code.chat_template"}, "score"),
    ],
)
@pytest.mark.parametrize("stage", ["weigh", "train"])
def test_models_that_read_ids_or_write_prompts_otherwise_than_the_tables_say_are_refused(
    scored: Run, places: Path, fire: Fire, stage: str, who: str, change: Callable[[Path], None], names: set[str],
    redo: str,
) -> None:  # fmt: skip
    if stage == "train":
        assert fire("weigh", scored.root).code == 0
    for name in who.split():
        change(places / name)
    answer = fire(stage, scored.root)
    assert answer.code == 2
    listed = answer.err.partition("names now: ")[2].partition("\n")[0]
    assert {item.partition(": ")[0] for item in listed.split("; ")} == names
    assert f"fire {redo} {shlex.quote(str(scored.root))} --round 0 --redo" in answer.fix
    assert not scored.part("checkpoints", 0).manifest_path.exists()
    assert scored.part("weights", 0).manifest_path.exists() == (stage == "train")


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["teachers.math.system=so"], "teachers.math.system"),
        (["teachers.code.chat_template_kwargs={a: 1}"], "teachers.code.chat_template"),
        (["student.chat_template_kwargs={a: 1}"], "student.chat_template"),
        (["score.teacher_prompt=shared"], "score.teacher_prompt"),
        (["rollout.raw=true"], "rollout.raw"),
    ],
)
def test_other_settings_of_prompts_are_refused_and_may_be_set_back(
    scored: Run, fire: Fire, options: list[str], name: str
) -> None:
    changed = [x for o in options for x in ("--set", o)]
    answer = fire("weigh", scored.root, *changed)
    assert answer.code == 2
    assert f"{name}: " in answer.err
    assert "set back" in answer.fix
    assert fire("weigh", scored.root).code == 0
    assert f"{name}: " in fire("train", scored.root, *changed).err


def test_a_template_file_of_the_configuration_counts_with_its_content(
    tmp_path: Path, places: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    (places / "own.jinja").write_text(OTHER)
    values = on_two(places, score={"teacher_prompt": "own"})
    values["teachers"]["math"] |= {"chat_template": str(places / "own.jinja"), "system": "so"}
    run = make_fake_run(tmp_path / "run", **values)
    for stage in ("rollout", "score", "weigh"):
        assert fire(stage, run.root).code == 0
    (places / "own.jinja").write_text(OTHER.replace("now", "next"))
    refused = fire("weigh", run.root)
    assert refused.code == 2
    assert "teachers.math.chat_template: " in refused.err
    (places / "own.jinja").unlink()
    answer = fire("weigh", run.root)
    assert answer.code == 0, "a file that stayed on another machine cannot be compared"
    assert "chat template of math is not compared" in answer.err


def test_a_difference_without_consequence_passes_and_is_looked_at_once_only_where_it_is(
    scored: Run, places: Path, fire: Fire, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    real = contract._tokenizer
    monkeypatch.setattr(contract, "_tokenizer", lambda run, who, *rest: looked.append(who) or real(run, who, *rest))
    assert fire("weigh", scored.root).code == 0
    assert looked == []
    tokenizer = places / "math" / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=7))
    assert fire("weigh", scored.root).code == 0
    assert sorted(looked) == ["code", "math", "student"], "whose ids are common is asked of all"
    answer = fire("weigh", scored.root, "--set", "teachers.code.model=" + str(places / "student"))
    assert answer.code == 0, "the same files elsewhere are the same model"


def test_tables_of_an_older_version_without_a_record_of_files_are_compared_exactly(
    scored: Run, places: Path, fire: Fire
) -> None:
    for stage in ("rollouts", "scores"):
        edit(scored.part(stage, 0).manifest_path, lambda m: m["recorded"].pop("reads") and m)
    assert fire("weigh", scored.root).code == 0
    other_end(places / "code")
    assert "teachers.code.tokenizer: " in fire("weigh", scored.root).err


def test_models_that_are_not_here_are_told_and_not_compared(scored: Run, places: Path, fire: Fire) -> None:
    shutil.rmtree(places / "math")
    answer = fire("weigh", scored.root, "--set", "student.model=some/where")
    assert answer.code == 0
    assert "not on this machine" in answer.err
    assert "student (some/where), math (" in answer.err
    assert "code (" not in answer.err
    other_end(places / "code")
    assert fire("weigh", scored.root, "--set", "student.model=some/where").code == 2, "the others still are"
    wrong = fire("weigh", scored.root, "--set", "teachers.math.system=so")
    assert wrong.code == 2, "and what the settings alone decide"


def test_scores_without_their_rollouts_are_enough_to_weigh(scored: Run, places: Path, fire: Fire) -> None:
    part = scored.part("rollouts", 0)
    shutil.rmtree(part.folder)
    shutil.rmtree(part.receipts)
    part.manifest_path.unlink()
    other_end(places / "student")
    assert fire("weigh", scored.root).code == 2
    shutil.rmtree(places)
    answer = fire("weigh", scored.root)
    assert answer.code == 0
    assert sealed(scored.part("weights", 0)).recorded["sampling"] == PLAIN


def test_a_tokenizer_that_cannot_be_read_is_warned_about(scored: Run, places: Path, fire: Fire) -> None:
    (places / "code" / "tokenizer.json").write_text("{")
    answer = fire("weigh", scored.root)
    assert answer.code == 0
    assert "warning: the files that say how code" in answer.err
    assert "not compared" in answer.err


def test_a_teacher_more_that_lacks_ids_is_refused_and_one_that_has_them_all_is_not(
    scored: Run, places: Path, fire: Fire
) -> None:
    shutil.copytree(places / "code", places / "more")
    more = ("--set", f"teachers.more.model={places / 'more'}")
    assert fire("weigh", scored.root, *more).code == 0
    fewer_rows(places / "more")
    answer = fire("weigh", scored.root, *more)
    assert answer.code == 2
    assert "vocabulary.allowed: " in answer.err


def test_a_hub_model_is_looked_for_in_the_cache_and_nowhere_else(
    tmp_path: Path, places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cfg = ModelConfig(model="some/where")
    assert contract.model_folder(cfg, tmp_path) is None
    stored = tmp_path / "hub" / "models--some--where"
    shutil.copytree(places / "math", stored / "snapshots" / "abc")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    assert contract.model_folder(cfg, tmp_path) == stored / "snapshots" / "abc"
    digest = contract.files_digest(ModelConfig(model=str(places / "math")), tmp_path)
    assert contract.files_digest(cfg, tmp_path) == digest, "where files lie is no part of what they mean"
    assert contract.model_folder(cfg.model_copy(update={"revision": "v2"}), tmp_path) is None
    for name in ("./nowhere", "a/b/c", "/no/such/folder"):
        assert contract.model_folder(ModelConfig(model=name), tmp_path) is None


def test_a_hub_model_with_other_files_is_read_from_the_cache(
    scored: Run, tmp_path: Path, places: Path, fire: Fire, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fetch(*_: Any, **__: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    stored = tmp_path / "hub" / "models--some--where"
    shutil.copytree(places / "math", stored / "snapshots" / "abc")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    hub = ("--set", "teachers.math.model=some/where")
    assert fire("weigh", scored.root, *hub).code == 0
    edit(stored / "snapshots" / "abc" / "tokenizer.json", lambda t: dict(reversed(t.items())))
    assert fire("weigh", scored.root, *hub).code == 0
    other_end(stored / "snapshots" / "abc")
    assert fire("weigh", scored.root, *hub).code == 2


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("chat_template.jinja", True), ("tokenizer.json", True), ("tokenizer_config.json", True), ("merges.txt", True),
        ("special_tokens_map.json", True), ("config.json", True), ("additional_chat_templates/tools.jinja", True),
        ("generation_config.json", False), ("model.safetensors", False), ("README.md", False),
    ],
)  # fmt: skip
def test_the_digest_is_of_the_files_that_decide(tmp_path: Path, places: Path, name: str, changes: bool) -> None:
    cfg = ModelConfig(model=str(places / "math"))
    before = contract.files_digest(cfg, tmp_path)
    path = places / "math" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((path.read_bytes() if path.exists() else b"") + b" ")
    assert (contract.files_digest(cfg, tmp_path) != before) == changes


def test_weighing_loads_no_torch_where_nothing_changed(scored: Run) -> None:
    script = (
        f"import sys; sys.argv = ['fire', 'weigh', {str(scored.root)!r}]\n"
        "from fire_data.cli import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "print('LOADED', sorted({'torch', 'transformers', 'tokenizers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rpartition("LOADED ")[2].strip() == "[]"


def test_columns_of_another_teacher_than_the_scores_are_refused(scored: Run, places: Path, fire: Fire) -> None:
    edit(places / "math" / "generation_config.json", lambda c: c.update(note="other weights, for all that is known"))
    assert fire("score", scored.root, "--add", "pass-rate").code == 2, "the scores themselves are out of date"
    run = open_run(scored.root)
    from fire_data.steps.columns import add_columns

    add_columns(Session(run), 0, "teacher.math")
    add_columns(Session(run), 0, "teacher.code")
    assert fire("weigh", scored.root).code == 0, "columns that are not read do not matter"
    answer = fire("weigh", scored.root, "--rule", "uniform", "--set", "weigh.teacher=average")
    assert answer.code == 2
    assert "addons/teacher.math round-000 was made with other models" in answer.err
    assert "teachers.math.weights: " in answer.err
    assert "--add teacher.math --redo" in answer.fix


def test_training_on_columns_of_another_teacher_is_refused(
    tmp_path: Path, places: Path, make_fake_run: MakeRun, fire: Fire
) -> None:
    values = on_two(places, weigh={"rule": "uniform", "teacher": "average"})
    run = make_fake_run(tmp_path / "run", **values)
    assert fire("rollout", run.root).code == 0
    assert fire("score", run.root, "--add", "teacher.math", "--add", "teacher.code").code == 0
    assert fire("weigh", run.root).code == 0
    edit(run.part("addons", 0, "teacher.code").manifest_path, lambda m: m["fields"]["teacher"].update(weights="x"))
    answer = fire("train", run.root)
    assert answer.code == 2
    assert "teachers.code.weights: " in answer.err
    assert "--add teacher.code --redo" in answer.fix


def test_manifests_that_disagree_are_refused_though_every_model_is_gone(scored: Run, places: Path, fire: Fire) -> None:
    shutil.rmtree(places)
    edit(scored.part("rollouts", 0).manifest_path, lambda m: m["fields"]["vocabulary"].update(allowed="x"))
    answer = fire("weigh", scored.root)
    assert answer.code == 2
    assert "vocabulary.allowed: " in answer.err
    assert answer.fix == f"fire score {scored.root} --round 0 --redo"


def test_a_server_is_where_a_teacher_runs_and_no_fact_about_it(scored: Run) -> None:
    made = sealed(scored.part("scores", 0))
    served = {n: {**t, "served": True} for n, t in made.fields["teachers"].items()}
    assert contract.facts(made.model_copy(update={"fields": {**made.fields, "teachers": served}})) == contract.facts(
        made
    )


@pytest.mark.parametrize(
    ("settings", "told"),
    [({}, ""), ({"temperature": 0.7}, "temperature 0.7"), ({"top_p": 0.9, "top_k": 5}, "top_p 0.9, top_k 5")],
)
def test_sampling_that_is_not_the_full_distribution_is_recorded_and_warned_about_unless_it_is_corrected(
    tmp_path: Path, make_fake_run: MakeRun, fire: Fire, settings: dict[str, Any], told: str
) -> None:
    run = make_fake_run(tmp_path / "run", rollout=settings)
    first = fire("rollout", run.root)
    assert (f"sampling with {told} is not" in first.err) == bool(told)
    scores = fire("score", run.root, "--json")
    assert (f"sampled with {told}: rollout_logprob is under another" in scores.err) == bool(told)
    assert (scores.json["rollout_drift"] is None) == bool(told)
    answer = fire("weigh", run.root)
    assert answer.code == 0
    assert (f"sampled with {told}, not from the student's full distribution" in answer.err) == bool(told)
    assert "full distribution" in answer.err or not told
    corrected = fire("weigh", run.root, "--set", "weigh.rollout_is_cap=5", "--name", "corrected")
    assert "full distribution" not in corrected.err
    for part in (run.part("scores", 0), run.part("weights", 0), run.part("weights", 0, "corrected")):
        assert sealed(part).recorded["sampling"] == PLAIN | settings


def shifted(monkeypatch: pytest.MonkeyPatch, by: float) -> None:
    """Let the engine that writes be off by so many nats at every token."""
    from fire_data.generate import TransformersGenerator

    real = TransformersGenerator.generate

    def generate(self: Any, requests: pa.Table, *rest: Any, **more: Any) -> pa.Table:
        made = real(self, requests, *rest, **more)
        column = made["rollout_logprob"].combine_chunks()
        values = pa.array(column.values.to_numpy() + np.float32(by), pa.float32())
        moved = pa.ListArray.from_arrays(column.offsets, values, type=column.type)
        return made.set_column(made.column_names.index("rollout_logprob"), "rollout_logprob", moved)

    monkeypatch.setattr(TransformersGenerator, "generate", generate)


def weighed(run: Run, cap: float | None) -> pa.Table:
    """The weights table, joined to the scores, without and with the correction."""
    name = "plain" if cap is None else "corrected"
    chosen = open_run(run.root, (f"weigh.rollout_is_cap={'null' if cap is None else cap}", f"weigh.name={name}"))
    weigh(chosen, 0)
    return chosen.weights(name, 0).collect().to_arrow()


def flat(table: pa.Table, name: str) -> Any:
    return pc.list_flatten(table[name]).to_numpy().astype(np.float64)


@pytest.mark.parametrize(("by", "cap"), [(-0.2, 5.0), (-2.0, 5.0), (0.3, 5.0)])
def test_drift_between_engines_is_measured_told_and_corrected_up_to_the_cap(
    tmp_path: Path, make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, by: float, cap: float
) -> None:
    shifted(monkeypatch, by)
    heard = Heard()
    run = make_run(tmp_path / "run", train={"weights": "corrected"})
    session = Session(run, heard)
    rollout(session, 0)
    stats = score(session, 0).stats
    assert stats["rollout_drift"] == pytest.approx(abs(by), rel=1e-3)
    assert stats["rollout_drift_max"] == pytest.approx(abs(by), rel=1e-2)
    (told,) = (w for w in heard.warnings if "rescored" in w)
    assert f"{abs(by):.2g} nats on average" in told
    assert "weigh.rollout_is_cap=5" in told
    plain, corrected = weighed(run, None), weighed(run, cap)
    assert "rollout_is" not in plain.column_names
    factor = np.minimum(np.exp(flat(plain, "student_logprob") - flat(plain, "rollout_logprob")), cap)
    np.testing.assert_allclose(flat(corrected, "rollout_is"), factor, rtol=1e-5)
    np.testing.assert_allclose(factor, min(np.exp(-by), cap), rtol=1e-3)
    np.testing.assert_allclose(flat(corrected, "coefficient"), flat(plain, "coefficient") * factor, rtol=1e-5)
    assert np.abs(flat(plain, "coefficient")).max() > 0
    assert train(session, 0).stats["skipped_steps"] == 0


def test_drift_within_rounding_is_told_too(tmp_path: Path, make_run: MakeRun) -> None:
    heard = Heard()
    session = Session(make_run(tmp_path / "run"), heard)
    rollout(session, 0)
    assert score(session, 0).stats["rollout_drift"] < 1e-4
    assert [n for n in heard.notes if n.startswith("rollout and rescored logprobs differ by ")]
    assert not [w for w in heard.warnings if "rescored" in w]


def test_top_p_sampling_is_corrected_by_the_ratio_to_the_full_distribution(tmp_path: Path, make_run: MakeRun) -> None:
    """Within the nucleus the sampler is too sure by 1 / its mass: every factor is that mass, and below 1."""
    run = make_run(tmp_path / "run", rollout={"top_p": 0.6})
    session = Session(run)
    rollout(session, 0)
    score(session, 0)
    corrected, plain = weighed(run, 5.0), weighed(run, None)
    factor = flat(corrected, "rollout_is")
    assert factor.max() < 1 + 1e-4
    assert 0.6 - 1e-4 <= factor.min() < 0.99
    np.testing.assert_allclose(flat(corrected, "coefficient"), flat(plain, "coefficient") * factor, rtol=1e-5)


def own_prompts(places: Path) -> dict[str, Any]:
    """Two teachers with templates and system messages of their own."""
    (places / "other.jinja").write_text(OTHER)
    (places / "code" / "chat_template.jinja").write_text(
        "{%- for m in messages -%}{{ m['role'] == 'system' and '# ' + m['content'] + ' ' or '<user> ' + m['content'] }}"
        "{%- endfor -%}{{ ' ' + (sign or ';') + ' <assistant>' }}"
    )
    values = on_two(places, score={"teacher_prompt": "own"})
    values["teachers"]["math"] |= {"chat_template": str(places / "other.jinja"), "system": "so then ok"}
    values["teachers"]["code"] |= {"system": "hence", "chat_template_kwargs": {"sign": "="}}
    return values


EXPECTED = {"math": "| so then ok | <user> now {} <assistant>", "code": "# hence <user> {} = <assistant>"}


def expected_ids(places: Path, name: str, messages: Sequence[dict[str, str]]) -> list[int]:
    """A teacher's prompt, spelled out."""
    tokenizer = tokenizer_of(places / name)
    return list(tokenizer(EXPECTED[name].format(messages[0]["content"]), add_special_tokens=False)["input_ids"])


@functools.cache
def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_every_row_is_scored_behind_the_prompt_of_its_own_teacher(
    tmp_path: Path, places: Path, make_run: MakeRun
) -> None:
    from fire_data.scoring import TransformersScorer

    run = make_run(tmp_path / "run", **own_prompts(places))
    session = Session(run)
    rollout(session, 0)
    manifest = score(session, 0, add=["teacher.math", "teacher.code"])
    rows = run.scores(0, add=["teacher.math", "teacher.code"]).collect().to_arrow()
    assert set(rows["teacher"].to_pylist()) == {"math", "code"}
    for name in ("math", "code"):
        prompts = [expected_ids(places, name, messages) for messages in rows["messages"].to_pylist()]
        assert rows[f"teacher_prompt_ids.{name}"].to_pylist() == prompts
        mine = np.array([route == name for route in rows["teacher"].to_pylist()])
        behind = [ids for ids, m in zip(prompts, mine, strict=True) if m]
        assert rows.filter(pa.array(mine))["teacher_prompt_ids"].to_pylist() == behind
        scorer = TransformersScorer(session.student(0), session.teacher(name), session.vocabulary, 8192, 1 << 28)
        plain = rows.select(["prompt_ids", "response_ids"])
        again = scorer.score(plain.append_column("teacher_prompt_ids", pa.array(prompts, pa.list_(pa.int32()))))
        np.testing.assert_allclose(
            flat(rows, f"teacher_logprob.{name}"), flat(again, "teacher_logprob"), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            flat(rows.filter(pa.array(mine)), "teacher_logprob"),
            flat(again.filter(pa.array(mine)), "teacher_logprob"),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
        shared = flat(scorer.score(plain), "teacher_logprob")
        assert np.abs(shared - flat(again, "teacher_logprob")).max() > 1e-3, "the prompt matters to this teacher"
    lengths = {len(ids) for ids in rows["prompt_ids"].to_pylist()}
    assert len(lengths) == 1
    offsets = {n: t["prompt_offset"] for n, t in manifest.stats["teachers"].items()}
    assert offsets == {"math": {"least": 6, "most": 6}, "code": {"least": 3, "most": 3}}


def test_the_only_teacher_tells_its_prompt_offset_where_it_has_prompts_of_its_own(
    tmp_path: Path, places: Path, make_fake_run: MakeRun
) -> None:
    (places / "other.jinja").write_text(OTHER)
    teacher = {"model": str(places / "math"), "chat_template": str(places / "other.jinja"), "system": "so"}
    own = make_fake_run(tmp_path / "own", teacher=teacher, score={"teacher_prompt": "own"})
    shared = make_fake_run(tmp_path / "shared")
    found = {}
    for run in (own, shared):
        rollout(Session(run), 0)
        found[run.root.name] = score(Session(run), 0)
    assert found["own"].stats["teachers"]["teacher"]["prompt_offset"] == {"least": 4, "most": 4}
    assert found["own"].fields["teachers"]["teacher"]["system"] == "so"
    assert "teachers" not in found["shared"].stats
    changed = open_run(own.root, ("teacher.system=ok",))
    with pytest.raises(FingerprintError, match=r"teacher\.system: \"so\" -> \"ok\""):
        weigh(changed, 0)
