"""What others hand us runs no code, opens no file and tells no secret: claims of docs/security.md without a home."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import fire_data as fd
from fire_data import chat
from fire_data.hub.pull import _examine
from fire_data.models import check_model_files, load_model, load_tokenizer, model_config
from fire_data.prompts import read_prompts
from fire_data.rules import make_rule
from fire_data.schemas.config import Config, ModelConfig, parse_yaml
from fire_data.schemas.errors import ConfigError, DataError
from fire_data.schemas.manifest import Receipt
from fire_data.shards import Part
from tests.ragged import ragged

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "security.md"


# --- the network ------------------------------------------------------------------------------------------------

_WATCHED = """
import os, sys
seen = []
sys.addaudithook(lambda event, args: seen.append((event, repr(args[-1]))) if event in (
    "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname") else None)
from fire_data.cli.app import app
for command in os.environ["COMMANDS"].splitlines():
    code = app(command.split(), prog_name="fire", standalone_mode=False)
    assert not code, (command, code)
    assert not seen, (command, seen)
"""


def test_no_command_looks_for_an_address_or_connects_to_one(make_run: Any, tmp_path: Path) -> None:
    """All commands that can do without a Hub or a server, with an environment that forbids nothing."""
    run = make_run(tmp_path / "run", rollout={"max_new_tokens": 4}).root
    names = ["plan", "rollout", "verify", "score", "weigh", "train", "eval", "check", "status", "inspect",
             "diagnose", "compare", "run"]  # fmt: skip
    commands = [f"{name} {run}" for name in names]
    commands += [
        f"explain {run} 0 max",
        f"report {run} --out {tmp_path}/report.html",
        "env",
        "rules",
        f"init {tmp_path}/other --student a/b --teacher c/d",
    ]
    env = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED], env={**env, "COMMANDS": "\n".join(commands)}, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


# --- models -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_world: Any, tmp_path: Path) -> Path:
    """A model folder that loads."""
    return Path(shutil.copytree(tiny_world.student, tmp_path / "model"))


def _changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_code_is_not_trusted_unless_somebody_says_so() -> None:
    models = [Config.model_validate({"student": {"model": "m"}, "teachers": {"a": {"model": "m"}}})]
    assert not any(m.trust_remote_code for c in models for m in (c.student, *c.teachers.values()))
    assert ModelConfig.model_fields["trust_remote_code"].default is False


def test_code_in_a_model_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = (
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import *\nclass Evil(Qwen3Config): model_type = 'evil'\n"
    )
    (folder / "evil.py").write_text(code)
    named = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    cfg = ModelConfig(model=str(folder), device="cpu")
    for more in ({"model_type": "evil"}, {}):  # where transformers knows the architecture, it takes its own
        _changed(folder / "config.json", auto_map=named, **more)
        _changed(folder / "tokenizer_config.json", auto_map=named)
        for load in (load_tokenizer, model_config, load_model):
            try:
                load(cfg, tmp_path)
            except DataError as error:
                assert "custom code" in error.what
                assert "trust_remote_code: true" in str(error.fix)
    assert not ran.exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../other/model.safetensors", "/etc/x.safetensors", 3, "a\\b.safetensors"]
)
def test_weights_that_an_index_names_are_safetensors_of_the_folder(folder: Path, name: Any) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": name, "b": "model.safetensors"}})
    )
    with pytest.raises(DataError, match="no safetensors file of this folder") as caught:
        check_model_files(ModelConfig(model=str(folder)), folder)
    assert caught.value.fix


def test_an_index_that_is_none_is_told(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(DataError, match="names"):
        check_model_files(ModelConfig(model=str(folder)), folder)


@pytest.mark.parametrize("name", ["adapter_model.bin", "../x.safetensors", "weights.bin"])
def test_weights_that_a_configuration_names_are_safetensors_of_the_folder(folder: Path, name: str) -> None:
    _changed(folder / "config.json", transformers_weights=name)
    with pytest.raises(DataError, match="transformers_weights"):
        load_model(ModelConfig(model=str(folder), device="cpu"), folder)


def test_an_adapter_is_no_model_and_fetches_none(folder: Path) -> None:
    """Loaded, it would take its base model from wherever it says, and no fingerprint would know of that."""
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "evil/x"}))
    with pytest.raises(DataError, match="holds an adapter") as caught:
        load_model(ModelConfig(model=str(folder), device="cpu"), folder)
    assert "merge_and_unload" in str(caught.value.fix)


@pytest.mark.parametrize("where", ["config", "inside"])
def test_a_kernel_that_a_configuration_names_is_not_fetched(folder: Path, where: str) -> None:
    named = {"attn_implementation": "evil/kernel"}
    _changed(folder / "config.json", **(named if where == "config" else {"text_config": named}))
    for load in (model_config, load_model):
        with pytest.raises(DataError, match="names code to be fetched"):
            load(ModelConfig(model=str(folder), device="cpu"), folder)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% include '/etc/passwd' %}",
        "{{ raise_exception.__globals__ }}",
    ],
)
def test_a_chat_template_cannot_reach_python(folder: Path, template: str) -> None:
    cfg = ModelConfig(model=str(folder))
    tokenizer = load_tokenizer(cfg, folder)
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"refuses the messages|no tokens"):  # what it may not see is empty
        chat.render(tokenizer, cfg, folder, [{"role": "user", "content": "1"}], raw=False)


# --- text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/object/new:type [x]", "!x 1"],
)  # fmt: skip
def test_yaml_makes_plain_values_and_no_objects(text: str) -> None:
    with pytest.raises(ConfigError, match="not valid YAML"):
        parse_yaml(text, "fire.yaml")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        yield server


@pytest.mark.parametrize(
    "form",
    ["length IN (SELECT a FROM {})", "length in (select a\nfrom {})", "length IN (FROM {})",
     "length > ALL (FROM/**/{})", "CASE WHEN length IN (SELECT a FROM {}) THEN 1 END",
     "E'\\' IN (' = ') OR length IN (SELECT a FROM {})'"],
)  # fmt: skip
def test_an_expression_reads_no_file_and_no_address(form: str, listener: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    port = listener.getsockname()[1]
    for place in (f"read_csv('{tmp_path}/secret.csv')", f"read_parquet('http://127.0.0.1:{port}/x.parquet')"):
        with pytest.raises(ConfigError, match="no other table"):
            fd.weigh(ragged(4, 1), {"keep": form.format(place)}).collect()
    with pytest.raises(BlockingIOError):
        listener.accept()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("LPAD(finish_reason, 1000000000, 'x') = 'x'", "function on text"),
        ("REPLACE(REPLACE(finish_reason, 'o', 'oooooooooo'), 'o', 'oooooooooo') = ''", "function on text"),
        (" + ".join(["length"] * 30_000), "characters, more than"),
        ("+".join(["1"] * 1_500), "too many terms"),
        ("(" * 1_000 + "1" + ")" * 1_000, "not a valid expression"),
    ],
)
def test_an_expression_cannot_fill_the_memory_or_the_stack(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make_rule({"keep": text})
    assert len(str(caught.value)) < 5_000


def test_an_expression_may_still_compare_text() -> None:
    kept = fd.weigh(ragged(8, 2), {"keep": "UPPER(LEFT(finish_reason, 2)) = 'ST' OR LENGTH(teacher) = 4"}).collect()
    assert kept["keep"].any()


def test_a_hub_path_stays_in_the_repository(tmp_path: Path) -> None:
    for path in ("hf://datasets/a/b/../../x.jsonl", "hf://datasets/a/b//x.jsonl", "hf://datasets/a/b/./x"):
        with pytest.raises(ConfigError, match="names a file"):
            read_prompts(path, tmp_path)


def test_an_error_of_the_hub_names_no_token_and_no_signature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("hf_secretsecretsecret was refused at https://cdn.example/x?X-Amz-Signature=abc123")

    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for ask in (
        lambda: read_prompts("hf://datasets/a/b/p.jsonl", tmp_path),
        lambda: load_tokenizer(ModelConfig(model="some/model"), tmp_path),
    ):
        with pytest.raises(DataError) as caught:
            ask()
        assert "refused" in str(caught.value)
        assert "hf_secret" not in str(caught.value)
        assert "abc123" not in str(caught.value)


# --- tables -----------------------------------------------------------------------------------------------------


def test_a_few_bytes_cannot_become_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal numbers are stored once and counted: a table from the Hub is measured by what it takes in memory."""
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"student_logprob": pa.array([[0.0] * 100_000], pa.list_(pa.float32()))}), path)
    assert path.stat().st_size < 5_000
    receipt = Receipt(shard="00000", sha256="", bytes=0, rows=1, tokens=0, fingerprint="")
    monkeypatch.setitem(_examine.__globals__, "_LARGEST_GROUP", 100_000)
    with pytest.raises(DataError, match="more than 100,000 bytes"):
        _examine(path, Part(tmp_path, "scores", 0), receipt)


# --- our own code -----------------------------------------------------------------------------------------------

# What may run code or make objects of bytes, and where it is on purpose: what a user names, and the sandbox.
_DANGEROUS = {"exec", "eval", "compile", "pickle", "marshal", "shelve", "dill", "joblib", "__import__"}
_ON_PURPOSE = {"pyfile.py": {"exec"}, "program.py": {"compile"}}
_CALLS = re.compile(
    r"torch\.load\(|allow_pickle|weights_only=False|yaml\.(unsafe_|full_)|os\.system\(|shell=True|mktemp\("
)


def _sources() -> list[Path]:
    return [p for f in ("fire_data", "schemas", "cli") for p in (ROOT / f).rglob("*.py") if not p.is_symlink()]


def test_nothing_unpickles_evaluates_or_starts_a_shell() -> None:
    found = []
    for path in _sources():
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            names: set[str] = set()
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {node.func.id}
            elif isinstance(node, ast.Import):
                names = {a.name.partition(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]}
            found += [f"{path.name}: {n}" for n in (names & _DANGEROUS) - _ON_PURPOSE.get(path.name, set())]
        found += [f"{path.name}: {m}" for m in _CALLS.findall(text)]
    assert found == []


def test_yaml_is_read_by_the_safe_loader_alone() -> None:
    calls = [
        (path.name, call)
        for path in _sources()
        for call in re.findall(r"yaml\.(load\w*)\(([^)]*)\)", path.read_text("utf-8"))
    ]
    assert [c for c in calls if c[1] != ("load", "text, _Loader")] == []
    from fire_data.schemas.config import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


# --- what is installed ------------------------------------------------------------------------------------------


def test_everything_that_ci_installs_has_a_hash() -> None:
    lock = (ROOT / "requirements-ci.txt").read_text(encoding="utf-8")
    lines = [line for line in lock.splitlines() if not line.startswith("#")]
    pinned = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"([a-z0-9-]+)(?:\[[\w,-]+\])?==\S+", line))}
    assert [n for n, i in pinned.items() if not lines[i + 1].strip().startswith("--hash=sha256:")] == []
    assert len(pinned) > 100
    assert [line for line in lines if re.search(r"https?:|file:|@|^-", line)] == [], "no place and no option"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["dev"]]
    own = next(text for text in asked if text.startswith("fire-opd["))
    asked += [text for name in re.findall(r"[\w-]+", own.partition("[")[2]) for text in extras[name]]
    names = {re.split(r"[^\w-]", text)[0].lower().replace("_", "-") for text in asked} - {"fire-opd", "torch"}
    assert names - pinned.keys() == set(), "make lock"
    assert "--require-hashes --no-deps --requirement requirements-ci.txt" in (ROOT / "Makefile").read_text("utf-8")


# --- the page ---------------------------------------------------------------------------------------------------


def test_every_test_that_the_page_about_security_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 30
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (ROOT / file).is_file() or f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8")
    ]
    assert missing == []
