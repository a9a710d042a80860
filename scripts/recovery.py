"""Which loss recovers a cut model better at equal tokens: KD from its former self, or CE?

    python scripts/recovery.py [--seeds N] [--limit N] [--out results/recovery.json]

SmolLM2 (`make demo-assets`) is cut in depth and in width; each cut is trained on the cache of the
whole model with KD (0.9 KL + 0.1 CE) and with CE alone: equal blocks in equal order, which the seed
decides. All models are compared on the held-out cache and on lm-eval tasks by `distill eval`, and
KD with CE document by document: `distill.evaluate.paired`, Holm's correction over all tests.
With several seeds, a document's score is the mean over them.

The documents of `make prose` are long; a passage of each is read, so that errors are of many
documents. Stop at any time: the same command goes on, and does nothing twice. With --out, a table
(.md) and a plot (.png) stand beside the result. The last line is one JSON object.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distill.cache.reader import open_cache
from distill.cli import main as distill
from distill.config import ExperimentConfig, load
from distill.evaluate.items import Items, align
from distill.evaluate.paired import compare_items, corrected, gap_recovered
from distill.evaluate.results import ModelResult, collect
from distill.export import read_provenance
from distill.files import write_json_atomically, write_text_atomically
from scripts.provenance import provenance
from scripts.recovery_report import figures, plot, table

SHAPES: dict[str, tuple[str, ...]] = {
    "depth": (),
    "width": (
        *("student.num_layers=null", "student.layers=spaced"),
        "student.intermediate_size=1128",
    ),
}
"""Settings over those of the config, whose student is cut in depth. 1,128 of 1,536 MLP channels
leave as many parameters as 24 of 30 layers (113.4 and 113.3 M); of the cuts in width of that size,
this one does the least damage (results/students.json)."""

LOSSES: dict[str, tuple[str, ...]] = {
    "kd": ("train.kl_weight=0.9", "train.ce_weight=0.1"),
    "ce": ("train.kl_weight=0", "train.ce_weight=1"),
}

HELD_OUT = ("ce_nats", "kl_nats", "agreement")
"""Measures of the held-out documents that are compared, as in fidelity.json."""

PASSAGE_CHARACTERS = 2000
"""About a block of 512 tokens."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What is trained and compared, and where."""

    config: Path
    corpus: Path
    run: Path
    num_seeds: int = 1
    settings: tuple[str, ...] = ()
    """Over those of the config, for every arm."""
    shapes: Mapping[str, tuple[str, ...]]

    @property
    def arms(self) -> dict[str, tuple[str, ...]]:
        """Name -> settings of each student that is trained."""
        return {
            f"{shape}-{loss}-{seed}": (*cut, *weights, f"train.seed={seed}")
            for seed in range(self.num_seeds)
            for shape, cut in self.shapes.items()
            for loss, weights in LOSSES.items()
        }

    @property
    def models(self) -> dict[str, Path]:
        """Name -> folder of each model beside the teacher; every arm starts from one cut."""
        cuts = {shape: self.run / f"{shape}-kd-0" / "student" / "initial" for shape in self.shapes}
        return cuts | {arm: self.run / arm / "student" / "final" for arm in self.arms}

    def settings_of(self, folder: Path, own: Sequence[str] = ()) -> list[str]:
        """All settings of one command."""
        source = f"{{path: json, data_files: [{json.dumps(str(self.passages))}]}}"
        return [
            *(f"run_folder={folder}", f"cache.folder={self.run / 'cache'}"),
            *(f"data.sources=[{source}]", *own, *self.settings),
        ]

    def config_of(self, own: Sequence[str] = ()) -> ExperimentConfig:
        """The config of one command."""
        return load(self.config, self.settings_of(self.run, own))

    @property
    def passages(self) -> Path:
        """The file that all arms read."""
        return self.run / "passages.jsonl"


def main() -> None:
    """Run what is missing, print, and write the result where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/recovery.yaml"))
    parser.add_argument("--corpus", type=Path, default=Path("assets/prose/prose.jsonl"))
    parser.add_argument("--run", type=Path, default=Path("runs/recovery"), help="folder of the run")
    parser.add_argument("--seeds", type=int, default=1, help="data orders, a training each (1)")
    parser.add_argument("--limit", type=int, help="documents a task, in place of the config's")
    parser.add_argument("--out", type=Path, help="also write the result there, with table and plot")
    parser.add_argument(
        "settings", nargs="*", metavar="name=value", help="over those of the config"
    )
    options = parser.parse_args()
    limit = () if options.limit is None else (f"evaluation.limit={options.limit}",)
    experiment = Experiment(
        config=options.config,
        corpus=options.corpus,
        run=options.run,
        num_seeds=options.seeds,
        settings=(*options.settings, *limit),
        shapes=SHAPES,
    )
    run(experiment)
    result = report(experiment)
    if options.out:
        write_json_atomically(options.out, result)
        write_text_atomically(options.out.with_suffix(".md"), table(result))
        plot(result, options.out.with_suffix(".png"))
    print(json.dumps(result))


def run(experiment: Experiment) -> None:
    """Capture, train all arms and evaluate all models, as far as that is not done."""
    cut_passages(experiment.corpus, experiment.passages)

    def verb(name: str, settings: Sequence[str], *flags: str) -> None:
        if distill([name, str(experiment.config), *settings, *flags]):
            raise SystemExit(
                f"distill {name} failed, see above; the same command goes on from here."
            )

    verb("cache", experiment.settings_of(experiment.run))
    for arm, own in experiment.arms.items():
        print(f"==> {arm}", flush=True)
        verb("train", experiment.settings_of(experiment.run / arm, own), "--resume")
    models = [f"evaluation.models.{name}={path}" for name, path in experiment.models.items()]
    verb("eval", [*experiment.settings_of(experiment.run), *models])


def cut_passages(corpus: Path, target: Path) -> None:
    """Write the beginning of every document, cut between words."""
    lines = []
    for line in corpus.read_text(encoding="utf-8").split("\n"):  # no U+2028: texts may hold it
        if line:
            text = json.loads(line)["text"]
            if len(text) > PASSAGE_CHARACTERS:
                text = text[:PASSAGE_CHARACTERS].rpartition(" ")[0]
            lines.append(json.dumps({"text": text}) + "\n")
    written = "".join(lines)
    if not target.exists() or target.read_text(encoding="utf-8") != written:
        write_text_atomically(target, written)


def report(experiment: Experiment) -> dict[str, Any]:
    """Collect what was measured, and compare KD with CE within each shape.

    Raises:
        SystemExit: the arms were not trained on equally many tokens.
    """
    config = experiment.config_of()
    tokens = {arm: _trained_tokens(experiment, arm) for arm in experiment.arms}
    if len(set(tokens.values())) > 1:
        raise SystemExit(f"the arms were not trained on equally many tokens: {tokens}")
    models = {model.name: model for model in collect(experiment.run)}
    wanted = ["teacher", *experiment.models]
    items = {
        measure: _pooled(measure, read, wanted, experiment)
        for measure, read in _measures(experiment.run, models, config).items()
    }
    pairs = [(f"{shape}-kd", f"{shape}-ce") for shape in experiment.shapes]
    comparisons = [
        compare_items(by_name[kd], by_name[ce], task=task, metric=metric, names=(kd, ce))
        for kd, ce in pairs
        for (task, metric), by_name in items.items()
    ]
    gaps = [
        gap_recovered(
            *(by_name[name] for name in (arm, shape, "teacher")),
            task=task,
            metric=metric,
            names=(arm, shape, "teacher"),
        )
        for shape in experiment.shapes
        for arm in (f"{shape}-{loss}" for loss in LOSSES)
        for (task, metric), by_name in items.items()
    ]
    cache = open_cache(config.cache_folder("train")).manifest
    return {
        "config": str(experiment.config),
        "settings": list(experiment.settings),
        **provenance(config.seed),
        "train_seeds": list(range(experiment.num_seeds)),
        "train_tokens": next(iter(tokens.values())),
        "data": cache.data,
        "limit": config.evaluation.limit,
        "models": [figures(models[name]) for name in wanted],
        "comparisons": [
            asdict(found) | {"is_significant": found.is_significant}
            for found in corrected(comparisons)
        ],
        "gaps": [asdict(gap) for gap in gaps if gap is not None],
    }


def _trained_tokens(experiment: Experiment, arm: str) -> int:
    provenance = read_provenance(experiment.run / arm / "student" / "final")
    if provenance is None:
        raise SystemExit(f"{arm} is not trained: run the same command again.")
    settings = provenance["config"]
    return int(
        provenance["step"] * settings["train"]["blocks_per_step"] * settings["data"]["block_length"]
    )


def _measures(
    run: Path, models: Mapping[str, ModelResult], config: ExperimentConfig
) -> dict[tuple[str, str], Callable[[str], Items]]:
    """(task, metric) -> what reads the documents of a model."""
    found: dict[tuple[str, str], Callable[[str], Items]] = {
        ("held_out", measure): partial(held_out_items, run, measure) for measure in HELD_OUT
    }
    for task in config.evaluation.tasks:
        metric = models["teacher"].tasks[task].main_metric
        found[task, metric] = partial(_task_items, models, task)
    return found


def _task_items(models: Mapping[str, ModelResult], task: str, model: str) -> Items:
    return models[model].tasks[task].items()


def held_out_items(run: Path, measure: str, model: str) -> Items:
    """One measure of a model on each held-out document: a mean over rows."""
    file = run / "eval" / model / "fidelity.json"
    documents = json.loads(file.read_text())["documents"]
    doc_ids_N = np.arange(len(documents["num_rows"]))
    return Items(
        doc_ids_N=doc_ids_N,
        doc_hashes_N=doc_ids_N.astype(str),  # one cache for all: `distill eval` sees to that
        sums_N2=np.column_stack([documents[measure], documents["num_rows"]]).astype(np.float64),
        aggregation="mean",
    )


def _pooled(
    measure: tuple[str, str],
    read: Callable[[str], Items],
    names: Sequence[str],
    experiment: Experiment,
) -> dict[str, Items]:
    """Documents of teacher and cuts, and of every arm without its seed: the mean over seeds."""
    aligned = dict(
        zip(names, align([(name, read(name)) for name in names], measure[0]), strict=True)
    )
    pooled = {name: aligned[name] for name in ("teacher", *experiment.shapes)}
    for arm in (f"{shape}-{loss}" for shape in experiment.shapes for loss in LOSSES):
        seeds = [aligned[f"{arm}-{seed}"] for seed in range(experiment.num_seeds)]
        sums_N2 = np.mean([items.sums_N2 for items in seeds], axis=0)
        pooled[arm] = replace(seeds[0], sums_N2=sums_N2)
    return pooled


if __name__ == "__main__":
    main()
