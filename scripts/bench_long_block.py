"""Memory of training on blocks of 32,768 tokens, with and without recomputation.

    python scripts/bench_long_block.py [--tokens 32768] [--out results/bench_long_block.json]

A random Llama (2 layers, 256 wide, the 49,152 tokens of the demo's teacher) teaches one of the same
shape, on one step of one block of the demo's corpus, by the verbs of the command line, each in a
process of its own. `peak_bytes` is the largest resident memory of the process that trains, weights
and optimiser included; `logits_bytes` is what float32 logits of the block alone would take.
Needs assets/ (`make demo-assets`). The last line is one JSON object.
"""

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill.cli import main as distill
from distill.evaluate.cost import peak_resident_bytes
from distill.files import write_json_atomically
from scripts.keep_demo_results import ROOT
from scripts.provenance import provenance

SEED = 0
HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS = 256, 2, 4


def main() -> None:
    """Capture once, train twice, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32_768, help="of the block")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocab_size = save_teacher(folder / "teacher")
        settings = experiment(folder, options.tokens)
        (folder / "long.yaml").write_text(yaml.safe_dump(settings))
        in_process(["cache", str(folder / "long.yaml")])
        for recomputed in (True, False):
            peaks["recomputed" if recomputed else "kept"] = in_process(
                [
                    *("train", str(folder / "long.yaml"), f"run_folder={folder}/{recomputed}"),
                    f"train.gradient_checkpointing={str(recomputed).lower()}",
                ]
            )
    result = {
        "tokens": options.tokens,
        "peak_bytes": peaks,
        "logits_bytes": 4 * options.tokens * vocab_size,
        "student": {"hidden_size": HIDDEN_SIZE, "num_layers": NUM_LAYERS, "vocab_size": vocab_size},
        **provenance(SEED),
    }
    if options.out:
        write_json_atomically(options.out, result)
    print(json.dumps(result))


def save_teacher(folder: Path) -> int:
    """Write a random Llama with the demo's tokenizer; return its number of tokens."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "teacher")
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN_SIZE,
            intermediate_size=3 * HIDDEN_SIZE,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=NUM_HEADS,
            num_key_value_heads=NUM_HEADS,
            max_position_embeddings=131_072,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def experiment(folder: Path, tokens: int) -> dict[str, Any]:
    """Settings: one block to train on, one held out."""
    corpus = str(ROOT / "assets" / "corpus" / "python-docs.jsonl")
    return {
        "run_folder": str(folder / "run"),
        "seed": SEED,
        "device": "cpu",
        "data": {
            "sources": [{"path": "json", "data_files": [corpus]}],
            "block_length": tokens,
            "train_blocks": 1,
            "held_out_blocks": 1,
            "held_out_fraction": 0.3,
        },
        "teacher": {
            "kind": "resident",
            "model": str(folder / "teacher"),
            "device": "cpu",
            "dtype": "bfloat16",
            "micro_batch_tokens": tokens,
        },
        "targets": {"kind": "top_k", "k": 16},
        "cache": {"blocks_per_shard": 1, "folder": str(folder / "cache")},
        "student": {
            "kind": "scratch",
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 3 * HIDDEN_SIZE,
            "num_layers": NUM_LAYERS,
            "num_heads": NUM_HEADS,
            "max_position_embeddings": tokens,
        },
        "train": {"blocks_per_step": 1, "precision": "bfloat16"},
    }


def in_process(arguments: list[str]) -> int:
    """Run a verb in a process of its own; return the largest resident memory that it had."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, (arguments,))


def run(arguments: list[str]) -> int:
    """Run a verb here; return the peak of resident memory in bytes."""
    if distill(arguments):
        raise SystemExit(f"distill {' '.join(arguments)} failed")
    return peak_resident_bytes()


if __name__ == "__main__":
    main()
