"""Customary sets of tasks, by their names in lm-eval 0.4.13. No torch here.

A number beside a name is the number of few-shot examples that the set prescribes; None leaves it to
`evaluation.num_fewshot`, or else to the task.
"""

from typing import Literal

Preset = Literal["quick", "open_llm", "open_llm_v2", "multilingual", "offline"]

_OKAPI = ("de", "fr", "it", "pt", "hi", "es")
"""ARC and HellaSwag in other languages; there is no Thai one."""

_BELEBELE = ("deu_Latn", "fra_Latn", "ita_Latn", "por_Latn", "hin_Deva", "spa_Latn", "tha_Thai")

_LOCAL = (
    "hellaswag",
    "arc_easy",
    "arc_challenge",
    "piqa",
    "winogrande",
    "openbookqa",
    "sciq",
    "copa",
    "boolq",
    "lambada",
)

PRESETS: dict[Preset, tuple[tuple[str, int | None], ...]] = {
    "quick": tuple(
        (name, None) for name in ("arc_easy", "piqa", "winogrande", "openbookqa", "sciq")
    ),
    # Hugging Face's Open LLM Leaderboard, 2023 to 2024.
    "open_llm": (
        ("arc_challenge", 25),
        ("hellaswag", 10),
        ("mmlu", 5),
        ("truthfulqa_mc2", 0),
        ("winogrande", 5),
        ("gsm8k", 5),
    ),
    # Its second version, 2024 to 2025; the tasks of this group hold their numbers of examples.
    "open_llm_v2": (("leaderboard", None),),
    # German, French, Italian, Portuguese, Hindi, Spanish, Thai: as far as a benchmark has them.
    "multilingual": tuple(
        (name, None)
        for name in (
            *(f"arc_{language}" for language in _OKAPI),
            *(f"hellaswag_{language}" for language in _OKAPI),
            *(f"belebele_{language}" for language in _BELEBELE),
            *(f"xnli_{language}" for language in ("de", "fr", "hi", "es", "th")),
            *(f"xcopa_{language}" for language in ("it", "th")),
            *(f"mgsm_direct_{language}" for language in ("de", "fr", "es", "th")),
        )
    ),
    # Local copies that scripts/demo_assets.py makes.
    "offline": tuple((f"{name}_local", None) for name in _LOCAL),
}
"""Name -> tasks or groups, each with its few-shot examples."""

LOCAL_PRESETS = frozenset({"offline"})
"""Sets that lm-eval's stock tasks do not hold: `evaluation.include_path` names their folder."""
