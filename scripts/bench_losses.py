"""One training step of our head and loss beside the published losses of peers, in one run.

    .venv-peers/bin/python scripts/bench_losses.py [--quick] [--out results/bench_losses.json]

A step is: hidden states and weight of the head in, forward KL to a teacher and both gradients out,
all tensors in one dtype. scripts/peer_losses.py says what each way is. Those of peers get the
teacher's logits or, where they are fused, its hidden states and head: its forward is never
counted, but the fused ones apply its head inside the step (`teacher_head` is that product once).

`cpu_over_ours` (CPU time of the process) and `wall_over_ours` are over `distill_threshold` of the
same round; the ways alternate, on one thread: on an idle machine the two are the same, on a busy
one the CPU's is steady. `peak_bytes` are those of the step's tensors, without inputs and the
weight's gradient. `saved_bytes` lie between forward and backward, inputs left out; `gradient` of
them has the shape of hidden states or weight: it is a result made early. `teacher_bytes_per_row` is
what a step is given.
`value_error` and `gradient_error` are relative, to the same targets in float64; the two `off_dense`
to the whole distribution: 64 ids and a tail are another divergence, drawn targets scatter.
`exact_targets` has ours on targets that hold every id, a float32 sum of as many terms.
A peer that is missing or fails has an `error`. Needs `make peers`. Each case is printed as it is
done; the last line is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.files import write_json_atomically
from distill.head import HeadTargets
from distill.losses import LossWeights
from distill.targets import SparseTargets
from scripts.peer_losses import SEED, WAYS, Case, Loss, Step, Way, reference
from scripts.provenance import provenance, spread
from scripts.step_bytes import peak_bytes, saved_bytes

OURS = "distill_threshold"
HEAD = "teacher_head"
HIDDEN_SIZE = 576
CASES = [(49_152, torch.float32), (49_152, torch.bfloat16), (128_256, torch.bfloat16)]
EXACT_SIZES = (512, 49_152)
PACKAGES = ("torch", "trl", "torchtune", "torchao", "liger-kernel", "transformers")
FAILURES = (ImportError, AttributeError, RuntimeError, TypeError, ValueError, OSError)
"""What keeps a peer from running, and is told; a compiler's errors are RuntimeErrors."""

Seconds = tuple[float, float]
"""CPU's and wall clock's."""


def main() -> None:
    """Measure all cases, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first two cases, 128 rows")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    rows, rounds = (128, 1) if options.quick else (1024, 3)
    torch.set_num_threads(1)
    found = []
    for vocab_size, dtype in CASES[:2] if options.quick else CASES:
        found.append(measure(Case(vocab_size, HIDDEN_SIZE, rows, dtype), WAYS, rounds))
        print(json.dumps(found[-1]), flush=True)
    result = {
        "cases": found,
        "exact_targets": [exact(size) for size in EXACT_SIZES],
        "paths": {name: way.path for name, way in WAYS.items()},
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "versions": {name: version_of(name) for name in PACKAGES},
        **provenance(SEED),
    }
    if options.out:
        write_json_atomically(options.out, result)
    print(json.dumps(result))


def version_of(package: str) -> str | None:
    """Of an installed package; None of one that is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure(case: Case, ways: dict[str, Way], rounds: int) -> dict[str, Any]:
    """All figures of one case; each way has them or an error."""
    step = Step(case)
    found: dict[str, dict[str, Any]] = {}
    losses: dict[str, Loss] = {}
    expected = Expected(step)
    for name, way in ways.items():
        try:
            loss = way.load()
            found[name] = expected.errors_of(way, loss)
            found[name] |= per_logit("saved", saved_bytes(partial(loss, step), inputs(step)), case)
            peak = peak_bytes(partial(gradients, loss, step)) - step.weight_VD.nbytes
            found[name] |= per_logit("peak", {"": peak}, case)
            losses[name] = loss
        except FAILURES as error:
            found[name] = {"error": one_line(error)}
            continue
        held = step.teacher_bytes(way.teacher) / case.rows
        found[name]["teacher_bytes_per_row"] = round(held, 1)
    times = interleaved(step, losses, rounds)
    for name in losses:
        found[name] |= over(times[name], times[OURS])
    head = over(times[HEAD], times[OURS])
    return {
        "vocab_size": case.vocab_size,
        "hidden_size": case.hidden_size,
        "rows": case.rows,
        "dtype": str(case.dtype).removeprefix("torch."),
        "cpu_seconds_of_ours": round(statistics.median(cpu for cpu, _ in times[OURS]), 3),
        "teacher_head": head,
        "ways": found,
    }


def one_line(error: Exception) -> str:
    """Kind and first line of what went wrong."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def inputs(step: Step) -> list[Tensor]:
    """What a loss is given and need not save."""
    teacher = [step.teacher_hidden_RD, step.teacher_weight_VD, step.teacher_logits_RV]
    sparse = [
        part
        for targets in step.sparse.values()
        for part in (targets.ids_N, targets.weights_N, targets.counts_R, targets.entropy_R)
    ]
    return [step.hidden_RD, step.weight_VD, step.labels_R, *teacher, *sparse]


def gradients(loss: Loss, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """One step: the loss, and its gradients in hidden states and weight."""
    mean = loss(step)
    grad_RD, grad_VD = torch.autograd.grad(mean, [step.hidden_RD, step.weight_VD])
    return mean.detach(), grad_RD, grad_VD


class Expected:
    """What float64 makes of the whole distribution and of our targets."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.dense_kl, self.entropy, self.dense_grad_RD = reference(step)
        self.of_kind = {kind: reference(step, targets) for kind, targets in step.sparse.items()}

    def errors_of(self, way: Way, loss: Loss) -> dict[str, float]:
        """Differences of one way's loss and gradient in the hidden states, relative."""
        value, grad_RD, _ = gradients(loss, self.step)
        if way.value == "kl_plus_entropy":
            value = value.double() - self.entropy
        dense = (self.dense_kl, self.entropy, self.dense_grad_RD)
        kl, _, expected_RD = self.of_kind.get(way.teacher, dense)
        return {
            "value_error": relative(value, kl),
            "gradient_error": relative(grad_RD, expected_RD),
            "value_off_dense": relative(value, self.dense_kl),
            "gradient_off_dense": relative(grad_RD, self.dense_grad_RD),
        }


def relative(found: Tensor, expected: Tensor) -> float:
    """Length of the difference over the length of what is expected."""
    difference = (found.double() - expected).norm() / expected.norm()
    return float(f"{float(difference):.3g}")


def interleaved(step: Step, losses: dict[str, Loss], rounds: int) -> dict[str, list[Seconds]]:
    """Times of each way in each round, and of the product with the teacher's head."""

    def seconds(work: Callable[[], object]) -> Seconds:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        return time.process_time() - cpu, time.perf_counter() - wall

    times: dict[str, list[Seconds]] = {name: [] for name in (*losses, HEAD)}
    for _ in range(rounds):
        for name, loss in losses.items():
            times[name].append(seconds(partial(gradients, loss, step)))
        times[HEAD].append(seconds(lambda: step.teacher_hidden_RD @ step.teacher_weight_VD.T))
    return times


def over(times: list[Seconds], ours: list[Seconds]) -> dict[str, dict[str, float]]:
    """Ratios of the rounds, by both clocks."""
    found = {}
    for clock, name in enumerate(("cpu_over_ours", "wall_over_ours")):
        found[name] = spread(
            [mine[clock] / base[clock] for mine, base in zip(times, ours, strict=True)]
        )
    return found


def per_logit(what: str, counted: dict[str, int], case: Case) -> dict[str, float]:
    """Bytes, and bytes a logit."""
    logits = case.rows * case.vocab_size
    found: dict[str, float] = {}
    for part, num_bytes in counted.items():
        found[f"{what}{part}_bytes"] = num_bytes
        found[f"{what}{part}_bytes_per_logit"] = round(num_bytes / logits, 3)
    return found


def exact(vocab_size: int, rows: int = 8) -> dict[str, float]:
    """How far our head, on targets that hold every id, is from the dense divergence; float32."""
    step = Step(Case(vocab_size, HIDDEN_SIZE, rows, torch.float32))
    probs_RV = step.teacher_logits_RV.double().softmax(-1)
    counts_R = torch.full((rows,), vocab_size)
    targets = SparseTargets(
        ids_N=torch.arange(vocab_size).repeat(rows),
        weights_N=probs_RV.float().flatten(),
        counts_R=counts_R,
        num_head_R=counts_R,
        tail_mass_R=torch.zeros(rows),
        entropy_R=-torch.xlogy(probs_RV, probs_RV).sum(-1).float(),
    )
    wanted = HeadTargets(step.labels_R, targets, LossWeights(kl=1, ce=0), vocab_size)
    mean = step.head.loss(step.hidden_RD, wanted)[0] / rows
    (grad_RD,) = torch.autograd.grad(mean, step.hidden_RD)
    kl, _, expected_RD = reference(step)
    return {
        "vocab_size": vocab_size,
        "rows": rows,
        "value_error": relative(mean.detach(), kl),
        "gradient_error": relative(grad_RD, expected_RD),
    }


if __name__ == "__main__":
    main()
