"""The documentation is true: every command and code block runs, settings and links exist, the site needs no network."""

from __future__ import annotations

import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fire_data.run import Run
from tests.browser import chromium
from tests.conftest import Answer
from tests.docpages import Workspace, blocks, copied, pages, settings
from tests.hub_server import Caller, calling, serving

ROOT = Path(__file__).parents[1]
PAGES = list(pages(ROOT))
NOT_RUN = 12  # blocks and commands that tests cannot run: a larger number is a decision
QUESTIONS = ("What is 17 * 23?", "What is 9 * 21?", "Name a prime.", "2 + 2 = ?", "7 * 8 = ?", "3 + 9 = ?")
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}<|assistant|>"


def _save_model(folder: Path, seed: int) -> None:
    """A Qwen3 of two small layers with random weights and a tokenizer of single bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    specials = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*specials, *alphabet])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    size = len(specials) + len(alphabet)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=size, num_key_value_heads=1, head_dim=8, eos_token_id=0, **shape)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Run]) -> Path:
    """What pages find: models under the names they use, prompts, a trained demo, and `runs/mine`, scored."""
    from fire_data.create import fork_run, init_run
    from fire_data.session import Session
    from fire_data.steps.refresh import refresh
    from fire_data.steps.rollout import rollout
    from fire_data.steps.score import score

    root = tmp_path_factory.mktemp("reader") / "here"
    for seed, name in enumerate(("Qwen/Qwen3-0.6B", "Qwen/Qwen3-4B", "my/math-teacher", "my/code-teacher")):
        _save_model(root / name, seed)
    lines = [{"messages": [{"role": "user", "content": q}], "answer": "391"} for q in QUESTIONS]
    for name in ("prompts.jsonl", "held_out.jsonl"):
        (root / name).write_text("".join(json.dumps(x) + "\n" for x in lines))
    (root / "examples").symlink_to(ROOT / "examples")
    (root / "runs" / "routed").mkdir(parents=True)
    (root / "runs" / "routed" / "my").symlink_to("../../my")  # as if fire.yaml named models of the Hub
    demo = make_run(root / "runs" / "demo" / "fire")
    arm = fork_run(demo, root / "runs" / "demo" / "uniform", {"weigh": {"rule": "uniform"}})
    for run in (demo, arm):
        refresh(Session(run), 2)
    models = {"student": {"model": str(root / "Qwen/Qwen3-0.6B")}, "teacher": {"model": str(root / "Qwen/Qwen3-4B")}}
    mine = init_run(root / "runs" / "mine", {**settings(), **models, "prompts": {"path": str(root / "prompts.jsonl")}})
    with Session(mine) as session:
        rollout(session, 0)
        score(session, 0)
    return root


@pytest.fixture
def reader(fire: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Calls `fire` in this process, and where a command asks the Hub, in one whose Hub is on this machine."""
    with ExitStack() as opened:
        callers: list[Caller] = []

        def call(*words: str) -> Any:
            if words[0] not in ("push", "pull") and not any(w.startswith("hf://") for w in words):
                return fire(*words)
            if not callers:
                callers.append(opened.enter_context(calling(opened.enter_context(serving()), tmp_path / "home")))
            callers[0].run(f"import os; os.chdir({os.getcwd()!r})")
            answer = callers[0].fire(*words)
            return Answer(answer["code"], answer["out"], answer["err"])

        yield call


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page: Path, template: Path, tmp_path: Path, reader: Callable[..., Any]) -> None:
    todo = [b for b in blocks(page) if "not run" not in b.marks]
    workspace = Workspace(copied(template, tmp_path / "here"), reader)
    for block in todo:
        for made in re.findall(r"fire init (\S+) --student", block.text):
            if (workspace.root / made / "fire.yaml").exists():
                shutil.rmtree(workspace.root / made)
    for block in todo:
        workspace.run(block)


def test_what_is_not_run_is_little_says_why_and_parses(fire: Callable[..., Any]) -> None:
    skipped = [b for page in PAGES for b in blocks(page) if "not run" in b.marks]
    listed = "\n".join(f"{b.where}: {b.marks['not run']}" for b in skipped)
    assert all(b.marks["not run"] for b in skipped), listed
    assert len(skipped) <= NOT_RUN, listed
    for block in skipped:
        if block.language == "python":
            compile(block.text, block.where, "exec")
        for words in block.commands() if block.language in ("sh", "inline") else ():
            assert fire(*words[1:], "--help").code == 0, block.where


def test_no_command_hides_in_a_block_that_is_not_shell() -> None:
    hidden = [
        f"{page.name}: {line}"
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"    +(fire|python) ", line) and not re.match(r" +\.\.\.", line)
    ]
    assert hidden == [], "indented blocks are not run: use ```sh"


def test_settings_named_in_the_documentation_exist() -> None:
    from fire_data.reference.config import section
    from fire_data.schemas.config import Config

    named = {
        (page.name, *found)
        for page in PAGES
        for found in re.findall(rf"`({'|'.join(Config.model_fields)})\.(\w+)[:`]", page.read_text(encoding="utf-8"))
    }
    assert len(named) > 40
    models = {name: section(field.annotation) for name, field in Config.model_fields.items()}
    wrong = [(p, s, f) for p, s, f in named if s != "teachers" and (m := models[s]) and f not in m.model_fields]
    assert wrong == []


def test_the_page_about_failures_has_every_exit_code_and_every_kind_of_error() -> None:
    from fire_data.schemas import errors

    text = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    rows = {m[1]: int(m[2]) for m in re.finditer(r"^\| `(\w+Error)` \| (\d+) \|", text, re.M)}
    kinds = {n: c.exit_code for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.FireError)}
    assert rows == kinds
    assert {int(m) for m in re.findall(r"^\| (\d+) \|", text, re.M)} == {0, 130, *kinds.values()}


class _Requests(html.parser.HTMLParser):
    """What a browser would fetch for a page, and what the page links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.fetched.append(values.get("src") or "")
        elif tag == "link" and values.get("rel") not in ("canonical", "next", "prev", "alternate", "edit"):
            self.fetched.append(values.get("href") or "")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, as `make docs` builds it; a broken link or a page without a place is an error."""
    pytest.importorskip("material")
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", root / "docs", ignore=shutil.ignore_patterns("reference"))
    shutil.copy(ROOT / "mkdocs.yml", root)
    for command, folder in (
        (["fire_data.reference", root / "docs" / "reference"], ROOT),
        (["mkdocs", "build", "--strict"], root),
    ):
        words = [sys.executable, "-m", *map(str, command)]
        env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
        made = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert made.returncode == 0, made.stdout + made.stderr
    return root / "site"


def test_the_site_builds_without_warnings_and_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    found = sorted(site.rglob("*.html"))
    assert len(found) >= 20
    for page in found:
        outside = [u for u in _Requests(page).fetched if re.match(r"(https?:)?//", u)]
        assert outside == [], page.name
    styles = "".join(p.read_text(encoding="utf-8") for p in site.rglob("*.css"))
    assert not re.search(r"url\(['\"]?(https?:)?//|@import", styles)


def test_the_site_opens_from_disk_without_a_network_and_finds_what_is_searched_for(site: Path) -> None:
    pytest.importorskip("playwright")
    said: list[str] = []
    with chromium() as browser:
        page = browser.new_context(offline=True).new_page()
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: said.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.goto((site / "index.html").as_uri())
        page.click(".md-search__input")
        page.keyboard.type("denominator")
        page.wait_for_selector(".md-search-result__item")
        assert "The denominator" in page.text_content(".md-search-result__list")
        page.goto((site / "reference" / "config.html").as_uri())
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert said == []
    assert wide == 0


def test_every_page_has_a_place_in_the_site(site: Path) -> None:
    for page in PAGES[1:]:
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).exists(), page


def test_reference_pages_have_every_setting_column_rule_and_command(site: Path, fire: Callable[..., Any]) -> None:
    from fire_data.reference.config import section
    from fire_data.rules import RULES
    from fire_data.schemas.config import Config
    from fire_data.schemas.tables import TABLES

    text = {p.stem: p.read_text(encoding="utf-8") for p in (site.parent / "docs" / "reference").glob("*.md")}
    sections = {name: section(field.annotation) for name, field in Config.model_fields.items()}
    settings_ = {*sections, *(f for s in sections.values() if s for f in s.model_fields)}
    assert [f for f in sorted(settings_) if f"`{f}`" not in text["config"]] == []
    assert [c.name for t in TABLES.values() for c in t if f"| `{c.name}` |" not in text["columns"]] == []
    assert [n for n in RULES if f"## `{n}`" not in text["rules"]] == []
    assert "[`fire`](#rule-fire) | filter, weight | step |" in text["rules"]
    names = re.findall(r"^  (\w+) +[A-Z]", fire("--help").out, re.M)
    assert len(names) >= 13
    assert [n for n in names if f"## `fire {n}`" not in text["commands"]] == []
    examples = [b for b in blocks(site.parent / "docs" / "reference" / "commands.md") if b.language == "sh"]
    assert len(examples) == len(names)
    wrong = [w for b in examples for w in b.commands() if fire(*w[1:], "--help").code]
    assert wrong == []


def test_a_setting_says_what_its_change_means_and_its_bounds(site: Path) -> None:
    text = (site.parent / "docs" / "reference" / "config.md").read_text(encoding="utf-8")

    def row(name: str) -> list[str]:
        return [c.strip() for c in next(x for x in text.splitlines() if x.startswith(f"| `{name}` |")).split("|")[2:-1]]

    assert row("top_p")[0] == "number, > 0, ≤ 1"
    assert row("top_p")[-1] == "result"
    assert row("rows_in_flight")[-1] == "free"
    assert row("pass_rate_samples")[-1] == "addon"
    assert row("betas")[:2] == ["2 times number", "<code>[0.9, 0.999]</code>"]
