"""Train a student against a cache: build, loop, save. Read from top to bottom.

Every loss is a sum over rows; a step divides once, by the number of rows that count over all
micro-batches and processes, so how a step is cut does not change it.
"""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase

from distill.cache.joined import open_joined
from distill.cache.reader import Batch, open_cache
from distill.checkpoint import Checkpoints
from distill.config import ExperimentConfig, TrainConfig, to_tree
from distill.distillation_model import trainable
from distill.errors import TrainingError
from distill.evaluate.fidelity import measure, score
from distill.export import gather_student, save_student
from distill.fingerprint import of_settings
from distill.fit import count_steps, not_finite, require_fit, training_identity
from distill.held_out import HeldOutRecord
from distill.launch import launch, layout, start_trackers
from distill.losses import LossWeights
from distill.metrics import MetricsLog
from distill.model_card import student_files
from distill.models import out_of_memory_as
from distill.progress import ProgressBar
from distill.schedules import kl_weight_at, learning_rate_schedule
from distill.steps import read_steps

_LESS_MEMORY = (
    "Lower train.micro_batch_blocks or train.head_chunk_tokens, or set "
    "train.gradient_checkpointing=true; none of them changes the result but for rounding."
)


def train(
    config: ExperimentConfig,
    student: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    resume: bool = False,
) -> Path:
    """Train `student` on the run's cache and save it as a plain transformers folder.

    Args:
        config: The experiment; `data`, `targets` and `seed` must be those of the cache.
        student: A causal language model of transformers; taken over, do not use it any more.
        tokenizer: Its tokenizer; must be the cache's.
        resume: Continue an interrupted training from its newest checkpoint.

    Returns:
        The folder of the finished student, RUN_FOLDER/student/final.

    Raises:
        CacheError: the cache is missing, incomplete or damaged.
        MismatchError: cache, config, tokenizer or student do not belong together.
        CheckpointError: an interrupted training is in the way and `resume` is false.
        StorageError: no space; older checkpoints stay.
        TrainingError: a loss or gradient is not finite, or the memory is used up.
        ConfigError: the licence of the teacher is not met, found before anything is trained.
    """
    settings = config.train
    accelerator = launch(config)
    cache = open_joined(config.training_folders())
    held_out = open_cache(config.cache_folder("held_out"))
    for each in (cache, held_out):
        require_fit(each, config, student, tokenizer)
    num_steps = count_steps(cache, settings, accelerator.num_processes)

    identity = training_identity(config, cache)
    checkpoints = Checkpoints(
        config.run_folder / "checkpoints",
        {**identity, "processes": layout(accelerator)},
        settings.keep_checkpoints,
    )
    if accelerator.is_main_process:
        checkpoints.begin(resume=resume)
    accelerator.wait_for_everyone()

    set_seed(config.training_seed)
    model = trainable(student, settings)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=True,
    )
    schedule = learning_rate_schedule(settings, optimizer, num_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    record = HeldOutRecord(settings)
    accelerator.register_for_checkpointing(schedule, record)
    step = first_step = checkpoints.load(accelerator)
    start_trackers(accelerator, config, of_settings(identity), first_step)
    metrics = MetricsLog(config.run_folder / "metrics.jsonl", first_step, accelerator)
    tokens_per_step = settings.blocks_per_step * cache.manifest.block_length
    model.train()
    bar = ProgressBar("train", num_steps * tokens_per_step, done=first_step * tokens_per_step)
    ahead = range(first_step, first_step if record.should_stop else num_steps)
    processes = (accelerator.process_index, accelerator.num_processes)
    with bar, out_of_memory_as(TrainingError, _LESS_MEMORY):
        for number, batches in read_steps(cache, config, *processes, ahead):
            started = time.monotonic()
            weights = _loss_weights(settings, number, num_steps)
            num_rows = accelerator.reduce(_count_rows(batches, accelerator.device), "sum")
            costs: list[torch.Tensor] = []
            for batch in batches:
                is_last = batch is batches[-1]
                with nullcontext() if is_last else accelerator.no_sync(model):
                    loss, rows = score(
                        model,
                        batch.to(accelerator.device),
                        cache.manifest.vocab_size,
                        weights,
                        settings.head_chunk_tokens,
                    )
                    # Processes average their gradients; times their number, that is a sum.
                    accelerator.backward(loss * (accelerator.num_processes / num_rows))
                costs.append(rows.sums())
            totals = accelerator.reduce(torch.stack(costs).sum(0), "sum")
            loss_nats, kl, ce, agreement = (totals / num_rows).tolist()
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            step = number + 1
            if not math.isfinite(loss_nats + float(grad_norm)):
                raise not_finite(step, loss_nats, float(grad_norm), batches, costs, checkpoints)
            optimizer.step()
            optimizer.zero_grad()
            learning_rate = schedule.get_last_lr()[0]
            schedule.step()

            metrics.write(
                step,
                {
                    "train/loss_nats": loss_nats,
                    "train/kl_weight": weights.kl,
                    "train/kl_nats": kl,
                    "train/ce_nats": ce,
                    "train/agreement": agreement,
                    "train/grad_norm": float(grad_norm),
                    "train/learning_rate": learning_rate,
                    "train/tokens_per_second": tokens_per_step / (time.monotonic() - started),
                },
            )
            bar.advance(tokens_per_step, f"step {step} of {num_steps}  KL {kl:.3f}  CE {ce:.3f}")
            if _is_due(settings.eval_every, step) or step == num_steps:
                fidelity = measure(
                    model, held_out, device=accelerator.device, accelerator=accelerator
                )
                metrics.write(
                    step,
                    {
                        "eval/kl_nats": fidelity.kl_nats.value,
                        "eval/ce_nats": fidelity.ce_nats.value,
                        "eval/agreement": fidelity.agreement.value,
                    },
                )
                record.add(step, fidelity.kl_nats.value)
            is_best = record.step_to_keep == step
            if (_is_due(settings.checkpoint_every, step) or is_best) and step < num_steps:
                checkpoints.save(accelerator, step, also_keep=record.step_to_keep)
            if record.should_stop:
                break

    if record.step_to_keep not in (None, step):
        step = record.step_to_keep
        accelerator.load_state(str(checkpoints.path(step)))
    final = config.run_folder / "student" / "final"
    whole = gather_student(accelerator, model, settings)
    if whole is not None:
        files: dict[str, bytes] = {}
        if settings.lora is not None:
            from distill.adapters import merge

            whole, files = merge(whole, final.with_name("initial"))
        whole = whole.to(getattr(torch, settings.save_dtype))
        files |= student_files(config, cache.manifest, whole, is_trained=True)
        provenance = {"training": identity, "step": step, "config": to_tree(config)}
        save_student(final, whole, tokenizer, provenance, files)
        metrics.plot(config.run_folder / "loss.png")
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.wait_for_everyone()
    return final


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices; none on norms and biases."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _loss_weights(settings: TrainConfig, step: int, num_steps: int) -> LossWeights:
    kl_weight = kl_weight_at(settings, step, num_steps)
    return LossWeights(
        kl_weight,
        settings.ce_weight + settings.kl_weight - kl_weight,
        settings.divergence,
        settings.divergence_mix,
        by_entropy=settings.row_weights == "entropy",
    )


def _count_rows(batches: list[Batch], device: torch.device) -> torch.Tensor:
    return torch.tensor(float(sum(len(batch.labels_R) for batch in batches)), device=device)


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
