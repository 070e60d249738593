"""The page of all built-in rules: formula, parameters, what each needs and believes, and its paper."""

from __future__ import annotations

import html
from typing import Any

from fire_data.reference import code, prose, table
from fire_data.rules import RULES, describe_rule

_INTRODUCTION = """# Rules, one by one

Made from the code, as `fire rules NAME` shows them. [Rules](../rules.md) says how they work together and how to write
one.

* *changes*: what the rule decides; all else is kept, weighs 1 and has the advantage log p_T − log p_S.
* *scope*: the populations of its statistics; `token` has none.
* *stale*: its decisions depend on the student, so the weights are right for the first steps of a round.
* *beside scores*: what must be stored beyond the scores.
"""


def page() -> str:
    """Markdown of the page: a table of all rules, then each in full."""
    described = [describe_rule(name) for name in RULES]
    rows = [
        [f"[`{d['name']}`](#{anchor(d['name'])})", ", ".join(d["changes"]), ", ".join(d["scope"]),
         "yes" if d["stale"] else "", ", ".join(d["adds"]), prose(d["what"])]
        for d in described
    ]  # fmt: skip
    head = table(("rule", "changes", "scope", "stale", "beside scores", "what it does"), rows)
    return "\n".join([_INTRODUCTION, head, *map(_rule, described)])


def anchor(name: str) -> str:
    """The name of a rule's heading in addresses: headings elsewhere on the page may be called as a rule is."""
    return f"rule-{name}"


def _rule(described: dict[str, Any]) -> str:
    papers = ", ".join(f"[arXiv {p}](https://arxiv.org/abs/{p})" for p in described["paper"])
    facts = {
        "paper": papers,
        "believes": prose(described["believes"]),
        "changes": ", ".join(described["changes"]),
        "scope": ", ".join(described["scope"]),
        "needs": ", ".join(f"`{c}`" for c in described["needs"]),
        "beside scores": ", ".join(described["adds"]),
        "entropies": ", ".join(f"`{c}`" for c in described["entropies"])
        and ", ".join(f"`{c}`" for c in described["entropies"]) + ": exact ones, unless `weigh.entropy: any`",
        "stale": "yes" if described["stale"] else "no",
    }
    lines = [f"## `{described['name']}` {{ #{anchor(described['name'])} }}", "", f"{prose(described['what'])}.", ""]
    lines += [f"<pre>{html.escape(described['formula'])}</pre>", ""]
    lines += [f"* *{k}*: {v}" for k, v in facts.items() if v]
    rows = [[f"`{p['name']}`", code(str(p["value"])), code(p["type"])] for p in described["parameters"]]
    return "\n".join([*lines, "", table(("parameter", "default", "may be"), rows)])
