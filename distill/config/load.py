"""Read a YAML file and dotted overrides into a validated, frozen experiment."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from distill.config.experiment import ExperimentConfig
from distill.errors import ConfigError

C = TypeVar("C")

_TAGS = frozenset(
    {
        *("pretrained", "pruned", "scratch"),
        *("sampled", "threshold", "top_k"),
        *("resident", "streamed", "vllm"),
    }
)
"""Values of `kind`, which pydantic puts into the path of an error; in YAML they are no section."""


def load(path: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read `path`, apply `overrides` in order, and validate the whole.

    Raises:
        ConfigError: lists every bad setting at once, each by its dotted name.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"cannot read the config {path}: {error.strerror}. Shipped ones are in configs/."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: expected sections such as `data:` and `teacher:`, found {type(tree).__name__}"
        )
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not name:
            raise ConfigError(
                f"override {override!r}: expected name=value, for example train.kl_weight=1"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override {name}: {text!r} is not valid YAML.") from None
        _assign(tree, name, value)
    return parse(ExperimentConfig, tree, str(path))


def parse(config_type: type[C], tree: object, where: str) -> C:
    """Validate `tree` (nested dicts, as from YAML or JSON) as `config_type`.

    Raises:
        ConfigError: lists every bad setting at once; `where` opens the message.
    """
    try:
        return TypeAdapter(config_type).validate_python(tree)
    except ValidationError as error:
        problems = [_explain(item) for item in error.errors()]
    raise ConfigError(f"{where}: {len(problems)} bad setting(s)\n" + "\n".join(problems))


def to_tree(config: Any) -> dict[str, Any]:
    """Return `config` as nested dicts of JSON values; `parse` reads them back."""
    tree: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    assert set(tree) == set(asdict(config)), "pydantic dropped a field"
    return tree


def _explain(item: Any) -> str:
    name = ".".join(str(part) for part in item["loc"] if part not in _TAGS) or "(top level)"
    reasons = {
        "unexpected_keyword_argument": "no such setting",
        "missing": "is required",
        "missing_argument": "is required",
    }
    reason = reasons.get(item["type"], item["msg"].removeprefix("Value error, "))
    given = (
        ""
        if item["type"].startswith("missing") or isinstance(item["input"], dict)
        else f" (got {item['input']!r})"
    )
    return f"  {name}: {reason}{given}"


def _assign(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {name}: {section!r} is a value, not a section")
        tree = inner
    if leaf == "kind" and tree.get("kind") != value:
        tree.clear()  # a new variant starts from its own defaults, never its predecessor's
    tree[leaf] = value
