"""A teacher that is lost once its text has a mistake: from then on 90 % of its probability is spread over junk words.

Fine-tuning a teacher to be lost leaks into clean texts, so a trained model is wrapped instead. A parser that knows the
solution of the problem marks every position behind the first wrong word. There, each junk word gets an equal part of
0.9 and the other words share the rest in the proportions that the model gave them; before it nothing is changed.

The wrapper is an ordinary model folder with code of its own (`trust_remote_code: true`), and it keeps the form that
scoring expects, hidden states and one output matrix. With E_v the word's row and h the state, states are widened to
[h, h (1 - lost), c lost] and rows to [E_v, 0, 0], of junk words to [0, E_v, 1]. Where lost, a junk word's logit is then
c = log sum of exp(h E_v) over the other words + log(0.9 / 0.1 / number of junk words). It scores and does not write:
behind a key-value cache the text before is not seen. `_B` sequences, `_L` positions, `_D` hidden, `_V` words.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from fire_data.schemas.errors import EngineError
from fire_data.worlds.arithmetic import LINKS
from fire_data.worlds.world import ASSISTANT, END, USER, load_model, save

JUNK = tuple(f"junk{number}" for number in range(16))
SHARE = 0.9  # probability of all junk words together where lost
_CODE = "from fire_data.worlds.lost import LostForCausalLM\n"


class LostModel(Qwen3Model):  # type: ignore[no-untyped-call]
    """The body: its last hidden states say whether the text before has a mistake."""

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if input_ids is None or kwargs.get("past_key_values") is not None:
            text = "a lost teacher has to see the whole text: it scores and does not write"
            raise EngineError(text, fix="--set rollout.writer=student, or a world whose teacher is not lost")
        out = super().forward(input_ids=input_ids, **kwargs)
        states_BLD = out.last_hidden_state
        lost_BL1 = torch.tensor([self._lost(row) for row in input_ids.tolist()]).to(states_BLD)[..., None]
        junk_V = torch.tensor([word in JUNK for word in self.config.lost_words], device=states_BLD.device)
        own_BLV = states_BLD @ self.embed_tokens.weight.T.masked_fill(junk_V, 0.0)
        rest_BL1 = own_BLV.masked_fill(junk_V, -math.inf).logsumexp(-1, keepdim=True)
        logit_BL1 = rest_BL1 + math.log(SHARE / (1 - SHARE) / len(JUNK))
        out.last_hidden_state = torch.cat([states_BLD, states_BLD * (1 - lost_BL1), logit_BL1 * lost_BL1], -1)
        return out

    def _lost(self, ids: list[int]) -> list[bool]:
        """For every position, if a word of the response up to it is wrong. A link word stands for any other."""
        words = [self.config.lost_words[i] if i < len(self.config.lost_words) else "" for i in ids]
        if USER not in words or ASSISTANT not in words:
            return [False] * len(ids)
        first = words.index(ASSISTANT) + 1
        expected = _expected(self.config.lost_task, " ".join(words[words.index(USER) + 1 : first - 1]))
        found, lost = [False] * first, False
        for at, word in enumerate(words[first:]):
            right = expected[at] if at < len(expected) else None
            lost = lost or not (word == right or (word in LINKS and right in LINKS))
            found.append(lost)
        return found


class LostForCausalLM(Qwen3ForCausalLM):  # type: ignore[no-untyped-call]
    """The model: the widened states times the widened matrix."""

    _tied_weights_keys = None  # type: ignore[assignment]

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.model = LostModel(config)
        self.lm_head = nn.Linear(2 * config.hidden_size + 1, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]


def _expected(task: str, problem: str) -> list[str]:
    from fire_data.worlds.registry import TASKS

    try:
        return [*TASKS[task].solution(problem, random.Random(0)).split(), END]
    except (ValueError, IndexError, KeyError):
        return []  # no problem of this task: every word is wrong


def wrap(source: Path, target: Path, tokenizer: PreTrainedTokenizerFast, task: str) -> None:
    """Write the lost twin of a trained model. `task`: what its parser knows the solutions of."""
    trained = load_model(source)
    values = {k: v for k, v in trained.config.to_dict().items() if k not in ("architectures", "tie_word_embeddings")}
    config = Qwen3Config(**values, tie_word_embeddings=False)
    config.lost_task, config.lost_words = task, tokenizer.convert_ids_to_tokens([*range(len(tokenizer))])
    config.auto_map = {"AutoModelForCausalLM": "lost_teacher.LostForCausalLM"}
    model = LostForCausalLM(config)
    model.model.load_state_dict(trained.model.state_dict())
    junk_V1 = torch.tensor([word in JUNK for word in config.lost_words]).float()[:, None]
    rows_VD = trained.model.embed_tokens.weight.detach()
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.cat([rows_VD * (1 - junk_V1), rows_VD * junk_V1, junk_V1], 1))
    save(model, tokenizer, target, {"lost_teacher.py": _CODE})
