"""How close a student is to its teacher, on held-out blocks of a cache.

Shape suffixes: R rows that count, S segments of a block, C clusters of rows, N bins, M measures.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from distill.cache.reader import Batch, Cache
from distill.evaluate.calibration import Reliability, bin_sums
from distill.head import HeadTargets
from distill.losses import LossRows, LossWeights


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over rows with its standard error, clustered by document."""

    value: float
    stderr: float


@dataclass(frozen=True, slots=True)
class Documents:
    """Sums over the rows of each document that has any, in order: two models can be paired."""

    num_rows: tuple[int, ...]
    ce_nats: tuple[float, ...]
    kl_nats: tuple[float, ...]
    agreement: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Means over all rows that count."""

    num_rows: int
    num_documents: int
    ce_nats: Estimate
    """Cross-entropy with the true next tokens; exp of it is the perplexity."""
    kl_nats: Estimate
    """KL(teacher || model), honest: with the teacher's true entropy."""
    agreement: Estimate
    """Share of rows where the model's likeliest token is the teacher's."""
    acceptance: tuple[Estimate, Estimate] | None
    """Share of the model's draws that the teacher would accept in speculative decoding, the sum of
    min(t, q) (Leviathan et al. 2023, arXiv:2211.17192): between the two. A cache holds the
    teacher's tail as a whole, so less cannot be said; None of `sampled`, which holds no
    probabilities. `distill.evaluate.dense` measures it exactly."""
    reliability: Reliability
    """Of the model's likeliest tokens."""
    teacher_reliability: Reliability | None
    """Of the teacher's; None where the cache lacks its probabilities at temperature 1."""
    documents: Documents

    def as_dict(self) -> dict[str, Any]:
        """Return nested dicts of JSON values."""
        return asdict(self)


@torch.no_grad()
def measure(
    model: torch.nn.Module,
    cache: Cache,
    *,
    device: torch.device,
    accelerator: Accelerator | None = None,
    on_block: Callable[[int], None] | None = None,
) -> Fidelity:
    """Score every block of `cache` with `model`.

    Args:
        model: A `DistillationModel`, possibly wrapped for several processes.
        cache: Held-out blocks of a cache whose tokenizer is the model's.
        device: Where the model is.
        accelerator: In a training of several processes: each scores its share of the blocks, and
            all get the same result.
        on_block: Called with the number of tokens after each block.
    """
    was_training = model.training
    model.eval()
    first, stride = 0, 1
    if accelerator is not None:
        first, stride = accelerator.process_index, accelerator.num_processes
    found: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for number in range(-(-len(cache) // stride)):
        # Who has none left scores the last block once more, for nothing: where weights are
        # sharded, all processes must take part in each forward pass.
        block_id = number * stride + first
        batch = cache.batch([min(block_id, len(cache) - 1)]).to(device)
        rows = score(model, batch, cache.manifest.vocab_size, LossWeights(1, 0))[1]
        if block_id < len(cache):
            found.append((block_id, *_sums_of_block(batch, rows)))
        if on_block is not None:
            on_block(cache.manifest.block_length)
    model.train(was_training)
    if accelerator is not None:
        found = gather_object(found)
    _, sums, bins, teacher_bins = zip(*sorted(found, key=lambda block: block[0]), strict=True)
    sums_CM, counts_C = by_document(list(sums))
    means = [clustered_mean(sums_C, counts_C) for sums_C in sums_CM.unbind(1)]
    ce, kl, agreement, least, most = means
    has_probabilities = cache.manifest.targets["kind"] != "sampled"
    is_warm = cache.manifest.temperature != 1
    return Fidelity(
        num_rows=int(counts_C.sum()),
        num_documents=int((counts_C > 0).sum()),
        ce_nats=ce,
        kl_nats=kl,
        agreement=agreement,
        acceptance=(least, most) if has_probabilities else None,
        reliability=Reliability.of(torch.stack(bins).sum(0)),
        teacher_reliability=Reliability.of(torch.stack(teacher_bins).sum(0))
        if has_probabilities and not is_warm
        else None,
        documents=_documents(sums_CM, counts_C),
    )


def score(
    model: torch.nn.Module,
    batch: Batch,
    vocab_size: int,
    weights: LossWeights,
    chunk_rows: int | None = None,
) -> tuple[Tensor, LossRows]:
    """Run a `DistillationModel` on one batch: summed loss and each row's parts."""
    targets = HeadTargets(batch.labels_R, batch.targets, weights, vocab_size, chunk_rows)
    result: tuple[Tensor, LossRows] = model(
        batch.input_ids_BT, batch.position_ids_BT, batch.row_mask_BT, targets
    )
    return result


def _documents(sums_CM: Tensor, counts_C: Tensor) -> Documents:
    has_rows_C = counts_C > 0
    ce, kl, agreement = (tuple(sums_C.tolist()) for sums_C in sums_CM[has_rows_C, :3].unbind(1))
    return Documents(tuple(int(count) for count in counts_C[has_rows_C]), ce, kl, agreement)


def _sums_of_block(batch: Batch, rows: LossRows) -> tuple[Tensor, Tensor, Tensor]:
    """Of one block: sums by segment, and bins of the model and of the teacher."""
    targets = batch.targets
    most_R = rows.overlap_R + torch.minimum(rows.outside_R.clamp(min=0), targets.tail_mass_R)
    values = (rows.ce_R, rows.kl_R, rows.agrees_R, rows.overlap_R, most_R)
    firsts_R = targets.counts_R.cumsum(0) - targets.counts_R
    teacher_hits_R = targets.ids_N[firsts_R] == batch.labels_R
    return (
        sums_by_segment(batch, torch.stack([value.double() for value in values], dim=1)),
        bin_sums(rows.confidence_R, rows.hits_R),
        bin_sums(targets.weights_N[firsts_R], teacher_hits_R),
    )


def sums_by_segment(batch: Batch, values_RM: Tensor) -> Tensor:
    """Sum measures of the rows of one block over its segments: float64 [S, 1 + M], rows first."""
    segments_T = (batch.position_ids_BT[0] == 0).cumsum(0) - 1
    segments_R = segments_T[batch.row_mask_BT[0]]
    sums_SM = values_RM.new_zeros(int(segments_T[-1]) + 1, 1 + values_RM.shape[1])
    sums_SM[:, 0].index_add_(0, segments_R, torch.ones_like(values_RM[:, 0]))
    sums_SM[:, 1:].index_add_(0, segments_R, values_RM)
    return sums_SM.cpu()


def by_document(blocks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Join the segments of documents that go on in the next block.

    The last segment of a block and the first of the next are taken for one document: they are,
    unless a document ends with its block to the token, which only makes clusters larger.

    Args:
        blocks: Of each block in turn, sums by segment with the rows first, [S, 1 + M].

    Returns:
        Sums [C, M] and numbers of rows [C] of each document.
    """
    documents, last = [], -1
    for sums_SM in blocks:
        start = max(last, 0)
        documents.append(torch.arange(start, start + len(sums_SM)))
        last = start + len(sums_SM) - 1
    joined_CM = torch.zeros(last + 1, blocks[0].shape[1], dtype=torch.float64)
    joined_CM.index_add_(0, torch.cat(documents), torch.cat(blocks))
    return joined_CM[:, 1:], joined_CM[:, 0]


def clustered_mean(sums_C: Tensor, counts_C: Tensor) -> Estimate:
    """Mean over all rows, and its standard error where rows of a cluster hang together.

    The ratio estimator: with e_c = sum of cluster c - mean * its rows, the variance of the mean is
    C / (C - 1) * sum_c e_c^2 / rows^2 (Cochran 1977, section 6.3, for an unlimited
    population).

    Args:
        sums_C: Sum of the values of each cluster, float64.
        counts_C: Its number of rows; clusters without any are left out.
    """
    has_rows_C = counts_C > 0
    sums_C, counts_C = sums_C[has_rows_C].double(), counts_C[has_rows_C].double()
    total, num = counts_C.sum(), len(counts_C)
    mean = sums_C.sum() / total
    if num < 2:
        return Estimate(float(mean), float("nan"))
    variance = num / (num - 1) * ((sums_C - mean * counts_C) ** 2).sum() / total**2
    return Estimate(float(mean), float(variance.sqrt()))
