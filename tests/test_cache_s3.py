"""Caches on an object store: moto's server speaks S3 on the loopback, as the real one does."""

import itertools
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from distill.cache.inspect import find_faults
from distill.cache.reader import open_cache
from distill.cache.storage import Folder
from distill.capture import capture
from distill.cli import main
from distill.errors import CacheError
from tests.conftest import ConfigMaker, folder_bytes
from tests.processes import cached, start

_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    """The environment in which a user's S3 is this server."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    moto.stop()


@pytest.fixture
def bucket(server: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a new bucket."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    url = f"s3://bucket-{next(_NUMBERS)}"
    fsspec.filesystem("s3").mkdir(url)
    return url


def objects(url: str) -> dict[str, bytes]:
    """Name below `url` and bytes of every object."""
    files, root = fsspec.core.url_to_fs(url)
    files.invalidate_cache()
    return {name.removeprefix(f"{root}/"): files.cat_file(name) for name in files.find(root)}


def num_objects(bucket: str) -> int:
    files = fsspec.filesystem("s3")
    files.invalidate_cache()
    return len(files.find(bucket))


def remove(url: str) -> None:
    files, path = fsspec.core.url_to_fs(url)
    files.rm_file(path)
    files.invalidate_cache()


def test_cache_on_s3_holds_the_bytes_of_one_on_the_disk(
    tiny_config: ConfigMaker, bucket: str, written_cache: Path
) -> None:
    assert capture(tiny_config(f"cache.folder={bucket}/deep/cache"))
    assert objects(f"{bucket}/deep/cache") == dict(folder_bytes(written_cache))
    assert len(objects(bucket)) == len(objects(f"{bucket}/deep/cache"))
    for split in ("train", "held_out"):
        assert not [fault for fault in find_faults(f"{bucket}/deep/cache/{split}") if fault]


@pytest.mark.slow
def test_two_workers_share_a_cache_on_s3(
    tiny_yaml: Path,
    bucket: str,
    server: Mapping[str, str],
    written_cache: Path,
    tmp_path: Path,
) -> None:
    logs = [tmp_path / f"log{worker}" for worker in (0, 1)]
    command = ["cache", str(tiny_yaml), f"cache.folder={bucket}/cache"]
    workers = [
        start([*command, "--worker", f"{worker}/2"], log, environment=server)
        for worker, log in enumerate(logs)
    ]
    for worker, log in zip(workers, logs, strict=True):
        worker.join()
        assert worker.exitcode == 0, log.read_text()
    assert objects(f"{bucket}/cache") == dict(folder_bytes(written_cache))


@pytest.mark.slow
@pytest.mark.parametrize("killed_at", [3, 15, 22])
def test_killed_capture_to_s3_is_resumed(
    tiny_config: ConfigMaker,
    tiny_yaml: Path,
    bucket: str,
    server: Mapping[str, str],
    written_cache: Path,
    killed_at: int,
) -> None:
    # 8 packed shards, 2 manifests, then 8 shards and their records.
    log = tiny_yaml.with_name("log")
    command = ["cache", str(tiny_yaml), f"cache.folder={bucket}/cache"]
    process = start(command, log, environment=server)
    while process.is_alive() and num_objects(bucket) < killed_at:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    with pytest.raises(CacheError, match=r"holds no cache|is incomplete: \d of 6 shards"):
        open_cache(f"{bucket}/cache/train")
    assert capture(tiny_config(f"cache.folder={bucket}/cache"))
    assert objects(f"{bucket}/cache") == dict(folder_bytes(written_cache))


def test_student_trained_from_s3_is_the_one_trained_from_the_disk(
    tiny_yaml: Path, bucket: str, cache_copy: Path, tmp_path: Path
) -> None:
    files = fsspec.filesystem("s3")
    files.put(str(cache_copy), f"{bucket}/cache", recursive=True)
    assert main(["train", str(tiny_yaml)]) == 0
    there = [f"run_folder={tmp_path / 'there'}", f"cache.folder={bucket}/cache"]
    assert main(["train", str(tiny_yaml), *there]) == 0
    assert not (tmp_path / "there" / "cache").exists()
    here, afar = (cached(tmp_path / run / "student" / "final") for run in ("run", "there"))
    assert here["model.safetensors"] == afar["model.safetensors"]


def test_deleted_object_is_refused_with_its_url(
    tiny_yaml: Path, bucket: str, cache_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fsspec.filesystem("s3").put(str(cache_copy), f"{bucket}/cache", recursive=True)
    gone = f"{bucket}/cache/train/shards/00002.parquet"
    remove(gone)
    command = [str(tiny_yaml), f"cache.folder={bucket}/cache"]
    assert main(["train", *command]) == 2
    assert f"CacheError: {gone} is missing." in capsys.readouterr().err
    assert main(["verify", f"{bucket}/cache"]) == 1
    assert f"{gone} is missing." in capsys.readouterr().out
    remove(f"{bucket}/cache/train/index.json")
    assert main(["train", *command]) == 2
    assert f"{bucket}/cache/train is incomplete" in capsys.readouterr().err


def test_unreachable_store_is_one_clear_error(tiny_yaml: Path) -> None:
    log = tiny_yaml.with_name("log")
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        # In a process of its own: fsspec keeps the connection of the first address it is given.
        process = start(
            ["cache", str(tiny_yaml), "cache.folder=s3://nobody/cache"],
            log,
            environment={
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": "nobody",
                "AWS_SECRET_ACCESS_KEY": "nothing",
                "AWS_MAX_ATTEMPTS": "1",
            },
        )
        process.join()
    assert process.exitcode == 2
    assert "StorageError: cannot look for s3://nobody/cache/train/index.json:" in log.read_text()
    assert address in log.read_text()


def test_address_of_no_known_kind_is_refused(
    tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", str(tiny_yaml), "cache.folder=floppy://disk"]) == 2
    assert "ConfigError: cannot open the folder floppy://disk" in capsys.readouterr().err


def test_folder_on_s3_lists_and_removes_what_others_changed(bucket: str) -> None:
    ours, theirs = Folder(f"{bucket}/cache/"), fsspec.filesystem("s3", skip_instance_cache=True)
    assert ours.list("shards") == set()
    assert not ours.exists("shards/1.json")
    for name in ("shards/1.json", "shards/2.json", "shards-too/3.json", "blocks/1.parquet"):
        ours.write(name, name.encode())
    assert ours.list("shards") == {"1.json", "2.json"}
    assert ours.exists("shards/2.json")
    theirs.rm_file(f"{bucket}/cache/shards/2.json")
    theirs.pipe_file(f"{bucket}/cache/shards/4.json", b"new")
    assert not ours.exists("shards/2.json")
    assert ours.list("shards") == {"1.json", "4.json"}
    assert ours.read("shards/4.json") == b"new"
    ours.write("shards/4.json", b"newer")
    assert ours.read("shards/4.json") == b"newer"
    ours.remove("shards")
    ours.remove("shards")
    ours.remove("blocks/1.parquet")
    ours.remove("blocks/1.parquet")
    assert objects(f"{bucket}/cache") == {"shards-too/3.json": b"shards-too/3.json"}
    with pytest.raises(CacheError, match=rf"^{bucket}/cache/shards/1\.json is missing\.$"):
        ours.read("shards/1.json")
