"""Scores document by document: what adds up, what does not, and what belongs together."""

from pathlib import Path
from typing import Any

import pytest
from lm_eval.api import metrics as lm_eval_metrics

from distill.errors import EvalError
from distill.evaluate.items import NotPairedError, align, items_of, read_samples
from tests.item_makers import items


def sample(doc_id: int, **metrics: Any) -> dict[str, Any]:
    return {"doc_id": doc_id, "doc_hash": f"h{doc_id}", "metrics": metrics, "prompt": "unknown"}


def test_items_add_up_as_lm_eval_adds_them() -> None:
    pairs = [(-31.5, 10), (-12.25, 7), (-80.0, 31)]
    expected = {
        "word_perplexity": lm_eval_metrics.weighted_perplexity(pairs),
        "byte_perplexity": lm_eval_metrics.weighted_perplexity(pairs),
        "bits_per_byte": lm_eval_metrics.bits_per_byte(pairs),
    }
    for metric, value in expected.items():
        samples = [sample(at, **{metric: list(pair)}) for at, pair in enumerate(pairs)]
        assert items_of(samples, metric, value).value == pytest.approx(value)
    samples = [sample(at, perplexity=pair[0] / 10) for at, pair in enumerate(pairs)]
    value = lm_eval_metrics.perplexity([pair[0] / 10 for pair in pairs])
    assert items_of(samples, "perplexity", value).value == pytest.approx(value)
    filtered = [sample(at, **{"exact_match,strict": at % 2}) for at in range(4)]
    assert items_of(filtered[::-1], "exact_match,strict", 0.5).sums_N2[:, 0].tolist() == [0, 1] * 2


@pytest.mark.parametrize(
    ("values", "metric", "value", "reason"),
    [
        ([1.0, 2.0, 6.0], "median", 2.0, "not the mean of those"),
        ([[0, 1], [1, 1]], "f1", 0.7, "no numbers"),
        ([["a", "b"], ["c", "d"]], "bleu", 3.0, "no numbers"),
        ([1.0, None], "acc", 1.0, "no finite value"),
        ([[None, 3], [-2.0, 3]], "word_perplexity", 2.0, "no finite value"),
        ([1.0, 0.0], "acc", None, "the value is not finite"),
        ([], "acc", 0.5, "were not kept"),
    ],
)
def test_what_cannot_be_paired_says_why(
    values: list[Any], metric: str, value: float | None, reason: str
) -> None:
    samples = [sample(at, **{metric: item}) for at, item in enumerate(values)]
    with pytest.raises(NotPairedError, match=reason):
        items_of(samples, metric, value)


def test_documents_that_differ_are_refused_with_both_sides() -> None:
    left, right = items([1, 0, 1]), items([1, 0, 1])
    right.doc_hashes_N[1] = "other"
    with pytest.raises(EvalError, match=r"1 of 3 documents differ") as caught:
        align([("model", left), ("baseline", right)], "task")
    assert "model     document 1  doc_hash h1\n" in str(caught.value)
    assert "baseline  document 1  doc_hash other\n" in str(caught.value)


def test_unequal_documents_are_paired_only_where_asked_for() -> None:
    sides = [("model", items([1, 0, 1, 0])), ("baseline", items([0, 1, 1], first=2))]
    with pytest.raises(EvalError, match=r"All share 2"):
        align(sides, "task")
    model, baseline = align(sides, "task", allow_mixed=True)
    assert model.doc_ids_N.tolist() == baseline.doc_ids_N.tolist() == [2, 3]
    assert model.sums_N2[:, 0].tolist() == [1, 0]
    with pytest.raises(NotPairedError, match="share no document"):
        align([sides[0], ("far", items([1], first=9))], "task", allow_mixed=True)


def test_a_damaged_file_of_samples_is_named(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    with pytest.raises(EvalError, match=r"task\.json cannot be read: FileNotFoundError"):
        read_samples(path)
    path.write_text('{"samples": [{"doc_id": 0}]}')
    with pytest.raises(EvalError, match="an entry lacks doc_id, doc_hash or metrics"):
        read_samples(path)
    path.with_suffix(".jsonl").write_text("{")
    with pytest.raises(EvalError, match=r"task\.jsonl cannot be read: JSONDecodeError"):
        read_samples(path.with_suffix(".jsonl"))
