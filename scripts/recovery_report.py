"""Figures, table and plot of scripts/recovery.py; table and plot are made of its JSON alone."""

import math
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from distill.evaluate.render import MISSING
from distill.evaluate.results import ModelResult
from scripts.results_page import table as markdown

_TESTS = {
    "bootstrap": "paired bootstrap",
    "mcnemar": "McNemar",
    "mcnemar_exact": "McNemar, exact",
}

_HELD_OUT = {
    "ce_nats": "held-out CE (nats)",
    "kl_nats": "held-out KL (nats)",
    "agreement": "held-out agreement (%)",
}


def figures(model: ModelResult) -> dict[str, Any]:
    """Scores of one model with their standard errors, as JSON values."""
    fidelity = model.fidelity
    assert fidelity is not None
    assert fidelity.reliability is not None
    assert fidelity.ce_nats.value is not None
    perplexity = math.exp(fidelity.ce_nats.value)
    error = fidelity.ce_nats.stderr
    exact = fidelity.exact
    return {
        "name": model.name,
        "num_parameters": model.num_parameters,
        "held_out_rows": fidelity.num_rows,
        "held_out_documents": fidelity.num_documents,
        "perplexity": {"value": perplexity, "stderr": error and perplexity * error},
        **{name: _estimate(getattr(fidelity, name)) for name in _HELD_OUT},
        "calibration_error": fidelity.reliability.ece,
        "exact": exact
        and {
            name: _estimate(getattr(exact, name)) for name in ("kl_nats", "agreement", "acceptance")
        },
        "tasks": {
            task: {
                "metric": scores.main_metric,
                **_estimate(scores.main),
                "num_documents": scores.num_documents,
            }
            for task, scores in model.tasks.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of a result: every model, KD against CE, and what was recovered."""
    teacher = result["models"][0]
    seeds = result["train_seeds"]
    parts = [
        "# Pruned student recovery",
        (
            f"`{result['command']}`, seed {result['seed']}, data order by "
            f"{_plural(len(seeds), 'training seed')} ({', '.join(map(str, seeds))}). Every trained "
            f"student saw {result['train_tokens']:,} tokens. Held out: "
            f"{teacher['held_out_documents']} documents, {teacher['held_out_rows']:,} rows; "
            f"errors are standard errors over documents. CPU: {result['machine']['cpu']}."
        ),
        _models(result["models"]),
        "## KD against CE at equal tokens",
        (
            "KD minus CE on the same documents: lower is better for CE and KL, higher for the "
            "rest. p (Holm) is corrected for the "
            f"{_plural(len(result['comparisons']), 'test')} below; **bold** is below 5%."
        ),
        _comparisons(result["comparisons"]),
        "## Share of the gap to the teacher that training recovered",
        (
            "0 is the cut model before training, 1 the teacher. Missing: teacher and cut model do "
            "not differ significantly there."
        ),
        _gaps(result["gaps"]),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw perplexity of all models, and the share of the gap that each loss recovers."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    names = [model["name"] for model in result["models"]]
    for place, model in enumerate(result["models"]):
        found, colour = model["perplexity"], _colour(model["name"])
        left.errorbar(found["value"], place, xerr=found["stderr"] or 0, marker="o", color=colour)
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.set_xscale("log")
    for formatter in (left.xaxis.set_major_formatter, left.xaxis.set_minor_formatter):
        formatter(ScalarFormatter())  # 60, not 6 x 10^1
    left.set_title("held-out perplexity (standard errors)", fontsize=10)
    arms = list(dict.fromkeys(gap["model"] for gap in result["gaps"]))
    titles = list(dict.fromkeys(_title(gap) for gap in result["gaps"]))
    for number, arm in enumerate(arms):
        own = [gap for gap in result["gaps"] if gap["model"] == arm]
        places = [titles.index(_title(gap)) + 0.15 * (number - (len(arms) - 1) / 2) for gap in own]
        right.errorbar(
            places,
            [gap["value"] for gap in own],
            yerr=[[_reach(gap, "low") for gap in own], [_reach(gap, "high") for gap in own]],
            fmt="o" if arm.startswith("depth") else "s",
            color=_colour(arm),
            fillstyle="full" if arm.startswith("depth") else "none",
            label=arm,
        )
    right.set_xticks(range(len(titles)), [title.replace(" ", "\n", 1) for title in titles])
    right.tick_params(axis="x", labelsize=7)
    right.axhline(0, color="grey", linewidth=0.8)
    right.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    right.set_title("share of the gap recovered (95% intervals)", fontsize=10)
    if arms:
        right.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _models(models: list[dict[str, Any]]) -> str:
    tasks = sorted(models[0]["tasks"])
    heads = ["model", "parameters", "perplexity", "KL (nats)", "exact KL (nats)"]
    heads += ["agreement (%)", "ECE (%)", *(f"{task.removesuffix('_local')} (%)" for task in tasks)]
    rows = [
        [
            found["name"],
            f"{found['num_parameters'] / 1e6:.1f} M",
            _number(found["perplexity"], 2),
            _number(found["kl_nats"], 3),
            _number(found["exact"]["kl_nats"], 3) if found["exact"] else MISSING,
            _number(found["agreement"], 1, 100),
            f"{100 * found['calibration_error']:.1f}",
            *(_number(found["tasks"][task], 1, 100) for task in tasks),
        ]
        for found in models
    ]
    return markdown(heads, rows)


def _comparisons(comparisons: list[dict[str, Any]]) -> str:
    rows = []
    for found in comparisons:
        scale, digits = (1, 4) if found["metric"].endswith("nats") else (100, 1)
        low, high = (f"{scale * found[end]:.{digits}f}" for end in ("low", "high"))
        solved = MISSING if found["gained"] is None else f"{found['gained']} / {found['lost']}"
        p_holm = _p(found["p_holm"])
        rows.append(
            [
                f"{found['model']} - {found['baseline']}",
                _title(found),
                f"{scale * found['difference']:+.{digits}f} ± {scale * found['stderr']:.{digits}f}",
                f"{low} to {high}",
                str(found["num_items"]),
                solved,
                _TESTS[found["test"]],
                _p(found["p_value"]),
                f"**{p_holm}**" if found["is_significant"] else p_holm,
            ]
        )
    heads = ["pair", "measure", "difference", "95% interval", "documents", "KD / CE alone solve"]
    return markdown([*heads, "test", "p", "p (Holm)"], rows)


def _gaps(gaps: list[dict[str, Any]]) -> str:
    titles = list(dict.fromkeys(map(_title, gaps)))
    found = {(gap["model"], _title(gap)): gap for gap in gaps}
    rows = [
        [arm, *(_interval(found.get((arm, title))) for title in titles)]
        for arm in dict.fromkeys(gap["model"] for gap in gaps)
    ]
    return markdown(["student", *titles], rows)


def _title(found: dict[str, Any]) -> str:
    if found["task"] == "held_out":
        return _HELD_OUT[found["metric"]]
    return f"{found['task'].removesuffix('_local')} {found['metric']} (%)"


def _interval(gap: dict[str, Any] | None) -> str:
    if gap is None:
        return MISSING
    low, high = ("?" if gap[end] is None else f"{gap[end]:.2f}" for end in ("low", "high"))
    return f"{gap['value']:.2f} ({low} to {high})"


def _reach(gap: dict[str, Any], end: str) -> float:
    """Length of an error bar; none where the interval has no end."""
    return 0.0 if gap[end] is None else abs(float(gap[end] - gap["value"]))


def _number(estimate: dict[str, float | None], digits: int, scale: int = 1) -> str:
    value, error = estimate["value"], estimate["stderr"]
    if value is None:
        return MISSING
    text = f"{scale * value:.{digits}f}"
    return text if error is None else f"{text} ± {scale * error:.{digits}f}"


def _p(value: float) -> str:
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def _plural(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _colour(name: str) -> str:
    return "C0" if "-kd" in name else "C1" if "-ce" in name else "0.3"


def _estimate(estimate: Any) -> dict[str, float | None]:
    return {"value": estimate.value, "stderr": estimate.stderr}
