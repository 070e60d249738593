"""Which engine runs which model: made from the configuration when first needed, kept by the session.

Engines that hold the logits of student and teacher together give joint signals (KL divergences); all others evaluate
one model at a time. A teacher with a url is asked there, whatever engine the rest uses.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fire_data import files
from fire_data.engines import Engine, Evaluator, FakeGenerator, FakeScorer, Generator, Scorer
from fire_data.kept import Kept
from fire_data.run import Run
from fire_data.sampling import Sampling
from fire_data.schemas.config import ModelConfig, parse_config
from fire_data.schemas.errors import FingerprintError
from fire_data.session import Session
from fire_data.vocabulary import Vocabulary

if TYPE_CHECKING:
    from fire_data.ray_engine import RayEngine

STUDENT, BASE = "student", "base"
_WRITES = " (writing)"
_SAME_SERVER = 0.2  # nats: more than half precision and another batch make of the same model's logprobs
_SPREAD = 4  # rows that wait or run, in multiples of those that run: long responses are some times the mean
_MOST_LANES = 16
_OTHER_PROMPT = 1024  # tokens by which a teacher's own prompt may be longer than the longest of the student's


def make_generator(session: Session, round: int) -> Generator:
    """The configured generation engine with the round's student."""
    if session.outside.places(session.run.config.rollout.engine):
        return _on_cluster(session, STUDENT, "generator", round)
    cfg, ids, stops = session.run.config, session.vocabulary, session.stop_ids
    if cfg.rollout.engine == "fake":
        return FakeGenerator(ids, stops)
    if cfg.rollout.engine != "transformers":
        return _student(session, round, cfg.rollout.engine, sampling(session))
    from fire_data.generate import TransformersGenerator

    generator = TransformersGenerator(session.student(round), ids, stops, cfg.rollout.rows_in_flight)
    if not generator.can_stop:
        session.report.warn("the student has no end token it may sample: every response runs to max_new_tokens")
    return generator


def teacher_generator(session: Session, name: str, *, shared: bool = False) -> Generator:
    """The configured engine with a teacher as the one that writes, over all its own ids, or those `shared` by all.

    It ends where it does by itself or, behind the student's prompt, where the student does.
    """
    from fire_data import models

    if session.outside.places(teacher_engine(session, name)):
        return _on_cluster(session, name, "teacher writer" if shared else "teacher generator")
    cfg, teacher = session.run.config, session.run.teacher(name)
    ids = session.vocabulary if shared else session.teacher_vocabulary(name)
    tokenizer = session.teacher_tokenizer(name)
    stops = models.stop_ids(teacher, session.run.root, tokenizer)
    if cfg.score.teacher_prompt == "shared":
        stops |= session.stop_ids
    engine = teacher_engine(session, name)
    if engine == "fake":
        return FakeGenerator(ids, stops)
    if engine != "transformers":
        return _placed(session, name, engine, teacher, ids, stops, tokenizer, sampling(session))
    from fire_data.generate import TransformersGenerator

    return TransformersGenerator(session.teacher(name), ids, stops, cfg.rollout.rows_in_flight)


def is_joint(session: Session, name: str) -> bool:
    """True if student and this teacher are evaluated together, from the logits of both."""
    return teacher_engine(session, name) in ("transformers", "fake")


def teacher_engine(session: Session, name: str) -> str:
    """The engine that runs a teacher."""
    engine = session.run.config.score.engine
    return "http" if session.run.teacher(name).url is not None and engine != "fake" else engine


def joint_scorer(session: Session, round: int, name: str) -> Scorer:
    """Student and teacher together."""
    if session.outside.places(session.run.config.score.engine):
        return _on_cluster(session, name, "scorer", round)
    cfg = session.run.config.score
    if cfg.engine == "fake":
        return FakeScorer(session.vocabulary, _suffix(session, name))
    from fire_data.scoring import TransformersScorer

    return TransformersScorer(
        session.student(round), session.teacher(name), session.vocabulary, cfg.tokens_per_batch, _budget(session)
    )


def student_evaluator(session: Session, round: int) -> Evaluator:
    """The round's student alone."""
    engine = session.run.config.score.engine
    if session.outside.places(engine):
        return _on_cluster(session, STUDENT, "student", round)
    if engine == "transformers":
        return _transformers(session, session.student(round), session.vocabulary)
    return _student(session, round, engine)


def teacher_evaluator(session: Session, name: str) -> Evaluator:
    """A teacher alone."""
    engine = teacher_engine(session, name)
    if session.outside.places(engine):
        return _on_cluster(session, name, "teacher")
    if engine == "fake":
        return FakeScorer(session.vocabulary, _suffix(session, name))
    if engine == "transformers":
        return _transformers(session, session.teacher(name), session.vocabulary)
    tokenizer = session.teacher_tokenizer(name)
    return _placed(session, name, engine, session.run.teacher(name), session.vocabulary, frozenset(), tokenizer)


def base_evaluator(session: Session) -> Evaluator:
    """The reference model alone, over the ids it shares with the others."""
    engine, cfg = base_engine(session), session.run.base()
    if session.outside.places(engine):
        return _on_cluster(session, BASE, "base")
    ids = session.base_vocabulary
    if engine == "fake":
        return FakeScorer(ids, BASE)
    if engine != "transformers":
        return _placed(session, BASE, engine, cfg, ids, frozenset(), session.base_tokenizer)
    return _transformers(session, session.base(), ids)


def base_engine(session: Session) -> str:
    """The engine that runs the reference model."""
    engine = session.run.config.score.engine
    return "http" if session.run.base().url is not None and engine != "fake" else engine


def lanes(session: Session, engine: str) -> int:
    """How many shards are worked on at a time, over all workers of a cluster.

    Responses differ in length: so many rows must wait that what the end of a shard leaves idle is filled.
    """
    return (session.outside.workers if session.outside.places(engine) else 1) * _depth(session, engine)


def _depth(session: Session, engine: str) -> int:
    """As `lanes`, for one engine."""
    cfg = session.run.config
    together = {"vllm": cfg.vllm.max_num_seqs, "http": cfg.http.concurrency}.get(engine)
    if together is None:
        return 1
    rows = cfg.rollout.n * cfg.rollout.prompts_per_shard
    return min(_MOST_LANES, 1 + max(1, -(-_SPREAD * together // rows)))


def _on_cluster(session: Session, who: str, kind: str, round: int = 0) -> RayEngine:
    """A model on all workers of the session's cluster, each made there by `remote`."""
    run = session.run
    recipe = {"root": str(run.root.resolve()), "config": run.config.model_dump(mode="json"), "kind": kind}
    engine = run.config.rollout.engine if kind == "generator" else run.config.score.engine
    return session.outside.placed(who, {**recipe, "round": round, "name": who}, _depth(session, engine))


def remote(root: str, config: dict[str, Any], kind: str, round: int, name: str) -> Any:
    """The engine that a worker of a cluster makes for itself: what `kind` says, on this run."""
    session = Session(Run(Path(root), parse_config(config, "the configuration of the run")))
    session.outside.place = f"-{platform.node()}-{os.getpid()}"
    made: dict[str, Callable[[], Any]] = {
        "generator": lambda: make_generator(session, round),
        "teacher generator": lambda: teacher_generator(session, name),
        "teacher writer": lambda: teacher_generator(session, name, shared=True),
        "scorer": lambda: joint_scorer(session, round, name),
        "student": lambda: student_evaluator(session, round),
        "teacher": lambda: teacher_evaluator(session, name),
        "base": lambda: base_evaluator(session),
    }
    return made[kind]()


def open_servers(session: Session, round: int, names: list[str]) -> None:
    """Probe the servers that will score for these teachers, before any model is loaded. Raises as `Session.server`."""
    engine = session.run.config.score.engine
    if engine == "http":
        student_evaluator(session, round)
    for name in names:
        if teacher_engine(session, name) == "http":
            teacher_evaluator(session, name)


def _suffix(session: Session, name: str) -> str:
    """Tells one fake teacher of several from another; the only one needs no mark."""
    return name if session.run.config.teachers else ""


def _budget(session: Session) -> int:
    return session.run.config.score.logits_budget_mb << 20


def _transformers(session: Session, model: Any, ids: Vocabulary) -> Evaluator:
    from fire_data.scoring import TransformersEvaluator

    return TransformersEvaluator(model, ids, session.run.config.score.tokens_per_batch, _budget(session))


def _student(session: Session, round: int, engine: str, how: Sampling | None = None) -> Engine:
    """The round's student on a vllm process or behind its url: one process writes and evaluates."""
    cfg = session.run.student(round)
    session.verify_student(round)
    return _placed(session, STUDENT, engine, cfg, session.vocabulary, session.stop_ids, session.tokenizer, how)


def _placed(
    session: Session,
    who: str,
    engine: str,
    cfg: ModelConfig,
    ids: Vocabulary,
    stops: frozenset[int],
    tokenizer: Any,
    how: Sampling | None = None,
) -> Engine:
    """A model on an engine of its own; `how`: as it is to write."""
    run = session.run.config
    longest = run.rollout.max_prompt_tokens + max(run.rollout.max_new_tokens, run.eval.max_new_tokens or 0)
    if who not in (STUDENT, BASE) and run.score.teacher_prompt == "own":
        longest += _OTHER_PROMPT
    if engine == "http":
        return session.outside.server(who + _WRITES * (how is not None), cfg, ids, stops, tokenizer, longest, how)
    # A teacher writes over all its own ids and scores over the shared ones: two processes, each with its mask.
    return session.outside.process(who + _WRITES * (how is not None and who != STUDENT), cfg, ids, stops, longest)


def sampling(session: Session) -> Sampling:
    """How rollouts are drawn."""
    cfg = session.run.config.rollout
    return Sampling(session.run.config.seed, cfg.temperature, cfg.top_p, cfg.top_k, cfg.max_new_tokens)


def require_same_servers(session: Session, kept: Kept) -> None:
    """Compare the servers' probes with those of the day on which this stage was begun, or note them down.

    Raises FingerprintError if one answers otherwise: a shard by another model must not come beside the first ones.
    """
    from fire_data.http_engine import probe_difference

    path = kept.folder / "servers.json"
    known = files.read_json(path, "what servers said", fix="remove it") or {}
    mine = known.get(kept.fingerprint, {})
    for who, probe in session.outside.probes.items():
        off = probe_difference(mine[who], probe) if who in mine else None
        if off is not None and off > _SAME_SERVER:
            text = f"the server of {who} gives other logprobs than when this stage was begun, by up to {off:.3g} nats"
            fix = f"serve the model it was begun with, or: {kept.part.command} --redo"
            raise FingerprintError(text, where=str(probe.get("url")), fix=fix)
        kinds = [p.get("entropy_kind") for p in (mine.get(who, probe), probe)]
        if kinds[0] != kinds[1]:
            text = f"the server of {who} gave entropies that are {kinds[0]} when this stage was begun, now {kinds[1]}"
            fix = f"serve the model as it was then, or: {kept.part.command} --redo"
            raise FingerprintError(text, where=str(probe.get("url")), fix=fix)
    if session.outside.probes:
        files.replace_json(path, {kept.fingerprint: {**session.outside.probes, **mine}}, kept.part.tmp)
