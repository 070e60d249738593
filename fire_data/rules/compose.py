"""Rules joined with `+`: filters and masks AND, weights multiply, one normalisation; at most one new advantage.

Every component takes its statistics over all trajectories, whatever the others drop, so the order of the names does
not matter. The normalisation is that of the first component that has one, unless `normalise` is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from fire_data.rules.base import Mean, Parts, Rule
from fire_data.schemas.config import Normalise, Scope
from fire_data.schemas.errors import ConfigError


@dataclass(frozen=True)
class Composite(Rule):
    """keep and masks: all of them; weight: the product, normalised once; advantage, forward KL: of one."""

    name: ClassVar[str] = "composite"
    belief: ClassVar[str] = "each of them"

    rules: tuple[Rule, ...] = ()
    names: tuple[str, ...] = ()
    normalise: Normalise | None = None
    normalise_over: Literal["all", "kept"] | None = None

    def __post_init__(self) -> None:
        for part in ("advantage", "fkl_weight"):
            having = [n for n, r in zip(self.names, self.rules, strict=True) if part in r.parts().expressions()]
            if len(having) > 1:
                what = "the advantage" if part == "advantage" else "the forward-KL term"
                text = f"{' and '.join(having)} both set {what}, and only one can"
                raise ConfigError(text, where=f"rule {self.label}", fix=f"leave out {having[-1]}")
        if self.matched_components:
            text = f"{', '.join(self.matched_components)} counts the tokens of another rule and cannot be composed"
            raise ConfigError(text, where=f"rule {self.label}", fix="weigh with it alone")
        if self.normalise_over is not None and self.normalise is None and self.mean is None:
            text = "normalise_over says what weights are normalised over, and they are not normalised"
            raise ConfigError(text, where=f"rule {self.label}", fix="-p normalise=step")

    @property
    def label(self) -> str:
        return "+".join(self.names)

    @property
    def matched_components(self) -> list[str]:
        return [n for n, r in zip(self.names, self.rules, strict=True) if r.matched is not None]

    @property
    def components(self) -> tuple[Rule, ...]:
        return self.rules

    @property
    def mean(self) -> Mean | None:
        first = next((r.mean for r in self.rules if r.mean), None)
        if self.normalise is not None:
            first = None if self.normalise == "none" else Mean(self.normalise)
        return first._replace(over=self.normalise_over) if first and self.normalise_over else first

    @property
    def reads(self) -> Literal["shard", "step", "round"]:
        found = {r.reads for r in self.rules}
        return "round" if "round" in found else "step" if "step" in found else "shard"

    @property
    def fkl_renormalises(self) -> bool:
        return any(r.fkl_renormalises for r in self.rules)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c for r in self.rules for c in r.columns))

    @property
    def changes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c for r in self.rules for c in r.changes))

    @property
    def scopes(self) -> tuple[str, ...]:
        found = {s for r in self.rules for s in r.scopes} | ({self.mean.scope} if self.mean else set())
        return tuple(s for s in get_args(Scope) if s in found)

    @property
    def goes_stale(self) -> bool:
        return any(r.goes_stale for r in self.rules)

    def parts(self) -> Parts:
        """Nothing of its own: the components are evaluated one by one."""
        return Parts()

    def record(self) -> dict[str, Any]:
        return {
            "name": self.label,
            "rules": [r.record() for r in self.rules],
            "normalise": self.mean._asdict() if self.mean else None,
        }
