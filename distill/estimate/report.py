"""An estimate as lines for people, with the arithmetic, and as a dict for machines."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distill.estimate.costs import Estimate, ModelCost
from distill.hardware import RESIDENT_OVERHEAD, TRAINING_BYTES, Job


def as_dict(estimate: Estimate) -> dict[str, Any]:
    """Return the estimate as nested dicts of JSON values; numbers are not rounded."""
    tree: dict[str, Any] = asdict(estimate)
    return tree | {"devices": list(tree["devices"])}


def describe(estimate: Estimate) -> str:
    """Return the estimate as lines for people."""
    head = f"estimate of {estimate.run_folder}"
    facts = {
        "blocks": _blocks(estimate),
        "rows": f"{estimate.rows.num_rows:,} = {estimate.rows.rows_per_token:.4f} a token; "
        f"{estimate.rows.source}",
        "targets": ", ".join(f"{key} {value}" for key, value in estimate.targets.items()),
        "cache": _cache(estimate),
        "": estimate.cache.source,
        "teacher": _model(estimate.teacher),
        " ": _flops(estimate.teacher),
        "student": _model(estimate.student),
        "  ": _flops(estimate.student),
    }
    lines = [f"  {name:<9}{text}" for name, text in facts.items()]
    return "\n".join(
        [head, *lines, *_resident(estimate), *_streamed(estimate), *_trained(estimate)]
    )


def _blocks(estimate: Estimate) -> str:
    rows = estimate.rows
    return (
        f"({rows.train_blocks:,} + {rows.held_out_blocks:,}) x {rows.block_length:,} = "
        f"{rows.num_tokens:,} tokens"
    )


def _cache(estimate: Estimate) -> str:
    cache = estimate.cache
    return (
        f"{estimate.rows.num_rows:,} rows x {cache.bytes_per_row:.2f} bytes = "
        f"{_gigabytes(cache.num_bytes)} in {cache.num_shards:,} shards; "
        f"{cache.ids_per_row:.2f} ids a row"
    )


def _model(cost: ModelCost) -> str:
    fp8 = f", {cost.fp8_parameters:,} of them in FP8" if cost.fp8_parameters else ""
    return f"{cost.name}: {cost.num_parameters:,} parameters{fp8}; shape from {cost.source}"


def _flops(cost: ModelCost) -> str:
    passes = f" x {cost.passes} passes" if cost.passes != 1 else ""
    return (
        f"(2 x {cost.multiplied_parameters:,} + {cost.attention_flops_per_token:.4g} attention)"
        f"{passes} x {cost.num_tokens:,} tokens = {cost.flops:.4g} FLOPs"
    )


def _resident(estimate: Estimate) -> list[str]:
    options, cost = estimate.options, estimate.teacher
    how = "all compute at once (tensor parallelism)"
    if estimate.device_map:
        how = f"compute one after the other (device_map {estimate.device_map})"
    rows = []
    for device, found in zip(options.devices(), estimate.devices, strict=True):
        peaks = f"{device.bf16_flops / 1e12:,.0f}"
        peaks += f" / {device.fp8_flops / 1e12:,.0f}" if device.fp8_flops else ""
        rate = f"{found.teacher_flop_rate / 1e12:,.1f}"
        rows.append([found.device, peaks, rate, *_job(found.resident)])
    columns = ["device", "bf16 / fp8 TFLOP/s", f"at MFU {options.mfu:g}", *_JOB]
    title = (
        f"  teacher, resident: {_gigabytes(cost.weight_bytes)} x {RESIDENT_OVERHEAD} in the memory "
        f"of 1, 2, 4, ... devices, which {how}"
    )
    return [title, *_table(columns, rows)]


def _streamed(estimate: Estimate) -> list[str]:
    options = estimate.options
    rows = [
        [found.device, f"{found.break_even_tokens:,.0f}", *_job(found.streamed)]
        for found in estimate.devices
    ]
    link = options.link_bytes_per_second / 1e9
    title = (
        f"  teacher, streamed: {_gigabytes(estimate.teacher.streamed_bytes)} at {link:g} GB/s for "
        f"every {estimate.window_tokens:,} tokens, whose hidden states take "
        f"{_gigabytes(estimate.parked_bytes)} of host memory"
    )
    return [title, *_table(["device", "compute-bound from", *_JOB], rows)]


def _trained(estimate: Estimate) -> list[str]:
    title = (
        f"  student, trained: {TRAINING_BYTES} bytes x {estimate.student.num_parameters:,} "
        f"x {RESIDENT_OVERHEAD} in the memory of 1, 2, 4, ... devices, all computing at once"
    )
    rows = [
        [found.device, f"{found.student_flop_rate / 1e12:,.1f}", *_job(found.student)]
        for found in estimate.devices
    ]
    columns = ["device", f"TFLOP/s at MFU {estimate.options.mfu:g}", *_JOB]
    return [title, *_table(columns, rows)]


_FORMULAS = (
    "  hours = FLOPs / (FLOP/s x devices at work) / 3600, or the time that weights take to arrive",
    "  where that is longer; device-hours = hours x devices; dollars = device-hours x $ an hour,",
    "  which is an assumption: give your own price. Evaluation is not included.",
)

_JOB = ["devices", "hours", "device-hours", "$ an hour", "dollars"]


def _job(job: Job) -> list[str]:
    return [
        f"{job.devices}",
        f"{job.wall_hours:,.2f}",
        f"{job.device_hours:,.2f}",
        f"{job.price:.2f}",
        f"{job.dollars:,.2f}",
    ]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns are as wide as their widest cell; all but the first stand to the right."""
    cells = [list(columns), *map(list, rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    return [
        "    "
        + "  ".join(
            text.ljust(width) if place == 0 else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.4g} GB"
