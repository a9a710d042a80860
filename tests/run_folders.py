"""Run folders with small scores whose table is known."""

import json
import math
import random
from pathlib import Path
from typing import Any

SETTINGS = {
    "limit": 500,
    "num_fewshot": None,
    "max_length": 2048,
    "dtype": "bfloat16",
    "lm_eval": "0.4.13",
    "task_definition": "d" * 64,
}


NUM_QUESTIONS, NUM_TEXTS = 500, 62


def accuracy(value: float, weights: str, **settings: Any) -> dict[str, Any]:
    """Scores on questions, of which a share `value` is solved; which, depends on the weights."""
    solved = set(random.Random(weights).sample(range(NUM_QUESTIONS), round(value * NUM_QUESTIONS)))
    return {
        "identity": {**SETTINGS, "weights": weights, "model": None, "seed": 0, **settings},
        "metrics": {
            "acc": {"value": value - 0.01, "stderr": 0.021, "higher_is_better": True},
            "acc_norm": {"value": value, "stderr": 0.022, "higher_is_better": True},
        },
        "main_metric": "acc_norm",
        "num_documents": NUM_QUESTIONS,
        "num_documents_total": 10042,
        "samples": [
            {"doc_id": at, "doc_hash": f"q{at}", "metrics": {"acc_norm": float(at in solved)}}
            for at in range(NUM_QUESTIONS)
        ],
    }


def word_perplexity(value: float | None, weights: str) -> dict[str, Any]:
    """Scores on texts of 10 words each, whose log-likelihoods scatter around their mean."""
    mean = None if value is None else -10 * math.log(value)
    scatter = random.Random(weights)
    half = [scatter.random() for _ in range(NUM_TEXTS // 2)]
    likelihoods = [mean and mean + away for part in half for away in (part, -part)]
    return {
        **accuracy(0.5, weights),
        "metrics": {"word_perplexity": {"value": value, "stderr": None, "higher_is_better": False}},
        "main_metric": "word_perplexity",
        "num_documents": NUM_TEXTS,
        "num_documents_total": NUM_TEXTS,
        "samples": [
            {"doc_id": at, "doc_hash": f"t{at}", "metrics": {"word_perplexity": [likelihood, 10]}}
            for at, likelihood in enumerate(likelihoods)
        ],
    }


def fidelity(ce: float, kl: float, agreement: float, weights: str, cache: str) -> dict[str, Any]:
    return {
        "identity": {"weights": weights, "cache": cache, "dtype": "bfloat16", "versions": {}},
        "num_rows": 12345,
        "ce_nats": {"value": ce, "stderr": 0.02},
        "kl_nats": {"value": kl, "stderr": math.nan},
        "agreement": {"value": agreement, "stderr": 0.003},
    }


def make_run(
    folder: Path,
    student_ce: float = 2.6,
    student_acc: float = 0.44,
    cache: str = "c",
    **settings: Any,
) -> Path:
    """Make a run whose teacher and initial student are the same in every run."""
    student = f"student of {folder.name}"
    models: dict[str, tuple[str, int, dict[str, dict[str, Any]]]] = {
        "teacher": (
            "teacher",
            1_711_000_000,
            {
                "fidelity": fidelity(2.0, 0.0, 1.0, "T", cache),
                "hellaswag": accuracy(0.55, "T", **settings),
                "wiki": word_perplexity(12.34, "T"),
            },
        ),
        "initial": (
            "initial",
            113_000_000,
            {
                "fidelity": fidelity(4.0, 2.5, 0.2, "I", cache),
                "hellaswag": accuracy(0.25, "I", **settings),
                "wiki": word_perplexity(None, "I"),
            },
        ),
        "student": (
            "student",
            113_000_000,
            {
                "fidelity": fidelity(student_ce, 0.4125, 0.701, student, cache),
                "hellaswag": accuracy(student_acc, student, **settings),
                "wiki": word_perplexity(23.456, student),
            },
        ),
        "baseline": ("other", 90_000_000, {"hellaswag": accuracy(0.6, "B", **settings)}),
    }
    listing = []
    for name, (role, num_parameters, files) in models.items():
        listing.append({"name": name, "role": role, "path": "p", "num_parameters": num_parameters})
        (folder / "eval" / name).mkdir(parents=True)
        for stem, record in files.items():
            (folder / "eval" / name / f"{stem}.json").write_text(json.dumps(record))
    (folder / "eval" / "models.json").write_text(json.dumps(listing))
    return folder
