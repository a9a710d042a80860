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
from distill.config.evaluation import BatchSize, ComparedModel, CostConfig
from distill.config.presets import LOCAL_PRESETS, PRESETS, Preset
from distill.config.student import TrainConfig
from distill.config.students import StudentConfig
from distill.config.teacher import TeacherConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvaluationConfig:
    """What the models are compared on."""

    tasks: tuple[str, ...] = ()
    """Tasks or groups by their lm-eval name; without any or a preset, held-out blocks only."""
    preset: Preset | None = None
    """A customary set of tasks in place of `tasks`; `distill.config.presets` lists them."""
    include_path: str | None = None
    """Folder of task YAMLs of your own; then lm-eval's stock tasks are not indexed."""
    limit: Positive | None = None
    """Documents a task; null takes all."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in the prompt; null takes each task's own number."""
    batch_size: BatchSize = 8
    """Requests a forward pass; auto tries from 64 downwards what fits."""
    max_length: Positive = 2048
    """Longest context in tokens; rolling perplexities depend on it."""
    dtype: Dtype = "bfloat16"
    """Weights of the models while they are compared."""
    apply_chat_template: bool = False
    """Prompts as a user's turn, in the chat template of each model's tokenizer."""
    fewshot_as_multiturn: bool = False
    """With the chat template: each example as turns of its own, not all in one."""
    models: dict[str, ComparedModel] = Field(default_factory=dict)
    """Further models to compare: name -> folder or hub id, or how to open it."""
    exact: bool = False
    """Open the teacher too, and measure KL and acceptance over whole distributions."""
    held_out: dict[str, str] = Field(default_factory=dict)
    """Further held-out caches, such as one a language or a source: name -> folder or URL."""
    cost: CostConfig | None = None
    """Speed and memory of every model; null does not measure them."""

    def __post_init__(self) -> None:
        problems = []
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            problems.append("fewshot_as_multiturn needs apply_chat_template=true")
        if self.preset is not None:
            problems += self._problems_of(self.preset)
        if problems:
            raise ValueError("; ".join(problems))

    def _problems_of(self, preset: Preset) -> list[str]:
        problems = []
        if self.tasks:
            problems.append("tasks and preset exclude each other: choose one")
        if preset in LOCAL_PRESETS and self.include_path is None:
            problems.append(f"preset {preset} needs include_path: the folder of its tasks")
        if preset not in LOCAL_PRESETS and self.include_path is not None:
            problems.append(f"preset {preset} needs include_path=null: lm-eval's stock tasks")
        if self.num_fewshot is not None and any(shots is not None for _, shots in PRESETS[preset]):
            problems.append(f"preset {preset} prescribes its few-shot examples: num_fewshot=null")
        return problems

    @property
    def requested(self) -> tuple[tuple[str, int | None], ...]:
        """Tasks, groups and tags to run, each with its few-shot examples (None: the task's)."""
        if self.preset is None:
            return tuple((name, self.num_fewshot) for name in self.tasks)
        return tuple(
            (name, self.num_fewshot if shots is None else shots)
            for name, shots in PRESETS[self.preset]
        )


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

    @property
    def training_seed(self) -> int:
        """Decides the order of the blocks, and what dropout drops."""
        return self.seed if self.train.seed is None else self.train.seed

    def training_folders(self) -> list[str]:
        """Folders or URLs of all caches that the student learns from, our own first."""
        return [self.cache_folder("train"), *(f"{r.rstrip('/')}/train" for r in self.cache.also)]
