"""Time and memory of the fused KL + CE step against plain cross-entropy.

    python scripts/bench_head.py [--quick] [--out results/bench_head.json]

One step is: hidden states and weight of the head in, loss and both gradients out, as in training:
float32 weight, bfloat16 autocast. It is compared, at several numbers of tokens and two
vocabularies, with

    dense_ce     F.cross_entropy on all logits
    linear_ce    F.linear_cross_entropy, torch's own chunked one
    sparse_kl    KL + CE from sparse targets on all logits, by plain autograd (`distillation_loss`)

Targets are of the kind `threshold` at their usual size. The ways alternate; medians count, but of
`linear_ce`, many times slower on a CPU, there is one round. --quick knows dense_ce alone.
`time_over_best_ce` is ours over the faster of the first two. `memory_over_dense_ce` is the peak of
the step's tensors, without the weight's gradient (float32) and its copy in bfloat16, over that of
`dense_ce`. Both are the worst over all cases. The last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distill.config import ThresholdConfig
from distill.draw import draw
from distill.files import write_json_atomically
from distill.head import DistillationHead, HeadTargets
from distill.losses import LossWeights, distillation_loss
from distill.targets import SparseTargets, concatenate
from distill.uniforms import row_uniforms
from scripts.provenance import provenance
from scripts.step_bytes import peak_bytes

SEED = 0
WEIGHTS = LossWeights(kl=0.9, ce=0.1)
CASES = [(49_152, 576, 1024), (49_152, 576, 4096), (128_256, 1024, 1024), (128_256, 1024, 2048)]
QUICK = [(49_152, 576, 1024), (128_256, 1024, 1024)]
"""(vocabulary, hidden size, tokens)."""

Inputs = tuple[DistillationHead, Tensor, Tensor, SparseTargets]


def main() -> None:
    """Measure all cases, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    cases, rounds = (QUICK, 2) if options.quick else (CASES, 5)
    ways = ["distill", "dense_ce"] if options.quick else list(WAYS)
    found = [measure(*case, ways, rounds) for case in cases]
    result = {
        "time_over_best_ce": max(case["time_over_best_ce"] for case in found),
        "memory_over_dense_ce": max(case["memory_over_dense_ce"] for case in found),
        "cases": found,
        "rounds": rounds,
        **provenance(SEED),
    }
    if options.out:
        write_json_atomically(options.out, result)
    print(json.dumps(result))


def measure(
    vocab_size: int, hidden_size: int, num_tokens: int, ways: list[str], rounds: int
) -> dict[str, Any]:
    """Ratios of one case."""
    inputs = make_inputs(vocab_size, hidden_size, num_tokens)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(1 + rounds):
        for name in ways:
            if name != "linear_ce" or number == rounds:
                started = time.perf_counter()
                WAYS[name](inputs)
                times[name].append(time.perf_counter() - started)
    # The first round warms up.
    seconds = {name: statistics.median(values[1:] or values) for name, values in times.items()}
    weight_VD = inputs[0].weight
    aside = weight_VD.nbytes + 2 * weight_VD.numel()  # gradient, and copy in bfloat16
    peaks = {name: peak_bytes(partial(WAYS[name], inputs)) - aside for name in ways}
    best = min(seconds[name] for name in ("dense_ce", "linear_ce") if name in ways)
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "tokens": num_tokens,
        "time_over_best_ce": round(seconds["distill"] / best, 3),
        "memory_over_dense_ce": round(peaks["distill"] / peaks["dense_ce"], 3),
        "time_over_distill": {n: round(s / seconds["distill"], 3) for n, s in seconds.items()},
        "peak_bytes": peaks,
    }


def make_inputs(vocab_size: int, hidden_size: int, num_tokens: int) -> Inputs:
    """A head, hidden states, labels, and targets of teachers as sure as real ones."""
    torch.manual_seed(SEED)
    linear = nn.Linear(hidden_size, vocab_size, bias=False)
    hidden_RD = torch.randn(num_tokens, hidden_size, dtype=torch.bfloat16).requires_grad_()
    parts = []
    for first in range(0, num_tokens, 256):
        rows = min(256, num_tokens - first)
        uniforms_R = row_uniforms(SEED, first, rows)
        parts.append(draw(4.3 * torch.randn(rows, vocab_size), uniforms_R, ThresholdConfig()))
    labels_R = torch.randint(0, vocab_size, (num_tokens,))
    return DistillationHead.adopt(linear), hidden_RD, labels_R, concatenate(parts)


def step(inputs: Inputs, loss: Callable[[DistillationHead, Tensor], Tensor]) -> None:
    """Loss and gradients, which are dropped."""
    head, hidden_RD = inputs[:2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = loss(head, hidden_RD) / len(hidden_RD)
    torch.autograd.grad(mean, [hidden_RD, head.weight])


def by_distill(inputs: Inputs) -> None:
    """KL + CE by the fused head."""
    _, _, labels_R, targets = inputs
    wanted = HeadTargets(labels_R, targets, WEIGHTS, inputs[0].out_features)
    step(inputs, lambda head, hidden_RD: head.loss(hidden_RD, wanted)[0])


def by_dense_ce(inputs: Inputs) -> None:
    """CE on all logits."""
    labels_R = inputs[2]
    step(inputs, lambda head, h_RD: functional.cross_entropy(head(h_RD), labels_R, reduction="sum"))


def by_linear_ce(inputs: Inputs) -> None:
    """CE by torch's chunked function."""
    labels_R, options = inputs[2], torch.nn.LinearCrossEntropyOptions()

    def loss(head: DistillationHead, hidden_RD: Tensor) -> Tensor:
        fused: Any = functional.linear_cross_entropy
        weight_VD = head.weight.bfloat16()  # it is no function that autocast knows
        total: Tensor = fused(hidden_RD, weight_VD, labels_R, reduction="sum", options=options)
        return total

    step(inputs, loss)


def by_sparse_kl(inputs: Inputs) -> None:
    """KL + CE on all logits."""
    _, _, labels_R, targets = inputs
    step(inputs, lambda head, h_RD: distillation_loss(head(h_RD), labels_R, targets, WEIGHTS))


WAYS: dict[str, Callable[[Inputs], None]] = {
    "distill": by_distill,
    "dense_ce": by_dense_ce,
    "linear_ce": by_linear_ce,
    "sparse_kl": by_sparse_kl,
}


if __name__ == "__main__":
    main()
