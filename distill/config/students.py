"""Settings of the students; `student.kind` chooses one. No torch here."""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from distill.config.base import STRICT, Positive, PositiveFloat


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PretrainedStudentConfig:
    """An existing model of the teacher's vocabulary."""

    kind: Literal["pretrained"]
    model: str
    """Folder or hub id."""
    revision: str | None = None
    """Commit of a hub model."""
    resize_embeddings: bool = False
    """Add rows to embedding and head where the tokenizer has more tokens than the model logits."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrunedStudentConfig:
    """A model cut out of a larger one: in depth, in width, or in both. What is not named stays."""

    kind: Literal["pruned"]
    model: str
    """Folder or hub id of the model to cut; usually the teacher."""
    revision: str | None = None
    """Commit of a hub model."""
    num_layers: Positive | None = None
    """Decoder layers to keep; `layers` says which."""
    layers: Literal["spaced", "influence", "loss"] = "spaced"
    """Evenly spaced; or those that turn their input most; or those whose loss costs most."""
    kept_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Numbers of the layers to keep, from 0 and rising, in place of `num_layers`."""
    num_heads: Positive | None = None
    """Attention heads to keep a layer, in whole groups: all heads that share a key-value head."""
    intermediate_size: Positive | None = None
    """MLP channels to keep a layer."""
    hidden_size: Positive | None = None
    """Hidden channels to keep, the same ones all through the model."""
    importance: Literal["activation", "weight"] = "activation"
    """What heads and channels are chosen by; `weight` needs no calibration blocks."""
    calibration_blocks: Positive = 16
    """Blocks of the train cache on which layers, heads and channels are measured."""

    def __post_init__(self) -> None:
        if self.kept_layers is not None:
            if self.num_layers is not None or self.layers != "spaced":
                raise ValueError("kept_layers says it all: leave out num_layers and layers")
            if not self.kept_layers or sorted(set(self.kept_layers)) != list(self.kept_layers):
                raise ValueError("kept_layers must be rising numbers of layers, none of them twice")
        elif self.layers != "spaced" and self.num_layers is None:
            raise ValueError(f"layers is {self.layers}, but num_layers does not say how many")

    @property
    def is_cut_in_width(self) -> bool:
        """Whether heads, MLP channels or hidden channels are to go."""
        return (self.num_heads, self.intermediate_size, self.hidden_size) != (None, None, None)

    @property
    def is_calibrated(self) -> bool:
        """Whether something is measured on blocks of the train cache."""
        by_activation = self.is_cut_in_width and self.importance == "activation"
        return by_activation or self.layers != "spaced"


@dataclass(frozen=True, kw_only=True)
class ScratchShape:
    """All dimensions of a Llama but its vocabulary."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 8192


SCRATCH_SIZES = {
    "135m": ScratchShape(
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_key_value_heads=3,
        rope_theta=100_000.0,
    ),
    "360m": ScratchShape(
        hidden_size=960,
        intermediate_size=2560,
        num_layers=32,
        num_heads=15,
        num_key_value_heads=5,
        rope_theta=100_000.0,
    ),
    "1b": ScratchShape(
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_key_value_heads=8,
        rope_theta=500_000.0,
    ),
    "3b": ScratchShape(
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=28,
        num_heads=24,
        num_key_value_heads=8,
        rope_theta=500_000.0,
    ),
    "8b": ScratchShape(
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_key_value_heads=8,
        tie_embeddings=False,
        rope_theta=500_000.0,
    ),
}
"""Published shapes: SmolLM2-135M and -360M (arXiv:2502.02737), Llama 3.2 1B and 3B (config.json of
meta-llama/Llama-3.2-1B and -3B), Llama 3 8B (arXiv:2407.21783, table 3). Positions are not scaled:
8,192 are enough to train on, and a longer context is a later step."""

_DIMENSIONS = ("hidden_size", "intermediate_size", "num_layers", "num_heads")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScratchStudentConfig:
    """A Llama with random weights and the teacher's tokenizer, of a published size or of any."""

    kind: Literal["scratch"]
    size: Literal["135m", "360m", "1b", "3b", "8b"] | None = None
    """A published shape, in place of all dimensions below; the vocabulary is the tokenizer's."""
    hidden_size: Positive | None = None
    intermediate_size: Positive | None = None
    num_layers: Positive | None = None
    num_heads: Positive | None = None
    num_key_value_heads: Positive | None = None
    """By default as many as `num_heads`."""
    tie_embeddings: bool | None = None
    """Whether the head shares the embedding's weight; by default the size's own, else true."""
    rope_theta: PositiveFloat | None = None
    """By default the size's own, else 10,000."""
    max_position_embeddings: Positive | None = None
    """By default 8,192."""

    def __post_init__(self) -> None:
        given = [name for name in _DIMENSIONS if getattr(self, name) is not None]
        if self.size is not None and (given or self.num_key_value_heads is not None):
            raise ValueError("size names all dimensions: leave out either size or the dimensions")
        if self.size is None and len(given) < len(_DIMENSIONS):
            missing = [name for name in _DIMENSIONS if name not in given]
            raise ValueError(f"give either size or all dimensions; missing: {', '.join(missing)}")

    @property
    def shape(self) -> ScratchShape:
        """The dimensions, whichever way they were given."""
        if self.size is not None:
            shape = SCRATCH_SIZES[self.size]
        else:
            sizes: dict[str, Any] = {name: getattr(self, name) for name in _DIMENSIONS}
            keys = self.num_key_value_heads or sizes["num_heads"]
            shape = ScratchShape(**sizes, num_key_value_heads=keys)
        chosen: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("tie_embeddings", "rope_theta", "max_position_embeddings")
        }
        return replace(shape, **{k: value for k, value in chosen.items() if value is not None})


StudentConfig = Annotated[
    PretrainedStudentConfig | PrunedStudentConfig | ScratchStudentConfig,
    Field(discriminator="kind"),
]
