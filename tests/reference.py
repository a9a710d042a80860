"""Slow, obvious float64 twins of every formula: plain Python loops, nothing shared with distill."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill.targets import SparseTargets

Floats = Sequence[float]


@dataclass(frozen=True)
class Row:
    """One row of sparse targets, unpacked."""

    ids: list[int]
    weights: list[float]
    num_head: int
    tail_mass: float
    entropy: float

    @property
    def head(self) -> list[int]:
        return self.ids[: self.num_head]

    @property
    def tail(self) -> list[int]:
        return self.ids[self.num_head :]


def rows_of(targets: SparseTargets) -> list[Row]:
    ids, weights = targets.ids_N.tolist(), targets.weights_N.tolist()
    rows, first = [], 0
    for row in range(len(targets.counts_R)):
        last = first + int(targets.counts_R[row])
        rows.append(
            Row(
                ids=ids[first:last],
                weights=weights[first:last],
                num_head=int(targets.num_head_R[row]),
                tail_mass=float(targets.tail_mass_R[row]),
                entropy=float(targets.entropy_R[row]),
            )
        )
        first = last
    assert first == len(ids) == len(weights)
    return rows


# Distributions


def softmax(logits: Floats, temperature: float = 1.0) -> list[float]:
    top = max(logits)
    masses = [math.exp((logit - top) / temperature) for logit in logits]
    total = math.fsum(masses)
    return [mass / total for mass in masses]


def log_softmax(logits: Floats, temperature: float = 1.0) -> list[float]:
    scaled = [logit / temperature for logit in logits]
    log_total = log_sum_exp(scaled)
    return [logit - log_total for logit in scaled]


def log_sum_exp(values: Floats) -> float:
    top = max(values)
    return top + math.log(math.fsum(math.exp(value - top) for value in values))


def entropy(probs: Floats) -> float:
    return -math.fsum(p * math.log(p) for p in probs if p > 0)


# Losses of one row, nats


def dense_kl(teacher_probs: Floats, logits: Floats, temperature: float = 1.0) -> float:
    logq = log_softmax(logits, temperature)
    return math.fsum(
        p * (math.log(p) - logq[token]) for token, p in enumerate(teacher_probs) if p > 0
    )


def bucket_kl(row: Row, logits: Floats, temperature: float = 1.0) -> float:
    """KL over k + 1 outcomes: the k kept ids, and everything else as one."""
    logq = log_softmax(logits, temperature)
    logq_tail = log_sum_exp([logq[token] for token in range(len(logits)) if token not in row.ids])
    outcomes = [(w, logq[token]) for token, w in zip(row.ids, row.weights, strict=True)]
    outcomes.append((row.tail_mass, logq_tail))
    return math.fsum(p * (math.log(p) - log_student) for p, log_student in outcomes if p > 0)


def divergence(kind: str, w: float, row: Row, logits: Floats, temperature: float) -> float:
    """Any divergence over k + 1 outcomes (or over all, if nothing is outside)."""
    logq = log_softmax(logits, temperature)
    rest = [logq[token] for token in range(len(logits)) if token not in row.ids]
    outcomes = [(t, math.exp(logq[token])) for token, t in zip(row.ids, row.weights, strict=True)]
    if rest:
        outcomes.append((row.tail_mass, math.exp(log_sum_exp(rest))))

    def kl(left: float, right: float) -> float:
        return left * math.log(left / right) if left > 0 else 0.0

    terms: dict[str, Callable[[float, float], float]] = {
        "forward_kl": kl,
        "reverse_kl": lambda t, q: kl(q, max(t, 1e-10)),
        "jensen_shannon": lambda t, q: (
            w * kl(t, w * t + (1 - w) * q) + (1 - w) * kl(q, w * t + (1 - w) * q)
        ),
        "skewed_forward_kl": lambda t, q: kl(t, w * t + (1 - w) * q),
        "skewed_reverse_kl": lambda t, q: kl(q, w * q + (1 - w) * t),
        "total_variation": lambda t, q: abs(t - q) / 2,
    }
    return math.fsum(terms[kind](t, q) for t, q in outcomes)


def sparse_kl(row: Row, logits: Floats, temperature: float = 1.0) -> float:
    """sum_i w_i (-log q_i) - H(t), with the stored entropy."""
    logq = log_softmax(logits, temperature)
    terms = [-w * logq[token] for token, w in zip(row.ids, row.weights, strict=True)]
    return math.fsum(terms) - row.entropy


def cross_entropy(logits: Floats, label: int) -> float:
    return -log_softmax(logits)[label]


def loss(
    logits: Sequence[Floats], labels: Sequence[int], targets: SparseTargets, kl: float, ce: float
) -> float:
    """Sum over rows of kl * KL + ce * CE."""
    divergence = bucket_kl if targets.has_bucket else sparse_kl
    total = 0.0
    for row, row_logits, label in zip(rows_of(targets), logits, labels, strict=True):
        total += kl * divergence(row, row_logits, targets.temperature)
        total += ce * cross_entropy(row_logits, label)
    return total


def slopes(function: Callable[[list[float]], float], point: Floats) -> list[float]:
    """Gradient by central differences; exact to about 1e-8 for our losses."""
    step, found = 1e-4, []
    for place in range(len(point)):
        above, below = list(point), list(point)
        above[place] += step
        below[place] -= step
        found.append((function(above) - function(below)) / (2 * step))
    return found


def linear(hidden: Floats, weight: Sequence[Floats], bias: Floats) -> list[float]:
    return [
        math.fsum(h * w for h, w in zip(hidden, weights, strict=True)) + b
        for weights, b in zip(weight, bias, strict=True)
    ]


# Targets of one row


def top_k(probs: Floats, k: int) -> Row:
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    kept, rest = order[:k], order[k:]
    tail_mass = math.fsum(probs[token] for token in rest)
    return Row(kept, [probs[token] for token in kept], k, tail_mass, entropy(probs))


@dataclass(frozen=True)
class Threshold:
    """Who is head, and how the rest is drawn."""

    head: list[int]
    num_tail: int
    tail_mass: float

    @property
    def share(self) -> float:
        """Weight of every drawn id."""
        return self.tail_mass / self.num_tail if self.num_tail else 0.0

    def inclusion(self, prob: float) -> float:
        """Probability that a tail id of this probability is drawn."""
        return self.num_tail * prob / self.tail_mass


def threshold(probs: Floats, tau: float) -> Threshold:
    order = sorted(range(len(probs)), key=lambda token: (-probs[token], token))
    num_head = max(1, sum(p >= tau for p in probs))
    while True:
        rest = order[num_head:]
        tail_mass = math.fsum(probs[token] for token in rest)
        num_tail = math.ceil(tail_mass / tau)
        if num_tail == 0 or probs[rest[0]] <= tail_mass / num_tail:
            return Threshold(order[:num_head], num_tail, tail_mass)
        num_head += 1


def systematic(probs: Floats, plan: Threshold, uniform: float) -> list[int]:
    """Ids at the places (uniform + i) / m of the tail's cumulative sum, in id order."""
    tail = [token for token in range(len(probs)) if token not in plan.head]
    drawn = []
    for number in range(plan.num_tail):
        place = (uniform + number) / plan.num_tail * plan.tail_mass
        running = 0.0
        for token in tail:
            running += probs[token]
            if running > place:
                drawn.append(token)
                break
    return drawn


# Random numbers


def splitmix64(state: int) -> int:
    """Steele, Lea, Flood 2014, as in Java 8: one step of the counter, then the finaliser."""
    mask = 2**64 - 1
    mixed = (state + 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return mixed ^ (mixed >> 31)


def row_uniforms(seed: int, block_id: int, num_rows: int) -> list[float]:
    key = splitmix64(splitmix64(seed % 2**64) ^ block_id)
    numbers = []
    for _ in range(num_rows):
        key = (key + 0x9E3779B97F4A7C15) % 2**64
        numbers.append((splitmix64(key) >> 11) / 2**53)
    return numbers


# Statistics


def clustered_mean(clusters: Sequence[Floats]) -> tuple[float, float]:
    """Mean over all values and its standard error, clusters as units (Cochran 1977, 6.3)."""
    num_values = sum(len(cluster) for cluster in clusters)
    mean = math.fsum(value for cluster in clusters for value in cluster) / num_values
    squares = [math.fsum(value - mean for value in cluster) ** 2 for cluster in clusters]
    factor = len(clusters) / (len(clusters) - 1)
    return mean, math.sqrt(factor * math.fsum(squares)) / num_values


def calibration_error(confidences: Floats, hits: Sequence[bool], num_bins: int = 10) -> float:
    """Expected calibration error with equally wide bins that include their upper ends."""
    total = 0.0
    for number in range(num_bins):
        low, high = number / num_bins, (number + 1) / num_bins
        rows = [
            (confidence, hit)
            for confidence, hit in zip(confidences, hits, strict=True)
            if low < confidence <= high or (number == 0 and confidence == 0)
        ]
        if rows:
            mean = math.fsum(confidence for confidence, _ in rows) / len(rows)
            accuracy = sum(hit for _, hit in rows) / len(rows)
            total += len(rows) / len(confidences) * abs(accuracy - mean)
    return total


# Coding


def decode(codes: Sequence[int], num_tail: int, tail_mass: float, step: float) -> list[float]:
    """Weights of one row: the head fills 1 - tail_mass, the tail shares tail_mass."""
    raw = [math.exp(-code * step) for code in codes]
    head = [(1 - tail_mass) * value / math.fsum(raw) for value in raw]
    return head + [tail_mass / num_tail for _ in range(num_tail)]


def coding_error(exact: Floats, decoded: Floats) -> float:
    return math.fsum(w * math.log(w / v) for w, v in zip(exact, decoded, strict=True) if w > 0)
