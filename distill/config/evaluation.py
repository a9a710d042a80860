"""How further models are opened for the comparison, and how costs are measured. No torch here."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue
from pydantic.dataclasses import dataclass

from distill.config.base import STRICT, Positive

_OWN_ARGS = frozenset(
    {
        *("pretrained", "model", "path", "peft", "adapter", "lora_local_path", "base_url"),
        *("tensor_parallel_size", "tokenizer", "tokenizer_backend", "batch_size", "device"),
        *("dtype", "max_length", "max_model_len", "seed"),
    }
)
"""Arguments of lm-eval's models that have a setting of their own."""


def _number_or_auto(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not is_number and value != "auto":
        raise ValueError("expected a number greater than 0, or auto")
    return value


BatchSize = Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)]
"""A number, or `auto`: as much as fits, found by trying."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ComparedModelConfig:
    """A model that is compared, and how it is opened."""

    path: str
    """Folder or hub id; with `openai`, the name that the server has for the model."""
    adapter: str | None = None
    """Folder or hub id of a PEFT adapter (LoRA) on top of `path`."""
    backend: Literal["hf", "vllm", "openai"] = "hf"
    """hf: transformers; vllm: vLLM's engine; openai: a server that answers /v1/completions."""
    base_url: str | None = None
    """Whole address at the server: http://127.0.0.1:8000/v1/completions; `openai` needs it."""
    tensor_parallel: Positive = 1
    """GPUs that share every layer, with `vllm`."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; by default the model's. `openai` needs it."""
    args: dict[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of lm-eval's model class; with `hf`, also of `from_pretrained`."""

    def __post_init__(self) -> None:
        problems = []
        if self.backend == "openai":
            needed = {"base_url": self.base_url, "tokenizer": self.tokenizer}
            problems += [f"openai needs {name}" for name, value in needed.items() if value is None]
            if self.adapter is not None:
                problems.append("openai takes no adapter: the server has one or has it not")
        elif self.base_url is not None:
            problems.append(f"base_url is of backend openai, not of {self.backend}")
        if self.backend != "vllm" and self.tensor_parallel > 1:
            problems.append(f"tensor_parallel is of backend vllm, not of {self.backend}")
        taken = sorted(self.args.keys() & _OWN_ARGS)
        if taken:
            problems.append(f"args holds {', '.join(taken)}, which have settings of their own")
        if problems:
            raise ValueError("; ".join(problems))


ComparedModel = Annotated[
    ComparedModelConfig,
    BeforeValidator(lambda given: {"path": given} if isinstance(given, str) else given),
]
"""In YAML a folder or hub id alone, or the settings above."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CostConfig:
    """How speed and memory of every model are measured, with transformers' `generate`."""

    prompt_tokens: Positive = 512
    """Tokens of each prompt, which are random."""
    new_tokens: Annotated[int, Field(ge=2)] = 64
    """Tokens generated after each; the first belongs to the prompt's pass."""
    batch_size: Positive = 1
    """Prompts at a time."""
    rounds: Positive = 3
    """Measurements after a warm-up; their median counts."""
