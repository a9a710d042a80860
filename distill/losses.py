"""Divergences of a student from sparse targets, as functions of selected log-probabilities.

Shape suffixes: R rows (positions that count), V vocabulary, N target entries of all rows in turn.
Everything is in nats and float32. Functions return a value a row, or *sums* over rows; who trains
divides once, by the global number of rows, so gradient accumulation cannot skew the mean.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config.base import Divergence
from distill.errors import MismatchError
from distill.targets import SparseTargets

_FLOOR = 1e-10
"""Least teacher probability in a divergence that divides by it; codes of a cache end at 1e-7."""

_TINY = 1e-37


@dataclass(frozen=True, slots=True)
class LossWeights:
    """The mix: L = kl * D(teacher, student) + ce * CE, for each row."""

    kl: float
    ce: float
    divergence: Divergence = "forward_kl"
    """What D is; all but `forward_kl` need exact targets (`top_k`)."""
    mix: float = 0.5
    """beta of Jensen-Shannon, alpha of the skewed divergences; see `divergence`."""
    by_entropy: bool = False
    """Where the teacher is sure, labels teach: with h = H(t) / log V, a row's weight of D is
    kl * h, and its weight of CE is ce + kl * (1 - h)."""

    def of_rows(self, targets: SparseTargets, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Return the weights of D and of CE for each row, [R] each."""
        share_R = torch.ones_like(targets.entropy_R)
        if self.by_entropy:
            share_R = (targets.entropy_R / math.log(vocab_size)).clamp(max=1)
        return self.kl * share_R, self.ce + self.kl * (1 - share_R)


@dataclass(frozen=True, slots=True)
class LossRows:
    """What a student's rows cost, float32 [R] each, detached."""

    loss_R: Tensor
    """The weighted mix that is trained."""
    kl_R: Tensor
    """Honest forward KL to the teacher: of `threshold`, unbiased; of `top_k`, of k + 1 outcomes."""
    ce_R: Tensor
    """Cross-entropy with the true next token at temperature 1."""
    agrees_R: Tensor
    """Whether the student's likeliest token is the teacher's, bool."""
    hits_R: Tensor
    """Whether it is the true next token, bool."""
    confidence_R: Tensor
    """Its probability at temperature 1."""
    overlap_R: Tensor
    """sum of min(t_i, q_i) over the ids whose probability t_i is stored, the head of a row."""
    outside_R: Tensor
    """What the student gives to all other ids, at the targets' temperature."""

    def sums(self) -> Tensor:
        """Sums over rows of the first four, float32 [4]."""
        parts = (self.loss_R, self.kl_R, self.ce_R, self.agrees_R)
        return torch.stack([part.float().sum() for part in parts])


def require_linear_or_exact(divergence: Divergence, *, is_exact: bool, where: str) -> None:
    """Refuse a divergence for which drawn targets give no unbiased estimate.

    Raises:
        MismatchError: says why, and what would do.
    """
    if divergence != "forward_kl" and not is_exact:
        raise MismatchError(
            f"train.divergence is {divergence}, but the targets of {where} are drawn.\n"
            "  Only forward_kl is linear in the teacher's probabilities. Of others no estimator is "
            "unbiased:\n  its mean over draws is not its value at the truth.\n"
            "  Use train.divergence=forward_kl, or capture exact targets: targets.kind=top_k."
        )


def forward_kl(
    targets: SparseTargets, rows_N: Tensor, logq_N: Tensor, logq_tail_R: Tensor | None
) -> Tensor:
    """Return KL(teacher || student) of each row, [R].

    Without a bucket: sum_i w_i (-log q_i) - H(t). With weights whose mean is the teacher's
    distribution this is unbiased, in value and gradient; a single row may be negative. (The plug-in
    entropy of a drawn sample would be biased, so the stored entropy of the teacher is used.)
    With a bucket: the KL over k + 1 outcomes, never negative, never above the dense KL.

    Method source: Anshumann et al. 2025, arXiv:2503.16870, equation 5 and appendix A.

    Args:
        targets: Teacher's side.
        rows_N: Row of each entry.
        logq_N: Student's log-probabilities of the entries, at the targets' temperature.
        logq_tail_R: Student's log-probability of all ids outside the entries; needed with a bucket.
    """
    weights_N = targets.weights_N
    cross_R = logq_N.new_zeros(targets.num_rows).index_add(0, rows_N, -weights_N * logq_N)
    if not targets.has_bucket:
        return cross_R - targets.entropy_R
    assert logq_tail_R is not None
    tail_R = targets.tail_mass_R
    negative_entropy_R = torch.xlogy(tail_R, tail_R).index_add(
        0, rows_N, torch.xlogy(weights_N, weights_N)
    )
    return cross_R - tail_R * logq_tail_R + negative_entropy_R


def divergence(
    targets: SparseTargets,
    rows_N: Tensor,
    logq_N: Tensor,
    logq_tail_R: Tensor | None,
    weights: LossWeights,
) -> Tensor:
    """Return D(teacher, student) of each row over k + 1 outcomes, [R]; zero where they agree.

    With t and q the probabilities of teacher and student, and w = `weights.mix` in (0, 1):

        forward_kl         KL(t || q), also from drawn targets (see `forward_kl`)
        reverse_kl         KL(q || t)
        jensen_shannon     w KL(t || m) + (1 - w) KL(q || m),  m = w t + (1 - w) q
        skewed_forward_kl  KL(t || w t + (1 - w) q)
        skewed_reverse_kl  KL(q || w q + (1 - w) t)
        total_variation    sum |t - q| / 2

    The tail is one outcome, so each is a true divergence of what is known, and at most that of the
    whole distributions. Where t is 0, reverse_kl takes it for 1e-10.

    Method source: Agarwal et al. 2024, arXiv:2306.13649 (Jensen-Shannon); Ko et al. 2024,
    arXiv:2402.03898 (skewed); Wen et al. 2023, arXiv:2307.15190 (total variation).

    Args:
        targets: Teacher's side.
        rows_N: Row of each entry.
        logq_N: Student's log-probabilities of the entries, at the targets' temperature.
        logq_tail_R: Of all ids outside the entries; needed with a bucket.
        weights: Which divergence, and its mix.

    Raises:
        MismatchError: the divergence is not linear, and the targets are drawn.
    """
    if weights.divergence == "forward_kl":
        return forward_kl(targets, rows_N, logq_N, logq_tail_R)
    require_linear_or_exact(weights.divergence, is_exact=targets.has_bucket, where="this batch")
    assert logq_tail_R is not None
    tail_R = _term(weights, targets.tail_mass_R, logq_tail_R)
    return tail_R.index_add(0, rows_N, _term(weights, targets.weights_N, logq_N))


def _term(weights: LossWeights, t: Tensor, logq: Tensor) -> Tensor:
    """What one outcome adds to a divergence."""
    q, w = logq.exp(), weights.mix
    match weights.divergence:
        case "reverse_kl":
            return q * (logq - t.clamp(min=_FLOOR).log())
        case "jensen_shannon":
            log_m = (w * t + (1 - w) * q).clamp(min=_TINY).log()
            return w * (torch.xlogy(t, t) - t * log_m) + (1 - w) * q * (logq - log_m)
        case "skewed_forward_kl":
            return torch.xlogy(t, t) - t * (w * t + (1 - w) * q).clamp(min=_TINY).log()
        case "skewed_reverse_kl":
            return q * (logq - (w * q + (1 - w) * t).clamp(min=_TINY).log())
        case _:
            return (t - q).abs() / 2


def distillation_loss(
    logits_RV: Tensor, labels_R: Tensor, targets: SparseTargets, weights: LossWeights
) -> Tensor:
    """Sum over rows of kl * D(teacher, student) + ce * CE, from logits and by plain autograd.

    For your own loop and for tests: it keeps float32 copies of `logits_RV`. `DistillationHead`
    computes the same without logits of more than a chunk.

    Args:
        logits_RV: Student logits of any float dtype; row r scores the token labels_R[r].
        labels_R: True next tokens, int64.
        targets: The teacher's rows for the same positions.
        weights: The mix.

    Returns:
        Scalar, nats, float32, not divided by anything and not scaled by temperature ** 2.

    Raises:
        ValueError: the number of rows differs, or a target id is outside the logits.
    """
    if len(logits_RV) != targets.num_rows or len(labels_R) != targets.num_rows:
        raise ValueError(
            f"distillation_loss: {len(logits_RV)} rows of logits, {len(labels_R)} labels and "
            f"{targets.num_rows} rows of targets must be equally many: drop the rows that do not "
            "count from all three (row t of a block scores token t + 1)."
        )
    if len(targets.ids_N) and int(targets.ids_N.max()) >= logits_RV.shape[1]:
        raise ValueError(
            f"distillation_loss: target id {int(targets.ids_N.max())} is outside the student's "
            f"{logits_RV.shape[1]} logits: teacher and student need one tokenizer."
        )
    logits_RV = logits_RV.float()
    logp_RV = logits_RV.log_softmax(-1)
    ce_R = -logp_RV.gather(1, labels_R[:, None])[:, 0]
    rows_N = targets.row_of_entry()
    logq_RV = logp_RV
    if targets.temperature != 1:
        logq_RV = (logits_RV / targets.temperature).log_softmax(-1)
    logq_tail_R = None
    if targets.has_bucket:
        # Sum the tail itself: log1p(-sum of the kept) is -inf once they hold nearly all mass.
        kept_RV = torch.zeros_like(logq_RV, dtype=torch.bool)
        kept_RV[rows_N, targets.ids_N] = True
        logq_tail_R = logq_RV.masked_fill(kept_RV, -torch.inf).logsumexp(-1)
    logq_N = logq_RV[rows_N, targets.ids_N]
    kl_R = divergence(targets, rows_N, logq_N, logq_tail_R, weights)
    kl_weight_R, ce_weight_R = weights.of_rows(targets, logits_RV.shape[1])
    return (kl_weight_R * kl_R + ce_weight_R * ce_R).sum()
