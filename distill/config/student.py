"""Settings of the training; students are in students.py."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from distill.config.base import STRICT, Divergence, Dtype, Fraction, Positive, PositiveFloat

Tracker = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Low-rank adapters in place of whole weights (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Positive = 16
    """Rank of each adapter."""
    alpha: Positive = 32
    """What an adapter adds is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of an adapter's input."""
    modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get one, such as q_proj; `all-linear` leaves out only the head."""


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
    """Shape after warmup, to min_learning_rate at the last step; `constant` stays, `wsd` falls over
    the last fifth only."""
    min_learning_rate: Annotated[float, Field(ge=0)] = 0.0
    """Where the schedule ends."""
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
    seed: int | None = None
    """Of data order and dropout alone, so that trainings on one cache can be repeated; by default
    the experiment's."""
    blocks_per_step: Positive = 8
    """Blocks an optimiser step sees, over all processes."""
    micro_batch_blocks: Positive = 1
    """Blocks a forward pass of one process."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    """Autocast of the forward pass; weights and optimiser state stay float32."""
    save_dtype: Dtype = "bfloat16"
    """Weights of the finished student; training itself keeps float32."""
    lora: LoraConfig | None = None
    """Train adapters only; the weights below them are held in `precision`. The finished student has
    them merged in, and its folder adapter/ has them alone."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile each decoder layer: a minute at the start, then faster steps on a GPU."""
    head_chunk_tokens: Positive | None = None
    """Rows whose logits over the whole vocabulary exist at a time; by default what 128 MiB hold."""
    eval_every: Positive | None = None
    """Steps between evaluations on the held-out blocks; by default only at the end."""
    keep_best: bool = False
    """Finish with the weights of the evaluation with the lowest KL, whose checkpoint stays on disk,
    in place of the last step's."""
    early_stop_evals: Positive | None = None
    """Stop after so many evaluations in a row without a new lowest KL."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; by default only at the end."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints stay on disk."""
    trackers: tuple[Tracker, ...] = ()
    """Where metrics go besides metrics.jsonl and loss.png."""

    def __post_init__(self) -> None:
        if self.kl_weight == 0 and self.ce_weight == 0:
            raise ValueError("kl_weight and ce_weight are both 0: there is nothing to learn")
        if self.eval_every is None and (self.keep_best or self.early_stop_evals):
            raise ValueError("keep_best and early_stop_evals need eval_every")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate ({self.min_learning_rate:g}) is above learning_rate "
                f"({self.learning_rate:g})"
            )
        if self.schedule == "constant" and self.min_learning_rate:
            raise ValueError("a constant schedule never reaches min_learning_rate")
        if self.blocks_per_step % self.micro_batch_blocks:
            raise ValueError(
                f"blocks_per_step ({self.blocks_per_step}) must be a multiple of "
                f"micro_batch_blocks ({self.micro_batch_blocks})"
            )
