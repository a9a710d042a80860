"""Students: made as the config says, and plain transformers models afterwards."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.config import ExperimentConfig
from distill.config.students import SCRATCH_SIZES
from distill.errors import ConfigError, MismatchError
from distill.estimate.models import open_model, open_student
from students import BUILDERS, build_student
from tests.tiny_models import SCRATCH, copy_with_tokens

ConfigMaker = Callable[..., ExperimentConfig]


def test_every_kind_of_the_config_has_a_builder() -> None:
    assert set(BUILDERS) == {"pretrained", "pruned", "scratch"}


def test_pretrained_student_is_the_model_itself(
    tiny_config: ConfigMaker, tiny_teacher: Path
) -> None:
    config = tiny_config("student.kind=pretrained", f"student.model={tiny_teacher}")
    model, _ = build_student(config)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    for ours, theirs in zip(model.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_scratch_student_depends_on_the_seed_alone(tiny_config: ConfigMaker) -> None:
    first, tokenizer = build_student(tiny_config(*SCRATCH))
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    second, _ = build_student(tiny_config(*SCRATCH))
    other, _ = build_student(tiny_config(*SCRATCH, "seed=1"))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight.shape == (len(tokenizer), 32)
    assert first.lm_head.weight is first.model.embed_tokens.weight


def test_scratch_student_of_uneven_heads_is_refused(tiny_config: ConfigMaker) -> None:
    with pytest.raises(ConfigError, match="must be a multiple of num_heads"):
        build_student(tiny_config(*SCRATCH, "student.num_heads=5"))


def test_missing_student_folder_is_named(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=rf"student\.model: there is no folder '{missing}'"):
        build_student(tiny_config(f"student.model={missing}"))


def test_logits_beyond_the_tokens_are_fine_and_fewer_are_refused_or_resized(
    tiny_config: ConfigMaker, tiny_teacher: Path, tmp_path: Path
) -> None:
    kind = "student.kind=pretrained"
    enough = copy_with_tokens(tiny_teacher, tmp_path / "a", [f"<|{n}|>" for n in range(7)])
    resize = "student.resize_embeddings=true"
    model, _ = build_student(tiny_config(kind, f"student.model={enough}", resize))
    assert model.lm_head.weight.shape[0] == 265
    assert model.config.distill == {"kind": "pretrained", "from": str(enough), "revision": None}

    short = copy_with_tokens(tiny_teacher, tmp_path / "b", [f"<|{n}|>" for n in range(8)])
    settings = (kind, f"student.model={short}")
    with pytest.raises(MismatchError, match=r"(?s)265 logits.*266 tokens.*resize_embeddings=true"):
        build_student(tiny_config(*settings))
    resized, tokenizer = build_student(tiny_config(*settings, resize))
    assert len(tokenizer) == 266
    for weight in (resized.lm_head.weight, resized.model.embed_tokens.weight):
        assert weight.shape == (320, 64)  # the next multiple of 64
    assert torch.equal(resized.lm_head.weight[:265], model.lm_head.weight)
    assert resized.config.vocab_size == 320
    assert resized.config.distill["logits"] == "320, resized from 265"
    again, _ = build_student(tiny_config(*settings, resize))
    assert torch.equal(again.lm_head.weight, resized.lm_head.weight)


@pytest.mark.parametrize(
    ("size", "vocab_size", "num_parameters"),
    [
        ("135m", 49_152, 134_515_008),
        ("360m", 49_152, 361_821_120),
        ("1b", 128_256, 1_235_814_400),
        ("3b", 128_256, 3_212_749_824),
        ("8b", 128_256, 8_030_261_248),
    ],
)
def test_named_sizes_have_as_many_parameters_as_the_published_models(
    tiny_config: ConfigMaker, tiny_teacher: Path, size: str, vocab_size: int, num_parameters: int
) -> None:
    teacher = open_model(str(tiny_teacher), "teacher.model", "float32")
    config = tiny_config("student.kind=scratch", f"student.size={size}")
    shape = open_student(config, teacher).shape
    rows = 1 if SCRATCH_SIZES[size].tie_embeddings else 2
    missing = (vocab_size - shape.vocab_size) * shape.hidden_size * rows
    assert shape.num_parameters + missing == num_parameters


def test_named_size_is_built(tiny_config: ConfigMaker) -> None:
    model, tokenizer = build_student(
        tiny_config("student.kind=scratch", "student.size=135m", "student.tie_embeddings=false")
    )
    config = model.config
    assert (config.num_hidden_layers, config.num_key_value_heads, config.head_dim) == (30, 3, 64)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert not config.tie_word_embeddings
    assert config.vocab_size == len(tokenizer)
    assert config.distill == {"kind": "scratch", "size": "135m", "seed": 0}
