"""`fire.yaml`: wrong keys are named with what was meant, written files read back, fingerprints cover what they must."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fire_data.schemas.config import Config, Section, load_config, parse_config, parse_yaml, render_config
from fire_data.schemas.errors import ConfigError
from fire_data.schemas.manifest import digest

MINIMAL: dict[str, Any] = {"student": {"model": "m"}}
SECTIONS = {
    name: next(t for t in (f.annotation, *typing.get_args(f.annotation)) if isinstance(t, type) and t is not str)
    for name, f in Config.model_fields.items()
    if name not in ("seed", "threads")
}


def write(folder: Path, text: str) -> Path:
    path = folder / "fire.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rolout": {}}, ["unknown key 'rolout'", "'rollout'"]),
        ({"rollout": {"max_new_token": 3}}, ["unknown key 'rollout.max_new_token'", "'max_new_tokens'"]),
        ({"student": {"model": "m", "dtypes": "float32"}}, ["'student.dtypes'", "'dtype'"]),
        ({"teacher": {"model": "m", "modle": "x"}}, ["'teacher.modle'", "'model'"]),
        ({"train": {"zzz": 1}}, ["'train.zzz'", "known:", "batch_size"]),
        ({"rollout": {"n": 0}}, ["'rollout.n'", "greater than or equal to 1", "0"]),
        ({"rollout": {"n": "many"}}, ["'rollout.n'", "many"]),
        ({"train": {"lr": float("nan")}}, ["'train.lr'"]),
        ({"train": {"lr": -1.0}}, ["'train.lr'", "greater than 0"]),
        ({"train": {"schedule": "linear"}}, ["total_steps"]),
        ({"eval": {"n": 2, "k": [4]}}, ["eval.k", "eval.n = 2"]),
        ({"eval": {"n": 0, "greedy": False}}, ["nothing to evaluate"]),
        ({"weigh": {"name": "../elsewhere"}}, ["'weigh.name'"]),
        ({"train": {"weights": "a/b"}}, ["'train.weights'"]),
        ({"student": None}, ["'student'"]),
        ({"student": {}}, ["'student.model' is missing"]),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_the_nearest_match(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, **values}, "fire.yaml")
    for word in words:
        assert word in str(caught.value)
    assert "where: fire.yaml" in str(caught.value)
    assert caught.value.exit_code == 2


def test_every_wrong_key_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "seeed": 1, "train": {"lrr": 1}}, "x")
    assert "'seeed'" in str(caught.value)
    assert "'train.lrr'" in str(caught.value)


def test_an_override_wins_over_the_file_and_keeps_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, "student: {model: m}\ntrain: {lr: 1.0e-4, batch_size: 8}\n")
    config = load_config(path, ("train.lr=1e-5", "teacher.model=t", "train.betas=[0.5, 0.9]", "seed=7"))
    assert config.train.lr == 1e-5
    assert config.train.batch_size == 8
    assert config.teacher is not None
    assert config.teacher.model == "t"
    assert config.train.betas == (0.5, 0.9)
    assert config.seed == 7


@pytest.mark.parametrize(
    "override", ["train.lr", "=3", ".lr=3", "train.=3", "train..lr=3", "seed.x=3", "train.lr=[", "train.lrr=3"]
)
def test_a_malformed_override_is_a_config_error(tmp_path: Path, override: str) -> None:
    path = write(tmp_path, "student: {model: m}\nseed: 1\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, (override,))
    assert caught.value.fix


def test_a_section_without_keys_is_one_without_changes(tmp_path: Path) -> None:
    path = write(tmp_path, "student: {model: m}\ntrain:\n#  lr: 3\nteacher:\n")
    config = load_config(path, ("eval.n=3",))
    assert config.train == parse_config(MINIMAL, "x").train
    assert config.teacher is None


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: [1, 2", "not valid YAML"),
        ("a: \x01", "not valid YAML"),
        ("- 1\n- 2\n", "must hold keys and values"),
        ("", "must hold keys and values"),
        ("just words", "must hold keys and values"),
        ("student: {model: m}\ntrain: {lr: 1}\ntrain: {n: 2}\n", "'train' is given twice"),
        ("student: {model: m}\nrollout: {n: 1, n: 2}\n", "'n' is given twice"),
        ("a: &a\n  b: *a\n", "not valid YAML"),
        ("[" * 5000, "not valid YAML"),
        ("student: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("seed: 2024-99-99", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_in_words(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        load_config(write(tmp_path, text))
    assert caught.value.fix
    assert str(tmp_path) in str(caught.value.where)


def test_aliases_that_multiply_are_refused_quickly(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(ConfigError, match="too large"):
        load_config(write(tmp_path, "\n".join([*lines, "student: {model: *a9}"])))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fire.yaml"
    path.write_bytes(b"\xff\xfe\x00student")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)


def test_a_folder_without_configuration_is_told_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "fire.yaml")
    assert str(caught.value.fix).startswith(f"fire init {tmp_path}")


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


@given(
    st.fixed_dictionaries(
        {"student": st.fixed_dictionaries({"model": TEXT}, optional={"revision": st.none() | TEXT})},
        optional={
            "seed": st.integers(0, 2**40),
            "threads": st.none() | st.integers(1, 8),
            "teacher": st.none() | st.fixed_dictionaries({"model": TEXT}),
            "base": st.none() | st.fixed_dictionaries({"model": TEXT}),
            "score": st.fixed_dictionaries({}, optional={"add": st.lists(st.sampled_from(["topk", "base"]))}),
            "prompts": st.fixed_dictionaries({"path": TEXT}),
            "verify": st.fixed_dictionaries({"pattern": st.none() | TEXT}),
            "train": st.fixed_dictionaries(
                {},
                optional={
                    "lr": st.floats(1e-12, 10, exclude_min=True),
                    "betas": st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
                    "batch_size": st.none() | st.integers(1, 99),
                },
            ),
            "weigh": st.fixed_dictionaries(
                {},
                optional={
                    "rule": TEXT | st.dictionaries(TEXT, TEXT, max_size=2),
                    "params": st.dictionaries(TEXT, TEXT | st.integers() | st.booleans() | st.none(), max_size=3),
                },
            ),
            "eval": st.fixed_dictionaries({}, optional={"k": st.just((1, 2)), "prompts": st.none() | TEXT}),
        },
    )
)
def test_a_written_configuration_reads_back_equal(values: dict[str, Any]) -> None:
    text = render_config(values)
    assert parse_config(parse_yaml(text, "it"), "it") == parse_config(values, "it")


def test_every_field_of_a_written_configuration_is_there_once_and_explained() -> None:
    text = render_config(
        {
            "student": {"model": "m"},
            "teacher": {"model": "t"},
            "base": {"model": "b"},
            "teachers": {"x": {"model": "x"}},
        }
    )
    tree = yaml.safe_load(text)
    lines = text.splitlines()
    for name, field in Config.model_fields.items():
        if name not in SECTIONS:
            assert field.description
            continue
        values, indent = (tree[name]["x"], "    ") if name == "teachers" else (tree[name], "  ")
        assert set(values) == set(SECTIONS[name].model_fields)
        assert SECTIONS[name].__doc__
        for key, sub in SECTIONS[name].model_fields.items():
            assert sub.description, f"{name}.{key}"
            assert any(
                line.startswith(f"{indent}{key}: ") and line.endswith(f"  # {sub.description}") for line in lines
            )


def other_value(model: type[BaseModel], name: str, value: Any) -> Any:
    """Some other valid value of a field, from its type."""
    annotation = model.model_fields[name].annotation
    options = typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()
    kinds = [k for k in (options or (annotation,)) if k is not type(None)]
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            return next(v for v in typing.get_args(kind) if v != value)
    kind = kinds[0]
    if isinstance(kind, type) and issubclass(kind, Section):
        return kind()
    if name == "kind":
        return "math"
    if kind is bool:
        return not value
    if kind is int:
        return (value or 0) + 2
    if kind is float:
        return 3.0 if name == "dual_clip" else (value or 1.0) / 2
    if kind is str:
        return f"{value or ''}x"
    if typing.get_origin(kind) is dict:
        return {"some": 1}
    assert typing.get_origin(kind) is tuple
    inner = typing.get_args(kind)[0]
    if typing.get_origin(inner) is typing.Literal:
        return (*value, typing.get_args(inner)[0])
    if inner is str:
        return (*value, "topk")
    return tuple(v / 2 for v in value) if isinstance(value[0], float) else (1, 2)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_field_changes_the_fingerprint_unless_it_is_declared_to_change_speed_or_addons_alone(section: str) -> None:
    model = SECTIONS[section]
    base: dict[str, Any] = {"model": "m"} if "model" in model.model_fields else {}
    if section == "train":
        base["total_steps"] = 9  # a decaying schedule is one of the other values
    if section == "weigh":
        base["constant"] = 2.0
    start = model(**base)
    assert isinstance(start, Section)
    for name, field in model.model_fields.items():
        changed = model(**{**base, name: other_value(model, name, getattr(start, name))})
        assert isinstance(changed, Section)
        assert getattr(changed, name) != getattr(start, name), name
        assert (digest(changed.results()) == digest(start.results())) == bool(field.json_schema_extra), name


def marked(mark: str) -> set[str]:
    """The fields declared `perf` or `addon`."""
    return {
        f"{s}.{n}"
        for s, m in SECTIONS.items()
        for n, f in m.model_fields.items()
        if isinstance(f.json_schema_extra, dict) and f.json_schema_extra.get(mark)
    }


def test_speed_fields_are_these_and_no_others() -> None:
    models = [
        f"{m}.{f}"
        for m in ("student", "teacher", "teachers", "base")
        for f in ("device", "url", "served_name", "api_key_env")
    ]
    places = [f"{s}.{f}" for s in ("vllm", "http", "ray") for f in SECTIONS[s].model_fields]
    assert marked("perf") == {
        *models, *places, "prompts.path", "rollout.rows_in_flight",
        "score.logits_budget_mb", "score.tokens_per_batch", "train.save_every", "train.tokens_per_microbatch",
        "train.logits_budget_mb", "train.gradient_checkpointing", "train.tracker", "train.device", "train.packing",
        "train.attention", "train.max_nonfinite_steps", "eval.prompts", "verify.workers", "verify.allow_unsafe",
    }  # fmt: skip


def test_fields_of_addons_are_these_and_no_others() -> None:
    assert marked("addon") == {"score.add", "score.topk", "score.pass_rate_samples"}


def test_weights_are_named_after_their_rule_unless_that_is_an_expression() -> None:
    def name(**weigh: Any) -> str:
        return parse_config({**MINIMAL, "weigh": weigh}, "x").weights_name

    assert name() == "uniform"
    assert name(rule="fire") == "fire"
    assert name(rule="fire", name="mine") == "mine"
    assert name(rule={"weight": "1"}) == "expression"
    assert name(rule="weight = teacher_entropy / 2") == "expression"


@pytest.mark.parametrize("text", [r"Answer: (\\d+)", "#", "null?", "- x", "{a}"])
def test_text_on_the_command_line_is_taken_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "fire.yaml"
    path.write_text(render_config({"student": {"model": "x"}}))
    assert load_config(path, (f"verify.pattern={text}",)).verify.pattern == text
    assert load_config(path, ("verify.pattern=null",)).verify.pattern is None
    assert load_config(path, ("weigh.params={percentile: 3}",)).weigh.params == {"percentile": 3}


@pytest.mark.parametrize("betas", ["[2, 3]", "[0.9, 1.0]", "[-0.1, 0.9]"])
def test_betas_lie_below_one(tmp_path: Path, betas: str) -> None:
    path = tmp_path / "fire.yaml"
    path.write_text(render_config({"student": {"model": "x"}}))
    with pytest.raises(ConfigError, match="betas"):
        load_config(path, (f"train.betas={betas}",))
