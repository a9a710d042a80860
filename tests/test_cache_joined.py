import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.cache.joined import open_joined
from distill.cache.reader import SHUFFLE_SHARDS, open_cache
from distill.capture import capture
from distill.cli import main
from distill.config import ExperimentConfig
from distill.errors import MismatchError
from tests.conftest import ConfigMaker


@pytest.fixture
def grown(tiny_config: ConfigMaker, cache_copy: Path, tmp_path: Path) -> ExperimentConfig:
    """An experiment that goes on where the 24 blocks of `cache_copy` end, and reads them too."""
    config = tiny_config(
        f"run_folder={tmp_path / 'grown'}",
        "data.skip_train_blocks=24",
        "data.train_blocks=10",
        f"cache.also=[{cache_copy}]",
    )
    assert capture(config)
    return config


def test_skipped_blocks_are_those_of_the_earlier_cache(
    tiny_config: ConfigMaker, cache_copy: Path, grown: ExperimentConfig, tmp_path: Path
) -> None:
    whole = tiny_config(f"run_folder={tmp_path / 'whole'}", "data.train_blocks=34")
    assert capture(whole)
    wanted = open_cache(whole.cache_folder("train"))
    early, late = open_cache(f"{cache_copy}/train"), open_cache(grown.cache_folder("train"))
    assert (len(early), len(late)) == (24, 10)
    for block_id in range(34):
        cache, place = (early, block_id) if block_id < 24 else (late, block_id - 24)
        found, expected = cache.batch([place]), wanted.batch([block_id])
        assert torch.equal(found.input_ids_BT, expected.input_ids_BT)
        assert torch.equal(found.row_mask_BT, expected.row_mask_BT)
        assert torch.equal(found.targets.entropy_R, expected.targets.entropy_R)
    held_out = [open_cache(c.cache_folder("held_out")).manifest for c in (whole, grown)]
    assert held_out[0].data["blocks"] == held_out[1].data["blocks"]


def test_joined_caches_read_as_one(grown: ExperimentConfig, cache_copy: Path) -> None:
    urls = grown.training_folders()
    assert urls == [grown.cache_folder("train"), f"{cache_copy}/train"]
    joined, parts = open_joined(urls), [open_cache(url) for url in urls]
    assert len(joined) == 34
    assert joined.num_rows == sum(part.num_rows for part in parts)
    batch = joined.batch([9, 10, 33])
    for place, alone in enumerate([parts[0].batch([9]), parts[1].batch([0]), parts[1].batch([23])]):
        assert torch.equal(batch.input_ids_BT[place], alone.input_ids_BT[0])
        assert torch.equal(batch.row_mask_BT[place], alone.row_mask_BT[0])
    assert torch.equal(
        batch.targets.ids_N[: len(parts[0].batch([9]).targets.ids_N)],
        parts[0].batch([9]).targets.ids_N,
    )
    with pytest.raises(IndexError, match="34 blocks, there is no block 34"):
        joined.batch([34])


def test_epoch_of_joined_caches_reads_each_shard_once(
    grown: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = open_joined(grown.training_folders())
    order = joined.epoch_order(0, 1)
    assert sorted(order.tolist()) == list(range(34))
    assert np.array_equal(order, joined.epoch_order(0, 1))
    assert not np.array_equal(order, joined.epoch_order(0, 2))
    reads: list[str] = []

    def count(read: Callable[[str], bytes], name: str) -> bytes:
        reads.append(name)
        return read(name)

    for cache in joined.caches:
        monkeypatch.setattr(cache._folder, "read", partial(count, cache._folder.read))
    for block_id in order:
        joined.batch([int(block_id)])
        assert len(joined.caches[0].held) <= SHUFFLE_SHARDS
    assert len(reads) == 6 + 3


def test_student_learns_from_all_joined_caches(grown: ExperimentConfig, tiny_yaml: Path) -> None:
    settings = [
        f"run_folder={grown.run_folder}",
        "data.skip_train_blocks=24",
        "data.train_blocks=10",
        f"cache.also=[{grown.cache.also[0]}]",
    ]
    assert main(["train", str(tiny_yaml), *settings]) == 0
    steps = [
        json.loads(line)["step"]
        for line in (grown.run_folder / "metrics.jsonl").read_text().splitlines()
        if "train/kl_nats" in line
    ]
    assert steps == [1, 2, 3, 4, 5]  # 34 blocks at 6 a step
    assert main(["train", str(tiny_yaml), *settings]) == 0  # finished, skipped
    assert main(["train", str(tiny_yaml), *settings[:3]]) == 2  # without the other: another run


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("seed=1", "seed"),
        ("targets.tau=0.2", "targets.tau"),
        ("data.held_out_fraction=0.2", "data.held_out_fraction"),
        ("data.block_length=16", "block_length"),
        ("teacher.dtype=bfloat16", "teacher.dtype"),
    ],
)
def test_caches_of_two_identities_are_not_joined(
    tiny_config: ConfigMaker, cache_copy: Path, tmp_path: Path, override: str, field: str
) -> None:
    other = tiny_config(f"run_folder={tmp_path / 'other'}", "data.skip_train_blocks=24", override)
    assert capture(other)
    with pytest.raises(MismatchError, match=rf"(?s)not of one identity.*  {field}\n"):
        open_joined([f"{cache_copy}/train", other.cache_folder("train")])


@pytest.mark.parametrize("skip", [0, 23])
def test_blocks_are_not_seen_twice(
    tiny_config: ConfigMaker, cache_copy: Path, tmp_path: Path, skip: int
) -> None:
    other = tiny_config(f"run_folder={tmp_path / 'other'}", f"data.skip_train_blocks={skip}")
    assert capture(other)
    with pytest.raises(MismatchError, match=rf"(?s)same blocks.*blocks {skip} to {skip + 23} of"):
        open_joined([f"{cache_copy}/train", other.cache_folder("train")])
