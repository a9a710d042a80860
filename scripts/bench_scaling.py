"""Memory and time of capture and training as the corpus grows: 1, 10 and 100 times the rows.

    python scripts/bench_scaling.py [--quick] [--out results/bench_scaling.json]

A random Llama (2 layers, 64 wide, 2,000 words) teaches one of the same shape on made-up sentences,
by the verbs of the command line, each in a process of its own, which does a quarter of the smallest
size first: what libraries take to start is no matter of rows. `peak_bytes` is the largest resident
memory of that process. `cpu_seconds` is the CPU time of the verb after that. The speed of a shared
machine drifts by more than the effect that is looked for, so a round goes up and down the sizes,
1, 10, 100, 10, 1, and means are taken: least ones would compare a small size's luckiest seconds
with the long average of a large one. `noise` is by how much the most of a size is above its least.
A row's marginal time is (t100 - t10) / (rows100 - rows10), and `marginal_time_ratio` that over the
one between 10 times and once. It is 1 where time is linear; the rounds' own ratios show its noise.
With --out, a plot stands beside the result. The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.files import write_json_atomically
from scripts.bench_long_block import run
from scripts.provenance import provenance

SEED = 0
BLOCK_LENGTH = 256
FIRST_BLOCKS = 40
"""What a process does before it is measured."""
NUM_WORDS = 2000
VERBS = ("cache", "train")


def main() -> None:
    """Capture and train at each size, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20,480, 40,960 and 81,920 rows, once")
    parser.add_argument("--out", type=Path, help="also write the result there, with a plot")
    options = parser.parse_args()
    sizes, rounds = ((80, 160, 320), 1) if options.quick else ((160, 1600, 16000), 2)
    found = [one_round(sizes) for _ in range(rounds)]
    verbs = {verb: summary([runs[verb] for runs in found]) for verb in VERBS}
    result = {
        "verbs": verbs,
        "rounds": rounds,
        **provenance(SEED),
    }
    if options.out:
        write_json_atomically(options.out, result)
        plot(verbs, options.out.with_suffix(".png"))
    print(json.dumps(result))


class Run(NamedTuple):
    """What a verb's process took."""

    peak_bytes: int
    cpu_seconds: float


Round = dict[int, list[Run]]
"""Rows -> the runs of that size."""


def one_round(sizes: Sequence[int]) -> dict[str, Round]:
    """Go up and down the sizes (blocks); return the runs of each verb."""
    found: dict[str, Round] = {verb: defaultdict(list) for verb in VERBS}
    for num_blocks in (*sizes, *sizes[-2::-1]):
        with tempfile.TemporaryDirectory() as folder:
            for verb, run in measure(Path(folder), num_blocks).items():
                found[verb][BLOCK_LENGTH * num_blocks].append(run)
    return found


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Memory and time over rows, and how linear time is, from rounds at three sizes."""
    runs = {rows: [run for of in rounds for run in of[rows]] for rows in sorted(rounds[0])}
    peaks = {rows: max(run.peak_bytes for run in found) for rows, found in runs.items()}
    seconds = mean_seconds(runs)
    first, *_, last = runs
    early, late = marginal(seconds)
    pairs = [marginal(mean_seconds(of)) for of in rounds]
    spreads = [[run.cpu_seconds for run in found] for found in runs.values()]
    return {
        "marginal_time_ratio": round(late / early, 3),
        "marginal_time_ratio_of_rounds": [round(after / before, 3) for before, after in pairs],
        "marginal_microseconds_per_row": [round(1e6 * early, 2), round(1e6 * late, 2)],
        "peak_ratio": round(peaks[last] / peaks[first], 3),
        "noise": round(max(max(times) / min(times) for times in spreads) - 1, 3),
        "sizes": [
            {"rows": rows, "peak_bytes": peaks[rows], "cpu_seconds": round(seconds[rows], 2)}
            for rows in runs
        ],
    }


def mean_seconds(runs: Round) -> dict[int, float]:
    """Rows -> mean CPU time."""
    return {rows: statistics.mean(run.cpu_seconds for run in found) for rows, found in runs.items()}


def marginal(seconds: dict[int, float]) -> tuple[float, float]:
    """Seconds a further row takes, between the first two of three sizes and the last two."""
    (r1, t1), (r2, t2), (r3, t3) = sorted(seconds.items())
    return (t2 - t1) / (r2 - r1), (t3 - t2) / (r3 - r2)


def save_teacher(folder: Path) -> None:
    """Write a random Llama whose tokens are words."""
    words = {f"w{number}": number for number in range(NUM_WORDS)} | {"<end>": NUM_WORDS}
    backend = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )
    model.lm_head.weight.data.mul_(20)  # heads and tails, as real teachers have them
    model.save_pretrained(folder)


def measure(folder: Path, num_blocks: int) -> dict[str, Run]:
    """Run both verbs on so many blocks, in an empty folder."""
    save_teacher(folder / "teacher")
    sizes = (FIRST_BLOCKS, num_blocks)
    paths = [folder / f"{size}.yaml" for size in sizes]
    for size, path in zip(sizes, paths, strict=True):
        path.write_text(yaml.safe_dump(experiment(folder, size)))
    found = {}
    for verb in VERBS:
        first = [f"run_folder={folder}/first-{verb}", f"cache.folder={folder}/first"]
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            tasks = [verb, str(paths[0]), *first], [verb, str(paths[1])]
            found[verb] = pool.apply(second_of, tasks)
    return found


def second_of(first: list[str], second: list[str]) -> Run:
    """Run a verb twice in this process, which is to be its own; tell of the second time."""
    run(first)
    before = sum(os.times()[:4])  # of this process and its children, by user and system
    peak = run(second)
    return Run(peak, sum(os.times()[:4]) - before)


def experiment(folder: Path, num_blocks: int) -> dict[str, Any]:
    """Settings of one size, and its corpus."""
    corpus = folder / f"{num_blocks}.jsonl"
    rng = random.Random(num_blocks)
    with corpus.open("w") as file:
        for _ in range(BLOCK_LENGTH * num_blocks // 45):
            words = (f"w{rng.randrange(NUM_WORDS)}" for _ in range(rng.randint(20, 90)))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return {
        "run_folder": str(folder / f"run-{num_blocks}"),
        "seed": SEED,
        "device": "cpu",
        "data": {
            "sources": [{"path": "json", "data_files": [str(corpus)]}],
            "block_length": BLOCK_LENGTH,
            "train_blocks": num_blocks,
            "held_out_blocks": 4,
            "held_out_fraction": 0.05,
        },
        "teacher": {
            "kind": "resident",
            "model": str(folder / "teacher"),
            "device": "cpu",
            "dtype": "float32",
        },
        "cache": {"blocks_per_shard": 40},
        "student": {"kind": "pretrained", "model": str(folder / "teacher")},
        "train": {"blocks_per_step": 8, "micro_batch_blocks": 8, "precision": "float32"},
    }


def plot(verbs: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw memory and time over the rows, and the lines on which time would be linear."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for verb, found in verbs.items():
        rows = [size["rows"] for size in found["sizes"]]
        left.plot(rows, [size["peak_bytes"] / 1e9 for size in found["sizes"]], "o-", label=verb)
        seconds = [size["cpu_seconds"] for size in found["sizes"]]
        (points,) = right.plot(rows, seconds, "o", label=verb)
        line = [seconds[-1] * each / rows[-1] for each in rows]
        right.plot(rows, line, "--", color=points.get_color(), linewidth=1)
    left.set_title("peak memory, GB", fontsize=10)
    left.set_ylim(0, 1.1 * left.dataLim.y1)
    right.set_title("CPU time, seconds; dashed: in proportion", fontsize=10)
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("rows")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
