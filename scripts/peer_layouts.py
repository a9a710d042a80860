"""Other layouts of top-k rows on disk, for scripts/bench_peers.py.

Each writes ids and log-probabilities of R rows to a folder, and reads them back as tensors the way
its users do. Shape suffixes: R rows, K kept ids.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.data import Block

Arrays = tuple[NDArray[np.int32], NDArray[np.float32]]
Write = Callable[[Path, Arrays, list[Block]], None]
Read = Callable[[Path], tuple[Tensor, Tensor]]

ID_BITS = 17
"""Of 128,256 tokens."""

EXACT = 16
TERMS = 6
"""Of the polynomial layout: values that are stored, and coefficients of the others."""


def write_parquet(folder: Path, arrays: Arrays, blocks: list[Block]) -> None:
    """One Parquet row a block: int32 ids and fp16 log-probabilities, pyarrow's defaults."""
    ids_RK, logprobs_RK = arrays
    rows = len(ids_RK) // len(blocks)
    columns: dict[str, NDArray[Any]] = {
        "ids": ids_RK,
        "logprobs": logprobs_RK.astype(np.float16),
    }
    lists = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), rows * values.shape[1])
        for name, values in columns.items()
    }
    tokens = pa.array([block.input_ids_T.tolist() for block in blocks], pa.list_(pa.int32()))
    pq.write_table(pa.table({"input_ids": tokens, **lists}), folder / "data.parquet")


def read_parquet(folder: Path) -> tuple[Tensor, Tensor]:
    """Through Arrow's buffers, without lists."""
    table = pq.read_table(folder / "data.parquet")
    found = [table[name].combine_chunks().flatten().to_numpy() for name in ("ids", "logprobs")]
    return torch.from_numpy(found[0].copy()), torch.from_numpy(found[1].copy()).float()


def write_savez(folder: Path, arrays: Arrays, blocks: list[Block]) -> None:
    """One .npz: int32 ids and fp16 log-probabilities, not compressed."""
    tokens = np.stack([block.input_ids_T for block in blocks])
    np.savez(folder / "data.npz", input_ids=tokens, ids=arrays[0], logprobs=arrays[1].astype("f2"))


def read_savez(folder: Path) -> tuple[Tensor, Tensor]:
    """Whole arrays."""
    data = np.load(folder / "data.npz")
    return torch.from_numpy(data["ids"]), torch.from_numpy(data["logprobs"]).float()


def write_datasets(folder: Path, arrays: Arrays, blocks: list[Block]) -> None:
    """A Dataset of nested lists, one row a block, as from_dict makes it."""
    rows = len(arrays[0]) // len(blocks)
    cut = [slice(n * rows, (n + 1) * rows) for n in range(len(blocks))]
    columns = {
        "input_ids": [block.input_ids_T.tolist() for block in blocks],
        "ids": [arrays[0][rows].tolist() for rows in cut],
        "logprobs": [arrays[1][rows].astype(np.float16).tolist() for rows in cut],
    }
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "data"))


def read_datasets(folder: Path) -> tuple[Tensor, Tensor]:
    """Row by row into Python lists, then tensors."""
    data = datasets.load_from_disk(str(folder / "data"))
    pairs = [(torch.tensor(row["ids"]), torch.tensor(row["logprobs"])) for row in data]
    return torch.cat([ids for ids, _ in pairs]), torch.cat([values for _, values in pairs])


def write_polynomial(folder: Path, arrays: Arrays, blocks: list[Block]) -> None:
    """DistillKit's layout, stated anew from its published description; not its code.

    The largest `EXACT` values in bf16, a least-squares polynomial in the rank (terms 0 to 4 and a
    square root, fp32) for the others, ids packed at 17 bits; both as lists of bytes, one list a
    token, in Parquet with pyarrow's defaults. Fitted in float64, which its default is not.
    """
    ids_RK, logprobs_RK = arrays
    exact = torch.from_numpy(logprobs_RK[:, :EXACT]).bfloat16().view(torch.uint8).numpy()
    design_KC = _design(logprobs_RK.shape[1])
    rest_RK = logprobs_RK[:, EXACT:].astype(np.float64)
    terms_RC = np.linalg.lstsq(design_KC, rest_RK.T, rcond=None)[0].T.astype(np.float32)
    values = np.concatenate([exact, np.ascontiguousarray(terms_RC).view(np.uint8)], axis=1)
    bits = (ids_RK[:, :, None] >> np.arange(ID_BITS)) & 1
    packed = np.packbits(bits.astype(np.uint8).reshape(len(ids_RK), -1), axis=1)
    rows = len(ids_RK) // len(blocks)

    def nested(bytes_RB: NDArray[np.uint8]) -> pa.Array:
        lists = [part.tolist() for part in np.split(bytes_RB, len(bytes_RB) // rows)]
        return pa.array(lists, pa.list_(pa.list_(pa.uint8())))

    tokens = pa.array([block.input_ids_T.tolist() for block in blocks], pa.list_(pa.uint64()))
    table = {
        "input_ids": tokens,
        "compressed_logprobs": nested(values),
        "bytepacked_indices": nested(packed),
    }
    pq.write_table(pa.table(table), folder / "data.parquet")


def read_polynomial(folder: Path) -> tuple[Tensor, Tensor]:
    """Through Python lists, as its collator does."""
    rows = pq.read_table(folder / "data.parquet").to_pylist()
    values = torch.cat(
        [torch.tensor(row["compressed_logprobs"], dtype=torch.uint8) for row in rows]
    )
    packed = torch.cat([torch.tensor(row["bytepacked_indices"], dtype=torch.uint8) for row in rows])
    exact_RK = values[:, : 2 * EXACT].contiguous().view(torch.bfloat16).float()
    terms_RC = values[:, 2 * EXACT :].contiguous().view(torch.float32)
    bits = torch.from_numpy(np.unpackbits(packed.numpy(), axis=1))
    num_ids = bits.shape[1] // ID_BITS
    bits = bits[:, : num_ids * ID_BITS].view(len(bits), num_ids, ID_BITS).long()
    ids_RK = (bits << torch.arange(ID_BITS)).sum(-1)
    design_KC = torch.from_numpy(_design(num_ids)).float()
    return ids_RK, torch.cat([exact_RK, terms_RC @ design_KC.T], dim=1)


def _design(num_ids: int) -> NDArray[np.float64]:
    ranks = np.arange(1, num_ids - EXACT + 1, dtype=np.float64)
    return np.stack([*(ranks**power for power in range(TERMS - 1)), np.sqrt(ranks)], axis=1)


LAYOUTS: dict[str, tuple[int, Write, Read]] = {
    "parquet_fp16_64": (64, write_parquet, read_parquet),
    "savez_64": (64, write_savez, read_savez),
    "datasets_lists_64": (64, write_datasets, read_datasets),
    "polynomial_128": (128, write_polynomial, read_polynomial),
}
"""Name -> kept ids, how it is written, how it is read."""
