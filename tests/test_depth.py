"""Which layers stay, by measured importance."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from distill.errors import ConfigError
from students import depth
from students.calibration import CalibrationBlock, cross_entropy
from tests.tiny_models import FAMILIES, VOCAB_SIZE, logits_of, make_calibration, tiny_model

BLOCKS = make_calibration(9, 15)


def cosine(left: list[float], right: list[float]) -> float:
    product = sum(x * y for x, y in zip(left, right, strict=True))
    return product / (math.hypot(*left) * math.hypot(*right))


def test_block_influence_is_that_of_plain_python() -> None:
    model = tiny_model(num_hidden_layers=3)
    turned: list[list[float]] = [[] for _ in range(3)]
    for block in BLOCKS:
        ends: list[Any] = []
        for number in range(4):
            # What leaves layer n - 1 is what a model of n layers hands to its last norm.
            part = tiny_model(num_hidden_layers=3)
            part.model.norm = torch.nn.Identity()
            part.model.layers = part.model.layers[:number]
            part.config.num_hidden_layers = number
            part.lm_head = torch.nn.Identity()
            ends.append(logits_of(part, block)[0].tolist())
        for number in range(3):
            turned[number] += [
                1 - cosine(before, after)
                for before, after in zip(ends[number], ends[number + 1], strict=True)
            ]
    wanted = [sum(values) / len(values) for values in turned]
    assert depth.block_influence(model, BLOCKS) == pytest.approx(wanted, rel=1e-5)


def loss_twin(model: Any, blocks: list[CalibrationBlock]) -> float:
    total, rows = 0.0, 0
    for block in blocks:
        logprobs = logits_of(model, block)[0].log_softmax(-1)
        for place in range(block.input_ids_BT.shape[1] - 1):
            if block.row_mask_BT[0, place]:
                total -= float(logprobs[place, block.input_ids_BT[0, place + 1]])
                rows += 1
    return total / rows


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_increase_is_that_of_models_without_the_layer(family: str) -> None:
    model = tiny_model(family, num_hidden_layers=3)
    whole = loss_twin(model, BLOCKS)
    assert cross_entropy(model, BLOCKS, VOCAB_SIZE) == pytest.approx(whole, rel=1e-6)
    wanted = []
    for left_out in range(3):
        part = tiny_model(family, num_hidden_layers=3)
        depth.keep_layers(part, [number for number in range(3) if number != left_out])
        wanted.append(loss_twin(part, BLOCKS) - whole)
    found = depth.loss_increase(model, BLOCKS, VOCAB_SIZE)
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert not any(module._forward_hooks for module in model.modules())


def test_padding_beyond_the_vocabulary_is_no_outcome() -> None:
    model, block = tiny_model(), BLOCKS[0]
    logits = logits_of(model, block)[block.row_mask_BT][:, : VOCAB_SIZE - 3]
    labels = block.input_ids_BT[:, 1:][block.row_mask_BT[:, :-1]].clamp(max=VOCAB_SIZE - 4)
    clamped = block.input_ids_BT.clone()
    clamped[:, 1:][block.row_mask_BT[:, :-1]] = labels
    again = CalibrationBlock(clamped, block.position_ids_BT, block.row_mask_BT)
    logits = logits_of(model, again)[block.row_mask_BT][:, : VOCAB_SIZE - 3]
    wanted = float(F.cross_entropy(logits, labels))
    assert cross_entropy(model, [again], VOCAB_SIZE - 3) == pytest.approx(wanted, rel=1e-6)


def test_blocks_without_a_row_that_counts_are_refused() -> None:
    block = BLOCKS[0]
    empty = CalibrationBlock(
        block.input_ids_BT, block.position_ids_BT, torch.zeros_like(block.row_mask_BT)
    )
    with pytest.raises(ConfigError, match=r"calibration_blocks: in the first 1 blocks no token"):
        cross_entropy(tiny_model(), [empty], VOCAB_SIZE)


def test_most_important_layers_stay_in_their_order() -> None:
    assert depth.most_important([0.3, 0.1, 0.9, 0.1, 0.2], 3) == [0, 2, 4]
    assert depth.most_important([1.0, 1.0, 1.0], 2) == [0, 1]
    with pytest.raises(ConfigError, match="num_layers is 4, but the model has 3"):
        depth.most_important([1.0, 1.0, 1.0], 4)


def test_layers_that_do_nothing_are_the_first_to_go() -> None:
    model = tiny_model(num_hidden_layers=4)
    for number in (0, 2):
        layer = model.model.layers[number]
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    wanted = logits_of(model, BLOCKS[0])
    for importance in (
        depth.block_influence(model, BLOCKS),
        depth.loss_increase(model, BLOCKS, VOCAB_SIZE),
    ):
        assert importance[0] == pytest.approx(0, abs=1e-6)
        part = tiny_model(num_hidden_layers=4)
        part.load_state_dict(model.state_dict())
        depth.keep_layers(part, [1, 3])
        assert torch.equal(logits_of(part, BLOCKS[0]), wanted)
    assert depth.most_important(depth.block_influence(model, BLOCKS), 2) == [1, 3]


def test_layer_that_is_not_there_cannot_be_kept() -> None:
    with pytest.raises(ConfigError, match="names layer 2, but the model has 2 layers, 0 to 1"):
        depth.keep_layers(tiny_model(), [0, 2])
