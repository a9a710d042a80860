"""Low-rank adapters through peft: put into a student, saved alone, merged into its weights."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLora
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save

from distill.config import LoraConfig
from distill.errors import ConfigError


def add_adapters(student: Any, settings: LoraConfig) -> Any:
    """Return `student` in a PeftModel whose adapters alone are trained; they begin at zero effect.

    Raises:
        ConfigError: `train.lora.modules` names layers that the student does not have.
    """
    modules = settings.modules
    found = {name.rpartition(".")[2] for name, _ in student.named_modules()}
    unknown = [] if modules == "all-linear" else sorted(set(modules) - found)
    if unknown:
        linear = torch.nn.Linear
        names = {n.rpartition(".")[2] for n, m in student.named_modules() if isinstance(m, linear)}
        raise ConfigError(
            f"train.lora.modules: the student has no {', '.join(unknown)}. "
            f"Its linear layers: {', '.join(sorted(names))}."
        )
    lora = PeftLora(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=modules if modules == "all-linear" else list(modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft 0.21 still asks for a flag by the name that transformers 5.20 gave up.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
        return get_peft_model(student, lora)


def merge(student: Any, base: Path) -> tuple[Any, dict[str, bytes]]:
    """Merge the adapters of a PeftModel into its weights, in float32.

    Args:
        student: From `add_adapters`, trained.
        base: The folder of the model that the adapters belong to.

    Returns:
        The plain model, and the files of the adapters by name, as peft and vLLM read them.
    """
    config = student.peft_config["default"]
    config.base_model_name_or_path = str(base)
    config.inference_mode = True
    settings = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
    files = {
        "adapter/adapter_config.json": json.dumps(settings, indent=2).encode(),
        "adapter/adapter_model.safetensors": save(
            get_peft_model_state_dict(student, save_embedding_layers=False)
        ),
    }
    return student.float().merge_and_unload(), files
