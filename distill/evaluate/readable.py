"""What a reader of disagreements needs of one document: prompt, choices, target, response."""

from collections.abc import Mapping, Sequence
from typing import Any

_PROMPT_CHARS = 1500
"""The end of a prompt, where the question stands after the examples."""

_TEXT_CHARS = 1000
"""The beginning of a target or of a generated text."""


def readable(sample: Mapping[str, Any], output_type: str, gold: Any) -> dict[str, Any]:
    """Return prompt, choices, target and response of a document as texts.

    Args:
        sample: One of lm-eval's logged samples.
        output_type: The task's: multiple_choice, loglikelihood, loglikelihood_rolling or
            generate_until.
        gold: The right answer: its number among the choices, its text, or a list of either.

    Returns:
        `prompt` is what the model saw before it was to answer, its last 1,500 characters; empty
        where a whole text is scored. `choices` is None where there are none. `response` is the
        choice of the highest log-likelihood (not normalised by length), or the generated text; for
        a given continuation, that continuation if the model would have generated it. Else None.
    """
    requests = [tuple(map(str, arguments[:2])) for arguments in sample["arguments"]]
    prompt, choices, response = requests[0][0], None, None
    if output_type == "multiple_choice":
        prompt, choices = _split(requests)
        likelihoods = [answers[0][0] for answers in sample["resps"][: len(choices)]]
        response = choices[max(range(len(choices)), key=likelihoods.__getitem__)]
    elif output_type == "loglikelihood_rolling":
        prompt = ""
    elif output_type == "loglikelihood" and len(requests) == 1:
        _, is_greedy = sample["resps"][0][0]
        response = requests[0][1].strip() if is_greedy else None
    elif output_type == "generate_until":
        response = str(sample["resps"][0][0])
    return {
        "prompt": prompt if len(prompt) <= _PROMPT_CHARS else f"…{prompt[-_PROMPT_CHARS:]}",
        "choices": None if choices is None else [_cut(choice) for choice in choices],
        "target": _cut(_text(gold, choices).strip()),
        "response": None if response is None else _cut(response),
    }


def _split(requests: Sequence[tuple[str, ...]]) -> tuple[str, list[str]]:
    """Return what all choices have in common before them, and the choices."""
    half = len(requests) // 2
    if half and all(context == "" for context, _ in requests[half:]) and requests[0][0]:
        requests = requests[:half]  # for acc_mutual_info, every choice is also scored by itself
    contexts = [context for context, _ in requests]
    if len(set(contexts)) == 1:
        return contexts[0], [continuation.strip() for _, continuation in requests]
    # As in Winogrande, the choice stands in the context, and what follows it is scored.
    alike = [len(set(letters)) == 1 for letters in zip(*contexts, strict=False)]
    shared = contexts[0][: [*alike, False].index(False)]
    start = max(shared.rfind(" "), shared.rfind("\n")) + 1
    return shared[:start].rstrip(" "), ["".join(request)[start:].strip() for request in requests]


def _text(gold: Any, choices: Sequence[str] | None) -> str:
    if isinstance(gold, list | tuple):
        return " | ".join(_text(one, choices) for one in gold)
    if isinstance(gold, int) and choices is not None and 0 <= gold < len(choices):
        return choices[gold]
    return str(gold)


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_CHARS else f"{text[:_TEXT_CHARS]}…"
