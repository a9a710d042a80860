"""Many models in one evaluation: what fails on one does not keep the others from their scores."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from distill.errors import EvalError
from distill.evaluate.compare import compared_models, evaluate
from distill.evaluate.leaderboard import compare
from tests.completions_server import completions_server
from tests.conftest import ConfigMaker

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
"""As peft 0.21 asks transformers 5 by the old name."""


def read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.mark.usefixtures("cache_copy")
def test_models_that_fail_do_not_keep_others_from_their_scores(
    tiny_config: ConfigMaker, tiny_teacher: Path, task_folder: Path, tmp_path: Path
) -> None:
    fine, cut = (Path(shutil.copytree(tiny_teacher, tmp_path / name)) for name in ("fine", "cut"))
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20_000])
    pointer = Path(shutil.copytree(tiny_teacher, tmp_path / "pointer"))
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    config = tiny_config(
        f"evaluation.include_path={task_folder}",
        "evaluation.tasks=[tiny_choice, bad_document]",
        f"evaluation.models.cut={cut}",
        "evaluation.models.absent=./nowhere",
        f"evaluation.models.pointer={pointer}",
        f"evaluation.models.fine={fine}",
    )
    with pytest.raises(EvalError) as caught:
        evaluate(config, on_progress=lambda _: None)
    message = str(caught.value)
    assert "5 of 5 models could not be scored in full" in message
    assert message.count("absent: there is no model folder ./nowhere") == 1
    assert "bad_document: ZeroDivisionError" in message
    for name in ("cut", "pointer"):
        assert f"{name}: " in message
        assert not (config.run_folder / "eval" / name).exists()
    for name in ("teacher", "fine"):
        folder = config.run_folder / "eval" / name
        assert {path.name for path in folder.iterdir()} == {"fidelity.json", "tiny_choice.json"}


@pytest.mark.usefixtures("cache_copy")
def test_adapters_and_servers_stand_beside_the_teacher_in_the_table(
    tiny_config: ConfigMaker, tiny_teacher: Path, task_folder: Path, tmp_path: Path
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_teacher), lora)
    adapted.save_pretrained(str(tmp_path / "lora"))
    with completions_server(tiny_teacher) as url:
        config = tiny_config(
            f"evaluation.include_path={task_folder}",
            "evaluation.tasks=[tiny_choice]",
            f"evaluation.models.tuned.path={tiny_teacher}",
            f"evaluation.models.tuned.adapter={tmp_path / 'lora'}",
            "evaluation.models.served.path=teacher",
            "evaluation.models.served.backend=openai",
            f"evaluation.models.served.base_url={url}",
            f"evaluation.models.served.tokenizer={tiny_teacher}",
        )
        folder = evaluate(config, on_progress=lambda _: None)
    teacher, tuned, served = compare([config.run_folder]).models
    assert [model.name for model in (teacher, tuned, served)] == ["teacher", "tuned", "served"]
    assert teacher.fidelity is not None
    assert tuned.fidelity is not None
    assert served.fidelity is None
    distances = [close.kl_nats.value or 0.0 for close in (teacher.fidelity, tuned.fidelity)]
    assert distances[1] > 5 * abs(distances[0])
    assert teacher.weights != tuned.weights
    values = [model.tasks["tiny_choice"].main.value for model in (teacher, served)]
    assert values[0] == values[1]
    listed = {entry["name"]: entry for entry in read_list(folder / "models.json")}
    assert "adapter" not in listed["teacher"]
    assert listed["served"]["backend"] == "openai"
    assert listed["served"]["num_parameters"] is None
    added = sum(p.numel() for name, p in adapted.named_parameters() if "lora" in name)
    assert listed["tuned"]["num_parameters"] == listed["teacher"]["num_parameters"] + added
    assert [model.as_dict() for model in compared_models(config)] == list(listed.values())


def read_list(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads(path.read_text())
    return records
