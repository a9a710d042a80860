"""What the use of a model costs: speed and memory of transformers' `generate`. No torch here.

Every model is measured in a process of its own, so that its peak of memory is its own.

The file `MODEL/cost.json` holds the fields of `Cost`, `rounds` (how many were measured) and
`identity`: weights, dtype, device, settings, machine. It is not made again while that holds.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from distill.config import ComparedModelConfig, CostConfig
from distill.errors import EvalError
from distill.files import write_json_atomically


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Size, speed and memory of one model on one machine."""

    num_parameters: int
    """Tied ones count once; an adapter's are among them."""
    weight_bytes: int
    prefill_tokens_per_second: float
    """Tokens of prompts, up to the first new token; median over rounds."""
    decode_tokens_per_second: float
    """New tokens of all prompts of a batch, after the first; median over rounds."""
    peak_bytes: int
    """Most memory at a time: what the device had allocated, or on the CPU what the process held
    beyond its libraries, the opening of the model included."""


def measure_cost(
    model: str | ComparedModelConfig, dtype: str, device: str, settings: CostConfig
) -> Cost:
    """Measure a model in a fresh process, after one round to warm up.

    Args:
        model: Folder or hub id, or how to open it with transformers.
        dtype: Of its weights.
        device: cpu, cuda, cuda:1.
        settings: Sizes of prompts and answers, and how often.

    Raises:
        EvalError: the model cannot be opened or is too short, or the process was killed.
    """
    if isinstance(model, str):
        model = ComparedModelConfig(path=model)
    # Spawned, not forked: a fork would start with this process's memory and its torch threads.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_measure, model, dtype, device, settings).result()
        except BrokenProcessPool as error:
            raise EvalError(
                f"the process that measured {model.path} was killed, as happens where memory ends."
                "\n  Lower evaluation.cost: prompt_tokens or batch_size, or set it to null."
            ) from error


def keep_cost(
    name: str,
    model: ComparedModelConfig,
    target: Path,
    *,
    dtype: str,
    device: str,
    settings: CostConfig,
    weights: dict[str, Any],
    on_progress: Callable[[str], None],
) -> None:
    """Write the costs of a model to `target`, unless they are there.

    Args:
        name: Of the model, for progress.
        model: How to open it.
        target: Its cost.json.
        dtype: Of its weights.
        device: Where it is measured.
        settings: How it is measured.
        weights: What identifies it.
        on_progress: Receives one line for what is done or skipped.

    Raises:
        EvalError: as `measure_cost`.
    """
    identity = weights | {
        "dtype": dtype,
        "device": device,
        "settings": asdict(settings),
        "machine": describe_machine(device),
    }
    if target.exists() and json.loads(target.read_text())["identity"] == identity:
        on_progress(f"{name}: costs are there, skipped")
        return
    on_progress(f"{name}: measuring speed and memory")
    cost = measure_cost(model, dtype, device, settings)
    record = {"identity": identity, "rounds": settings.rounds, **asdict(cost)}
    write_json_atomically(target, record)
    on_progress(
        f"{name}: {cost.prefill_tokens_per_second:,.0f} prompt tokens/s, "
        f"{cost.decode_tokens_per_second:,.0f} new tokens/s, {cost.peak_bytes / 1e9:.2f} GB"
    )


def describe_machine(device: str) -> dict[str, Any]:
    """Describe what decides speed beside the model: processor, cores or GPU, torch."""
    processor = _processor()
    if device.startswith("cuda"):
        import torch  # here alone: nothing else names a device

        processor = torch.cuda.get_device_name(device)
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class _Clock:
    """Takes the place of a streamer in `generate`, and notes when each step of tokens is there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: object) -> None:
        del tokens  # the prompt first, then one token of each sequence
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: the last token was noted."""


def _measure(model: ComparedModelConfig, dtype: str, device: str, settings: CostConfig) -> Cost:
    import torch
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    from distill.evaluate.local_models import load

    disable_progress_bar()
    before = _resident_bytes()
    loaded = load(model, dtype, device)
    config = loaded.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    needed = settings.prompt_tokens + settings.new_tokens
    if longest is not None and longest < needed:
        raise EvalError(
            f"evaluation.cost asks for {needed} tokens, but {model.path} was made for {longest} "
            "(max_position_embeddings).\n  Lower prompt_tokens or new_tokens."
        )
    # A fresh one, without an end of text: every answer has the same length.
    loaded.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=settings.new_tokens, pad_token_id=0
    )
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch_size, settings.prompt_tokens)
    prompts_BT = torch.randint(config.vocab_size, shape, generator=generator).to(loaded.device)
    prefill, decode = [], []
    for _ in range(1 + settings.rounds):
        clock = _Clock()
        loaded.generate(
            input_ids=prompts_BT, attention_mask=torch.ones_like(prompts_BT), streamer=clock
        )
        start, first, *_, last = clock.times
        prefill.append(prompts_BT.numel() / (first - start))
        decode.append(settings.batch_size * (settings.new_tokens - 1) / (last - first))
    parameters = list(loaded.parameters())
    return Cost(
        num_parameters=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        prefill_tokens_per_second=statistics.median(prefill[1:]),
        decode_tokens_per_second=statistics.median(decode[1:]),
        peak_bytes=torch.cuda.max_memory_allocated(device)
        if device.startswith("cuda")
        else peak_resident_bytes() - before,
    )


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Return the most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage of a child on Linux starts from its parent's peak
        lines = status.read_text().splitlines()
        (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
        return int(peak) * 1024
    import resource

    peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak_rss if sys.platform == "darwin" else peak_rss * 1024
