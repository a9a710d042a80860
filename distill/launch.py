"""The Accelerator of a training as it was launched; refused where it would train wrongly."""

import os
from importlib.util import find_spec

from accelerate import Accelerator
from accelerate.utils import DistributedType

from distill.config import ExperimentConfig, to_tree
from distill.errors import ConfigError, flatten


def launch(config: ExperimentConfig) -> Accelerator:
    """Return the Accelerator for `accelerate launch`, torchrun, or a single process.

    Raises:
        ConfigError: each process would train alone; the launcher chose a strategy that the loop
            does not go with; or a tracker is not installed.
    """
    missing = [name for name in config.train.trackers if find_spec(name) is None]
    if missing:  # Accelerate would leave them out and go on
        raise ConfigError(
            f"train.trackers: {', '.join(missing)} not installed. pip install {' '.join(missing)}"
        )
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="bf16" if config.train.precision == "bfloat16" else "no",
        log_with=list(config.train.trackers) or None,
        project_dir=str(config.run_folder),
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"the launcher started {launched} processes, but Accelerate sees "
            f"{accelerator.num_processes}: each would train alone.\n"
            "  On a CPU set `device: cpu` and use torchrun; on GPUs use accelerate launch."
        )
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ConfigError(
            f"the launcher chose {kind.value}, which steps at every micro-batch by itself: a step "
            "of train.blocks_per_step blocks would become several.\n"
            "  Use FSDP2, which shards weights, gradients and optimiser state as ZeRO-3 does: "
            "configs/accelerate/fsdp2-8-gpus.yaml"
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError(
            "the launcher chose the first FSDP, which the loss does not go with.\n"
            "  Set fsdp_version: 2, as configs/accelerate/fsdp2-8-gpus.yaml does."
        )
    return accelerator


def layout(accelerator: Accelerator) -> int | str:
    """What a checkpoint can be resumed by: as many processes, or any number where it is sharded."""
    return "sharded" if accelerator.is_fsdp2 else int(accelerator.num_processes)


def start_trackers(
    accelerator: Accelerator, config: ExperimentConfig, identity: str, first_step: int
) -> None:
    """Begin or continue what `train.trackers` names.

    Args:
        accelerator: From `launch`.
        config: Its settings are shown by the trackers.
        identity: Hash of the training: equal ones are one run.
        first_step: Where this process goes on; later lines of an interrupted one do not count.
    """
    if not config.train.trackers:
        return
    accelerator.init_trackers(
        "distill",
        config={name: _plain(value) for name, value in flatten(to_tree(config))},
        init_kwargs={
            "tensorboard": {"purge_step": first_step + 1},
            "wandb": {
                "dir": str(config.run_folder),
                "id": identity[:16],
                "name": config.run_folder.name,
                "resume": "allow",
            },
        },
    )


def _plain(value: object) -> object:
    """A value as trackers take it."""
    return value if isinstance(value, bool | int | float | str) else str(value)
