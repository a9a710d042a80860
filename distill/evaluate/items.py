"""Scores of one model on the documents of one task, as arrays that can be paired. No torch here.

Shape suffixes: N documents, M documents that several models share.

Every metric that can be paired is a function of two sums over documents: r = sum a / sum w. A mean
has a: the document's value, w: 1. lm-eval's rolling perplexities have a: the log-likelihood, w: the
words or bytes of the document.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distill.errors import EvalError
from distill.evaluate.record import samples_of

FloatArray = NDArray[np.float64]

Aggregation = Literal["mean", "perplexity", "bits"]
"""r itself, exp(-r), or -r / ln 2."""

_OF_NUMBERS: dict[str, Aggregation] = {"perplexity": "perplexity"}
"""Metrics with one number a document that is not averaged as it is."""

_OF_PAIRS: dict[str, Aggregation] = {
    "word_perplexity": "perplexity",
    "byte_perplexity": "perplexity",
    "bits_per_byte": "bits",
}
"""Metrics with a log-likelihood in nats and a weight a document."""

_TOLERANCE = 1e-6
"""Relative; lm-eval adds up in another order."""


class NotPairedError(Exception):
    """A metric cannot be compared document by document; the text says why, for a note."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Items:
    """One metric of one model, document by document."""

    doc_ids_N: NDArray[np.int64]
    """Rising."""
    doc_hashes_N: NDArray[np.str_]
    """Of the documents, by lm-eval."""
    sums_N2: FloatArray
    """What a document adds to both sums, a and w."""
    aggregation: Aggregation

    @property
    def value(self) -> float:
        """The metric over all documents, in its own unit."""
        return float(aggregate(self.sums_N2.sum(axis=0), self.aggregation))

    @property
    def is_binary(self) -> bool:
        """Whether every document is either solved (1) or not (0)."""
        solved_N = self.sums_N2[:, 0]
        return self.aggregation == "mean" and bool(((solved_N == 0) | (solved_N == 1)).all())

    def at(self, doc_ids_M: NDArray[np.int64]) -> "Items":
        """Keep the documents `doc_ids_M`, all of which must be there."""
        rows_M = np.searchsorted(self.doc_ids_N, doc_ids_M)
        return replace(
            self,
            doc_ids_N=doc_ids_M,
            doc_hashes_N=self.doc_hashes_N[rows_M],
            sums_N2=self.sums_N2[rows_M],
        )


def aggregate(sums: FloatArray, aggregation: Aggregation) -> FloatArray:
    """Turn sums [..., 2] into the metric [...], infinite or NaN where it has no value."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.asarray(sums[..., 0] / sums[..., 1])
        if aggregation == "mean":
            return ratio
        return np.exp(-ratio) if aggregation == "perplexity" else -ratio / math.log(2)


def items_of(samples: Sequence[Mapping[str, Any]], metric: str, value: float | None) -> Items:
    """Take one metric out of the samples of a task.

    Args:
        samples: `{doc_id, doc_hash, metrics, ...}` of each document.
        metric: Its name, with lm-eval's filter if it has one.
        value: What lm-eval reports over all documents; the items must add up to it.

    Raises:
        NotPairedError: there are no items, they are no finite numbers, or `value` is not a mean or
            a perplexity of them (a median, a corpus BLEU).
    """
    if value is None:
        raise NotPairedError("the value is not finite")
    if not samples:
        raise NotPairedError("the documents were not kept")
    name = metric.partition(",")[0]
    aggregation = _OF_PAIRS.get(name) or _OF_NUMBERS.get(name, "mean")
    rows = [_terms(sample["metrics"].get(metric), name in _OF_PAIRS) for sample in samples]
    doc_ids_N = np.array([sample["doc_id"] for sample in samples], dtype=np.int64)
    order_N = np.argsort(doc_ids_N, kind="stable")
    items = Items(
        doc_ids_N=doc_ids_N[order_N],
        doc_hashes_N=np.array([str(sample["doc_hash"]) for sample in samples])[order_N],
        sums_N2=np.array(rows, dtype=np.float64)[order_N],
        aggregation=aggregation,
    )
    if (np.diff(items.doc_ids_N) == 0).any():
        raise NotPairedError("some documents are listed twice")
    if not math.isclose(items.value, value, rel_tol=_TOLERANCE, abs_tol=1e-12):
        raise NotPairedError(f"the value is not the {aggregation} of those on single documents")
    return items


def align(
    sides: Sequence[tuple[str, Items]], task: str, *, allow_mixed: bool = False
) -> list[Items]:
    """Bring several models' items to the same documents, in the same order.

    Args:
        sides: Name and items of each model.
        task: Its name, for messages.
        allow_mixed: Whether to take the documents that all share where some have more.

    Raises:
        EvalError: documents of one number differ in their hash; or some model has other documents
            than the rest, without `allow_mixed`.
        NotPairedError: they share no document.
    """
    shared_M = reduce(np.intersect1d, (items.doc_ids_N for _, items in sides))
    if not allow_mixed and any(len(items.doc_ids_N) != len(shared_M) for _, items in sides):
        raise EvalError(
            f"{task}: the models were scored on different documents and cannot be paired.\n"
            + "".join(f"  {name}: {len(items.doc_ids_N):,} documents\n" for name, items in sides)
            + f"  All share {len(shared_M):,}. --allow-mixed compares on these."
        )
    if not len(shared_M):
        raise NotPairedError("the models share no document")
    aligned = [items.at(shared_M) for _, items in sides]
    for (name, _), items in zip(sides, aligned, strict=True):
        _require_equal_hashes(task, (sides[0][0], aligned[0]), (name, items))
    return aligned


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Read the samples of a task, as stored, with whatever further keys they have.

    Args:
        path: A task file of ours, or `samples_TASK_TIME.jsonl` of lm-eval.

    Raises:
        EvalError: the file is gone, or is not what it should be.
    """
    try:
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").split("\n")  # no U+2028: texts hold it
            found = (_as_in_memory(json.loads(line)) for line in lines if line)
            return samples_of(found, lambda _: {})
        samples: list[dict[str, Any]] = json.loads(path.read_text()).get("samples", [])
        if all(sample.keys() >= {"doc_id", "doc_hash", "metrics"} for sample in samples):
            return samples
        problem = "an entry lacks doc_id, doc_hash or metrics"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise EvalError(
        f"the samples in {path} cannot be read: {problem}\n"
        "  Delete the file and evaluate again; finished scores of other tasks are kept."
    )


def _terms(value: Any, is_pair: bool) -> tuple[float, float]:
    numbers = value if is_pair and isinstance(value, list | tuple) else (value, 1.0)
    if len(numbers) != 2 or not all(isinstance(item, Real) for item in numbers):
        raise NotPairedError(
            "some documents have no finite value"
            if None in numbers
            else "the values on single documents are no numbers"
        )
    if not all(map(math.isfinite, numbers)):
        raise NotPairedError("some documents have no finite value")
    return float(numbers[0]), float(numbers[1])


def _require_equal_hashes(task: str, left: tuple[str, Items], right: tuple[str, Items]) -> None:
    differs_M = left[1].doc_hashes_N != right[1].doc_hashes_N
    if not differs_M.any():
        return
    row = int(np.argmax(differs_M))
    width = max(len(left[0]), len(right[0]))
    lines = "".join(
        f"  {name:<{width}}  document {items.doc_ids_N[row]}  doc_hash {items.doc_hashes_N[row]}\n"
        for name, items in (left, right)
    )
    raise EvalError(
        f"{task}: {int(differs_M.sum()):,} of {len(differs_M):,} documents differ and cannot be "
        f"paired; the first:\n{lines}"
        "  Score both models on the same revision of the data set: delete the older task file and "
        "run distill eval CONFIG again."
    )


def _as_in_memory(sample: dict[str, Any]) -> dict[str, Any]:
    """Undo what lm-eval does to a sample's requests before it writes them to a file."""
    requests = sample.get("arguments")
    if isinstance(requests, dict):
        sample["arguments"] = [list(request.values()) for request in requests.values()]
    return sample
