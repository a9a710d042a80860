"""The student's LM head fused with the loss: logits exist for one chunk of rows at a time.

Shape suffixes: B blocks, T positions, D hidden size, V vocabulary, R rows that count, N entries.

For a chunk the head computes logits, softmax p and the loss; autograd on the few selected
log-probabilities gives g_i = dL / d log q_i, and the gradient of the logits follows in closed form:

    dL/dx_v = -p_v G + g_v [v kept]                          without a tail bucket
    dL/dx_v = -p_v G + g_v [v kept] + g_tail p_v / q_tail [v not kept]   with one

where G is the sum of all g of the row (label and tail included). It takes the place of the logits,
and the gradients of hidden states and weight are made of it in the same pass: three matrix products
a chunk, as plain cross-entropy needs, and the backward pass only scales.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.losses import LossRows, LossWeights, divergence, forward_kl
from distill.targets import SparseTargets

_CHUNK_BYTES = 1 << 27
"""Of the logits of a chunk."""

_CACHED_ENTRIES = 1 << 20
"""Logits that a CPU turns into gradients at a time: 4 MB stay in its cache."""

_SLICE_ENTRIES = 1 << 21
"""Entries of the weight's gradient that are computed at a time, in the dtype of the product."""


@dataclass(frozen=True, slots=True)
class HeadTargets:
    """All that the head needs besides hidden states."""

    labels_R: Tensor
    """True next tokens of the rows that count, int64."""
    sparse: SparseTargets
    """The teacher's rows, in the same order, without rows that do not count."""
    weights: LossWeights
    vocab_size: int
    """True number of tokens; logits of padding beyond it are left out, as at capture."""
    chunk_rows: int | None = None
    """Rows whose logits exist at a time; None: as many as 128 MiB hold."""


class DistillationHead(nn.Linear):
    """A linear head that, given targets, returns the loss instead of logits.

    It holds the same Parameter as the head that it replaces (ties survive, checkpoints stay as
    they are) and is called inside the model's forward, so DDP and FSDP gather its weight as for any
    module.
    """

    @classmethod
    def adopt(cls, linear: nn.Linear) -> "DistillationHead":
        """Return a head over the very parameters of `linear`."""
        head = cls(
            linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta"
        )
        head.weight = linear.weight
        if linear.bias is not None:
            head.bias = linear.bias
        return head

    def loss(self, hidden_RD: Tensor, targets: HeadTargets) -> tuple[Tensor, LossRows]:
        """Return the summed loss (float32, nats, differentiable) and each row's parts."""
        if not torch.is_grad_enabled():
            parts = _Chunks(hidden_RD, self.weight, self.bias, needs=(False, False, False))
            rows = parts.run(targets)
            return rows.loss_R.sum(), rows
        fused: Any = _FusedLoss
        total, *rows_of = fused.apply(hidden_RD, self.weight, self.bias, targets)
        return total, LossRows(*rows_of)


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets: HeadTargets
    ) -> tuple[Tensor, ...]:
        chunks = _Chunks(hidden_RD, weight_VD, bias_V, needs=ctx.needs_input_grad[:3])
        rows = chunks.run(targets)
        ctx.grads = chunks.gradients()
        parts = tuple(getattr(rows, name) for name in LossRows.__slots__)
        ctx.mark_non_differentiable(*parts)
        return (rows.loss_R.sum(), *parts)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grads = tuple(None if grad is None else grad.mul_(grad_total) for grad in ctx.grads)
        ctx.grads = None
        return (*grads, None)


class _Chunks:
    """One pass over the rows: values, and gradients where asked for."""

    def __init__(
        self,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        *,
        needs: tuple[bool, bool, bool],
    ) -> None:
        device = hidden_RD.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else hidden_RD.dtype
        self.hidden_RD, self.weight_VD, self.bias_V = (
            hidden_RD.to(dtype),
            weight_VD.to(dtype),
            bias_V,
        )
        self._dtypes = [None if x is None else x.dtype for x in (hidden_RD, weight_VD, bias_V)]
        self.grad_hidden_RD = torch.empty_like(hidden_RD) if needs[0] else None
        # Sums over chunks are float32 whatever the dtype of a chunk.
        self.grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs[1] else None
        self.grad_bias_V = None
        if bias_V is not None and needs[2]:
            self.grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32)

    def run(self, targets: HeadTargets) -> LossRows:
        """Go through the rows; collect what each costs, and the gradients."""
        sparse, num_rows = targets.sparse, len(self.hidden_RD)
        starts_R = torch.zeros(num_rows + 1, dtype=torch.int64)
        starts_R[1:] = sparse.counts_R.cumsum(0)
        row_bytes = len(self.weight_VD) * self.hidden_RD.element_size()
        chunk_rows = targets.chunk_rows or max(1, _CHUNK_BYTES // row_bytes)
        piece_rows = chunk_rows
        if self.hidden_RD.device.type == "cpu":
            piece_rows = max(1, _CACHED_ENTRIES // len(self.weight_VD))
        parts = []
        # One for all chunks: a new one each would exist beside the one before.
        logits_CV = self.hidden_RD.new_empty(min(chunk_rows, num_rows), len(self.weight_VD))
        with torch.autocast(self.hidden_RD.device.type, enabled=False):
            for start in range(0, num_rows, chunk_rows):
                stop = min(start + chunk_rows, num_rows)
                buffer_RV = logits_CV[: stop - start]
                torch.mm(self.hidden_RD[start:stop], self.weight_VD.T, out=buffer_RV)
                for first in range(start, stop, piece_rows):
                    last = min(first + piece_rows, stop)
                    logits_RV = buffer_RV[first - start : last - start].float()
                    if self.bias_V is not None:
                        logits_RV += self.bias_V
                    piece = sparse.slice_rows(first, last, starts_R)
                    losses, grad_RV = _piece_loss(
                        logits_RV, targets.labels_R[first:last], piece, targets
                    )
                    parts.append(losses)
                    if self.grad_bias_V is not None:
                        self.grad_bias_V += grad_RV.sum(0)
                    buffer_RV[first - start : last - start] = grad_RV
                self._add_gradients(slice(start, stop), buffer_RV)
        if not parts:
            empty = self.hidden_RD.new_zeros(0, dtype=torch.float32)
            is_bool = ("agrees_R", "hits_R")
            return LossRows(
                *(empty.bool() if n in is_bool else empty.clone() for n in LossRows.__slots__)
            )
        return LossRows(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return the gradients in the dtypes of hidden states, weight and bias."""
        sums = (self.grad_hidden_RD, self.grad_weight_VD, self.grad_bias_V)
        return tuple(
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip(sums, self._dtypes, strict=True)
        )

    def _add_gradients(self, rows: slice, grad_RV: Tensor) -> None:
        if self.grad_hidden_RD is not None:
            self.grad_hidden_RD[rows] = grad_RV @ self.weight_VD
        if self.grad_weight_VD is not None:
            # Slices of the vocabulary: the product of one, not yet float32, is small.
            size = max(1, _SLICE_ENTRIES // self.hidden_RD.shape[1])
            for first in range(0, grad_RV.shape[1], size):
                ids = slice(first, first + size)
                self.grad_weight_VD[ids] += grad_RV[:, ids].T @ self.hidden_RD[rows]


def _piece_loss(
    logits_RV: Tensor, labels_R: Tensor, sparse: SparseTargets, targets: HeadTargets
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Values in the order of `LossRows`, and the gradient of their weighted sum in the logits."""
    weights = targets.weights
    logits_RV[:, targets.vocab_size :] = -torch.inf
    kl_weight_R, ce_weight_R = weights.of_rows(sparse, targets.vocab_size)
    rows_N, temperature = sparse.row_of_entry(), sparse.temperature
    top_R, likeliest_R = logits_RV.max(-1)
    agrees_R = likeliest_R == _first_ids(sparse)
    label_R, entries_N = (
        logits_RV.gather(1, labels_R[:, None])[:, 0],
        logits_RV[rows_N, sparse.ids_N],
    )
    probs_RV, confidence_R = _softmax(logits_RV, likeliest_R)
    logz_R = top_R - confidence_R.log()
    ce_R = logz_R - label_R
    if temperature == 1:
        logq_N = entries_N - logz_R[rows_N]
        grad_RV = probs_RV
        costs = _add_divergence(
            grad_RV, logq_N, rows_N, sparse, weights, (kl_weight_R, ce_weight_R)
        )
    else:
        grad_RV, warmest_R = _softmax(logits_RV.div_(temperature), likeliest_R)
        logq_N = entries_N / temperature - (top_R / temperature - warmest_R.log())[rows_N]
        none_R = torch.zeros_like(ce_weight_R)
        costs = _add_divergence(grad_RV, logq_N, rows_N, sparse, weights, (kl_weight_R, none_R))
        grad_RV.mul_(1 / temperature).addcmul_(probs_RV, ce_weight_R[:, None])
    grad_RV.scatter_add_(1, labels_R[:, None], -ce_weight_R[:, None])
    divergence_R, kl_R = costs
    loss_R = kl_weight_R * divergence_R + ce_weight_R * ce_R
    q_N = logq_N.detach().exp() * sparse.is_head()
    overlap_R, inside_R = torch.zeros_like(ce_R), torch.zeros_like(ce_R)
    overlap_R.index_add_(0, rows_N, torch.minimum(q_N, sparse.weights_N))
    outside_R = 1 - inside_R.index_add_(0, rows_N, q_N)
    values = (loss_R, kl_R, ce_R, agrees_R, likeliest_R == labels_R, confidence_R)
    return (*values, overlap_R, outside_R), grad_RV


def _softmax(logits_RV: Tensor, likeliest_R: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax, and its largest value: log-sum-exp follows from it without a pass of its own."""
    probs_RV = logits_RV.softmax(-1)
    return probs_RV, probs_RV.gather(1, likeliest_R[:, None])[:, 0]


def _add_divergence(
    probs_RV: Tensor,
    logq_N: Tensor,
    rows_N: Tensor,
    sparse: SparseTargets,
    weights: LossWeights,
    row_weights: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Turn probabilities into the gradient of kl * D + ce * logz; return D and forward KL, [R]."""
    kl_weight_R, ce_weight_R = row_weights
    ids_N, probs_N = sparse.ids_N, logq_N.exp()
    logq_tail_R = q_tail_R = None
    if sparse.has_bucket:
        probs_RV[rows_N, ids_N] = 0
        # A student may leave nothing outside the kept ids; the floor keeps loss and gradients
        # finite then (both are understated where the true tail is below exp(-69)).
        q_tail_R = probs_RV.sum(-1).clamp(min=1e-30)
        probs_RV[rows_N, ids_N] = probs_N
        logq_tail_R = q_tail_R.log().requires_grad_()
    with torch.enable_grad():
        logq_N.requires_grad_()
        divergence_R = divergence(sparse, rows_N, logq_N, logq_tail_R, weights)
        inputs = [logq_N] if logq_tail_R is None else [logq_N, logq_tail_R]
        grads = torch.autograd.grad((kl_weight_R * divergence_R).sum(), inputs)
    sum_R = torch.zeros_like(ce_weight_R).index_add_(0, rows_N, grads[0])
    if q_tail_R is None:
        probs_RV.mul_((ce_weight_R - sum_R)[:, None])
        probs_RV.index_put_((rows_N, ids_N), grads[0], accumulate=True)
    else:
        scale_R = ce_weight_R - sum_R - grads[1]
        probs_RV.mul_((scale_R + grads[1] / q_tail_R)[:, None])
        # Set rather than corrected: where q_tail is tiny, the difference would lose all digits.
        probs_RV[rows_N, ids_N] = grads[0] + probs_N * scale_R[rows_N]
    with torch.no_grad():
        is_forward = weights.divergence == "forward_kl"
        kl_R = divergence_R if is_forward else forward_kl(sparse, rows_N, logq_N, logq_tail_R)
    return divergence_R.detach(), kl_R.detach()


def _first_ids(sparse: SparseTargets) -> Tensor:
    """The teacher's likeliest token of each row; -1 where a row has no entries."""
    starts_R = sparse.counts_R.cumsum(0) - sparse.counts_R
    first_R = torch.full_like(sparse.counts_R, -1)
    has_R = sparse.counts_R > 0
    first_R[has_R] = sparse.ids_N[starts_R[has_R]]
    return first_R
