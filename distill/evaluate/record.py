"""What of lm-eval's results goes into a score file: plain JSON values under plain names."""

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

_PREFERRED = ("acc_norm", "acc", "exact_match")
"""Main metric of a task that has several, first match."""


def metrics_of(
    results: Mapping[str, Any], higher_is_better: Mapping[str, bool | None]
) -> dict[str, dict[str, Any]]:
    """Collect the metrics of one task, in lm-eval's order.

    Args:
        results: Its entry in lm-eval's `results`: `METRIC,FILTER` and `METRIC_stderr,FILTER`.
        higher_is_better: Its entry in lm-eval's `higher_is_better`.

    Returns:
        Name -> {value, stderr, higher_is_better}; a value or an error that is not finite is None.
    """
    metrics = {}
    for key, value in results.items():
        metric, comma, choice = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            metrics[_name(metric, choice)] = {
                "value": _finite(value),
                "stderr": _finite(results.get(f"{metric}_stderr,{choice}")),
                "higher_is_better": higher_is_better.get(metric),
            }
    return metrics


def samples_of(
    samples: Iterable[Mapping[str, Any]],
    texts_of: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> list[dict[str, Any]]:
    """Collect the metric values of each document and its texts, sorted by `doc_id`.

    lm-eval lists a document once for each filter; here it has one entry with all metrics.

    Args:
        samples: What lm-eval has logged of one task.
        texts_of: Returns what a reader needs of a sample, from `readable`, or nothing.
    """
    documents: dict[int, dict[str, Any]] = {}
    for sample in samples:
        doc_id = sample["doc_id"]
        if doc_id not in documents:
            known = {"doc_id": doc_id, "doc_hash": sample["doc_hash"], "metrics": {}}
            documents[doc_id] = known | texts_of(sample)
        for metric in sample["metrics"]:
            documents[doc_id]["metrics"][_name(metric, sample["filter"])] = _plain(sample[metric])
    return [documents[doc_id] for doc_id in sorted(documents)]


def main_metric(names: Iterable[str]) -> str:
    """Choose the metric that stands for a task in a table.

    Raises:
        ValueError: the task has no metric.
    """
    names = list(names)
    for wanted in _PREFERRED:
        for name in names:
            if name.partition(",")[0] == wanted:
                return name
    perplexities = [name for name in names if "perplexity" in name]
    if not names:
        raise ValueError("lm-eval returned no metric; give the task a metric_list")
    return (perplexities or names)[0]


def summary(record: Mapping[str, Any]) -> str:
    """Put the main metric into words, and what is wrong with the scores if anything is."""
    main = record["metrics"][record["main_metric"]]
    value = "not finite" if main["value"] is None else f"{main['value']:.4g}"
    error = "" if main["stderr"] is None else f" +- {main['stderr']:.2g}"
    text = f"{record['main_metric']} {value}{error} on {record['num_documents']:,} documents"
    infinite = [name for name, metric in record["metrics"].items() if metric["value"] is None]
    if infinite:
        text += f"; not finite: {', '.join(infinite)}"
    if record["num_truncated"]:
        text += f"; {record['num_truncated']:,} prompts did not fit into max_length and were cut"
    return text


def _name(metric: str, choice: str) -> str:
    return metric if choice == "none" else f"{metric},{choice}"


def _finite(value: object) -> float | None:
    # numpy's numbers are Real; a missing standard error is the text "N/A".
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Real):
        return _finite(value)
    return value if value is None else str(value)
