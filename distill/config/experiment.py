"""The whole experiment, and the settings of its comparison."""

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from distill.config.base import STRICT, Dtype, Positive
from distill.config.capture import (
    CacheConfig,
    CaptureConfig,
    DataConfig,
    TargetsConfig,
    ThresholdConfig,
)
from distill.config.card import CardConfig
from distill.config.student import TrainConfig
from distill.config.students import StudentConfig
from distill.config.teacher import TeacherConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """What the models are compared on."""

    tasks: tuple[str, ...] = ()
    """Tasks or groups by their lm-eval name; none means held-out blocks only."""
    include_path: str | None = None
    """Folder of task YAMLs of your own; then lm-eval's stock tasks are not indexed."""
    limit: Positive | None = None
    """Documents a task; null takes all."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in the prompt; null takes each task's own number."""
    batch_size: Positive = 8
    """Requests a forward pass."""
    max_length: Positive = 2048
    """Longest context in tokens; rolling perplexities depend on it."""
    dtype: Dtype = "bfloat16"
    """Weights of the models while they are compared."""
    models: dict[str, str] = Field(default_factory=dict)
    """Further models to compare: name -> folder or hub id."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ExperimentConfig:
    """One experiment: documents -> targets -> student -> scores."""

    run_folder: Path
    """Everything that the run makes is below this folder."""
    seed: int = 0
    """Decides held-out documents, drawn ids, data order and new weights."""
    device: str | None = None
    """Of the student in training and evaluation; by default the accelerator if there is one."""
    data: DataConfig
    teacher: TeacherConfig
    targets: TargetsConfig = Field(default_factory=ThresholdConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    capture: CaptureConfig = Field(default_factory=CaptureConfig)
    student: StudentConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    card: CardConfig = Field(default_factory=CardConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if getattr(self.teacher, "tensor_parallel", False) and self.capture.workers > 1:
            raise ValueError(
                "teacher.tensor_parallel and capture.workers exclude each other: start one capture "
                "under torchrun for each group of GPUs, with --worker I/N"
            )

    def cache_folder(self, split: str) -> str:
        """Folder or URL of the cache of one split, `train` or `held_out`."""
        root = self.cache.folder or str(self.run_folder / "cache")
        return f"{root.rstrip('/')}/{split}"

    def training_folders(self) -> list[str]:
        """Folders or URLs of all caches that the student learns from, our own first."""
        return [self.cache_folder("train"), *(f"{r.rstrip('/')}/train" for r in self.cache.also)]
