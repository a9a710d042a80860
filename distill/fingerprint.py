"""Stable hashes of what must fit together: tokenizers, data, weights, settings.

A fingerprint is the SHA-256 of a canonical form, in hexadecimal. Unlike Python's `hash` it is the
same in every process and on every machine. No torch here.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EDGE_BYTES = 4096
"""Bytes hashed at either end of a tensor: fine-tuning changes them; 10 MB for a 405B model."""

_WHOLE_FILE_BYTES = 1 << 26


def canonical_json(value: object) -> str:
    """Serialise `value` so that equal values give equal text: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def of_settings(value: object) -> str:
    """Fingerprint of any JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def of_bytes(data: bytes | memoryview) -> str:
    """SHA-256 checksum of `data`."""
    return hashlib.sha256(data).hexdigest()


def of_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Fingerprint of what decides how text becomes ids: vocabulary, merges, special tokens.

    Two tokenizers with equal fingerprints give equal ids for equal text; names, paths, padding side
    and chat templates do not matter.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("padding", None)
        state.pop("truncation", None)
    else:
        state = {"vocab": dict(tokenizer.get_vocab()), "class": type(tokenizer).__name__}
    return of_settings(state)


def of_file(path: Path) -> str:
    """Fingerprint of a file: length and bytes; beyond 64 MiB, 1,024 samples of 4 KiB."""
    num_bytes = path.stat().st_size
    digest = hashlib.sha256(str(num_bytes).encode())
    with path.open("rb") as file:
        if num_bytes <= _WHOLE_FILE_BYTES:
            digest.update(file.read())
        else:
            for sample in range(1024):
                file.seek((num_bytes - _EDGE_BYTES) * sample // 1023)
                digest.update(file.read(_EDGE_BYTES))
    return digest.hexdigest()


def of_weights(folder: Path) -> str:
    """Fingerprint of the model in a local folder (or one file), without reading all of it.

    Covers `config.json`, the header of every safetensors file (names, shapes, dtypes, offsets) and
    the first and last 4 KiB of every tensor. Files of other formats are hashed whole.

    Raises:
        FileNotFoundError: `folder` holds no weight file.
    """
    if folder.is_file():
        return of_file(folder)
    digest = hashlib.sha256()
    config = folder / "config.json"
    if config.exists():
        digest.update(canonical_json(_without_origin(json.loads(config.read_text()))).encode())
    files = sorted(folder.glob("*.safetensors")) or sorted(
        [*folder.glob("*.bin"), *folder.glob("*.gguf")]
    )
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors, *.bin or *.gguf file")
    for path in files:
        digest.update(path.name.encode())
        if path.suffix == ".safetensors":
            _hash_safetensors(path, digest)
        else:
            with path.open("rb") as file:
                while piece := file.read(1 << 24):
                    digest.update(piece)
    return digest.hexdigest()


def _without_origin(config: Mapping[str, object]) -> dict[str, object]:
    return {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}


def _hash_safetensors(path: Path, digest: "hashlib._Hash") -> None:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header_text = file.read(header_bytes)
        digest.update(header_text)
        start = 8 + header_bytes
        for name, entry in sorted(json.loads(header_text).items()):
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            file.seek(start + first)
            digest.update(file.read(min(_EDGE_BYTES, last - first)))
            file.seek(start + max(first, last - _EDGE_BYTES))
            digest.update(file.read(min(_EDGE_BYTES, last - first)))
