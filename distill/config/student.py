"""Settings of the training; students are in students.py."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from distill.config.base import STRICT, Divergence, Dtype, Fraction, Positive, PositiveFloat


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """How the student learns."""

    kl_weight: Annotated[float, Field(ge=0)] = 0.9
    """Weight of KL(teacher || student), nats a row."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the cross-entropy with the true next token, nats a row."""
    divergence: Divergence = "forward_kl"
    """What kl_weight weighs; all but forward_kl need exact targets (top_k)."""
    divergence_mix: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """beta of jensen_shannon, alpha of the skewed divergences (0.1 is usual there)."""
    kl_schedule: Literal["constant", "linear", "wsd"] = "constant"
    """`linear`: kl_weight falls to kl_weight_end over all steps; `wsd`: warms up from it over the
    first tenth, stays, and returns to it over the last fifth. ce_weight takes up the difference."""
    kl_weight_end: Annotated[float, Field(ge=0)] = 0.0
    """Where kl_schedule goes."""
    row_weights: Literal["constant", "entropy"] = "constant"
    """`entropy`: share of the KL in a row is H(teacher) / log V; where it is sure, labels teach."""
    temperature: PositiveFloat | None = None
    """Softmax temperature of the KL; by default the cache's, else one of its also_temperatures."""
    learning_rate: PositiveFloat = 1e-4
    """Peak of the schedule."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after warmup, to zero at the last step; `constant` stays, `wsd` falls over the last
    fifth only."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's, on matrices only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    """AdamW's."""
    max_grad_norm: PositiveFloat = 1.0
    """Norm to which gradients are clipped."""
    epochs: PositiveFloat = 1.0
    """Passes over the cache."""
    blocks_per_step: Positive = 8
    """Blocks an optimiser step sees, over all processes."""
    micro_batch_blocks: Positive = 1
    """Blocks a forward pass of one process."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Autocast of the forward pass; weights and optimiser state stay float32."""
    save_dtype: Dtype = "bfloat16"
    """Weights of the finished student; training itself keeps float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    head_chunk_tokens: Positive | None = None
    """Rows whose logits over the whole vocabulary exist at a time; by default what 128 MiB hold."""
    eval_every: Positive | None = None
    """Steps between evaluations on the held-out blocks; by default only at the end."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; by default only at the end."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints stay on disk."""

    def __post_init__(self) -> None:
        if self.kl_weight == 0 and self.ce_weight == 0:
            raise ValueError("kl_weight and ce_weight are both 0: there is nothing to learn")
        if self.blocks_per_step % self.micro_batch_blocks:
            raise ValueError(
                f"blocks_per_step ({self.blocks_per_step}) must be a multiple of "
                f"micro_batch_blocks ({self.micro_batch_blocks})"
            )
