"""Run lm-eval tasks on one model and keep one file per task.

A file is written when its task is done, so that a kill loses one task at most. It is not made
again while its identity holds: weights, task definition, limit, few-shot examples, longest context,
dtype, seed and lm-eval's version. The batch size is no part of it, and no path: run folders move.

The file `MODEL/TASK.json`:

    model, task          names
    requested            the task, group or tag in the configuration that asked for it
    identity             what decides the scores (above)
    metrics              name -> {value, stderr, higher_is_better}; a name is lm-eval's, with its
                         filter unless that is `none`; value and stderr are null where not finite
    main_metric          acc_norm, else acc, else exact_match, else a perplexity, else the first
    num_documents        scored, and num_documents_total: in the task
    num_fewshot          examples in the prompt, after lm-eval has applied the task's own rule
    num_truncated        how often lm-eval reported that a prompt was cut to max_length
    group                `requested`, if it is a group; weight_by_size: whether lm-eval averages the
                         main metric over the group by documents (true), over tasks (false), or not
                         at all (null)
    samples              [{doc_id, doc_hash, metrics, prompt, choices, target, response}], sorted:
                         for paired tests and for readers; see `distill.evaluate.readable`
    seconds              wall time
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from lm_eval import evaluate
from lm_eval.api.model import TemplateLM
from transformers import set_seed

from distill.config import ComparedModelConfig, EvaluationConfig
from distill.errors import EvalError
from distill.evaluate.backends import close_model, identify, open_model
from distill.evaluate.failures import TASK_ERRORS, first_line
from distill.evaluate.local_models import free_memory
from distill.evaluate.quiet import quiet
from distill.evaluate.readable import readable
from distill.evaluate.record import main_metric, metrics_of, samples_of, summary
from distill.evaluate.tasks import PlannedTask, check_tasks, task_manager
from distill.files import write_json_atomically

__all__ = ["check_tasks", "run_tasks"]

_BOOTSTRAP_ITERS = 1000
"""Draws for the metrics whose standard error has no formula; perplexity is one."""


def run_tasks(
    model_name: str,
    model: str | ComparedModelConfig,
    config: EvaluationConfig,
    out: Path,
    *,
    device: str | None,
    seed: int,
    on_progress: Callable[[str], None],
) -> list[Path]:
    """Score a model on every task of `config` that has no valid file yet.

    The model is loaded once at most, only if a score is missing, and is freed afterwards.

    Args:
        model_name: Names the folder below `out`.
        model: Folder or hub id, or how to open it; weights are part of a score's identity.
        config: Tasks and settings.
        out: Folder of all models' scores.
        device: None takes the accelerator if there is one.
        seed: Draws few-shot examples and whatever else a task samples.
        on_progress: Receives a line before and after everything that takes time.

    Returns:
        The file of each task, in the order of the configuration, whether new or not.

    Raises:
        EvalError: a task does not exist, or the model is no model (both before anything is loaded);
            the model cannot be opened; or some tasks failed, after all others were run.
        StorageError: the disk is full.
    """
    planned = check_tasks(config)
    if not planned:
        return []
    if isinstance(model, str):
        model = ComparedModelConfig(path=model)
    identity = identify(model)
    identities = {task: identity | _settings(task, config, seed) for task in planned}
    files = {task: out / model_name / f"{task.name.replace('/', '_')}.json" for task in planned}
    missing = [task for task in planned if _recorded_identity(files[task]) != identities[task]]
    for task in planned:
        if task not in missing:
            on_progress(f"{model_name}: {task.name} has its score already")
    opened, failures = _open_tasks(missing, config)
    if opened:
        on_progress(f"{model_name}: loading {model.path}")
        loaded = open_model(model, config, device, seed)
        try:
            for number, (task, built) in enumerate(opened.items(), start=1):
                on_progress(f"{model_name}: {task.name} ({number} of {len(opened)})")
                start = time.perf_counter()
                try:
                    scores = _score(loaded, built, task, config, seed)
                except TASK_ERRORS as error:
                    on_progress(f"{model_name}: {task.name} failed: {first_line(error)}")
                    failures[task] = error
                    continue
                seconds = time.perf_counter() - start
                write_json_atomically(
                    files[task],
                    scores
                    | {"model": model_name, "task": task.name, "requested": task.requested}
                    | {"identity": identities[task], "seconds": round(seconds, 3)},
                )
                on_progress(f"{model_name}: {task.name} {summary(scores)}, {seconds:.0f} s")
        finally:
            close_model(loaded)
        del loaded
        free_memory()
    if failures:
        raise _failed(model_name, failures, len(planned)) from next(iter(failures.values()))
    return [files[task] for task in planned]


def _settings(task: PlannedTask, config: EvaluationConfig, seed: int) -> dict[str, object]:
    settings: dict[str, object] = {
        "task": task.name,
        "task_definition": task.definition,
        "limit": config.limit,
        "num_fewshot": task.num_fewshot,
        "max_length": config.max_length,
        "dtype": config.dtype,
        "seed": seed,
        "lm_eval": version("lm_eval"),
    }
    # Scores from before these settings stay valid: what is at its default is left out.
    chat = {
        "apply_chat_template": config.apply_chat_template,
        "fewshot_as_multiturn": config.fewshot_as_multiturn,
    }
    return settings | {name: True for name, is_set in chat.items() if is_set}


def _recorded_identity(path: Path) -> object:
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # files of ours are whole: not ours, replace
        return None
    return record.get("identity") if isinstance(record, Mapping) else None


def _open_tasks(
    missing: Iterable[PlannedTask], config: EvaluationConfig
) -> tuple[dict[PlannedTask, Any], dict[PlannedTask, Exception]]:
    """Open the data of every missing task: it fails sooner and cheaper than a model."""
    opened: dict[PlannedTask, Any] = {}
    failures: dict[PlannedTask, Exception] = {}
    for requested, group in groupby(missing, key=lambda task: task.requested):
        tasks = list(group)
        try:
            with quiet():
                built = task_manager(config.include_path).load([requested])["tasks"]
            opened |= {task: built[task.name] for task in tasks}
        except TASK_ERRORS as error:
            failures |= dict.fromkeys(tasks, error)
    return opened, failures


def _score(
    model: TemplateLM, task: Any, planned: PlannedTask, config: EvaluationConfig, seed: int
) -> dict[str, object]:
    """Do what `lm_eval.simple_evaluate` does, less a second per call for describing the machine."""
    set_seed(seed)
    default = task.get_config("num_fewshot")
    wanted = default if planned.num_fewshot is None else planned.num_fewshot
    # lm-eval's rule: a task that fixes 0 examples stays at 0 (a rolling perplexity has no prompt).
    task.set_config(key="num_fewshot", value=0 if default == 0 else wanted or 0)
    task.set_fewshot_seed(seed=seed)
    with quiet() as warnings:
        results = evaluate(
            model,
            {"tasks": {planned.name: task}},
            limit=config.limit,
            bootstrap_iters=_BOOTSTRAP_ITERS,
            log_samples=True,
            apply_chat_template=config.apply_chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
        )
    name = planned.name
    metrics = metrics_of(results["results"][name], results["higher_is_better"][name])
    main = main_metric(metrics)
    return {
        "metrics": metrics,
        "main_metric": main,
        "num_documents": results["n-samples"][name]["effective"],
        "num_documents_total": results["n-samples"][name]["original"],
        "num_fewshot": results["n-shot"][name],
        "num_truncated": sum("truncat" in text.lower() for text in warnings),
        "group": planned.group,
        "weight_by_size": dict(planned.averaged).get(main.partition(",")[0]),
        "samples": samples_of(
            results["samples"][name],
            lambda sample: readable(sample, task.OUTPUT_TYPE, _gold(task, sample)),
        ),
    }


def _gold(task: Any, sample: Mapping[str, Any]) -> Any:
    # With several contexts (Winogrande), the target is what follows; the text says which is right.
    is_in_context = getattr(task, "multiple_input", False)
    return task.doc_to_text(sample["doc"]) if is_in_context else sample["target"]


def _failed(
    model_name: str, failures: Mapping[PlannedTask, Exception], num_tasks: int
) -> EvalError:
    lines = "\n".join(f"  {task.name}: {first_line(error)}" for task, error in failures.items())
    return EvalError(
        f"{len(failures)} of {num_tasks} tasks failed on {model_name}; the others have their "
        f"scores.\n{lines}\n"
        "  Correct or remove these tasks (out of memory: lower evaluation.batch_size), then run "
        "the same command again: finished scores are kept. `--debug` shows the traceback."
    )
