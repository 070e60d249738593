"""Writes the reference pages into a folder: `python -m fire_data.reference docs/reference`."""

from __future__ import annotations

import sys
from pathlib import Path

from fire_data.reference import columns, commands, config, rules

PAGES = {"commands": commands.page, "config": config.page, "columns": columns.page, "rules": rules.page}


def write_pages(folder: Path) -> None:
    """Write every page as `NAME.md` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / f"{name}.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
