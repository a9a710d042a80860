"""Memory and time of capture and training as the corpus grows: 1, 10 and 100 times the rows.

    python scripts/bench_scaling.py [--quick] [--out results/bench_scaling.json]

A random Llama (2 layers, 64 wide, 2,000 words) teaches one of the same shape on made-up sentences,
by the verbs of the command line, each in a process of its own. `peak_bytes` is the largest resident
memory of that process; what a process of the same verb holds on the smallest corpus is mostly its
libraries. `time_over_rows` is the time a row, over that of the smallest corpus. With --out, a plot
stands beside the result. The last line is one JSON object.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.files import write_json_atomically
from scripts.bench_long_block import in_process
from scripts.keep_demo_results import machine

SEED = 0
BLOCK_LENGTH = 256
BLOCKS = 40
NUM_WORDS = 2000


def main() -> None:
    """Capture and train at each size, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 and 10 times only")
    parser.add_argument("--out", type=Path, help="also write the result there, with a plot")
    options = parser.parse_args()
    sizes = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_teacher(folder / "teacher")
        for times in (1, 10) if options.quick else (1, 10, 100):
            sizes[times] = measure(folder, times)
    smallest = {verb: sizes[1][verb]["seconds_per_row"] for verb in ("cache", "train")}
    for found in sizes.values():
        for verb in ("cache", "train"):
            ratio = found[verb].pop("seconds_per_row") / smallest[verb]
            found[verb]["time_over_rows"] = round(ratio, 3)
    result = {
        "sizes": {str(times): found for times, found in sizes.items()},
        "seed": SEED,
        "machine": machine(),
    }
    if options.out:
        write_json_atomically(options.out, result)
        plot(sizes, options.out.with_suffix(".png"))
    print(json.dumps(result))


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


def measure(folder: Path, times: int) -> dict[str, Any]:
    """Peak memory and seconds a row of both verbs, on `times` as many blocks."""
    path = folder / f"{times}.yaml"
    path.write_text(yaml.safe_dump(experiment(folder, times)))
    rows = times * BLOCKS * BLOCK_LENGTH
    found: dict[str, Any] = {"rows": rows}
    for verb in ("cache", "train"):
        started = time.perf_counter()
        peak = in_process([verb, str(path)])
        seconds = time.perf_counter() - started
        found[verb] = {"peak_bytes": peak, "seconds_per_row": seconds / rows}
    return found


def experiment(folder: Path, times: int) -> dict[str, Any]:
    """Settings of one size, and its corpus."""
    corpus = folder / f"{times}.jsonl"
    rng = random.Random(times)
    with corpus.open("w") as file:
        for _ in range(times * BLOCKS * BLOCK_LENGTH // 45):
            words = (f"w{rng.randrange(NUM_WORDS)}" for _ in range(rng.randint(20, 90)))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return {
        "run_folder": str(folder / f"run-{times}"),
        "seed": SEED,
        "device": "cpu",
        "data": {
            "sources": [{"path": "json", "data_files": [str(corpus)]}],
            "block_length": BLOCK_LENGTH,
            "train_blocks": times * BLOCKS,
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


def plot(sizes: dict[int, dict[str, Any]], path: Path) -> None:
    """Draw memory and time a row over the rows."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = [found["rows"] for found in sizes.values()]
    for verb in ("cache", "train"):
        peaks = [found[verb]["peak_bytes"] / 1e9 for found in sizes.values()]
        left.plot(rows, peaks, marker="o", label=verb)
        ratios = [found[verb]["time_over_rows"] for found in sizes.values()]
        right.plot(rows, ratios, marker="o", label=verb)
    left.set_title("peak memory, GB", fontsize=10)
    right.set_title("time a row, over the smallest", fontsize=10)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
