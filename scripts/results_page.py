"""Write the tables of docs/results.md and of the README out of the files in results/.

    python scripts/results_page.py

A table stands between `<!-- measured: NAME -->` and `<!-- end of NAME -->`; what is between them is
made of the files alone, and a test compares. Run it after renewing a file of results/.
"""

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from distill.files import write_text_atomically

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")


def main() -> None:
    """Renew all tables."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    for page in PAGES:
        write_text_atomically(page, with_tables(page.read_text()))


def with_tables(text: str) -> str:
    """Return a page with every marked table made anew.

    Raises:
        KeyError: a mark names no table.
    """

    def renew(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- measured: {name} -->\n{TABLES[name]()}<!-- end of {name} -->"

    return re.sub(r"<!-- measured: (\S+) -->\n.*?<!-- end of \1 -->", renew, text, flags=re.DOTALL)


def read(name: str) -> Any:
    """Return what results/NAME.json holds."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table whose columns but the first are aligned right."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def layouts() -> str:
    """Our cache beside other layouts."""
    found = read("bench_peers")["layouts"]
    rows = [
        [
            LAYOUTS[name],
            f"{each['bytes_per_row']:.0f}",
            f"{each['coding_error_nats']:.1e}",
            _times(each["write_over_ours"]),
            _times(each["read_over_ours"]),
        ]
        for name, each in sorted(found.items(), key=lambda item: item[1]["bytes_per_row"])
    ]
    head = ["layout", "bytes a row", "coding error (nats a row)"]
    return table([*head, "write rate, ours = 1", "read rate, ours = 1"], rows)


LAYOUTS = {
    "distill_threshold": "distill, threshold 1/40",
    "distill_sampled_50": "distill, 50 draws",
    "distill_top_k_64": "distill, top-64",
    "distill_top_k_128": "distill, top-128",
    "parquet_fp16_64": "Parquet, top-64, int32 ids and float16",
    "savez_64": "numpy.savez, top-64",
    "datasets_lists_64": "datasets, top-64 as nested lists",
    "polynomial_128": "DistillKit's published layout, restated, top-128",
}


def losses() -> str:
    """One step of head and loss beside those of peers, at each size."""
    parts = []
    for case in read("bench_losses")["cases"]:
        rows = [_loss_row(name, way) for name, way in case["ways"].items()]
        product = _times(case["teacher_head"]["cpu_over_ours"])
        rows.append(["the teacher's head alone, which the fused apply", "-", product, *["-"] * 3])
        size = f"{case['vocab_size']:,} tokens, {case['rows']:,} rows, {case['dtype']}"
        head = [size, "teacher's bytes a row", "CPU time, ours = 1", "peak bytes a logit"]
        head += ["bytes a logit until backward", "error of the gradient (%)"]
        parts.append(table(head, rows))
    return "\n".join(parts)


def _loss_row(name: str, way: dict[str, Any]) -> list[str]:
    if "error" in way:
        return [LOSSES[name], way["error"], *["-"] * 4]
    return [
        LOSSES[name],
        f"{way['teacher_bytes_per_row']:,.0f}",
        _times(way["cpu_over_ours"]),
        f"{way['peak_bytes_per_logit']:.1f}",
        f"{way['saved_bytes_per_logit'] - way['saved_gradient_bytes_per_logit']:.1f}",
        f"{100 * way['gradient_error']:.2g}",
    ]


def _times(ratios: dict[str, float]) -> str:
    return f"{ratios['median']:.2f} ({ratios['least']:.2f} to {ratios['most']:.2f})"


LOSSES = {
    "distill_threshold": "distill, threshold",
    "distill_small_chunks": "distill, threshold, chunks of fewer rows",
    "distill_top_64": "distill, top-64",
    "naive_kl_div": "torch's kl_div, written plainly",
    "trl_gkd": "TRL, GKD's loss",
    "trl_chunked": "TRL, chunked divergence",
    "trl_top_64": "TRL, chunked loss of top-64",
    "torchtune": "torchtune, ForwardKLLoss",
    "torchtune_chunked": "torchtune, chunked",
    "liger": "Liger, fused linear JSD",
    "liger_small_chunks": "Liger, chunks of fewer rows",
}


def scaling() -> str:
    """Memory and time of a growing corpus, and what a further row takes."""
    sizes, further = [], []
    for verb, found in read("bench_scaling")["verbs"].items():
        name = f"distill {verb}"
        for size in found["sizes"]:
            peak = f"{size['peak_bytes'] / 1e9:.3f}"
            sizes.append([name, f"{size['rows']:,}", peak, f"{size['cpu_seconds']:.1f}"])
        early, late = (f"{each:.1f}" for each in found["marginal_microseconds_per_row"])
        rounds = " and ".join(f"{ratio:.2f}" for ratio in found["marginal_time_ratio_of_rounds"])
        ratio, noise = f"{found['marginal_time_ratio']:.2f}", f"{100 * found['noise']:.0f}"
        further.append([name, early, late, ratio, rounds, noise])
    first, middle, last = (f"{size['rows']:,}" for size in found["sizes"])
    head = ["CPU time of a further row", f"{first} to {middle} (µs)", f"{middle} to {last} (µs)"]
    head += ["ratio", "ratio in each round", "most over least CPU seconds (%)"]
    heads = ["verb", "rows", "peak memory (GB)", "CPU seconds"]
    return f"{table(heads, sizes)}\n{table(head, further)}"


def part_of(name: str, number: int) -> str:
    """One of the tables in results/NAME.md, which its script made of the numbers beside it."""
    parts = (ROOT / "results" / f"{name}.md").read_text().split("\n\n")
    return parts[number].strip("\n") + "\n"


def headlines() -> str:
    """What the README claims, each with its file."""
    layouts_of = read("bench_peers")["layouts"]
    size = {name: found["bytes_per_row"] for name, found in layouts_of.items()}
    small = size["distill_threshold"]
    teacher = read("bench_teacher")["capture_over_forward"]["random_0.5b"]["threshold"]
    streamed = read("bench_streamed")
    large = streamed["llama_8b_shape"]["distill"]["peak_bytes"]
    case = read("bench_losses")["cases"][-1]
    times = {name: way["cpu_over_ours"]["median"] for name, way in case["ways"].items()}
    verbs = read("bench_scaling")["verbs"]
    sizes = [size["rows"] for size in verbs["cache"]["sizes"]]
    growth = f"{max(sizes) / min(sizes):.0f}"
    distilled = read("sparse_kd")
    above = [
        f"{distilled['arms'][arm]['above_dense_nats']['mean']:.3f} at "
        f"{distilled['captures'][capture]['bytes_per_row']:.0f} bytes"
        for arm, capture in (
            ("threshold_25", "threshold_25"),
            ("sampled_25", "sampled_25"),
            ("top_k_50_bucket", "top_k_50"),
        )
    ]
    from_labels = distilled["arms"][distilled["gap"]["ce"]]["above_dense_nats"]["mean"]
    return table(
        ["measured", "figure", "result file"],
        [
            [
                "bytes a row: ours, Parquet with float16, nested lists of `datasets`",
                f"{small:.0f}, {size['parquet_fp16_64']:.0f}, {size['datasets_lists_64']:,.0f}",
                link("bench_peers"),
            ],
            [
                "loss above dense KL, nats: `threshold`, `sampled`, `top_k` (50 ids); labels alone",
                f"{'; '.join(above)}; {from_labels:.3f}",
                link("sparse_kd"),
            ],
            [
                "capture over the teacher's bare forward pass, 0.5 B parameters",
                f"{teacher:.2f}",
                link("bench_teacher"),
            ],
            [
                "teacher streamed from disk over the same in memory; peak memory of an 8B shape",
                f"{streamed['streamed_over_resident']:.2f}; {large / 1e9:.2f} GB",
                link("bench_streamed"),
            ],
            [
                f"CPU time of a loss step, ours = 1, {case['vocab_size']:,} tokens: Liger, TRL",
                f"{times['liger']:.1f} and {times['trl_gkd']:.1f}",
                link("bench_losses"),
            ],
            [
                f"peak memory with a corpus {growth} times as large, before = 1: capture, training",
                f"{verbs['cache']['peak_ratio']:.2f} and {verbs['train']['peak_ratio']:.2f}",
                link("bench_scaling"),
            ],
        ],
    )


def link(name: str) -> str:
    """A link from the README to a result file."""
    return f"[{name}.json](results/{name}.json)"


TABLES: dict[str, Callable[[], str]] = {
    "headlines": headlines,
    "layouts": layouts,
    "losses": losses,
    "scaling": scaling,
    "sparse-kd-arms": partial(part_of, "sparse_kd", 0),
    "sparse-kd-gradients": partial(part_of, "sparse_kd", 1),
    "sparse-kd-repeated": partial(part_of, "sparse_kd", 2),
    "recovery-models": partial(part_of, "recovery", 2),
    "recovery-comparisons": partial(part_of, "recovery", 5),
    "recovery-gaps": partial(part_of, "recovery", 8),
}


if __name__ == "__main__":
    main()
