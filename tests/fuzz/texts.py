"""Targets that people write: prompts files, `fire.yaml` with `--set`, rules with their parameters, specifications."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st

from fire_data import weighing
from fire_data.experiment.spec import load_spec
from fire_data.hub.redact import shared_config
from fire_data.prompts import as_messages, prompts_digest, read_prompts
from fire_data.rules import RULES, make_rule
from fire_data.schemas.config import RULE_PARTS, Config, load_config, parse_config, render_config
from fire_data.schemas.errors import FireError
from fire_data.schemas.tables import conform
from fire_data.verify.program import NoTestsError, code_in, read_tests, trials
from tests.fuzz.target import Target, same, scratch, written
from tests.fuzz.values import as_json, bent, tables, torn
from tests.ragged import ragged

# --- prompts ----------------------------------------------------------------------------------------------------

_PROMPTS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}], "answer": "4", "teacher": "math", "level": 3},
    {"prompt": "Say it", "prompt_id": "a", "tests": ["assert f(1) == 1"], "entry_point": "f"},
    {"question": "How many?", "answer": "one and one\n#### 2"},
    {"problem": "x?", "solution": "so \\boxed{\\frac{1}{2}}", "input_output": '{"inputs": ["1"], "outputs": ["2"]}'},
]


def _read(data: bytes, suffix: str) -> None:
    """The prompts of a file, twice: as they are, and where an answer is needed; then what verifiers make of them."""
    path = written(f"prompts{suffix}", data)
    for need_answer in (True, False):
        try:
            table = read_prompts(path.name, scratch(), need_answer=need_answer)
        except FireError:
            continue
        same(conform(table, "prompts", "").num_rows, table.num_rows, "rows")
        assert len(prompts_digest(table)) == 64
        for row in table.to_pylist():
            as_messages(row)
            try:
                trials(code_in(str(row["answer"])) or "", read_tests(row["extra"]), "word")
            except NoTestsError:
                continue


def _lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@st.composite
def _prompt_lines(draw: st.DrawFn) -> bytes:
    data = _lines(draw(bent([_PROMPTS, _PROMPTS[:1], _PROMPTS[1:2]]).map(lambda v: v if isinstance(v, list) else [v])))
    return draw(torn(data)) if draw(st.integers(0, 3)) == 0 else data


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(_table(rows), sink, write_page_checksum=True)
    return sink.getvalue()


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{**dict.fromkeys(k for r in rows for k in r), **row} for row in rows])


# --- fire.yaml --------------------------------------------------------------------------------------------------

_SPLIT = b"\n--set--\n"  # between the text of fire.yaml and what the command line sets, a line each
_WHOLE = json.loads(Config(student={"model": "m"}, teacher={"model": "t"}).model_dump_json())  # type: ignore[arg-type]
_CONFIGS: list[dict[str, Any]] = [
    {"student": {"model": "m"}},
    *({"student": {"model": "m"}, name: values} for name, values in _WHOLE.items()),
    {
        "seed": 1, "student": {"model": "a/b", "dtype": "bfloat16"}, "teachers": {"math": {"model": "./x"}},
        "weigh": {"rule": {"keep": "length > 3"}, "params": {"normalise": "step"}},
        "eval": {"prompts": {"gsm": "p.jsonl"}},
        "train": {"lora": {"targets": ["q_proj"]}, "betas": [0.9, 0.95]}, "verify": {"kind": "code"},
    },
]  # fmt: skip
_SETS = [
    "train.lr=1e-5",
    "weigh.rule=uniform",
    "rollout.n=[",
    "a..b=1",
    "student=null",
    "student.model.x=1",
    "seed=.nan",
]


def _configure(data: bytes) -> None:
    """Load a configuration; what is accepted can be written and read back, shared, and asked for its rule."""
    text, _, sets = data.partition(_SPLIT)
    path = written("fire.yaml", text)
    config = load_config(path, tuple(sets.decode("utf-8", "surrogateescape").splitlines()))
    same(load_config(written("again.yaml", render_config(config.model_dump(mode="json")).encode())), config, "written")
    shared = parse_config(shared_config(config, scratch(), []), "shared")
    assert not shared.student.trust_remote_code
    assert config.weights_name == config.weights_name.replace("/", "-")
    _rule(config.weigh.rule, config.weigh.params, config.weigh.scope)


@st.composite
def _configs(draw: st.DrawFn) -> bytes:
    text = yaml.safe_dump(draw(bent(_CONFIGS)), allow_unicode=draw(st.booleans())).encode("utf-8", "replace")
    sets = draw(st.lists(st.sampled_from(_SETS) | st.tuples(st.sampled_from(_KEYS), st.text(max_size=6)).map("=".join)))
    data = text + _SPLIT + "\n".join(sets[:3]).encode("utf-8", "replace")
    return draw(torn(data)) if draw(st.integers(0, 3)) == 0 else data


_KEYS = [f"{section}.{key}" for section, values in _WHOLE.items() if isinstance(values, dict) for key in values]

# --- rules ------------------------------------------------------------------------------------------------------

_ATOMS = [
    "1", "0", "-1.5", "NULL", "'x'", "length", "position", "teacher_logprob", "student_entropy", "reward",
    "finish_reason", "teacher_logprob_sum", "response_ids", "trajectory_id", "1e999", "INTERVAL '1 day'",
    "DATE '2020-01-01'", '"a b"', "*",
]  # fmt: skip
_FORMS = [
    "({0} + {1})", "({0} / {1})", "({0} % {1})", "{0} > {1}", "NOT {0}", "CASE WHEN {0} THEN {1} END", "ABS({0})",
    "EXP({0})", "AVG({0})", "SUM({0}) / COUNT({1})", "POW({0}, {1})", "{0} IN ({1}, 2)", "{0} LIKE 'a%'",
    "CAST({0} AS INT)", "{0}::text", "{0} || {1}", "LPAD({0}, 900000000, 'x')", "REPLACE({0}, '', {1})",
    "{0} OVER (ORDER BY {1})", "LN({0})", "ROUND({0}, 2)", "QUANTILE_CONT({0}, {1})",
    "{0} IN (SELECT {1} FROM read_csv('/etc/passwd'))", "read_parquet({0})", "ARRAY[{0}, {1}]", "UNNEST({0})",
    "{0}[{1}]", "COALESCE({0}, {1})", "LEAST({0}, {1})", "{0} BETWEEN {1} AND 2", "({0}", "{0} -- {1}",
    "STRPOS({0}, {1})", "SUBSTR({0}, {1}, 3)", "{0} ~ '(a+)+$'", "FIRST({0})", "STDDEV({0})", "COUNT(DISTINCT {0})",
]  # fmt: skip
_NAMES = [n for n in RULES if n != "expression"]
_RULES: list[dict[str, Any]] = [
    {"rule": "fire", "params": {"percentile": 20, "alpha": 1.0}, "scope": "step"},
    {"rule": "fire+uniform", "params": {"fire.percentile": 3}},
    {
        "rule": "weight = 1 + teacher_entropy; keep = length > 1",
        "params": {"normalise": "trajectory"},
        "scope": "group",
    },
    {"rule": {"keep": "reward > 0", "weight": "1"}, "batch_size": 4, "truncated": "drop", "end_token": "mask"},
    *({"rule": name, "params": {}} for name in _NAMES),
]


def _rule(rule: Any, params: Any, scope: Any) -> Any:
    """A rule of the package or an expression. What names a file would be run: that is asked for, and not fuzzed."""
    if ".py" in json.dumps([rule, params], default=str):
        return None
    return make_rule(rule, params if isinstance(params, dict) else {}, scope if isinstance(scope, str) else None)


def _weigh(data: bytes) -> None:
    """Make a rule of what `weigh.rule` and `weigh.params` may hold, and apply it to a small table."""
    try:
        given = json.loads(data)
    except (ValueError, RecursionError):
        return
    rule = given.get("rule") if isinstance(given, dict) else None
    if not isinstance(rule, str | dict):
        return
    # What fire.yaml lets through, no more: `params` is any mapping with text for keys.
    settings = {"rule": rule, "params": given.get("params", {}), "scope": given.get("scope")}
    config = parse_config({"student": {"model": "m"}, "weigh": settings}, "").weigh
    made = _rule(config.rule, config.params, config.scope)
    if made is None:
        return
    policies = {k: given[k] for k in ("batch_size", "denominator", "constant", "truncated", "end_token") if k in given}
    policies = parse_config(
        {
            "student": {"model": "m"},
            "train": {"batch_size": policies.pop("batch_size", None)},
            "weigh": policies,
        },
        "",
    )
    cfg = policies.weigh
    found = weighing.weigh(
        _FRAME, made, batch_size=policies.train.batch_size, denominator=cfg.denominator, constant=cfg.constant,
        truncated=cfg.truncated, end_token=cfg.end_token,
    ).collect()  # fmt: skip
    assert found.height == _FRAME.height
    assert found["coefficient"].explode().is_finite().all()


_FRAME = ragged(9, 3, 4, n=2, topk=3)

expressions = st.recursive(
    st.sampled_from(_ATOMS),
    lambda inner: st.tuples(st.sampled_from(_FORMS), inner, inner).map(lambda f: f[0].format(f[1], f[2])),
    max_leaves=6,
)


@st.composite
def _rules(draw: st.DrawFn) -> bytes:
    if draw(st.booleans()):
        return as_json(draw(bent(_RULES)))
    parts = draw(st.dictionaries(st.sampled_from(RULE_PARTS), expressions, min_size=1))
    scope = draw(st.sampled_from([None, "trajectory", "group", "step", "round"]))
    text = "; ".join(f"{k} = {v}" for k, v in parts.items())
    return as_json({"rule": draw(st.sampled_from([parts, text])), "scope": scope, "params": {}})


# --- specifications of experiments ------------------------------------------------------------------------------

_SPECS: list[dict[str, Any]] = [
    {"worlds": {"chain": ["single"]}, "arms": {"uniform": {}, "fire": None}, "seeds": 2, "rounds": 1},
    {
        "about": "x", "seeds": [0, 1], "against": ["uniform"], "config": {"train": {"lr": 1e-3}},
        "given": {"w": {"student": {"model": "m"}, "teachers": {"s": {"teacher": {"model": "t"}}}, "prompts": "p",
                        "main": "h"}},
        "worlds": {"w": ["s"]}, "arms": {"uniform": {}, "a": {"rule": {"weight": "1"}, "config": {"seed": 1}}},
        "claims": [{"arm": "a", "world": "w", "setting": "s", "holds": "better"}],
    },
]  # fmt: skip


def _specify(data: bytes) -> None:
    if b".py" in data:  # a rule in a file is code that was asked for
        return
    load_spec(written("spec.yaml", data))


@st.composite
def _specs(draw: st.DrawFn) -> bytes:
    data = yaml.safe_dump(draw(bent(_SPECS))).encode("utf-8", "replace")
    return draw(torn(data)) if draw(st.integers(0, 3)) == 0 else data


def _yaml(values: list[Any]) -> list[bytes]:
    return [yaml.safe_dump(v).encode() for v in values]


TEXTS: dict[str, Target] = {
    "prompts-jsonl": Target(
        lambda data: _read(data, ".jsonl"), lambda: [_lines(_PROMPTS), *(_lines([p]) for p in _PROMPTS)], _prompt_lines
    ),
    "prompts-parquet": Target(
        lambda data: _read(data, ".parquet"),
        lambda: [_parquet(_PROMPTS), _parquet(_PROMPTS[:1])],
        lambda: tables(_table(_PROMPTS)),
    ),
    "config": Target(
        _configure, lambda: [*_yaml(_CONFIGS), _yaml(_CONFIGS)[0] + _SPLIT + "\n".join(_SETS).encode()], _configs
    ),
    "rules": Target(_weigh, lambda: [as_json(r) for r in _RULES], _rules),
    "spec": Target(_specify, lambda: _yaml(_SPECS), _specs),
}
