"""The report in a real browser, from disk and with the network off: numbers, keys, hostile text, themes, a phone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("playwright")

from fire_data import metrics
from fire_data.report import write_report
from fire_data.run import Run
from fire_data.schemas.config import Config
from tests.browser import Opened, chromium, opened
from tests.reported import Row, make_report_run, many

LINE = "x" * 1_000_000
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&lt;b&gt;"
ESCAPES = "\x1b[31mred\x1b[0m\x07"
MARKS = "\u202egnp.exe\u2066 \u200f"
EMOJI = "👩‍👩‍👧‍👦🇩🇪👍🏽é"
HOSTILE = f"{EVIL} {ESCAPES} {MARKS} {EMOJI} שלום"

FOCUSED = """() => {
  const e = document.activeElement, style = getComputedStyle(e);
  if (e === document.body) return null;
  const label = e.getAttribute("aria-label") || (e.labels && e.labels.length ? e.labels[0].textContent : "");
  return [e.id || e.tagName, (label || e.textContent).trim(), style.outlineStyle, parseFloat(style.outlineWidth)];
}"""  # what has the focus, its name, and how it shows


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """40 trajectories with weights of two rules, and some optimizer steps."""
    made = make_report_run(tmp_path_factory.mktemp("page") / "run", many(40), others=["uniform"])
    for step in range(8):
        metrics.append(made.root / "metrics.jsonl", {"global_step": step, "loss": 1 / (1 + step), "grad_norm": 0.1})
    return made


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(run, tmp_path_factory.mktemp("html") / "a report.html").path


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that a model, a prompt or a name could try, as weights whose rule says so too."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [
        Row(HOSTILE, HOSTILE, 1.0, EVIL + ESCAPES, HOSTILE, prompt_id=EVIL),
        Row(LINE, LINE, 0.0, MARKS, LINE),
        Row("", "nothing", None, EMOJI),
        *(Row(f"{HOSTILE} {i}", f"{i}", 0.0, "plain") for i in range(5)),
    ]
    rule = {"keep": "length > 0", "weight": "1.0 /* </style><script>alert(3)</script> \u202e */"}
    made = make_report_run(folder / "run", rows, rule=rule, name="odd+name", rows_per_shard=4)
    return write_report(made, folder / "hostile.html").path


def near(found: Opened) -> Opened:
    """The page with its trajectories in view."""
    found.page.locator("#browser").scroll_into_view_if_needed()
    found.page.wait_for_selector("#list li")
    return found


# --- opening -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_from_disk_with_all_its_parts(browser: Any, page: Path, scheme: str) -> None:
    with opened(browser, page, color_scheme=scheme) as found:
        near(found)
        headings = found.all("h2", "(e) => e.textContent")
        assert headings == [
            "Rounds at a glance", "What the filter did", "Where the weight is", "Training", "Findings", "Trajectories",
            "Setup",
        ]  # fmt: skip
        boxes = found.all("figure svg", "(e) => e.getBoundingClientRect().height")
        assert len(boxes) > 12
        assert min(boxes) > 20
        assert found.page.locator("#list li").count() == 40
        assert "40 of 40" in found.text("#counted")


def test_the_policy_allows_its_own_style_and_script_and_nothing_else(browser: Any, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)[0]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"<[^>]+\s(style|on\w+)\s*=", text.partition("<script")[0])
    assert not re.search(r"https?://", text.partition('<script type="application/json"')[0])
    context = browser.new_context()
    tab = context.new_page()
    refused = []
    tab.on("console", lambda message: refused.append(message.text))
    added = "<script>document.title = 'mine'</script><b style='color: red'>x</b></body>"
    tab.route("**/*", lambda route: route.fulfill(body=text.replace("</body>", added), content_type="text/html"))
    tab.goto("http://report.invalid/")
    assert tab.title() != "mine"
    assert any("Content Security Policy" in message for message in refused), "a policy that refuses nothing is none"
    context.close()


def test_without_scripts_everything_but_the_browser_is_there(browser: Any, page: Path) -> None:
    with opened(browser, page, java_script_enabled=False) as found:
        assert found.page.locator("figure svg").count() > 12
        assert found.page.locator("#browser").is_hidden()
        assert found.page.locator("noscript p").is_visible()


# --- the heat map --------------------------------------------------------------------------------------------------


def test_the_numbers_beside_a_token_are_those_of_the_table(browser: Any, run: Run, page: Path) -> None:
    rows = {r["trajectory_id"]: r for r in run.weights(round=0).collect().iter_rows(named=True)}
    with opened(browser, page) as found:
        near(found)
        for _ in range(3):
            row = rows[found.text("#facts div:nth-child(1) dd")]
            tokens = found.page.locator("#tokens-a span[data-at]")
            for at in {0, 1, tokens.count() // 2, tokens.count() - 1}:
                tokens.nth(at).hover()
                first, count = tokens.nth(at).evaluate("(e) => [e.first, e.count]")
                names = found.all("#numbers tbody tr", "(e) => e.dataset.key")
                assert {"weight", "coefficient", "advantage", "student_entropy", "reverse_kl", "teacher_rank"} <= {
                    *names
                }
                values = found.all(
                    "#numbers tbody tr", "(e) => [...e.querySelectorAll('td')].map((d) => d.textContent)"
                )
                for name, shown in zip(names, values, strict=True):
                    expected = row[name][first : first + count]
                    assert [float(v) for v in shown] == [float(f"{v:.6g}") for v in expected], (name, at)
            found.page.keyboard.press("j")


def test_characters_of_several_tokens_stay_whole_and_show_each_tokens_numbers(browser: Any, page: Path) -> None:
    with opened(browser, page) as found:
        near(found)
        found.page.select_option("#sort", "longest")
        texts = found.all("#tokens-a span[data-at]", "(e) => [e.textContent, e.count]")
        assert {("和", 3), ("🙂", 4), ("é", 2)} & {(text, count) for text, count in texts}
        assert not any("\ufffd" in text for text, _ in texts)
        at = next(i for i, (_, count) in enumerate(texts) if count > 1)
        found.page.locator("#tokens-a span[data-at]").nth(at).hover()
        assert found.page.locator("#numbers thead th").count() == 1 + texts[at][1]


def test_signals_change_the_colours_and_the_legend(browser: Any, page: Path) -> None:
    with opened(browser, page) as found:
        near(found)
        looks = []
        for key in "123456789":
            found.page.keyboard.press(key)
            checked = found.all("#signals button", "(e) => e.getAttribute('aria-checked')")
            assert checked.index("true") == int(key) - 1
            assert checked.count("true") == 1
            colours = found.all("#tokens-a span[data-at]", "(e) => getComputedStyle(e).backgroundColor")
            looks.append((found.text("#legend"), tuple(colours)))
            assert len({*colours}) > 2
        assert len({*looks}) == 9
        assert found.text("#signals button:nth-child(3)") == "3advantage"
        found.page.keyboard.press("3")
        signs = {True: "n", False: "p"}
        for token, look, count in found.all("#tokens-a span[data-at]", "(e) => [e.id, e.className, e.count]"):
            found.page.locator(f"#{token}").hover()
            value = float(found.text("#numbers tr[data-key=advantage] td"))
            if count == 1:
                assert look.removesuffix("at")[:1] in ("", signs[value < 0]), token
        found.page.locator("#signals button").nth(4).click()
        assert "teacher logprob" in str(found.page.get_attribute("#legend", "aria-label"))


def test_every_colour_leaves_its_text_readable_in_both_themes(browser: Any, page: Path) -> None:
    contrast = """(e) => {
      const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
      const light = (colour) => {
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255)
          .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const style = getComputedStyle(e), ink = light(style.color), paper = light(style.backgroundColor);
      return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    }"""
    steps = [*(f"u{i}" for i in range(1, 10)), *(f"{s}{i}" for s in "np" for i in range(1, 7))]
    for scheme in ("light", "dark"):
        with opened(browser, page, color_scheme=scheme) as found:
            near(found)
            for step in steps:
                found.page.eval_on_selector("#tokens-a span", "(e, name) => { e.className = name; }", step)
                assert found.page.eval_on_selector("#tokens-a span", contrast) >= 4.5, (scheme, step)


# --- keys, filters, orders -----------------------------------------------------------------------------------------


def test_the_keyboard_reaches_tokens_trajectories_and_signals(browser: Any, page: Path) -> None:
    with opened(browser, page) as found:
        near(found)
        keyboard = found.page.keyboard
        found.page.focus("#tokens-a")
        selected = "#tokens-a [aria-selected=true]"
        places = [found.page.get_attribute(selected, "data-at")]
        for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "Home"):
            keyboard.press(key)
            places.append(found.page.get_attribute(selected, "data-at"))
        last = found.page.locator("#tokens-a span[data-at]").count() - 1
        assert places == ["0", "1", "2", "1", str(last), "0"]
        assert found.page.get_attribute("#tokens-a", "aria-activedescendant") == "a0"
        top = found.page.locator("#a0").bounding_box()
        keyboard.press("ArrowDown")
        below = found.page.locator(selected).bounding_box()
        assert top is not None
        assert below is not None
        assert below["y"] > top["y"]
        keyboard.press("ArrowUp")
        assert found.page.get_attribute(selected, "data-at") == "0"
        ids = [found.text("#facts dd")]
        for key in ("j", "j", "k"):
            keyboard.press(key)
            ids.append(found.text("#facts dd"))
        assert ids[3] == ids[1] != ids[0]
        assert found.page.evaluate("document.activeElement.id") == "tokens-a", "focus stays with the tokens"
        keyboard.press("s")
        assert found.page.get_attribute("#signals button:nth-child(2)", "aria-checked") == "true"
        found.page.focus("#list")
        keyboard.press("End")
        assert found.page.get_attribute("#list li:last-child", "aria-selected") == "true"


def test_all_that_can_be_focused_shows_it_and_has_a_name(browser: Any, page: Path) -> None:
    with opened(browser, page) as found:
        found.page.keyboard.press("Tab")
        assert found.page.evaluate("document.activeElement.className") == "skip"
        assert found.page.locator(".skip").bounding_box()["x"] >= 0
        found.page.keyboard.press("Enter")
        found.page.wait_for_selector("#list li")
        assert found.page.evaluate("document.activeElement.id") == "trajectories"
        stops: list[str] = []
        for _ in range(40):
            found.page.keyboard.press("Tab")
            stop = found.page.evaluate(FOCUSED)
            if stop is None:
                break
            assert stop[1], stop
            assert stop[2] != "none", stop
            assert stop[3] >= 2, stop
            stops.append(stop[0])
        assert {"f-keep", "sort", "list", "tokens-a"} <= {*stops}


def test_filters_and_orders_list_what_they_say(browser: Any, run: Run, page: Path) -> None:
    rows = {r["trajectory_id"]: r for r in run.weights(round=0).collect().iter_rows(named=True)}

    def listed(found: Opened) -> list[dict[str, Any]]:
        ids = []
        for i in range(found.page.locator("#list li").count()):
            found.page.locator("#list li").nth(i).click()
            ids.append(found.text("#facts dd"))
        return [rows[i] for i in ids]

    with opened(browser, page) as found:
        near(found)
        found.page.select_option("#f-keep", "dropped")
        dropped = listed(found)
        assert len(dropped) == sum(not r["keep"] for r in rows.values())
        assert not any(r["keep"] for r in dropped)
        found.page.select_option("#f-keep", "kept")
        found.page.select_option("#f-outcome", "correct")
        found.page.select_option("#f-teacher", "code")
        chosen = listed(found)
        assert {(r["keep"], r["reward"], r["teacher"]) for r in chosen} == {(True, 1.0, "code")}
        found.page.select_option("#f-outcome", "all")
        values: dict[str, Callable[[dict[str, Any]], float]] = {
            "longest": lambda r: -r["length"],
            "most surprising to the teacher": lambda r: r["teacher_logprob_sum"] / r["length"],
            "largest weight": lambda r: -max(r["weight"]),
            "most negative advantage": lambda r: min(r["advantage"]),
        }
        for order, value in values.items():
            found.page.select_option("#sort", order)
            measured = [value(r) for r in listed(found)]
            assert measured == sorted(measured), order
            assert len({*measured}) > 3


# --- side by side --------------------------------------------------------------------------------------------------


def test_two_rules_stand_side_by_side_and_point_at_the_same_token(browser: Any, run: Run, tmp_path: Path) -> None:
    tables = {
        n: {r["trajectory_id"]: r for r in run.weights(n, 0).collect().iter_rows(named=True)}
        for n in ("fire", "uniform")
    }
    path = write_report(run, tmp_path / "two.html", against="uniform").path
    with opened(browser, path) as found:
        near(found)
        assert found.all("#sides h3 b", "(e) => e.textContent") == ["fire", "uniform"]
        which = found.text("#facts dd")
        found.page.locator("#b3").hover()
        assert found.page.get_attribute("#a3", "aria-selected") == "true"
        assert found.all("#numbers thead th", "(e) => e.textContent") == ["", "fire", "uniform"]
        values = found.all("#numbers tr[data-key=coefficient] td", "(e) => Number(e.textContent)")
        expected = [float(f"{tables[n][which]['coefficient'][3]:.6g}") for n in ("fire", "uniform")]
        assert values == expected
        assert found.page.get_attribute("#numbers tr[data-key=teacher_logprob] td", "colspan") == "2"
        boxes = [found.page.locator(f"#tokens-{side}").bounding_box() for side in "ab"]
        assert boxes[0]["y"] == boxes[1]["y"]
        assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]


def test_two_rounds_stand_side_by_side(browser: Any, tmp_path: Path) -> None:
    run = make_report_run(tmp_path / "run", many(16), rounds=2)
    path = write_report(run, tmp_path / "two.html", against="0").path
    with opened(browser, path) as found:
        near(found)
        assert found.all("#sides h3 b", "(e) => e.textContent") == ["round 1", "round 0"]
        assert found.text("#tokens-a") == found.text("#tokens-b")
        found.page.locator("#b0").hover()
        assert found.page.get_attribute("#a0", "aria-selected") is None, "each round has tokens of its own"


# --- hostile content -----------------------------------------------------------------------------------------------


def test_hostile_text_is_shown_as_text(browser: Any, hostile: Path) -> None:
    with opened(browser, hostile) as found:
        near(found)
        assert found.page.locator("script:not([type])").count() == 1
        assert found.page.locator("img, b script, #browser script").count() == 0
        found.page.locator("#list li", has_text="alert(1)").first.click()
        shown = found.text("#tokens-a")
        assert EVIL in shown
        assert r"\x1b[31mred\x1b[0m\x07" in shown
        assert r"\u202egnp.exe\u2066" in shown
        assert EMOJI in shown
        assert "שלום" in shown
        for place in ("#prompt p", "#facts", "#f-teacher"):
            assert EVIL in found.text(place), place
        everything = found.page.inner_text("body")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\u200e\u200f]", everything)
        assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_joined_emoji_are_one_run_of_tokens(browser: Any, hostile: Path) -> None:
    with opened(browser, hostile) as found:
        near(found)
        found.page.locator("#list li", has_text="alert(1)").first.click()
        runs = found.all("#tokens-a span[data-at]", "(e) => e.textContent")
        assert "👩‍👩‍👧‍👦" in runs
        assert {"🇩🇪", "👍🏽"} <= {*runs}
        widths = {
            text: found.page.locator("#tokens-a span[data-at]").nth(i).bounding_box()["width"]
            for i, text in enumerate(runs)
            if text in ("👩‍👩‍👧‍👦", "👍🏽")
        }
        assert widths["👩‍👩‍👧‍👦"] < 1.5 * widths["👍🏽"], "one picture, not four"


def test_a_megabyte_in_one_line_is_cut_and_said(browser: Any, hostile: Path) -> None:
    assert hostile.stat().st_size < 3_000_000
    with opened(browser, hostile, width=390) as found:
        near(found)
        found.page.select_option("#sort", "longest")
        assert found.text("#tokens-a") == "x" * 1_500
        assert "1,500 of 1,000,000 tokens are shown." in found.text("#sides")
        assert found.text("#prompt p bdi") == "x" * 4_000 + "…"
        assert found.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_an_empty_response_says_so(browser: Any, hostile: Path) -> None:
    with opened(browser, hostile) as found:
        near(found)
        found.page.locator("#list li", has_text="nothing").click()
        assert "The response is empty." in found.text("#tokens-a")
        assert "no token" in found.text("#numbers")
        found.page.focus("#tokens-a")
        found.page.keyboard.press("ArrowDown")


def test_right_to_left_text_reads_as_such_and_does_not_turn_the_page_around(browser: Any, tmp_path: Path) -> None:
    run = make_report_run(tmp_path / "run", [Row("שלום עולם טוב", "שאלה")], rule="uniform")
    with opened(browser, write_report(run, tmp_path / "rtl.html").path) as found:
        near(found)
        tokens = found.page.locator("#tokens-a span[data-at]")
        first, last = tokens.nth(0).bounding_box(), tokens.nth(tokens.count() - 1).bounding_box()
        assert first["x"] > last["x"]
        labels = found.all("#facts dt, #facts dd", "(e) => e.getBoundingClientRect().x")
        assert labels[0] < labels[1]


# --- parts that are missing ----------------------------------------------------------------------------------------


def _empty(folder: Path) -> Run:
    return make_report_run(folder, [Row("", f"{i}") for i in range(4)], rule="uniform")


def _no_tokenizer(folder: Path) -> Run:
    run = make_report_run(folder, many(8))
    missing = run.config.student.model_copy(update={"model": str(folder / "nowhere")})
    return Run(run.root, Config.model_validate({**run.config.model_dump(), "student": missing.model_dump()}))


def _rollouts(folder: Path) -> Run:
    return make_report_run(folder, many(8), stages=["rollouts"])


def _scores(folder: Path) -> Run:
    return make_report_run(folder, many(8), stages=["rollouts", "scores"])


def _nothing_kept(folder: Path) -> Run:
    return make_report_run(folder, many(8), rule={"keep": "length < 0", "weight": "1.0"})


def _no_signal(folder: Path) -> Run:
    return make_report_run(folder, many(8), rule={"weight": "0.0"})


PARTIAL: dict[str, tuple[Callable[[Path], Run], list[str]]] = {
    "rollouts": (_rollouts, ["not scored yet", "fire score", "fire eval", "fire train"]),
    "scores": (_scores, ["no weights yet", "fire weigh"]),
    "nothing kept": (_nothing_kept, ["No trajectory was kept"]),
    "no signal": (_no_signal, ["Every coefficient is 0"]),
    "empty responses": (_empty, ["No trajectory has a token"]),
    "no tokenizer": (_no_tokenizer, ["tokens are shown as their ids"]),
}


@pytest.mark.parametrize("part", PARTIAL)
def test_a_report_of_a_run_that_lacks_a_part_says_so(part: str, browser: Any, tmp_path: Path) -> None:
    make, words = PARTIAL[part]
    made = write_report(make(tmp_path / "run"), tmp_path / "report.html")
    with opened(browser, made.path) as found:
        near(found)
        text = found.text("main")
        for word in words:
            assert word in text, word
        assert found.page.locator("#list li").count() == made.trajectories
        for _ in range(3):
            found.page.keyboard.press("j")
        for key in "s59":
            found.page.keyboard.press(key)
        if part == "no tokenizer":
            assert re.fullmatch(r"(⟨\d+⟩)+", found.text("#tokens-a"))
        if part == "rollouts":
            assert found.page.locator("#numbers tr[data-key=rollout_logprob]").count() == 1


# --- looks ---------------------------------------------------------------------------------------------------------


def test_the_page_is_readable_on_a_phone(browser: Any, page: Path) -> None:
    with opened(browser, page, width=390, is_mobile=True, has_touch=True) as found:
        near(found)
        found.page.locator("#list li").nth(1).tap()
        found.page.locator("#tokens-a span[data-at]").nth(2).tap()
        assert found.page.get_attribute("#a2", "aria-selected") == "true"
        assert found.page.evaluate("document.documentElement.scrollWidth") <= 390
        sizes = found.all(
            "main p, main dd, main td, #tokens-a, #list bdi", "(e) => parseFloat(getComputedStyle(e).fontSize)"
        )
        assert min(sizes) >= 12
        column = found.page.locator("#reader").bounding_box()
        assert column["width"] > 330


def test_on_a_phone_the_numbers_come_with_a_chosen_token_and_go_again(browser: Any, page: Path) -> None:
    with opened(browser, page, width=390, is_mobile=True, has_touch=True) as found:
        near(found)
        numbers, token = found.page.locator("#numbers"), found.page.locator("#tokens-a span[data-at]")
        assert numbers.is_hidden()
        token.last.tap()
        assert numbers.is_visible()
        assert token.last.bounding_box()["y"] < numbers.bounding_box()["y"], "they do not cover it"
        found.page.locator("#close").tap()
        assert numbers.is_hidden()
        token.nth(1).tap()
        found.page.keyboard.press("Escape")
        assert numbers.is_hidden()
        found.page.keyboard.press("ArrowRight")
        assert numbers.is_visible()
        found.page.locator("#list li").nth(1).tap()
        assert numbers.is_hidden(), "of another trajectory no token is chosen"
    with opened(browser, page) as found:
        near(found)
        assert found.page.locator("#numbers").is_visible(), "a wide window has room for them"
        assert found.page.locator("#close").is_hidden()


@pytest.mark.parametrize("prints", [False, True])
def test_trajectories_are_there_without_scrolling_and_on_paper(browser: Any, page: Path, prints: bool) -> None:
    never = "Object.defineProperty(window, 'requestIdleCallback', { value: () => 0 })"
    context = browser.new_context(offline=True)
    tab = context.new_page()
    if prints:
        tab.add_init_script(never)
    tab.goto(page.as_uri())
    if prints:
        assert tab.locator("#list li").count() == 0
        tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    tab.wait_for_selector("#tokens-a span", state="attached", timeout=5_000)
    assert tab.locator("#list li").count() == 40
    assert tab.evaluate("scrollY") == 0
    context.close()


def test_the_theme_follows_the_system_and_can_be_switched(browser: Any, page: Path) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    line = "getComputedStyle(document.querySelector('figure svg [stroke^=var]')).stroke"
    looks = {}
    for scheme in ("light", "dark"):
        with opened(browser, page, color_scheme=scheme) as found:
            before = [found.page.evaluate(paper), found.page.evaluate(line)]
            found.page.click("#theme")
            after = [found.page.evaluate(paper), found.page.evaluate(line)]
            assert before[0] != after[0]
            assert before[1] != after[1], "figures follow"
            looks[scheme] = (before, after)
            found.page.click("#theme")
            assert found.page.evaluate(paper) == before[0]
    assert looks["light"] == looks["dark"][::-1]
