"""What the licence of a teacher, or of the model a student is made from, asks of the student.

Facts from the texts of Meta's Llama licences (section 1.b, redistribution and use), quoted word for
word; no legal advice.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

from distill.config import ExperimentConfig
from distill.errors import ConfigError

_META = "Copyright © Meta Platforms, Inc. All Rights Reserved."


@dataclass(frozen=True, slots=True)
class Duties:
    """What must go along with a model that was made with Llama or its outputs."""

    prefix: str
    """The published name must begin with it."""
    built_with: str
    """Must be displayed prominently."""
    notice: str
    """Must be in a text file called NOTICE."""
    restriction: str | None = None
    """What else a distiller must know."""


def _since_31(version: str) -> Duties:
    name = f"Llama {version}"
    notice = f"{name} is licensed under the {name} Community License, {_META}"
    return Duties("Llama", "Built with Llama", notice)


LLAMA: dict[str, Duties] = {
    "llama3": Duties(
        "Llama 3",
        "Built with Meta Llama 3",
        f"Meta Llama 3 is licensed under the Meta Llama 3 Community License, {_META}",
        "This licence forbids to use its models or their outputs to improve any large language "
        "model other than Meta Llama 3 and derivative works of it.",
    ),
    "llama3.1": _since_31("3.1"),
    "llama3.2": _since_31("3.2"),
    "llama3.3": _since_31("3.3"),
    "llama4": _since_31("4"),
}
"""Licence, by the name that the Hugging Face hub has for it -> duties."""

_COPIES = ("LICENSE", "LICENSE.txt", "LICENSE.md")


@dataclass(frozen=True, slots=True)
class Origin:
    """One of the two models that a student comes from."""

    role: str
    """`teacher` or `base`."""
    model: str
    revision: str | None
    licence: str | None
    setting: str
    """Where its licence is given."""

    @property
    def duties(self) -> Duties | None:
        """What the licence asks for.

        Raises:
            ConfigError: it is a Llama licence, by its name, but none that is known.
        """
        if self.licence is None:
            return None
        found = LLAMA.get(self.licence)
        if found is None and "llama" in self.licence.lower():
            raise ConfigError(
                f"{self.setting}: the Llama licence {self.licence!r} is not known, so its duties "
                f"cannot be met.\n  Known are {', '.join(LLAMA)}."
            )
        return found


def origins(config: ExperimentConfig) -> list[Origin]:
    """Return the teacher, and the model that the student is made from if that is another one.

    A licence that the config leaves out is the one that the model's own card states, where that is
    at hand.
    """
    teacher, student = config.teacher, config.student
    licence = teacher.licence or _stated(teacher.model, teacher.revision)
    found = [Origin("teacher", teacher.model, teacher.revision, licence, "teacher.licence")]
    if student.kind != "scratch" and student.model != teacher.model:
        licence = config.card.base_licence or _stated(student.model, student.revision)
        found.append(Origin("base", student.model, student.revision, licence, "card.base_licence"))
    return found


def front_matter(model: str, revision: str | None) -> dict[str, Any]:
    """Return the YAML at the head of a model's card, in its folder or the hub's cache, or {}."""
    path: Any = Path(model) / "README.md"
    if not Path(model).is_dir():
        try:
            path = try_to_load_from_cache(model, "README.md", revision=revision)
        except HFValidationError:  # a path that does not exist: opening the model will say so
            return {}
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    match = re.match(r"---\n(.*?)\n---\s", Path(path).read_text(errors="replace"), re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def duties(config: ExperimentConfig) -> list[Duties]:
    """Return the duties of all licences involved, each once.

    Raises:
        ConfigError: a Llama licence is not known.
    """
    return list(dict.fromkeys(d for origin in origins(config) if (d := origin.duties)))


def published_name(config: ExperimentConfig) -> str:
    """Return the name of the student: `card.name`, or the run folder's with a prefix if needed.

    Raises:
        ConfigError: `card.name` does not begin as the licence demands.
    """
    # "Llama 3" begins with "Llama": the longest prefix meets them all.
    prefix = max((found.prefix for found in duties(config)), key=len, default="")
    name = config.card.name or config.run_folder.resolve().name
    if _begins(name, prefix):
        return name
    if config.card.name is not None:
        raise ConfigError(
            f"card.name is {name!r}, but the licence of the teacher or of the base model demands a "
            f"name that begins with {prefix!r}, as {_prefixed(name, prefix)!r} does."
        )
    return _prefixed(name, prefix)


def licence_files(config: ExperimentConfig) -> dict[str, bytes]:
    """Return NOTICE and LICENSE as far as they must or can go along with the student.

    A copy of the licence is looked for beside the weights: in the model's folder, or on the hub and
    in its cache. `card.licence_file` wins over the teacher's.

    Raises:
        ConfigError: a licence demands a copy of itself, and there is none.
    """
    files: dict[str, bytes] = {}
    notices = [found.notice for found in duties(config)]
    if notices:
        files["NOTICE"] = "".join(f"{notice}\n" for notice in notices).encode()
    found = origins(config)
    is_base = len(found) == 1 and config.student.kind != "scratch"
    for origin in found:
        # What only taught gives no weights: its licence goes along if it says so.
        if origin.role == "teacher" and not is_base and origin.duties is None:
            continue
        copy = _copy(origin, config.card.licence_file if origin.role == "teacher" else None)
        if copy is not None:
            files["LICENSE" if "LICENSE" not in files else "LICENSE-BASE"] = copy
        elif origin.duties is not None:
            raise ConfigError(
                f"{origin.setting} is {origin.licence}, which demands that a copy of the licence "
                f"goes along with the student, but there is none beside {origin.model}.\n"
                f"  Put it there as LICENSE, or name it: card.licence_file=FILE"
            )
    return files


def require_licence(config: ExperimentConfig) -> None:
    """Refuse now what could not be saved later.

    Raises:
        ConfigError: as `published_name` and `licence_files`.
    """
    if duties(config):
        published_name(config)
        licence_files(config)


def _stated(model: str, revision: str | None) -> str | None:
    fields = front_matter(model, revision)
    licence = fields.get("license")
    if licence == "other":
        licence = fields.get("license_name", licence)
    return licence if isinstance(licence, str) else None


def _begins(name: str, prefix: str) -> bool:
    return re.sub(r"[\s_-]+", " ", name).startswith(prefix)


def _prefixed(name: str, prefix: str) -> str:
    if prefix == "Llama" and name.lower().startswith("llama"):
        return prefix + name[len(prefix) :]
    return f"{prefix.replace(' ', '-')}-{name}"


def _copy(origin: Origin, given: str | None) -> bytes | None:
    if given is not None:
        if not Path(given).is_file():
            raise ConfigError(f"card.licence_file: there is no file {given!r}.")
        return Path(given).read_bytes()
    return next((path.read_bytes() for path in _candidates(origin) if path.is_file()), None)


def _candidates(origin: Origin) -> Iterator[Path]:
    folder = Path(origin.model)
    for name in _COPIES:
        if folder.is_dir():
            yield folder / name
            continue
        try:
            yield Path(hf_hub_download(origin.model, name, revision=origin.revision))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, ConnectionError):
            continue  # not there, or out of reach and not in the hub's cache, or no hub id
