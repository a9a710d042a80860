"""Open the models that are compared: with transformers, in vLLM's engine, or behind a server.

All but transformers is lm-eval's own: its model classes `vllm` and `local-completions`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from distill.config import ComparedModelConfig, EvaluationConfig
from distill.errors import EvalError
from distill.evaluate.failures import first_line
from distill.evaluate.local_models import WRAPPER_ARGS, load, opening, pretrained_options
from distill.evaluate.quiet import quiet
from distill.fingerprint import of_file, of_settings, of_weights
from distill.teacher.vllm_engine import ENVIRONMENT, SHUTDOWN_SECONDS

_SHARED_ARGS = frozenset({"revision", "trust_remote_code"})
"""Arguments that the tokenizer's `from_pretrained` takes as the model's does."""

_ROOM = 2
"""Tokens beyond `evaluation.max_length` that an engine or a server needs: lm-eval sends them the
predicted token too, and has them generate another. With this room its cuts of scored texts, and the
windows of rolling perplexities, are those of the hf backend; a prompt that is cut before text is
generated keeps one token more."""

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja"),
)


def identify(model: ComparedModelConfig) -> dict[str, object]:
    """Describe what is scored, free of paths: weights, and how they are opened if not plainly.

    Returns:
        `weights` (fingerprint, with the adapter's if there is one) or else `model` (hub id or name
        at a server), and only if set, `model_settings`: backend, server, tokenizer, arguments.

    Raises:
        EvalError: there is no such folder, or it holds no model or no adapter.
    """
    identity = _identify_base(model)
    if model.adapter is not None:
        pair = {"base": identity, "adapter": _identify_adapter(model.adapter)}
        identity = {"model": None, "weights": of_settings(pair)}
    # Scores from before these settings stay valid: what is at its default is left out.
    settings: dict[str, object] = {}
    if model.backend != "hf":
        settings["backend"] = model.backend
    if model.base_url is not None:
        settings["base_url"] = model.base_url
    if model.tokenizer is not None:
        settings["tokenizer"] = _identify_tokenizer(model.tokenizer)
    if model.args:
        settings["args"] = of_settings(model.args)  # they may hold a key to a server
    return identity | ({"model_settings": settings} if settings else {})


def open_model(
    model: ComparedModelConfig, config: EvaluationConfig, device: str | None, seed: int
) -> TemplateLM:
    """Open a model for lm-eval.

    Args:
        model: What to open, and how.
        config: Batch size, longest context, dtype, and whether chat templates are applied.
        device: With `hf`; None takes the accelerator if there is one.
        seed: Of an engine's or a server's random numbers.

    Raises:
        EvalError: the model cannot be opened, lacks weights, has a shorter context or no chat
            template; a package is missing; or the server cannot be reached, or gives no
            log-probabilities of the prompt.
    """
    opened: TemplateLM
    if model.backend == "openai":
        opened = _open_server(model, config, seed)
    elif model.backend == "vllm":
        opened = _open_engine(model, config, seed)
    else:
        opened = _open_transformers(model, config, device)
    if config.apply_chat_template and not getattr(opened.tokenizer, "chat_template", None):
        raise EvalError(
            f"the tokenizer of {model.tokenizer or model.path} has no chat template, which "
            "evaluation.apply_chat_template asks for.\n"
            "  Base models have none: set evaluation.apply_chat_template=false. Or save the "
            "tokenizer with one."
        )
    return opened


def close_model(model: TemplateLM) -> None:
    """End the processes of an engine, which would keep its GPUs; other models need nothing."""
    engine = getattr(getattr(model, "model", None), "llm_engine", None)
    if engine is not None:
        engine.engine_core.shutdown(SHUTDOWN_SECONDS)


def _identify_base(model: ComparedModelConfig) -> dict[str, object]:
    if model.backend == "openai":
        return {"model": model.path, "weights": None}
    if Path(model.path).is_dir():
        with opening(model):
            return {"model": None, "weights": of_weights(Path(model.path))}
    if _is_path(model.path):
        raise EvalError(
            f"there is no model folder {model.path}.\n"
            "  If it is a student: train it first (distill train). Else correct the path; "
            "a hub id has the form owner/name."
        )
    return {"model": model.path, "weights": None}


def _identify_adapter(adapter: str) -> object:
    folder = Path(adapter)
    if not folder.is_dir():
        if _is_path(adapter):
            raise EvalError(
                f"there is no adapter folder {adapter}.\n"
                "  Correct `adapter`; a hub id has the form owner/name."
            )
        return adapter
    try:
        settings = json.loads((folder / "adapter_config.json").read_text())
        # The scale of an adapter stands there; where its base was when it was made does not matter.
        settings.pop("base_model_name_or_path", None)
        return {"weights": of_weights(folder), "settings": of_settings(settings)}
    except (OSError, ValueError) as error:
        raise EvalError(
            f"cannot read the adapter {adapter}: {first_line(error)}\n"
            "  The folder of a PEFT adapter holds adapter_config.json and "
            "adapter_model.safetensors."
        ) from error


def _identify_tokenizer(tokenizer: str) -> object:
    files = [Path(tokenizer) / name for name in _TOKENIZER_FILES]
    found = {path.name: of_file(path) for path in files if path.is_file()}
    return of_settings(found) if found else tokenizer


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _open_transformers(
    model: ComparedModelConfig, config: EvaluationConfig, device: str | None
) -> HFLM:
    wrapper: dict[str, Any] = {k: v for k, v in model.args.items() if k in WRAPPER_ARGS}
    shared = {k: v for k, v in pretrained_options(model).items() if k in _SHARED_ARGS}
    if "add_bos_token" in wrapper:  # as lm-eval does where it opens the tokenizer itself
        shared["add_bos_token"] = wrapper["add_bos_token"]
    with opening(model), quiet():
        tokenizer = AutoTokenizer.from_pretrained(model.tokenizer or model.path, **shared)
        opened = load(model, config.dtype, device)
    longest = getattr(opened.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and longest < config.max_length:
        raise EvalError(
            f"evaluation.max_length is {config.max_length}, but {model.path} was made for "
            f"{longest} tokens (max_position_embeddings).\n"
            f"  Set evaluation.max_length={longest}, for all models that are compared."
        )
    with opening(model), quiet():
        # Built around a model, HFLM makes no Accelerator of its own, which would bind the process.
        return HFLM(
            pretrained=opened,
            tokenizer=tokenizer,
            batch_size=config.batch_size,
            max_length=config.max_length,
            **wrapper,
        )


def _open_engine(model: ComparedModelConfig, config: EvaluationConfig, seed: int) -> TemplateLM:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with opening(model), quiet():
        engine: Any = get_model("vllm")(
            pretrained=model.path,
            tokenizer=model.tokenizer,
            lora_local_path=model.adapter,
            dtype=config.dtype,
            tensor_parallel_size=model.tensor_parallel,
            batch_size=config.batch_size,
            max_model_len=config.max_length + _ROOM,
            seed=seed,
            **model.args,
        )
    if hasattr(engine, "model"):  # several engines (data_parallel_size) are elsewhere
        engine.model.generate = _without_bar(engine.model.generate)
    opened: TemplateLM = engine
    return opened


def _without_bar(generate: Callable[..., Any]) -> Callable[..., Any]:
    # vLLM divides by the time of its bar, which stands still while bars are silenced.
    return lambda *args, **options: generate(*args, **{**options, "use_tqdm": False})


def _open_server(model: ComparedModelConfig, config: EvaluationConfig, seed: int) -> TemplateLM:
    with opening(model), quiet():
        server: Any = get_model("local-completions")(
            model=model.path,
            base_url=model.base_url,
            tokenizer=model.tokenizer,
            tokenizer_backend="huggingface",
            batch_size=config.batch_size,
            max_length=config.max_length + _ROOM,
            seed=seed,
            **model.args,
        )
    prompt = server.tok_encode("What does it take?")
    advice = "\n  Start the server, or correct evaluation.models: base_url, path."
    try:
        with quiet():
            answer = server.model_call([prompt], generate=False)
    except OSError as error:  # all that requests raises
        raise EvalError(
            f"the server at {model.base_url} cannot be asked for {model.path}: "
            f"{first_line(error)}{advice}"
        ) from error
    if _count_logprobs(answer) != len(prompt) + 1:
        raise EvalError(
            f"the server at {model.base_url} answers without a log-probability for each token of a "
            "prompt, which scores are made of.\n"
            "  It must know `echo` with `logprobs` at /v1/completions, as vLLM's server does."
        )
    opened: TemplateLM = server
    return opened


def _count_logprobs(answer: Any) -> int:
    try:
        return len(answer["choices"][0]["logprobs"]["token_logprobs"])
    except (LookupError, TypeError):  # as servers differ in what they leave out
        return 0
