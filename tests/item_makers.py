"""Items of imaginary models."""

from typing import Any

import numpy as np

from distill.evaluate.items import Aggregation, Items


def items(
    values: Any, weights: Any = None, aggregation: Aggregation = "mean", first: int = 0
) -> Items:
    """Items of documents `first`, `first` + 1, ..., whose hashes follow their numbers."""
    values_N = np.asarray(values, dtype=np.float64)
    weights_N = np.ones_like(values_N) if weights is None else np.asarray(weights, np.float64)
    ids_N = np.arange(first, first + len(values_N))
    return Items(
        doc_ids_N=ids_N,
        doc_hashes_N=np.array([f"h{at}" for at in ids_N], dtype="<U8"),
        sums_N2=np.stack([values_N, weights_N], axis=1),
        aggregation=aggregation,
    )


def answers(table: tuple[int, int, int, int]) -> tuple[Items, Items]:
    """Two models' answers: both right, first alone, second alone, both wrong."""
    pairs = np.repeat([[1, 1], [1, 0], [0, 1], [0, 0]], table, axis=0)
    return items(pairs[:, 0]), items(pairs[:, 1])


def rolling(seed: int, shift: float, num: int = 40) -> Items:
    """Texts whose log-likelihood per word is -3 + shift, roughly; lengths depend on no model."""
    words_N = np.random.default_rng(99).integers(5, 200, num)
    noise_N = np.random.default_rng(seed).normal(0, 0.2, num)
    return items(words_N * (-3 + shift + noise_N), words_N, "perplexity")
