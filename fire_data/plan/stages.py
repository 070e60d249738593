"""What every stage of a round would do if it were started now: make, go on, nothing, or refuse, and in which words.

The same records are compared that the stages themselves compare, as far as that needs no model: bytes of models,
tokenizers and chat templates are not looked at, and neither are the bytes of finished shards (`fire check` does).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa

from fire_data import metrics, models
from fire_data.overview import train_anew
from fire_data.plan.figures import receipts_of
from fire_data.prompts import prompts_digest, read_prompts
from fire_data.run import Run
from fire_data.schemas.config import ModelConfig
from fire_data.schemas.errors import FireError
from fire_data.schemas.manifest import Manifest, Receipt, Shard, differences, digest
from fire_data.schemas.tables import FORMAT, REWARD
from fire_data.shards import Part, is_sealed, read_manifest
from fire_data.stages import plan_shards
from fire_data.steps.benchmarks import PROMPTS_PER_SHARD, benchmarks
from fire_data.steps.inputs import routed
from fire_data.steps.weigh import addon_tables, configured, weights_fields
from fire_data.verify import Verifier

Action = Literal["make", "continue", "nothing", "refused"]
NOT_COMPARED = "bytes of models, tokenizers, chat templates and finished shards; prompts longer than max_prompt_tokens"


@dataclass
class Work:
    """One stage of one round: its shards in all, those that have to be made, and why nothing or not.

    `rows`: rows per unit of a shard. Training has steps instead of shards.
    """

    part: Part
    action: Action = "make"
    why: str = ""
    plan: tuple[Shard, ...] = ()
    missing: tuple[Shard, ...] = ()
    rows: int = 1
    steps: int = 0
    steps_left: int = 0
    epochs: int = 1
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """Prompts whose rows are still to be made."""
        return sum(s.stop - s.start for s in self.missing)


@dataclass
class Prompts:
    """The prompts of the run, or what is wrong with them."""

    table: pa.Table | None
    error: FireError | None = None


def prompts_of(run: Run) -> Prompts:
    cfg = run.config
    try:
        table = read_prompts(cfg.prompts.path, run.root, need_answer=cfg.rollout.verifier != "none")
        for value in dict.fromkeys(table["teacher"].to_pylist()) if run.teachers else ():
            run.route(value)
        return Prompts(table)
    except FireError as error:
        return Prompts(None, error)


def round_works(run: Run, round: int, prompts: Prompts) -> list[Work]:
    """The stages of a round in the order in which they are made."""
    first = _rollouts(run, round, prompts)
    works = [first, _scores(run, round, first)]
    try:
        names = run.needed_addons()
    except FireError:
        names = run.config.score.add
    works += [_addon(run, round, name, first) for name in names]
    works.append(_weights(run, round, first))
    works.append(_checkpoint(run, round, works))
    return works


def eval_works(run: Run, round: int | None) -> list[Work]:
    """The evaluations of the student after a round, or (None) of the given one; none without held-out prompts."""
    cfg = run.config
    if cfg.eval.prompts is None:
        return []
    works = []
    for name, path in benchmarks(run).items():
        part = run.part("evals", "start" if round is None else round, name)
        work = Work(part, rows=cfg.eval.greedy + cfg.eval.n)
        works.append(work)
        try:
            verifier = Verifier(cfg.verify, run.root)
            setting = "eval.prompts" if name is None else f"eval.prompts.{name}"
            table = read_prompts(path, run.root, need_answer=verifier.compares, setting=setting)
            rows = table.slice(0, cfg.eval.limit).to_pylist()
            work.plan = plan_shards(len(rows), PROMPTS_PER_SHARD)
            work.fields = {
                "format": FORMAT, "seed": cfg.seed, "eval": cfg.eval.results(), "engine": cfg.rollout.engine,
                "max_new_tokens": cfg.eval.max_new_tokens or cfg.rollout.max_new_tokens, "verify": verifier.fields,
                "prompts": digest(rows),
            }  # fmt: skip
            if is_sealed(part):  # `fire run` leaves it as it is, whatever the settings are now
                work.fields = {}
            _compare(run, work)
        except FireError as error:
            _refuse(work, error)
    return works


def _rollouts(run: Run, round: int, prompts: Prompts) -> Work:
    cfg = run.config
    work = Work(run.part("rollouts", round), rows=cfg.rollout.n)
    try:
        if prompts.table is None:
            assert prompts.error is not None
            raise prompts.error
        _require_files(run, cfg.student, cfg.rollout.engine)
        count = cfg.rollout.prompts_per_round or prompts.table.num_rows
        work.plan = plan_shards(count, cfg.rollout.prompts_per_shard)
        verifier = Verifier(cfg.verify, run.root, kind="exact")
        work.fields = {
            "format": FORMAT, "seed": cfg.seed, "rollout": cfg.rollout.results(),
            "verify": verifier.fields if cfg.rollout.verifier != "none" else None,
            "prompts": prompts_digest(prompts.table), "student": _student(run, round),
        }  # fmt: skip
        _compare(run, work)
    except FireError as error:
        _refuse(work, error)
    return work


def _scores(run: Run, round: int, source: Work) -> Work:
    work = _beside(run, run.part("scores", round), source)
    try:
        if not run.teachers:
            run.teacher("teacher")
        for cfg in (run.config.student, *run.teachers.values()):
            _require_files(run, cfg, run.config.score.engine)
        work.fields = {"format": FORMAT, "score": run.config.score.results(), **_source(run, source)}
        if (made := _sealed(source)) is not None:
            work.fields["student"] = _student(run, round)
            work.fields["teachers"] = {name: {"dtype": run.teacher(name).dtype} for name in routed(run, made)}
        _compare(run, work)
    except FireError as error:
        _refuse(work, error)
    return work


def _addon(run: Run, round: int, name: str, source: Work) -> Work:
    cfg = run.config
    work = _beside(run, run.part("addons", round, name), source)
    try:
        graded = Verifier(cfg.verify, run.root).fields if name in (REWARD, "pass-rate") else None
        own: dict[str, Any] = {"score": cfg.score.results()}
        if name == "pass-rate":
            own |= {"seed": cfg.seed, "samples": cfg.score.pass_rate_samples, "verify": graded}
        elif name == REWARD:
            own = {"verify": graded}
        elif name == "base":
            own = {"engine": cfg.score.engine, "base": {"dtype": run.base().dtype}, **cfg.score.rounding}
        work.fields = {"format": FORMAT, **own, **_source(run, source)}
        _compare(run, work)
    except FireError as error:
        _refuse(work, error)
    return work


def _weights(run: Run, round: int, source: Work) -> Work:
    work = _beside(run, run.part("weights", round, run.config.weights_name), source)
    try:
        rule = configured(run)
        scores = read_manifest(run.part("scores", round))
        if scores is not None and scores.sealed:
            work.fields = weights_fields(rule, scores, addon_tables(run, round, rule))
        _compare(run, work)
    except FireError as error:
        _refuse(work, error)
    return work


def _checkpoint(run: Run, round: int, before: list[Work]) -> Work:
    cfg, part = run.config.train, run.part("checkpoints", round)
    rows = sum(s.stop - s.start for s in before[0].plan) * before[0].rows
    work = Work(part, rows=before[0].rows, missing=before[0].plan, epochs=cfg.epochs)
    work.steps = math.ceil(rows / (cfg.batch_size or max(1, rows))) * cfg.epochs
    work.steps_left = work.steps
    weights = read_manifest(run.part("weights", round))
    if before[0].action == "refused":
        work.action, work.why, work.missing = "refused", f"needs {before[0].part.label}", ()
    try:
        _require_files(run, run.config.student, "transformers")
        work.fields = {"format": FORMAT, "train": cfg.executed(), "weights": run.config.trained_weights}
        if weights is not None and weights.sealed and before[0].action == "nothing":
            work.fields["inputs"] = {"weights": weights.digest}
        _compare(run, work, _steps_done(run, round))
        if (
            work.action != "nothing"
            and round
            and is_sealed(run.part("checkpoints", round - 1))
            and not _begins(run, round)
        ):
            work.action, work.why = "refused", f"no training state of round {round - 1}; {train_anew(run.root)}"
    except FireError as error:
        _refuse(work, error)
    return work


def _begins(run: Run, round: int) -> bool:
    states = run.root / ".fire" / "train"
    return any(any(states.glob(f"step-*-round-{r:03d}")) for r in (round - 1, round))


def _steps_done(run: Run, round: int) -> int:
    return len(metrics.steps(run.root / "metrics.jsonl", round))


def _beside(run: Run, part: Part, source: Work) -> Work:
    """A table with the shards of the rollouts; its plan is fixed by theirs."""
    work = Work(part, plan=source.plan, rows=source.rows)
    if source.action == "refused":
        work.action, work.why = "refused", f"needs {source.part.label}"
    return work


def _source(run: Run, source: Work) -> dict[str, Any]:
    made = _sealed(source)
    return {"rollouts": made.digest} if made is not None else {}


def _sealed(work: Work) -> Manifest | None:
    """The manifest of a stage that stays as it is; None if its content is not known yet."""
    return read_manifest(work.part) if work.action == "nothing" else None


def _student(run: Run, round: int) -> dict[str, Any]:
    """What is known of the student's fingerprint without its files."""
    known: dict[str, Any] = {"dtype": run.config.student.dtype}
    checkpoint = read_manifest(run.part("checkpoints", round - 1)) if round else None
    if checkpoint is not None and checkpoint.sealed:
        known["weights"] = f"checkpoint:{checkpoint.digest}"
    return known


def _require_files(run: Run, cfg: ModelConfig, engine: str) -> None:
    """Raise DataError for a model on this machine whose files are not all there."""
    if cfg.url is None and engine != "fake" and models.here(cfg, run.root) is not None:
        models.local_folder(cfg, run.root)


def _compare(run: Run, work: Work, steps_done: int = 0) -> None:
    """Set what would be done, from the stage's records: nothing, the rest, all, or refuse."""
    if work.action == "refused":
        return
    training = work.part.stage == "checkpoints"
    manifest = read_manifest(work.part)
    if manifest is None:
        work.missing = work.missing if training else work.plan
        return
    receipts = {r.shard: r for r in receipts_of(work.part, manifest)}
    changed = differences(_of(manifest.fields, work.fields), work.fields)
    if changed and (receipts or manifest.sealed or steps_done):
        text = "; ".join(changed)
        work.action, work.why = "refused", f"started with other settings: {text}; set them back, or --redo"
        return
    if not training:
        work.plan = manifest.plan if not changed else work.plan
        work.missing = tuple(s for s in work.plan if not _there(work.part, receipts.get(s.name)))
    whole = all(_there(work.part, r) for r in receipts.values())
    if manifest.sealed and (whole if training else not work.missing):
        work.action, work.why, work.missing, work.steps_left = "nothing", "sealed, same settings", (), 0
        return
    work.action = "continue"
    if training:
        work.steps_left = 0 if manifest.sealed else max(0, work.steps - steps_done)
        work.why = (
            "a file is missing: exported again" if manifest.sealed else f"{steps_done} of {work.steps} steps done"
        )
    elif manifest.sealed:
        work.why = "damaged or missing shards are made again"
    else:
        work.why = f"{len(work.plan) - len(work.missing)} of {len(work.plan)} shards are there"


def _of(found: Any, wanted: Any) -> Any:
    """The part of a record that is comparable: the keys that are known of `wanted`."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return found
    return {k: _of(found.get(k), v) for k, v in wanted.items()}


def _there(part: Part, receipt: Receipt | None) -> bool:
    if receipt is None:
        return False
    path = part.folder / receipt.shard if part.stage == "checkpoints" else part.file(receipt.shard)
    return path.is_file() and path.stat().st_size == receipt.bytes


def _refuse(work: Work, error: FireError) -> None:
    work.action, work.missing = "refused", ()
    work.why = ". ".join(filter(None, (error.what, error.where, error.fix and f"fix: {error.fix}")))
