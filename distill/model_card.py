"""README.md, NOTICE and LICENSE of a student: what it is made of, and what that obliges to."""

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from distill import licences
from distill.cache.manifest import Manifest
from distill.config import ExperimentConfig, SourceConfig, to_tree
from distill.errors import flatten
from distill.files import write_text_atomically

README = "README.md"

_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"

_LOCAL_LOADERS = frozenset({"json", "parquet", "text", "csv", "arrow"})

_HUB_LICENCES = frozenset(
    {
        *("apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "mpl-2.0", "unlicense"),
        *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
        *("openrail", "bigscience-openrail-m", "gemma", "other", *licences.LLAMA),
    }
)
"""Values of `license` that the hub knows, as far as models are likely to have them."""


def student_files(
    config: ExperimentConfig, manifest: Manifest, student: Any, *, is_trained: bool
) -> dict[str, bytes]:
    """Return the files that belong beside the weights of a student, by name.

    Args:
        config: The experiment.
        manifest: Of its train cache.
        student: The model; its `config.distill` says how it was made.
        is_trained: Whether to tell of the training, whose last results are in metrics.jsonl.

    Raises:
        ConfigError: the licence of a teacher or base model is not met; see `distill.licences`.
    """
    name = licences.published_name(config)
    made = getattr(student.config, "distill", {"kind": "as it was given to distill.train"})
    sections = [
        f"# {name}",
        *(f"**{found.built_with}**" for found in licences.duties(config)),
        _summary(config, student, is_trained),
        f"## How to load it\n\n```python\n{_usage(name)}```",
        f"## Results\n\n{_BEGIN}\n{_held_out(config, is_trained)}\n{_END}",
        f"## Teacher\n\n{_items(manifest.teacher)}",
        f"## Data\n\n{_data(config, manifest)}",
        f"## Targets\n\n{_items(manifest.targets | {'seed': manifest.seed})}",
        f"## How the student was made\n\n{_items(dict(flatten(made, ' ')))}",
    ]
    if is_trained:
        sections.append(f"## Training\n\n{_training(config, manifest)}")
    sections += [f"## Licence\n\n{_licence(config)}", f"## Versions\n\n{_versions(manifest)}"]
    text = f"---\n{_front_matter(config, name)}---\n" + "\n\n".join(sections) + "\n"
    return {README: text.encode(), **licences.licence_files(config)}


def put_results(folder: Path, markdown: str) -> bool:
    """Replace the results in the card of a student, whole or not at all.

    Returns:
        Whether there is a card with a place for them; nothing is written otherwise.

    Raises:
        StorageError: the disk is full or read-only; the old card stays.
    """
    path = folder / README
    text = path.read_text() if path.is_file() else ""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        return False
    made = f"{before}{begin}\n{markdown.strip()}\n{end}{after}"
    if made != text:
        write_text_atomically(path, made)
    return True


def _front_matter(config: ExperimentConfig, name: str) -> str:
    """Return the YAML that the hub reads; what is not known is left out."""
    licence = _own_licence(config)
    base = None if config.student.kind == "scratch" else _hub_id(config.student.model)
    datasets = [source.path for source in config.data.sources if _is_hub_data(source)]
    fields: dict[str, Any] = {"model_name": name}
    if licence is not None:
        is_known = licence in _HUB_LICENCES
        fields |= (
            {"license": licence} if is_known else {"license": "other", "license_name": licence}
        )
    fields |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    fields |= {"base_model": [base]} if base else {}
    fields |= {"datasets": list(dict.fromkeys(datasets))} if datasets else {}
    fields["tags"] = ["knowledge-distillation", f"{config.student.kind}-student"]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _own_licence(config: ExperimentConfig) -> str | None:
    """Licence of the student: a Llama licence reaches through; else that of its weights' origin."""
    found = licences.origins(config)
    bound = [origin.licence for origin in found if origin.duties is not None]
    return bound[0] if bound else found[-1].licence


def _summary(config: ExperimentConfig, student: Any, is_trained: bool) -> str:
    count = sum(parameter.numel() for parameter in student.parameters())
    kinds = {
        "pretrained": "which existed before",
        "pruned": "cut out of a larger model",
        "scratch": "which began with random weights",
    }
    state = "trained on" if is_trained else "**before any training** on"
    return (
        f"A language model with {count:,} parameters, {kinds[config.student.kind]}, {state} the "
        f"next-token distributions of `{config.teacher.model}` (knowledge distillation)."
    )


def _usage(name: str) -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("path/to/{name}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("path/to/{name}")\n'
    )


def _held_out(config: ExperimentConfig, is_trained: bool) -> str:
    metrics = _metrics(config.run_folder) if is_trained else []
    measured = [values for values in metrics if "eval/kl_nats" in values]
    if not measured:
        return "Not measured yet: `distill eval` fills this in."
    kept = measured[-1]
    if config.train.keep_best:
        kept = min(measured, key=lambda values: float(values["eval/kl_nats"]))
    return (
        f"On held-out blocks after {kept['step']:,} steps: cross-entropy "
        f"{kept['eval/ce_nats']:.4f} nats, KL(teacher || student) {kept['eval/kl_nats']:.4f} nats, "
        f"top-1 agreement with the teacher {100 * kept['eval/agreement']:.1f} %."
    )


def _metrics(run_folder: Path) -> list[dict[str, Any]]:
    path = run_folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _data(config: ExperimentConfig, manifest: Manifest) -> str:
    sources = [
        ", ".join(
            f"{key} `{_plain(value)}`"
            for key, value in to_tree(source).items()
            if value is not None and value is not False
        )
        for source in config.data.sources
    ]
    facts = {
        "tokenizer": f"{manifest.vocab_size:,} tokens, fingerprint "
        f"{manifest.tokenizer['fingerprint'][:16]}",
        "blocks": f"{manifest.num_blocks:,} of {manifest.block_length:,} tokens",
        "rows that count": f"{manifest.num_rows:,}",
        "fingerprint of the blocks": manifest.data["blocks"][:16],
        "held-out documents": f"{100 * config.data.held_out_fraction:g} %",
    }
    return "".join(f"- source: {source}\n" for source in sources) + _items(facts)


def _training(config: ExperimentConfig, manifest: Manifest) -> str:
    settings = to_tree(config)["train"] | {"seed": config.training_seed}
    num_steps = max((values["step"] for values in _metrics(config.run_folder)), default=0)
    num_tokens = num_steps * config.train.blocks_per_step * manifest.block_length
    return _items(
        {
            "steps": f"{num_steps:,}",
            "tokens": f"{num_tokens:,}",
            **dict(flatten(settings, " ")),
        }
    )


def _licence(config: ExperimentConfig) -> str:
    lines = []
    for origin in licences.origins(config):
        if origin.licence is None:
            lines.append(
                f"- {origin.role} `{origin.model}`: **not stated** (`{origin.setting}`). Find it "
                "out before you publish the student."
            )
        else:
            lines.append(f"- {origin.role} `{origin.model}`: {origin.licence}")
    bound = licences.duties(config)
    for found in bound:
        lines.append(f"- {found.notice}")
        lines += [f"- {found.restriction}"] if found.restriction else []
    if bound:
        lines.append(
            "- Distribute the student together with LICENSE and NOTICE, and under a name that "
            f"begins with {max((found.prefix for found in bound), key=len)!r}: the licence demands "
            "it."
        )
    return "\n".join(lines)


def _versions(manifest: Manifest) -> str:
    now = {}
    for library in ("distill-llm", "torch", "transformers"):
        try:
            now[library] = version(library)
        except PackageNotFoundError:  # run from a checkout that is not installed
            continue
    capture = ", ".join(f"{name} {found}" for name, found in sorted(manifest.versions.items()))
    return _items(
        {"student": ", ".join(f"{n} {found}" for n, found in now.items()), "teacher": capture}
    )


def _is_hub_data(source: SourceConfig) -> bool:
    return source.path not in _LOCAL_LOADERS and not Path(source.path).exists()


def _hub_id(model: str) -> str | None:
    """Hub id of a model; of a local folder, the base_model that its own card names."""
    if not Path(model).is_dir():
        return model
    found = licences.front_matter(model, None).get("base_model")
    return found if isinstance(found, str) else None


def _items(facts: Mapping[str, Any]) -> str:
    return "\n".join(
        f"- {key.replace('_', ' ')}: {_plain(value)}"
        for key, value in facts.items()
        if value is not None
    )


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
