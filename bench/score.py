"""Scoring against bare forward passes and matmuls, against plain full logits, and against TRL's kernel.

Three groups. `head`: what one model says of tokens (ours: logprob, entropy, rank, top-1; TRL and `full`: logprob and
entropy), hidden states given. `score`: all 13 signals of both models, hidden states given. `stage`: the same from ids,
both models run by `TransformersScorer`. `bare` throws away what it computes: the same batches through the bodies where
they belong to the group, and the heads chunk by chunk within the same budget. `reused` does so into the same memory
again and again, which saves the system clearing it: no exact scoring can be faster. `full` is the plain way: all logits
at once, log_softmax, and every signal by its formula. TRL is left out where it is not installed (extra `bench`). On a
GPU: --device cuda --dtype bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import measure
import numpy as np
import pyarrow as pa
import torch

from fire_data.head import LinearHead
from fire_data.models import head_of, hidden_states
from fire_data.packing import micro_batches, pad, response_index
from fire_data.scoring import TransformersScorer
from fire_data.signals import model_signals, token_signals
from fire_data.vocabulary import Vocabulary

SIZES: measure.Sizes = {
    "tokens": (2048, 64, "response tokens"),
    "hidden": (512, 32, "hidden size of both models"),
    "vocabulary": (151936, 4096, "output rows of both models"),
    "unused": (267, 10, "output rows beyond the vocabulary"),
    "layers": (4, 1, "layers of both models, in `stage`"),
    "tokens_per_batch": (4096, 256, "score.tokens_per_batch, in `stage`"),
    "budget_mb": (256, 1, "score.logits_budget_mb"),
    "dtype": ("float32", "float32", "of models"),
    "device": ("cpu", "cpu", "cpu or cuda"),
}
TRL = importlib.util.find_spec("trl") is not None
GROUPS = {
    "head": ["fire", "bare", "reused", "full", *(["trl"] if TRL else [])],
    "score": ["fire", "bare", "reused", "full"],
    "stage": ["fire", "bare", "reused", "full"],
}
Found = dict[str, torch.Tensor]
Cases = dict[str, Callable[[], Found]]


def prepare(group: str, case: str, options: argparse.Namespace) -> measure.Work:
    """The inputs, the same for every case; heads whose logits have a standard deviation of 2."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    size = options.vocabulary - options.unused
    vocabulary = Vocabulary(size, np.ones(size, dtype=np.bool_))
    cases = stage_cases(options, vocabulary) if group == "stage" else given_states(group, options, vocabulary)

    def work() -> measure.Done:
        with torch.no_grad():
            found = {name: float(x.double().mean()) for name, x in cases[case]().items()}
        return measure.Done(options.tokens, {} if case in ("bare", "reused") else found)

    return work


def given_states(group: str, options: argparse.Namespace, vocabulary: Vocabulary) -> Cases:
    """Cases of `head`, which has one model, and of `score`, which has two."""
    place = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    models = range(1 if group == "head" else 2)
    states = [torch.randn(options.tokens, options.hidden).to(**place) for _ in models]
    scale = 2 / options.hidden**0.5
    matrices = [(torch.randn(options.vocabulary, options.hidden) * scale).to(**place) for _ in models]
    ids_T = torch.randint(vocabulary.size, (options.tokens,)).to(options.device)
    heads = [LinearHead(torch.nn.Linear(1, 1, bias=False, device="meta")) for _ in models]
    for head, matrix_VD in zip(heads, matrices, strict=True):
        head.matrix.weight = torch.nn.Parameter(matrix_VD, requires_grad=False)
        head.matrix.out_features = options.vocabulary
    budget = options.budget_mb * 2**20

    def ours() -> Found:
        if group == "head":
            return model_signals(states[0], heads[0], ids_T, vocabulary, budget)
        return token_signals(states[0], heads[0], states[1], heads[1], ids_T, vocabulary, budget)

    def full() -> Found:
        if group == "score":
            return plain_signals(*(h(x)[:, : vocabulary.size] for h, x in zip(heads, states, strict=True)), ids_T)
        log_TV = heads[0](states[0])[:, : vocabulary.size].float().log_softmax(-1)
        return {"logprob": log_TV.gather(1, ids_T[:, None]), "entropy": -(log_TV.exp() * log_TV).sum(-1)}

    def trl() -> Found:
        from trl.kernels import ChunkedLogProbFunction

        # 32,768 columns at a time, as the package's own patched forward does.
        given = (states[0], matrices[0][: vocabulary.size], None, ids_T, 1.0, 32768)
        logprob_T, entropy_T, *_ = ChunkedLogProbFunction.apply(*given, None, 1.0, ("entropy",))
        return {"logprob": logprob_T, "entropy": entropy_T}

    return {"fire": ours, "full": full, "trl": trl} | {
        case: lambda reuse=reuse: bare_heads(heads, states, options, reuse)
        for case, reuse in (("bare", False), ("reused", True))
    }


def bare_heads(heads: Sequence[Any], states: list[torch.Tensor], options: argparse.Namespace, reuse: bool) -> Found:
    """Every chunk's logits computed and dropped; `reuse`: always into the same memory."""
    rows, used = min(len(states[0]), max(1, options.budget_mb * 2**20 // (options.vocabulary * 4))), 0.0
    rooms = [x_TD.new_empty(rows if reuse else 0, options.vocabulary) for x_TD in states]
    for parts in zip(*(torch.split(x_TD, rows) for x_TD in states), strict=True):
        for head, part_TD, room_TV in zip(heads, parts, rooms, strict=True):
            if reuse:
                logits_TV = torch.mm(part_TD, head.matrix.weight.t(), out=room_TV[: len(part_TD)])
            else:
                logits_TV = head(part_TD)
            used += float(logits_TV[-1, -1])
            del logits_TV
    return {"used": torch.tensor(used)}


def stage_cases(options: argparse.Namespace, vocabulary: Vocabulary) -> Cases:
    """Cases of `stage`: rows of lognormal length behind prompts of 64 tokens, and two random Qwen3 models."""
    models = [make_model(options) for _ in range(2)]
    rng = np.random.default_rng(0)
    shares = rng.lognormal(sigma=0.7, size=max(1, options.tokens // 256))
    counts = np.diff(np.round(np.cumsum([0, *shares]) / shares.sum() * options.tokens).astype(int))
    rows = [(rng.integers(0, vocabulary.size, 64), rng.integers(0, vocabulary.size, n)) for n in counts if n]
    table = pa.table({"prompt_ids": [p.tolist() for p, _ in rows], "response_ids": [r.tolist() for _, r in rows]})
    heads = [head_of(m) for m in models]

    def ours() -> Found:
        scorer = TransformersScorer(*models, vocabulary, options.tokens_per_batch, options.budget_mb << 20)
        scores = scorer.score(table)
        columns = {name: scores[name].combine_chunks().flatten() for name in scores.column_names}
        return {
            name: torch.from_numpy(values.to_numpy(zero_copy_only=False).copy()) for name, values in columns.items()
        }

    def batches() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        groups = micro_batches([len(p) + len(r) for p, r in rows], options.tokens_per_batch)
        made = []
        for group in groups:
            chosen = [rows[i] for i in group]
            ids_BL, mask_BL = pad([np.concatenate([p, r[:-1]]) for p, r in chosen])
            row_T, position_T = response_index([len(p) for p, _ in chosen], [len(r) for _, r in chosen])
            ids_T = torch.from_numpy(np.concatenate([r for _, r in chosen]))
            made.append(tuple(x.to(options.device) for x in (ids_BL, mask_BL, row_T, position_T, ids_T)))
        return made  # type: ignore[return-value]

    def bare(reuse: bool) -> Found:
        used = torch.zeros(())
        for ids_BL, mask_BL, row_T, position_T, _ in batches():
            states = [hidden_states(m, ids_BL, mask_BL)[row_T, position_T] for m in models]
            used += bare_heads(heads, states, options, reuse)["used"]
        return {"used": used}

    def full() -> Found:
        parts = []
        for ids_BL, mask_BL, row_T, position_T, ids_T in batches():
            logits = [
                m(input_ids=ids_BL, attention_mask=mask_BL).logits[row_T, position_T, : vocabulary.size] for m in models
            ]
            parts.append(plain_signals(logits[0], logits[1], ids_T))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return {"fire": ours, "bare": lambda: bare(False), "reused": lambda: bare(True), "full": full}


def make_model(options: argparse.Namespace) -> Any:
    """A random Qwen3 with heads of 64 numbers, a fourth as many for keys and values."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=max(1, options.hidden // 64),
        num_key_value_heads=max(1, options.hidden // 256), head_dim=64, tie_word_embeddings=False,
        initializer_range=2 / options.hidden**0.5,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to(device=options.device, dtype=getattr(torch, options.dtype)).eval()


def plain_signals(student_TV: torch.Tensor, teacher_TV: torch.Tensor, ids_T: torch.Tensor) -> Found:
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
    if not TRL and "--worker" not in sys.argv:
        print("TRL is not installed and is left out: pip install 'fire-opd[bench]'", file=sys.stderr)
    measure.main(__doc__, SIZES, GROUPS, prepare)
