"""How far the gradient of each kind of targets is from that of the whole distributions."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distill.distillation_model import DistillationModel
from scripts.sparse_kd.arms import ARMS, Arm
from scripts.sparse_kd.store import Store
from scripts.sparse_kd.students import loss_of

BATCH_BLOCKS = (1, 8, 32)
"""Sizes of the batch whose gradient is compared, in blocks; all are its first ones."""


def compare_gradients(store: Store, model: DistillationModel, seed: int) -> dict[str, Any]:
    """Return angles (degrees) and norm ratio to the dense gradient, by arm and size of the batch.

    In float32, of all parameters, on the same train blocks; the draws are those of the seed.
    `id_angle_degrees` is the mean over the ids of the angle between the two gradients of an id's
    row in the head: every id counts alike, as it does for Adam, which scales each coordinate.
    """
    dense = _gradients(store, ARMS["dense"], model, seed)
    found: dict[str, Any] = {}
    for arm in ARMS.values():
        if arm.name != "dense" and arm.rate == 1:
            mine = _gradients(store, arm, model, seed)
            found[arm.name] = {
                str(blocks): compare(mine[blocks].flat, dense[blocks].flat)
                | {"id_angle_degrees": mean_angle(mine[blocks].head_VD, dense[blocks].head_VD)}
                for blocks in BATCH_BLOCKS
            }
    return found


class Gradient(NamedTuple):
    """Of the mean loss over some rows."""

    flat: Tensor
    """In all parameters, [P]."""
    head_VD: Tensor


def mean_angle(gradient_VD: Tensor, reference_VD: Tensor) -> float:
    """Return the mean angle between two matrices' rows in degrees, without rows of zeros."""
    both = (gradient_VD.abs().sum(-1) > 0) & (reference_VD.abs().sum(-1) > 0)
    cosines_R = nn.functional.cosine_similarity(
        gradient_VD[both].double(), reference_VD[both].double(), dim=-1
    )
    return float(torch.rad2deg(cosines_R.clamp(-1, 1).acos()).mean())


def compare(gradient: Tensor, reference: Tensor) -> dict[str, float]:
    """Return the angle between two vectors in degrees, and the ratio of their norms."""
    norm, other = (float(vector.double().norm()) for vector in (gradient, reference))
    cosine = float(gradient.double() @ reference.double()) / (norm * other)
    return {
        "angle_degrees": math.degrees(math.acos(max(-1.0, min(1.0, cosine)))),
        "norm_ratio": norm / other,
    }


def _gradients(store: Store, arm: Arm, model: DistillationModel, seed: int) -> dict[int, Gradient]:
    """Gradient of the mean loss over the first blocks, for each size of the batch."""
    head_VD = model.student.get_output_embeddings().weight
    model.zero_grad()
    found, rows = {}, 0
    for block_id in range(max(BATCH_BLOCKS)):
        loss, num_rows = loss_of(store, arm, model, [block_id], seed)
        torch.autograd.backward(loss)
        rows += num_rows
        if block_id + 1 in BATCH_BLOCKS:
            parts = [parameter.grad for parameter in model.parameters()]
            flat = torch.cat([part.flatten() for part in parts if part is not None])
            found[block_id + 1] = Gradient(flat / rows, head_VD.grad / rows)
    model.zero_grad()
    return found
