"""`fire compare`: walks the sealed scores of a round with several rules. No model is loaded, no weights are written.

What is held is one shard with the coefficients that each rule gives to it, and what `Tally` keeps.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from fire_data import files
from fire_data.compare import COLUMNS, DEFAULT, Asked, Tally, late_from, parse_rules, plot
from fire_data.prepare import Weighing
from fire_data.rules import own
from fire_data.run import Run
from fire_data.schemas.config import WeighConfig, split_rule
from fire_data.schemas.errors import ConfigError, DamagedError, DataError, FireError, IncompleteError
from fire_data.stages import Reporter, Silent
from fire_data.steps.weigh import ScoredRound, configured, drops

BASELINE = Asked("uniform", "uniform")


def compare(
    run: Run, round: int, rules: str = DEFAULT, late: int | None = None, report: Reporter | None = None
) -> dict[str, Any]:
    """Every number about these rules (text for `parse_rules`) on a round's scores, JSON-ready, with the next command.

    Policies are those of the configuration; its own rule, named without brackets, has the parameters it has there.
    `late`: the first position that counts as late. A rule that cannot be computed here is listed with the reason.
    Raises ConfigError for a rule that does not exist, IncompleteError without sealed scores, DataError for damage.
    """
    report = report or Silent()
    asked = parse_rules(rules)
    for a in asked:
        with_asked(run, a).rule()  # a name or parameter that does not exist ends it all
    base = ScoredRound(run, round, configured(with_asked(run, BASELINE)), graded=True)
    lost: dict[str, FireError] = {}
    works: dict[str, ScoredRound] = {}
    report.start(f"compare {base.part.label}", (1 + len(base)) * len(asked), "shards")
    for a in asked:
        try:
            works[a.label] = ScoredRound(run, round, configured(with_asked(run, a)), graded=True)
            _ = works[a.label].fitted
        except DamagedError:
            raise
        except (ConfigError, DataError, IncompleteError) as error:
            lost[a.label] = error
        report.advance(1)
    if lost.keys() >= {a.label for a in asked}:
        raise next(iter(lost.values()))
    counted = {BASELINE.label: base, **{k: w for k, w in works.items() if k not in lost}}
    tally = _counted(counted, late, lost, report)
    kept = [a for a in asked if a.label not in lost]
    found = tally.result([a.label for a in kept])
    for a, told in zip(kept, found["rules"], strict=True):
        told |= _about(works[a.label], tally, a.label, [k.label for k in kept])
    missing = [{"rule": k, "why": e.what, "where": e.where, "fix": e.fix} for k, e in lost.items()]
    next_ = _next(run, round, kept, found["rules"])
    return {"round": round, "policies": _policies(base.rule), **found, "not_computable": missing, "next": next_}


def check_plot(path: Path) -> None:
    """Raise ConfigError, before anything is computed, if a figure cannot be drawn or not into a file of this name."""
    if path.suffix not in (".svg", ".png"):
        raise ConfigError(f"a plot is .svg or .png, not {path.name!r}", fix=f"--plot {path.with_suffix('.svg')}")
    plot.require_plots()


def write_plot(comparison: dict[str, Any], path: Path) -> None:
    """Draw what `compare` found into a file, all of it or nothing. Raises ConfigError as `check_plot`, StorageError."""
    check_plot(path)
    drawn = plot.svg(comparison).encode() if path.suffix == ".svg" else plot.png(comparison)
    files.replace_bytes(path, drawn, path.parent)


def with_asked(run: Run, asked: Asked) -> Run:
    """The run with this rule in its configuration, where the policies stay as they are."""
    cfg = run.config.weigh
    same = asked.rule == cfg.rule
    rule = asked.rule if same else own.moved(asked.rule, lambda file: str(Path.cwd() / file))
    params = {**(cfg.params if same else {}), **asked.params}
    weigh = cfg.model_copy(update={"rule": rule, "params": params, "scope": cfg.scope if same else None})
    return dataclasses.replace(run, config=run.config.model_copy(update={"weigh": weigh}))


def _counted(works: dict[str, ScoredRound], late: int | None, lost: dict[str, FireError], report: Reporter) -> Tally:
    base = works[BASELINE.label]
    lengths = pl.concat([base.read(range(i, i + 1), ["length"]) for i in range(len(base))])["length"]
    tally = Tally(list(works), int(lengths.sum()), late_from(lengths) if late is None else late)

    def weighted(shard: str) -> Iterator[tuple[str, pl.DataFrame]]:
        for label, work in works.items():
            if label in lost:
                continue
            try:
                yield label, work.weighted(shard)
            except (ConfigError, DataError) as error:
                if label == BASELINE.label or isinstance(error, DamagedError):
                    raise
                lost[label] = error
            report.advance(1)

    for i, receipt in enumerate(base.receipts):
        tally.add(base.read(range(i, i + 1), COLUMNS), weighted(receipt.shard))
    return tally


def _about(work: ScoredRound, tally: Tally, label: str, labels: list[str]) -> dict[str, Any]:
    """What a rule is, and what to know before its numbers are read."""
    rule, steps = work.rule.rule, work.fitted.steps
    skipped = [s["step"] for s in steps if s["kept_tokens"] == 0]
    return {
        "changes": list(rule.changes),
        "parameters": rule.record(),
        "denominator": work.rule.divisor,
        "skipped_steps": skipped,
        "flags": _flags(work, tally, label, labels) | _skips(len(skipped), len(steps)),
    }


def _flags(work: ScoredRound, tally: Tally, label: str, labels: list[str]) -> dict[str, str]:
    flags = {}
    rule = work.rule.rule
    if rule.changes and tally.same(label, BASELINE.label):
        flags["inert"] = "every coefficient is that of uniform, bit for bit"
    elif drops(work.rule) and tally.kept(label) == tally.kept(BASELINE.label):
        flags["inert"] = "its filter drops nothing"
    twin = next((other for other in labels[: labels.index(label)] if tally.same(label, other)), None)
    if twin not in (None, BASELINE.label):
        flags["same"] = f"every coefficient is that of {twin}, bit for bit"
    if work.bounds:
        flags["bound"] = "; ".join(f"{column} is {bound}" for column, bound in work.bounds.items())
    if rule.goes_stale:
        flags["stale"] = "its decisions rest on the student as it was when it was scored"
    return flags


def _skips(skipped: int, steps: int) -> dict[str, str]:
    return {"skips": f"it keeps no token in {skipped} of {steps} steps, which are not trained"} if skipped else {}


def _policies(around: Weighing) -> dict[str, Any]:
    names = ("batch_size", "truncated", "end_token", "rollout_is_cap", "samples_per_group", "constant")
    teachers = {"teacher": around.teachers.how, "entropy": around.entropy}
    return {"denominator": around.denominator, **{name: getattr(around, name) for name in names}, **teachers}


def _next(run: Run, round: int, asked: list[Asked], told: list[dict[str, Any]]) -> str:
    """The command that freezes the weights of the first rule that does something, else of the first."""
    works = (a for a, t in zip(asked, told, strict=True) if t["changes"] and "inert" not in t["flags"])
    chosen = next(works, asked[0])
    words = ["fire", "weigh", str(run.root), "--round", str(round)]
    filed = any(map(own.is_file, split_rule(chosen.rule)))
    # A file of fire.yaml is named from the run, one on the command line from here.
    words += [] if filed and chosen.rule == run.config.weigh.rule else ["--rule", chosen.rule]
    for option in chosen.options:
        words += ["-p", option]
    cfg = run.config.weigh
    if cfg.denominator is not None and cfg.rule != chosen.rule:
        words += ["--denominator", cfg.denominator]
    # As they were here, whether fire.yaml says so or the command line did.
    for name in ("teacher", "entropy"):
        if (value := getattr(cfg, name)) != WeighConfig.model_fields[name].default:
            words += ["--set", f"weigh.{name}={value}"]
    if chosen.options or filed:
        words += ["--name", re.sub(r"[^A-Za-z0-9.]+", "-", Path(chosen.label).name).strip("-.")]
    return shlex.join(words)
