"""Trainings that must not go on, and how their learning rate moves."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.cache.reader import open_cache
from distill.capture import capture
from distill.config import TrainConfig
from distill.errors import CacheError, ConfigError, MismatchError, TrainingError
from distill.models import out_of_memory_as
from distill.schedules import learning_rate_schedule
from distill.targets import SparseTargets
from distill.train import train
from students import build_student
from tests.conftest import ConfigMaker, write_cache
from tests.test_train import TINY, _train_until, run

pytestmark = pytest.mark.usefixtures("cache_copy")


def test_loss_that_is_not_finite_names_step_blocks_and_the_last_good_checkpoint(
    tiny_config: ConfigMaker,
) -> None:
    config = tiny_config(*TINY, "train.learning_rate=1e30", "train.warmup_fraction=0")
    with pytest.raises(TrainingError) as error:
        run(config)
    message = str(error.value)
    assert message.startswith("step 2 has loss ")
    assert "in blocks [" in message
    checkpoint = config.run_folder / "checkpoints" / "step-000001"
    assert f"Last good checkpoint: of step 1, {checkpoint}." in message
    assert checkpoint.is_dir()
    assert not (config.run_folder / "student" / "final").exists()


def test_nan_weights_stop_before_the_first_step(tiny_config: ConfigMaker) -> None:
    config = tiny_config(*TINY)
    student, tokenizer = build_student(config)
    student.get_decoder().norm.weight.data[3] = torch.nan
    before = student.get_input_embeddings().weight.detach().clone()
    with pytest.raises(TrainingError, match=r"step 1 has loss nan(.|\n)*checkpoint: none yet"):
        train(config, student, tokenizer)
    assert torch.equal(student.get_input_embeddings().weight, before)


def test_chats_in_which_nothing_counts_are_refused_before_the_teacher_scores_them(
    tiny_config: ConfigMaker, tmp_path: Path
) -> None:
    talks = [[{"role": "user", "content": f"is there anybody at door {n}?"}] for n in range(99)]
    lines = (json.dumps({"text": talk}) + "\n" for talk in talks)
    (tmp_path / "chats.jsonl").write_text("".join(lines))
    config = tiny_config(
        f"data.sources=[{{path: json, data_files: ['{tmp_path}/chats.jsonl'], format: chat}}]",
        f"cache.folder={tmp_path / 'empty'}",
    )
    with pytest.raises(
        ConfigError, match=r"no token of the \d+ train blocks counts(.|\n)*assistant"
    ):
        capture(config)
    assert not list((tmp_path / "empty").rglob("manifest.json"))


def test_cache_in_which_nothing_counts_is_refused(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    config = tiny_config(*TINY)
    cache = open_cache(config.cache_folder("train"))
    blocks = [
        replace(cache.block(n)[0], loss_mask_T=np.zeros(32, dtype=np.bool_)) for n in range(6)
    ]
    empty = SparseTargets.empty().scatter_rows(torch.zeros(31, dtype=torch.bool))
    for split in ("train", "held_out"):
        write_cache(str(tmp_path / "empty" / split), cache.manifest, blocks, [empty] * 6)
    with pytest.raises(CacheError, match="every loss mask is empty"):
        run(tiny_config(*TINY, f"cache.folder={tmp_path / 'empty'}"))


def test_exhausted_memory_is_a_training_error() -> None:
    with (
        pytest.raises(TrainingError, match=r"CUDA out of memory\.\n  Lower it"),
        out_of_memory_as(TrainingError, "Lower it."),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_run_of_another_number_of_processes_is_refused(tiny_config: ConfigMaker) -> None:
    config = tiny_config(*TINY)
    with pytest.raises(Exception, match="stop here"):
        _train_until(config, step=1)
    state = config.run_folder / "checkpoints" / "run.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "processes": 2}))
    with pytest.raises(MismatchError, match=r"processes\n +there +2\n +config +1"):
        run(config, resume=True)


def learning_rates(config: TrainConfig) -> list[float]:
    """Of 20 steps, and what the schedule stands at after them."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = learning_rate_schedule(config, optimizer, 20), []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return [*rates, schedule.get_last_lr()[0]]


def test_wsd_warms_up_stays_and_falls_over_the_last_fifth() -> None:
    config = TrainConfig(schedule="wsd", warmup_fraction=0.1, learning_rate=1.0)
    *rates, after = learning_rates(config)
    assert rates[:2] == [0, 0.5]
    assert rates[2:17] == [1.0] * 15
    assert all(before > after for before, after in pairwise(rates[16:]))
    assert 0 < rates[-1] < 0.2
    assert after == pytest.approx(0)
