"""Rollouts: `TransformersGenerator` against plain `model.generate(do_sample=True)` at an equal number of rows.

`equal`: prompts of equal length, every response as long as allowed: nothing to gain from refilling the batch. `mixed`:
prompts of 1/2 to 1 of the length and responses that end by chance, on average after a quarter of the longest allowed,
as real ones do. `generate` runs left-padded batches in the order of the requests. Ours does more: it draws from noise
that belongs to the trajectory and returns logprobs, which `generate` does not. Response tokens per second.
"""

from __future__ import annotations

import argparse

import measure
import numpy as np
import pyarrow as pa
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fire_data.generate import TransformersGenerator
from fire_data.sampling import Sampling
from fire_data.schemas.tables import IDS
from fire_data.vocabulary import Vocabulary

SIZES: measure.Sizes = {
    "requests": (64, 8, "prompts"),
    "rows": (16, 4, "rows at a time"),
    "prompt": (64, 8, "longest prompt, tokens"),
    "new": (96, 8, "longest response, tokens"),
    "hidden": (256, 16, "hidden size"),
    "layers": (4, 1, "layers"),
    "vocabulary": (32768, 256, "vocabulary size"),
    "dtype": ("float32", "float32", "of the model"),
    "device": ("cpu", "cpu", "cpu or cuda"),
}
GROUPS = {"equal": ["fire", "generate"], "mixed": ["fire", "generate"]}


def prepare(group: str, case: str, options: argparse.Namespace) -> measure.Work:
    """A random model and requests. Its distribution is nearly flat, a share of ids that stop sets the length."""
    torch.set_num_threads(options.threads)
    model = make_model(options)
    rng = np.random.default_rng(0)
    short = options.prompt // 2 if group == "mixed" else options.prompt
    lengths = rng.integers(short, options.prompt + 1, options.requests)
    prompts = [rng.integers(0, options.vocabulary, n).tolist() for n in lengths]
    stops = list(range(options.vocabulary * 4 // options.new if group == "mixed" else 0))

    def fire() -> int:
        vocabulary = Vocabulary(options.vocabulary, np.ones(options.vocabulary, dtype=np.bool_))
        names = [f"{i}" for i in range(len(prompts))]
        requests = pa.table({"trajectory_id": names, "prompt_ids": pa.array(prompts, IDS)})
        engine = TransformersGenerator(model, vocabulary, frozenset(stops), options.rows)
        answer = engine.generate(requests, Sampling(seed=0, max_new_tokens=options.new))
        return len(answer["response_ids"].combine_chunks().flatten())

    def generate() -> int:
        torch.manual_seed(0)
        tokens = 0
        for start in range(0, len(prompts), options.rows):
            ids_BL, mask_BL = left_pad(prompts[start : start + options.rows], options.device)
            with torch.inference_mode():
                out_BL = model.generate(
                    input_ids=ids_BL, attention_mask=mask_BL, do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                    max_new_tokens=options.new, eos_token_id=stops or None, pad_token_id=0,
                )  # fmt: skip
            ends_BL = torch.isin(out_BL[:, ids_BL.shape[1] :], torch.tensor(stops, device=options.device)).long()
            tokens += int((ends_BL.cumsum(1) - ends_BL == 0).sum())
        return tokens

    return lambda: measure.Done({"fire": fire, "generate": generate}[case]())


def make_model(options: argparse.Namespace) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights from a fixed seed."""
    torch.manual_seed(0)
    heads = max(1, options.hidden // 64)
    config = Qwen3Config(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=heads, num_key_value_heads=heads,
        head_dim=options.hidden // heads, max_position_embeddings=options.prompt + options.new,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    return model.to(device=options.device, dtype=getattr(torch, options.dtype))


def left_pad(rows: list[list[int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, L], the prompts aligned on the right."""
    width = max(map(len, rows))
    ids_BL = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask_BL = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids_BL, mask_BL


if __name__ == "__main__":
    measure.main(__doc__, SIZES, GROUPS, prepare)
