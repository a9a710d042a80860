"""Training: the right step, however it is cut; refused where things do not fit; resumed exactly."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.cache.reader import open_cache
from distill.config import ExperimentConfig
from distill.errors import CacheError, CheckpointError, ConfigError, MismatchError
from distill.fit import is_finished
from distill.losses import LossWeights, distillation_loss
from distill.train import train
from students import build_student
from tests.conftest import make_tokenizer

ConfigMaker = Callable[..., ExperimentConfig]
TINY = ("train.learning_rate=1e-3", "train.checkpoint_every=1")

pytestmark = pytest.mark.usefixtures("cache_copy")


def run(config: ExperimentConfig, *, resume: bool = False) -> Path:
    student, tokenizer = build_student(config)
    return train(config, student, tokenizer, resume=resume)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def metrics(config: ExperimentConfig) -> list[dict[str, float]]:
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_first_step_equals_plain_autograd_on_dense_logits(tiny_config: ConfigMaker) -> None:
    config = tiny_config(*TINY, "train.warmup_fraction=0", "train.schedule=constant")
    student, _ = build_student(config)
    cache = open_cache(config.cache_folder("train"))
    batch = cache.batch([int(block) for block in cache.epoch_order(0, 0)[:6]])
    logits_BTV = student(
        input_ids=batch.input_ids_BT, position_ids=batch.position_ids_BT, use_cache=False
    ).logits
    logits_RV = logits_BTV[batch.row_mask_BT][:, : cache.manifest.vocab_size]
    loss = distillation_loss(logits_RV, batch.labels_R, batch.targets, LossWeights(0.9, 0.1))
    torch.autograd.backward(loss / len(batch.labels_R))
    norm = torch.nn.utils.get_total_norm([p.grad for p in student.parameters()])

    run(config)
    step = metrics(config)[0]
    both = 0.9 * step["train/kl_nats"] + 0.1 * step["train/ce_nats"]
    assert both == pytest.approx(loss.item() / len(batch.labels_R), rel=1e-5)
    assert step["train/grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_how_a_step_is_cut_does_not_change_it(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    results = []
    for size, chunk in ((1, 512), (3, 7), (6, 1)):
        config = tiny_config(
            *TINY,
            f"train.micro_batch_blocks={size}",
            f"train.head_chunk_tokens={chunk}",
            "train.save_dtype=float32",
            f"run_folder={tmp_path / f'cut-{size}'}",
            f"cache.folder={tmp_path / 'run' / 'cache'}",
        )
        results.append(weights(run(config)))
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=2e-5)


def test_student_comes_nearer_to_the_teacher(tiny_config: ConfigMaker) -> None:
    config = tiny_config(*TINY, "train.epochs=12", "train.eval_every=1", "train.learning_rate=3e-3")
    run(config)
    evaluations = [line["eval/kl_nats"] for line in metrics(config) if "eval/kl_nats" in line]
    assert evaluations[-1] < 0.7 * evaluations[0]


def test_finished_student_is_a_plain_transformers_folder(tiny_config: ConfigMaker) -> None:
    folder = run(tiny_config(*TINY))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert type(model.lm_head) is torch.nn.Linear
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, pad_token_id=257).shape == (1, ids.shape[1] + 3)
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_a_seed_of_the_training_orders_the_blocks_of_one_cache_anew(
    tiny_config: ConfigMaker, tmp_path: Path
) -> None:
    cache = f"cache.folder={tmp_path / 'run' / 'cache'}"
    losses = {}
    for seed in ("null", "0", "1"):
        config = tiny_config(
            *TINY, cache, f"train.seed={seed}", f"run_folder={tmp_path / f'seed-{seed}'}"
        )
        run(config)
        losses[seed] = [
            line["train/ce_nats"] for line in metrics(config) if "train/ce_nats" in line
        ]
    assert losses["null"] == losses["0"] != losses["1"]


def test_a_student_of_before_there_was_a_seed_of_the_training_still_holds(
    tiny_config: ConfigMaker,
) -> None:
    config = tiny_config(*TINY)
    folder = run(config)
    assert "seed" not in json.loads((folder / "distill.json").read_text())["training"]["train"]
    assert is_finished(config)
    with pytest.raises(MismatchError, match="seed"):
        is_finished(tiny_config(*TINY, "train.seed=1"))


def test_stopped_training_resumes_to_the_same_bits(
    tiny_config: ConfigMaker, tmp_path: Path
) -> None:
    shared = (*TINY, "train.epochs=2", f"cache.folder={tmp_path / 'run' / 'cache'}")
    unbroken = tiny_config(*shared, f"run_folder={tmp_path / 'unbroken'}")
    wanted = weights(run(unbroken))

    broken = tiny_config(*shared, f"run_folder={tmp_path / 'broken'}")
    with pytest.raises(CheckpointError, match="stop here"):
        _train_until(broken, step=3)
    with pytest.raises(CheckpointError, match=r"last checkpoint: step 3\).*\n  Continue.*--resume"):
        run(broken)
    found = weights(run(broken, resume=True))
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name

    def without_times(config: ExperimentConfig) -> list[dict[str, float]]:
        lines = metrics(config)
        return [{k: v for k, v in line.items() if "second" not in k} for line in lines]

    assert without_times(broken) == without_times(unbroken)


def _train_until(config: ExperimentConfig, step: int) -> None:
    """Train, and stop as a crash would, right after the checkpoint of `step`."""
    from distill.checkpoint import Checkpoints

    class Stopping(Checkpoints):
        def save(self, accelerator: object, step_now: int, also_keep: int | None = None) -> None:
            super().save(accelerator, step_now, also_keep)
            if step_now == step:
                raise CheckpointError("stop here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["distill.train"], "Checkpoints", Stopping)
        run(config)


def test_only_the_newest_checkpoints_are_kept(tiny_config: ConfigMaker) -> None:
    config = tiny_config(*TINY, "train.epochs=2", "train.keep_checkpoints=2")
    run(config)
    kept = sorted(path.name for path in (config.run_folder / "checkpoints").glob("step-*"))
    assert kept == ["step-000006", "step-000007"]


def test_resuming_with_other_settings_is_refused_with_both_sides(tiny_config: ConfigMaker) -> None:
    with pytest.raises(CheckpointError, match="stop here"):
        _train_until(tiny_config(*TINY), step=1)
    with pytest.raises(
        MismatchError, match=r"train\.learning_rate\n.*there.*0\.001\n.*config.*0\.5"
    ):
        run(tiny_config(*TINY, "train.learning_rate=0.5"), resume=True)


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("data.block_length=16", r"data\.block_length\n +cache +32\n +config +16"),
        ("targets.tau=0.2", r"targets\.tau\n +cache +0\.1\n +config +0\.2"),
        ("targets.temperature=2", r"targets\.temperature\n +cache +1\.0\n +config +2\.0"),
        ("seed=5", r"seed\n +cache +0\n +config +5"),
        ("data.held_out_fraction=0.2", r"data\.held_out_fraction\n +cache +0\.1\n +config +0\.2"),
    ],
)
def test_cache_of_other_settings_is_refused_with_both_sides(
    tiny_config: ConfigMaker, override: str, shown: str
) -> None:
    with pytest.raises(MismatchError, match=shown):
        run(tiny_config(override))


def test_student_with_another_tokenizer_is_refused_with_both_sides(
    tiny_config: ConfigMaker,
) -> None:
    config = tiny_config()
    student, _ = build_student(config)
    other = make_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(MismatchError, match=r"cache .*258 tokens\)\n  student .*259 tokens\)"):
        train(config, student, other)


def test_student_with_too_few_logits_is_refused_with_both_sides(tiny_config: ConfigMaker) -> None:
    config = tiny_config()
    student, tokenizer = build_student(config)
    student.resize_token_embeddings(100)
    with pytest.raises(MismatchError, match=r"258 tokens\n  student .*100 logits"):
        train(config, student, tokenizer)


def test_too_few_blocks_for_a_step_are_refused(tiny_config: ConfigMaker) -> None:
    with pytest.raises(
        ConfigError, match=r"blocks_per_step is 48, but 1 epochs of .* are 24 blocks"
    ):
        run(tiny_config("train.blocks_per_step=48"))


def test_missing_cache_says_how_to_make_one(tiny_config: ConfigMaker, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"holds no cache.*\n.*distill cache CONFIG"):
        run(tiny_config(f"cache.folder={tmp_path / 'nothing'}"))


def test_processes_that_would_each_train_alone_are_refused(
    tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"started 2 processes, but Accelerate sees 1"):
        run(tiny_config())
