"""Students cut out of a larger model, as the config says."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from distill.cli import main
from distill.config import ExperimentConfig
from distill.errors import CacheError, ConfigError, MismatchError
from distill.estimate.models import open_model, open_student
from students import build_student
from students.calibration import read_blocks
from students.depth import block_influence, evenly_spaced, loss_increase
from tests.tiny_models import SCRATCH, copy_with_tokens

ConfigMaker = Callable[..., ExperimentConfig]

WIDTH = (
    "student.num_layers=2",
    "student.num_heads=2",
    "student.intermediate_size=40",
    "student.hidden_size=48",
    "student.calibration_blocks=3",
)


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        ((), {"depth": {"layers": "1 of 2", "by": "spaced", "kept": [0]}}),
        (
            ("student.num_layers=null", "student.kept_layers=[1]"),
            {"depth": {"layers": "1 of 2", "by": "listed", "kept": [1]}},
        ),
        (
            WIDTH,
            {
                "width": {
                    "heads": "2 of 4",
                    "key_value_heads": "2 of 4",
                    "mlp_channels": "40 of 128",
                    "hidden_channels": "48 of 64",
                    "by": "activation",
                }
            },
        ),
        (("student.num_layers=2",), {}),
    ],
    ids=["spaced", "listed", "width", "nothing"],
)
def test_config_json_says_how_a_student_was_cut(
    tiny_config: ConfigMaker,
    tiny_teacher: Path,
    written_cache: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    note: dict[str, Any],
) -> None:
    model, _ = build_student(tiny_config(f"cache.folder={written_cache}", *overrides))
    model.save_pretrained(tmp_path / "student")
    found = AutoConfig.from_pretrained(tmp_path / "student").distill
    found.pop("calibration", None)
    assert found == {"kind": "pruned", "from": str(tiny_teacher), "revision": None, **note}


@pytest.mark.parametrize("rule", ["influence", "loss"])
def test_layers_are_chosen_by_what_is_measured_on_the_cache(
    tiny_config: ConfigMaker, tiny_teacher: Path, written_cache: Path, rule: str
) -> None:
    config = tiny_config(
        f"cache.folder={written_cache}", f"student.layers={rule}", "student.calibration_blocks=5"
    )
    model, tokenizer = build_student(config)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    blocks, note = read_blocks(config, tokenizer, 5)
    importance = (
        block_influence(teacher, blocks)
        if rule == "influence"
        else loss_increase(teacher, blocks, len(tokenizer))
    )
    best = max(range(2), key=lambda number: importance[number])
    assert model.config.distill["depth"] == {"layers": "1 of 2", "by": rule, "kept": [best]}
    assert model.config.distill["calibration"] == note
    kept = teacher.model.layers[best].mlp.up_proj.weight
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, kept)


def test_calibration_is_noted_and_repeats_itself(
    tiny_config: ConfigMaker, cache_copy: Path
) -> None:
    models = [build_student(tiny_config(*WIDTH))[0] for _ in range(2)]
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)
    checksum = json.loads((cache_copy / "train" / "manifest.json").read_text())["checksum"]
    assert models[0].config.distill["calibration"] == {"cache": checksum, "blocks": 3}


def test_weights_measure_without_a_cache(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    model, _ = build_student(tiny_config(*WIDTH, "student.importance=weight"))
    assert model.config.distill["width"]["by"] == "weight"
    assert "calibration" not in model.config.distill
    assert not (tmp_path / "run").exists()


def test_calibration_without_a_whole_cache_is_refused(
    tiny_config: ConfigMaker, cache_copy: Path
) -> None:
    with pytest.raises(ConfigError, match=r"calibration_blocks is 25, but .* has 24 blocks"):
        build_student(tiny_config(*WIDTH, "student.calibration_blocks=25"))
    (cache_copy / "train" / "index.json").unlink()
    with pytest.raises(CacheError, match=r"(?s)measured on blocks.*incomplete.*importance=weight"):
        build_student(tiny_config(*WIDTH))


def test_calibration_on_a_cache_of_another_tokenizer_is_refused(
    tiny_config: ConfigMaker, tiny_teacher: Path, cache_copy: Path, tmp_path: Path
) -> None:
    other = copy_with_tokens(tiny_teacher, tmp_path / "other", ["<|new|>"])
    assert cache_copy.is_dir()
    with pytest.raises(MismatchError, match=r"(?s)another tokenizer .*student\.layers=spaced"):
        build_student(tiny_config(*WIDTH, f"student.model={other}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("student.kind=scratch",), "give either size or all dimensions; missing: hidden_size, "),
        ((*SCRATCH, "student.size=1b"), "leave out either size or the dimensions"),
        (("student.kept_layers=[0]",), "kept_layers says it all: leave out num_layers"),
        (
            ("student.num_layers=null", "student.kept_layers=[1, 1]"),
            "must be rising numbers of layers",
        ),
        (("student.num_layers=null", "student.kept_layers=[]"), "must be rising numbers"),
        (
            ("student.num_layers=null", "student.layers=influence"),
            "layers is influence, but num_layers does not say how many",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tiny_config: ConfigMaker, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(*overrides)


def test_estimate_knows_the_cut(tiny_config: ConfigMaker, tiny_teacher: Path) -> None:
    config = tiny_config(*WIDTH, "student.importance=weight")
    teacher = open_model(str(tiny_teacher), "teacher.model", "float32")
    model, _ = build_student(config)
    assert open_student(config, teacher).shape.num_parameters == model.num_parameters()


def test_student_cut_in_width_and_depth_learns(tiny_yaml: Path, tmp_path: Path) -> None:
    overrides = [*WIDTH, "student.num_layers=1", "student.layers=influence"]
    training = ["train.learning_rate=3e-3", "train.epochs=8"]
    assert main(["run", str(tiny_yaml), *overrides, *training]) == 0
    models = json.loads((tmp_path / "run" / "results.json").read_text())["models"]
    kl = {model["name"]: model["fidelity"]["kl_nats"]["value"] for model in models}
    assert kl["student"] < 0.8 * kl["initial"]
    for folder in ("initial", "final"):
        made = AutoConfig.from_pretrained(tmp_path / "run" / "student" / folder)
        assert made.distill["width"]["heads"] == "2 of 4"
        assert made.distill["depth"]["by"] == "influence"
        card = (tmp_path / "run" / "student" / folder / "README.md").read_text()
        assert "- width hidden channels: 48 of 64" in card
        assert "- calibration blocks: 3" in card


def test_evenly_spaced_layers_hold_both_ends_and_never_repeat() -> None:
    for num_layers in range(1, 40):
        for num_kept in range(1, num_layers + 1):
            kept = evenly_spaced(num_layers, num_kept)
            assert len(set(kept)) == num_kept
            assert kept[0] == 0
            assert num_kept == 1 or kept[-1] == num_layers - 1
            gaps = {after - before for before, after in pairwise(kept)}
            assert not gaps or max(gaps) - min(gaps) <= 1


def test_smollm2_keeps_24_of_30_layers_that_are_not_neighbours_of_a_hole() -> None:
    kept = evenly_spaced(30, 24)
    assert len(kept) == 24
    assert max(after - before for before, after in pairwise(kept)) == 2


def test_asking_for_more_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_layers is 5, but the model has 4"):
        evenly_spaced(4, 5)


def test_pruned_model_computes_with_the_kept_layers_alone(
    tiny_config: ConfigMaker, tiny_teacher: Path, tmp_path: Path
) -> None:
    model, tokenizer = build_student(tiny_config())
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    ids = torch.arange(12)[None]
    hidden = teacher.model.embed_tokens(ids)
    places = torch.arange(12)[None]
    hidden = teacher.model.layers[0](
        hidden, position_embeddings=teacher.model.rotary_emb(hidden, places)
    )
    wanted = teacher.lm_head(teacher.model.norm(hidden))
    torch.testing.assert_close(model(ids, use_cache=False).logits, wanted)

    model.save_pretrained(tmp_path / "student")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert again.config.num_hidden_layers == 1
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert len(tokenizer) == 258


def test_pruned_model_generates_with_its_cache(tiny_config: ConfigMaker) -> None:
    model, _ = build_student(tiny_config("student.num_layers=2"))
    ids = torch.arange(5)[None]
    made = model.generate(ids, max_new_tokens=4, do_sample=False)
    slow = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(made, slow)
