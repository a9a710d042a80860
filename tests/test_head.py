import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from distill.config import ThresholdConfig, TopKConfig
from distill.distillation_model import DistillationModel
from distill.draw import draw
from distill.errors import MismatchError
from distill.head import DistillationHead, HeadTargets
from distill.losses import LossRows, LossWeights, distillation_loss
from distill.targets import SparseTargets
from distill.uniforms import row_uniforms
from tests import reference

KINDS = pytest.mark.parametrize("kind", ["top_k", "threshold"])
TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 2.0])
MIX = LossWeights(kl=0.7, ce=0.4)
SCALE = torch.tensor(0.25)
"""What the loss is multiplied by before the backward pass, as a mean over rows does."""


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def drawn(kind: str, num_rows: int, vocab_size: int, temperature: float = 1.0) -> SparseTargets:
    config = (
        TopKConfig(kind="top_k", k=4, temperature=temperature)
        if kind == "top_k"
        else ThresholdConfig(tau=0.1, temperature=temperature)
    )
    return draw(2 * torch.randn(num_rows, vocab_size), row_uniforms(0, 0, num_rows), config)


def targets_of(
    sparse: SparseTargets, vocab_size: int, chunk_rows: int = 512, weights: LossWeights = MIX
) -> HeadTargets:
    labels_R = torch.randint(0, vocab_size, (sparse.num_rows,))
    return HeadTargets(labels_R, sparse, weights, vocab_size, chunk_rows)


def fused(
    linear: nn.Linear, hidden_RD: Tensor, targets: HeadTargets
) -> tuple[Tensor, list[Tensor], LossRows]:
    """Loss; scaled gradients of hidden states, weight and (if there is one) bias; rows."""
    inputs = [hidden_RD.clone().requires_grad_(), *linear.parameters()]
    loss, rows = DistillationHead.adopt(linear).loss(inputs[0], targets)
    return loss.detach(), list(torch.autograd.grad(loss, inputs, SCALE)), rows


def plain(
    linear: nn.Linear, hidden_RD: Tensor, targets: HeadTargets
) -> tuple[Tensor, list[Tensor]]:
    """The same by way of all logits and autograd."""
    inputs = [hidden_RD.clone().requires_grad_(), *linear.parameters()]
    logits_RV = linear(inputs[0])[:, : targets.vocab_size]
    loss = distillation_loss(logits_RV, targets.labels_R, targets.sparse, targets.weights)
    return loss.detach(), list(torch.autograd.grad(loss, inputs, SCALE))


def assert_near(found: list[Tensor], truth: list[Tensor], atol: float = 2e-6) -> None:
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_rows", "chunk_rows"), [(20, 1), (20, 7), (20, 20), (20, 99), (0, 7)])
@TEMPERATURES
@KINDS
def test_fused_loss_is_the_plain_one_in_value_and_gradients(
    kind: str, temperature: float, num_rows: int, chunk_rows: int, bias: bool
) -> None:
    linear, hidden_RD = nn.Linear(8, 50, bias=bias), torch.randn(num_rows, 8)
    sparse = drawn(kind, 20, 50, temperature).keep_rows(torch.arange(20) < num_rows)
    targets = targets_of(sparse, 50, chunk_rows)
    loss, gradients, rows = fused(linear, hidden_RD, targets)
    truth, true_gradients = plain(linear, hidden_RD, targets)
    assert loss.dtype == torch.float32
    assert_near([loss, *gradients], [truth, *true_gradients])
    assert_near([0.7 * rows.kl_R.sum() + 0.4 * rows.ce_R.sum()], [loss])
    first_R = sparse.ids_N[sparse.counts_R.cumsum(0) - sparse.counts_R]
    assert torch.equal(rows.agrees_R, linear(hidden_RD).argmax(-1) == first_R)


@TEMPERATURES
@KINDS
def test_float64_gradients_are_finite_differences_of_the_reference(
    kind: str, temperature: float
) -> None:
    num_rows, width, vocab_size = 3, 4, 11
    linear = nn.Linear(width, vocab_size).double()
    hidden_RD = torch.randn(num_rows, width, dtype=torch.float64)
    targets = targets_of(drawn(kind, num_rows, vocab_size, temperature), vocab_size, 2)

    def truth(flat: list[float]) -> float:
        rows = [flat[start : start + width] for start in range(0, len(flat) - vocab_size, width)]
        hidden, weight, bias = rows[:num_rows], rows[num_rows:], flat[-vocab_size:]
        logits = [reference.linear(row, weight, bias) for row in hidden]
        return reference.loss(logits, targets.labels_R.tolist(), targets.sparse, 0.7, 0.4)

    loss, gradients, _ = fused(linear, hidden_RD, targets)
    parameters = [parameter.detach() for parameter in linear.parameters()]
    flat = torch.cat([part.flatten() for part in [hidden_RD, *parameters]]).tolist()
    assert float(loss) == pytest.approx(truth(flat), rel=1e-6)
    found = torch.cat([gradient.flatten() / SCALE for gradient in gradients])
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(reference.slopes(truth, flat), rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@TEMPERATURES
@KINDS
def test_error_is_no_worse_than_that_of_the_naive_loss_in_the_same_dtype(
    kind: str, temperature: float, dtype: torch.dtype
) -> None:
    linear, hidden_RD = nn.Linear(16, 50, bias=False).to(dtype), torch.randn(40, 16).to(dtype)
    targets = targets_of(drawn(kind, 40, 50, temperature), 50, chunk_rows=8)
    truth, true_gradients = plain(copy.deepcopy(linear).float(), hidden_RD.float(), targets)
    loss, gradients, _ = fused(linear, hidden_RD, targets)
    naive, naive_gradients = plain(linear, hidden_RD, targets)
    assert abs(loss - truth) <= abs(naive - truth) + 1e-6 * abs(truth)
    for ours, theirs, exact in zip(gradients, naive_gradients, true_gradients, strict=True):
        assert ours.dtype == dtype
        rounding = torch.finfo(dtype).eps * float(exact.abs().max())
        assert (ours - exact).abs().max() <= (theirs - exact).abs().max() + rounding


def test_bias_gradient_does_not_suffer_from_many_chunks() -> None:
    linear, hidden_RD = nn.Linear(16, 50).bfloat16(), torch.randn(256, 16).bfloat16()
    targets = targets_of(drawn("threshold", 256, 50), 50, chunk_rows=1)
    truth = plain(copy.deepcopy(linear).float(), hidden_RD.float(), targets)[1][-1]
    naive, ours = plain(linear, hidden_RD, targets)[1][-1], fused(linear, hidden_RD, targets)[1][-1]
    assert (ours - truth).abs().max() <= 2 * (naive - truth).abs().max()


def test_autocast_computes_in_its_dtype_and_leaves_gradients_in_that_of_the_parameters() -> None:
    linear, hidden_RD = nn.Linear(16, 50, bias=False), torch.randn(40, 16)
    targets = targets_of(drawn("threshold", 40, 50), 50, chunk_rows=8)
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients, _ = fused(linear, hidden_RD, targets)
    low = fused(copy.deepcopy(linear).bfloat16(), hidden_RD.bfloat16(), targets)
    assert loss == low[0]
    assert_near(gradients, [gradient.float() for gradient in low[1]], atol=0.02)


@TEMPERATURES
@KINDS
def test_padded_columns_have_no_probability_and_no_gradient(kind: str, temperature: float) -> None:
    linear, hidden_RD = nn.Linear(8, 64), torch.randn(20, 8)
    nn.init.constant_(linear.bias[50:], 30.0)  # would take all the probability
    targets = targets_of(drawn(kind, 20, 50, temperature), 50, chunk_rows=6)
    loss, gradients, _ = fused(linear, hidden_RD, targets)
    truth, true_gradients = plain(linear, hidden_RD, targets)
    assert_near([loss, *gradients], [truth, *true_gradients])
    assert not any(gradient[50:].any() for gradient in gradients[1:])


@KINDS
def test_rows_without_entries_cost_no_kl_and_pull_nothing(kind: str) -> None:
    linear, hidden_RD, mask_R = nn.Linear(8, 50), torch.randn(10, 8), torch.arange(10) % 3 != 1
    nn.init.constant_(linear.bias[:1], 5)  # 0, the likeliest here, is not the teacher's choice
    sparse = drawn(kind, 10, 50).keep_rows(mask_R).scatter_rows(mask_R)
    targets = targets_of(sparse, 50, 4, LossWeights(kl=1, ce=0))
    _, (hidden_gradient_RD, *_), rows = fused(linear, hidden_RD, targets)
    assert rows.kl_R[~mask_R].tolist() == [0, 0, 0]
    assert not rows.agrees_R[~mask_R].any()
    assert torch.equal(hidden_gradient_RD.any(-1), mask_R)


@pytest.mark.parametrize(("gap", "kl"), [(3, 1), (15, 1), (15, 100), (99, 1), (99, 100)])
def test_student_that_is_sure_of_the_kept_ids_has_exact_gradients_there(
    gap: float, kl: float
) -> None:
    identity, sparse = nn.Linear(20, 20, bias=False), drawn("top_k", 6, 20)
    nn.init.eye_(identity.weight)
    kept = (sparse.row_of_entry(), sparse.ids_N)
    logits_RV = torch.randn(6, 20).index_put(kept, torch.tensor(1.0 * gap), accumulate=True)
    targets = targets_of(sparse, 20, weights=LossWeights(kl, 0))
    gradient_RV = fused(identity, logits_RV, targets)[1][0]
    assert gradient_RV.isfinite().all()
    assert_near([gradient_RV[kept]], [plain(identity, logits_RV, targets)[1][0][kept]], 1e-6 * kl)


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """Records the most elements of any tensor that an operation makes, views aside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [] if func.is_view else tree_leaves(result)
        sizes = [leaf.numel() for leaf in made if isinstance(leaf, Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


@TEMPERATURES
@KINDS
def test_no_tensor_holds_the_logits_of_more_than_a_chunk(kind: str, temperature: float) -> None:
    linear, hidden_RD = nn.Linear(8, 100), torch.randn(64, 8)
    targets = targets_of(drawn(kind, 64, 100, temperature), 100, chunk_rows=12)
    with Largest() as ours:
        fused(linear, hidden_RD, targets)
    with Largest() as theirs:
        plain(linear, hidden_RD, targets)
    assert (ours.num_elements, theirs.num_elements) == (12 * 100, 64 * 100)


def test_without_gradients_none_are_computed() -> None:
    head = DistillationHead.adopt(nn.Linear(80, 100))
    targets = targets_of(drawn("threshold", 64, 100), 100, chunk_rows=12)
    with torch.no_grad(), Largest() as largest:
        head.loss(torch.randn(64, 80), targets)
    assert largest.num_elements < 80 * 100


def tiny_llama(*, tie: bool = False) -> Any:
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tie))


@pytest.mark.parametrize("tie", [True, False])
def test_wrapped_student_keeps_its_parameters_gradients_and_files(
    tie: bool, tmp_path: Path
) -> None:
    student, ids_BT = tiny_llama(tie=tie), torch.randint(0, 50, (2, 9))
    targets = targets_of(drawn("threshold", 16, 50), 50, 5)
    mask_BT = (torch.arange(18) % 9 < 8).view(2, 9)
    logits_BTV, parameters = student(ids_BT).logits, dict(student.named_parameters())
    truth = distillation_loss(logits_BTV[mask_BT][:, :50], targets.labels_R, targets.sparse, MIX)
    true_gradients = torch.autograd.grad(truth, list(parameters.values()))

    model = DistillationModel(student)
    assert all(student.get_parameter(name) is value for name, value in parameters.items())
    head = student.get_output_embeddings()
    assert isinstance(head, DistillationHead)
    assert (head.weight is student.get_input_embeddings().weight) == tie
    loss, _ = model(ids_BT, torch.arange(9).expand(2, 9), mask_BT, targets)
    assert_near([loss.detach()], [truth.detach()])
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    assert_near(list(gradients), list(true_gradients), atol=1e-5)

    student.save_pretrained(tmp_path)
    again: Any = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids_BT).logits, logits_BTV)


def test_documents_in_packed_blocks_cost_what_they_cost_alone() -> None:
    model, lengths, sparse = DistillationModel(tiny_llama()), [5, 7, 2, 10], drawn("top_k", 20, 60)
    labels_R, ids_T = torch.randint(0, 60, (20,)), torch.randint(0, 60, (24,))
    restarting_T = torch.cat([torch.arange(length) for length in lengths])
    mask_T = torch.cat([torch.arange(length) < length - 1 for length in lengths])

    def values(tokens_T: Tensor, blocks: int, positions_T: Tensor = restarting_T) -> Tensor:
        rows_R = tokens_T[mask_T]
        targets = HeadTargets(labels_R[rows_R], sparse.keep_rows(rows_R), MIX, 60)
        inputs = [part[tokens_T].view(blocks, -1) for part in (ids_T, positions_T, mask_T)]
        rows: LossRows = model(*inputs, targets)[1]
        return torch.stack([rows.kl_R, rows.ce_R])

    documents_T, all_T = torch.arange(4).repeat_interleave(torch.tensor(lengths)), mask_T | True
    alone = torch.cat([values(documents_T == number, 1) for number in range(4)], dim=1)
    for blocks in (1, 2):
        torch.testing.assert_close(values(all_T, blocks), alone, rtol=0, atol=1e-5)
    assert float((values(all_T, 1, torch.arange(24)) - alone).abs().max()) > 1e-3


def test_students_without_a_plain_head_are_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    config = Gemma2Config(vocab_size=60, num_attention_heads=2, num_key_value_heads=1, **sizes)
    message = r"the student: gemma2 changes its logits .*\(final_logit_softcapping = 30"
    with pytest.raises(MismatchError, match=message):
        DistillationModel(Gemma2ForCausalLM(config))
    student = tiny_llama()
    student.set_output_embeddings(nn.Identity())
    with pytest.raises(MismatchError, match=r"output layer is Identity, expected nn\.Linear"):
        DistillationModel(student)
