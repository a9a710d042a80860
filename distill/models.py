"""Open models and tokenizers of transformers, with errors that name the setting at fault."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from distill.errors import ConfigError, DistillError, MismatchError

_UNSUPPORTED_LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def load_tokenizer(name: str, setting: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Open the tokenizer in a folder, in a GGUF file or on the hub.

    Raises:
        ConfigError: there is none; `setting` is named.
    """
    with _opening("a tokenizer", name, setting):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            **_where(name), revision=revision
        )
    return tokenizer


def load_config(name: str, setting: str, revision: str | None = None) -> Any:
    """Open the configuration of a model, without its weights.

    Raises:
        ConfigError: there is none; `setting` is named.
    """
    with _opening("a model", name, setting):
        return AutoConfig.from_pretrained(**_where(name), revision=revision)


def load_causal_lm(name: str, setting: str, **options: Any) -> Any:
    """Open a causal language model; `options` are those of `from_pretrained`.

    Raises:
        ConfigError: it cannot be opened, or its weights are incomplete; `setting` is named.
        MismatchError: the model changes its logits after the head, which would be left out.
    """
    config = load_config(name, setting, options.get("revision"))
    refuse_logit_transforms(config, f"{setting} ({name})")
    with _opening("a model", name, setting):
        model, info = AutoModelForCausalLM.from_pretrained(
            **_where(name), output_loading_info=True, **options
        )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random numbers
        raise ConfigError(
            f"{setting}: the weights of {name!r} lack {len(missing)} tensors, first {missing[0]}.\n"
            "  Download the checkpoint again, or check that config.json belongs to it."
        )
    return model


def _where(name: str) -> dict[str, str]:
    """Arguments of `from_pretrained` for a folder, a hub id or a file that ends in .gguf."""
    if not name.endswith(".gguf"):
        return {"pretrained_model_name_or_path": name}
    folder, _, file = name.rpartition("/")
    return {"pretrained_model_name_or_path": folder or ".", "gguf_file": file}


@contextmanager
def _opening(what: str, name: str, setting: str) -> Iterator[None]:
    _require_there(name, setting)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ConfigError(f"{setting}: cannot open {what} at {name!r}: {_reason(error)}") from error


def local_folder(name: str, setting: str, revision: str | None = None) -> Path:
    """Return the folder of a model with safetensors, downloaded from the hub if it is not local.

    Raises:
        ConfigError: it cannot be had; `setting` is named.
    """
    _require_there(name, setting)
    if Path(name).is_dir():
        return Path(name)
    try:
        found = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.safetensors", "*.json"],
            ignore_patterns=["original/*", "consolidated*"],  # the same weights once more
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: cannot download {name!r}: {_reason(error)}") from error
    return Path(found)


@contextmanager
def out_of_memory_as(kind: type[DistillError], advice: str) -> Iterator[None]:
    """Turn an exhausted device into an error that says which settings to lower.

    Raises:
        DistillError: of the given kind, in place of torch's.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise kind(
            f"the device's memory is used up: {str(error).splitlines()[0]}\n  {advice}"
        ) from error


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


def _require_there(name: str, setting: str) -> None:
    if name.endswith(".gguf"):
        is_path, is_there = name.count("/") < 2 or name.startswith((".", "/")), Path(name).is_file()
    else:
        # "a/b" may be a hub id; anything else that is not there can only be a path.
        is_path = "/" in name and (name.startswith((".", "/", "~")) or name.count("/") != 1)
        is_there = Path(name).is_dir()
    if is_path and not is_there:
        kind = "file" if name.endswith(".gguf") else "folder"
        raise ConfigError(
            f"{setting}: there is no {kind} {name!r}. Give a folder, a .gguf file or a hub id."
        )


def _reason(error: Exception) -> str:
    """What the hub or transformers say, as far as it helps, and how to get a gated model."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    causes = [error, error.__cause__, error.__context__]
    if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated repo" in text:
        text += (
            "\n  Accept its licence on its page on the hub, then log in here: hf auth login\n"
            "  Or download it elsewhere, and give the folder."
        )
    return text
