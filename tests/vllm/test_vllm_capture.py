"""`distill cache` with vLLM as a user types it, each run in a process of its own."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.cache.reader import open_cache
from distill.cache.storage import Folder, read_manifest
from distill.cache.writer import ShardWriter
from distill.capture import capture
from distill.config import load
from distill.data import SPLITS
from tests.conftest import tiny_tree
from tests.vllm.conftest import DEMO, ROOT

PROGRAM = str(Path(sys.executable).with_name("distill"))
DATA = ["data.block_length=128", "data.train_blocks=6", "data.held_out_blocks=2"]
VLLM = [
    *("teacher.kind=vllm", "teacher.model=assets/teacher", "teacher.tokens_in_flight=128"),
    *("teacher.enforce_eager=true", "teacher.kv_cache_gib=0.5", "cache.blocks_per_shard=1"),
]


def distill(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [PROGRAM, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def entropies(run_folder: Path) -> torch.Tensor:
    cache = open_cache(str(run_folder / "cache" / "train"))
    columns = [cache.columns(shard) for shard in range(cache.manifest.num_shards)]
    return torch.cat([torch.tensor(column.entropy_R) for column in columns])


def kill_amid_capture(command: list[str], cache: Path, log: Path) -> None:
    """Kill a capture after its first shard; its engine has to end too."""
    with log.open("w") as file:
        running = subprocess.Popen(command, cwd=ROOT, stderr=file)
    while not list(cache.glob("*/shards/*.parquet")):
        assert running.poll() is None, log.read_text()
        time.sleep(0.05)
    family = psutil.Process(running.pid).children(recursive=True)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive


def test_killed_capture_goes_on_and_is_as_near_to_float32_as_the_resident_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for dtype in ("float32", "bfloat16"):
        settings = [f"run_folder={tmp_path / dtype}", f"teacher.dtype={dtype}"]
        assert capture(load(DEMO, [*DATA, *settings]))
    settings = [*DATA, *VLLM, f"run_folder={tmp_path / 'vllm'}"]
    cache = tmp_path / "vllm" / "cache"
    kill_amid_capture([PROGRAM, "cache", str(DEMO), *settings], cache, tmp_path / "log")
    assert not all((cache / split / "index.json").exists() for split in SPLITS)

    done = distill("cache", DEMO, *settings)
    assert done.returncode == 0, done.stderr
    assert "of 1,024 tokens (100%)" in done.stderr
    assert [distill("verify", cache / split).returncode for split in SPLITS] == [0, 0]
    again = distill("cache", DEMO, *settings)
    assert again.returncode == 0
    assert "vllm" not in again.stderr  # what is complete needs no engine

    exact, rounded, ours = (entropies(tmp_path / name) for name in ("float32", "bfloat16", "vllm"))
    assert len(exact) == len(ours) == 6 * 127
    deviation = (ours - exact).abs().mean()
    assert deviation < 0.05
    assert deviation < 1.3 * (rounded - exact).abs().mean()


@pytest.fixture
def teacher_of_32(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Like `tiny_teacher`, but vLLM's attention on the CPU wants heads of 32 numbers."""
    folder = tmp_path / "teacher"
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer) + 7,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def test_nan_is_named_with_its_block_and_row(
    tmp_path: Path, teacher_of_32: Path, corpus: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    poisoned = tiny_tokenizer.convert_tokens_to_ids("k")
    weights = load_file(teacher_of_32 / "model.safetensors")
    weights["model.embed_tokens.weight"][poisoned] = torch.nan
    save_file(weights, teacher_of_32 / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "tiny.yaml"
    tree = tiny_tree(tmp_path / "run", teacher_of_32, corpus)
    tree["teacher"] = {"kind": "vllm", "model": str(teacher_of_32), "dtype": "float32"}
    path.write_text(yaml.safe_dump(tree))

    done = distill("cache", path, "teacher.enforce_eager=true", "teacher.kv_cache_gib=0.1")
    assert done.returncode == 2, done.stderr
    named = re.search(r"gave NaN or infinite logits in block (\d+), row (\d+)\.", done.stderr)
    assert named, done.stderr
    assert "Traceback" not in done.stderr.partition("TeacherError")[2]
    folder = tmp_path / "run" / "cache" / "held_out"
    assert not list(folder.glob("shards/*.parquet"))
    number, row = int(named[1]), int(named[2])
    manifest = read_manifest(Folder(str(folder)))
    assert manifest is not None
    shard, place = divmod(number, manifest.blocks_per_shard)
    block = ShardWriter(Folder(str(folder)), manifest).read_blocks(shard)[place]
    starts = np.cumsum(block.segment_lengths) - block.segment_lengths
    # Masked attention still computes 0 * NaN: all rows of the segment are lost, but no others.
    first, end = starts[starts <= row].max(), [*starts[starts > row], len(block.input_ids_T)][0]
    assert poisoned in block.input_ids_T[first:end]
    assert block.row_mask()[row]
