"""Ways to one training step of a language model's head, for scripts/bench_losses.py.

Each takes hidden states, the head's weight and a teacher, and returns the mean loss a row, from
which gradients follow. Ours are the head with two kinds of targets; of others what their packages
publish, loaded by path when asked for, so that one that is missing can be told. Shape suffixes:
R rows, D hidden size, V vocabulary, K kept ids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from distill.config import TargetsConfig, ThresholdConfig, TopKConfig
from distill.draw import draw
from distill.head import DistillationHead, HeadTargets
from distill.losses import LossWeights
from distill.targets import SparseTargets
from distill.uniforms import row_uniforms

SEED = 0
K = 64
KINDS: dict[str, TargetsConfig] = {
    "threshold": ThresholdConfig(),
    "top_k": TopKConfig(kind="top_k", k=K),
}
SMALL_CHUNK = 128
"""Rows at a time of a second way through our head and Liger's function; by default ours takes as
many as 128 MiB hold, Liger's 1,024."""

Teacher = Literal["threshold", "top_k", "logits", "head"]


@dataclass(frozen=True)
class Case:
    """Sizes of a step, and the dtype of all its tensors."""

    vocab_size: int
    hidden_size: int
    rows: int
    dtype: torch.dtype


class Step:
    """Inputs of a step; what a teacher gives is made when it is first asked for, and held.

    The teacher is a head too, as wide as the student's, and as sure as real ones: logits of
    standard deviation 4.3.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(SEED)

        def normal(rows: int, scale: float) -> Tensor:
            values = torch.randn(rows, case.hidden_size, generator=generator)
            return values.mul_(scale).to(case.dtype)

        self.hidden_RD = normal(case.rows, 2).requires_grad_()
        self.weight_VD = nn.Parameter(normal(case.vocab_size, case.hidden_size**-0.5))
        self.teacher_hidden_RD = normal(case.rows, 4.3)
        self.teacher_weight_VD = normal(case.vocab_size, case.hidden_size**-0.5)
        self.labels_R = torch.randint(0, case.vocab_size, (case.rows,), generator=generator)

    @cached_property
    def head(self) -> DistillationHead:
        """Ours, over the same weight."""
        linear = nn.Linear(self.case.hidden_size, self.case.vocab_size, bias=False, device="meta")
        linear.weight = self.weight_VD
        return DistillationHead.adopt(linear)

    @cached_property
    def teacher_logits_RV(self) -> Tensor:
        """All of them, in the dtype of the case."""
        return self.teacher_hidden_RD @ self.teacher_weight_VD.T

    @cached_property
    def sparse(self) -> dict[str, SparseTargets]:
        """Targets of each kind, drawn from the logits."""
        uniforms_R = row_uniforms(SEED, 0, self.case.rows)
        return {
            kind: draw(self.teacher_logits_RV, uniforms_R, config) for kind, config in KINDS.items()
        }

    def teacher_bytes(self, teacher: Teacher) -> int:
        """Bytes that the step holds of the teacher for all rows, without a weight of its head."""
        if teacher in KINDS:
            targets = self.sparse[teacher]
            parts = [getattr(targets, name) for name in targets.__slots__]
            return sum(part.nbytes for part in parts if isinstance(part, Tensor))
        held = self.teacher_hidden_RD if teacher == "head" else self.teacher_logits_RV
        return held.nbytes


Loss = Callable[[Step], Tensor]


@dataclass(frozen=True)
class Way:
    """One loss: what it reads of the teacher, where it is published, and how it is called."""

    teacher: Teacher
    path: str
    """Module and name, with a colon between."""
    call: Callable[[Any, Step], Tensor]
    """Of what stands at `path`, and the inputs."""
    value: Literal["kl", "kl_plus_entropy"] = "kl"
    """What is returned; the two have the same gradient."""

    def load(self) -> Loss:
        """Import it; raise what the import raises."""
        module, _, names = self.path.partition(":")
        found: Any = import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
        return lambda step: self.call(found, step)


def our_head(kind: Teacher, chunk_rows: int | None = None) -> Way:
    """The head with targets of a kind; cross-entropy, which it also computes, weighs nothing."""

    def call(_: Any, step: Step) -> Tensor:
        weights = LossWeights(kl=1, ce=0)
        wanted = HeadTargets(
            step.labels_R, step.sparse[kind], weights, step.case.vocab_size, chunk_rows
        )
        return step.head.loss(step.hidden_RD, wanted)[0] / step.case.rows

    return Way(kind, "distill.head:DistillationHead", call)


def dense(step: Step) -> Tensor:
    """Student logits of all rows."""
    return step.hidden_RD @ step.weight_VD.T


def by_kl_div(kl_div: Any, step: Step) -> Tensor:
    """What a user writes first: both sides made float32, then torch's function."""
    logq_RV = dense(step).float().log_softmax(-1)
    logt_RV = step.teacher_logits_RV.float().log_softmax(-1)
    mean: Tensor = kl_div(logq_RV, logt_RV, log_target=True, reduction="batchmean")
    return mean


def by_gkd(generalized_jsd_loss: Any, step: Step) -> Tensor:
    """At beta = 0 it is forward KL."""
    mean: Tensor = generalized_jsd_loss(dense(step), step.teacher_logits_RV, beta=0)
    return mean


def by_chunked_divergence(function: Any, step: Step) -> Tensor:
    """TRL's fused head for two models at beta = 0."""
    teacher = (step.teacher_hidden_RD, step.teacher_weight_VD, None)
    divergence_R, _ = function.apply(step.hidden_RD, step.weight_VD, None, *teacher, 0.0)
    mean: Tensor = divergence_R.mean()
    return mean


def by_chunked_top_k(chunked_jsd_loss: Any, step: Step) -> Tensor:
    """TRL's loss for a teacher behind a server: top-k and a tail, 256 rows at a time."""
    targets = step.sparse["top_k"]
    ids_RK, logprobs_RK = targets.ids_N.view(-1, K), targets.weights_N.log().view(-1, K)
    student = (step.hidden_RD, step.weight_VD, None, 1.0, None)
    teacher = (ids_RK, logprobs_RK, torch.ones_like(ids_RK, dtype=torch.bool))
    settings = {"beta": 0.0, "temperature": 1.0, "add_tail_bucket": True, "chunk_size": 256}
    total, *_ = chunked_jsd_loss(
        *student, *teacher, teacher_id_idx=None, num_teachers=1, **settings
    )
    mean: Tensor = total / step.case.rows
    return mean


def by_torchtune(loss_class: Any, step: Step) -> Tensor:
    """All rows at once."""
    mean: Tensor = loss_class()(dense(step), step.teacher_logits_RV, step.labels_R)
    return mean


def by_torchtune_chunks(loss_class: Any, step: Step) -> Tensor:
    """The head on each of its eight chunks, as its recipe does."""
    loss = loss_class()
    chunks = step.hidden_RD[None].chunk(loss.num_output_chunks, dim=1)
    student = [chunk @ step.weight_VD.T for chunk in chunks]
    teacher = list(step.teacher_logits_RV[None].chunk(loss.num_output_chunks, dim=1))
    mean: Tensor = loss(student, teacher, step.labels_R[None])
    return mean


def by_liger(loss_class: Any, step: Step, **settings: Any) -> Tensor:
    """At beta = 0 it is forward KL; the hard loss is left out."""
    loss = loss_class(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, **settings)
    teacher = (step.teacher_hidden_RD, step.teacher_weight_VD)
    mean: Tensor = loss(step.hidden_RD, step.weight_VD, *teacher, step.labels_R)
    return mean


def by_liger_small_chunks(loss_class: Any, step: Step) -> Tensor:
    """Fewer rows at a time than its default, which holds all rows of the benchmark."""
    return by_liger(loss_class, step, chunk_size=SMALL_CHUNK)


_TRL = "trl.experimental"
_TUNE = "torchtune.modules.loss"
_LIGER = "liger_kernel.chunked_loss:LigerFusedLinearJSDLoss"

WAYS: dict[str, Way] = {
    "distill_threshold": our_head("threshold"),
    "distill_small_chunks": our_head("threshold", SMALL_CHUNK),
    "distill_top_64": our_head("top_k"),
    "naive_kl_div": Way("logits", "torch.nn.functional:kl_div", by_kl_div),
    "trl_gkd": Way("logits", f"{_TRL}.gkd:GKDTrainer.generalized_jsd_loss", by_gkd),
    "trl_chunked": Way(
        "head", "trl.kernels.chunked_divergence:ChunkedDivergenceFunction", by_chunked_divergence
    ),
    "trl_top_64": Way(
        "top_k",
        f"{_TRL}.async_distillation.async_distillation_trainer:_chunked_jsd_loss",
        by_chunked_top_k,
    ),
    "torchtune": Way("logits", f"{_TUNE}:ForwardKLLoss", by_torchtune, "kl_plus_entropy"),
    "torchtune_chunked": Way(
        "logits",
        f"{_TUNE}:ForwardKLWithChunkedOutputLoss",
        by_torchtune_chunks,
        "kl_plus_entropy",
    ),
    "liger": Way("head", _LIGER, by_liger),
    "liger_small_chunks": Way("head", _LIGER, by_liger_small_chunks),
}


def reference(step: Step, targets: SparseTargets | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Means over rows in float64: forward KL, the teacher's entropy, the KL's gradient [R, D].

    Targets, if there are any, take the place of the whole distribution: drawn ones as they are (the
    entropy stays the teacher's), top-k ones with all other ids as one outcome more.
    """
    weight_VD = step.weight_VD.detach().double()
    grad_RD = torch.empty(step.hidden_RD.shape, dtype=torch.float64)
    kl, entropy = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    starts_R = None if targets is None else functional.pad(targets.counts_R.cumsum(0), (1, 0))
    for first in range(0, step.case.rows, 64):
        rows = slice(first, min(first + 64, step.case.rows))
        hidden_RD = step.hidden_RD.detach()[rows].double().requires_grad_()
        logq_RV = (hidden_RD @ weight_VD.T).log_softmax(-1)
        logt_RV = step.teacher_logits_RV[rows].double().log_softmax(-1)
        entropy_R = -(logt_RV.exp() * logt_RV).sum(-1)
        if targets is None or starts_R is None:
            kl_R = -(logt_RV.exp() * logq_RV).sum(-1) - entropy_R
        else:
            kl_R = _sparse_kl(logq_RV, targets.slice_rows(rows.start, rows.stop, starts_R))
        (grad_RD[rows],) = torch.autograd.grad(kl_R.sum() / step.case.rows, hidden_RD)
        kl += kl_R.detach().sum()
        entropy += entropy_R.sum()
    return kl / step.case.rows, entropy / step.case.rows, grad_RD


def _sparse_kl(logq_RV: Tensor, targets: SparseTargets) -> Tensor:
    rows_N, t_N = targets.row_of_entry(), targets.weights_N.double()
    logq_N = logq_RV[rows_N, targets.ids_N]
    cross_R = torch.zeros_like(logq_RV[:, 0]).index_add(0, rows_N, -t_N * logq_N)
    if not targets.has_bucket:
        return cross_R - targets.entropy_R
    kept_RV = torch.zeros_like(logq_RV, dtype=torch.bool)
    kept_RV[rows_N, targets.ids_N] = True
    logq_tail_R = logq_RV.masked_fill(kept_RV, -torch.inf).logsumexp(-1)
    tail_R = targets.tail_mass_R.double()
    negative_R = torch.xlogy(tail_R, tail_R).index_add(0, rows_N, torch.xlogy(t_N, t_N))
    return cross_R - tail_R * logq_tail_R + negative_R
