"""Refuse a teacher that does not fit, before it is loaded, and say what would."""

from contextlib import AbstractContextManager

import psutil
import torch

from distill.errors import ConfigError, TeacherError
from distill.hardware import RESIDENT_OVERHEAD, devices_needed
from distill.models import out_of_memory_as
from distill.teacher.weights import Checkpoint

_QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2)


def resident_bytes(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of all weights once loaded: floats in `dtype`, FP8 as it is where the device has it."""
    total = 0
    for name in checkpoint.names:
        stored = checkpoint.dtype(name)
        is_wide = stored.is_floating_point and (stored not in _QUANTISED or device.type == "cpu")
        width = dtype.itemsize if is_wide else stored.itemsize
        total += checkpoint.num_bytes([name]) // stored.itemsize * width
    return total


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def require_resident(name: str, num_bytes: int, free: int, device: torch.device) -> None:
    """Refuse a resident teacher that is larger than its device.

    Args:
        name: Of the model.
        num_bytes: Of its weights (`resident_bytes`).
        free: Of the device (`free_bytes`).
        device: Where it is to go.

    Raises:
        ConfigError: says how many such devices, or which other teacher, would do.
    """
    if num_bytes * RESIDENT_OVERHEAD <= free:
        return
    several = ""
    if device.type != "cpu":
        needed = devices_needed(num_bytes, free)
        several = (
            f"\n    {needed} such devices: teacher.tensor_parallel=true under torchrun, or "
            "teacher.device_map=auto"
        )
    raise ConfigError(
        f"teacher.model: {name} does not fit: {num_bytes / 1e9:,.1f} GB of weights and a tenth for "
        f"activations, but {device} has {free / 1e9:,.1f} GB free.\n  What would fit:"
        f"{several}\n    this device alone: teacher.kind=streamed, a layer at a time\n"
        "  What each costs: distill estimate CONFIG"
    )


def require_streamed(name: str, stage_bytes: list[int], held: int, device: torch.device) -> None:
    """Refuse a streamed teacher whose largest neighbouring stages are larger than the memory.

    Args:
        name: Of the model.
        stage_bytes: Of each stage once loaded, in order.
        held: Stages in memory at a time.
        device: Where they compute.

    Raises:
        ConfigError: names the setting to lower.
    """
    free = free_bytes(device)
    around = stage_bytes + stage_bytes[: held - 1]  # the first stage follows the last
    largest = max(sum(around[first : first + held]) for first in range(len(stage_bytes)))
    if largest > free:
        raise ConfigError(
            f"teacher.model: {name} does not fit even a layer at a time: {held} neighbouring parts "
            f"take up to {largest / 1e9:,.1f} GB, but {device} has {free / 1e9:,.1f} GB free.\n"
            "  Lower teacher.layers_ahead, or give a larger device."
        )


def out_of_memory_named(
    micro_batch_tokens: int, head_chunk_tokens: int
) -> AbstractContextManager[None]:
    """Turn an exhausted device into a `TeacherError` that says which settings to lower."""
    return out_of_memory_as(
        TeacherError,
        f"Lower teacher.micro_batch_tokens (now {micro_batch_tokens}) or teacher.head_chunk_tokens "
        f"(now {head_chunk_tokens}); neither changes the cache but for rounding.",
    )
