"""How sealed weights were made, from their own manifest: the rule with its parameters, the policies, the statistics.

The configuration may say something else by now. It is asked only for the code of a rule of a user's own, of which a
manifest has the sha256 and not the file.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fire_data.prepare import Weighing
from fire_data.rules import RULES, Composite, Rule, Stats, every, make_rule
from fire_data.rules.base import Mean
from fire_data.run import Run
from fire_data.schemas.errors import ConfigError, FingerprintError
from fire_data.schemas.manifest import Manifest, differences
from fire_data.shards import Part, is_sealed, sealed
from fire_data.steps.weigh import ScoredRound, weights_fields
from fire_data.teachers import Bound, Teachers
from fire_data.weighing import Fitted, labelled


@dataclass(frozen=True)
class Made:
    """Sealed weights with all that is needed to make a row of them again."""

    part: Part
    manifest: Manifest
    table: ScoredRound
    weighing: Weighing
    fitted: Fitted

    def components(self) -> list[tuple[str, Rule, str, Stats]]:
        """Of each rule composed: what it is called here, itself, its paper and its statistics."""
        found = []
        for prefix, rule in labelled(self.weighing.rule):
            label = prefix.removesuffix("/") or self._own_label(rule)
            stats = {k.removeprefix(prefix): v for k, v in self.fitted.stats.items() if k.startswith(prefix)}
            paper = RULES[label].paper if label in RULES else None
            found.append((label, rule, paper or rule.paper, stats))
        return found

    def bound(self, column: str) -> str:
        """What to say of an entropy that is not exact; empty for any other column."""
        record = (self.manifest.recorded.get("entropy") or {}).get(column)
        return str(Bound(record["kind"], tuple(record["of"]), record["mass"])) if record else ""

    def _own_label(self, rule: Rule) -> str:
        """Several names of `fire rules` may be one class with other parameters: the weights may tell which it was."""
        name = str(self.part.name)
        return name if name in RULES and RULES[name].cls is type(rule) else rule.name


def last_weighed(run: Run, name: str | None) -> int:
    """The newest round that has these weights; without any, the newest with rollouts."""
    found = [n for n in run.rounds() if is_sealed(run.part("weights", n, name))]
    return found[-1] if found else run.last_round()


def made_of(run: Run, round: int, name: str | None) -> Made:
    """Sealed weights, and how they were made.

    Raises IncompleteError if they are not sealed, ConfigError if the code of their rule is not to be found,
    FingerprintError if scores or code are not those they were made from.
    """
    part = run.part("weights", round, name)
    manifest = sealed(part)
    fields = manifest.fields
    weighing = Weighing(
        _rule(run, part, fields),
        fields["batch_size"],
        fields["denominator"],
        fields["constant"],
        fields["truncated"],
        fields["end_token"],
        fields["rollout_is_cap"],
        fields["n"],
        Teachers(fields["teacher"]["how"], tuple(fields["teacher"]["names"])) if "teacher" in fields else Teachers(),
        "any",
    )
    table = ScoredRound(run, round, weighing)
    now = weights_fields(weighing, table.source, table.addons)
    if other := differences(fields, now):
        text = f"the weights were made from something else than is there now: {'; '.join(other)}"
        raise FingerprintError(text, where=part.label, fix=f"{part.command} --redo")
    return Made(part, manifest, table, weighing, Fitted(manifest.stats["rule"], manifest.stats["steps"]))


def _rule(run: Run, part: Part, fields: Mapping[str, Any]) -> Rule:
    """The rule of the manifest. Its classes are the package's, or those that the configuration names."""
    theirs = {r.name: r for r in every(run.rule())} if fields.get("code") else {}
    try:
        return _remade(fields["rule"], theirs)
    except (ConfigError, TypeError) as error:
        text = (
            f"the rule of these weights cannot be made again: {error.what if isinstance(error, ConfigError) else error}"
        )
        fix = f"fire explain {shlex.quote(str(run.root))} ... --name {part.name} --set weigh.rule=FILE.py:Class"
        raise ConfigError(text, where=part.label, fix=fix) from None


def _remade(record: Mapping[str, Any], theirs: Mapping[str, Rule]) -> Rule:
    """The inverse of `Rule.record`."""
    if "rules" not in record:
        values = {k: v for k, v in record.items() if k not in ("name", "matched")}
        return make_rule(theirs.get(record["name"], record["name"]), values)
    rules = tuple(_remade(r, theirs) for r in record["rules"])
    names, mean = tuple(record["name"].split("+")), record["normalise"]
    made = Composite(rules=rules, names=names)
    if made.mean == (Mean(**mean) if mean else None):
        return made
    return Composite(
        rules=rules, names=names, normalise=mean["scope"] if mean else "none", normalise_over=mean and mean["over"]
    )
