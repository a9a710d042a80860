import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from torch.testing import assert_close

from distill.cache.reader import open_cache
from distill.cli import main
from distill.errors import ConfigError, TeacherError
from distill.fingerprint import of_file
from distill.hardware import RESIDENT_OVERHEAD
from distill.teacher.memory import out_of_memory_named, require_resident, resident_bytes
from distill.teacher.weights import Checkpoint
from tests.families import packed_groups, require_equal, resident, save_model
from tests.test_gguf_to_llama import tiny_llama, write_gguf

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_layers_shared_by_two_processes_give_the_targets_of_one(
    tiny_yaml: Path, written_cache: Path, tmp_path: Path
) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = ["teacher.tensor_parallel=true", "teacher.device=null"]
    done = subprocess.run(
        [sys.executable, *command, "-m", "distill.cli", "cache", str(tiny_yaml), *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert main(["verify", str(tiny_yaml)]) == 0
    for split in ("train", "held_out"):
        found = open_cache(str(tmp_path / "run" / "cache" / split))
        expected = open_cache(str(written_cache / split))
        blocks = range(len(expected))
        ours, theirs = found.batch(blocks).targets, expected.batch(blocks).targets
        assert_close(ours.entropy_R, theirs.entropy_R, rtol=2**-7, atol=1e-5)
        assert (ours.counts_R == theirs.counts_R).float().mean() > 0.99
    assert main(["cache", str(tiny_yaml)]) == 0  # one process finds it complete


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["teacher.tensor_parallel=true"], "device and tensor_parallel exclude each other"),
        (
            ["teacher.tensor_parallel=true", "teacher.device=null"],
            "torchrun --nproc-per-node N -m distill.cli cache CONFIG",
        ),
    ],
)
def test_tensor_parallel_alone_is_refused(
    tiny_yaml: Path, capsys: pytest.CaptureFixture[str], settings: list[str], message: str
) -> None:
    assert main(["cache", str(tiny_yaml), *settings]) == 2
    assert message in capsys.readouterr().err


def test_processes_that_would_all_do_the_same_are_refused(
    tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["cache", str(tiny_yaml)]) == 2
    assert "started as 2 processes, which would all do the same work" in capsys.readouterr().err


def test_heads_that_the_processes_cannot_share_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"(?s)3 processes.*num_key_value_heads 2"):
        resident(folder, tensor_parallel=True, device=None)


def test_results_do_not_depend_on_the_groups_before(tmp_path: Path) -> None:
    folder, groups = save_model(tmp_path / "model"), packed_groups((3, 1, 2))
    teacher = resident(folder)
    together = list(teacher.score(groups))
    require_equal(list(teacher.score(groups[1:])), together[3:])


def test_teacher_in_a_gguf_file_is_captured(tiny_yaml: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, tiny_llama(is_tied=True), GGMLQuantizationType.Q8_0)
    assert main(["cache", str(tiny_yaml), f"teacher.model={path}"]) == 0
    assert main(["verify", str(tiny_yaml)]) == 0
    manifest = open_cache(str(tmp_path / "run" / "cache" / "train")).manifest
    assert manifest.teacher["quantisation"] == "gguf"
    assert manifest.teacher["weights"] == of_file(path)


def test_gguf_file_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ConfigError, match=r"teacher\.model: there is no file '.*model\.gguf'"):
        resident(path)
    path.write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"teacher\.model: cannot open a model at"):
        resident(path)


def test_model_larger_than_its_device_says_what_would_fit() -> None:
    gpu, gigabyte = torch.device("cuda"), 10**9
    require_resident("small", 70 * gigabyte, 80 * gigabyte, gpu)
    with pytest.raises(ConfigError) as error:
        require_resident("big/model", 141 * gigabyte, 80 * gigabyte, gpu)
    message = str(error.value)
    assert "big/model does not fit: 141.0 GB of weights" in message
    assert "2 such devices: teacher.tensor_parallel=true under torchrun" in message
    assert "teacher.kind=streamed" in message
    assert 141 * RESIDENT_OVERHEAD < 2 * 80
    with pytest.raises(ConfigError, match=r"cpu has 8\.0 GB free") as error:
        require_resident("big/model", 141 * gigabyte, 8 * gigabyte, torch.device("cpu"))
    assert "such devices" not in str(error.value)


def test_bytes_of_a_loaded_model_are_those_of_its_parameters(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_model(tmp_path / "model"))
    num_parameters = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint.names)
    cpu = torch.device("cpu")
    assert resident_bytes(checkpoint, torch.float32, cpu) == 4 * num_parameters
    assert resident_bytes(checkpoint, torch.bfloat16, cpu) == 2 * num_parameters


def test_exhausted_device_names_the_settings_to_lower() -> None:
    with (
        pytest.raises(TeacherError, match=r"micro_batch_tokens \(now 4096\).*\(now 256\)"),
        out_of_memory_named(4096, 256),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


HUB = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Hub(BaseHTTPRequestHandler):
    def answer(self):
        gated = "/gated/" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else sys.argv[1])
        self.send_header("X-Error-Message", "what the hub says")
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_GET = do_HEAD = answer
    def log_message(self, *args):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("gated/model", "RepoNotFound", "Accept its licence on its page on the hub, then log in"),
        ("nobody/nothing", "RepoNotFound", "teacher.model: cannot open a"),
        ("some/model", "RevisionNotFound", "not a valid git identifier"),
    ],
)
def test_hub_that_refuses_is_quoted(tiny_yaml: Path, model: str, code: str, message: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HUB, code], stdout=subprocess.PIPE, text=True
    ) as hub:
        assert hub.stdout is not None
        address = f"http://127.0.0.1:{int(hub.stdout.readline())}"
        settings = [f"teacher.model={model}", "teacher.revision=abcdef"]
        done = subprocess.run(
            [sys.executable, "-m", "distill.cli", "cache", str(tiny_yaml), *settings],
            env=os.environ
            | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        hub.terminate()
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
