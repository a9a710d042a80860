"""`sampled` targets, and `top_k` targets at further temperatures."""

import math
from collections.abc import Callable

import pytest
import torch

from distill.cache.reader import open_cache
from distill.capture import capture
from distill.config import ExperimentConfig, SampledConfig, TopKConfig
from distill.draw import draw
from distill.errors import MismatchError
from distill.losses import LossWeights, distillation_loss
from distill.targets import SparseTargets, at_temperature
from distill.train import train
from distill.uniforms import row_uniforms
from students import build_student

ConfigMaker = Callable[..., ExperimentConfig]
SAMPLED = SampledConfig(kind="sampled", draws=20)


def logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.5, 6, num_rows)[:, None]
    return torch.randn(num_rows, vocab_size, generator=generator) * scale


def dense(targets: SparseTargets, vocab_size: int) -> torch.Tensor:
    out = torch.zeros(targets.num_rows, vocab_size, dtype=torch.float64)
    rows_N = targets.row_of_entry()
    return out.index_put((rows_N, targets.ids_N), targets.weights_N.double(), accumulate=True)


@pytest.mark.parametrize("vocab_size", [2, 63, 64, 65, 500])
def test_row_holds_the_likeliest_id_and_then_what_was_drawn_by_rising_id(vocab_size: int) -> None:
    scores_RV = logits(40, vocab_size)
    targets = draw(scores_RV.clone(), row_uniforms(1, 2, 40), SAMPLED)
    assert torch.equal(targets.num_head_R, torch.ones(40, dtype=torch.int64))
    for row, ids in enumerate(torch.split(targets.ids_N, targets.counts_R.tolist())):
        assert int(ids[0]) == int(scores_RV[row].argmax())
        assert ids[1:].tolist() == sorted(set(ids[1:].tolist()) - {int(ids[0])})
    counts_N = targets.weights_N * 20
    torch.testing.assert_close(counts_N, counts_N.round())
    torch.testing.assert_close(dense(targets, vocab_size).sum(1), torch.ones(40).double())


def test_drawn_ids_are_those_of_the_inverse_cumulative_distribution() -> None:
    """One draw a row: the id in whose share of [0, 1) the row's own stream falls."""
    targets = draw(
        logits(1, 90).expand(20_000, -1).clone(),
        row_uniforms(3, 4, 20_000),
        SampledConfig(kind="sampled", draws=1),
    )
    probs_V = logits(1, 90)[0].double().softmax(-1)
    frequency_V = dense(targets, 90).mean(0)
    stderr_V = (probs_V * (1 - probs_V) / 20_000).sqrt()
    assert float(((frequency_V - probs_V) / stderr_V).abs().max()) < 4.5


def test_mean_weights_and_variance_are_those_of_drawing_with_replacement() -> None:
    number, draws = 4000, 20
    probs_V = logits(2, 120)[1].double().softmax(-1)
    many_RV = probs_V.log().float().expand(number, -1).clone()
    weights_SV = dense(draw(many_RV, row_uniforms(5, 6, number), SAMPLED), 120)
    variance_V = probs_V * (1 - probs_V) / draws
    error_V = (weights_SV.mean(0) - probs_V) / (variance_V / number).sqrt()
    assert float(error_V.abs().max()) < 4.5
    found = float(((weights_SV - probs_V) ** 2).sum(1).mean())
    assert found == pytest.approx(float(variance_V.sum()), rel=0.05)


def test_mean_gradient_is_the_dense_one() -> None:
    number, teacher_V = 3000, logits(3, 40)[2]
    student_V = logits(1, 40, seed=9)[0].requires_grad_()
    targets = draw(teacher_V.expand(number, -1).clone(), row_uniforms(7, 8, number), SAMPLED)
    labels_R = torch.zeros(number, dtype=torch.int64)
    loss = distillation_loss(
        student_V.expand(number, -1), labels_R, targets, LossWeights(kl=1, ce=0)
    )
    (gradient_V,) = torch.autograd.grad(loss / number, student_V)
    teacher_p = teacher_V.double().softmax(-1)
    wanted_V = student_V.detach().double().softmax(-1) - teacher_p
    stderr_V = (teacher_p * (1 - teacher_p) / 20 / number).sqrt()
    assert bool(((gradient_V.double() - wanted_V).abs() <= 4.5 * stderr_V + 1e-6).all())


def test_draws_depend_on_seed_block_and_row_alone() -> None:
    scores_RV, uniforms_R = logits(9, 200), row_uniforms(1, 2, 9)
    whole = draw(scores_RV.clone(), uniforms_R, SAMPLED)
    starts = [0, *whole.counts_R.cumsum(0).tolist()]
    for row in range(9):
        alone = draw(scores_RV[row : row + 1].clone(), uniforms_R[row : row + 1], SAMPLED)
        assert torch.equal(alone.ids_N, whole.ids_N[starts[row] : starts[row + 1]])
        assert torch.equal(alone.weights_N, whole.weights_N[starts[row] : starts[row + 1]])
    other = draw(scores_RV.clone(), row_uniforms(1, 3, 9), SAMPLED)
    assert other.ids_N.tolist() != whole.ids_N.tolist()


def test_one_hot_teacher_is_drawn_every_time() -> None:
    scores_RV = torch.full((1, 70), -200.0).index_fill(1, torch.tensor(5), 0.0)
    targets = draw(scores_RV, row_uniforms(0, 0, 1), SAMPLED)
    assert targets.ids_N.tolist() == [5]
    assert targets.weights_N.tolist() == [1]


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_further_temperature_gives_what_capture_at_it_would(temperature: float) -> None:
    scores_RV = logits(30, 300)
    config = TopKConfig(kind="top_k", k=8, also_temperatures=(0.5, 2.0, 4.0))
    targets = draw(scores_RV.clone(), torch.zeros(30), config)
    turned = at_temperature(targets, temperature, config.also_temperatures)
    direct = draw(
        scores_RV.clone(), torch.zeros(30), TopKConfig(kind="top_k", k=8, temperature=temperature)
    )
    assert torch.equal(turned.ids_N, direct.ids_N)
    torch.testing.assert_close(turned.weights_N, direct.weights_N, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(turned.tail_mass_R, direct.tail_mass_R, rtol=1e-3, atol=2e-6)
    assert turned.temperature == temperature


def test_temperature_that_was_not_captured_is_refused_with_both_sides() -> None:
    targets = draw(logits(2, 30), torch.zeros(2), TopKConfig(kind="top_k", k=3))
    with pytest.raises(MismatchError, match=r"asked for  2\.0\n  captured   \[1\.0\]"):
        at_temperature(targets, 2.0, ())


def test_student_trains_at_a_further_temperature_from_the_cache(tiny_config: ConfigMaker) -> None:
    overrides = ("targets.kind=top_k", "targets.k=8", "targets.also_temperatures=[2.0]")
    config = tiny_config(*overrides, "train.temperature=2")
    assert capture(config)
    cache = open_cache(config.cache_folder("train"))
    cold, warm = cache.batch([0]).targets, cache.batch([0], 2.0).targets
    assert (cold.temperature, warm.temperature) == (1.0, 2.0)
    assert float(warm.tail_mass_R.mean()) > float(cold.tail_mass_R.mean())
    student, tokenizer = build_student(config)
    assert (train(config, student, tokenizer) / "model.safetensors").exists()

    other = tiny_config(*overrides, "train.temperature=3")
    student, tokenizer = build_student(other)
    with pytest.raises(MismatchError, match=r"\[1\.0, 2\.0\]\n  config  train\.temperature  3\.0"):
        train(other, student, tokenizer)


def test_sampled_cache_holds_what_was_drawn(
    tiny_config: ConfigMaker,
) -> None:
    config = tiny_config("targets.kind=sampled", "targets.draws=50")
    assert capture(config)
    cache = open_cache(config.cache_folder("train"))
    targets = cache.batch(range(len(cache))).targets
    assert float(targets.weights_N.sum()) == pytest.approx(targets.num_rows, rel=1e-5)
    assert 1 < len(targets.ids_N) / targets.num_rows < 51
    assert not math.isnan(float(targets.entropy_R.sum()))
