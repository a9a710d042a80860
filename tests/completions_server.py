"""A small server of /v1/completions, which answers with what a model on disk computes."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Completions:
    """Completions of prompts that come as token ids."""

    def __init__(self, folder: Path, *, knows_echo: bool) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.knows_echo = knows_echo

    def answer(self, payload: dict[str, Any]) -> dict[str, Any]:
        choices = []
        for index, prompt in enumerate(payload["prompt"]):
            ids = self._continue(prompt, payload)
            start = 0 if self.knows_echo and payload.get("echo") else len(prompt)
            choice: dict[str, Any] = {"index": index, "text": self._text(ids[start:], payload)}
            if "logprobs" in payload:
                choice["logprobs"] = self._logprobs(ids, start)
            choices.append(choice)
        return {"object": "text_completion", "model": payload["model"], "choices": choices}

    def _continue(self, prompt: list[int], payload: dict[str, Any]) -> list[int]:
        ids = list(prompt)
        for _ in range(payload["max_tokens"]):
            with torch.no_grad():
                logits_BTV = self.model(input_ids=torch.tensor([ids])).logits
            ids.append(int(logits_BTV[0, -1].argmax()))
            if any(stop in self.tokenizer.decode(ids[len(prompt) :]) for stop in _stops(payload)):
                break
        return ids

    def _text(self, ids: list[int], payload: dict[str, Any]) -> str:
        text = str(self.tokenizer.decode(ids))
        for stop in _stops(payload):
            text = text.partition(stop)[0]
        return text

    def _logprobs(self, ids: list[int], start: int) -> dict[str, Any]:
        with torch.no_grad():
            logits_BTV = self.model(input_ids=torch.tensor([ids])).logits
        logprobs_TV = logits_BTV[0].float().log_softmax(-1)
        own: list[float | None] = [None]
        best: list[dict[str, float] | None] = [None]
        for place, token in enumerate(ids[1:]):
            value, likeliest = logprobs_TV[place].max(-1)
            own.append(float(logprobs_TV[place, token]))
            best.append({str(int(likeliest)): float(value)})
        return {"token_logprobs": own[start:], "top_logprobs": best[start:]}


def _stops(payload: dict[str, Any]) -> list[str]:
    stop = payload.get("stop") or []
    return [stop] if isinstance(stop, str) else stop


@contextmanager
def completions_server(folder: Path, *, knows_echo: bool = True) -> Iterator[str]:
    """Serve the model in `folder` on a free port of this machine, and yield the address."""
    completions = Completions(folder, knows_echo=knows_echo)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path != "/v1/completions":
                self.send_error(404)
                return
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(completions.answer(payload)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the report of a test is no place for a log of requests."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/completions"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
