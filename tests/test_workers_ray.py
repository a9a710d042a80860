"""Workers on a real Ray cluster of this machine, with processes that are really killed."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from distill.cli import main
from tests.captures import Runs, are_gone, capture_unbroken, until
from tests.conftest import poison
from tests.processes import cached

RECORDS = "*/shards/*.json"
ON_RAY = ["capture.engine=ray", "capture.workers=2"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """Environment in which a Ray cluster is at hand: two CPUs, a folder and ports of its own."""
    folder = tempfile.mkdtemp(prefix="ray-")  # short, for Ray keeps sockets there
    environment = os.environ | {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_worker_niceness"] = "0"  # at Ray's 15, a busy machine lets actors starve
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    options = ["--head", "--port=0", "--num-cpus=2", "--include-dashboard=false"]
    start = [*ray, "start", *options, "--include-log-monitor=false"]
    subprocess.run(start, env=environment, check=True, capture_output=True)
    nodes = processes_of(folder)
    yield {key: environment[key] for key in ("RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED")}
    for process in nodes:
        process.kill()
    until(lambda: are_gone(nodes), seconds=10)
    shutil.rmtree(folder)


def processes_of(folder: str) -> list[psutil.Process]:
    """Processes of the Ray cluster that keeps its files there."""
    return [
        process
        for process in psutil.process_iter(["environ", "cmdline"])
        if (process.info["environ"] or {}).get("RAY_TMPDIR") == folder
        and process.pid != os.getpid()
    ]


def actors(environment: dict[str, str]) -> list[psutil.Process]:
    """Workers that are at work."""
    return [
        process
        for process in processes_of(environment["RAY_TMPDIR"])
        if "ray::_Worker.run" in (process.info["cmdline"] or [""])[0]
    ]


@pytest.fixture
def runs(tiny_yaml: Path, tmp_path: Path, cluster: dict[str, str]) -> Runs:
    return Runs(tiny_yaml, tmp_path / "run", cluster)


@pytest.mark.slow
def test_shards_of_dead_actors_are_taken_up_and_the_bytes_are_those_of_one_worker(
    runs: Runs,
    cluster: dict[str, str],
    tmp_path: Path,
    tiny_teacher: Path,
    corpus: Path,
) -> None:
    (tmp_path / "quiet").mkdir()
    unbroken = capture_unbroken(tmp_path / "quiet", tiny_teacher, corpus)
    driver = runs.start(*ON_RAY, "capture.workers=1")
    runs.wait(driver, lambda: runs.num_files(RECORDS) >= 1)
    at_work = actors(cluster)
    driver.kill()
    driver.join()
    until(lambda: are_gone(at_work))  # none outlives its driver
    assert 1 <= runs.num_files(RECORDS) < 16
    driver = runs.start(*ON_RAY)
    done = runs.num_files(RECORDS)
    runs.wait(driver, lambda: runs.num_files(RECORDS) > done)
    actors(cluster)[0].kill()
    runs.finish(driver)
    assert cached(runs.root) == unbroken
    lines = runs.log.splitlines()
    death = next(line for line in lines if " died: " in line)
    assert " died: its process is gone (SYSTEM_ERROR " in death
    assert death.endswith("Restart 1 of 3.")
    assert len(death) < 300
    assert "  16 of 16 shards, " in lines[-1]
    assert len(lines) < 12, runs.log
    until(lambda: are_gone(actors(cluster)))


@pytest.mark.slow
def test_error_of_an_actor_on_a_cluster_of_its_own_reaches_the_user_as_it_is(
    runs: Runs, own_teacher: Path
) -> None:
    poison(own_teacher)
    own = ["capture.workers=1", "capture.ray_address=local"]
    driver = runs.start(*ON_RAY, f"teacher.model={own_teacher}", *own)
    driver.join()
    assert driver.exitcode == 2
    assert f"TeacherError: the teacher {own_teacher} gave NaN or infinite logits" in runs.log
    assert "died" not in runs.log
    assert "Traceback" not in runs.log
    assert not runs.num_files(RECORDS)


def test_more_workers_than_the_cluster_has_room_for_are_refused(runs: Runs) -> None:
    driver = runs.start("capture.engine=ray", "capture.workers=2", "capture.cpus_per_worker=2")
    driver.join()
    assert driver.exitcode == 2
    assert "ConfigError: capture.workers is 2, each with 2 CPUs and 0 GPUs, but the" in runs.log
    assert "has room for 1.\n  Its nodes have 2 CPUs and 0 GPUs." in runs.log


@pytest.mark.parametrize(
    ("address", "shown"),
    [("localhost:1", "nothing answers at localhost:1: "), ("ray", "expected HOST:PORT")],
)
def test_address_without_a_cluster_is_refused(
    tiny_yaml: Path, capsys: pytest.CaptureFixture[str], address: str, shown: str
) -> None:
    assert main(["cache", str(tiny_yaml), *ON_RAY, f"capture.ray_address={address}"]) == 2
    assert f"ConfigError: capture.ray_address: {shown}" in capsys.readouterr().err


def test_missing_ray_is_named_with_what_to_install() -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from distill.errors import ConfigError\n"
        "try: import distill.workers.ray\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'distill-llm[ray]'" in done.stdout
