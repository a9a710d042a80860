"""Train one student on one kind of targets, and score it against the whole teacher.

Shape suffixes: R rows that count, V vocabulary.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from distill.cache.reader import Batch
from distill.config import ExperimentConfig, ScratchStudentConfig
from distill.distillation_model import DistillationModel, trainable
from distill.evaluate.calibration import Reliability, bin_sums
from distill.evaluate.dense import compare, hidden_states
from distill.evaluate.fidelity import score
from distill.files import write_bytes_atomically
from distill.losses import LossWeights
from distill.schedules import learning_rate_schedule
from distill.train import parameter_groups
from scripts.sparse_kd.arms import Arm, one_hot, sparse_targets, uniform_tail
from scripts.sparse_kd.dense import dense_loss, pieces
from scripts.sparse_kd.store import Store
from students.scratch import build_scratch

NUM_SEEDS = 3

_FIRST_RATE = 3e-3
"""Learning rate of the pre-training; that of the config is for the arms."""


def new_student(store: Store, seed: int) -> DistillationModel:
    """Return the student of the config with the weights of `seed`."""
    config = replace(store.config, seed=seed)
    assert isinstance(config.student, ScratchStudentConfig)
    student, _ = build_scratch(config.student, config, store.tokenizer)
    return trainable(student, config.train)


def pretrained_student(store: Store, seed: int) -> DistillationModel:
    """Return a student that has read its share of what the teacher did not: plain next tokens.

    The first call trains and keeps it; each seed reads other blocks.
    """
    path = store.config.run_folder / "pretrained" / f"{seed}.safetensors"
    model = new_student(store, seed)
    if not path.exists():
        share = store.num_rest_blocks // NUM_SEEDS
        blocks = range(seed * share, (seed + 1) * share)

        def loss_of_batch(block_ids: Sequence[int]) -> tuple[Tensor, int]:
            return label_loss(store, model, store.rest(block_ids))

        optimise(
            store.config, model, loss_of_batch, shuffled(store.config, blocks, seed), _FIRST_RATE
        )
        write_bytes_atomically(path, safetensors.torch.save(weights_of(model)))
    model.load_state_dict(safetensors.torch.load_file(path), strict=False)
    return model


def weights_of(model: DistillationModel) -> dict[str, Tensor]:
    """Return all weights, tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def train_student(
    store: Store, arm: Arm, model: DistillationModel, batches: Sequence[Sequence[int]], seed: int
) -> float:
    """Train `model` on the blocks of each batch in turn; return the seconds it took.

    Draws are those of the seed.
    """
    started = time.monotonic()
    rate = arm.rate * store.config.train.learning_rate
    optimise(store.config, model, lambda ids: loss_of(store, arm, model, ids, seed), batches, rate)
    return time.monotonic() - started


def optimise(
    config: ExperimentConfig,
    model: DistillationModel,
    loss_of_batch: Callable[[Sequence[int]], tuple[Tensor, int]],
    batches: Sequence[Sequence[int]],
    learning_rate: float,
) -> None:
    """One step a batch, as in distill/train.py; `loss_of_batch` gives summed loss and rows."""
    settings = replace(config.train, learning_rate=learning_rate)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=True,
    )
    schedule = learning_rate_schedule(settings, optimizer, len(batches))
    model.train()
    for block_ids in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16"):
            loss, num_rows = loss_of_batch(block_ids)
        torch.autograd.backward(loss / num_rows)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def label_loss(store: Store, model: DistillationModel, batch: Batch) -> tuple[Tensor, int]:
    """Return the summed cross-entropy with the true next tokens, nats, and the rows."""
    batch = replace(batch, targets=one_hot(batch.labels_R))
    loss, _ = score(model, batch, store.vocab_size, LossWeights(kl=1, ce=0))
    return loss, len(batch.labels_R)


def loss_of(
    store: Store, arm: Arm, model: DistillationModel, block_ids: Sequence[int], seed: int
) -> tuple[Tensor, int]:
    """Return the summed loss of an arm on some train blocks, nats, and their rows that count."""
    cache = store.train(arm.capture, seed) if arm.capture else store.train()
    batch = cache.batch(block_ids)
    num_rows = len(batch.labels_R)
    if arm.capture is None and not arm.is_dense:
        return label_loss(store, model, batch)
    if not arm.is_dense:
        targets = sparse_targets(arm, batch.targets, batch.labels_R)
        batch = replace(batch, targets=targets)
        return score(model, batch, store.vocab_size, LossWeights(kl=1, ce=0))[0], num_rows
    if arm.tail == "uniform":
        whole_RV = uniform_tail(batch.targets, store.vocab_size)

        def targets_of(rows: slice) -> Tensor:
            return whole_RV[rows]
    else:
        hidden_RD = store.hidden("train", block_ids)

        def targets_of(rows: slice) -> Tensor:
            return store.teacher_logits(hidden_RD[rows]).softmax(-1)

    head = model.student.get_output_embeddings()
    return dense_loss(hidden_states(model.student, batch), head.weight, targets_of), num_rows


@torch.no_grad()
def measure(
    store: Store, model: DistillationModel, split: str, block_ids: Sequence[int]
) -> dict[str, Any]:
    """Score a student on some blocks of a split, in float32, against the teacher's whole rows.

    Returns:
        Means over rows: `ce_nats`, `kl_nats`, `agreement`, `acceptance`; `ece`; and of each block
        the mean `ce_nats`, for paired comparisons.
    """
    model.eval()
    cache = store.blocks_of(split)
    weight_VD = model.student.get_output_embeddings().weight
    values, bins, by_block = [], [], []
    for block_id in block_ids:
        batch = cache.batch([block_id])
        hidden_RD = hidden_states(model.student, batch)
        teacher_RD = store.hidden(split, [block_id])
        ce = []
        for rows in pieces(len(hidden_RD)):
            logits_RV = hidden_RD[rows] @ weight_VD.T
            labels_R = batch.labels_R[rows]
            values.append(compare(logits_RV, store.teacher_logits(teacher_RD[rows])))
            ce.append(torch.nn.functional.cross_entropy(logits_RV, labels_R, reduction="none"))
            confidence_R, likeliest_R = logits_RV.softmax(-1).max(-1)
            bins.append(bin_sums(confidence_R, likeliest_R == labels_R))
        by_block.append(torch.cat(ce).double())
    kl, agreement, acceptance = torch.cat(values).mean(0).tolist()
    return {
        "rows": sum(map(len, by_block)),
        "ce_nats": float(torch.cat(by_block).mean()),
        "kl_nats": kl,
        "agreement": agreement,
        "acceptance": acceptance,
        "ece": Reliability.of(torch.stack(bins).sum(0)).ece,
        "ce_nats_by_block": [round(float(ce_R.mean()), 6) for ce_R in by_block],
    }


def shuffled(
    config: ExperimentConfig, blocks: range, seed: int, epochs: int = 1
) -> list[list[int]]:
    """Return the batches of a training: every block once an epoch, in an order of the seed's."""
    size = config.train.blocks_per_step
    order = np.concatenate(
        [np.random.default_rng((seed, epoch)).permutation(blocks) for epoch in range(epochs)]
    ).tolist()
    return [order[first : first + size] for first in range(0, len(order), size)]
