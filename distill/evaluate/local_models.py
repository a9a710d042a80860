"""Open models of transformers, and the PEFT adapters on top of them, for the comparison."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from distill.config import ComparedModelConfig
from distill.errors import EvalError
from distill.evaluate.failures import MODEL_ERRORS, first_line
from distill.models import pick_device

WRAPPER_ARGS = frozenset(
    {
        *("truncation", "logits_cache", "softmax_dtype", "mixed_precision_dtype"),
        *("max_batch_size", "add_bos_token", "prefix_token_id", "think_end_token"),
        *("enable_thinking", "chat_template_args"),
    }
)
"""Arguments of lm-eval's HFLM that it minds around a model that is open already."""

_INSTALL = {
    "vllm": "pip install -r requirements-vllm.txt (in an environment of its own)",
    "openai": "pip install 'distill-llm[openai]'",
}


def pretrained_options(model: ComparedModelConfig) -> dict[str, Any]:
    """Return those `args` of a model that `from_pretrained` takes."""
    return {name: value for name, value in model.args.items() if name not in WRAPPER_ARGS}


def load(model: ComparedModelConfig, dtype: str, device: str | None) -> Any:
    """Open a model with its adapter, on a device (None: the accelerator if there is one).

    Raises:
        EvalError: it cannot be opened, lacks weights, or its adapter does not fit.
    """
    options = pretrained_options(model)
    with opening(model):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            model.path, dtype=dtype, output_loading_info=True, **options
        )
        if "device_map" not in options:
            loaded.to(pick_device(device))
    if report["missing_keys"]:
        raise EvalError(
            f"{model.path} lacks weights that its config.json asks for, "
            f"among them {min(report['missing_keys'])}.\n"
            "  transformers would fill them with random numbers. Copy or save the model again."
        )
    return loaded if model.adapter is None else with_adapter(loaded, model.adapter, model.path)


def with_adapter(model: Any, adapter: str, base: str) -> Any:
    """Insert the layers of an adapter into `model`, unmerged, and return it.

    Args:
        model: A causal language model; it is changed.
        adapter: Folder or hub id.
        base: Where the model comes from, for messages.

    Raises:
        EvalError: peft is not installed, the adapter cannot be opened or is of another model, or it
            is one that changes prompts and not weights.
    """
    try:
        from peft import PeftModel  # here: an optional package, and slow to import
    except ModuleNotFoundError as error:
        raise EvalError(
            f"the adapter {adapter} needs the package peft.\n  Install it: pip install peft"
        ) from error
    try:
        with warnings.catch_warnings():
            # peft asks transformers by old names, and goes on with fresh layers in place of those
            # that the file lacks.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("error", message=".*missing adapter keys")
            adapted = PeftModel.from_pretrained(model, adapter)
    except (*MODEL_ERRORS, UserWarning) as error:
        raise EvalError(
            f"cannot put the adapter {adapter} on {base}: {first_line(error)}\n"
            "  It must be a PEFT adapter of this model: compare base_model_name_or_path and "
            "target_modules in its adapter_config.json."
        ) from error
    kind: Any = adapted.peft_config["default"]
    if kind.is_prompt_learning:
        raise EvalError(
            f"the adapter {adapter} is of type {kind.peft_type.value}, which changes prompts.\n"
            "  Only adapters that change weights can be compared, such as LoRA."
        )
    return adapted.get_base_model()


def free_memory() -> None:
    """Give back the memory of models that nothing refers to any more."""
    gc.collect()  # models hold reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def opening(model: ComparedModelConfig) -> Iterator[None]:
    """Turn whatever keeps a model from being opened into an error that names it.

    Raises:
        EvalError: in place of what was raised inside.
    """
    try:
        yield
    except EvalError:
        raise
    except ModuleNotFoundError as error:
        if model.backend not in _INSTALL:
            raise _unusable(model, error) from error
        raise EvalError(
            f"backend {model.backend} of {model.path} needs a package that is not installed: "
            f"{first_line(error)}\n  Install it: {_INSTALL[model.backend]}"
        ) from error
    except MODEL_ERRORS as error:
        raise _unusable(model, error) from error


def _unusable(model: ComparedModelConfig, error: Exception) -> EvalError:
    return EvalError(
        f"cannot open the model {model.path}: {first_line(error)}\n"
        "  A model folder holds config.json, *.safetensors and the files of a tokenizer. "
        "A hub id needs a network, or a copy in the hub's cache."
    )
