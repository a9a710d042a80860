"""Models in numbers: parameters, FLOPs of a forward pass, bytes of weights. Pure arithmetic."""

import re
from dataclasses import dataclass
from functools import cache

from distill.hardware import Device


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder of the Llama family: gated MLP, grouped-query attention, RMS norms."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_embeddings: bool = False
    extra_layer_parameters: int = 0
    """Of a layer beyond its matrices and two norms: biases, norms of queries and keys."""

    @property
    def linear_parameters(self) -> dict[str, int]:
        """Parameters of each matrix of a decoder layer, by its name in the checkpoint."""
        hidden, mlp = self.hidden_size, self.hidden_size * self.intermediate_size
        query = hidden * self.num_heads * self.head_dim
        key = hidden * self.num_key_value_heads * self.head_dim
        return {
            "self_attn.q_proj": query,
            "self_attn.k_proj": key,
            "self_attn.v_proj": key,
            "self_attn.o_proj": query,
            "mlp.gate_proj": mlp,
            "mlp.up_proj": mlp,
            "mlp.down_proj": mlp,
        }

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        norms = 2 * self.hidden_size
        return sum(self.linear_parameters.values()) + norms + self.extra_layer_parameters

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding, and of a head that is not tied to it."""
        return self.vocab_size * self.hidden_size

    @property
    def multiplied_parameters(self) -> int:
        """Parameters that multiply for each token: layers, last norm, head; no input embedding."""
        layers = self.num_layers * self.layer_parameters
        return layers + self.hidden_size + self.embedding_parameters

    @property
    def num_parameters(self) -> int:
        """All parameters; a tied embedding counts once."""
        return self.multiplied_parameters + (
            0 if self.tie_embeddings else self.embedding_parameters
        )

    def attention_flops_per_token(self, block_length: int) -> float:
        """Scores and weighted sums over an average context of half a block.

        4 * layers * heads * head_dim * block_length / 2: two products of two FLOPs each.
        """
        return 4.0 * self.num_layers * self.num_heads * self.head_dim * block_length / 2

    def flops_per_token(self, block_length: int) -> float:
        """FLOPs of the forward pass: 2 * multiplied parameters + attention."""
        return 2.0 * self.multiplied_parameters + self.attention_flops_per_token(block_length)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How the parameters of a checkpoint are stored."""

    parameter_bytes: float
    """Of a parameter that is not quantised."""
    quantised_bits: int | None = None
    """Of a quantised parameter; None: nothing is quantised."""
    multiplies_fp8: bool = False
    """Whether quantised matrices multiply in FP8, where the device can."""
    kept: tuple[str, ...] = ()
    """Modules left as they are: dotted names or parts of them, or `re:` and a pattern."""

    def quantised_parameters(self, shape: ModelShape) -> int:
        """Parameters of the layers' matrices that are quantised; embedding and head never are."""
        return sum(quantised_in_layer(self, shape, layer) for layer in range(shape.num_layers))

    def num_bytes(self, shape: ModelShape) -> float:
        """Bytes of all weights; the scales of quantised matrices are left out (below 1 %)."""
        return self._bytes(shape.num_parameters, self.quantised_parameters(shape))

    def streamed_bytes(self, shape: ModelShape) -> float:
        """Bytes that pass by in one window: all but the input embedding, of which rows are read."""
        return self._bytes(shape.multiplied_parameters, self.quantised_parameters(shape))

    def layer_bytes(self, shape: ModelShape, layer: int) -> float:
        """Bytes of one decoder layer."""
        return self._bytes(shape.layer_parameters, quantised_in_layer(self, shape, layer))

    def flop_rate(self, shape: ModelShape, block_length: int, device: Device, mfu: float) -> float:
        """FLOP/s that one device reaches on this model: `mfu` of the peak of each part's format.

        With s the share of FLOPs in FP8: mfu / (s / FP8 peak + (1 - s) / bfloat16 peak). Float32
        is taken as TF32, at half the peak of bfloat16.
        """
        peak = device.bf16_flops / (2 if self.parameter_bytes == 4 else 1)
        fp8_peak = device.fp8_flops if self.multiplies_fp8 else None
        share = 2 * self.quantised_parameters(shape) / shape.flops_per_token(block_length)
        return mfu / (share / (fp8_peak or peak) + (1 - share) / peak)

    def _bytes(self, parameters: int, quantised: int) -> float:
        rest = (parameters - quantised) * self.parameter_bytes
        return rest + quantised * (self.quantised_bits or 0) / 8


@cache
def quantised_in_layer(weights: Weights, shape: ModelShape, layer: int) -> int:
    """Parameters of one decoder layer that are quantised: its matrices but for those kept."""
    if weights.quantised_bits is None:
        return 0
    names = {f"model.layers.{layer}.{name}": size for name, size in shape.linear_parameters.items()}
    return sum(size for name, size in names.items() if not _matches(name, weights.kept))


def _matches(module: str, entries: tuple[str, ...]) -> bool:
    return any(
        re.match(entry[3:], module) if entry.startswith("re:") else f".{entry}." in f".{module}."
        for entry in entries
    )
