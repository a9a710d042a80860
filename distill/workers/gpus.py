"""Which worker gets which GPUs."""

import os

from distill.config import ExperimentConfig, VllmTeacherConfig
from distill.errors import ConfigError


def teacher_gpus(config: ExperimentConfig) -> int:
    """GPUs that one replica of the teacher needs, on a machine that has some."""
    teacher = config.teacher
    if config.capture.gpus_per_worker is not None:
        return config.capture.gpus_per_worker
    if isinstance(teacher, VllmTeacherConfig):
        return teacher.tensor_parallel_size * teacher.pipeline_parallel_size
    return 0 if teacher.device == "cpu" else 1


def require_unpinned(config: ExperimentConfig) -> None:
    """Refuse a teacher bound to one GPU of the machine: each worker sees its own ones only.

    Raises:
        ConfigError: `teacher.device` names a GPU by number.
    """
    device = None if isinstance(config.teacher, VllmTeacherConfig) else config.teacher.device
    if device is not None and ":" in device:
        raise ConfigError(
            f"teacher.device is {device}, but capture gives each of its workers GPUs of its own.\n"
            "  Leave teacher.device out, or set capture.workers=1 and capture.engine=local."
        )


def share_gpus(config: ExperimentConfig, num_workers: int) -> list[dict[str, str]]:
    """Return the environment of each worker: its part of the GPUs that this process sees.

    Raises:
        ConfigError: there are fewer GPUs than the workers need.
    """
    import torch

    num_visible, each = torch.cuda.device_count(), teacher_gpus(config)
    if not num_visible and config.capture.gpus_per_worker is None:
        each = 0
    if num_workers * each > num_visible:
        raise ConfigError(
            f"capture.workers is {num_workers} with {each} GPUs each, but this machine shows "
            f"{num_visible}.\n  Take fewer workers, or spread them: capture.engine=ray, or "
            "distill cache --worker I/N on several machines."
        )
    if not each:
        return [{}] * num_workers
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = names or [str(number) for number in range(num_visible)]
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(names[worker * each : (worker + 1) * each])}
        for worker in range(num_workers)
    ]
