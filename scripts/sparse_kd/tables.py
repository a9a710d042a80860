"""The report's tables in Markdown, made of its numbers alone."""

from typing import Any

from scripts.results_page import table
from scripts.sparse_kd.arms import ARMS


def tables(summary: dict[str, Any]) -> str:
    """Return the three tables: arms, gradients, repeated epochs."""
    parts = (_arms(summary), _gradients(summary), _repeated(summary))
    return "\n".join(part or "Not run yet.\n" for part in parts)


PAPER = {
    "top_k_5_none": -253,
    "top_k_12_none": -99,
    "top_k_50_none": 5,
    "top_k_50_bucket": 59,
    "top_k_50_uniform": -73,
    "top_k_5_label": 44,
    "top_k_50_label": 83,
    "sampled_5": 100,
    "sampled_12": 100,
    "sampled_25": 100,
}
"""Share of the gap in tables 1, 2 and 6 of arXiv:2503.16870, percent, 300 M students of a 3 B
teacher; table 6 gives losses in two digits, where all three equal that of dense KL."""


def in_order(found: dict[str, Any]) -> list[tuple[str, Any]]:
    """What was found of each arm, in the order of the arms; a file of JSON has that of names."""
    return [(name, found[name]) for name in ARMS if name in found]


def _with_error(found: dict[str, Any], digits: int, scale: float = 1.0) -> str:
    if found["mean"] is None:
        return "-"
    text = f"{scale * found['mean']:z.{digits}f}"
    return text if found["stderr"] is None else f"{text} ± {scale * found['stderr']:.{digits}f}"


def _arms(summary: dict[str, Any]) -> str:
    head = ["targets", "seeds", "bytes a row", "cross-entropy (nats)"]
    head += ["above dense (nats; of blocks)"]
    head += [
        "share of the gap (%)",
        "in the paper (%)",
        "KL (nats)",
        "ECE (%)",
        "agreement (%)",
        "acceptance (%)",
    ]
    if not summary["arms"]:
        return ""
    rows = [["before", *_scores(summary["pretrained"], "-", "-")]]
    for name, found in in_order(summary["arms"]):
        capture = ARMS[name].capture
        size = f"{summary['captures'][capture]['bytes_per_row']:.1f}" if capture else "-"
        rows.append([name, *_scores(found, size, str(PAPER.get(name, "-")))])
    return table(head, rows)


def _scores(found: dict[str, Any], size: str, in_paper: str) -> list[str]:
    above, share = found.get("above_dense_nats"), found.get("share_of_gap")
    return [
        str(found["ce_nats"]["n"]),
        size,
        _with_error(found["ce_nats"], 3),
        _above(above) if above else "-",
        _with_error(share, 0, 100) if share else "-",
        in_paper,
        _with_error(found["kl_nats"], 3),
        _with_error(found["ece"], 1, 100),
        _with_error(found["agreement"], 1, 100),
        _with_error(found["acceptance"], 1, 100),
    ]


def _above(found: dict[str, Any]) -> str:
    """The error over seeds, and in brackets that over held-out blocks, which all seeds share."""
    blocks = found["stderr_of_blocks"]
    return _with_error(found, 3) + ("" if blocks is None else f" ({blocks:.3f})")


def _gradients(summary: dict[str, Any]) -> str:
    rows = []
    batches: list[str] = []
    for name, by_blocks in in_order(summary["gradients"]):
        batches = sorted(by_blocks, key=int)
        angles = [_with_error(by_blocks[size]["angle_degrees"], 1) for size in batches]
        ratios = [_with_error(by_blocks[size]["norm_ratio"], 2) for size in batches]
        capture = ARMS[name].capture
        ids = f"{summary['captures'][capture]['ids_per_row']:.1f}" if capture else "1"
        by_id = _with_error(by_blocks[batches[-1]]["id_angle_degrees"], 1)
        rows.append([name, ids, *angles, ratios[-1], by_id])
    head = ["targets", "ids a row", *(f"angle, {size} blocks (degrees)" for size in batches)]
    last = f"{batches[-1]} blocks" if batches else ""
    head += [f"norm ratio, {last}", f"mean angle of an id's row, {last} (degrees)"]
    return table(head, rows) if rows else ""


def _repeated(summary: dict[str, Any]) -> str:
    rows = []
    epochs: list[str] = []
    for name, by_epochs in in_order(summary["repeated"]):
        epochs = sorted({*epochs, *by_epochs}, key=int)
        cells = [
            _with_error(by_epochs[each][split]["kl_nats"], 3) if each in by_epochs else "-"
            for split in ("held_out", "train")
            for each in epochs
        ]
        rows.append([name, *cells])
    head = ["targets", *(f"held-out KL, {each} epochs" for each in epochs)]
    return table([*head, *(f"KL on the corpus, {each}" for each in epochs)], rows) if rows else ""
