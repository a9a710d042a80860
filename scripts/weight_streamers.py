"""The work of bench_streamed.py, and other ways to do it: Accelerate's disk offload, and AirLLM."""

import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.config import ThresholdConfig
from distill.data import Block
from distill.models import load_tokenizer
from distill.targets import SparseTargets
from distill.teacher.selection import Selection, stack_inputs

ROOT = Path(__file__).parent.parent
SEED, VOCAB_SIZE, BLOCK_LENGTH = 0, 128_256, 512
WINDOW_TOKENS, MICRO_BATCH_TOKENS = 4096, 2048


def make_blocks(num_tokens: int) -> list[Block]:
    """Blocks of random tokens, two documents each."""
    random = np.random.default_rng(SEED)
    cut = BLOCK_LENGTH // 3
    lengths = np.array([cut, BLOCK_LENGTH - cut], np.int32)
    return [
        Block(
            number,
            random.integers(0, VOCAB_SIZE, BLOCK_LENGTH).astype(np.int32),
            lengths,
            np.ones(BLOCK_LENGTH, np.bool_),
        )
        for number in range(num_tokens // BLOCK_LENGTH)
    ]


def new_selection() -> Selection:
    """Draws of the default kind."""
    return Selection("random", ThresholdConfig(), SEED, VOCAB_SIZE, chunk_rows=256)


def timed(work: Callable[[], list[SparseTargets]]) -> tuple[list[SparseTargets], float]:
    """Result and wall time of `work`."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


@torch.inference_mode()
def run_accelerate(folder: str) -> dict[str, Any]:
    """Score the same micro-batches with transformers and Accelerate's disk offload."""
    config = AutoConfig.from_pretrained(folder)
    places: dict[str, str] = {f"model.layers.{n}": "disk" for n in range(config.num_hidden_layers)}
    places |= {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"lm_head": "disk"}
    with tempfile.TemporaryDirectory(dir=Path(folder).parent) as offload:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, device_map=places, offload_folder=offload
        ).eval()
        selection, blocks = new_selection(), make_blocks(WINDOW_TOKENS)
        at_once = MICRO_BATCH_TOKENS // BLOCK_LENGTH

        def work() -> list[SparseTargets]:
            found: list[SparseTargets] = []
            for first in range(0, len(blocks), at_once):
                batch = blocks[first : first + at_once]
                input_ids_BT, position_ids_BT = stack_inputs(batch, torch.device("cpu"))
                hidden_BTD = model.get_decoder()(
                    input_ids=input_ids_BT, position_ids=position_ids_BT, use_cache=False
                ).last_hidden_state
                found += selection.select(hidden_BTD, batch, model.get_output_embeddings())
            return found

        taken = timed(work)[1]
    return {"seconds": round(taken, 2), "tokens_per_second": round(WINDOW_TOKENS / taken, 2)}


@torch.inference_mode()
def run_airllm(package: str, folder: str) -> dict[str, Any]:
    """Run the same tokens through AirLLM, and draw from its logits."""
    sys.path.append(package)
    from airllm import AutoModel

    load_tokenizer(str(ROOT / "assets" / "teacher"), "assets").save_pretrained(folder)
    model = AutoModel.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
    selection, blocks = new_selection(), make_blocks(WINDOW_TOKENS)
    at_once = MICRO_BATCH_TOKENS // BLOCK_LENGTH

    def work() -> list[SparseTargets]:
        found: list[SparseTargets] = []
        for first in range(0, len(blocks), at_once):
            batch = blocks[first : first + at_once]
            input_ids_BT, _ = stack_inputs(batch, torch.device("cpu"))
            logits_BTV = model(input_ids=input_ids_BT, use_cache=False).logits
            found += selection.select(logits_BTV, batch, lambda logits_RV: logits_RV)
        return found

    taken = timed(work)[1]
    return {"seconds": round(taken, 2), "tokens_per_second": round(WINDOW_TOKENS / taken, 2)}


def in_process(work: Callable[[str], dict[str, Any]], folder: str) -> dict[str, Any]:
    """Run `work` in a new process; return what it found, and the largest memory that it held."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        pid = pool.apply(os.getpid)
        peak, done = [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                status = Path(f"/proc/{pid}/status").read_text()
                held = [int(status.split(f"{n}:")[1].split()[0]) for n in ("RssAnon", "RssShmem")]
                peak[0] = max(peak[0], sum(held) * 1024)

        watcher = threading.Thread(target=watch)
        watcher.start()
        found = pool.apply(work, (folder,))
        done.set()
        watcher.join()
    return {**found, "peak_bytes": peak[0]}
