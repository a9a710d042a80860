"""Read what lm-eval's own command line wrote. No torch here.

`lm-eval run --output_path OUT --log_samples` leaves, for each model,

    OUT/MODEL/results_TIME.json            scores, and the settings of the whole call
    OUT/MODEL/samples_TASK_TIME.jsonl      documents with their scores

The settings of a call are named as ours (`distill.evaluate.harness`), so that models that were
scored elsewhere are compared only where they were asked alike. What the files do not tell is None:
the fingerprint of a task's definition, and the weights, for which a name is no proof.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from distill.errors import EvalError
from distill.evaluate.measured import Estimate
from distill.evaluate.record import main_metric, metrics_of
from distill.evaluate.results import ModelResult, TaskScores

_PATTERN = "results_*.json"


class _Count(BaseModel):
    original: int
    effective: int


class _Evaluation(BaseModel):
    """One file of lm-eval's, as far as we read it."""

    results: dict[str, dict[str, Any]]
    configs: dict[str, dict[str, Any]]
    num_shots: dict[str, int | None] = Field(alias="n-shot")
    counts: dict[str, _Count] = Field(alias="n-samples")
    higher_is_better: dict[str, dict[str, bool | None]]
    settings: dict[str, Any] = Field(alias="config")
    lm_eval_version: str
    name: str = Field(alias="model_name")
    max_length: int | None = None
    chat_template_sha: str | None = None
    system_instruction_sha: str | None = None


def is_foreign(path: Path) -> bool:
    """Whether `path` is a file or a folder of lm-eval's rather than a run folder."""
    if path.is_dir():
        return not (path / "eval" / "models.json").is_file() and bool(_result_files(path))
    return path.is_file()


def collect_foreign(path: Path) -> tuple[ModelResult, ...]:
    """Read every model below `path`.

    Args:
        path: A `results_TIME.json`; or a folder with such files, or with one folder a model. Where
            a model was scored several times, each task is read from the newest file that has it.

    Raises:
        EvalError: a file is not what lm-eval writes.
    """
    by_folder: dict[Path, list[Path]] = {}
    for file in [path] if path.is_file() else _result_files(path):
        by_folder.setdefault(file.parent, []).append(file)
    run = run_name(path)
    found = [
        (folder, [(file, _read(file)) for file in files]) for folder, files in by_folder.items()
    ]
    names = [_short_name(files[-1][1].name) for _, files in found]
    repeated = {name for name, number in Counter(names).items() if number > 1}
    return tuple(
        ModelResult(
            name=folder.name if name in repeated else name,
            role="other",
            run=run,
            num_parameters=files[-1][1].settings.get("model_num_parameters"),
            tasks={task: scores for file, read in files for task, scores in _tasks(file, read)},
            fidelity=None,
        )
        for name, (folder, files) in zip(names, found, strict=True)
    )


def run_name(path: Path) -> str:
    """Name of what `path` holds: its own, or that of the folder of a file."""
    whole = path.resolve()
    return whole.parent.name if whole.is_file() else whole.name


def _result_files(folder: Path) -> list[Path]:
    # Names hold the time, so the newest file of a folder comes last.
    return sorted([*folder.glob(_PATTERN), *folder.glob(f"*/{_PATTERN}")])


def _read(path: Path) -> _Evaluation:
    try:
        return TypeAdapter(_Evaluation).validate_json(path.read_bytes())
    except ValidationError as error:
        problems = "".join(
            f"  {'.'.join(map(str, item['loc'])) or 'the whole'}: {item['msg']}\n"
            for item in error.errors()
        )
    raise EvalError(
        f"{path} is not a file of results as lm-eval writes it:\n{problems}"
        "  Make one: lm-eval run --model hf --model_args pretrained=MODEL --tasks TASK "
        "--output_path OUT --log_samples"
    )


def _tasks(path: Path, read: _Evaluation) -> Iterable[tuple[str, TaskScores]]:
    for task in read.configs:  # `results` has groups too
        metrics = metrics_of(read.results.get(task, {}), read.higher_is_better.get(task, {}))
        if not metrics or task not in read.counts:
            continue
        # results_TIME.json, or NAME_TIME.json where --output_path was a file
        time = path.stem.rpartition("_")[2]
        samples = path.with_name(f"samples_{task}_{time}.jsonl")
        yield (
            task,
            TaskScores(
                identity=_identity(task, read),
                metrics=TypeAdapter(dict[str, Estimate]).validate_python(metrics),
                main_metric=main_metric(metrics),
                num_documents=read.counts[task].effective,
                num_documents_total=read.counts[task].original,
                num_fewshot=read.num_shots.get(task),
                source=samples if samples.is_file() else None,
            ),
        )


def _identity(task: str, read: _Evaluation) -> dict[str, Any]:
    limit = read.settings.get("limit")
    dtype = read.settings.get("model_dtype")
    return {
        "source": "lm-eval",
        "evaluated_model": _short_name(read.name),
        "task": task,
        "task_definition": None,
        "limit": int(limit) if limit is not None and limit == int(limit) else limit,
        "num_fewshot": read.num_shots.get(task),
        "max_length": read.max_length,
        "dtype": str(dtype).removeprefix("torch.") if dtype else None,
        "seed": read.settings.get("fewshot_seed"),
        "lm_eval": read.lm_eval_version,
        "gen_kwargs": read.settings.get("gen_kwargs") or None,
        "chat_template": read.chat_template_sha,
        "system_instruction": read.system_instruction_sha,
    }


def _short_name(name: str) -> str:
    """A hub id as it is; of a folder the last part."""
    is_hub_id = name.count("/") <= 1 and not name.startswith((".", "/", "~"))
    return name if is_hub_id else Path(name).name
