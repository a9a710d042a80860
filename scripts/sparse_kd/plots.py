"""Plots of the report; each shows means over seeds with one standard error."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from scripts.sparse_kd.arms import ARMS, Arm
from scripts.sparse_kd.tables import in_order

_STYLES = {
    "top_k none": ("tab:red", "v"),
    "top_k renormalised": ("tab:pink", "^"),
    "top_k uniform": ("tab:brown", "s"),
    "top_k bucket": ("tab:orange", "D"),
    "top_k label": ("tab:purple", "P"),
    "sampled": ("tab:blue", "o"),
    "threshold": ("tab:green", "*"),
}


def _family(arm: Arm) -> str:
    assert arm.capture is not None
    return f"top_k {arm.tail}" if arm.tail else arm.capture.rsplit("_", 1)[0]


def _curves(names: dict[str, Any]) -> dict[str, list[str]]:
    """Arms with a cache at the config's learning rate, by family, the smallest first."""
    curves: dict[str, list[str]] = {family: [] for family in _STYLES}
    for name, _ in in_order(names):
        if ARMS[name].capture is not None and ARMS[name].rate == 1:
            curves[_family(ARMS[name])].append(name)
    return {family: arms for family, arms in curves.items() if arms}


def _plain_log(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _draw_families(axes: Axes, summary: dict[str, Any], found: dict[str, Any], size: str) -> None:
    """One curve a family: an estimate of each arm over the size of its capture."""
    for family, arms in _curves(found).items():
        colour, marker = _STYLES[family]
        axes.errorbar(
            [summary["captures"][ARMS[arm].capture][size] for arm in arms],
            [found[arm]["mean"] for arm in arms],
            [found[arm]["stderr"] or 0 for arm in arms],
            color=colour,
            marker=marker,
            capsize=3,
            label=family,
        )


def plot_losses(summary: dict[str, Any], path: Path) -> None:
    """Held-out cross-entropy and calibration error over bytes a row."""
    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    panels = (("ce_nats", "held-out cross-entropy, nats"), ("ece", "expected calibration error"))
    for axes, (measure, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for kind, line in (("ce", ":"), ("dense", "--")):
            if (name := summary["gap"][kind]) in summary["arms"]:
                value = summary["arms"][name][measure]["mean"]
                axes.axhline(value, color="black", linestyle=line, linewidth=1, label=name)
        found = {arm: scores[measure] for arm, scores in summary["arms"].items()}
        _draw_families(axes, summary, found, "bytes_per_row")
        _plain_log(axes, (10, 20, 40, 100))
        axes.set_xlabel("bytes a row")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)


def plot_angles(summary: dict[str, Any], path: Path) -> None:
    """Angle to the dense gradient over ids a row, for two sizes of the batch."""
    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    batches = sorted({int(size) for sizes in summary["gradients"].values() for size in sizes})
    shown = [batches[0], batches[-1]] if batches else [1, 1]
    for axes, blocks in zip(figure.subplots(1, 2, sharey=True), shown, strict=True):
        found = {
            arm: by_blocks[str(blocks)]["angle_degrees"]
            for arm, by_blocks in summary["gradients"].items()
        }
        _draw_families(axes, summary, found, "ids_per_row")
        axes.set_yscale("log")
        _plain_log(axes, (5, 10, 20, 50))
        axes.set_xlabel("ids a row")
        axes.set_title(f"degrees to the dense gradient, batches of {blocks} x 256", fontsize=10)
        axes.grid(alpha=0.3, which="both")
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)


def plot_repeated(summary: dict[str, Any], path: Path) -> None:
    """KL to the teacher over the epochs of a small corpus: held out, and on the corpus itself."""
    figure = Figure(figsize=(11.5, 4.2), layout="constrained")
    panels = (("held_out", "held-out blocks"), ("train", "the repeated blocks"))
    for axes, (split, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for arm, by_epochs in in_order(summary["repeated"]):
            colour = "black" if arm == "dense" else _STYLES[_family(ARMS[arm])][0]
            epochs = sorted(by_epochs, key=int)
            found = [by_epochs[each][split]["kl_nats"] for each in epochs]
            axes.errorbar(
                [int(each) for each in epochs],
                [each["mean"] for each in found],
                [each["stderr"] or 0 for each in found],
                color=colour,
                marker="o",
                capsize=3,
                label=arm,
            )
        _plain_log(axes, (1, 4, 16))
        axes.set_xlabel("epochs")
        axes.set_title(f"KL to the teacher on {title}, nats", fontsize=10)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=110)
