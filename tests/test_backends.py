"""Models that are opened otherwise than by transformers alone: a server, an engine, an adapter."""

import json
import shutil
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from distill.config import ComparedModelConfig, EvaluationConfig
from distill.errors import EvalError
from distill.evaluate.backends import identify
from distill.evaluate.harness import run_tasks
from tests.completions_server import completions_server

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
"""As peft 0.21 asks transformers 5 by the old name."""

Score = Callable[..., dict[str, dict[str, Any]]]
"""score(model): the task files of one model, by the name of the task."""


@pytest.fixture
def score(task_folder: Path, tmp_path: Path) -> Score:
    def run(model: ComparedModelConfig, *tasks: str, **settings: Any) -> dict[str, dict[str, Any]]:
        config = EvaluationConfig(
            tasks=tasks or ("tiny_choice", "tiny_rolling"),
            include_path=str(task_folder),
            batch_size=1,
            max_length=64,
            dtype="float32",
            **settings,
        )
        out = tmp_path / f"eval-{len(list(tmp_path.iterdir()))}"
        files = run_tasks(
            "tiny", model, config, out, device="cpu", seed=0, on_progress=lambda _: None
        )
        return {path.stem: json.loads(path.read_text()) for path in files}

    return run


@pytest.fixture(scope="module")
def adapters(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a LoRA of the tiny teacher, `lora`, and both in one, `merged`."""
    folder = tmp_path_factory.mktemp("adapters")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoraConfig(
            r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False
        )
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_teacher), lora)
        adapted.save_pretrained(str(folder / "lora"))
        merged: Any = adapted
        merged.merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(folder / "merged")
    return folder


def assert_equal_scores(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["metrics"].keys() == theirs["metrics"].keys()
    for name, metric in ours["metrics"].items():
        assert metric["value"] == pytest.approx(theirs["metrics"][name]["value"], rel=1e-6)
    for own, other in zip(ours["samples"], theirs["samples"], strict=True):
        assert own["doc_hash"] == other["doc_hash"]
        assert own["response"] == other["response"]


def test_a_server_of_completions_gives_the_scores_of_transformers(
    score: Score, tiny_teacher: Path
) -> None:
    scored, generated = ("tiny_choice", "tiny_rolling"), ("tiny_generate",)
    with completions_server(tiny_teacher) as url:
        served = ComparedModelConfig(
            path="teacher", backend="openai", base_url=url, tokenizer=str(tiny_teacher)
        )
        theirs = score(served, *scored, num_fewshot=1) | score(served, *generated)
    local = ComparedModelConfig(path=str(tiny_teacher))
    ours = score(local, *scored, num_fewshot=1) | score(local, *generated)
    assert ours["tiny_choice"]["num_truncated"] > 0
    for task in (*scored, *generated):
        assert_equal_scores(ours[task], theirs[task])
    assert {sample["response"] for sample in ours["tiny_generate"]["samples"]} != {""}
    identity = theirs["tiny_choice"]["identity"]
    assert (identity["model"], identity["weights"]) == ("teacher", None)
    assert identity["model_settings"]["base_url"] == url
    assert str(tiny_teacher) not in json.dumps(identity)


def test_a_server_that_is_not_there_is_named(score: Score, tiny_teacher: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1/completions"
        model = ComparedModelConfig(
            path="teacher", backend="openai", base_url=url, tokenizer=str(tiny_teacher)
        )
        with pytest.raises(EvalError, match=rf"the server at {url} cannot be asked for teacher"):
            score(model)


def test_a_server_at_another_address_is_named(score: Score, tiny_teacher: Path) -> None:
    with completions_server(tiny_teacher) as url:
        model = ComparedModelConfig(
            path="x", backend="openai", base_url=f"{url}/s", tokenizer=str(tiny_teacher)
        )
        with pytest.raises(EvalError, match=r"cannot be asked for x: HTTPError: 404"):
            score(model)


def test_a_server_without_logprobs_of_the_prompt_is_refused(
    score: Score, tiny_teacher: Path
) -> None:
    with completions_server(tiny_teacher, knows_echo=False) as url:
        model = ComparedModelConfig(
            path="x", backend="openai", base_url=url, tokenizer=str(tiny_teacher)
        )
        with pytest.raises(EvalError, match="without a log-probability for each token"):
            score(model)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_engine_that_is_not_installed_is_named(score: Score, tiny_teacher: Path) -> None:
    with pytest.raises(EvalError, match=r"backend vllm .*not installed.*\n.*requirements-vllm"):
        score(ComparedModelConfig(path=str(tiny_teacher), backend="vllm"))


def test_an_adapter_scores_as_the_model_that_it_is_merged_into(
    score: Score, tiny_teacher: Path, adapters: Path
) -> None:
    base = score(ComparedModelConfig(path=str(tiny_teacher)))
    model = ComparedModelConfig(path=str(tiny_teacher), adapter=str(adapters / "lora"))
    adapted, merged = score(model), score(ComparedModelConfig(path=str(adapters / "merged")))
    for task in ("tiny_choice", "tiny_rolling"):
        assert_equal_scores(adapted[task], merged[task])
    perplexities = [
        scores["tiny_rolling"]["metrics"]["word_perplexity"]["value"] for scores in (base, adapted)
    ]
    assert perplexities[0] != pytest.approx(perplexities[1], rel=1e-3)


def test_weights_and_scale_of_an_adapter_are_part_of_the_identity(
    tiny_teacher: Path, adapters: Path, tmp_path: Path
) -> None:
    def known(adapter: Path | None) -> dict[str, object]:
        path = None if adapter is None else str(adapter)
        return identify(ComparedModelConfig(path=str(tiny_teacher), adapter=path))

    moved, scaled, changed = (
        Path(shutil.copytree(adapters / "lora", tmp_path / name)) for name in "abc"
    )
    settings = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    (moved / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "elsewhere"})
    )
    weights = load_file(changed / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 1
    save_file(weights, changed / "adapter_model.safetensors", metadata={"format": "pt"})
    identities = [known(folder) for folder in (None, adapters / "lora", scaled, changed)]
    assert len({str(identity["weights"]) for identity in identities}) == 4
    assert known(moved) == identities[1]


def test_an_adapter_of_another_model_is_refused(
    score: Score, tiny_teacher: Path, adapters: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(adapters / "lora", tmp_path / "other"))
    weights = load_file(other / "adapter_model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1" not in name}
    save_file(kept, other / "adapter_model.safetensors", metadata={"format": "pt"})
    model = ComparedModelConfig(path=str(tiny_teacher), adapter=str(other))
    with pytest.raises(EvalError, match=r"cannot put the adapter .*missing adapter keys"):
        score(model)


def test_an_adapter_of_prompts_is_refused(score: Score, tiny_teacher: Path, tmp_path: Path) -> None:
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    base = AutoModelForCausalLM.from_pretrained(tiny_teacher)
    adapted = get_peft_model(base, prompts)
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(str(tmp_path / "prompts"))
    model = ComparedModelConfig(path=str(tiny_teacher), adapter=str(tmp_path / "prompts"))
    with pytest.raises(EvalError, match="of type PROMPT_TUNING, which changes prompts"):
        score(model)


@pytest.mark.parametrize(("adapter", "message"), [("./no", "no adapter folder"), (".", "cannot")])
def test_what_is_no_adapter_is_refused_before_the_model_is_loaded(
    tiny_teacher: Path, adapter: str, message: str
) -> None:
    with pytest.raises(EvalError, match=message):
        identify(ComparedModelConfig(path=str(tiny_teacher), adapter=adapter))


def test_arguments_reach_the_model_and_its_wrapper(score: Score, tiny_teacher: Path) -> None:
    path = str(tiny_teacher)
    plain = score(ComparedModelConfig(path=path))
    eager = score(ComparedModelConfig(path=path, args={"attn_implementation": "eager"}))
    prefixed = score(ComparedModelConfig(path=path, args={"prefix_token_id": 65}))
    for task in plain:
        assert_equal_scores(plain[task], eager[task])
    assert plain["tiny_choice"]["identity"] != eager["tiny_choice"]["identity"]
    assert (
        plain["tiny_rolling"]["metrics"]["word_perplexity"]
        != prefixed["tiny_rolling"]["metrics"]["word_perplexity"]
    )
    with pytest.raises(EvalError, match=r"cannot open the model .*no_such_argument"):
        score(ComparedModelConfig(path=path, args={"no_such_argument": 1}))
