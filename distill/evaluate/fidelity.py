"""How close a student is to its teacher, on held-out blocks of a cache.

Shape suffix: R rows that count.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from distill.cache.reader import Batch, Cache
from distill.head import HeadTargets
from distill.losses import LossRows, LossWeights


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over rows with its standard error, clustered by block."""

    value: float
    stderr: float


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Means over all rows that count."""

    num_rows: int
    ce_nats: Estimate
    """Cross-entropy with the true next tokens; exp of it is the perplexity."""
    kl_nats: Estimate
    """KL(teacher || model), honest: with the teacher's true entropy."""
    agreement: Estimate
    """Share of rows where the model's likeliest token is the teacher's."""

    def as_dict(self) -> dict[str, Any]:
        """Return nested dicts of JSON values."""
        return asdict(self)


@torch.no_grad()
def measure(
    model: torch.nn.Module,
    cache: Cache,
    *,
    device: torch.device,
    on_block: Callable[[int], None] | None = None,
) -> Fidelity:
    """Score every block of `cache` with `model`.

    Args:
        model: A `DistillationModel`, possibly wrapped for several processes.
        cache: Held-out blocks of a cache whose tokenizer is the model's.
        device: Where the model is.
        on_block: Called with the number of tokens after each block.
    """
    was_training = model.training
    model.eval()
    blocks = []
    for block_id in range(len(cache)):
        batch = cache.batch([block_id]).to(device)
        blocks.append(score(model, batch, cache.manifest.vocab_size, LossWeights(1, 0))[1])
        if on_block is not None:
            on_block(cache.manifest.block_length)
    model.train(was_training)
    return Fidelity(
        num_rows=sum(len(rows.kl_R) for rows in blocks),
        ce_nats=clustered_mean([rows.ce_R for rows in blocks]),
        kl_nats=clustered_mean([rows.kl_R for rows in blocks]),
        agreement=clustered_mean([rows.agrees_R.double() for rows in blocks]),
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


def clustered_mean(clusters: list[Tensor]) -> Estimate:
    """Mean over all rows, and its standard error where rows of a cluster hang together.

    The ratio estimator: with e_b = sum of cluster b - mean * its rows, the variance of the mean is
    B / (B - 1) * sum_b e_b^2 / rows^2 (Cochran 1977, section 6.3, for an unlimited
    population).

    Args:
        clusters: Values of each cluster, one tensor [R] each.
    """
    sums = torch.stack([values.double().sum() for values in clusters]).cpu()
    counts = torch.tensor([len(values) for values in clusters], dtype=torch.float64)
    total = counts.sum()
    mean = sums.sum() / total
    num = len(clusters)
    if num < 2:
        return Estimate(float(mean), float("nan"))
    variance = num / (num - 1) * ((sums - mean * counts) ** 2).sum() / total**2
    return Estimate(float(mean), float(variance.sqrt()))
