"""Adapters, compilation, recomputation, the best weights, early stops, trackers, the plot."""

import json
import math
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from distill import launch
from distill.config import TrainConfig
from distill.errors import ConfigError
from distill.export import read_provenance
from distill.held_out import HeldOutRecord
from students import build_student, save_initial
from tests.conftest import ConfigMaker
from tests.processes import start
from tests.test_train import TINY, _train_until, metrics, run, weights
from tests.test_train_stops import learning_rates

pytestmark = pytest.mark.usefixtures("cache_copy")
LORA = (*TINY, "train.lora.rank=4", "train.learning_rate=1e-2", "train.save_dtype=float32")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # inside peft
def test_only_adapters_are_trained_and_they_are_merged_into_the_student(
    tiny_config: ConfigMaker,
) -> None:
    config = tiny_config(*LORA, "train.epochs=3", "train.eval_every=3")
    save_initial(config, *build_student(config))
    final = run(config)
    initial = final.with_name("initial")
    before, after = weights(initial), weights(final)
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {name for name in before if "_proj" in name}
    evaluations = [line["eval/kl_nats"] for line in metrics(config) if "eval/kl_nats" in line]
    assert evaluations[-1] < evaluations[0]

    base = AutoModelForCausalLM.from_pretrained(initial, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, final / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    named = json.loads((final / "adapter" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(initial)


def test_adapters_of_named_layers_leave_the_others_alone(tiny_config: ConfigMaker) -> None:
    config = tiny_config(*LORA, "train.lora.modules=[q_proj, v_proj]")
    save_initial(config, *build_student(config))
    final = run(config)
    before, after = weights(final.with_name("initial")), weights(final)
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}


def test_adapters_of_layers_that_are_not_there_are_refused(tiny_config: ConfigMaker) -> None:
    with pytest.raises(ConfigError, match=r"no c_attn\. Its linear layers: .*q_proj"):
        run(tiny_config(*LORA, "train.lora.modules=[q_proj, c_attn]"))


def test_frozen_weights_are_held_in_bfloat16_and_adapters_in_float32(
    tiny_config: ConfigMaker,
) -> None:
    from distill.distillation_model import trainable

    config = tiny_config(*LORA, "train.precision=bfloat16")
    model = trainable(build_student(config)[0], config.train)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert (trained, frozen) == ({torch.float32}, {torch.bfloat16})


def test_adapters_resume_to_the_same_bits(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    shared = (*LORA, "train.lora.dropout=0.2", f"cache.folder={tmp_path / 'run' / 'cache'}")
    wanted = weights(run(tiny_config(*shared, f"run_folder={tmp_path / 'unbroken'}")))
    broken = tiny_config(*shared, f"run_folder={tmp_path / 'broken'}")
    with pytest.raises(Exception, match="stop here"):
        _train_until(broken, step=2)
    found = weights(run(broken, resume=True))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # both inside torch
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    "setting",
    [
        "train.gradient_checkpointing=true",
        pytest.param(
            "train.compile=true",
            marks=pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++"),
        ),
    ],
)
def test_recomputing_and_compiling_do_not_change_a_step(
    tiny_config: ConfigMaker, tmp_path: Path, setting: str
) -> None:
    shared = (*TINY, "train.save_dtype=float32", f"cache.folder={tmp_path / 'run' / 'cache'}")
    wanted = weights(run(tiny_config(*shared, f"run_folder={tmp_path / 'plain'}")))
    found = weights(run(tiny_config(*shared, f"run_folder={tmp_path / 'other'}", setting)))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5)


def test_best_weights_are_kept_though_later_ones_are_worse(tiny_config: ConfigMaker) -> None:
    # The learning rate rises until it does harm.
    config = tiny_config(
        "train.learning_rate=3e-3",
        "train.schedule=constant",
        "train.warmup_fraction=1",
        "train.epochs=6",
        "train.eval_every=2",
        "train.keep_checkpoints=1",
        "train.checkpoint_every=2",
        "train.keep_best=true",
        "train.save_dtype=float32",
    )
    final = run(config)
    evaluations = {
        line["step"]: line["eval/kl_nats"] for line in metrics(config) if "eval/kl_nats" in line
    }
    best = min(evaluations, key=lambda step: evaluations[step])
    provenance = read_provenance(final)
    assert provenance is not None
    assert provenance["step"] == best < max(evaluations)
    kept = sorted(path.name for path in (config.run_folder / "checkpoints").glob("step-*"))
    assert f"step-{best:06d}" in kept
    assert len(kept) == 2


def test_training_stops_when_evaluations_get_no_better(tiny_config: ConfigMaker) -> None:
    config = tiny_config(
        "train.learning_rate=1e-12",
        "train.epochs=20",
        "train.eval_every=1",
        "train.early_stop_evals=2",
    )
    final = run(config)
    provenance = read_provenance(final)
    assert provenance is not None
    assert provenance["step"] < 40
    assert len([line for line in metrics(config) if "eval/kl_nats" in line]) == provenance["step"]


def test_record_counts_evaluations_since_the_best() -> None:
    settings = TrainConfig(eval_every=1, early_stop_evals=2, keep_best=True)
    assert HeldOutRecord(settings).step_to_keep is None
    record, stops = HeldOutRecord(settings), []
    for step, kl in enumerate([3.0, 2.0, 2.5, math.nan], start=1):
        stops.append(record.should_stop)
        record.add(step, kl)
    assert [*stops, record.should_stop] == [False] * 4 + [True]
    assert record.step_to_keep == 2
    restored = HeldOutRecord(settings)
    restored.load_state_dict(record.state_dict())
    assert restored.should_stop
    assert restored.step_to_keep == 2


@pytest.mark.parametrize("setting", ["keep_best", "early_stop_evals"])
def test_best_weights_without_evaluations_are_refused(
    tiny_config: ConfigMaker, setting: str
) -> None:
    with pytest.raises(ConfigError, match="need eval_every"):
        tiny_config(f"train.{setting}=1")


def test_losses_are_drawn(tiny_config: ConfigMaker) -> None:
    config = tiny_config(*TINY, "train.eval_every=2")
    run(config)
    picture = (config.run_folder / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_metrics_and_the_settings(tiny_config: ConfigMaker) -> None:
    config = tiny_config(*TINY, "train.trackers=[tensorboard]")
    run(config)
    events = EventAccumulator(str(config.run_folder / "distill"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/kl_nats")}
    wanted = {m["step"]: m["train/kl_nats"] for m in metrics(config) if "train/kl_nats" in m}
    assert losses == pytest.approx(wanted)
    hparams = (config.run_folder / "distill").rglob("hparams.yml")
    assert "train.learning_rate: 0.001" in next(hparams).read_text()


@pytest.mark.slow
def test_wandb_gets_the_metrics_offline(tiny_yaml: Path, tmp_path: Path) -> None:
    # In a process of its own, with which the service that wandb starts comes to its end.
    process = start(
        ["train", str(tiny_yaml), *TINY, "train.trackers=[wandb]"],
        tmp_path / "log.txt",
        environment={"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )
    process.join()
    assert process.exitcode == 0, (tmp_path / "log.txt").read_text()
    logs = list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(logs) == 1
    deadline = time.monotonic() + 60  # its service writes after the run has ended
    while b"train/kl_nats" not in logs[0].read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"train/kl_nats" in logs[0].read_bytes()
    assert b"train.learning_rate" in logs[0].read_bytes()


def test_tracker_that_is_not_installed_is_refused(
    tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "find_spec", lambda name: None if name == "wandb" else sys)
    with pytest.raises(ConfigError, match=r"trackers: wandb not installed\. pip install wandb"):
        run(tiny_config("train.trackers=[tensorboard, wandb]"))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_schedules_end_at_the_least_learning_rate(schedule: str) -> None:
    config = TrainConfig(
        schedule=schedule,  # type: ignore[arg-type]
        warmup_fraction=0.1,
        learning_rate=1.0,
        min_learning_rate=0.25,
    )
    *rates, after = learning_rates(config)
    assert max(rates) == 1
    assert min(rates[2:]) >= 0.25
    assert after == pytest.approx(0.25)


def test_constant_schedule_warms_up() -> None:
    config = TrainConfig(schedule="constant", warmup_fraction=0.1, learning_rate=1.0)
    *rates, _ = learning_rates(config)
    assert rates == [0, 0.5, *[1.0] * 18]


def test_schedule_that_cannot_end_there_is_refused(tiny_config: ConfigMaker) -> None:
    with pytest.raises(ConfigError, match="never reaches min_learning_rate"):
        tiny_config("train.schedule=constant", "train.min_learning_rate=1e-6")
    with pytest.raises(ConfigError, match=r"min_learning_rate \(1\) is above"):
        tiny_config("train.min_learning_rate=1")
