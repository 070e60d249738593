"""What may import what, what importing costs, and what lands where when the package is installed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "polars", "transformers", "pyarrow", "numpy", "vllm", "ray", "httpx", "huggingface_hub", "rich")

# Every module has a layer, and imports only from its own and from those before it.
LAYERS: dict[str, tuple[str, ...]] = {
    "schemas": ("schemas", "schemas.errors", "schemas.config", "schemas.tables", "schemas.manifest"),
    "pure": (
        "schedule", "sampling", "frames", "vocabulary", "head", "signals", "rowsums", "topk", "fused_head", "loss",
        "packing", "batch", "coefficient", "precision", "prepare", "summary", "teachers", "weighing", "rules",
        "rules.base", "rules.tokens", "rules.statistics", "rules.evaluate", "rules.compose", "rules.own", "rules.fire",
        "rules.controls", "rules.repairs", "rules.filters", "rules.weights", "rules.masks", "rules.advantages",
        "rules.candidates", "rules.topk", "rules.forward_kl", "rules.expression", "verify.answers", "verify.choice",
        "verify.estimates", "verify.bootstrap", "verify.program", "pyfile", "harmless", "explain.formula",
        "explain.rule", "reference", "reference.columns", "reference.config", "reference.rules", "diagnose",
        "diagnose.auroc", "diagnose.checks", "diagnose.finding", "diagnose.measure", "diagnose.premise",
        "diagnose.responses", "diagnose.signals", "compare", "compare.asked", "compare.plot", "compare.tally",
    ),
    "storage and engines": (
        "partial", "records", "distributed", "launch", "pieces", "files", "metrics", "shards", "stages", "prompts",
        "run", "create", "overview", "environment", "tokenview", "chat", "modelfiles", "models", "engines", "kvcache",
        "generate", "scoring", "optim", "trainmode", "packed", "lora", "training", "trainstate", "stream", "kept",
        "contract", "http_words", "http_calls", "http_client", "http_dialect", "http_probe", "http_engine",
        "vllm_process", "vllm_engine", "vllm_worker", "vllm_worker.fire_vllm", "ray_cluster", "ray_engine", "outside",
        "session", "hub", "hub.layout", "hub.redact", "hub.client", "hub.card", "hub.flat", "hub.checkpoint",
        "hub.push", "hub.pull", "hub.start", "verify", "verify.pool", "verify.worker", "verify.maths", "verify.sandbox",
        "standing", "trackers",
    ),
    "steps": (
        "", "steps", "steps.rollout", "steps.score", "steps.weigh", "steps.train", "steps.evaluate", "steps.refresh",
        "steps.inputs", "steps.engines", "steps.passes", "steps.columns", "steps.passrate", "steps.diagnose",
        "steps.benchmarks", "steps.compare", "steps.verify", "steps.versus", "steps.rounds", "steps.track", "explain",
        "explain.weights", "explain.factors", "plan", "plan.figures", "plan.models", "plan.stages", "report",
        "report.data", "report.measure", "report.page", "report.plots", "report.sample", "report.sections",
        "report.settings", "report.tables", "report.text", "report.trajectories", "worlds", "worlds.arithmetic",
        "worlds.lists", "worlds.addition", "worlds.successor", "worlds.world", "worlds.two_domains", "worlds.lost",
        "worlds.registry", "worlds.build", "demo", "demo.arms", "demo.curve", "experiment", "experiment.spec",
        "experiment.cells", "experiment.workers", "experiment.statistics", "experiment.table", "experiment.summary",
        "experiment.page", "experiment.run",
    ),
    "cli": (
        "reference.commands", "reference.__main__", "cli", "cli.app", "cli.__main__", "cli.launch", "cli.completion",
        "cli.evals", "cli.examples", "cli.explain", "cli.progress", "cli.report", "cli.share", "cli.status",
        "cli.watch", "cli.options", "cli.stages", "cli.look", "cli.errors", "cli.inspect", "cli.terminal", "cli.rules",
        "cli.diagnose", "cli.compare", "cli.plan", "cli.track", "cli.experiment",
    ),
}  # fmt: skip
PURE_MAY_NOT = {"os", "time", "logging", "pathlib", "random", "datetime", "socket", "subprocess", "uuid", "secrets"}


def modules() -> dict[str, Path]:
    """Name below `fire_data` -> file, for every module of the package."""
    found = {}
    for folder, prefix in (("fire_data", ""), ("schemas", "schemas"), ("cli", "cli")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = (*([prefix] if prefix else []), *path.relative_to(ROOT / folder).with_suffix("").parts)
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports, also late and for types only."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [a.name for a in node.names if a.name.split(".")[0] == "fire_data"]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(["fire_data", *package[: len(package) - node.level + 1], *([base] if base else [])])
            if base.split(".")[0] == "fire_data":
                targets = [f"{base}.{a.name}" for a in node.names] + [base]
        for target in targets:
            below = target.removeprefix("fire_data").removeprefix(".")
            if below in known:
                found.add(below)
    return found - {"", name}


def test_every_module_has_a_layer_and_every_layer_its_modules() -> None:
    listed = [m for layer in LAYERS.values() for m in layer]
    assert sorted(listed) == sorted(modules()), "a new module needs a place in LAYERS"


def test_imports_go_downhill_only() -> None:
    known = modules()
    rank = {m: i for i, layer in enumerate(LAYERS.values()) for m in layer}
    uphill = [
        f"{name} imports {other}"
        for name, path in known.items()
        for other in imported(name, path, known)
        if rank[other] > rank[name]
    ]
    assert uphill == []


def test_schemas_import_nothing_of_the_project() -> None:
    known = modules()
    for name in LAYERS["schemas"]:
        assert all(m.startswith("schemas") for m in imported(name, known[name], known)), name


def test_pure_code_knows_no_path_clock_environment_or_randomness() -> None:
    known = modules()
    for name in LAYERS["pure"]:
        tree = ast.parse(known[name].read_text(encoding="utf-8"))
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
        assert not names & PURE_MAY_NOT, name
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not calls & {"open", "print", "input"}, name


def python(*arguments: str, executable: str = sys.executable, cwd: Path | None = None) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [executable, *arguments], capture_output=True, text=True, timeout=120, check=False, env=env, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["rollout", "--help"], ["train", "--help"], ["demo", "--help"], ["--nonsense"], None]
)
def test_help_and_import_load_nothing_heavy(arguments: list[str] | None) -> None:
    run = "import fire_data" if arguments is None else (
        f"sys.argv = {['fire', *arguments]!r}\n"
        "from fire_data.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
    )  # fmt: skip
    script = f"import sys\n{run}\nprint('LOADED', sorted({HEAVY!r} & sys.modules.keys()))".replace(
        repr(HEAVY), repr(set(HEAVY))
    )
    loaded = python("-c", script).rpartition("LOADED ")[2].strip()
    allowed = {"rich"} if arguments is not None else set()  # typer draws its help with it
    assert set(ast.literal_eval(loaded)) <= allowed


def test_commands_that_need_no_model_load_no_torch(tmp_path: Path) -> None:
    (tmp_path / "fire.yaml").write_text("student: {model: m}\n")
    for arguments in (["rules"], ["rules", "fire"], ["status", str(tmp_path)], ["check", str(tmp_path)],
                      ["inspect", str(tmp_path), "--schema"]):  # fmt: skip
        script = (
            f"import sys; sys.argv = {['fire', *arguments]!r}\n"
            "from fire_data.cli import main\n"
            "try: main()\n"
            "except SystemExit as e: assert not e.code, e.code\n"
            "print('LOADED', sorted({'torch', 'transformers'} & sys.modules.keys()))"
        )
        assert python("-c", script).rpartition("LOADED ")[2].strip() == "[]", arguments


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built wheel. From a copy, so that no build folder appears beside the sources."""
    target = tmp_path_factory.mktemp("wheel")
    source = target / "source"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    python("-m", "build", "--wheel", "--outdir", str(target), str(source))
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_called_cli_or_schemas_beside_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.partition("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"fire_data"}
    for name, path in modules().items():
        expected = "/".join(["fire_data", *filter(None, name.split("."))])
        assert (f"{expected}/__init__.py" if path.name == "__init__.py" else f"{expected}.py") in names
    assert "fire_data/py.typed" in names
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_wheel_works_in_a_clean_environment_without_extras(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    executable = str(environment / "bin" / "python")
    done = subprocess.run(
        [executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(wheel)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    site = Path(python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", executable=executable).strip())
    assert not [p.name for p in site.iterdir() if p.name.lower() in ("cli", "schemas", "cli.py", "schemas.py", "tests")]
    assert not (site / "torch").exists()
    fire = [str(environment / "bin" / "fire")]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*fire, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)

    assert "rollout" in run("--help").stdout
    rules = run("rules", "--json")
    assert {"fire", "uniform", "random"} <= {r["name"] for r in json.loads(rules.stdout)}
    assert run("env").returncode == 0
    assert run("init", "a-run", "--student", "some/model").returncode == 0
    answer = run("rollout", "a-run")
    assert answer.returncode != 0
    assert "Traceback" not in answer.stderr
    demo = run("demo", "world")
    assert demo.returncode == 1
    assert "pip install 'fire-opd[torch" in demo.stderr
    assert "Traceback" not in demo.stderr
