"""Open models and tokenizers of transformers, with errors that name the setting at fault."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from distill.errors import ConfigError, MismatchError

_UNSUPPORTED_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def load_tokenizer(name: str, setting: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Open the tokenizer in a folder or on the hub.

    Raises:
        ConfigError: there is none; `setting` is named.
    """
    _require_folder(name, setting)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{setting}: cannot open a tokenizer at {name!r}: {_first_line(error)}"
        ) from error
    return tokenizer


def load_config(name: str, setting: str, revision: str | None = None) -> Any:
    """Open the configuration of a model, without its weights.

    Raises:
        ConfigError: there is none; `setting` is named.
    """
    _require_folder(name, setting)
    try:
        return AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{setting}: cannot open a model at {name!r}: {_first_line(error)}"
        ) from error


def load_causal_lm(name: str, setting: str, **options: Any) -> Any:
    """Open a causal language model; `options` are those of `from_pretrained`.

    Raises:
        ConfigError: it cannot be opened; `setting` is named.
        MismatchError: the model changes its logits after the head, which would be left out.
    """
    config = load_config(name, setting, options.get("revision"))
    refuse_logit_transforms(config, f"{setting} ({name})")
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"{setting}: cannot open a model at {name!r}: {_first_line(error)}"
        ) from error


def local_folder(name: str, setting: str, revision: str | None = None) -> Path:
    """Return the folder of a model with safetensors, downloaded from the hub if it is not local.

    Raises:
        ConfigError: it cannot be had; `setting` is named.
    """
    _require_folder(name, setting)
    if Path(name).is_dir():
        return Path(name)
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=["*.safetensors", "*.json"]
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: cannot download {name!r}: {_first_line(error)}") from error
    return Path(found)


def refuse_logit_transforms(config: Any, who: str) -> None:
    """Refuse families that change logits after the head: capture and loss call the head alone.

    Raises:
        MismatchError: the setting is named.
    """
    for name in _UNSUPPORTED_LOGIT_SETTINGS:
        value = getattr(config, name, None)
        if value not in (None, 1, 1.0):
            raise MismatchError(
                f"{who}: {config.model_type} changes its logits after the head ({name} = {value}), "
                "which distill does not support.\n  Choose a model with a plain head."
            )


def pick_device(name: str | None) -> torch.device:
    """Return the named device, or the accelerator if there is one, or the CPU."""
    if name is not None:
        return torch.device(name)
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    return accelerator or torch.device("cpu")


def _require_folder(name: str, setting: str) -> None:
    # "a/b" may be a hub id; anything else that is not there can only be a path.
    is_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if is_path and "/" in name and not Path(name).is_dir():
        raise ConfigError(
            f"{setting}: there is no folder {name!r}. Give a model folder or a hub id."
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
