import pytest

from distill.evaluate.readable import readable
from distill.evaluate.record import main_metric, metrics_of, samples_of


def test_metric_names_lose_only_the_filter_none() -> None:
    row = {
        "alias": "gsm8k",
        "sample_len": 2,
        "exact_match,strict-match": 0.5,
        "exact_match_stderr,strict-match": "N/A",
        "acc,none": float("nan"),
        "acc_stderr,none": 0.1,
    }
    metrics = metrics_of(row, {"exact_match": True, "acc": True})
    assert metrics == {
        "exact_match,strict-match": {"value": 0.5, "stderr": None, "higher_is_better": True},
        "acc": {"value": None, "stderr": 0.1, "higher_is_better": True},
    }


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["acc", "acc_norm"], "acc_norm"),
        (["perplexity", "acc"], "acc"),
        (["f1", "exact_match,strict-match"], "exact_match,strict-match"),
        (["bits_per_byte", "word_perplexity"], "word_perplexity"),
        (["f1", "mcc"], "f1"),
    ],
)
def test_main_metric_is_the_customary_one(names: list[str], expected: str) -> None:
    assert main_metric(names) == expected


def logged(doc_id: int, name: str, metric: str, value: object) -> dict[str, object]:
    """What lm-eval logs of one document under one filter."""
    return {
        "doc_id": doc_id,
        "doc_hash": "ab"[doc_id],
        "filter": name,
        "metrics": [metric],
        metric: value,
        "arguments": [(f"prompt {doc_id}", {"until": ["."]})],
        "resps": [["said"]],
        "target": "meant",
    }


def test_filters_of_one_document_share_an_entry() -> None:
    samples = [
        logged(1, "x", "em", 1),
        logged(0, "none", "ppl", (-3.5, 7)),
        logged(1, "y", "em", 0),
    ]
    texts = {"choices": None, "target": "meant", "response": "said"}
    assert samples_of(samples, lambda s: readable(s, "generate_until", s["target"])) == [
        {"doc_id": 0, "doc_hash": "a", "metrics": {"ppl": [-3.5, 7.0]}, "prompt": "prompt 0"}
        | texts,
        {"doc_id": 1, "doc_hash": "b", "metrics": {"em,x": 1.0, "em,y": 0.0}, "prompt": "prompt 1"}
        | texts,
    ]


def test_long_prompts_keep_their_end_and_long_answers_their_beginning() -> None:
    sample = {"arguments": [("a" * 2000 + "question", {})], "resps": [["b" * 999 + "cde"]]}
    shown = readable(sample, "generate_until", "t" * 1001)
    assert shown["prompt"] == "…" + "a" * 1492 + "question"
    assert shown["response"] == "b" * 999 + "c…"
    assert shown["target"] == "t" * 1000 + "…"


@pytest.mark.parametrize(
    ("gold", "target"), [(1, "no"), ("no", "no"), ([0, 1], "yes | no"), (7, "7"), (True, "no")]
)
def test_the_right_answer_is_shown_as_text(gold: object, target: str) -> None:
    sample = {"arguments": [("q", " yes"), ("q", " no")], "resps": [[(-1, 0)], [(-2, 0)]]}
    assert readable(sample, "multiple_choice", gold) == {
        "prompt": "q",
        "choices": ["yes", "no"],
        "target": target,
        "response": "yes",
    }


def test_choices_are_counted_once_where_they_are_also_scored_without_context() -> None:
    sample = {
        "arguments": [("q", " yes"), ("q", " no"), ("", " yes"), ("", " no")],
        "resps": [[(-3, 0)], [(-2, 0)], [(-1, 0)], [(-9, 0)]],
    }
    shown = readable(sample, "multiple_choice", 0)
    assert (shown["choices"], shown["response"]) == (["yes", "no"], "no")


@pytest.mark.parametrize(("is_greedy", "response"), [(True, "mat"), (False, None)])
def test_a_given_continuation_is_the_response_if_the_model_would_say_it(
    is_greedy: bool, response: str | None
) -> None:
    sample = {"arguments": [("the cat sat on the", " mat")], "resps": [[(-1.0, is_greedy)]]}
    assert readable(sample, "loglikelihood", " mat") == {
        "prompt": "the cat sat on the",
        "choices": None,
        "target": "mat",
        "response": response,
    }
