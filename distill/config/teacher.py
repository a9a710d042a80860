"""Settings of the teachers; `teacher.kind` chooses one."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from distill.config.base import STRICT, Attention, Dtype, Positive, PositiveFloat


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ResidentTeacherConfig:
    """A transformers model, whole in memory."""

    kind: Literal["resident"] = "resident"
    model: str
    """Folder or hub id of a causal language model, or a file of one that ends in .gguf."""
    revision: str | None = None
    """Commit of a hub model; recorded in the cache."""
    licence: str | None = None
    """Licence of the teacher's outputs; kept in the cache and in students made from it."""
    dtype: Dtype = "bfloat16"
    """Weights and activations of the forward pass; the softmax is always float32."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; by default the accelerator if there is one."""
    device_map: str | None = None
    """Accelerate's placement over several devices (auto, balanced): they take turns."""
    tensor_parallel: bool = False
    """Every layer over all processes that torchrun starts: they work at the same time."""
    attention: Attention = "sdpa"
    """Attention implementation of transformers."""
    micro_batch_tokens: Positive = 4096
    """Tokens a forward pass, rounded down to whole blocks but never below one."""
    head_chunk_tokens: Positive = 256
    """Rows whose logits over the whole vocabulary exist at a time."""

    def __post_init__(self) -> None:
        placed = [
            name for name in ("device", "device_map", "tensor_parallel") if getattr(self, name)
        ]
        if len(placed) > 1:
            raise ValueError(f"{' and '.join(placed)} exclude each other: choose one")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StreamedTeacherConfig:
    """A transformers model of any size through one device: its layers are read as they are used."""

    kind: Literal["streamed"]
    model: str
    """Folder or hub id of a causal language model with safetensors."""
    revision: str | None = None
    """Commit of a hub model; recorded in the cache."""
    licence: str | None = None
    """Licence of the teacher's outputs; kept in the cache and in students made from it."""
    dtype: Dtype = "bfloat16"
    """Weights and activations of the forward pass; the softmax is always float32."""
    device: str | None = None
    """cpu, cuda, cuda:1; by default the accelerator if there is one."""
    attention: Attention = "sdpa"
    """Attention implementation of transformers."""
    window_tokens: Positive = 262_144
    """Tokens that pass through a layer while it is there, rounded to whole shards."""
    micro_batch_tokens: Positive = 4096
    """Tokens a call of a layer, rounded down to whole blocks but never below one."""
    head_chunk_tokens: Positive = 256
    """Rows whose logits over the whole vocabulary exist at a time."""
    layers_ahead: Positive = 1
    """Layers that are read while one computes; each takes its own size in memory."""
    parking_folder: str | None = None
    """Folder on a fast disk for the hidden states of a window; by default they stay in memory."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VllmTeacherConfig:
    """A model in vLLM's engine, over one or many GPUs."""

    kind: Literal["vllm"]
    model: str
    """Folder or hub id of a causal language model."""
    revision: str | None = None
    """Commit of a hub model; recorded in the cache."""
    licence: str | None = None
    """Licence of the teacher's outputs; kept in the cache and in students made from it."""
    dtype: Dtype = "bfloat16"
    """Weights and activations of the forward pass; the softmax is always float32."""
    quantization: str | None = None
    """Quantise on load (fp8); by default as the checkpoint says."""
    tensor_parallel_size: Positive = 1
    """GPUs that share every layer."""
    pipeline_parallel_size: Positive = 1
    """Groups of GPUs, each with its share of the layers."""
    executor: Literal["mp", "ray", "uni"] | None = None
    """How the engine spreads over GPUs; ray reaches several nodes. By default vLLM's choice."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of each GPU's memory for weights and cache."""
    max_num_batched_tokens: Positive | None = None
    """Tokens a step of the engine; by default vLLM's choice."""
    tokens_in_flight: Positive = 131_072
    """Tokens of blocks given to the engine and not yet written: enough for some of its steps."""
    head_chunk_tokens: Positive = 256
    """Rows whose logits over the whole vocabulary exist at a time, beside the engine's memory."""
    kv_cache_gib: PositiveFloat | None = None
    """Memory for keys and values, on each GPU or of the CPU; by default vLLM's choice."""
    enforce_eager: bool = False
    """Do not compile: starts sooner, runs slower."""


TeacherConfig = Annotated[
    ResidentTeacherConfig | StreamedTeacherConfig | VllmTeacherConfig,
    Field(discriminator="kind"),
]
