"""Host time a row of four ways to get a teacher's distributions out of vLLM.

    .venv-vllm/bin/python scripts/bench_vllm.py [--quick] [--out results/bench_vllm.json]

Runs in the environment of `make test-vllm`, on SmolLM2-135M (`make demo-assets`), at k = 64:

    dicts   prompt_logprobs as vLLM returns them: a dict of objects for each position
    flat    the same with flat_logprobs: lists over all positions
    raw     the tensors that the engine's process sends, kept as they come
    tap     rows drawn inside the engine (distill/teacher/tap.py): targets as they go to the cache

Counted is what the host does after the engine's processes have answered: for the first three in
LogprobsProcessor._update_prompt_logprobs, for the tap in `VllmTeacher.score` outside the engine.
The first three lack the entropy of the whole distribution, without which no row is whole.
The last line is one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill.config import TopKConfig, VllmTeacherConfig
from distill.data import Block
from distill.files import write_json_atomically
from distill.teacher.engine import VllmTeacher
from distill.teacher.vllm_engine import start_engine
from scripts.bench_teacher import demo_blocks
from scripts.keep_demo_results import machine

ROOT = Path(__file__).parent.parent
K, SEED, VOCAB_SIZE = 64, 0, 49_152
CONFIG = VllmTeacherConfig(
    kind="vllm", model=str(ROOT / "assets" / "teacher"), enforce_eager=True, kv_cache_gib=0.5
)


def main() -> None:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 blocks instead of 8")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    blocks = demo_blocks(2 if options.quick else 8)
    engine = start_engine(CONFIG, len(blocks[0].input_ids_T) + 1, max_logprobs=K)
    num_rows = sum(int(block.row_mask().sum()) for block in blocks)
    num_positions = sum(len(block.input_ids_T) - 1 for block in blocks)
    by_tap(engine, blocks[:1])  # the first steps of an engine are slow
    seconds = {name: by_logprobs(engine, blocks, name) / num_positions for name in PATHS}
    seconds["tap"] = by_tap(engine, blocks) / num_rows
    result = {
        "host_microseconds_per_row": {n: round(1e6 * s, 3) for n, s in seconds.items()},
        "over_tap": {n: round(s / seconds["tap"], 3) for n, s in seconds.items()},
        "k": K,
        "rows": num_rows,
        "seed": SEED,
        "machine": machine(),
    }
    if options.out:
        write_json_atomically(options.out, result)
    print(json.dumps(result))


PATHS = ("dicts", "flat", "raw")


def by_logprobs(engine: Any, blocks: list[Block], path: str) -> float:
    """Seconds in which the host turns prompt log-probabilities into what `path` gives."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.v1.engine.logprobs import LogprobsProcessor

    convert: Callable[..., None] = LogprobsProcessor._update_prompt_logprobs
    spent, kept = [0.0], []

    def timed(self: Any, tensors: Any) -> None:
        started = time.perf_counter()
        if path == "raw":
            kept.append(tensors)
        else:
            convert(self, tensors)
        spent[0] += time.perf_counter() - started

    LogprobsProcessor._update_prompt_logprobs = timed
    try:
        for block in blocks:
            params = SamplingParams(
                temperature=0,
                max_tokens=1,
                prompt_logprobs=K,
                detokenize=False,
                flat_logprobs=path == "flat",
            )
            name = f"{path}-{block.block_id}"
            engine.add_request(name, tokens_input(block.input_ids_T.tolist()), params)
        while engine.has_unfinished_requests():
            engine.step()
    finally:
        LogprobsProcessor._update_prompt_logprobs = convert
    assert path != "raw" or kept, "vLLM no longer passes prompt log-probabilities this way"
    return spent[0]


def by_tap(engine: Any, blocks: list[Block]) -> float:
    """Seconds that `VllmTeacher.score` takes outside the engine."""
    waiting = _Waiting(engine)
    teacher = VllmTeacher(waiting, CONFIG, TopKConfig(kind="top_k", k=K), SEED, VOCAB_SIZE)
    started, before = time.perf_counter(), waiting.seconds
    for _ in teacher.score([blocks]):
        pass
    return time.perf_counter() - started - (waiting.seconds - before)


class _Waiting:
    """The engine, with the time that its calls take."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.seconds = engine, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        if not callable(found):
            return found

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return found(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - started

        return timed


if __name__ == "__main__":
    main()
