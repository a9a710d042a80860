"""A student as `distill train` leaves it, behind vLLM's server: the recipe of docs/interop.md."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import ExperimentConfig
from distill.train import train
from students import build_student

ConfigMaker = Callable[..., ExperimentConfig]

pytestmark = pytest.mark.filterwarnings("default")  # of the older transformers that vLLM wants

STUDENT = (
    *("student.kind=scratch", "student.hidden_size=64", "student.intermediate_size=128"),
    *("student.num_layers=2", "student.num_heads=2"),
    *("train.learning_rate=1e-2", "train.epochs=4", "train.save_dtype=float32"),
)
"""Heads of 32 numbers, and a few steps, so that not every token is as likely as any other."""

START_SECONDS = 240
NATS = 1e-4
"""Two implementations in float32: of log-probabilities."""


@pytest.fixture
def student_folder(tiny_config: ConfigMaker, cache_copy: Path) -> Path:  # noqa: ARG001
    config = tiny_config(*STUDENT)
    return train(config, *build_student(config))


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """Start the server on a free port of the loopback; its URL, once it answers. Then end it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(folder), "--served-model-name", "student"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128"),
        *("--enforce-eager", "--dtype", "float32"),
    ]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=file, stderr=file)
    family = psutil.Process(server.pid)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_it_answers(server, url, log)
        yield url
    finally:
        children = family.children(recursive=True) if server.poll() is None else []
        server.terminate()
        _, alive = psutil.wait_procs([family, *children], timeout=60)
        for process in alive:
            process.kill()
        server.wait()
    assert not alive, "the server did not end when asked to"


def _wait_until_it_answers(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (URLError, TimeoutError):
            time.sleep(0.5)


def complete(url: str, prompt: str | list[int]) -> dict[str, Any]:
    """Ask for 12 tokens, the likeliest each; return their ids and log-probabilities."""
    settings = {
        "model": "student",
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": 12,
        "ignore_eos": True,
        "logprobs": 5,
        "return_tokens_as_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(settings).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        logprobs: dict[str, Any] = json.load(answer)["choices"][0]["logprobs"]
    return logprobs


def id_of(token: str) -> int:
    return int(token.removeprefix("token_id:"))


@pytest.mark.timeout(400)
def test_server_gives_the_log_probabilities_of_transformers(
    student_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(student_folder)
    student = AutoModelForCausalLM.from_pretrained(student_folder, dtype=torch.float32)
    text = "The cat sees the old riv"
    prompt = tokenizer(text)["input_ids"]
    with served(student_folder, tmp_path / "log") as url:
        found = complete(url, prompt)
        assert complete(url, text)["tokens"] == found["tokens"]  # its tokenizer is served too
    answered = [id_of(token) for token in found["tokens"]]
    assert len(answered) == 12

    with torch.no_grad():
        logits_TV = student(torch.tensor([prompt + answered])).logits[0, len(prompt) - 1 : -1]
    logprobs_TV = logits_TV.log_softmax(-1)
    top_T = logprobs_TV.max(-1).values
    assert answered == logprobs_TV.argmax(-1).tolist()
    assert (top_T.exp() > 5 / logits_TV.shape[1]).all()  # it has learned something
    assert (torch.tensor(found["token_logprobs"]) - top_T).abs().max() < NATS
    for logprobs_V, top in zip(logprobs_TV, found["top_logprobs"], strict=True):
        assert len(top) == 5
        for token, logprob in top.items():
            assert abs(float(logprobs_V[id_of(token)]) - logprob) < NATS
