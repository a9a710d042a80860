"""Cross-entropy with targets over the whole vocabulary, and its gradients, a few rows at a time.

Shape suffixes: R rows, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_ROWS_AT_ONCE = 64

Targets = Callable[[slice], Tensor]
"""Gives the targets of some rows, float32 [R, V]."""


def dense_loss(hidden_RD: Tensor, weight_VD: Tensor, targets: Targets) -> Tensor:
    """Return sum over rows of -sum_v t_v log q_v, nats; differentiable in both tensors.

    The gradient in the logits is q * sum(t) - t. Under autocast, products have its dtype, as those
    of `distill.DistillationHead`, and sums are float32.

    Args:
        hidden_RD: The student's last hidden states.
        weight_VD: Of its head.
        targets: Gives t.
    """
    function: Any = _DenseLoss
    total: Tensor = function.apply(hidden_RD, weight_VD, targets)
    return total


def pieces(num_rows: int) -> Iterator[slice]:
    """Yield slices of as many rows as are worked on at a time."""
    for first in range(0, num_rows, _ROWS_AT_ONCE):
        yield slice(first, min(first + _ROWS_AT_ONCE, num_rows))


class _DenseLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, targets: Targets) -> Tensor:
        dtype = hidden_RD.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        low_RD, low_VD = hidden_RD.to(dtype), weight_VD.to(dtype)
        grad_RD = torch.empty_like(hidden_RD)
        grad_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            for rows in pieces(len(hidden_RD)):
                t_RV = targets(rows)
                logq_RV = (low_RD[rows] @ low_VD.T).float().log_softmax(-1)
                total -= (t_RV * logq_RV).sum()
                grad_RV = logq_RV.exp_().mul_(t_RV.sum(-1, keepdim=True)).sub_(t_RV).to(dtype)
                grad_RD[rows] = grad_RV @ low_VD
                grad_VD += grad_RV.T @ low_RD[rows]
        ctx.grads = (grad_RD, grad_VD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = tuple(grad * grads[0] for grad in ctx.grads)
        ctx.grads = None
        return (*scaled, None)
