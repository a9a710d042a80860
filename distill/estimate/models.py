"""Shape and storage of a model from its config.json, or of Llama 3.1 from a table of shapes."""

import re
from dataclasses import dataclass, replace
from typing import Any

from distill.config import ExperimentConfig, PrunedStudentConfig, ScratchStudentConfig
from distill.errors import ConfigError
from distill.estimate.shapes import ModelShape, Weights

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""Values of `model_type` whose parameters the formula counts exactly; tests compare them."""


def _llama(num_layers: int, hidden_size: int, intermediate_size: int) -> ModelShape:
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=hidden_size // 128,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128_256,
    )


PUBLISHED = {
    "8b": _llama(32, 4096, 14_336),
    "70b": _llama(80, 8192, 28_672),
    "405b": _llama(126, 16_384, 53_248),
}
"""Llama 3.1 as published (arXiv:2407.21783, table 3), for when the hub cannot be reached."""

_LLAMA_31 = re.compile(r"^meta-llama/(?:Meta-)?Llama-3\.1-(8B|70B|405B)(?:-Instruct)?(-FP8)?$")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the experiment, with where its shape comes from."""

    name: str
    shape: ModelShape
    weights: Weights
    source: str
    """Where the shape comes from."""
    is_opened: bool = True
    """Whether its own config.json could be opened."""


def open_model(name: str, setting: str, dtype: str, revision: str | None = None) -> Model:
    """Read shape and quantisation of a model from its config.json, or of Llama 3.1 from the table.

    Args:
        name: Folder or hub id.
        setting: Named in errors.
        dtype: Of the parameters that are not quantised.
        revision: Commit of a hub model.

    Raises:
        ConfigError: config.json cannot be opened and the table does not know the model, or the
            model is not of the Llama family.
    """
    from distill.models import load_config  # loads torch

    try:
        config = load_config(name, setting, revision)
    except ConfigError as error:
        known = _LLAMA_31.match(name)
        if known is None:
            raise ConfigError(
                f"{error}\n  Its shape is not in the table of published ones either "
                f"({', '.join(PUBLISHED)} of Llama 3.1).\n  Download the model's config.json into "
                f"a folder (no weights are needed) and give that: {setting}=FOLDER"
            ) from error
        return Model(
            name=name,
            shape=PUBLISHED[known[1].lower()],
            weights=_published_weights(known, dtype),
            source="the table of published ones: config.json cannot be opened",
            is_opened=False,
        )
    who = f"{setting} ({name})"
    return Model(
        name=name,
        shape=shape_of(config.get_text_config(), who),
        weights=weights_of(getattr(config, "quantization_config", None), dtype, who),
        source="its config.json",
    )


def open_student(config: ExperimentConfig, teacher: Model) -> Model:
    """Return the student that the config asks for, as it computes in training.

    Raises:
        ConfigError: as `open_model`.
    """
    student, precision = config.student, config.train.precision
    weights = Weights(parameter_bytes=DTYPE_BYTES[precision])
    if isinstance(student, ScratchStudentConfig):
        made = student.shape
        shape = ModelShape(
            num_layers=made.num_layers,
            hidden_size=made.hidden_size,
            intermediate_size=made.intermediate_size,
            num_heads=made.num_heads,
            num_key_value_heads=made.num_key_value_heads,
            head_dim=made.hidden_size // made.num_heads,
            vocab_size=teacher.shape.vocab_size,
            tie_embeddings=made.tie_embeddings,
        )
        return Model(name="scratch", shape=shape, weights=weights, source="the config's `student`")
    model = teacher
    if student.model != teacher.name:
        model = open_model(student.model, "student.model", precision, student.revision)
    if student.kind == "pruned":
        model = replace(model, shape=_cut(model.shape, student))
    return replace(model, weights=weights)


def _cut(shape: ModelShape, student: PrunedStudentConfig) -> ModelShape:
    """Return what is left of `shape`; whether the cut is possible is seen when it is made."""
    layers = len(student.kept_layers) if student.kept_layers else student.num_layers
    heads = student.num_heads or shape.num_heads
    return replace(
        shape,
        num_layers=layers or shape.num_layers,
        hidden_size=student.hidden_size or shape.hidden_size,
        intermediate_size=student.intermediate_size or shape.intermediate_size,
        num_heads=heads,
        num_key_value_heads=heads * shape.num_key_value_heads // shape.num_heads,
    )


def shape_of(config: Any, who: str) -> ModelShape:
    """Return the shape that a config of transformers describes.

    Raises:
        ConfigError: it is not of the Llama family; `who` is named.
    """
    kind = config.model_type
    if kind not in LLAMA_LIKE:
        raise ConfigError(
            f"{who}: model type {kind!r}, and estimate counts parameters of "
            f"{', '.join(LLAMA_LIKE)} only.\n  Estimate with a model of one of these families and "
            "about the same size."
        )
    heads, hidden = config.num_attention_heads, config.hidden_size
    keys = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    extra = 0
    if kind == "qwen2" or getattr(config, "attention_bias", False):
        extra += (heads + 2 * keys) * head_dim  # Qwen2 has these whatever its config says
        extra += 0 if kind == "qwen2" else hidden
    if getattr(config, "mlp_bias", False):
        extra += 2 * config.intermediate_size + hidden
    if kind == "qwen3":
        extra += 2 * head_dim
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden_size=hidden,
        intermediate_size=config.intermediate_size,
        num_heads=heads,
        num_key_value_heads=keys,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        tie_embeddings=bool(config.tie_word_embeddings),
        extra_layer_parameters=extra,
    )


def weights_of(quantisation: Any, dtype: str, who: str) -> Weights:
    """Return how a checkpoint with this `quantization_config` (or None) is stored.

    Raises:
        ConfigError: it does not tell the bits of a weight; `who` is named.
    """
    plain = Weights(parameter_bytes=DTYPE_BYTES[dtype])
    if not quantisation:
        return plain
    found = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    method = str(found.get("quant_method"))
    groups = (found.get("config_groups") or {}).values()  # of compressed-tensors; the first counts
    stored: dict[str, Any] = next((g["weights"] for g in groups if g.get("weights")), {})
    bits = stored.get("num_bits") or found.get("bits")
    if bits is None and ("fp8" in method or found.get("load_in_8bit")):
        bits = 8
    if bits is None and found.get("load_in_4bit"):
        bits = 4
    if bits is None:
        raise ConfigError(
            f"{who}: its quantization_config (quant_method {method}) does not tell the bits of a "
            "weight.\n  Estimate with the checkpoint that is not quantised, or one in FP8."
        )
    names = ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules")
    return replace(
        plain,
        quantised_bits=int(bits),
        multiplies_fp8=bits == 8 and ("fp8" in method or stored.get("type") == "float"),
        kept=tuple(entry for name in names for entry in found.get(name) or ()),
    )


def _published_weights(known: re.Match[str], dtype: str) -> Weights:
    """Weights of a Llama 3.1 that is only known by name."""
    plain = Weights(parameter_bytes=DTYPE_BYTES[dtype])
    if known[2] is None:
        return plain
    # FP8 for the MLP of all layers but the first and the last (arXiv:2407.21783, section 6.2).
    last = PUBLISHED[known[1].lower()].num_layers - 1
    kept = ("self_attn", "model.layers.0", f"model.layers.{last}")
    return replace(plain, quantised_bits=8, multiplies_fp8=True, kept=kept)
