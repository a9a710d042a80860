"""From an experiment to its costs: read from top to bottom. No torch at import."""

import math
from dataclasses import dataclass
from typing import Any

from distill.config import ExperimentConfig, StreamedTeacherConfig, to_tree
from distill.errors import ConfigError
from distill.estimate.measure import count_rows, finished_shards, score_sample
from distill.estimate.models import DTYPE_BYTES, Model, open_model, open_student
from distill.estimate.sizes import CacheSize, RowCount, cache_size
from distill.hardware import (
    DEVICES,
    TRAINING_BYTES,
    Device,
    Job,
    break_even_tokens,
    devices_needed,
    make_job,
    streamed_seconds,
)

FORWARD_AND_BACKWARD = 3
"""Training over a forward pass: one more for the gradient of inputs, one for that of weights."""


@dataclass(frozen=True, kw_only=True)
class EstimateOptions:
    """What is measured, and what is assumed of devices and links."""

    sample_blocks: int = 0
    """Blocks that the teacher scores now, to measure ids and bytes a row; 0 takes constants."""
    pack_blocks: int = 16
    """Blocks of the actual data that are packed to see how many rows count; 0 assumes all."""
    mfu: float = 0.4
    """Share of a device's dense peak that is reached."""
    flop_rate: float | None = None
    """FLOP/s that your own device reaches; None takes the table of devices at `mfu`."""
    memory_bytes: float = 80e9
    """Memory of your own device, with `flop_rate`."""
    price: float | None = None
    """Dollars an hour of one device; None takes each device's own (`Device.dollars_per_hour`)."""
    link_bytes_per_second: float = 6e9
    """Of the weights of a streamed teacher, at the slowest part of their way: a fast NVMe disk."""

    def __post_init__(self) -> None:
        bounds = {
            "sample_blocks": (
                self.sample_blocks == 0 or self.sample_blocks >= 2,
                "0, or 2 or more",
            ),
            "pack_blocks": (self.pack_blocks >= 0, "0 or more"),
            "mfu": (0 < self.mfu <= 1, "above 0, at most 1"),
            "price": (self.price is None or 0 <= self.price < math.inf, "0 or more"),
            "flop_rate": (self.flop_rate is None or 0 < self.flop_rate < math.inf, "above 0"),
            "memory_bytes": (0 < self.memory_bytes < math.inf, "above 0"),
            "link_bytes_per_second": (0 < self.link_bytes_per_second < math.inf, "above 0"),
        }
        wrong = [
            f"  {name}: expected {text}, got {getattr(self, name)!r}"
            for name, (fits, text) in bounds.items()
            if not fits
        ]
        if wrong:
            raise ConfigError("options of the estimate\n" + "\n".join(wrong))

    def devices(self) -> tuple[Device, ...]:
        """The table of devices, or the one that was described."""
        if self.flop_rate is None:
            return DEVICES
        yours = Device(
            name="yours",
            bf16_flops=self.flop_rate / self.mfu,
            fp8_flops=None,
            memory_bytes=self.memory_bytes,
            memory_bytes_per_second=math.inf,
            dollars_per_hour=0.0,
        )
        return (yours,)


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """What one model has to compute."""

    name: str
    source: str
    """Where the shape comes from."""
    num_parameters: int
    multiplied_parameters: int
    """Without the input embedding, which is looked up."""
    fp8_parameters: int
    """Of them, those that multiply in FP8 on devices that can."""
    weight_bytes: float
    """Of a teacher as stored; of a student in training, with gradients and optimiser state."""
    streamed_bytes: float
    """Of them, those that pass by in one streamed window: all but the input embedding."""
    attention_flops_per_token: float
    forward_flops_per_token: float
    passes: int
    """Forward passes that the work is worth: 1; in training 3, with checkpointing 4."""
    num_tokens: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class DeviceCost:
    """All work on devices of one kind."""

    device: str
    teacher_flop_rate: float
    """FLOP/s of one device on the teacher: MFU times the peak of each part's format."""
    resident: Job
    """The teacher whole in memory."""
    streamed: Job
    """The teacher through one device, a layer at a time."""
    break_even_tokens: float
    """Window whose computation takes as long as loading the weights."""
    student_flop_rate: float
    student: Job


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the experiment will take."""

    run_folder: str
    targets: dict[str, Any]
    rows: RowCount
    cache: CacheSize
    teacher: ModelCost
    student: ModelCost
    device_map: str | None
    """The teacher's: if set, its devices work one after the other."""
    window_tokens: int
    """Of a streamed teacher: tokens for each pass of its weights."""
    parked_bytes: float
    """Host memory for the hidden states of a streamed teacher's window."""
    devices: tuple[DeviceCost, ...]
    options: EstimateOptions


def run(config: ExperimentConfig, options: EstimateOptions) -> Estimate:
    """Estimate rows, cache, FLOPs, hours and dollars of an experiment.

    Writes nothing and, unless `options.sample_blocks` is set, loads no weights.

    Raises:
        ConfigError: the shape of a model is not to be had, or blocks cannot be counted.
        CacheError: the run's cache is damaged.
    """
    teacher = open_model(
        config.teacher.model, "teacher.model", config.teacher.dtype, config.teacher.revision
    )
    student = open_student(config, teacher)
    measured = finished_shards(config)
    if measured is None and options.sample_blocks:
        measured = score_sample(config, options.sample_blocks)
    # Where the hub did not give config.json it will not give the tokenizer: each try takes 20 s.
    why_not = None if teacher.is_opened or config.data.tokenizer else "the tokenizer is not here"
    rows = count_rows(config, measured, options.pack_blocks, why_not)
    train_tokens = round(rows.train_blocks * rows.block_length * config.train.epochs)
    passes = FORWARD_AND_BACKWARD + config.train.gradient_checkpointing
    training_bytes = float(student.shape.num_parameters * TRAINING_BYTES)
    teacher_cost = _model_cost(
        teacher, teacher.weights.num_bytes(teacher.shape), rows, rows.num_tokens, 1
    )
    student_cost = _model_cost(student, training_bytes, rows, train_tokens, passes)
    hidden_bytes = teacher.shape.hidden_size * DTYPE_BYTES[config.teacher.dtype]
    return Estimate(
        run_folder=str(config.run_folder),
        targets=to_tree(config)["targets"],
        rows=rows,
        cache=cache_size(config, rows, teacher.shape.vocab_size, measured),
        teacher=teacher_cost,
        student=student_cost,
        device_map=getattr(config.teacher, "device_map", None),
        window_tokens=window_tokens(config),
        parked_bytes=min(window_tokens(config), rows.num_tokens) * hidden_bytes,
        devices=tuple(
            _on_device(device, config, options, (teacher, teacher_cost), (student, student_cost))
            for device in options.devices()
        ),
        options=options,
    )


def window_tokens(config: ExperimentConfig) -> int:
    """Tokens that a streamed teacher passes through a layer while it is loaded."""
    default = StreamedTeacherConfig(kind="streamed", model="").window_tokens
    return int(getattr(config.teacher, "window_tokens", default))


def _model_cost(
    model: Model, weight_bytes: float, rows: RowCount, num_tokens: int, passes: int
) -> ModelCost:
    flops_per_token = model.shape.flops_per_token(rows.block_length)
    fp8 = model.weights.quantised_parameters(model.shape) if model.weights.multiplies_fp8 else 0
    return ModelCost(
        name=model.name,
        source=model.source,
        num_parameters=model.shape.num_parameters,
        multiplied_parameters=model.shape.multiplied_parameters,
        fp8_parameters=fp8,
        weight_bytes=weight_bytes,
        streamed_bytes=model.weights.streamed_bytes(model.shape),
        attention_flops_per_token=model.shape.attention_flops_per_token(rows.block_length),
        forward_flops_per_token=flops_per_token,
        passes=passes,
        num_tokens=num_tokens,
        flops=flops_per_token * passes * num_tokens,
    )


def _on_device(
    device: Device,
    config: ExperimentConfig,
    options: EstimateOptions,
    teacher: tuple[Model, ModelCost],
    student: tuple[Model, ModelCost],
) -> DeviceCost:
    price = device.dollars_per_hour if options.price is None else options.price
    length = config.data.block_length
    model, cost = teacher
    rate = model.weights.flop_rate(model.shape, length, device, options.mfu)
    devices = devices_needed(cost.weight_bytes, device.memory_bytes)
    at_work = 1 if getattr(config.teacher, "device_map", None) else devices
    resident = streamed_seconds(
        cost.num_tokens,
        window_tokens=max(1, getattr(config.teacher, "micro_batch_tokens", length) // length)
        * length,
        flops_per_token=cost.forward_flops_per_token,
        flop_rate=rate * at_work,
        weight_bytes=cost.streamed_bytes,
        first_layer_bytes=0,
        bytes_per_second=device.memory_bytes_per_second * at_work,
    )
    streamed = streamed_seconds(
        cost.num_tokens,
        window_tokens=window_tokens(config),
        flops_per_token=cost.forward_flops_per_token,
        flop_rate=rate,
        weight_bytes=cost.streamed_bytes,
        first_layer_bytes=model.weights.layer_bytes(model.shape, 0),
        bytes_per_second=options.link_bytes_per_second,
    )
    learner, learning = student
    student_rate = learner.weights.flop_rate(learner.shape, length, device, options.mfu)
    learners = devices_needed(learning.weight_bytes, device.memory_bytes)
    return DeviceCost(
        device=device.name,
        teacher_flop_rate=rate,
        resident=make_job(resident, price, devices=devices, at_work=at_work),
        streamed=make_job(streamed, price),
        break_even_tokens=break_even_tokens(
            cost.forward_flops_per_token, rate, cost.streamed_bytes, options.link_bytes_per_second
        ),
        student_flop_rate=student_rate,
        student=make_job(
            learning.flops / (student_rate * learners), price, devices=learners, at_work=learners
        ),
    )
