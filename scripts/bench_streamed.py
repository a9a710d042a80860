"""A streamed teacher against a resident one, and against what else streams weights.

    python scripts/bench_streamed.py [--quick] [--large FOLDER [--airllm FOLDER]]
        [--out results/bench_streamed.json]

1. `streamed_over_resident`: tokens a second of the streamed teacher over those of the resident one,
   on a random Llama of half a billion parameters, in bfloat16, at a window of 4,096 tokens. The two
   alternate; the median of the ratios counts. Their targets are compared to the last bit.
2. With --large: a random Llama of the shape of Llama 3.1 8B (16 GB of safetensors, written once to
   FOLDER) scores one window of 4,096 tokens in a process of its own; then the same micro-batches go
   through Accelerate's disk offload, and through AirLLM where its folder is given (made by
   `pip install --no-deps --target FOLDER airllm==4.0.0`). AirLLM takes no packed documents; that it
   writes all layers once more when it opens a model is not counted. Memory is the largest sum of
   RssAnon and RssShmem of the process (/proc/PID/status, every 20 ms): without the page cache.
3. `predicted_over_measured`: the formula of `distill estimate` (streamed_seconds), given FLOP/s of
   one layer in memory and the bytes per second of one layer's read, over the time that 2 took.

Give FOLDER on a disk with 35 GB free.

The last line is one JSON object.
"""

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from distill.config import ResidentTeacherConfig, StreamedTeacherConfig
from distill.estimate.models import shape_of
from distill.files import write_json_atomically
from distill.hardware import streamed_seconds
from distill.targets import concatenate
from distill.teacher.resident import ResidentTeacher
from distill.teacher.selection import stack_inputs
from distill.teacher.streamed import StreamedTeacher
from scripts.bench_teacher import save_random_llama
from scripts.provenance import provenance
from scripts.weight_streamers import (
    BLOCK_LENGTH,
    MICRO_BATCH_TOKENS,
    SEED,
    VOCAB_SIZE,
    WINDOW_TOKENS,
    in_process,
    make_blocks,
    new_selection,
    run_accelerate,
    run_airllm,
    timed,
)


def main() -> None:
    """Measure, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one pair of runs")
    parser.add_argument("--large", type=Path, metavar="FOLDER", help="the 8B shape too")
    parser.add_argument("--airllm", type=Path, metavar="FOLDER", help="where AirLLM is installed")
    parser.add_argument("--out", type=Path, help="also write the result there")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "window_tokens": WINDOW_TOKENS,
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "block_length": BLOCK_LENGTH,
    }
    with tempfile.TemporaryDirectory() as folder:
        save_random_llama(Path(folder))
        result |= against_resident(Path(folder), 1 if options.quick else 3)
    result |= provenance(SEED)
    if options.large:
        save_8b_shape(options.large)
        found = result["llama_8b_shape"] = against_accelerate(options.large)
        keep(result, options.out)  # what follows takes as long again, and is not ours
        if options.airllm:
            run = partial(run_airllm, str(options.airllm.absolute()))
            found["airllm"] = in_process(run, str(options.large))
            seconds = found["airllm"]["seconds"]
            found["speed_over_airllm"] = round(seconds / found["distill"]["seconds"], 3)
    keep(result, options.out)
    print(json.dumps(result))


def keep(result: dict[str, Any], path: Path | None) -> None:
    """Write what is known so far."""
    if path:
        write_json_atomically(path, result)


def new_streamed(folder: Path) -> StreamedTeacher:
    """Open a streamed teacher whose window is all blocks of this benchmark."""
    config = StreamedTeacherConfig(
        kind="streamed",
        model=str(folder),
        device="cpu",
        window_tokens=WINDOW_TOKENS,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
    )
    return StreamedTeacher(config, new_selection())


def against_resident(folder: Path, rounds: int) -> dict[str, Any]:
    """Ratios of throughput, and whether the targets are the same."""
    resident = ResidentTeacher(
        ResidentTeacherConfig(
            model=str(folder), device="cpu", micro_batch_tokens=MICRO_BATCH_TOKENS
        ),
        new_selection(),
    )
    streamed, blocks = new_streamed(folder), make_blocks(WINDOW_TOKENS)
    ratios, waits, are_equal = [], [], True
    for _ in range(rounds):
        waited = streamed.seconds_waiting
        ours, streamed_time = timed(lambda: list(streamed.score([blocks])))
        theirs, resident_time = timed(lambda: list(resident.score([blocks])))
        ratios.append(resident_time / streamed_time)
        waits.append((streamed.seconds_waiting - waited) / streamed_time)
        left, right = concatenate(ours), concatenate(theirs)
        are_equal = are_equal and torch.equal(left.ids_N, right.ids_N)
        are_equal = are_equal and torch.equal(left.weights_N, right.weights_N)
    return {
        "streamed_over_resident": round(statistics.median(ratios), 3),
        "share_waiting": round(statistics.median(waits), 4),
        "targets_are_equal": are_equal,
        "rounds": rounds,
    }


def save_8b_shape(folder: Path) -> None:
    """Write a random checkpoint of the shape of Llama 3.1 8B, a file a layer; once."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()
        }
    files: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        files.setdefault(parts[2] if parts[1] == "layers" else parts[-2], []).append(name)
    torch.manual_seed(SEED)
    placed = {}
    for number, names in enumerate(files.values(), start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"  # AirLLM goes by the number
        tensors = {n: torch.randn(shapes[n], dtype=torch.bfloat16).mul_(0.02) for n in names}
        for name in names:
            if len(shapes[name]) == 1:
                tensors[name].fill_(1)
            placed[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": placed}
    write_json_atomically(folder / "model.safetensors.index.json", index)


def against_accelerate(folder: Path) -> dict[str, Any]:
    """The 8B shape by us and by disk offload, each in a process of its own, and as estimated."""
    found: dict[str, Any] = {}
    for name, work in (("distill", run_streamed), ("accelerate_disk_offload", run_accelerate)):
        found[name] = in_process(work, str(folder))
    ours = found["distill"]
    shape = shape_of(AutoConfig.from_pretrained(folder), "benchmark")
    attention_flops = shape.attention_flops_per_token(BLOCK_LENGTH) / shape.num_layers
    link, rate = one_layer(folder, attention_flops)
    layer_bytes = ours["bytes_streamed"] / shape.num_layers
    predicted = streamed_seconds(
        WINDOW_TOKENS,
        window_tokens=WINDOW_TOKENS,
        flops_per_token=shape.flops_per_token(BLOCK_LENGTH),
        flop_rate=rate,
        weight_bytes=ours["bytes_streamed"],
        first_layer_bytes=layer_bytes,
        bytes_per_second=link,
    )
    found["predicted_over_measured"] = round(predicted / ours["seconds"], 3)
    theirs = found["accelerate_disk_offload"]
    found["speed_over_accelerate"] = round(theirs["seconds"] / ours["seconds"], 3)
    return found


def run_streamed(folder: str) -> dict[str, Any]:
    """Score one window with the streamed teacher."""
    teacher, blocks = new_streamed(Path(folder)), make_blocks(WINDOW_TOKENS)
    targets, taken = timed(lambda: list(teacher.score([blocks])))
    stages = teacher._skeleton.stages
    return {
        "seconds": round(taken, 2),
        "tokens_per_second": round(WINDOW_TOKENS / taken, 2),
        "share_waiting": round(teacher.seconds_waiting / taken, 4),
        "bytes_streamed": sum(teacher._skeleton.num_bytes(stage) for stage in stages[1:]),
        "num_rows": sum(int((target.counts_R > 0).sum()) for target in targets),
    }


def one_layer(folder: Path, attention_flops: float) -> tuple[float, float]:
    """Bytes per second of reading one layer, and FLOP/s of one layer on one micro-batch."""
    skeleton = new_streamed(folder)._skeleton
    stage = skeleton.stages[1]
    started = time.perf_counter()
    tensors = skeleton.read(stage)
    link = skeleton.num_bytes(stage) / (time.perf_counter() - started)
    skeleton.fill(stage, tensors)
    _, position_ids_BT = stack_inputs(make_blocks(MICRO_BATCH_TOKENS), torch.device("cpu"))
    hidden_BTD = torch.randn(*position_ids_BT.shape, 4096, dtype=torch.bfloat16)
    with torch.inference_mode():
        skeleton.layer(0, hidden_BTD, position_ids_BT)
        started = time.perf_counter()
        for _ in range(3):
            skeleton.layer(0, hidden_BTD, position_ids_BT)
        taken = (time.perf_counter() - started) / 3
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return link, (2 * parameters + attention_flops) * MICRO_BATCH_TOKENS / taken


if __name__ == "__main__":
    main()
