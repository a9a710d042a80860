"""A student whose forward pass ends in the loss.

Shape suffixes: B blocks, T positions, D hidden size, R rows that count.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distill.config import TrainConfig
from distill.errors import MismatchError
from distill.head import DistillationHead, HeadTargets
from distill.losses import LossRows
from distill.models import refuse_logit_transforms


class DistillationModel(nn.Module):
    """A student whose forward takes hidden states straight to the loss.

    The loss is computed inside this root module's forward because FSDP only gathers weights there.
    """

    def __init__(self, student: Any) -> None:
        super().__init__()
        refuse_logit_transforms(student.config, "the student")
        head = student.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise MismatchError(
                f"the student's output layer is {type(head).__name__}, expected nn.Linear.\n"
                "  Choose a causal language model of transformers with a plain head."
            )
        student.set_output_embeddings(DistillationHead.adopt(head))
        self.student = student
        self._no_split_modules = student._no_split_modules
        """Layers that FSDP2 shards one by one; Accelerate looks for them here."""

    def tie_weights(self) -> None:
        """Share the embedding's weight with the head again, where the student does; for FSDP2."""
        self.student.tie_weights()

    def forward(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor,
        row_mask_BT: Tensor,
        targets: HeadTargets,
    ) -> tuple[Tensor, LossRows]:
        """Return the summed loss over the rows of `row_mask_BT` and each row's parts.

        Args:
            input_ids_BT: Packed blocks.
            position_ids_BT: Restart at each document. Together with `use_cache=False` and no
                attention mask, this keeps attention within documents in transformers 5.
            row_mask_BT: True where position t predicts a token that counts; the last is False.
            targets: For those rows, in the order of `row_mask_BT`.
        """
        decoder = self.student.get_decoder()
        hidden_BTD = decoder(
            input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False
        ).last_hidden_state
        head = self.student.get_output_embeddings()
        loss: tuple[Tensor, LossRows] = head.loss(hidden_BTD[row_mask_BT], targets)
        return loss


def trainable(student: Any, settings: TrainConfig) -> DistillationModel:
    """Make a student ready to be trained: dtypes, adapters, recomputation, compilation.

    Args:
        student: A causal language model of transformers, changed in place.
        settings: How it is trained.

    Raises:
        ConfigError: `train.lora.modules` does not fit the student.
        MismatchError: the student's head is none that the loss can be fused with.
    """
    if settings.lora is None:
        student = student.float()
    else:
        from distill.adapters import add_adapters

        student = student.to(getattr(torch, settings.precision))
        student = add_adapters(student, settings.lora)  # these are float32
    if settings.gradient_checkpointing:
        # Its name since transformers 5.20.
        enable = getattr(student, "activation_checkpointing_enable", None)
        (enable or student.gradient_checkpointing_enable)()
    model = DistillationModel(student)
    if settings.compile:
        for module in student.modules():
            if type(module).__name__ in student._no_split_modules:
                # The layers only: they share one compilation, and the mask that keeps packed
                # documents apart is made outside, from data that a compiler does not see.
                module.compile()
    return model
