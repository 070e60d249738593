"""Changes the code of rules, loss, storage and schedule one place at a time and looks which changes no test notices.

The changes are those of cosmic-ray (another operator, constant or keyword, a condition negated, a loop that does
nothing), without the ones that change annotations alone. Running them is done here: cosmic-ray starts an interpreter
for each, whose imports take longer than the tests, and mutmut forks from a process in which Polars has started threads,
which a child would wait for forever. Here each change is tested in a fork of a process that has imported the libraries
and done nothing; the source is replaced while it is imported, so no file is touched, whenever this is ended.

    make mutation                                    # all slices: hours
    .venv/bin/python -m tests.mutation.run loss      # one of SLICES; --share 0.1 tries a tenth, spread evenly

What was tried is kept in build/mutation/ and not tried again while the module and its tests are what they were. A
survivor that survivors.toml explains is no news; the exit code is 1 if there are others.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
FOUND = ROOT / "build" / "mutation"
RULES = ["test_golden.py", "test_rule_properties.py"]
# Modules, and the tests that hold them, a file or those of it that begin so: the quickest first, as a failure ends it.
SLICES: dict[str, tuple[list[str], list[str]]] = {
    "loss": (
        ["fire_data/loss.py"],
        ["test_loss.py", "test_drift.py::test_effective", "test_drift.py::test_a_bound",
         "test_forward_kl.py::test_the_t", "test_forward_kl.py::test_a_token", "test_forward_kl.py::test_the_sum",
         "test_forward_kl.py::test_shapes"],
    ),
    "coefficient": (["fire_data/coefficient.py"], ["test_golden.py::test_w", "test_rules.py", "test_statistics.py"]),
    "weighing": (
        ["fire_data/weighing.py"],
        ["test_rules.py", "test_statistics.py", "test_composition.py", "test_rule_properties.py::test_coefficients"],
    ),
    "schedule": (["fire_data/schedule.py"], ["test_prompts.py", "test_sampling.py"]),
    "optim": (["fire_data/optim.py", "fire_data/packing.py"], ["test_training.py", "test_packed.py", "test_golden.py"]),
    "training": (
        ["fire_data/training.py"],
        ["test_training.py", "test_ratio_check.py", "test_nonfinite.py", "test_drift.py", "test_fused_head.py"],
    ),
    "metrics": (["fire_data/metrics.py"], ["test_nonfinite.py", "test_drift.py", "test_trackers.py"]),
    "files": (
        ["fire_data/files.py"],
        ["test_storage.py", "test_bad_inputs.py::test_a_full", "test_bad_inputs.py::test_a_folder"],
    ),
    "shards": (
        ["fire_data/shards.py", "fire_data/partial.py"],
        ["test_storage.py", "test_tables.py", "test_scale.py", "test_stages.py"],
    ),
    "rule-base": (
        [f"fire_data/rules/{name}.py" for name in ("base", "statistics", "evaluate", "compose", "tokens")],
        ["test_rules.py", "test_statistics.py", "test_composition.py", *RULES],
    ),
    "rule-fire": (
        [f"fire_data/rules/{name}.py" for name in ("fire", "controls", "repairs")],
        ["test_rules.py", "test_rule_repairs.py", *RULES],
    ),
    "rule-filters": (["fire_data/rules/filters.py"], ["test_rule_filters.py", *RULES]),
    "rule-weights": (["fire_data/rules/weights.py"], ["test_rule_weights.py", *RULES]),
    "rule-masks": (["fire_data/rules/masks.py"], ["test_rule_masks.py", *RULES]),
    "rule-advantages": (["fire_data/rules/advantages.py"], ["test_rule_advantages.py", *RULES]),
    "rule-topk": (
        [f"fire_data/rules/{name}.py" for name in ("topk", "candidates", "forward_kl")],
        ["test_rule_topk.py", "test_rule_forward_kl.py", *RULES],
    ),
    "rule-expressions": (
        [f"fire_data/rules/{name}.py" for name in ("__init__", "expression", "own")],
        ["test_own_rules.py", "test_rules.py", "test_config.py"],
    ),
}  # fmt: skip
# Of the replacements of an operator one or two are enough: most others end in an error at once.
_PAIRS = ("Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Div", "Mod_FloorDiv", "Pow_Mul", "BitAnd_BitOr",
          "BitOr_BitAnd", "LShift_RShift", "RShift_LShift", "Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt",
          "LtE_Gt", "Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt", "Is_IsNot", "IsNot_Is")  # fmt: skip
_LEFT_OUT = ("Variable", "RemoveDecorator", "ReplaceUnaryOperator_USub_Invert", "ReplaceUnaryOperator_USub_Not")


class Change(NamedTuple):
    """One changed module: its file, the line before and after (of several the first), and its source."""

    file: str
    line: int
    was: str
    now: str
    source: str

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.file}\n{self.source}".encode()).hexdigest()[:16]


def main() -> int:
    """Try what is asked for and was not tried, one change at a time; print what no test noticed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("slices", nargs="*", metavar="SLICE", help=f"of {', '.join(SLICES)}; default: all")
    parser.add_argument("--share", type=float, default=1.0, help="the share of the changes that is tried (default 1)")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="begin none after so many (default: no end)"
    )
    options = parser.parse_args()
    unknown = set(options.slices) - set(SLICES)
    if unknown:
        parser.error(f"there is no slice {', '.join(unknown)}; there are: {', '.join(SLICES)}")
    import_libraries()
    end = time.monotonic() + 60 * options.minutes
    news = [s for name in options.slices or SLICES for s in try_slice(name, options.share, end)]
    return 1 if news else 0


def try_slice(name: str, share: float, end: float) -> list[Change]:
    """The survivors of a slice that nothing explains."""
    modules, tests = SLICES[name]
    changes = [change for module in modules for change in changes_of(module)]
    changes = [c for i, c in enumerate(changes) if int((i + 1) * share) > int(i * share)]
    state = hashlib.sha256(b"".join(_bytes(p) for p in [*modules, *(f"tests/{t.split(':')[0]}" for t in tests)]))
    log = FOUND / f"{name}-{state.hexdigest()[:12]}.jsonl"
    known = {r["key"]: r["ended"] for r in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    started = time.monotonic()
    if "whole" not in known:
        ended = try_change(None, tests, 3600.0)
        if ended != "survived":
            raise SystemExit(f"{name}: the tests fail without any change ({ended}); see {FOUND / 'output'}")
        known["whole"] = "survived"
        known["seconds"] = str(time.monotonic() - started)
        _note(log, [{"key": k, "ended": known[k]} for k in ("whole", "seconds")])
    limit = 10.0 + 5 * float(known["seconds"])
    for change in changes:
        if change.key not in known and time.monotonic() < end:
            known[change.key] = try_change(change, tests, limit)
            _note(log, [{"key": change.key, "ended": known[change.key]}])
    tried = [c for c in changes if c.key in known]
    survived = [c for c in tried if known[c.key] == "survived"]
    explained = explanations()
    news = [c for c in survived if (c.file, c.was, c.now) not in explained]
    noticed, hung = len(tried) - len(survived), sum(known[c.key] == "hung" for c in tried)
    print(
        f"{name}: {len(tried)} of {len(changes)} changes tried, {noticed} noticed (of these {hung} hung), "
        f"{len(survived) - len(news)} explained, {len(news)} survived"
    )
    for c in news:
        print(f"  {c.file}:{c.line}\n    - {c.was}\n    + {c.now}", flush=True)
    return news


def explanations() -> set[tuple[str, str, str]]:
    """File, line before and line after of the survivors that are known to be harmless."""
    found = tomllib.loads(Path(__file__).with_name("survivors.toml").read_text(encoding="utf-8"))
    return {(s["file"], was, now) for s in found["survivor"] for was, now in s["lines"] if s["why"]}


# Changes


def changes_of(module: str) -> Iterator[Change]:
    """Every change of a module that changes what it does."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / module).read_text(encoding="utf-8")
    meaning, seen = _meaning(source), set()
    for name in operator_names():
        kind = name.removeprefix("core/")
        replaced = kind.removeprefix("ReplaceBinaryOperator_").removeprefix("ReplaceComparisonOperator_")
        if kind.startswith(_LEFT_OUT) or (replaced != kind and replaced not in _PAIRS):
            continue
        for occurrence in range(10_000):
            try:
                changed = mutate_code(source, get_operator(name)(), occurrence)
                if changed is None:
                    break
                same = _meaning(changed) == meaning
            except (SyntaxError, AttributeError):  # not Python; or an exception with a dot in its name, not its case
                continue
            if not same and changed not in seen:
                seen.add(changed)
                yield Change(module, *_difference(source, changed), changed)


def _meaning(source: str) -> str:
    """A module without annotations, which are not evaluated, and without how arguments have to be given."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.arguments):  # a * between them may have become a /
            node.args, node.posonlyargs, node.kwonlyargs = node.posonlyargs + node.args + node.kwonlyargs, [], []
            node.defaults, node.kw_defaults = node.defaults + [d for d in node.kw_defaults if d is not None], []
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def _difference(source: str, changed: str) -> tuple[int, str, str]:
    """Where two sources differ first, and the line in both."""
    before, after = source.splitlines(), changed.splitlines()
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    _, i, _, j, _ = next(o for o in matcher.get_opcodes() if o[0] != "equal")
    return i + 1, before[i].strip(), after[j].strip() if j < len(after) else ""


# Trying


def import_libraries() -> None:
    """What every test imports, and nothing that starts a thread or belongs to the project."""
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for name in ("hypothesis", "numpy", "polars", "pyarrow.parquet", "pydantic", "pytest", "scipy.stats", "torch",
                 "transformers.models.qwen3.modeling_qwen3", "typer"):  # fmt: skip
        importlib.import_module(name)
    assert not any(name.split(".")[0] == "fire_data" for name in sys.modules), "children must import the project anew"


class _Changed(SourceFileLoader):
    """Loads a module from a source that is not that of its file."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.source.encode(), self.path)


class _Finder:
    """Finds one module, by its name, with a changed source."""

    def __init__(self, change: Change) -> None:
        parts = Path(change.file).with_suffix("").parts
        parts = ("fire_data", *parts) if parts[0] != "fire_data" else parts
        self.name = ".".join(p for p in parts if p != "__init__")
        self.change = change

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        file = str(ROOT / self.change.file)
        return importlib.util.spec_from_file_location(name, file, loader=_Changed(name, file, self.change.source))


def try_change(change: Change | None, tests: Sequence[str], limit: float) -> str:
    """How the tests ended in a child of this process: `noticed`, `survived` or `hung`."""
    FOUND.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        os._exit(_child(change, tests))
    end = time.monotonic() + limit
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return "survived" if os.waitstatus_to_exitcode(status) == 0 else "noticed"
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hung"
        time.sleep(0.02)


def _child(change: Change | None, tests: Sequence[str]) -> int:
    import pytest

    with (FOUND / "output").open("w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    if change is not None:
        sys.meta_path.insert(0, _Finder(change))
    options = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:warnings"]
    try:
        return int(pytest.main([*options, *(node for test in tests for node in _nodes(test))]))
    except BaseException:  # noqa: BLE001 - whatever ends the tests has noticed the change
        return 1


def _nodes(test: str) -> list[str]:
    """A file for pytest, or the functions of it whose names begin as it says."""
    name, _, begin = test.partition("::")
    if not begin:
        return [f"tests/{name}"]
    tree = ast.parse(_bytes(f"tests/{name}"))
    found = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith(begin)]
    assert found, test
    return [f"tests/{name}::{function}" for function in found]


def _note(log: Path, records: list[dict[str, str]]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)


def _bytes(path: str) -> bytes:
    return (ROOT / path).read_bytes()


if __name__ == "__main__":
    sys.exit(main())
