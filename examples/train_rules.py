"""Every rule trained on the demo world, paired by seed: accuracy against plain on-policy distillation, as a table.

Not about speed: it shows that each rule trains and what it does to one small student. Arms of a seed share the world,
the prompts and the sampling noise, so differences are taken seed by seed. An arm is an ordinary run directory under
`--folder`: the same command continues after an interruption, and `fire inspect` or `fire compare` work on all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from fire_data.create import init_run
from fire_data.demo.arms import SAMPLED, SETTINGS
from fire_data.rules import describe_rule, rule_names
from fire_data.run import open_run
from fire_data.session import Session
from fire_data.shards import read_manifest
from fire_data.steps.evaluate import evaluate
from fire_data.steps.refresh import refresh
from fire_data.steps.rounds import round_row
from fire_data.worlds.world import build_world

BASELINE = "uniform"
COMPOSED = ("prompt-gate+fire-weights", "fire+repetition-guard", "keep-corrections+fire-weights")
# Parameters where the published default is about responses of thousands of tokens; these have about forty.
PARAMETERS: dict[str, dict[str, Any]] = {"esr": {"tokens": 15}, "ta-opd": {"keep_fraction": 0.1}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/rules"), help="where the runs go")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--rounds", type=int, default=10, help="refresh rounds per arm")
    parser.add_argument("--rules", help="names separated by commas; default: all")
    parser.add_argument("--workers", type=int, default=2, help="arms trained at once, one thread each")
    parser.add_argument("--smoke", action="store_true", help="one seed, one round, two rules: is the script alive?")
    options = parser.parse_args()
    names = options.rules.split(",") if options.rules else [n for n in rule_names() if n != "expression"] + [*COMPOSED]
    if options.smoke:
        options.seeds, options.rounds, names = 1, 1, [BASELINE, "tip"]
    names = list(dict.fromkeys([BASELINE, *names]))
    for seed in range(options.seeds):
        build_world(options.folder / f"world-{seed}", seed=seed)
    tasks = [(options.folder, name, seed, options.rounds) for name in names for seed in range(options.seeds)]
    found = []
    with ProcessPoolExecutor(options.workers) as pool:
        for row in pool.map(_arm, *zip(*tasks, strict=True)):
            found.append(row)
            print(json.dumps(row), flush=True)
    print(table(found, options), file=sys.stderr)


def _arm(folder: Path, name: str, seed: int, rounds: int) -> dict[str, Any]:
    """Train one rule with one seed, or take up where it was left; the numbers of its last round."""
    root = folder / f"seed-{seed}" / name
    started = time.monotonic()
    if not (root / "fire.yaml").exists():
        _make(root, folder / f"world-{seed}", name, seed)
    run = open_run(root)
    refresh(Session(run), rounds)
    # Evaluated once, at the end: with eval.prompts in fire.yaml `fire run` would do it after every round.
    held_out = (folder / f"world-{seed}" / "held_out.jsonl").resolve()
    evaluate(Session(open_run(root, (f"eval.prompts={held_out}",))), rounds - 1)
    last = round_row(run, rounds - 1)
    weights = [read_manifest(run.part("weights", r)) for r in range(rounds)]
    kept = [w.stats["kept_tokens"] / w.stats["tokens"] for w in weights if w is not None]
    return {
        "rule": name, "seed": seed, "greedy": last["greedy"], "sampled": last[SAMPLED], "length": last["length"],
        "kl": last["reverse_kl"], "kept_tokens": statistics.mean(kept), "steps": last["global_step"],
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def _make(root: Path, world: Path, name: str, seed: int) -> None:
    needs = [x for x in describe_rule(name)["adds"] if x != "reward"]
    init_run(root, {
        **SETTINGS,
        "seed": seed,
        "threads": 1,
        "student": {"model": str(world / "student")},
        "teacher": {"model": str(world / "teacher")},
        "prompts": {"path": str(world / "prompts.jsonl")},
        "score": {"add": needs},
        "weigh": {"rule": name, "params": PARAMETERS.get(name, {})},
    })  # fmt: skip


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Markdown: mean over seeds, paired difference to the baseline with its standard error, seeds that are better."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        arms.setdefault(row["rule"], []).append(row)
    base = {r["seed"]: r for r in arms[BASELINE]}
    head = "| rule | tokens kept | greedy | T=1 | T=1 against uniform (se) | seeds better | reverse KL | length |"
    lines = [head, "|" + "---|" * (head.count("|") - 1)]
    mean = {name: statistics.mean(r["sampled"] for r in arm) for name, arm in arms.items()}
    for name in sorted(arms, key=lambda n: -mean[n]):
        arm = arms[name]
        gaps = [r["sampled"] - base[r["seed"]]["sampled"] for r in arm]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        paired = "–" if name == BASELINE else f"{statistics.mean(gaps):+.3f} ({error:.3f})"
        better = "–" if name == BASELINE else f"{sum(g > 0 for g in gaps)}/{len(gaps)}"
        means = {k: statistics.mean(r[k] for r in arm) for k in ("kept_tokens", "greedy", "sampled", "kl", "length")}
        lines.append(
            f"| `{name}` | {means['kept_tokens']:.2f} | {means['greedy']:.3f} | {means['sampled']:.3f} | {paired} "
            f"| {better} | {means['kl']:.3f} | {means['length']:.1f} |"
        )
    seconds = sum(r["seconds"] for r in rows)
    lines.append(
        f"\n{options.seeds} seeds, {options.rounds} rounds, {len(arms)} rules, {seconds / 3600:.1f} CPU hours."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
