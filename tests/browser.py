"""A real browser for tests: headless Debian chromium with the network off, and a record of a page's complaints."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_MISSING = "there is no chromium: apt-get install --no-install-recommends chromium fonts-noto-color-emoji"


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser. Where there is none, the test is skipped, but in CI it fails."""
    executable = shutil.which("chromium")
    if executable is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(_MISSING)
    from playwright.sync_api import sync_playwright

    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=sandbox)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Opened:
    """A page from disk, and what it said, asked for, or was refused."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def all(self, selector: str, script: str) -> Any:
        """What a function of one element, as JavaScript, gives for every element of a selector."""
        return self.page.eval_on_selector_all(selector, f"(all) => all.map({script})")

    def text(self, selector: str) -> str:
        return str(self.page.text_content(selector))


@contextlib.contextmanager
def opened(browser: Any, path: Path, *, width: int = 1400, **options: Any) -> Iterator[Opened]:
    """A page with the network off; at its end it must not have complained or asked for anything but itself."""
    context = browser.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
    found = Opened(context.new_page())
    found.page.on("console", lambda m: found.complaints.append(f"console {m.type}: {m.text}"))
    found.page.on("pageerror", lambda e: found.complaints.append(f"error: {e}"))
    found.page.on("dialog", lambda d: (found.complaints.append(f"dialog: {d.message}"), d.dismiss()))
    found.page.on("request", lambda r: found.requests.append(r.url))
    found.page.add_init_script(
        "addEventListener('securitypolicyviolation', (e) => console.error('policy', e.violatedDirective, e.blockedURI))"
    )
    found.page.goto(path.as_uri())
    yield found
    context.close()
    assert found.complaints == []
    assert [r for r in found.requests if not r.startswith("data:")] == [path.as_uri()]
