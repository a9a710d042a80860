"""The recipes of docs/interop.md, as they stand there: other loops take the steps of our own."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from distill.cache.reader import Cache, open_cache
from distill.config import ExperimentConfig
from distill.losses import LossWeights
from distill.train import train
from students import build_student
from tests.conftest import make_tokenizer
from tests.documents import ROOT, code_block, run_blocks
from tests.tiny_models import SCRATCH

ConfigMaker = Callable[..., ExperimentConfig]
Gradients = list[list[torch.Tensor]]

PAGE = "interop.md"
WEIGHTS = LossWeights(kl=0.9, ce=0.1)
SAME_STEPS = (
    *("train.learning_rate=3e-4", "train.blocks_per_step=4", "train.micro_batch_blocks=2"),
    *("train.warmup_fraction=0", "train.epochs=3"),
)
"""What the recipes do, for our own loop; the schedule of the learning rate aside."""


@pytest.fixture
def config(
    cache_copy: Path,  # noqa: ARG001
    tiny_config: ConfigMaker,
    request: pytest.FixtureRequest,
) -> ExperimentConfig:
    """The tiny experiment with the settings of the recipes; `schedule` is a parameter."""
    return tiny_config(*SAME_STEPS, f"train.schedule={getattr(request, 'param', 'constant')}")


@pytest.fixture
def demo(config: ExperimentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's run folder in the working directory, with the tiny experiment in its place."""
    run = tmp_path / "runs" / "smollm2-demo"
    shutil.copytree(config.run_folder / "cache", run / "cache")
    for part in build_student(config):
        part.save_pretrained(run / "student" / "initial")
    monkeypatch.chdir(tmp_path)
    return run


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> Gradients:
    """Gradients of each step, before they are clipped."""
    steps: Gradients = []
    clip = torch.nn.utils.clip_grad_norm_

    def note(parameters: Iterable[torch.Tensor], *arguments: Any, **options: Any) -> torch.Tensor:
        parameters = list(parameters)
        steps.append([p.grad.clone() for p in parameters if p.grad is not None])
        return clip(parameters, *arguments, **options)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", note)
    return steps


def open_demo(demo: Path) -> tuple[Any, Cache]:
    student = AutoModelForCausalLM.from_pretrained(demo / "student" / "initial")
    return student, open_cache(str(demo / "cache" / "train"))


def require_our_steps(losses: list[float], steps: Gradients, config: ExperimentConfig) -> None:
    """The first gradient is that of `distill.train`, and so is the loss of each step."""
    num_steps = len(steps)
    student, tokenizer = build_student(config)
    train(config, student, tokenizer)
    assert len(steps[0]) == len(list(student.parameters()))
    for found, wanted in zip(steps[0], steps[num_steps], strict=True):
        assert wanted.abs().max() > 1e-4
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    lines = map(json.loads, (config.run_folder / "metrics.jsonl").read_text().splitlines())
    ours = [line["train/loss_nats"] for line in lines if "train/loss_nats" in line]
    assert len(ours) == num_steps == 18
    assert losses == pytest.approx(ours, abs=2e-4)  # printed to four places


def mean_of(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def require_fall(losses: list[float]) -> None:
    assert mean_of(losses[-6:]) < mean_of(losses[:6]) - 0.01


def test_plain_loop_takes_our_steps(
    demo: Path,
    config: ExperimentConfig,
    gradients: Gradients,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run_blocks(PAGE, "fit", "plain-loop")
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss (\S+) nats", printed)]
    require_fall(losses)
    require_our_steps(losses, gradients, config)

    saved = AutoModelForCausalLM.from_pretrained("runs/plain-loop/student")
    for ours, theirs in zip(saved.parameters(), found["student"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    last = float(re.findall(r"held out: Estimate\(value=(\S+),", printed)[0])
    untrained = found["DistillationModel"](open_demo(demo)[0])
    first = found["measure"](untrained, found["held_out"], device=torch.device("cpu"))
    assert last < first.kl_nats.value


def test_plain_loop_has_at_most_40_lines() -> None:
    assert len([line for line in code_block(PAGE, "plain-loop").splitlines() if line]) <= 40


@pytest.mark.usefixtures("demo")
def test_another_tokenizer_is_refused_by_the_recipe() -> None:
    other = make_tokenizer()
    other.add_tokens(["<new>"])
    other.save_pretrained("runs/smollm2-demo/student/initial")
    with pytest.raises(SystemExit, match="made with another tokenizer"):
        run_blocks(PAGE, "fit")


@pytest.mark.parametrize("config", ["cosine"], indirect=True)
@pytest.mark.usefixtures("demo")
def test_trainer_takes_our_steps(config: ExperimentConfig, gradients: Gradients) -> None:
    trainer = run_blocks(PAGE, "trainer", "trainer-use")["trainer"]
    log = [line for line in trainer.state.log_history if "loss" in line]
    losses = [line["loss"] for line in log]
    require_fall(losses)
    require_our_steps(losses, gradients, config)

    saved = AutoModelForCausalLM.from_pretrained("runs/trainer/student")
    assert type(saved.lm_head) is torch.nn.Linear
    for ours, theirs in zip(saved.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    tokenizer = AutoTokenizer.from_pretrained("runs/trainer/student")
    prompt = tokenizer("the cat", return_tensors="pt")["input_ids"]
    del trainer.model.forward
    assert trainer.model.generate(prompt, max_new_tokens=3, pad_token_id=257).shape[0] == 1


def arguments(**changes: Any) -> TrainingArguments:
    settings = {"output_dir": "runs/x", "logging_steps": 1, "report_to": "none", "use_cpu": True}
    return TrainingArguments(**(settings | {"disable_tqdm": True} | changes))


def losses_of(trainer: Any) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_reported_loss_is_the_mean_over_rows_however_a_step_is_cut(demo: Path) -> None:
    recipe = run_blocks(PAGE, "trainer", "dense-loss")
    student, cache = open_demo(demo)
    rows, sums = [], []
    for block in cache.epoch_order(0, 0)[:4]:
        batch = cache.batch([int(block)])
        rows.append(len(batch.labels_R))
        with torch.no_grad():
            loss = recipe["dense_loss"](student, batch, WEIGHTS, cache.manifest.vocab_size)
        sums.append(loss.item())
    mean = sum(sums) / sum(rows)
    mean_of_means = mean_of([total / number for total, number in zip(sums, rows, strict=True)])
    assert abs(mean - mean_of_means) > 1e-4 * mean  # or the test would not tell them apart

    runs = []
    for size, accumulated in ((1, 4), (2, 2), (4, 1)):
        student, cache = open_demo(demo)
        args = arguments(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            max_steps=8,
            seed=0,
        )
        trainer = recipe["DistillationTrainer"](student, args, cache, WEIGHTS)
        runs.append(losses_of(trainer))
        assert runs[-1][0] == pytest.approx(mean, rel=1e-5)
    assert len(runs[0]) == 8
    for other in runs[1:]:
        assert other == pytest.approx(runs[0], rel=1e-4)


def test_trainer_resumes_in_the_second_epoch_to_the_same_bits(
    demo: Path, tiny_config: ConfigMaker
) -> None:
    trainer_of = run_blocks(PAGE, "trainer")["DistillationTrainer"]
    _, cache = open_demo(demo)

    def tied_trainer(**changes: Any) -> Any:
        student, _ = build_student(tiny_config(*SCRATCH))
        args = arguments(per_device_train_batch_size=4, max_steps=10, save_steps=8, **changes)
        return trainer_of(student.float(), args, cache, WEIGHTS)

    unbroken = tied_trainer()
    unbroken.train()
    resumed = tied_trainer(dataloader_num_workers=1)
    resumed.train(resume_from_checkpoint="runs/x/checkpoint-8")
    assert resumed.model.lm_head.weight is resumed.model.model.embed_tokens.weight
    wanted, found = unbroken.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    half = load_file("runs/x/checkpoint-8/model.safetensors")
    assert not torch.equal(half["model.norm.weight"], wanted["model.norm.weight"])


def test_trainer_in_bfloat16_with_recomputed_layers_is_near_float32(demo: Path) -> None:
    trainer_of = run_blocks(PAGE, "trainer")["DistillationTrainer"]
    losses = []
    for is_small in (False, True):
        student, cache = open_demo(demo)
        if is_small:
            student.activation_checkpointing_enable()
        args = arguments(per_device_train_batch_size=4, max_steps=3, bf16=is_small)
        losses.append(losses_of(trainer_of(student, args, cache, WEIGHTS)))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_trainer_counts_over_all_processes_or_refuses(demo: Path) -> None:
    trainer_of = run_blocks(PAGE, "trainer")["DistillationTrainer"]
    student, cache = open_demo(demo)
    with pytest.raises(ValueError, match="rows are counted over all of them"):
        trainer_of(student, arguments(average_tokens_across_devices=False), cache, WEIGHTS)


DRIVER = """
import json, sys
from transformers import AutoModelForCausalLM, TrainingArguments
from distill import LossWeights, open_cache

args = TrainingArguments(
    output_dir="runs/x", use_cpu=True, per_device_train_batch_size=2, max_steps=8,
    gradient_accumulation_steps=int(sys.argv[1]), logging_steps=1, report_to="none",
)
student = AutoModelForCausalLM.from_pretrained("runs/smollm2-demo/student/initial")
cache = open_cache("runs/smollm2-demo/cache/train")
trainer = DistillationTrainer(student, args, cache, LossWeights(kl=0.9, ce=0.1))
trainer.train()
if args.process_index == 0:
    default = CacheDataset(cache)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    found = {name: [line[name] for line in lines] for name in ("loss", "grad_norm")}
    print("found", json.dumps({**found, "ranks": default.num_ranks}))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("demo")
def test_two_processes_of_the_trainer_take_the_steps_of_one(tmp_path: Path) -> None:
    script = tmp_path / "recipe.py"
    script.write_text(code_block(PAGE, "trainer") + DRIVER)
    found = []
    for num_processes in (1, 2):
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, str(script), str(2 // num_processes)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        (line,) = re.findall(r"^found (.*)$", done.stdout, re.MULTILINE)
        found.append(json.loads(line))
    assert [each["ranks"] for each in found] == [1, 2]
    assert len(found[0]["loss"]) == 8
    for name in ("loss", "grad_norm"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4)
