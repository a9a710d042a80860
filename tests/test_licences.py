"""Duties of Llama licences: name, display, notice, copy."""

from collections.abc import Callable
from pathlib import Path

import pytest

from distill.config import ExperimentConfig
from distill.errors import ConfigError
from distill.licences import LLAMA, duties, licence_files, origins, published_name, require_licence

ConfigMaker = Callable[..., ExperimentConfig]
TEXT = b"the text of the licence\n"


@pytest.fixture
def llama(tmp_path: Path, tiny_config: ConfigMaker) -> ConfigMaker:
    """A teacher's folder with LICENSE, claimed to be Llama 3.1."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "LICENSE").write_bytes(TEXT)
    return lambda *overrides: tiny_config(
        f"teacher.model={tmp_path / 'teacher'}",
        f"student.model={tmp_path / 'teacher'}",
        "teacher.licence=llama3.1",
        *overrides,
    )


@pytest.mark.parametrize(
    ("licence", "notice"),
    [
        (
            "llama3",
            (
                "Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
                "Copyright © Meta Platforms, Inc. All Rights Reserved."
            ),
        ),
        (
            "llama3.1",
            (
                "Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta "
                "Platforms, Inc. All Rights Reserved."
            ),
        ),
        (
            "llama3.2",
            (
                "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta "
                "Platforms, Inc. All Rights Reserved."
            ),
        ),
        (
            "llama3.3",
            (
                "Llama 3.3 is licensed under the Llama 3.3 Community License, Copyright © Meta "
                "Platforms, Inc. All Rights Reserved."
            ),
        ),
        (
            "llama4",
            (
                "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta "
                "Platforms, Inc. All Rights Reserved."
            ),
        ),
    ],
)
def test_notice_is_the_licences_own_sentence(llama: ConfigMaker, licence: str, notice: str) -> None:
    config = llama(f"teacher.licence={licence}")
    files = licence_files(config)
    assert files == {"NOTICE": f"{notice}\n".encode(), "LICENSE": TEXT}
    assert duties(config) == [LLAMA[licence]]


def test_every_known_licence_has_its_notice_tested() -> None:
    assert list(LLAMA) == ["llama3", "llama3.1", "llama3.2", "llama3.3", "llama4"]


@pytest.mark.parametrize(
    ("licence", "run", "name"),
    [
        ("llama3.1", "run", "Llama-run"),
        ("llama3.1", "llama31-70b-to-8b", "Llama31-70b-to-8b"),
        ("llama3.3", "Llama-3.3-small", "Llama-3.3-small"),
        ("llama3", "run", "Llama-3-run"),
        ("llama3", "Llama-small", "Llama-3-Llama-small"),
        ("llama3", "Llama-3-small", "Llama-3-small"),
        ("apache-2.0", "run", "run"),
        ("null", "run", "run"),
    ],
)
def test_name_comes_from_the_run_with_the_prefix_that_the_licence_wants(
    llama: ConfigMaker, tmp_path: Path, licence: str, run: str, name: str
) -> None:
    config = llama(f"teacher.licence={licence}", f"run_folder={tmp_path / run}")
    assert published_name(config) == name


def test_chosen_name_is_kept_or_refused_but_never_changed(llama: ConfigMaker) -> None:
    assert published_name(llama("card.name=Llama-Tiny")) == "Llama-Tiny"
    assert published_name(llama("card.name=Tiny", "teacher.licence=mit")) == "Tiny"
    for name, better in (("Tiny", "Llama-Tiny"), ("llama-tiny", "Llama-tiny")):
        with pytest.raises(ConfigError, match=rf"card\.name is '{name}'.*'Llama', as '{better}'"):
            require_licence(llama(f"card.name={name}"))
    with pytest.raises(ConfigError, match=r"begins with 'Llama 3', as 'Llama-3-Llama-Tiny' does"):
        published_name(llama("card.name=Llama-Tiny", "teacher.licence=llama3"))


def test_missing_copy_of_the_licence_is_refused_and_can_be_named(
    llama: ConfigMaker, tmp_path: Path
) -> None:
    (tmp_path / "teacher" / "LICENSE").unlink()
    with pytest.raises(ConfigError, match=r"(?s)demands that a copy.*card\.licence_file=FILE"):
        require_licence(llama())
    (tmp_path / "terms").write_bytes(TEXT)
    assert licence_files(llama(f"card.licence_file={tmp_path / 'terms'}"))["LICENSE"] == TEXT
    with pytest.raises(ConfigError, match=r"card\.licence_file: there is no file '/nowhere'"):
        require_licence(llama("card.licence_file=/nowhere"))
    (tmp_path / "teacher" / "LICENSE.txt").write_bytes(TEXT)
    assert licence_files(llama())["LICENSE"] == TEXT


@pytest.mark.parametrize("model", ["no/such-model", "./no/such/folder"])
def test_model_without_a_licence_at_hand_is_refused(tiny_config: ConfigMaker, model: str) -> None:
    config = tiny_config(f"teacher.model={model}", "teacher.licence=llama3.1")
    with pytest.raises(ConfigError, match=f"there is none beside {model}"):
        require_licence(config)


@pytest.mark.parametrize("licence", ["llama2", "Llama-3.1", "llama-3.1-community"])
def test_llama_licence_that_is_not_known_is_refused(llama: ConfigMaker, licence: str) -> None:
    with pytest.raises(ConfigError, match=rf"teacher\.licence: .*'{licence}' is not known"):
        require_licence(llama(f"teacher.licence={licence}"))


def test_base_model_has_duties_of_its_own(llama: ConfigMaker, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = ("student.kind=pretrained", f"student.model={tmp_path / 'base'}")
    assert licence_files(llama(*base)).keys() == {"NOTICE", "LICENSE"}
    both = llama(*base, "card.base_licence=llama3.2")
    with pytest.raises(ConfigError, match=r"card\.base_licence is llama3\.2, which demands"):
        require_licence(both)
    (tmp_path / "base" / "LICENSE").write_bytes(b"of the base")
    files = licence_files(both)
    assert files["LICENSE"] == TEXT
    assert files["LICENSE-BASE"] == b"of the base"
    assert files["NOTICE"].decode().splitlines() == [
        LLAMA["llama3.1"].notice,
        LLAMA["llama3.2"].notice,
    ]
    free = llama(*base, "teacher.licence=mit", "card.base_licence=llama3")
    assert published_name(free) == "Llama-3-run"
    assert licence_files(free)["LICENSE"] == b"of the base"


def test_other_licences_go_along_with_weights_but_not_with_outputs(llama: ConfigMaker) -> None:
    apache = "teacher.licence=apache-2.0"
    assert licence_files(llama(apache)) == {"LICENSE": TEXT}
    scratch = ("student.kind=scratch", "student.size=135m")
    assert licence_files(llama(apache, *scratch)) == {}
    assert licence_files(llama(*scratch)).keys() == {"NOTICE", "LICENSE"}


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: llama3.2\n---\n# a\n", "llama3.2"),
        ("---\nlicense: other\nlicense_name: llama3.3\n---\n", "llama3.3"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("# no front matter\n", None),
    ],
)
def test_licence_that_is_not_given_is_the_one_of_the_models_own_card(
    llama: ConfigMaker, tmp_path: Path, card: str, licence: str | None
) -> None:
    (tmp_path / "teacher" / "README.md").write_text(card)
    (found,) = origins(llama("teacher.licence=null"))
    assert found.licence == licence
    assert found.duties == (LLAMA[licence] if licence else None)
    (given,) = origins(llama("teacher.licence=mit"))
    assert given.licence == "mit"
