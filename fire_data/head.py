"""The output head as a function from hidden states to logits, and slices of positions whose logits fit a budget.

Logits of all positions are the largest tensor of the whole pipeline, so nobody who applies a head does it to more than
a slice. What is known to be one matrix may be multiplied in other ways than by calling it.
`_T` positions, `_D` hidden, `_V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LinearHead:
    """Logits of hidden states: an output matrix, then a factor, a divisor and tanh soft-capping, each where needed."""

    matrix: nn.Module
    factor: float = 1.0
    divisor: float = 1.0
    cap: float | None = None

    def __call__(self, states: Tensor) -> Tensor:
        logits: Tensor = self.matrix(states)
        if self.factor != 1.0:
            logits = logits * self.factor
        if self.divisor != 1.0:
            logits = logits / self.divisor
        return (logits / self.cap).tanh() * self.cap if self.cap else logits


def plain_linear(head: Head) -> nn.Linear | None:
    """The head's output matrix if it is one and nothing else: no adapter, no quantised weight, no hook, not sharded."""
    matrix = getattr(head, "matrix", None)
    if not isinstance(head, LinearHead) or type(matrix) is not nn.Linear or "forward" in vars(matrix):
        return None
    hooks = (matrix._forward_hooks, matrix._forward_pre_hooks, matrix._backward_hooks, matrix._backward_pre_hooks)
    plain = all(type(p) is nn.Parameter and p.is_leaf for p in matrix.parameters())
    return matrix if plain and not any(hooks) else None


def only_weight(head: Head) -> Tensor | None:
    """The matrix [V, D] if logits are the states times it, and nothing comes after."""
    linear = plain_linear(head)
    if linear is None or linear.bias is not None or head != LinearHead(linear):
        return None
    return linear.weight


def head_rows(head: Head, hidden_TD: Tensor) -> int:
    """Output rows of a head, asked with no positions, which costs nothing."""
    with torch.no_grad():
        return int(head(hidden_TD[:0]).shape[-1])


def chunks(positions: int, bytes_per_position: int, budget_bytes: int) -> list[slice]:
    """Slices of nearly equal length that each stay within the budget, or hold one position."""
    most = max(1, budget_bytes // bytes_per_position)
    number = -(-positions // most)
    return [slice(positions * i // number, positions * (i + 1) // number) for i in range(number)]
