import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from distill.cache.reader import open_cache
from distill.capture import capture, prepare
from distill.data import SPLITS, Block
from distill.draw import draw
from distill.errors import MismatchError, StorageError, TeacherError
from distill.teacher import open_teacher
from distill.uniforms import row_uniforms
from tests.conftest import ConfigMaker, poison
from tests.processes import cached, start


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where `tiny_config` keeps its caches."""
    return tmp_path / "run" / "cache"


def test_second_capture_writes_nothing_and_asks_the_teacher_nothing(
    tiny_config: ConfigMaker, own_teacher: Path, root: Path
) -> None:
    config = tiny_config(f"teacher.model={own_teacher}")
    assert capture(config)
    before, times = cached(root), {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    poison(own_teacher)
    assert capture(config)
    assert cached(root) == before
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == times
    shutil.rmtree(root)
    with pytest.raises(TeacherError, match="NaN"):  # had it been asked, it would have said so
        capture(config)


@pytest.mark.parametrize("workers", [[0], [2, 0, 1]], ids=["alone", "three"])
def test_capture_again_gives_equal_bytes_with_any_workers(
    tiny_config: ConfigMaker, written_cache: Path, root: Path, workers: list[int]
) -> None:
    num_workers = len(workers)
    completed = [capture(tiny_config(), worker=w, num_workers=num_workers) for w in workers]
    assert completed == [False] * (num_workers - 1) + [True]
    assert cached(root) == cached(written_cache)


def test_interrupted_capture_ends_with_the_bytes_of_an_unbroken_one(
    tiny_config: ConfigMaker, written_cache: Path, root: Path
) -> None:
    config = tiny_config()
    assert not any(capture(config, worker=worker, num_workers=3) for worker in (0, 1))
    shards = root / "train" / "shards"
    for name in ("00000.json", "00000.parquet", "00001.json"):  # published, but not recorded
        (shards / name).unlink()
    (shards / ".00004.parquet.1.tmp").write_bytes(b"half a shard")
    assert capture(config)
    assert cached(root) == cached(written_cache)
    assert not list(shards.glob(".*"))  # what a killed writer left is gone


def test_capture_that_died_while_packing_begins_anew(
    tiny_config: ConfigMaker, written_cache: Path, root: Path
) -> None:
    config = tiny_config()
    prepare(config)
    for split in SPLITS:
        (root / split / "manifest.json").unlink()
    (root / "train" / "blocks" / "00001.parquet").write_bytes(b"of another attempt")
    (root / "train" / "blocks" / "00099.parquet").write_bytes(b"of a longer attempt")
    assert capture(config)
    assert cached(root) == cached(written_cache)


def test_killed_capture_ends_with_the_bytes_of_an_unbroken_one(
    tiny_config: ConfigMaker, tiny_yaml: Path, root: Path, tmp_path: Path
) -> None:
    random_moments = random.Random(0)
    small = ["cache.blocks_per_shard=1", "teacher.head_chunk_tokens=1"]
    assert capture(tiny_config(*small, f"run_folder={tmp_path / 'unbroken'}"))
    # Of 30 packed shards, 2 manifests, 30 shards and their records: kill when so many are there.
    for num_files in sorted(random_moments.sample(range(1, 70), 5)):
        process = start(["cache", str(tiny_yaml), *small], tmp_path / "log")
        while process.is_alive() and sum(1 for _ in root.rglob("*.*")) < num_files:
            time.sleep(0.0005)
        time.sleep(random_moments.uniform(0, 0.005))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (root / "train" / "index.json").exists()
    assert capture(tiny_config(*small))
    assert cached(root) == cached(tmp_path / "unbroken" / "cache")


@pytest.mark.parametrize(
    ("override", "field", "ours", "theirs"),
    [
        ("seed=1", "seed", "0", "1"),
        ("targets.tau=0.2", r"targets\.tau", "0.1", "0.2"),
        ("targets.bits=16", r"targets\.bits", "8", "16"),
        ("teacher.licence=mit", r"teacher\.licence", "None", "mit"),
    ],
)
@pytest.mark.usefixtures("cache_copy")
def test_cache_of_other_settings_is_refused_with_both_sides(
    tiny_config: ConfigMaker, tmp_path: Path, override: str, field: str, ours: str, theirs: str
) -> None:
    before = cached(tmp_path)
    sides = rf"\n  {field}\n    cache   {re.escape(ours)}\n    config  {re.escape(theirs)}\n"
    with pytest.raises(MismatchError, match=sides):
        capture(tiny_config(override))
    assert cached(tmp_path) == before


def test_changed_text_is_refused(tiny_config: ConfigMaker, corpus: Path, tmp_path: Path) -> None:
    documents = Path(shutil.copy(corpus, tmp_path / "documents.jsonl"))
    config = tiny_config(f"data.sources=[{{path: json, data_files: ['{documents}']}}]")
    assert capture(config)
    with documents.open("a") as file:
        file.write('{"text": "One more."}\n')
    sides = rf"data\.files\.{documents}\n    cache   \w{{64}}\n    config  \w{{64}}\n"
    with pytest.raises(MismatchError, match=sides):
        capture(config)


def test_changed_teacher_is_refused(tiny_config: ConfigMaker, own_teacher: Path) -> None:
    config = tiny_config(f"teacher.model={own_teacher}")
    assert capture(config)
    poison(own_teacher, row=0)  # fingerprints cover both ends of each tensor
    with pytest.raises(MismatchError, match=r"teacher\.weights\n    cache   \w+\n    config  \w+"):
        capture(config)


def test_cache_whose_sibling_is_gone_is_not_overwritten(
    tiny_config: ConfigMaker, cache_copy: Path
) -> None:
    shutil.rmtree(cache_copy / "held_out")
    before = cached(cache_copy / "train")
    with pytest.raises(MismatchError, match="seed"):
        capture(tiny_config("seed=1"))
    assert cached(cache_copy / "train") == before


@torch.inference_mode()
def test_rows_hold_what_the_model_says_of_the_next_token_of_each_document(
    tiny_config: ConfigMaker, tiny_teacher: Path, written_cache: Path
) -> None:
    config, rows = tiny_config(), 0
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype="float32")
    for split in SPLITS:
        cache = open_cache(str(written_cache / split))
        for block_id in range(len(cache)):
            batch = cache.batch([block_id])
            mask = batch.row_mask_BT[0]
            starts = torch.where(batch.position_ids_BT[0] == 0)[0].tolist()
            # Each document alone: nothing of its neighbours in the block can reach it.
            documents = [
                model(batch.input_ids_BT[:, first:last]).logits[0]
                for first, last in zip(starts, [*starts[1:], None], strict=True)
            ]
            logits_RV = torch.cat(documents)[mask][:, : cache.manifest.vocab_size]
            uniforms_R = row_uniforms(config.seed, block_id, len(mask) - 1)[mask[:-1]]
            expected = draw(logits_RV.clone(), uniforms_R, config.targets)
            for name in ("counts_R", "num_head_R", "ids_N"):
                assert torch.equal(getattr(batch.targets, name), getattr(expected, name))
            assert_close(batch.targets.weights_N, expected.weights_N, rtol=0.02, atol=0)
            assert_close(batch.targets.entropy_R, expected.entropy_R, rtol=2**-8, atol=0)
            rows += expected.num_rows
    assert rows > 800


def test_rows_that_do_not_count_are_empty(written_cache: Path) -> None:
    columns = open_cache(str(written_cache / "train")).columns(0)
    counted_R = np.concatenate([block.row_mask() for block in columns.blocks])
    assert 0 < counted_R.sum() < len(counted_R)
    assert columns.counts_R[counted_R].all()
    for values_R in (columns.counts_R, columns.num_head_R, columns.tail_mass_R, columns.entropy_R):
        assert not values_R[~counted_R].any()


def test_teacher_that_gives_nan_is_named_with_block_and_row(
    tiny_config: ConfigMaker, own_teacher: Path, root: Path
) -> None:
    config = tiny_config(f"teacher.model={own_teacher}")
    healthy = (own_teacher / "model.safetensors").read_bytes()
    poison(own_teacher)
    message = rf"{own_teacher} gave NaN or infinite logits in block 0, row 0\.\n.*float32"
    with pytest.raises(TeacherError, match=message):
        capture(config)
    assert not [name for name in cached(root) if "shards" in name]
    (own_teacher / "model.safetensors").write_bytes(healthy)
    assert capture(config)


def test_nan_is_found_in_the_row_that_counts(tiny_config: ConfigMaker, own_teacher: Path) -> None:
    def block(number: int, first_id: int, first_label: int) -> Block:
        tokens, counts = np.arange(first_id, first_id + 16), np.arange(16) >= first_label
        return Block(number, tokens.astype(np.int32), np.array([16], np.int32), counts)

    poison(own_teacher, row=200, tensor="model.embed_tokens")
    config = tiny_config(f"teacher.model={own_teacher}", "teacher.head_chunk_tokens=2")
    blocks = [block(6, 0, 16), block(7, 0, 1), block(8, 200, 5)]
    with pytest.raises(TeacherError, match="block 8, row 4"):
        list(open_teacher(config, 258).score([blocks]))


def test_full_disk_stops_the_command_and_later_it_goes_on(
    tiny_config: ConfigMaker, tiny_yaml: Path, written_cache: Path, root: Path, tmp_path: Path
) -> None:
    prepare(tiny_config())
    num_bytes = (written_cache / "held_out/shards/00000.parquet").stat().st_size
    process = start(["cache", str(tiny_yaml)], log := tmp_path / "log", num_bytes - 1)
    process.join()
    assert process.exitcode == 2
    target = f"{root}/held_out/shards/00000.parquet"
    assert f"StorageError: cannot write {target}: the file would exceed" in log.read_text()
    assert "run the same command again" in log.read_text()
    assert not list(root.rglob("*.tmp"))
    assert capture(tiny_config())
    assert cached(root) == cached(written_cache)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    (disk := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_disk_without_space_stops_capture_and_later_it_goes_on(
    tiny_config: ConfigMaker, small_disk: Path, written_cache: Path
) -> None:
    config = tiny_config(f"cache.folder={small_disk}/cache")
    prepare(config)
    # Room for a few shards of eight.
    (filler := small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 40960))
    with pytest.raises(StorageError, match=r"shards/\d{5}\.\w+: no space is left on the device"):
        capture(config)
    assert 0 < len(list((small_disk / "cache").rglob("shards/*.json"))) < 8
    assert not list(small_disk.rglob("*.tmp"))
    filler.unlink()
    assert capture(config)
    assert cached(small_disk / "cache") == cached(written_cache)
