"""Devices in numbers: peaks, memory, prices; time and money of a piece of work. Pure arithmetic."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

RESIDENT_OVERHEAD = 1.1
"""Memory of a resident model over its weights: activations of a micro-batch, the allocator."""

TRAINING_BYTES = 16
"""A parameter in training: float32 weight, gradient and AdamW's two moments (see train.py)."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator: dense peaks of its data sheet, and a price that is an assumption."""

    name: str
    bf16_flops: float
    """FLOP/s of bfloat16 and float16, without sparsity."""
    fp8_flops: float | None
    """FLOP/s of FP8, without sparsity; None: it has none, and FP8 weights multiply as bfloat16."""
    memory_bytes: float
    memory_bytes_per_second: float
    dollars_per_hour: float
    """Of one device: a round figure within the spread of offers in 2026, which is wide."""


DEVICES = (
    Device(
        name="A100",
        bf16_flops=312e12,
        fp8_flops=None,
        memory_bytes=80e9,
        memory_bytes_per_second=2.039e12,
        dollars_per_hour=1.5,
    ),
    Device(
        name="H100",
        bf16_flops=989e12,
        fp8_flops=1979e12,
        memory_bytes=80e9,
        memory_bytes_per_second=3.35e12,
        dollars_per_hour=3.0,
    ),
    Device(
        name="H200",
        bf16_flops=989e12,
        fp8_flops=1979e12,
        memory_bytes=141e9,
        memory_bytes_per_second=4.8e12,
        dollars_per_hour=4.0,
    ),
    Device(
        name="B200",
        bf16_flops=2250e12,
        fp8_flops=4500e12,
        memory_bytes=180e9,
        memory_bytes_per_second=8e12,
        dollars_per_hour=6.0,
    ),
)
"""SXM modules; the B200 as in a DGX B200, an eighth of its 1,440 GB and 64 TB/s."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Time and money of one piece of work on devices of one kind."""

    devices: int
    at_work: int
    """Devices that compute at the same time."""
    wall_hours: float
    device_hours: float
    """wall_hours * devices: idle devices are paid for."""
    price: float
    """Dollars an hour of one device."""
    dollars: float


def make_job(wall_seconds: float, price: float, *, devices: int = 1, at_work: int = 1) -> Job:
    """Return the job that keeps `devices` for `wall_seconds`, at `price` dollars an hour each."""
    wall_hours = wall_seconds / 3600
    device_hours = wall_hours * devices
    return Job(
        devices=devices,
        at_work=at_work,
        wall_hours=wall_hours,
        device_hours=device_hours,
        price=price,
        dollars=device_hours * price,
    )


def devices_needed(num_bytes: float, memory_bytes: float) -> int:
    """Return the smallest of 1, 2, 4, 8, ... devices with num_bytes * RESIDENT_OVERHEAD."""
    powers: Iterable[int] = (2**exponent for exponent in count())
    return next(n for n in powers if num_bytes * RESIDENT_OVERHEAD <= n * memory_bytes)


def streamed_seconds(
    num_tokens: int,
    *,
    window_tokens: int,
    flops_per_token: float,
    flop_rate: float,
    weight_bytes: float,
    first_layer_bytes: float,
    bytes_per_second: float,
) -> float:
    """Seconds of a forward pass whose weights pass by once for every window of tokens.

    Layers arrive while earlier ones compute, so a window of W tokens takes

        max(W * flops_per_token / flop_rate, weight_bytes / bytes_per_second)
            + first_layer_bytes / bytes_per_second

    where the last term is the wait for the first layer. A window that is not full loads as much.
    The same holds for a resident model, whose link is the device's memory and whose window is a
    micro-batch: then the first layer need not be waited for.

    Args:
        num_tokens: All tokens.
        window_tokens: Tokens that pass through a layer while it is loaded.
        flops_per_token: Of the whole forward pass.
        flop_rate: FLOP/s that are reached, not the peak.
        weight_bytes: Of all layers and the head, as they pass the link.
        first_layer_bytes: Of the layer that is waited for.
        bytes_per_second: Of the slowest part of the way: disk, network or host link.
    """
    load = weight_bytes / bytes_per_second
    fill = first_layer_bytes / bytes_per_second
    full, rest = divmod(num_tokens, window_tokens)
    seconds = full * (max(window_tokens * flops_per_token / flop_rate, load) + fill)
    return seconds + (max(rest * flops_per_token / flop_rate, load) + fill if rest else 0.0)


def break_even_tokens(
    flops_per_token: float, flop_rate: float, weight_bytes: float, bytes_per_second: float
) -> float:
    """Window whose computation takes as long as its weights: larger ones are compute-bound.

    weight_bytes / bytes_per_second = W * flops_per_token / flop_rate. Without attention this is
    bytes a parameter * flop_rate / (2 * bytes_per_second), whatever the size of the model.
    """
    return weight_bytes * flop_rate / (bytes_per_second * flops_per_token)
