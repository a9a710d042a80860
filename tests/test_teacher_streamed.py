import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.capture import capture
from distill.cli import main
from distill.config import StreamedTeacherConfig
from distill.data import Block
from distill.errors import ConfigError, StorageError, TeacherError
from distill.teacher.memory import require_streamed
from distill.teacher.streamed import StreamedTeacher
from tests.conftest import ConfigMaker
from tests.families import (
    FAMILIES,
    packed_groups,
    require_equal,
    resident,
    save_model,
    selection,
    streamed,
)
from tests.processes import cached


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_teacher_equals_the_resident_one_to_the_last_bit(
    family: str, tmp_path: Path
) -> None:
    folder, groups = save_model(tmp_path / "model", family), packed_groups((3, 1, 2))
    require_equal(list(streamed(folder).score(groups)), list(resident(folder).score(groups)))


@pytest.mark.parametrize(
    "settings",
    [
        {"window_tokens": 1},
        {"window_tokens": 10_000},
        {"layers_ahead": 3},
        {"layers_ahead": 100},
        {"parking_folder": "parked"},
    ],
    ids=str,
)
def test_windows_reading_ahead_and_parking_change_no_bit(
    settings: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, groups = save_model(tmp_path / "model", shard_bytes=50_000), packed_groups((3, 1, 2))
    assert len(list(folder.glob("*.safetensors"))) > 3
    require_equal(
        list(streamed(folder, **settings).score(groups)), list(resident(folder).score(groups))
    )
    assert not list(tmp_path.glob("parked/*"))  # nothing is left on the disk


def test_bfloat16_of_a_float32_checkpoint_is_what_the_resident_teacher_loads(
    tmp_path: Path,
) -> None:
    folder, groups = save_model(tmp_path / "model"), packed_groups()
    require_equal(
        list(streamed(folder, dtype="bfloat16").score(groups)),
        list(resident(folder, dtype="bfloat16").score(groups)),
    )


def test_fp8_checkpoint_is_dequantised_layer_by_layer(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    folder = save_model(tmp_path / "model", **shape, num_key_value_heads=4)
    to_fp8(folder)
    teacher, groups = streamed(folder, dtype="bfloat16"), packed_groups()
    require_equal(
        list(teacher.score(groups)), list(resident(folder, dtype="bfloat16").score(groups))
    )
    plain = save_model(tmp_path / "plain", **shape, num_key_value_heads=4)
    exact = list(resident(plain, dtype="bfloat16").score(groups))
    far = max(
        float((a.entropy_R - b.entropy_R).abs().max())
        for a, b in zip(teacher.score(groups), exact, strict=True)
    )
    assert 0 < far < 0.05  # it was quantised, and it is still the same model


def to_fp8(folder: Path) -> None:
    """Rewrite a checkpoint as DeepSeek's and Qwen's are: FP8 in blocks of 128 x 128."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in list(weights.items()):
        if "proj" in name:
            rows, columns = (size // 128 for size in weight.shape)
            blocks = weight.float().view(rows, 128, columns, 128)
            scale = blocks.abs().amax((1, 3)) / 448
            quantised = (blocks / scale[:, None, :, None]).view(weight.shape)
            weights[name] = quantised.to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = scale
        else:
            weights[name] = weight.bfloat16()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": settings}))


def test_only_the_layer_at_work_and_those_ahead_are_in_memory(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", num_hidden_layers=6)
    teacher = streamed(folder)
    skeleton, seen = teacher._skeleton, []

    def watched(groups: Sequence[list[Block]]) -> Iterator[list[Block]]:
        for group in groups:
            yield group
            seen.append([p.is_meta for p in skeleton.model.parameters()].count(False))

    fill = skeleton.fill

    def count(stage: object, tensors: object) -> None:
        fill(stage, tensors)  # type: ignore[arg-type]
        seen.append([p.is_meta for p in skeleton.model.parameters()].count(False))

    skeleton.fill = count  # type: ignore[method-assign]
    list(teacher.score(watched(packed_groups())))
    in_layer = len(list(skeleton.model.model.layers[0].parameters()))
    assert max(seen) == in_layer
    assert all(p.is_meta for p in skeleton.model.parameters())


def test_streamed_capture_is_the_resident_one(
    tiny_config: ConfigMaker, tiny_teacher: Path, written_cache: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        "teacher.kind=streamed",
        f"teacher.model={tiny_teacher}",
        "teacher.dtype=float32",
        "teacher.device=cpu",
        "teacher.window_tokens=300",
    )
    assert capture(config)
    assert cached(tmp_path / "run" / "cache") == cached(written_cache)


def test_nan_weights_name_block_and_row(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match="gave NaN or infinite logits in block 0, row 0"):
        list(streamed(folder).score(packed_groups()))


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "model.norm.weight"])
def test_missing_tensor_is_named_before_anything_is_read(name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=rf"lacks 1 tensors that the model needs, first {name}"):
        streamed(folder)
    with pytest.raises(ConfigError, match=rf"lack 1 tensors, first {name}"):
        resident(folder)


def test_missing_file_of_a_sharded_checkpoint_is_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", shard_bytes=50_000)
    gone = sorted(folder.glob("*.safetensors"))[2]
    gone.unlink()
    with pytest.raises(ConfigError, match=rf"lacks 1 of \d+ weight files, first {gone.name}"):
        streamed(folder)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TeacherError, match=r"model\.safetensors ends 100 bytes too early"):
        list(streamed(folder).score(packed_groups()))


def test_other_weight_formats_and_families_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors file"):
        streamed(folder)
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 320}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(TeacherError, match="the layers of a gpt2 cannot be streamed"):
        streamed(tmp_path / "gpt2")


def test_parking_folder_without_space_says_so(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (tmp_path / "file").write_text("")
    teacher = streamed(folder, parking_folder="/dev/full/parked")
    with pytest.raises((StorageError, NotADirectoryError)):
        list(teacher.score(packed_groups()))


def test_layers_that_do_not_fit_name_the_setting() -> None:
    huge = 10**15
    with pytest.raises(ConfigError, match=r"Lower teacher\.layers_ahead") as error:
        require_streamed("huge", [huge, 1, 1], 2, torch.device("cpu"))
    assert "up to 1,000,000.0 GB" in str(error.value)  # the last stage is held with the first
    require_streamed("small", [1000, 1, 1], 2, torch.device("cpu"))


def test_waiting_for_weights_is_counted(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    config = StreamedTeacherConfig(
        kind="streamed", model=str(folder), dtype="float32", device="cpu", window_tokens=64
    )
    teacher = StreamedTeacher(config, selection())
    assert teacher.seconds_waiting == 0
    list(teacher.score(packed_groups()))
    assert 0 < teacher.seconds_waiting < 5


def test_command_line_streams(tiny_yaml: Path, tiny_teacher: Path) -> None:
    settings = ["teacher.kind=streamed", f"teacher.model={tiny_teacher}", "teacher.device=cpu"]
    assert main(["cache", str(tiny_yaml), *settings]) == 0
    assert main(["verify", str(tiny_yaml)]) == 0


def test_progress_moves_with_every_part_and_ends_at_all_tokens(tmp_path: Path) -> None:
    folder, groups = save_model(tmp_path / "model"), packed_groups((3, 1, 2))
    told: list[int] = []
    list(streamed(folder).score(groups, told.append))
    assert sum(told) == 6 * 32
    num_windows, num_parts = 2, 4 + 2  # embedding, four layers, norm and head
    assert len(told) == num_windows * num_parts
    assert min(told) > 0
    told.clear()
    list(resident(folder).score(groups, told.append))
    assert sum(told) == 6 * 32
