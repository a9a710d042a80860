"""Measure the fidelity of one model, and keep it as MODEL/fidelity.json.

identity                    what decides the numbers: weights, caches, dtype, versions
num_rows, num_documents     of the held-out cache
ce_nats, kl_nats, ...       as `distill.evaluate.fidelity.Fidelity`
documents                   {num_rows, ce_nats, kl_nats, agreement}: sums over each document's rows
bits_per_byte               {value, stderr}, of the text that the rows stand for
exact                       as `distill.evaluate.dense.Exact`, with evaluation.exact
groups                      name -> the same for each cache of evaluation.held_out
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from distill.cache.reader import Cache, open_cache
from distill.config import ComparedModelConfig, ExperimentConfig
from distill.distillation_model import DistillationModel
from distill.errors import EvalError, MismatchError
from distill.evaluate.backends import identify
from distill.evaluate.dense import measure_exactly
from distill.evaluate.fidelity import Estimate, measure
from distill.evaluate.local_models import free_memory, pretrained_options, with_adapter
from distill.files import write_json_atomically
from distill.fingerprint import of_tokenizer, of_weights
from distill.models import load_causal_lm, load_tokenizer, out_of_memory_as, pick_device
from distill.progress import ProgressBar

_LESS_MEMORY = (
    "Evaluate on device=cpu, with evaluation.dtype=bfloat16, or without evaluation.exact."
)


def keep_fidelity(
    name: str,
    model: ComparedModelConfig,
    config: ExperimentConfig,
    target: Path,
    *,
    is_own: bool,
    on_progress: Callable[[str], None],
) -> None:
    """Measure a model on the held-out caches, unless its file is there and still holds.

    Args:
        name: Of the model.
        model: How it is opened; only by transformers.
        config: The experiment.
        target: The file.
        is_own: Whether the run made the model, so that another tokenizer is an error.
        on_progress: Receives a line if there is nothing to do.

    Raises:
        MismatchError: a cache has another tokenizer than the model.
        CacheError: a cache is missing or damaged.
        ConfigError: the model, or with evaluation.exact the teacher, cannot be opened.
        EvalError: the device's memory is used up.
    """
    if model.backend != "hf":
        on_progress(f"{name}: opened by {model.backend}, no fidelity")
        return
    main = open_cache(config.cache_folder("held_out"))
    groups = {group: open_cache(url) for group, url in config.evaluation.held_out.items()}
    identity = _identity(model, main, groups, config)
    if target.exists() and json.loads(target.read_text())["identity"] == identity:
        on_progress(f"{name}: fidelity is there, skipped")
        return
    options = pretrained_options(model)
    source = model.tokenizer or model.path
    tokenizer = load_tokenizer(source, f"model {name}", options.get("revision"))
    for cache in (main, *groups.values()):
        if not _has_tokenizer(cache, tokenizer, name, is_own=is_own):
            on_progress(f"{name}: other tokenizer than the cache's, no fidelity")
            return
    device, dtype = pick_device(config.device), getattr(torch, config.evaluation.dtype)
    with out_of_memory_as(EvalError, _LESS_MEMORY):
        loaded = load_causal_lm(model.path, f"model {name}", dtype=dtype, **options)
        if model.adapter is not None:
            loaded = with_adapter(loaded, model.adapter, model.path)
        if "device_map" not in options:
            loaded.to(device)
        teacher = None
        if config.evaluation.exact:
            path, revision = config.teacher.model, config.teacher.revision
            teacher = load_causal_lm(path, "teacher.model", dtype=dtype, revision=revision)
            teacher.to(device)
        found = _measure(name, loaded, teacher, main, tokenizer)
        found["groups"] = {
            group: _measure(f"{name} {group}", loaded, teacher, cache, tokenizer)
            for group, cache in groups.items()
        }
    write_json_atomically(target, {"identity": identity, **found})
    del loaded, teacher
    free_memory()


def weights_identity(model: ComparedModelConfig) -> dict[str, Any]:
    """Identity of what is measured: fingerprint of weights or hub id, and settings if there are."""
    path = Path(model.path)
    if path.is_file():  # a .gguf, which only fidelity opens
        return {"weights": of_weights(path)}
    identity = identify(model)
    weights = identity.pop("weights") or identity["model"]
    return {key: value for key, value in identity.items() if key != "model"} | {"weights": weights}


def text_bytes(cache: Cache, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the UTF-8 bytes of the text whose tokens are labels; special tokens have none."""
    total = 0
    for number in range(len(cache)):
        block = cache.block(number)[0]
        counts = np.append(False, block.row_mask())  # of each token, whether it is a label
        for ids, counted in zip(
            np.split(block.input_ids_T, np.cumsum(block.segment_lengths)[:-1]),
            np.split(counts, np.cumsum(block.segment_lengths)[:-1]),
            strict=True,
        ):
            text = tokenizer.decode(ids[counted].tolist(), skip_special_tokens=True)
            total += len(text.encode("utf-8", "surrogatepass"))
    return total


def _identity(
    model: ComparedModelConfig, main: Cache, groups: dict[str, Cache], config: ExperimentConfig
) -> dict[str, Any]:
    identity = {
        **weights_identity(model),
        "cache": main.manifest.checksum,
        "dtype": config.evaluation.dtype,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "measures": _MEASURES,
    }
    # At their defaults these are no part of it: what was measured without them still holds.
    if groups:
        identity["groups"] = {name: cache.manifest.checksum for name, cache in groups.items()}
    if config.evaluation.exact:
        identity["exact"] = main.manifest.teacher["weights"] or main.manifest.teacher["model"]
    return identity


_MEASURES = 3
"""Raised when a file holds more than it did: files of old are made anew."""


def _has_tokenizer(
    cache: Cache, tokenizer: PreTrainedTokenizerBase, name: str, *, is_own: bool
) -> bool:
    ours, theirs = of_tokenizer(tokenizer), cache.manifest.tokenizer["fingerprint"]
    if ours != theirs and is_own:
        raise MismatchError(
            f"the {name} has another tokenizer than the held-out cache.\n"
            f"  cache  {cache.url}  {theirs[:8]}\n"
            f"  model  {tokenizer.name_or_path}  {ours[:8]}"
        )
    return bool(ours == theirs)


def _measure(
    title: str, model: Any, teacher: Any, cache: Cache, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    device, num_tokens = model.device, cache.manifest.num_tokens
    exact = None
    if teacher is not None:
        with ProgressBar(f"exact {title}", num_tokens) as bar:
            exact = measure_exactly(model, teacher, cache, device=device, on_block=bar.advance)
    with ProgressBar(f"fidelity {title}", num_tokens) as bar:
        wrapped = DistillationModel(model)
        fidelity = measure(wrapped, cache, device=device, on_block=bar.advance)
    scale = fidelity.num_rows / (math.log(2) * max(1, text_bytes(cache, tokenizer)))
    ce = fidelity.ce_nats
    return {
        **fidelity.as_dict(),
        "bits_per_byte": asdict(Estimate(scale * ce.value, scale * ce.stderr)),
        "exact": None if exact is None else asdict(exact),
    }
