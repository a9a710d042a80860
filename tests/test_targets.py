import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill.config import TargetsConfig, ThresholdConfig, TopKConfig
from distill.draw import NonFiniteRowError, draw
from distill.errors import TeacherError
from distill.targets import SparseTargets, concatenate
from distill.uniforms import row_uniforms
from tests import reference

TAU, HOLE = ThresholdConfig().tau, torch.full([130], -1e4)
THRESHOLD, TOP_5 = ThresholdConfig(), TopKConfig(kind="top_k", k=5)


def random_logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    """Rows from almost uniform to almost one-hot."""
    generator = torch.Generator().manual_seed(seed)
    scales_R1 = torch.logspace(-1, 1, num_rows)[:, None]
    return torch.randn(num_rows, vocab_size, generator=generator) * scales_R1


def drawn(
    logits_RV: Tensor, config: TargetsConfig = THRESHOLD, uniforms_R: Tensor | None = None
) -> SparseTargets:
    seeded_R = row_uniforms(0, 0, len(logits_RV))
    return draw(logits_RV, seeded_R if uniforms_R is None else uniforms_R, config)


def dense(targets: SparseTargets, vocab_size: int) -> Tensor:
    """Weights as float64 [R, V]."""
    weights_RV = torch.zeros(targets.num_rows, vocab_size, dtype=torch.float64)
    places = (targets.row_of_entry(), targets.ids_N)
    return weights_RV.index_put(places, targets.weights_N.double(), accumulate=True)


def evenly_spaced(number: int) -> Tensor:
    return (torch.arange(number, dtype=torch.float64) + 0.5) / number


def assert_equal(left: SparseTargets, right: SparseTargets) -> None:
    for name in ("ids_N", "weights_N", "counts_R", "num_head_R", "tail_mass_R", "entropy_R"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("k", "vocab_size"), [(1, 50), (5, 64), (49, 50), (7, 131)])
def test_top_k_is_the_k_likeliest_ids_and_the_mass_of_the_rest(
    k: int, vocab_size: int, temperature: float
) -> None:
    logits_RV = random_logits(20, vocab_size)
    targets = drawn(logits_RV, TopKConfig(kind="top_k", k=k, temperature=temperature))
    assert targets.has_bucket
    assert targets.temperature == temperature
    for row, logits in zip(reference.rows_of(targets), logits_RV.tolist(), strict=True):
        truth = reference.top_k(reference.softmax(logits, temperature), k)
        assert row.ids == truth.ids
        assert row.num_head == k
        assert row.weights == pytest.approx(truth.weights, rel=1e-5)
        assert row.tail_mass == pytest.approx(truth.tail_mass, rel=1e-5)
        assert row.entropy == pytest.approx(truth.entropy, abs=2e-6)


def test_top_k_takes_any_of_equally_likely_ids() -> None:
    logits_RV = random_logits(30, 40).round()
    for row, logits in zip(
        reference.rows_of(drawn(logits_RV, TOP_5)), logits_RV.tolist(), strict=True
    ):
        probs = reference.softmax(logits)
        truth = reference.top_k(probs, 5)
        assert len(set(row.ids)) == 5
        assert [probs[token] for token in row.ids] == truth.weights
        assert row.tail_mass == pytest.approx(truth.tail_mass, rel=1e-5)


def test_top_k_keeps_a_tail_that_one_minus_the_head_would_lose() -> None:
    targets = drawn(torch.tensor([[0.0, -1.0, -20.0, -21.0]]), TopKConfig(kind="top_k", k=2))
    probs = reference.softmax([0.0, -1.0, -20.0, -21.0])
    assert float(1 - targets.weights_N.sum()) != pytest.approx(probs[2] + probs[3], rel=0.1)
    assert float(targets.tail_mass_R) == pytest.approx(probs[2] + probs[3], rel=1e-5)


@pytest.mark.parametrize("k", [5, 6])
def test_k_must_be_below_the_vocabulary_size(k: int) -> None:
    message = f"targets.k is {k}, but the teacher has 5 tokens: k must be smaller"
    with pytest.raises(TeacherError, match=message):
        drawn(random_logits(2, 5), TopKConfig(kind="top_k", k=k))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("tau", "vocab_size"), [(TAU, 150), (0.2, 64), (0.01, 200), (1.0, 33)])
def test_threshold_follows_the_rule_of_the_reference(
    tau: float, vocab_size: int, temperature: float
) -> None:
    logits_RV = random_logits(60, vocab_size, seed=1)
    uniforms_R = row_uniforms(3, 4, 60)
    config = ThresholdConfig(tau=tau, temperature=temperature)
    targets = drawn(logits_RV, config, uniforms_R)
    assert not targets.has_bucket
    assert targets.temperature == temperature
    for row, logits, uniform in zip(
        reference.rows_of(targets), logits_RV.tolist(), uniforms_R.tolist(), strict=True
    ):
        probs = reference.softmax(logits, temperature)
        plan = reference.threshold(probs, tau)
        assert row.head == plan.head
        assert len(row.tail) == plan.num_tail
        assert row.weights[: row.num_head] == pytest.approx([probs[j] for j in plan.head], rel=1e-5)
        assert row.weights[row.num_head :] == pytest.approx([plan.share] * plan.num_tail, rel=1e-5)
        assert row.tail_mass == pytest.approx(plan.tail_mass, rel=1e-5)
        assert row.entropy == pytest.approx(reference.entropy(probs), abs=2e-6)
        # Float32 moves the borders between ids a little: a place on one may go either way.
        nudged = [uniform, uniform + 1e-4, uniform - 1e-4]
        assert row.tail in [reference.systematic(probs, plan, place) for place in nudged]


def assert_invariants(logits: list[float], tau: float, uniform: float) -> None:
    targets = drawn(
        torch.tensor([logits]),
        ThresholdConfig(tau=tau),
        torch.tensor([uniform], dtype=torch.float64),
    )
    (row,), probs = reference.rows_of(targets), reference.softmax(logits)
    assert probs[row.ids[0]] == pytest.approx(max(probs), rel=1e-6)
    assert {token for token, p in enumerate(probs) if p >= tau * (1 + 1e-5)} <= set(row.head)
    assert all(probs[token] >= tau / 2 * (1 - 1e-5) for token in row.head[1:])
    assert row.tail == sorted(set(row.tail) - set(row.head))
    assert all(probs[token] > 0 for token in row.tail)
    assert row.weights == pytest.approx(
        [probs[token] for token in row.head]
        + [row.tail_mass / max(len(row.tail), 1)] * len(row.tail),
        rel=1e-5,
    )
    assert row.weights[: row.num_head] == sorted(row.weights[: row.num_head], reverse=True)
    assert math.fsum(row.weights) == pytest.approx(1, abs=2e-6)
    about = row.tail_mass / tau
    assert math.ceil(about - 1e-4) <= len(row.tail) <= math.ceil(about + 1e-4)
    assert row.entropy >= 0


LOGIT = st.floats(-30, 30, width=32)
ROWS = (
    st.lists(LOGIT, min_size=2, max_size=200)
    | st.lists(st.sampled_from([0.0, -1.0, -2.0]), min_size=2, max_size=200)  # ties
    | st.lists(LOGIT | st.just(-1e4), min_size=2, max_size=80)
)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(ROWS, st.sampled_from([0.01, TAU, 0.1, 0.3, 1.0]), st.floats(0.01, 0.99))
def test_every_row_keeps_the_rules(logits: list[float], tau: float, uniform: float) -> None:
    assert_invariants(logits, tau, uniform)


@pytest.mark.parametrize("vocab_size", [2, 3, 41, 63, 64, 65, 128, 1000])
@pytest.mark.parametrize("kind", ["uniform", "flat", "peaked", "one_hot", "holes"])
def test_special_rows_keep_the_rules(kind: str, vocab_size: int) -> None:
    noise_V = random_logits(1, vocab_size, seed=vocab_size)[0]
    logits_V = {
        "uniform": torch.zeros(vocab_size),
        "flat": noise_V * 0.01,
        "peaked": noise_V * 100,
        "one_hot": torch.full([vocab_size], -200.0).index_fill(0, torch.tensor(1), 0),
        "holes": torch.cat([noise_V[:1] + 3, HOLE, noise_V, HOLE, noise_V, HOLE]),
    }[kind]
    for uniform in (0.0, 0.4, 1 - 2**-53):
        assert_invariants(logits_V.tolist(), TAU, uniform)


def test_ids_of_exactly_tau_are_head() -> None:
    (row,) = reference.rows_of(drawn(torch.zeros(1, 8), ThresholdConfig(tau=1 / 8)))
    assert (row.num_head, row.tail_mass) == (8, 0)


def test_one_hot_teacher_has_no_tail() -> None:
    targets = drawn(torch.tensor([[-200.0, 0.0, -200.0], [0.0, -1e4, -1e4]]))
    assert targets.ids_N.tolist() == [1, 0]
    assert targets.weights_N.tolist() == [1, 1]
    assert targets.tail_mass_R.tolist() == targets.entropy_R.tolist() == [0, 0]
    assert drawn(torch.tensor([[-40.0, 0.0, -40.0]])).counts_R.tolist() == [2]  # a tiny one


def test_tail_mass_next_to_a_multiple_of_tau_draws_distinct_ids() -> None:
    probs = [0.5, 0.25 * (1 - 8.4e-7), 0.25 * (1 - 8.4e-7), 4.2e-7]
    logits_RV = torch.tensor([probs], dtype=torch.float64).log().float()
    (row,) = reference.rows_of(drawn(logits_RV, ThresholdConfig(tau=0.25)))
    assert len(set(row.ids)) == len(row.ids)


def test_evenly_spaced_uniforms_integrate_to_exact_mean_inclusion_and_variance() -> None:
    number = 4096
    for logits_V in random_logits(6, 150, seed=2)[:4]:
        probs = reference.softmax(logits_V.tolist())
        plan = reference.threshold(probs, TAU)
        targets = drawn(logits_V.expand(number, -1), uniforms_R=evenly_spaced(number))
        weights_SV, probs_V = dense(targets, 150), torch.tensor(probs, dtype=torch.float64)
        # An id is drawn on one arc of uniforms: counting points on it is off by one at most.
        assert float((weights_SV.mean(0) - probs_V).abs().max()) <= plan.share / number + 1e-6
        frequency_V = (weights_SV > 0).double().mean(0).tolist()
        tail = sorted(set(range(150)) - set(plan.head))
        for token in tail:
            assert abs(frequency_V[token] - plan.inclusion(probs[token])) <= 1 / number + 1e-5
        trace = math.fsum(probs[token] * (plan.share - probs[token]) for token in tail)
        found = float(((weights_SV - probs_V) ** 2).sum(-1).mean())
        assert found == pytest.approx(trace, rel=0.01)


def test_mean_of_seeded_draws_is_the_teacher_within_its_standard_error() -> None:
    number, vocab_size = 5000, 150
    logits_V = random_logits(3, vocab_size, seed=3)[1]
    targets = drawn(logits_V.expand(number, -1), uniforms_R=row_uniforms(5, 6, number))
    weights_SV = dense(targets, vocab_size)
    probs_V = torch.tensor(reference.softmax(logits_V.tolist()), dtype=torch.float64)
    plan = reference.threshold(probs_V.tolist(), TAU)
    is_tail_V = torch.ones(vocab_size, dtype=torch.bool).index_fill(0, torch.tensor(plan.head), 0)
    error_V = weights_SV.mean(0) - probs_V
    stderr_V = (probs_V * (plan.share - probs_V) / number).sqrt()
    assert float((error_V / stderr_V)[is_tail_V].abs().max()) < 4.5
    assert float(error_V[~is_tail_V].abs().max()) < 1e-6


@pytest.mark.parametrize("config", [THRESHOLD, TOP_5])
def test_draws_depend_on_the_row_alone_not_on_its_company(config: TargetsConfig) -> None:
    logits_RV, uniforms_R = random_logits(33, 1000), row_uniforms(1, 2, 33)
    whole = reference.rows_of(drawn(logits_RV, config, uniforms_R))
    for order_R in (torch.arange(33), torch.arange(32, -1, -1)):
        for at_once in (1, 2, 7, 32, 33):
            cuts = [order_R[first : first + at_once] for first in range(0, 33, at_once)]
            parts = [drawn(logits_RV[cut], config, uniforms_R[cut]) for cut in cuts]
            rows, truths = reference.rows_of(concatenate(parts)), [whole[r] for r in order_R]
            for row, truth in zip(rows, truths, strict=True):
                assert row.entropy == pytest.approx(truth.entropy, abs=2e-6)
                assert replace(row, entropy=truth.entropy) == truth


def test_entropy_depends_on_the_row_alone_to_the_last_bit() -> None:
    logits_RV = random_logits(33, 1000)
    alone = [drawn(row_V[None]).entropy_R for row_V in logits_RV]
    assert torch.equal(torch.cat(alone), drawn(logits_RV).entropy_R)


def test_a_lone_row_is_the_same_on_any_number_of_threads() -> None:
    row_RV, threads = random_logits(3, 49152)[1:2], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = drawn(row_RV)
        torch.set_num_threads(2)
        assert_equal(drawn(row_RV), one)
    finally:
        torch.set_num_threads(threads)


def test_temperature_divides_the_logits() -> None:
    logits_RV = random_logits(20, 100)
    assert_equal(drawn(logits_RV, ThresholdConfig(temperature=4)), drawn(logits_RV / 4))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("config", [THRESHOLD, TOP_5])
def test_logits_that_are_not_finite_name_their_row(config: TargetsConfig, value: float) -> None:
    logits_RV = random_logits(6, 70)
    logits_RV[3, 69] = logits_RV[5, 0] = value
    with pytest.raises(NonFiniteRowError, match="logits are NaN or infinite in row 3") as error:
        drawn(logits_RV, config)
    assert error.value.row == 3


@pytest.mark.parametrize(("seed", "block_id"), [(0, 0), (1, 0), (0, 1), (-7, 3), (2**63, 2**40)])
def test_row_uniforms_are_splitmix64(seed: int, block_id: int) -> None:
    uniforms_R = row_uniforms(seed, block_id, 500)
    assert uniforms_R.dtype == torch.float64
    assert uniforms_R.tolist() == reference.row_uniforms(seed, block_id, 500)
    assert all(0 <= uniform < 1 for uniform in uniforms_R.tolist())
    assert torch.equal(row_uniforms(seed, block_id, 20), uniforms_R[:20])
    assert abs(float(uniforms_R.mean()) - 0.5) < 4 / math.sqrt(12 * 500)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(st.lists(st.booleans(), max_size=12), st.sampled_from([THRESHOLD, TOP_5]), st.data())
def test_rows_can_be_cut_kept_spread_and_joined_again(
    mask: list[bool], config: TargetsConfig, data: st.DataObject
) -> None:
    mask_R, number = torch.tensor(mask, dtype=torch.bool), sum(mask)
    targets = drawn(random_logits(12, 70), config).keep_rows(torch.arange(12) < number)
    spread = targets.scatter_rows(mask_R)
    assert spread.num_rows == len(mask)
    assert spread.counts_R[~mask_R].tolist() == [0] * (len(mask) - number)
    assert_equal(spread.keep_rows(mask_R), targets)
    starts_R = torch.tensor([0, *spread.counts_R.cumsum(0).tolist()])
    cut = data.draw(st.integers(0, len(mask)))
    parts = [spread.slice_rows(0, cut, starts_R), spread.slice_rows(cut, len(mask), starts_R)]
    assert_equal(concatenate([*parts, SparseTargets.empty()]), spread)
    assert reference.rows_of(parts[0]) == reference.rows_of(spread)[:cut]
    rows = reference.rows_of(targets)
    assert targets.row_of_entry().tolist() == [r for r, row in enumerate(rows) for _ in row.ids]
