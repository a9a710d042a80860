"""One forward pass of the teacher, kept in every form that an arm needs.

For each kind of `CAPTURES` an ordinary cache of the train blocks; for both splits the teacher's
last hidden states, of which its whole distributions are made again by one product with its head,
for dense KL and for the draws of other seeds (`redraw.py`).
What the teacher never reads, the rest of the train blocks, is there to pre-train students.

Shape suffixes: R rows that count, D hidden size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from distill.cache import format as fmt
from distill.cache.reader import Batch, Cache, open_cache
from distill.cache.storage import Folder, read_manifest, write_manifest
from distill.cache.writer import BlockSpool, ShardWriter
from distill.capture import require_same
from distill.config import ExperimentConfig, TargetsConfig, TopKConfig
from distill.data import Block, make_blocks
from distill.draw import draw
from distill.files import write_bytes_atomically
from distill.identity import cache_identity, make_manifest
from distill.models import load_causal_lm, load_tokenizer
from distill.progress import ProgressBar
from distill.targets import SparseTargets, concatenate
from distill.uniforms import row_uniforms
from scripts.sparse_kd.arms import CAPTURES

HELD_OUT = "threshold_12"
"""The kind in which the held-out blocks are kept; what is scored are the hidden states beside."""
HELD_OUT_BLOCKS = 48
_BLOCKS_AT_ONCE = 4


def kinds_of(split: str) -> dict[str, TargetsConfig]:
    """Return the kinds of which `split` has a cache."""
    return CAPTURES if split == "train" else {HELD_OUT: CAPTURES[HELD_OUT]}


def is_drawn(kind: str) -> bool:
    """Whether the targets of a kind depend on the seed."""
    return not isinstance(CAPTURES[kind], TopKConfig)


def folder_of(config: ExperimentConfig, kind: str, split: str, seed: int = 0) -> Path:
    """Return the folder of one cache; its draws are of the config's seed plus `seed`."""
    name = f"{kind}-draws-{seed}" if seed and is_drawn(kind) else kind
    return config.run_folder / "caches" / name / split


def prepare(config: ExperimentConfig) -> None:
    """Fill the store, as far as it is not; a kill costs at most one shard of every cache.

    Raises:
        MismatchError: it holds caches of other settings.
    """
    folders = [folder_of(config, kind, s) for s in ("train", "held_out") for kind in kinds_of(s)]
    if all((folder / fmt.INDEX).exists() for folder in folders):
        return
    tokenizer = load_tokenizer(config.teacher.model, "teacher.model")
    blocks = _pack(config, tokenizer)
    _keep_rest(config, blocks.pop("rest"))
    teacher = _load_teacher(config)
    with ProgressBar("teacher", sum(map(len, blocks.values())) * config.data.block_length) as bar:
        for split, of_split in blocks.items():
            writers = {
                kind: begin(config, folder_of(config, kind, split), split, kind, of_split)
                for kind in kinds_of(split)
            }
            size = config.cache.blocks_per_shard
            for shard in range(-(-len(of_split) // size)):
                some = of_split[shard * size : (shard + 1) * size]
                if any(shard in writer.pending() for writer in writers.values()):
                    hidden, targets_of = _score(
                        teacher, some, kinds_of(split), config.seed, len(tokenizer)
                    )
                    data = safetensors.torch.save({"hidden_RD": hidden})
                    write_bytes_atomically(_hidden_file(config, split, shard), data)
                    for kind, targets in targets_of.items():
                        writers[kind].write(shard, some, targets)
                bar.advance(len(some) * config.data.block_length)
            for writer in writers.values():
                writer.seal()


def _load_teacher(config: ExperimentConfig) -> Any:
    dtype = getattr(torch, config.teacher.dtype)
    return load_causal_lm(config.teacher.model, "teacher.model", dtype=dtype)


def _pack(config: ExperimentConfig, tokenizer: Any) -> dict[str, list[Block]]:
    """Blocks for the teacher, of both splits, and the rest of the train blocks.

    Held-out blocks are taken at even distances, so that many documents show.
    """
    num_train = config.data.train_blocks
    data = replace(config.data, train_blocks=None, held_out_blocks=None)
    blocks: dict[str, list[Block]] = {"held_out": [], "train": []}
    for split, block in make_blocks(data, tokenizer, config.seed):
        blocks[split].append(block)
    every = max(1, len(blocks["held_out"]) // HELD_OUT_BLOCKS)
    chosen = blocks["held_out"][::every][:HELD_OUT_BLOCKS]
    return {
        "held_out": [replace(block, block_id=n) for n, block in enumerate(chosen)],
        "train": blocks["train"][:num_train],
        "rest": blocks["train"][num_train:],
    }


def _rest_file(config: ExperimentConfig) -> Path:
    return config.run_folder / "rest.safetensors"


def _keep_rest(config: ExperimentConfig, blocks: list[Block]) -> None:
    columns = {
        "input_ids_BT": np.stack([block.input_ids_T for block in blocks]),
        "position_ids_BT": np.stack([block.position_ids() for block in blocks]).astype(np.int32),
        "row_mask_BT": np.stack([np.append(block.row_mask(), False) for block in blocks]),
    }
    write_bytes_atomically(_rest_file(config), safetensors.numpy.save(columns))


def begin(
    config: ExperimentConfig, path: Path, split: str, kind: str, blocks: list[Block]
) -> ShardWriter:
    """Write the manifest of a cache, or check the one that is there."""
    folder = Folder(str(path))
    spool = BlockSpool(folder, config.cache.blocks_per_shard)
    for block in blocks:
        spool.add(block)
    fields = cache_identity(replace(config, targets=CAPTURES[kind]))
    made = make_manifest(fields, split, spool.finish(), spool.num_blocks, spool.num_rows)
    found = read_manifest(folder)
    if found is None:
        write_manifest(folder, made)
    else:
        require_same(found, made, str(path))
    return ShardWriter(folder, found or made)


@torch.inference_mode()
def _score(
    teacher: Any,
    blocks: Sequence[Block],
    kinds: dict[str, TargetsConfig],
    seed: int,
    vocab_size: int,
) -> tuple[Tensor, dict[str, SparseTargets]]:
    """Hidden states of the rows that count, and the targets of all kinds."""
    hidden, targets = [], {kind: list[SparseTargets]() for kind in kinds}
    for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
        some = blocks[first : first + _BLOCKS_AT_ONCE]
        hidden_BTD = teacher.get_decoder()(
            input_ids=torch.stack([torch.from_numpy(b.input_ids_T).long() for b in some]),
            position_ids=torch.stack([torch.from_numpy(b.position_ids()) for b in some]),
            use_cache=False,
        ).last_hidden_state
        for block, hidden_TD in zip(some, hidden_BTD, strict=True):
            mask = torch.from_numpy(block.row_mask())
            hidden_RD = hidden_TD[:-1][mask]
            logits_RV = teacher.get_output_embeddings()(hidden_RD)[:, :vocab_size]
            hidden.append(hidden_RD)
            for kind, drawn in draw_kinds(logits_RV, block, kinds, seed).items():
                targets[kind].append(drawn)
    return torch.cat(hidden), {kind: concatenate(parts) for kind, parts in targets.items()}


def draw_kinds(
    logits_RV: Tensor, block: Block, kinds: dict[str, TargetsConfig], seed: int
) -> dict[str, SparseTargets]:
    """Targets of each kind for all rows of a block; the logits are of those that count."""
    mask = torch.from_numpy(block.row_mask())
    uniforms_R = row_uniforms(seed, block.block_id, len(mask))[mask]
    return {
        kind: draw(logits_RV, uniforms_R, config).scatter_rows(mask)
        for kind, config in kinds.items()
    }


def _hidden_file(config: ExperimentConfig, split: str, shard: int) -> Path:
    return config.run_folder / "hidden" / split / f"{shard:05d}.safetensors"


class Store:
    """What `prepare` kept, for one process; each part is opened when it is first needed."""

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(config.teacher.model, "teacher.model")

    @lru_cache  # noqa: B019  # one store a process, for as long as the process
    def train(self, kind: str = "top_k_5", seed: int = 0) -> Cache:
        """Return the train blocks with the targets of a kind; the draws are those of the seed."""
        return open_cache(str(folder_of(self.config, kind, "train", seed)))

    @cached_property
    def held_out(self) -> Cache:
        """The held-out blocks."""
        return open_cache(str(folder_of(self.config, HELD_OUT, "held_out")))

    def blocks_of(self, split: str) -> Cache:
        """Return a cache of the blocks of a split; all of one split hold the same ones."""
        return self.held_out if split == "held_out" else self.train()

    @cached_property
    def _head_VD(self) -> Tensor:
        weight_VD: Tensor = _load_teacher(self.config).get_output_embeddings().weight.detach()
        return weight_VD

    @property
    def vocab_size(self) -> int:
        """True number of tokens."""
        return self.held_out.manifest.vocab_size

    @cached_property
    def _rest(self) -> dict[str, Tensor]:
        return safetensors.torch.load_file(_rest_file(self.config))

    @property
    def num_rest_blocks(self) -> int:
        """Train blocks that the teacher did not read."""
        return len(self._rest["input_ids_BT"])

    def rest(self, block_ids: Sequence[int]) -> Batch:
        """Return some of these blocks; they have no targets."""
        chosen = torch.tensor(block_ids)
        input_ids_BT, position_ids_BT, mask_BT = (
            self._rest[name][chosen] for name in ("input_ids_BT", "position_ids_BT", "row_mask_BT")
        )
        labels_R = input_ids_BT[:, 1:][mask_BT[:, :-1]].long()
        return Batch(
            tuple(block_ids),
            input_ids_BT.long(),
            position_ids_BT.long(),
            mask_BT,
            labels_R,
            SparseTargets.empty(),
        )

    def hidden(self, split: str, block_ids: Sequence[int]) -> Tensor:
        """Return the teacher's last hidden states of the rows of some blocks, [R, D]."""
        cache = self.blocks_of(split)
        starts = self._row_starts(split)
        parts = []
        for block_id in block_ids:
            shard = block_id // cache.manifest.blocks_per_shard
            begin = starts[cache.manifest.shard_blocks(shard)[0]]
            rows = slice(starts[block_id] - begin, starts[block_id + 1] - begin)
            parts.append(self._hidden_shard(split, shard)[rows])
        return torch.cat(parts)

    def teacher_logits(self, hidden_RD: Tensor) -> Tensor:
        """Return the teacher's logits over the true vocabulary, float32 [R, V]."""
        return (hidden_RD @ self._head_VD.T)[:, : self.vocab_size].float()

    @lru_cache  # noqa: B019  # as above
    def _row_starts(self, split: str) -> list[int]:
        cache = self.blocks_of(split)
        counts = [int(cache.block(block_id)[0].row_mask().sum()) for block_id in range(len(cache))]
        return torch.tensor([0, *counts]).cumsum(0).tolist()

    @lru_cache  # noqa: B019  # as above; all shards of the experiment are some 300 MB
    def _hidden_shard(self, split: str, shard: int) -> Tensor:
        path = _hidden_file(self.config, split, shard)
        hidden_RD: Tensor = safetensors.torch.load_file(path)["hidden_RD"]
        return hidden_RD
