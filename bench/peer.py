"""Whole training against TRL's `DistillationTrainer` that writes its own completions: accuracy, time, memory.

`reverse`: `fire`, the arm `uniform` as `fire experiment` makes it, against `trl`, TRL 1.16 as it comes: its default
divergence is the reverse KL over the whole vocabulary (beta 1), which the one number per token of `fire` estimates.
`forward`: `fire-gkd` (rule `aopd` everywhere, as in experiments/main.yaml) against `trl-forward` (beta 0): both learn
the teacher's whole distribution. `signal`: ours with one number per token against ours with all. Without TRL only that.

The same: world, student, teacher, prompts in the order of our rounds, samples of each, rows and number of the optimizer
steps, AdamW with its rate and the norm it clips to, fp32, temperature 1, longest answer, the mean over a step's tokens.
Every training has a process of its own and evaluates nothing; what it left behind is evaluated after it by one code, on
the same held-out prompts with the same noise. Students start equal, so the start is evaluated once.

Not the same: TRL writes the rows of a step before that step, ours those of a round, on which it takes several steps,
the later ones with a clipped ratio; so TRL's texts are always of the newest student. Sampling noise differs. Ours
verifies answers, writes tables durably and exports a checkpoint each round; TRL writes nothing but the students to be
evaluated, outside of its clock. Its recomputation of activations, bfloat16 and shuffling are turned off.

Libraries are imported before the clock starts. Tokens are those of responses, times those of training, MiB the peak of
its whole process, libraries included.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import polars as pl
import torch

from fire_data import metrics
from fire_data.create import fork_run
from fire_data.experiment import table as tables
from fire_data.experiment.cells import build_worlds, cell_folder, evaluations, found_cell, make_cell
from fire_data.experiment.spec import Cell, Spec
from fire_data.experiment.statistics import area, at, paired, reached
from fire_data.prompts import as_messages, read_prompts
from fire_data.run import Run, open_run
from fire_data.schedule import round_slots
from fire_data.session import Session
from fire_data.stages import Silent
from fire_data.steps.evaluate import evaluate
from fire_data.steps.rollout import prompt_ids
from fire_data.worlds.world import Sizes, build_world, save

Json = dict[str, Any]

SIZES: measure.Sizes = {
    "seeds": (3, 1, "seeds, which are the repetitions"),
    "rounds": (20, 2, "rounds"),
    "evaluate_every": (5, 1, "rounds between evaluations"),
    "worlds": ("", "", "worlds of an experiment to use and complete; default: built anew"),
    "folder": ("", "", "where runs are made; default: a temporary folder"),
    "out": ("", "", "folder for results.parquet; default: none"),
}
OURS: dict[str, Json] = {
    "fire": {"rule": "uniform"},
    "fire-gkd": {
        "rule": "aopd", "params": {"threshold": 1, "fkl_renormalise": True}, "config": {"score": {"topk": 128}},
    },
}  # fmt: skip
TRL: dict[str, Json] = {"trl": {}, "trl-forward": {"beta": 0.0}}
PAIRS = {"reverse": ["fire", "trl"], "forward": ["fire-gkd", "trl-forward"], "signal": ["fire", "fire-gkd"]}
ACCURACIES = ("greedy", "sampled", "retain_greedy", "retain_sampled")


def main() -> None:
    options = measure.parse(__doc__ or "", SIZES)
    options.repeat = options.seeds
    if options.worker:
        serve(options)
        return
    pairs = PAIRS
    if importlib.util.find_spec("trl") is None:
        pairs = {name: pair for name, pair in PAIRS.items() if not TRL.keys() & {*pair}}
        print("peer: TRL is not installed here, so there are only cases of ours", file=sys.stderr)
    cases = list(dict.fromkeys(itertools.chain(*pairs.values())))
    with tempfile.TemporaryDirectory(dir=options.folder or None) as folder:
        out = Path(folder)
        if options.worlds:
            (out / "worlds").symlink_to(Path(options.worlds).resolve())
        spec = specification(options, out)
        told = {(case, seed): train(case, seed, out, spec, options) for seed in spec.seeds for case in cases}
        rows = [row for key, training in told.items() for row in rows_of(spec, out, *key, training)]
    table = pl.DataFrame(rows, schema=tables.SCHEMA)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        tables.write(table, Path(options.out) / "results.parquet")
    report(options, pairs, spec, table, told)


def specification(options: argparse.Namespace, out: Path) -> Spec:
    """The experiment that our cases are arms of; with --smoke on a world of hardly trained models."""
    values: Json = {
        "worlds": {"chain": ["single"]}, "arms": OURS, "seeds": options.seeds, "rounds": options.rounds,
        "evaluate_every": options.evaluate_every, "config": {"threads": options.threads},
    }  # fmt: skip
    if options.smoke:
        sizes = Sizes(hidden=16, layers=1, heads=2, intermediate=16, batch=4, teacher_steps=2, student_steps=1)
        world = build_world(out / "tiny", prompts=8, held_out=4, sizes=sizes)
        values |= {
            "worlds": {"tiny": ["single"]},
            "given": {"tiny": {
                "student": {"model": str(world.student)},
                "teachers": {"single": {"teacher": {"model": str(world.teacher)}}},
                "prompts": str(world.prompts), "main": str(world.held_out), "retain": str(world.held_out),
            }},
            "config": {
                "threads": 1, "rollout": {"n": 2, "prompts_per_round": 4, "max_new_tokens": 8},
                "train": {"batch_size": 4, "lr": 1e-3, "export_dtype": "float32"}, "eval": {"n": 1},
            },
        }  # fmt: skip
    return Spec.model_validate(values)


def cell_of(spec: Spec, arm: str, seed: int) -> Cell:
    world, settings = next(iter(spec.worlds.items()))
    return Cell(world, settings[0], arm, seed)


def ours(spec: Spec, out: Path, arm: str, seed: int) -> Run:
    run = found_cell(out, cell_of(spec, arm, seed))
    assert run is not None
    return run


def train(case: str, seed: int, out: Path, spec: Spec, options: argparse.Namespace) -> Json:
    """Build what is missing of the world, train in a fresh process, evaluate here."""
    cell = cell_of(spec, case, seed)
    if cell.world not in spec.given:
        build_worlds(out, seed, [(cell.world, cell.setting)])
    process = measure._start(f"{case}:{seed}:{out}", options.threads)
    answer, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a case failed: {case}, seed {seed}")
    told: Json = json.loads(answer)
    if case in OURS:
        make_cell(spec, out, cell, out)
        return told
    given = ours(spec, out, "fire", seed)
    for trained in evaluations(spec)[1:]:
        student = students(out, case, seed) / str(trained)
        run = fork_run(given, student.with_name(f"{trained}-evaluated"), {"student": {"model": str(student)}})
        with Session(run, Silent()) as session:
            evaluate(session, None)
    return told


def students(out: Path, case: str, seed: int) -> Path:
    """Where the students of TRL are, by rounds trained; beside each the run that evaluates it."""
    return out / "trl" / case / f"seed-{seed:03d}"


def serve(options: argparse.Namespace) -> None:
    """The process of one training: what its rounds took, and its memory, as JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr
    case, seed, folder = options.worker.split(":", 2)
    out = Path(folder)
    torch.set_num_threads(options.threads)
    spec = specification(options, out)  # a world that is there is only looked up
    work = fire(spec, out, case, int(seed)) if case in OURS else trl(spec, out, case, int(seed))
    before = measure._peak()
    libraries = measure._reset_peak()
    rounds = work()
    highest = max(measure._peak(), *(r.get("peak_mb", 0.0) for r in rounds))
    told = {"rounds": rounds, "peak_mib": max(before, highest), "libraries_mib": libraries}
    print(json.dumps(told), file=answers)


def fire(spec: Spec, out: Path, arm: str, seed: int) -> Callable[[], list[Json]]:
    """A cell, without its evaluations."""
    cell = cell_of(spec, arm, seed)

    def work() -> list[Json]:
        make_cell(spec, out, cell, out, held_out=False)
        return metrics.read(cell_folder(out, cell) / "cost.jsonl")

    return work


def trl(spec: Spec, out: Path, case: str, seed: int) -> Callable[[], list[Json]]:
    """`DistillationTrainer` with its own rollouts, set up as the run of `fire` with that seed."""
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [folder for folder in sys.path if folder != here]  # TRL would take bench/vllm.py for vLLM
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import DistillationConfig, DistillationTrainer

    run, target = ours(spec, out, "fire", seed), students(out, case, seed)
    cfg = run.config
    assert cfg.rollout.prompts_per_round
    assert cfg.train.batch_size
    assert cfg.student
    assert cfg.teacher
    asked = prompts(run, spec.rounds)
    tokenizer = AutoTokenizer.from_pretrained(cfg.student.model, padding_side="left")
    steps, rest = divmod(cfg.rollout.prompts_per_round * cfg.rollout.n, cfg.train.batch_size)
    assert not rest
    rows, rounds = steps * cfg.train.batch_size, list[Json]()

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Notes what a round took, and keeps the students that will be evaluated."""

        def __init__(self) -> None:
            self.begun = time.process_time(), time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Json, model: Any, **_: Any) -> None:
            if "loss" not in logs:
                return  # the end
            spent = time.process_time() - self.begun[0], time.monotonic() - self.begun[1]
            length, trained = logs["completions/mean_length"], len(rounds) + 1
            rounds.append({
                "round": trained, "cpu_seconds": spent[0], "seconds": spent[1], "tokens": round(length * rows),
                "response_length": length, "truncated": logs["completions/clipped_ratio"], "steps": state.global_step,
                "loss": logs["loss"],
            })  # fmt: skip
            if trained in evaluations(spec):
                save(model, tokenizer, target / str(trained))
            self.begun = time.process_time(), time.monotonic()

    def work() -> list[Json]:
        watch = Watch()
        args = DistillationConfig(
            str(target), learning_rate=cfg.train.lr, adam_beta1=cfg.train.betas[0], adam_beta2=cfg.train.betas[1],
            adam_epsilon=cfg.train.eps, weight_decay=cfg.train.weight_decay, max_grad_norm=cfg.train.max_grad_norm,
            lr_scheduler_type="constant", max_steps=steps * spec.rounds, save_strategy="no", report_to="none",
            per_device_train_batch_size=cfg.train.batch_size, disable_tqdm=True,
            max_completion_length=cfg.rollout.max_new_tokens, temperature=cfg.rollout.temperature, seed=seed,
            shuffle_dataset=False, gradient_checkpointing=False, bf16=False, use_cpu=True, logging_steps=steps,
            **TRL[case],
        )  # fmt: skip
        trainer = DistillationTrainer(
            model=cfg.student.model, teacher_model=cfg.teacher.model, args=args, processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": messages} for messages in asked]), callbacks=[watch],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        assert len(rounds) == spec.rounds
        return rounds

    target.mkdir(parents=True)
    return work


def prompts(run: Run, rounds: int) -> list[list[dict[str, str]]]:
    """Conversations in the order in which the run asks them, each as often as it is sampled."""
    cfg = run.config
    table = read_prompts(cfg.prompts.path, run.root)
    given, names = table.to_pylist(), table["prompt_id"].to_pylist()
    slots = [s for r in range(rounds) for s in round_slots(names, cfg.seed, r, cfg.rollout.prompts_per_round)]
    with Session(run, Silent()) as session:
        first = given[slots[0].row]
        ids = session.tokenizer.apply_chat_template(as_messages(first), add_generation_prompt=True, return_dict=False)
        assert ids == prompt_ids(session, first), "both sides must read the same prompt"
    return [as_messages(given[slot.row]) for slot in slots for _ in range(cfg.rollout.n)]


def rows_of(spec: Spec, out: Path, case: str, seed: int, told: Json) -> list[Json]:
    """The rows of one training in the results of experiments; seconds and memory are of training alone."""
    cell, seconds = cell_of(spec, case, seed), {r["round"]: r["cpu_seconds"] for r in told["rounds"]}
    rows = tables.collect(spec, out, [cell]).to_dicts() if case in OURS else list(peer_rows(spec, out, cell, told))
    assert len(rows) == spec.rounds + 1
    return [row | {"cpu_seconds": seconds.get(row["round"], 0.0), "peak_mb": told["peak_mib"]} for row in rows]


def peer_rows(spec: Spec, out: Path, cell: Cell, told: Json) -> list[Json]:
    """As `table.collect` makes them of ours. `reverse_kl` is TRL's loss where that is one."""
    name = {"world": cell.world, "setting": cell.setting, "arm": cell.arm, "seed": cell.seed,
            "rule": "trl.DistillationTrainer",
            "params": json.dumps({"version": importlib.metadata.version("trl"), **TRL[cell.arm]})}  # fmt: skip
    start = tables.accuracies(ours(spec, out, "fire", cell.seed), "start")
    rows: list[Json] = [{**name, "round": 0, "steps": 0, "rollout_tokens": 0, "trained_tokens": 0, **start}]
    for r in told["rounds"]:
        folder = students(out, cell.arm, cell.seed) / f"{r['round']}-evaluated"
        tokens = rows[-1]["rollout_tokens"] + r["tokens"]
        seen = tables.accuracies(open_run(folder), "start") if folder.exists() else {}
        rows.append({
            **name, **seen, "rollout_tokens": tokens, "trained_tokens": tokens, "kept_share": 1.0,
            "reverse_kl": r["loss"] if TRL[cell.arm].get("beta", 1.0) == 1.0 else None,
            **{k: r[k] for k in ("round", "steps", "response_length", "truncated")},
        })  # fmt: skip
    return rows


def report(
    options: argparse.Namespace, pairs: dict[str, list[str]], spec: Spec, table: pl.DataFrame,
    told: dict[tuple[str, int], Json],
) -> None:  # fmt: skip
    """JSON to stdout, tables to stderr."""
    clock = "cpu_seconds" if options.cpu_time else "seconds"
    groups = {}
    for name, pair in pairs.items():
        cases = {case: facts(case, spec, table, told, clock) for case in pair}
        groups[name] = {**measure.summarise(cases), "differences": differences(*pair, spec, table)}
    measure.report(options, SIZES, groups)
    target = f"CPU s to {spec.target:g}"
    say = [
        "",
        f"{'by seed':16}{'seed':>4}{'CPU s':>9}{target:>14}{'tokens':>9}" + "".join(f"{x:>15}" for x in ACCURACIES),
    ]
    for case, known in {case: known for group in groups.values() for case, known in group["cases"].items()}.items():
        for i, seed in enumerate(spec.seeds):
            came = known["cpu_seconds_to_target"][i]
            line = f"{case:16}{seed:>4}{known['cpu_seconds'][i]:>9.1f}{'never' if came is None else f'{came:.1f}':>14}"
            say.append(line + f"{known['rollout_tokens'][i]:>9}" + "".join(f"{known[x][i]:>15.3f}" for x in ACCURACIES))
    for name, group in groups.items():
        say += ["", f"{name}: {' minus '.join(pairs[name])}: mean [95 % interval], by seed"]
        for what, d in group["differences"].items():
            span = "" if d["low"] is None else f"[{d['low']:+.3f}, {d['high']:+.3f}]"
            say.append(f"  {what:40}{d['mean']:+.3f} {span:20}" + "".join(f"{x:+8.3f}" for x in d["by_seed"]))
    print("\n".join(say), file=sys.stderr)


def facts(case: str, spec: Spec, table: pl.DataFrame, told: dict[tuple[str, int], Json], clock: str) -> Json:
    """What one case took and where it came to, by seed."""
    trained = [told[case, seed] for seed in spec.seeds]
    curves = [curve(table, case, seed) for seed in spec.seeds]
    known: Json = {name: [sum(r[name] for r in t["rounds"]) for t in trained] for name in ("cpu_seconds", "seconds")}
    known |= {name: [c[name][-1] for c in curves] for name in ("rollout_tokens", *ACCURACIES)}
    return known | {
        "seconds": known[clock], "wall_seconds": known["seconds"],
        "tokens": round(statistics.mean(known["rollout_tokens"])),
        "peak_mib": max(t["peak_mib"] for t in trained),
        "peak_mib_by_seed": [t["peak_mib"] for t in trained],
        "libraries_mib_by_seed": [t["libraries_mib"] for t in trained],
        "cpu_seconds_to_target": [reached(c["spent"], c["sampled"], spec.target) for c in curves],
    }  # fmt: skip


def curve(table: pl.DataFrame, case: str, seed: int) -> Json:
    """The evaluated rounds of a training; `spent` are CPU seconds of training up to there."""
    rows = table.filter(arm=case, seed=seed).sort("round").with_columns(spent=pl.col("cpu_seconds").cum_sum())
    return rows.filter(pl.col("sampled").is_not_null()).to_dict(as_series=False)


def differences(mine: str, other: str, spec: Spec, table: pl.DataFrame) -> dict[str, Json]:
    """Mine minus the other's: accuracies at equal tokens and at equal CPU seconds, CPU seconds to the target."""
    found: dict[str, list[float]] = {}
    for seed in spec.seeds:
        a, b = curve(table, mine, seed), curve(table, other, seed)
        for axis, words in (("rollout_tokens", "tokens"), ("spent", "CPU seconds")):
            budget = min(a[axis][-1], b[axis][-1])
            for name in ACCURACIES:
                x, y = (at(c[axis], c[name], budget) for c in (a, b))
                found.setdefault(f"{name} at equal {words}", []).append(x - y)
            x, y = (area(c[axis], c["sampled"], budget) for c in (a, b))
            found.setdefault(f"area of sampled over equal {words}", []).append(x - y)
        times = [reached(c["spent"], c["sampled"], spec.target) for c in (a, b)]
        if None not in times:
            found.setdefault(f"CPU seconds to {spec.target:g}", []).append(times[0] - times[1])
    return {name: tested(values) for name, values in found.items()}


def tested(values: list[float]) -> Json:
    """Differences by seed with their mean, interval (None with one seed) and p of the t test."""
    test = paired(values)
    ends = {name: end if math.isfinite(end) else None for name, end in (("low", test.low), ("high", test.high))}
    return {"by_seed": values, "mean": test.mean, **ends, "p": test.p}


if __name__ == "__main__":
    main()
