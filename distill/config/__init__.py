"""Typed configuration: one YAML file an experiment, plus dotted `section.field=value` overrides.

Precedence: defaults < YAML < overrides; environment variables play no part. The result is frozen,
unknown keys are errors, and all errors are reported together. No torch here.
"""

from distill.config.capture import (
    CacheConfig,
    CaptureConfig,
    DataConfig,
    SampledConfig,
    SourceConfig,
    TargetsConfig,
    ThresholdConfig,
    TopKConfig,
)
from distill.config.card import CardConfig
from distill.config.evaluation import ComparedModelConfig, CostConfig
from distill.config.experiment import EvaluationConfig, ExperimentConfig
from distill.config.load import load, parse, to_tree
from distill.config.student import LoraConfig, TrainConfig
from distill.config.students import (
    PretrainedStudentConfig,
    PrunedStudentConfig,
    ScratchStudentConfig,
    StudentConfig,
)
from distill.config.teacher import (
    ResidentTeacherConfig,
    StreamedTeacherConfig,
    TeacherConfig,
    VllmTeacherConfig,
)

__all__ = [
    "CacheConfig",
    "CaptureConfig",
    "CardConfig",
    "ComparedModelConfig",
    "CostConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "LoraConfig",
    "PretrainedStudentConfig",
    "PrunedStudentConfig",
    "ResidentTeacherConfig",
    "SampledConfig",
    "ScratchStudentConfig",
    "SourceConfig",
    "StreamedTeacherConfig",
    "StudentConfig",
    "TargetsConfig",
    "TeacherConfig",
    "ThresholdConfig",
    "TopKConfig",
    "TrainConfig",
    "VllmTeacherConfig",
    "load",
    "parse",
    "to_tree",
]
