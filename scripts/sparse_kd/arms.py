"""Which targets the students learn from: what is captured, and what a loss makes of it.

Shape suffixes: R rows (positions that count), K kept entries, N entries of all rows in turn.
"""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from distill.config import SampledConfig, TargetsConfig, ThresholdConfig, TopKConfig
from distill.targets import SparseTargets

Tail = Literal["none", "renormalised", "bucket", "label", "uniform"]
"""What becomes of the mass outside the k likeliest ids: nothing; the kept ids share it in
proportion; it is one more outcome; the true next token gets it; all other ids share it evenly."""

CAPTURES: dict[str, TargetsConfig] = {
    "top_k_5": TopKConfig(kind="top_k", k=5),
    "top_k_12": TopKConfig(kind="top_k", k=12),
    "top_k_50": TopKConfig(kind="top_k", k=50),
    "sampled_5": SampledConfig(kind="sampled", draws=7),
    "sampled_12": SampledConfig(kind="sampled", draws=22),
    "sampled_25": SampledConfig(kind="sampled", draws=57),
    "threshold_5": ThresholdConfig(tau=1 / 4),
    "threshold_12": ThresholdConfig(tau=1 / 16),
    "threshold_25": ThresholdConfig(tau=1 / 45),
}
"""Draws give 5, 12 and 25 different ids a row on average; each tau takes as many bytes a row as the
sample of the same number. Both were chosen on the first blocks of the corpus."""


@dataclass(frozen=True)
class Arm:
    """One way to teach."""

    name: str
    capture: str | None = None
    """Which of `CAPTURES`; None: the labels (`ce`) or the whole distribution (`dense`)."""
    tail: Tail | None = None
    """Of top-k targets."""
    rate: float = 1.0
    """Learning rate over that of the config."""

    @property
    def is_dense(self) -> bool:
        """Whether the loss needs a target for every id of the vocabulary."""
        return self.name.startswith("dense") or self.tail == "uniform"


_AT_FULL_RATE = {
    arm.name: arm
    for arm in [
        Arm("ce"),
        Arm("dense"),
        *(
            Arm(f"top_k_{k}_{tail}", f"top_k_{k}", tail)
            for k in (5, 12, 50)
            for tail in get_args(Tail)
        ),
        *(Arm(name, name) for name in CAPTURES if not name.startswith("top_k")),
    ]
}


def _slower(rate: float, suffix: str, *names: str) -> dict[str, Arm]:
    """Some arms at a lower learning rate: is it the rate that decides?"""
    arms = (replace(_AT_FULL_RATE[name], name=f"{name}_{suffix}", rate=rate) for name in names)
    return {arm.name: arm for arm in arms}


ARMS = _AT_FULL_RATE | _slower(0.3, "third_rate", "ce", "dense") | _slower(0.1, "tenth_rate", "ce")


def sparse_targets(arm: Arm, captured: SparseTargets, labels_R: Tensor) -> SparseTargets:
    """Return what the loss of an arm with a cache learns from.

    Args:
        arm: Any that is not dense.
        captured: The rows of its cache.
        labels_R: True next tokens.
    """
    if arm.tail is None or arm.tail == "bucket":
        return captured
    without = replace(captured, has_bucket=False)
    rows_N = captured.row_of_entry()
    if arm.tail == "renormalised":
        kept_R = (1 - captured.tail_mass_R)[rows_N]
        return replace(without, weights_N=captured.weights_N / kept_R)
    if arm.tail == "label":
        return _with_labels(without, labels_R)
    assert arm.tail == "none"
    return without


def one_hot(labels_R: Tensor) -> SparseTargets:
    """The labels as a distribution: the KL to it is the cross-entropy."""
    ones_R, zeros_R = torch.ones_like(labels_R), torch.zeros(len(labels_R))
    return SparseTargets(labels_R, ones_R.float(), ones_R, ones_R, zeros_R, zeros_R)


def _with_labels(captured: SparseTargets, labels_R: Tensor) -> SparseTargets:
    """Append the label to every row, with the mass that the row lacks; an id may come twice."""
    ids_RK = captured.ids_N.view(len(labels_R), -1)
    weights_RK = captured.weights_N.view_as(ids_RK)
    return replace(
        captured,
        ids_N=torch.cat([ids_RK, labels_R[:, None]], dim=1).flatten(),
        weights_N=torch.cat([weights_RK, captured.tail_mass_R[:, None]], dim=1).flatten(),
        counts_R=captured.counts_R + 1,
        tail_mass_R=torch.zeros_like(captured.tail_mass_R),
    )


def uniform_tail(captured: SparseTargets, vocab_size: int) -> Tensor:
    """Top-k targets over the whole vocabulary, the rest shared out evenly, float32 [R, V]."""
    ids_RK = captured.ids_N.view(captured.num_rows, -1)
    each_R1 = captured.tail_mass_R[:, None] / (vocab_size - ids_RK.shape[1])
    whole_RV = each_R1.repeat(1, vocab_size)
    return whole_RV.scatter_(1, ids_RK, captured.weights_N.view_as(ids_RK))
