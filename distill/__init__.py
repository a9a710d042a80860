"""distill: knowledge distillation for large language models.

Capture a teacher's distributions once (`capture`), train students against the cache (`train`), and
compare them with the teacher (`evaluate`). Names load on first use, so importing this is fast.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.cache.dataset import CacheDataset as CacheDataset
    from distill.cache.joined import JoinedCache as JoinedCache
    from distill.cache.joined import open_joined as open_joined
    from distill.cache.reader import Batch as Batch
    from distill.cache.reader import Cache as Cache
    from distill.cache.reader import open_cache as open_cache
    from distill.capture import capture as capture
    from distill.config import CacheConfig as CacheConfig
    from distill.config import CaptureConfig as CaptureConfig
    from distill.config import CardConfig as CardConfig
    from distill.config import ComparedModelConfig as ComparedModelConfig
    from distill.config import CostConfig as CostConfig
    from distill.config import DataConfig as DataConfig
    from distill.config import EvaluationConfig as EvaluationConfig
    from distill.config import ExperimentConfig as ExperimentConfig
    from distill.config import LoraConfig as LoraConfig
    from distill.config import PretrainedStudentConfig as PretrainedStudentConfig
    from distill.config import PrunedStudentConfig as PrunedStudentConfig
    from distill.config import ResidentTeacherConfig as ResidentTeacherConfig
    from distill.config import SampledConfig as SampledConfig
    from distill.config import ScratchStudentConfig as ScratchStudentConfig
    from distill.config import SourceConfig as SourceConfig
    from distill.config import StreamedTeacherConfig as StreamedTeacherConfig
    from distill.config import ThresholdConfig as ThresholdConfig
    from distill.config import TopKConfig as TopKConfig
    from distill.config import TrainConfig as TrainConfig
    from distill.config import VllmTeacherConfig as VllmTeacherConfig
    from distill.config import load as load_config  # noqa: F401  # public under this name
    from distill.distillation_model import DistillationModel as DistillationModel
    from distill.errors import CacheError as CacheError
    from distill.errors import CheckpointError as CheckpointError
    from distill.errors import ConfigError as ConfigError
    from distill.errors import DistillError as DistillError
    from distill.errors import EvalError as EvalError
    from distill.errors import MismatchError as MismatchError
    from distill.errors import StorageError as StorageError
    from distill.errors import TeacherError as TeacherError
    from distill.errors import TrainingError as TrainingError
    from distill.errors import WorkerError as WorkerError
    from distill.evaluate.compare import evaluate as evaluate
    from distill.evaluate.dense import measure_exactly as measure_exactly
    from distill.evaluate.fidelity import measure as measure
    from distill.head import DistillationHead as DistillationHead
    from distill.head import HeadTargets as HeadTargets
    from distill.losses import LossWeights as LossWeights
    from distill.losses import distillation_loss as distillation_loss
    from distill.targets import SparseTargets as SparseTargets
    from distill.train import train as train

_HOMES = {
    "Batch": "distill.cache.reader",
    "Cache": "distill.cache.reader",
    "CacheConfig": "distill.config",
    "CacheDataset": "distill.cache.dataset",
    "CacheError": "distill.errors",
    "CaptureConfig": "distill.config",
    "CardConfig": "distill.config",
    "CheckpointError": "distill.errors",
    "ComparedModelConfig": "distill.config",
    "ConfigError": "distill.errors",
    "CostConfig": "distill.config",
    "DataConfig": "distill.config",
    "DistillError": "distill.errors",
    "DistillationHead": "distill.head",
    "DistillationModel": "distill.distillation_model",
    "EvalError": "distill.errors",
    "EvaluationConfig": "distill.config",
    "ExperimentConfig": "distill.config",
    "HeadTargets": "distill.head",
    "JoinedCache": "distill.cache.joined",
    "LoraConfig": "distill.config",
    "LossWeights": "distill.losses",
    "MismatchError": "distill.errors",
    "PretrainedStudentConfig": "distill.config",
    "PrunedStudentConfig": "distill.config",
    "ResidentTeacherConfig": "distill.config",
    "SampledConfig": "distill.config",
    "ScratchStudentConfig": "distill.config",
    "SourceConfig": "distill.config",
    "SparseTargets": "distill.targets",
    "StorageError": "distill.errors",
    "StreamedTeacherConfig": "distill.config",
    "TeacherError": "distill.errors",
    "ThresholdConfig": "distill.config",
    "TopKConfig": "distill.config",
    "TrainConfig": "distill.config",
    "TrainingError": "distill.errors",
    "VllmTeacherConfig": "distill.config",
    "WorkerError": "distill.errors",
    "capture": "distill.capture",
    "distillation_loss": "distill.losses",
    "evaluate": "distill.evaluate.compare",
    "load_config": "distill.config",
    "measure": "distill.evaluate.fidelity",
    "measure_exactly": "distill.evaluate.dense",
    "open_cache": "distill.cache.reader",
    "open_joined": "distill.cache.joined",
    "train": "distill.train",
}

__all__ = sorted(_HOMES)


class _Package(ModuleType):
    """Resolves public names on first use.

    `capture`, `train` and `evaluate` are functions as well as modules: an import of the module sets
    the name on the package, and is overruled here (`from distill.train import ...` still works).
    """

    def __getattribute__(self, name: str) -> Any:
        homes = super().__getattribute__("__dict__").get("_HOMES", {})
        if name not in homes:
            return super().__getattribute__(name)
        attribute = "load" if name == "load_config" else name
        return getattr(import_module(homes[name]), attribute)


sys.modules[__name__].__class__ = _Package
