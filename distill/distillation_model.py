"""A student whose forward pass ends in the loss.

Shape suffixes: B blocks, T positions, D hidden size, R rows that count.
"""

from typing import Any

from torch import Tensor, nn

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
