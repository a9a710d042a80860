"""A folder, local or behind an fsspec URL, whose files appear whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

from distill.cache import format as fmt
from distill.cache.manifest import Manifest
from distill.errors import CacheError, ConfigError, DistillError, StorageError, storage_errors
from distill.files import write_bytes_atomically


class Folder:
    """Reads, lists and atomically writes small and medium files (they pass through memory).

    Local files are published by temporary name, sync and rename; on object stores one put is
    atomic. Names are relative, with `/`, and never lead out of the folder.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"cannot open the folder {url}: {error}") from error
        self._root = self._root.rstrip("/")
        self._is_local = isinstance(self._files, LocalFileSystem)

    def __str__(self) -> str:
        return self.url

    def path(self, name: str) -> str:
        """Return the URL of a file, for messages."""
        return f"{self.url.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the file is there now (never answered from a cached listing)."""
        with self._store_errors(f"look for {self.path(name)}"):
            self._files.invalidate_cache()
            # Not `exists`, which takes every error of an object store for a no.
            try:
                self._files.info(self._full(name))
            except (FileNotFoundError, NotADirectoryError):
                return False
        return True

    def read(self, name: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            CacheError: there is no such file.
        """
        try:
            with self._store_errors(f"read {self.path(name)}"):
                data: bytes = self._files.cat_file(self._full(name))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise CacheError(f"{self.path(name)} is missing.") from None
        except PermissionError as error:
            raise StorageError(f"cannot read {self.path(name)}: permission is denied.") from error
        return data

    def write(self, name: str, data: bytes) -> None:
        """Publish a file whole; an older one of the same name is replaced.

        Raises:
            StorageError: no space, no permission; nothing half written stays.
        """
        if self._is_local:
            write_bytes_atomically(Path(self._full(name)), data)
        else:
            with self._store_errors(f"write {self.path(name)}"), storage_errors(self.path(name)):
                try:
                    self._files.pipe_file(self._full(name), data)
                except FileNotFoundError as error:
                    raise StorageError(
                        f"cannot write {self.path(name)}: {error}.\n  Does the bucket exist?"
                    ) from error

    def list(self, name: str) -> set[str]:
        """Names of the files in one subfolder; empty if it does not exist."""
        try:
            with self._store_errors(f"list {self.path(name)}"):
                self._files.invalidate_cache()
                found = self._files.ls(self._full(name), detail=False)
        except FileNotFoundError:
            return set()
        return {str(path).rsplit("/", 1)[-1] for path in found}

    def remove(self, name: str) -> None:
        """Remove a file or a subfolder; nothing happens if another worker was faster."""
        try:
            with self._store_errors(f"remove {self.path(name)}"):
                self._files.rm(self._full(name), recursive=True)
        except FileNotFoundError:
            return

    def remove_unfinished(self, name: str) -> None:
        """Remove what killed writers left in a subfolder; only once nobody needs to write there."""
        if self._is_local:
            for unfinished in self.list(name):
                if unfinished.endswith(".tmp"):
                    self.remove(f"{name}/{unfinished}")

    @contextmanager
    def _store_errors(self, work: str) -> Iterator[None]:
        """Turn what an object store raises into a `StorageError`: every back end has its own."""
        try:
            yield
        except (DistillError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except Exception as error:
            if self._is_local:
                raise
            reason = str(error).strip() or type(error).__name__
            raise StorageError(
                f"cannot {work}: {reason}.\n  What is finished is safe. Check the network, the "
                "address and the credentials, then run the same command again."
            ) from error

    def _full(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/"):
            raise CacheError(f"{name!r} leads out of the folder {self.url}.")
        return f"{self._root}/{name}"


def read_manifest(folder: Folder) -> Manifest | None:
    """Return the manifest of a cache, or None where there is none yet.

    Raises:
        CacheError: it is damaged, edited, or of another format version.
    """
    if not folder.exists(fmt.MANIFEST):
        return None
    return Manifest.from_json(folder.read(fmt.MANIFEST), folder.path(fmt.MANIFEST))


def write_manifest(folder: Folder, manifest: Manifest) -> None:
    """Publish the manifest of a new cache."""
    folder.write(fmt.MANIFEST, manifest.to_json().encode())
