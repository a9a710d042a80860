"""The shipped configurations of `accelerate launch` say what docs/training.md says of them."""

from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

FOLDER = Path(__file__).parent.parent / "configs" / "accelerate"
PROCESSES = {"ddp-8-gpus": 8, "fsdp2-8-gpus": 8, "fsdp2-2-nodes": 16}


@pytest.mark.parametrize(("name", "processes"), PROCESSES.items())
def test_launcher_takes_the_config(name: str, processes: int) -> None:
    file = FOLDER / f"{name}.yaml"
    words = ["--config_file", str(file), "-m", "distill.cli", "train", "CONFIG"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    assert arguments.num_processes == processes
    assert arguments.mixed_precision == "bf16"
    assert arguments.use_fsdp == name.startswith("fsdp2")
    assert f"accelerate launch --config_file configs/accelerate/{name}.yaml" in file.read_text()


@pytest.mark.parametrize("name", [name for name in PROCESSES if name.startswith("fsdp2")])
def test_processes_shard_layer_by_layer_by_fsdp2(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), "-m", "distill.cli"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(words))[0]
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.auto_wrap_policy == transformer_auto_wrap_policy
    assert plugin.reshard_after_forward
    assert not plugin.activation_checkpointing
    assert str(plugin.state_dict_type).endswith("SHARDED_STATE_DICT")


def test_every_config_is_tested() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == PROCESSES.keys()
