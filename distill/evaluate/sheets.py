"""A table as JSON and as CSV, for machines and spreadsheets. No torch here."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from platform import python_version
from typing import Any

from distill.evaluate.columns import task_names
from distill.evaluate.measured import Estimate, Fidelity
from distill.evaluate.results import ModelResult

_HELD_OUT = ("ce_nats", "kl_nats", "agreement", "bits_per_byte")

_LIBRARIES = ("accelerate", "datasets", "lm_eval", "numpy", "tokenizers", "torch", "transformers")


def as_csv(models: Sequence[ModelResult]) -> str:
    """Lay out one line a model: plain numbers, shares of 1, each with its standard error.

    A number that was not measured, or is not finite, is empty.
    """
    lines = [_line(model, task_names(models)) for model in models]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_tree(model: ModelResult) -> dict[str, Any]:
    """Return all of a model as JSON values, without the paths of this machine."""
    tree = asdict(model)
    for scores in tree["tasks"].values():
        del scores["source"]
    return tree


def versions() -> dict[str, str | None]:
    """Versions of what scores depend on; None where it is not installed."""
    return {"python": python_version(), **{name: _version(name) for name in _LIBRARIES}}


def _line(model: ModelResult, tasks: Sequence[str]) -> dict[str, str | int | float | None]:
    line: dict[str, str | int | float | None] = {
        "model": model.name,
        "role": model.role,
        "run": model.run,
        "num_parameters": model.num_parameters,
    }
    for name in _HELD_OUT:
        line |= _cells(name, getattr(model.fidelity, name) if model.fidelity else None)
    line |= _calibration_cells(model.fidelity)
    line["gap_recovered"] = model.gap_recovered
    for task in tasks:
        scores = model.tasks.get(task)
        line[f"{task} metric"] = scores.main_metric if scores else None
        line |= _cells(task, scores.main if scores else None)
    return line


def _calibration_cells(fidelity: Fidelity | None) -> dict[str, float | None]:
    bins = fidelity.reliability if fidelity else None
    exact = fidelity.exact if fidelity else None
    bounds = fidelity.acceptance if fidelity else None
    return {
        "calibration_error": bins.ece if bins else None,
        "acceptance_least": bounds[0].value if bounds else None,
        "acceptance_most": bounds[1].value if bounds else None,
        **_cells("exact_kl_nats", exact.kl_nats if exact else None),
        **_cells("exact_acceptance", exact.acceptance if exact else None),
    }


def _cells(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    value, stderr = (estimate.value, estimate.stderr) if estimate else (None, None)
    return {name: value, f"{name} stderr": stderr}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:  # results may be compared where nothing can be run
        return None
