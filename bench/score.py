"""Scoring: all 13 signals of `token_signals`, against the two bare matmuls and against plain full logits.

`matmul` applies both heads chunk by chunk within the same budget and throws the logits away: no exact scoring can be
faster. `full` is the plain way: all logits of both models at once, log_softmax, and every signal by its formula.
Hidden states are given, so the models' bodies, equal for all, are left out. On a GPU: --device cuda --dtype bfloat16.
"""

from __future__ import annotations

import argparse
from functools import partial

import measure
import numpy as np
import torch

from fire_data.signals import token_signals
from fire_data.vocabulary import Vocabulary

SIZES: measure.Sizes = {
    "tokens": (2048, 64, "response tokens"),
    "hidden": (512, 32, "hidden size of both models"),
    "vocabulary": (151936, 4096, "output rows of both models"),
    "budget_mb": (256, 1, "score.logits_budget_mb"),
    "dtype": ("float32", "float32", "of hidden states and heads"),
    "device": ("cpu", "cpu", "cpu or cuda"),
}
GROUPS = {"score": ["fire", "matmul", "full"]}


def prepare(group: str, case: str, options: argparse.Namespace) -> measure.Work:
    """The inputs, the same for every case: heads whose logits have a standard deviation of 2."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    states = [torch.randn(options.tokens, options.hidden).to(**place) for _ in range(2)]
    scale = 2 / options.hidden**0.5
    matrices = [(torch.randn(options.vocabulary, options.hidden) * scale).to(**place) for _ in range(2)]
    ids_T = torch.randint(options.vocabulary, (options.tokens,)).to(options.device)
    budget = options.budget_mb * 2**20
    vocabulary = Vocabulary(options.vocabulary, np.ones(options.vocabulary, dtype=np.bool_))
    student, teacher = (partial(torch.nn.functional.linear, weight=m) for m in matrices)

    def fire() -> dict[str, torch.Tensor]:
        return token_signals(states[0], student, states[1], teacher, ids_T, vocabulary, budget)

    def matmul() -> dict[str, torch.Tensor]:
        rows = max(1, budget // (options.vocabulary * 4))
        used = 0.0
        for a_TD, b_TD in zip(*(torch.split(x, rows) for x in states), strict=True):
            used += float(student(a_TD)[-1, -1]) + float(teacher(b_TD)[-1, -1])
        return {"used": torch.tensor(used)}

    def full() -> dict[str, torch.Tensor]:
        return plain_signals(student(states[0]), teacher(states[1]), ids_T)

    cases = {"fire": fire, "matmul": matmul, "full": full}

    def work() -> measure.Done:
        with torch.no_grad():
            found = {name: float(x.double().mean()) for name, x in cases[case]().items()}
        return measure.Done(options.tokens, found if case != "matmul" else {})

    return work


def plain_signals(student_TV: torch.Tensor, teacher_TV: torch.Tensor, ids_T: torch.Tensor) -> dict[str, torch.Tensor]:
    """The columns of `tables.SIGNALS` as anyone would write them first."""
    student_TV, teacher_TV = student_TV.float().log_softmax(-1), teacher_TV.float().log_softmax(-1)
    ids_T1 = ids_T[:, None]
    student_T1, teacher_T1 = student_TV.gather(1, ids_T1), teacher_TV.gather(1, ids_T1)
    student_max, teacher_max = student_TV.max(-1), teacher_TV.max(-1)
    top1_T1 = teacher_TV.gather(1, student_max.indices[:, None])
    return {
        "student_logprob": student_T1[:, 0],
        "student_entropy": -(student_TV.exp() * student_TV).sum(-1),
        "teacher_logprob": teacher_T1[:, 0],
        "teacher_entropy": -(teacher_TV.exp() * teacher_TV).sum(-1),
        "reverse_kl": (student_TV.exp() * (student_TV - teacher_TV)).sum(-1),
        "forward_kl": (teacher_TV.exp() * (teacher_TV - student_TV)).sum(-1),
        "student_max_logprob": student_max.values,
        "teacher_max_logprob": teacher_max.values,
        "student_top1_id": student_max.indices,
        "teacher_top1_id": teacher_max.indices,
        "student_rank": (student_TV > student_T1).sum(-1) + 1,
        "teacher_rank": (teacher_TV > teacher_T1).sum(-1) + 1,
        "teacher_rank_of_student_top1": (teacher_TV > top1_T1).sum(-1) + 1,
    }


if __name__ == "__main__":
    measure.main(__doc__, SIZES, GROUPS, prepare)
