"""The page of promises is true: its tests exist, and its figures are those that the campaign counted."""

from __future__ import annotations

import re
from pathlib import Path

from tests.campaign import COUNTS, Record, table

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")


def test_every_promise_names_tests_and_all_of_them_exist() -> None:
    promises = re.findall(r"^\*\*.+?(?=^\*\*|^## |\Z)", PAGE, re.M | re.S)
    named = [re.findall(r"^\* `(\S+)::(test_\w+)`$", text, re.M) for text in promises]
    assert len(promises) >= 15
    assert all(named)
    gone = [(f, t) for tests in named for f, t in tests if f"def {t}(" not in (ROOT / f).read_text(encoding="utf-8")]
    assert gone == []


def test_the_figures_are_those_of_the_campaign() -> None:
    assert table(Record(COUNTS)) in PAGE
