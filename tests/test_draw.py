"""Draws over a vocabulary of real size, where rows are worked on in pieces."""

import pytest
import torch
from torch import Tensor

from distill.config import SampledConfig, TargetsConfig, ThresholdConfig, TopKConfig
from distill.draw import _HELD_ENTRIES, NonFiniteRowError, draw
from distill.uniforms import row_uniforms

VOCAB_SIZE = 49_153  # not a multiple of 64
NUM_ROWS = 3 * _HELD_ENTRIES // VOCAB_SIZE
KINDS: list[TargetsConfig] = [
    ThresholdConfig(),
    TopKConfig(kind="top_k", k=64, also_temperatures=(2.0,)),
    SampledConfig(kind="sampled"),
]


@pytest.fixture(scope="module")
def logits_RV() -> Tensor:
    """Rows from almost uniform to almost one-hot, with the ties that bfloat16 brings."""
    generator = torch.Generator().manual_seed(0)
    scales_R1 = torch.logspace(-1, 1, NUM_ROWS)[:, None]
    return (torch.randn(NUM_ROWS, VOCAB_SIZE, generator=generator) * scales_R1).bfloat16()


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_row_of_many_is_the_row_alone(logits_RV: Tensor, config: TargetsConfig) -> None:
    before, uniforms_R = logits_RV.clone(), row_uniforms(0, 0, NUM_ROWS)
    together = draw(logits_RV, uniforms_R, config)
    assert torch.equal(logits_RV, before)
    ends_R = together.counts_R.cumsum(0)
    for row in (0, 1, NUM_ROWS // 2, NUM_ROWS - 1):
        alone = draw(logits_RV[row : row + 1].float(), uniforms_R[row : row + 1], config)
        entries = slice(int(ends_R[row] - together.counts_R[row]), int(ends_R[row]))
        assert torch.equal(alone.ids_N, together.ids_N[entries])
        assert torch.equal(alone.weights_N, together.weights_N[entries])
        assert torch.equal(alone.entropy_R, together.entropy_R[row : row + 1])
        assert torch.equal(alone.tail_mass_R, together.tail_mass_R[row : row + 1])


@pytest.mark.parametrize("k", [1, 64, 767, 800, 5000])
def test_top_k_by_blocks_has_the_weights_of_a_plain_one(logits_RV: Tensor, k: int) -> None:
    config = TopKConfig(kind="top_k", k=k)
    targets = draw(logits_RV, row_uniforms(0, 0, NUM_ROWS), config)
    probs_RV = logits_RV.double().softmax(-1)
    found_RK = targets.weights_N.view(NUM_ROWS, k).double()
    torch.testing.assert_close(found_RK, probs_RV.topk(k).values, rtol=2e-6, atol=0)
    ids_RK = targets.ids_N.view(NUM_ROWS, k)
    assert all(len(row.unique()) == k for row in ids_RK)
    torch.testing.assert_close(found_RK, probs_RV.gather(1, ids_RK), rtol=2e-6, atol=0)


def test_entropy_is_that_of_the_whole_distribution(logits_RV: Tensor) -> None:
    targets = draw(logits_RV, row_uniforms(0, 0, NUM_ROWS), ThresholdConfig())
    probs_RV = logits_RV.double().softmax(-1)
    entropy_R = -torch.xlogy(probs_RV, probs_RV).sum(-1)
    torch.testing.assert_close(targets.entropy_R.double(), entropy_R, rtol=2e-6, atol=2e-6)


def test_row_that_is_not_finite_is_counted_over_all_pieces(logits_RV: Tensor) -> None:
    broken_RV = logits_RV.clone()
    broken_RV[NUM_ROWS - 2, 7] = torch.nan
    with pytest.raises(NonFiniteRowError) as error:
        draw(broken_RV, row_uniforms(0, 0, NUM_ROWS), ThresholdConfig())
    assert error.value.row == NUM_ROWS - 2


@pytest.mark.parametrize("vocab_size", [3, 65, 130])
def test_ids_that_are_not_there_are_never_chosen(vocab_size: int) -> None:
    logits_RV = torch.full([2, vocab_size], -1e4)  # all but one have probability 0 in float32
    logits_RV[:, 1] = 0
    for k in (1, 2, vocab_size - 1):
        config = TopKConfig(kind="top_k", k=k)
        targets = draw(logits_RV, row_uniforms(0, 0, 2), config)
        assert targets.ids_N.max() < vocab_size
        assert targets.ids_N[0] == 1
        assert targets.tail_mass_R.tolist() == [0, 0]
