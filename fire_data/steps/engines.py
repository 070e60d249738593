"""Which engine runs which model: made from the configuration when first needed, kept by the session.

Engines that hold the logits of student and teacher together give joint signals (KL divergences); all others evaluate
one model at a time. A teacher with a url is asked there, whatever engine the rest uses.
"""

from __future__ import annotations

from typing import Any

from fire_data.engines import Engine, Evaluator, FakeGenerator, FakeScorer, Generator, Scorer
from fire_data.schemas.config import ModelConfig
from fire_data.session import Session
from fire_data.vocabulary import Vocabulary

STUDENT, BASE = "student", "base"
_OTHER_PROMPT = 1024  # tokens by which a teacher's own prompt may be longer than the longest of the student's


def make_generator(session: Session, round: int) -> Generator:
    """The configured generation engine with the round's student."""
    cfg, ids, stops = session.run.config, session.vocabulary, session.stop_ids
    if cfg.rollout.engine == "fake":
        return FakeGenerator(ids, stops)
    if cfg.rollout.engine != "transformers":
        return _student(session, round, cfg.rollout.engine)
    from fire_data.generate import TransformersGenerator

    generator = TransformersGenerator(session.student(round), ids, stops, cfg.rollout.rows_in_flight)
    if not generator.can_stop:
        session.report.warn("the student has no end token it may sample: every response runs to max_new_tokens")
    return generator


def teacher_generator(session: Session, name: str) -> Generator:
    """The configured engine with a teacher as the one that writes, over all its own ids.

    It ends where it does by itself or, behind the student's prompt, where the student does.
    """
    from fire_data import models

    cfg, teacher = session.run.config, session.run.teacher(name)
    ids, tokenizer = session.teacher_vocabulary(name), session.teacher_tokenizer(name)
    stops = models.stop_ids(teacher, session.run.root, tokenizer)
    if cfg.score.teacher_prompt == "shared":
        stops |= session.stop_ids
    engine = teacher_engine(session, name)
    if engine == "fake":
        return FakeGenerator(ids, stops)
    if engine != "transformers":
        return _placed(session, f"{name} (writing)", engine, teacher, ids, stops, tokenizer)
    from fire_data.generate import TransformersGenerator

    return TransformersGenerator(session.teacher(name), ids, stops, cfg.rollout.rows_in_flight)


def is_joint(session: Session, name: str) -> bool:
    """True if student and this teacher are evaluated together, from the logits of both."""
    return {session.run.config.score.engine, teacher_engine(session, name)} <= {"transformers"} or (
        session.run.config.score.engine == "fake"
    )


def teacher_engine(session: Session, name: str) -> str:
    """The engine that runs a teacher."""
    engine = session.run.config.score.engine
    return "http" if session.run.teacher(name).url is not None and engine != "fake" else engine


def joint_scorer(session: Session, round: int, name: str) -> Scorer:
    """Student and teacher together."""
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
    if engine == "transformers":
        return _transformers(session, session.student(round), session.vocabulary)
    return _student(session, round, engine)


def teacher_evaluator(session: Session, name: str) -> Evaluator:
    """A teacher alone."""
    engine = teacher_engine(session, name)
    if engine == "fake":
        return FakeScorer(session.vocabulary, _suffix(session, name))
    if engine == "transformers":
        return _transformers(session, session.teacher(name), session.vocabulary)
    tokenizer = session.teacher_tokenizer(name)
    return _placed(session, name, engine, session.run.teacher(name), session.vocabulary, frozenset(), tokenizer)


def base_evaluator(session: Session) -> Evaluator:
    """The reference model alone, over the ids it shares with the others."""
    engine, cfg, ids = session.run.config.score.engine, session.run.base(), session.base_vocabulary
    if engine == "fake":
        return FakeScorer(ids, BASE)
    if cfg.url is not None:
        return _placed(session, BASE, "http", cfg, ids, frozenset(), session.base_tokenizer)
    if engine == "vllm":
        return _placed(session, BASE, engine, cfg, ids, frozenset(), session.base_tokenizer)
    return _transformers(session, session.base(), ids)


def lanes(session: Session, engine: str) -> int:
    """How many shards are worked on at a time: two where the next one fills what the end of the one before leaves."""
    return 2 if engine in ("vllm", "http") else 1


def entropy_kinds(session: Session, round: int, names: list[str]) -> dict[str, str]:
    """Whether entropies are exact, by model. Engines that have to be asked are started."""
    if session.run.config.score.engine == "fake":
        return {STUDENT: "fake", **dict.fromkeys(names, "fake")}
    apart = [n for n in names if not is_joint(session, n)]
    kinds = dict.fromkeys(names, "exact") | {
        n: teacher_evaluator(session, n).entropy_kind for n in apart if teacher_engine(session, n) != "transformers"
    }
    alone = session.run.config.score.engine != "transformers"
    return {STUDENT: student_evaluator(session, round).entropy_kind if alone else "exact", **kinds}


def _suffix(session: Session, name: str) -> str:
    """Tells one fake teacher of several from another; the only one needs no mark."""
    return name if session.run.config.teachers else ""


def _budget(session: Session) -> int:
    return session.run.config.score.logits_budget_mb << 20


def _transformers(session: Session, model: Any, ids: Vocabulary) -> Evaluator:
    from fire_data.scoring import TransformersEvaluator

    return TransformersEvaluator(model, ids, session.run.config.score.tokens_per_batch, _budget(session))


def _student(session: Session, round: int, engine: str) -> Engine:
    """The round's student on a vllm process or behind its url: writes and evaluates."""
    cfg = session.run.student(round)
    session.verify_student(round)
    return _placed(session, STUDENT, engine, cfg, session.vocabulary, session.stop_ids, session.tokenizer)


def _placed(
    session: Session,
    who: str,
    engine: str,
    cfg: ModelConfig,
    ids: Vocabulary,
    stops: frozenset[int],
    tokenizer: Any,
) -> Engine:
    """A model on an engine of its own: Generator and Evaluator."""
    run = session.run.config
    longest = run.rollout.max_prompt_tokens + max(run.rollout.max_new_tokens, run.eval.max_new_tokens or 0)
    if who not in (STUDENT, BASE) and run.score.teacher_prompt == "own":
        longest += _OTHER_PROMPT
    if engine == "http":
        return session.server(who, cfg, ids, stops, tokenizer, longest)
    return session.process(who, cfg, ids, stops, longest)
