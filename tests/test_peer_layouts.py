"""Layouts of peers give back what they are given, so that their bytes may stand beside ours."""

from pathlib import Path

import numpy as np
import pytest
import torch

from distill.config import TopKConfig
from distill.data import Block
from distill.draw import draw
from scripts.bench_peers import Run, as_arrays, coding_error, figures
from scripts.peer_layouts import LAYOUTS

NUM_BLOCKS, NUM_ROWS, VOCAB = 2, 6, 300


@pytest.fixture
def blocks() -> list[Block]:
    ones = np.ones(NUM_ROWS + 1, dtype=bool)
    tokens = np.arange(NUM_ROWS + 1, dtype=np.int32)
    lengths = np.array([NUM_ROWS + 1], dtype=np.int32)
    return [Block(number, tokens + number, lengths, ones) for number in range(NUM_BLOCKS)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_back_ids_and_nearly_the_values(
    name: str, blocks: list[Block], tmp_path: Path
) -> None:
    k, write, read = LAYOUTS[name]
    torch.manual_seed(0)
    logits_RV = 2 * torch.randn(NUM_BLOCKS * NUM_ROWS, VOCAB)
    uniforms_R = torch.rand(len(logits_RV), dtype=torch.float64)
    exact = as_arrays([draw(logits_RV, uniforms_R, TopKConfig(kind="top_k", k=k))], k)

    write(tmp_path, exact, blocks)
    ids, logprobs = read(tmp_path)

    expected = logits_RV.log_softmax(-1).topk(k)
    assert np.array_equal(ids.reshape(-1, k).numpy(), exact[0])
    assert torch.equal(torch.from_numpy(exact[0]).long(), expected.indices)
    tolerance = 0.2 if name.startswith("polynomial") else 0.01
    torch.testing.assert_close(logprobs.view(-1, k), expected.values, atol=tolerance, rtol=0)


def test_coding_error_is_the_divergence_over_the_kept_ids_and_the_rest() -> None:
    exact, decoded = torch.tensor([[0.5, 0.25]]), torch.tensor([[0.5, 0.125]])
    expected = 0.25 * np.log(0.25 / 0.125) + 0.25 * np.log(0.25 / 0.375)
    assert coding_error(exact.log(), decoded.log()) == pytest.approx(expected)
    assert coding_error(exact.log(), exact.log()) == 0


def test_rates_are_compared_within_their_round() -> None:
    ours = [Run(100, 0.0, 10, 1.0, 2.0), Run(100, 0.0, 10, 2.0, 4.0), Run(100, 0.0, 10, 4.0, 1.0)]
    other = [Run(250, 5.0, 10, 2.0, 1.0), Run(250, 5.0, 10, 4.0, 1.0), Run(250, 5.0, 10, 8.0, 2.0)]

    found = figures(other, ours)

    assert (found["bytes_per_row"], found["coding_error_nats"]) == (25, 0.5)
    assert found["write_over_ours"] == {"median": 0.5, "least": 0.5, "most": 0.5}
    assert found["read_over_ours"] == {"median": 2, "least": 0.5, "most": 4}
    assert (found["write_rows_per_second"], found["read_rows_per_second"]) == (5, 10)
