"""Read the tensors of a safetensors checkpoint one module at a time.

For a GPU into page-locked memory of our own. For the CPU they are mapped: what is in the page cache
is used where it is, and the pages are asked for before the tensors are.
"""

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.errors import ConfigError, TeacherError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of the names that the safetensors format gives them."""

_READERS = 4
"""Threads that read at a time: a single one does not use all of a fast disk."""

_POPULATE_READ = 22
"""Of Linux's madvise: read all pages, and enter them into the page table."""

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class _Place:
    path: Path
    start: int
    num_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder by name; only headers are read until `read` is called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, _Place] = {}
        files = _files(folder)
        if not files:
            raise ConfigError(
                f"teacher.model: {folder} holds no *.safetensors file, from which layers are "
                "streamed.\n  Save the model as safetensors, or use teacher.kind=resident."
            )
        for path in files:
            self._places |= _read_header(path)

    @classmethod
    def of(cls, folder: Path) -> "Checkpoint | None":
        """Open the checkpoint in a folder; None if it is of another format."""
        return cls(folder) if _files(folder) else None

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def names(self) -> Sequence[str]:
        """Names of all tensors."""
        return tuple(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one tensor as it is stored."""
        return self._places[name].dtype

    def num_bytes(self, names: Sequence[str]) -> int:
        """Bytes of some tensors as they are stored."""
        return sum(self._places[name].num_bytes for name in names)

    def read(
        self, names: Sequence[str], dtypes: Mapping[str, torch.dtype], *, pin: bool = False
    ) -> dict[str, Tensor]:
        """Return tensors on the host, all of their bytes there. Do not write into them.

        Args:
            names: Which.
            dtypes: Wanted dtypes by name; those left out stay as stored.
            pin: In page-locked memory, from which a GPU copies while it computes.

        Raises:
            TeacherError: a file ends too early.
        """

        def read(name: str) -> Tensor:
            place = self._places[name]
            tensor = _read_pinned(place) if pin else _map(place)
            wanted = dtypes.get(name, tensor.dtype)
            if tensor.dtype == wanted:
                return tensor
            converted = tensor.to(wanted)
            return converted.pin_memory() if pin else converted

        with ThreadPoolExecutor(_READERS) as pool:
            return dict(zip(names, pool.map(read, names), strict=True))


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise ConfigError(
                f"teacher.model: {folder} lacks {len(missing)} of {len(names)} weight files, first "
                f"{missing[0]}.\n  Download the checkpoint again."
            )
        return [folder / name for name in names]
    return sorted(folder.glob("*.safetensors"))


def _read_header(path: Path) -> dict[str, _Place]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    places = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        if entry["dtype"] not in _DTYPES:
            raise TeacherError(
                f"{path}: tensor {name} has dtype {entry['dtype']}, which cannot be streamed.\n"
                "  Use teacher.kind=resident, or convert the checkpoint."
            )
        dtype = _DTYPES[entry["dtype"]]
        places[name] = _Place(path, 8 + size + first, last - first, dtype, tuple(entry["shape"]))
    return places


def _map(place: _Place) -> Tensor:
    """Map a tensor, and wait until its bytes are in memory."""
    if not place.num_bytes:
        return torch.empty(place.shape, dtype=place.dtype)
    start = place.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    length = place.start - start + place.num_bytes
    with place.path.open("rb") as file:
        missing = place.start + place.num_bytes - os.fstat(file.fileno()).st_size
        if missing > 0:
            raise _too_short(place, missing)
        # Private and writable: torch warns of memory that it must not write.
        pages = mmap.mmap(
            file.fileno(), length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=start
        )
    try:
        pages.madvise(_POPULATE_READ)
    except OSError:  # kernels before 5.14
        pages.madvise(mmap.MADV_WILLNEED)
    data = torch.frombuffer(
        pages, dtype=torch.uint8, offset=place.start - start, count=place.num_bytes
    )
    return data.view(place.dtype).view(place.shape)


def _read_pinned(place: _Place) -> Tensor:
    data = torch.empty(place.num_bytes, dtype=torch.uint8, pin_memory=True)
    view = data.numpy().data
    with place.path.open("rb", buffering=0) as file:
        file.seek(place.start)
        done = 0
        while done < place.num_bytes:
            count = file.readinto(view[done:])
            if not count:
                raise _too_short(place, place.num_bytes - done)
            done += count
    return data.view(place.dtype).view(place.shape)


def _too_short(place: _Place, missing: int) -> TeacherError:
    return TeacherError(
        f"{place.path} ends {missing:,} bytes too early.\n  Download the checkpoint again."
    )
