"""Cuts in width: what is measured, what goes, and that nothing else changes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from distill.errors import ConfigError
from students import width
from students.width import Importance, Width
from tests.tiny_models import FAMILIES, logits_of, make_calibration, tiny_model

BLOCKS = make_calibration(9, 12)
FULL = Width(num_heads=6, num_groups=3, intermediate_size=10, hidden_size=24)
HALF = Width(num_heads=4, num_groups=2, intermediate_size=6, hidden_size=16)


def sizes_twin(block_activations: list[list[list[float]]]) -> list[float]:
    """Importance of each unit from [block][token][unit] sizes, in plain Python."""
    units = range(len(block_activations[0][0]))
    means = [
        [sum(t[u] for t in tokens) / len(tokens) for u in units] for tokens in block_activations
    ]
    return [math.sqrt(sum(block[u] ** 2 for block in means)) for u in units]


@torch.no_grad()
def activations(model: Any, layer_number: int) -> dict[str, list[list[list[float]]]]:
    """[block][token][unit] of one layer, computed step by step rather than seen by hooks."""
    found: dict[str, list[list[list[float]]]] = {"g": [], "c": [], "first": [], "second": []}
    decoder = model.model
    for block in BLOCKS:
        hidden = decoder.embed_tokens(block.input_ids_BT)
        rotary = decoder.rotary_emb(hidden, block.position_ids_BT)
        documents = (block.position_ids_BT == 0).cumsum(-1)[0]
        allowed = (documents[:, None] == documents[None]).tril()
        mask = torch.zeros(allowed.shape, dtype=hidden.dtype).masked_fill(~allowed, -1e30)
        for number, layer in enumerate(decoder.layers):
            first = layer.input_layernorm(hidden)
            projection, layer.self_attn.o_proj = layer.self_attn.o_proj, nn.Identity()
            joined = layer.self_attn(
                first, position_embeddings=rotary, attention_mask=mask[None, None]
            )[0]
            layer.self_attn.o_proj = projection
            hidden = hidden + projection(joined)
            second = layer.post_attention_layernorm(hidden)
            mlp = layer.mlp
            inner = torch.nn.functional.silu(mlp.gate_proj(second)) * mlp.up_proj(second)
            hidden = hidden + mlp.down_proj(inner)
            if number == layer_number:
                heads = joined[0].reshape(joined.shape[1], -1, 8)  # 2 heads of 4 channels share one
                found["g"].append(
                    [[math.hypot(*group) for group in token] for token in heads.tolist()]
                )
                for name, values in (("c", inner), ("first", first), ("second", second)):
                    found[name].append([[abs(x) for x in token] for token in values[0].tolist()])
    return found


def test_activation_importance_is_that_of_plain_python() -> None:
    model = tiny_model()
    found = width.activation_importance(model, BLOCKS)
    norms = torch.zeros(24, dtype=torch.float64)
    for number in range(2):
        wanted = activations(model, number)
        torch.testing.assert_close(found.groups_LG[number], as_tensor(sizes_twin(wanted["g"])))
        torch.testing.assert_close(found.channels_LC[number], as_tensor(sizes_twin(wanted["c"])))
        norms += as_tensor(sizes_twin(wanted["first"])) + as_tensor(sizes_twin(wanted["second"]))
    torch.testing.assert_close(found.hidden_D, norms)


def as_tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("tied", [False, True])
def test_weight_importance_is_that_of_plain_python(tied: bool) -> None:
    model = tiny_model(tie_word_embeddings=tied)
    found = width.weight_importance(model)
    layer = model.model.layers[1]
    attention, mlp = layer.self_attn, layer.mlp
    for group in range(3):
        parts = [
            attention.q_proj.weight[8 * group : 8 * group + 8],
            attention.k_proj.weight[4 * group : 4 * group + 4],
            attention.v_proj.weight[4 * group : 4 * group + 4],
            attention.o_proj.weight[:, 8 * group : 8 * group + 8],
        ]
        assert float(found.groups_LG[1, group]) == pytest.approx(norm_of(parts))
    for channel in range(10):
        parts = [
            mlp.gate_proj.weight[channel],
            mlp.up_proj.weight[channel],
            mlp.down_proj.weight[:, channel],
        ]
        assert float(found.channels_LC[1, channel]) == pytest.approx(norm_of(parts))
    for channel in range(24):
        parts = [model.model.norm.weight[channel], model.model.embed_tokens.weight[:, channel]]
        parts += [] if tied else [model.lm_head.weight[:, channel]]
        for each in model.model.layers:
            parts += [each.input_layernorm.weight[channel]]
            parts += [each.post_attention_layernorm.weight[channel]]
            inward = [each.self_attn.q_proj, each.self_attn.k_proj, each.self_attn.v_proj]
            parts += [m.weight[:, channel] for m in (*inward, each.mlp.gate_proj, each.mlp.up_proj)]
            parts += [m.weight[channel] for m in (each.self_attn.o_proj, each.mlp.down_proj)]
        assert float(found.hidden_D[channel]) == pytest.approx(norm_of(parts))


def norm_of(parts: list[Tensor]) -> float:
    return math.sqrt(sum(x * x for part in parts for x in part.flatten().tolist()))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_nothing_gives_the_very_model(family: str, tied: bool) -> None:
    model = tiny_model(family, tie_word_embeddings=tied)
    same = width.cut(model, FULL, width.activation_importance(model, BLOCKS))
    for (name, ours), (other, theirs) in zip(
        same.named_parameters(), model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)
    assert torch.equal(logits_of(same, BLOCKS[0]), logits_of(model, BLOCKS[0]))
    assert same.config.to_dict() == model.config.to_dict() | {"head_dim": 4}


@pytest.mark.parametrize("measure", ["activation", "weight"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dead_heads_and_channels_go_without_a_trace(family: str, measure: str) -> None:
    model = tiny_model(family)
    for number, layer in enumerate(model.model.layers):
        group, channels = (2, 0)[number], [[0, 3, 4, 9], [1, 2, 5, 6]][number]
        attention, mlp = layer.self_attn, layer.mlp
        for projection, size in (
            (attention.q_proj, 8),
            (attention.k_proj, 4),
            (attention.v_proj, 4),
        ):
            for parameter in projection.parameters():
                parameter.data[size * group : size * (group + 1)] = 0
        attention.o_proj.weight.data[:, 8 * group : 8 * (group + 1)] = 0
        mlp.gate_proj.weight.data[channels] = 0
        mlp.up_proj.weight.data[channels] = 0
        mlp.down_proj.weight.data[:, channels] = 0
    importance = (
        width.activation_importance(model, BLOCKS)
        if measure == "activation"
        else width.weight_importance(model)
    )
    smaller = width.cut(model, Width(4, 2, 6, 24), importance)
    for block in BLOCKS:
        torch.testing.assert_close(
            logits_of(smaller, block), logits_of(model, block), rtol=0, atol=1e-12
        )
    assert smaller.model.layers[0].mlp.up_proj.weight.shape == (6, 24)
    assert smaller.model.layers[0].self_attn.k_proj.weight.shape == (8, 24)


@pytest.mark.parametrize("tied", [False, True])
def test_dead_hidden_channels_change_the_norms_divisor_alone(tied: bool) -> None:
    model, dead = tiny_model(tie_word_embeddings=tied), [0, 5, 6, 11, 20, 23]
    model.model.embed_tokens.weight.data[:, dead] = 0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[dead] = 0
        layer.mlp.down_proj.weight.data[dead] = 0
    importance = width.activation_importance(model, BLOCKS)
    smaller = width.cut(model, Width(6, 3, 10, 18), importance)
    alive = [channel for channel in range(24) if channel not in dead]
    assert torch.equal(smaller.model.norm.weight, model.model.norm.weight[alive])

    # The root mean square is now over 18 channels rather than 24. Nothing makes up for that ...
    assert not torch.allclose(logits_of(smaller, BLOCKS[0]), logits_of(model, BLOCKS[0]))
    # ... and it is all that differs; norms are computed in float32.
    for module in smaller.modules():
        if hasattr(module, "variance_epsilon"):
            module.weight.data *= math.sqrt(24 / 18)
            module.variance_epsilon *= 24 / 18
    torch.testing.assert_close(
        logits_of(smaller, BLOCKS[0]), logits_of(model, BLOCKS[0]), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("measure", ["activation", "weight"])
def test_order_of_channels_in_the_full_model_does_not_matter(measure: str) -> None:
    model, shuffled = tiny_model(), tiny_model()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    mlp = shuffled.model.layers[0].mlp
    mlp.gate_proj.weight.data = mlp.gate_proj.weight.data[order]
    mlp.up_proj.weight.data = mlp.up_proj.weight.data[order]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, order]
    smaller = [
        width.cut(
            each,
            HALF,
            width.activation_importance(each, BLOCKS)
            if measure == "activation"
            else width.weight_importance(each),
        )
        for each in (model, shuffled)
    ]
    torch.testing.assert_close(logits_of(smaller[0], BLOCKS[1]), logits_of(smaller[1], BLOCKS[1]))


def test_of_equally_important_units_the_first_stay() -> None:
    model = tiny_model()
    equal = Importance(*(torch.ones(*shape) for shape in ((2, 3), (2, 10), (24,))))
    smaller = width.cut(model, HALF, equal)
    wanted = model.model.layers[1].mlp.up_proj.weight[:6, :16]
    assert torch.equal(smaller.model.layers[1].mlp.up_proj.weight, wanted)
    wanted = model.model.layers[1].self_attn.o_proj.weight[:16, :16]
    assert torch.equal(smaller.model.layers[1].self_attn.o_proj.weight, wanted)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_cut_model_is_a_plain_one_that_saves_opens_and_generates(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = tiny_model(family, tie_word_embeddings=tied).float()
    smaller = width.cut(model, HALF, width.activation_importance(model, BLOCKS))
    assert (smaller.lm_head.weight is smaller.model.embed_tokens.weight) == tied
    assert {p.dtype for p in smaller.parameters()} == {torch.float32}
    assert all(p.requires_grad and not p.is_meta for p in smaller.parameters())
    smaller.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    config = again.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 4)
    assert (config.intermediate_size, config.hidden_size) == (6, 16)
    assert torch.equal(logits_of(again, BLOCKS[0]), logits_of(smaller, BLOCKS[0]))
    ids = torch.arange(5)[None]
    made = again.generate(ids, max_new_tokens=4, do_sample=False)
    slow = again.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(made, slow)


def test_biases_are_cut_along(tmp_path: Path) -> None:
    model = tiny_model(attention_bias=True, mlp_bias=True)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[:, 16:] = 0
        layer.mlp.down_proj.weight.data[:, 6:] = 0
    falling = [-torch.arange(size).expand(2, size).double() for size in (3, 10)]
    first = Importance(falling[0], falling[1], torch.ones(24))
    smaller = width.cut(model, Width(4, 2, 6, 24), first)
    wanted = logits_of(model, BLOCKS[0])
    torch.testing.assert_close(logits_of(smaller, BLOCKS[0]), wanted, rtol=0, atol=1e-12)
    smaller.float().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(
        again.model.layers[1].mlp.up_proj.bias, smaller.model.layers[1].mlp.up_proj.bias
    )


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny_model().train()
    width.activation_importance(model, BLOCKS)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ((8, None, None), "num_heads is 8, but the model has 6"),
        ((3, None, None), "num_heads is 3, but 2 heads share .* give a multiple of 2"),
        ((None, 11, 25), "intermediate_size is 11, .* has 10.*\n.*hidden_size is 25, .* has 24"),
    ],
)
def test_impossible_widths_are_refused(wanted: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        width.plan(tiny_model(), *wanted)


def test_what_transformers_could_not_open_is_not_made() -> None:
    with pytest.raises(ConfigError, match=r"not a multiple .*Try student\.hidden_size=18"):
        width.plan(tiny_model(), None, None, 20)
    assert width.plan(tiny_model(), None, None, 18) == Width(6, 3, 10, 18)


def test_other_families_are_refused() -> None:
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10))
    with pytest.raises(ConfigError, match="'gpt2' cannot be cut in width, only llama, mistral"):
        width.plan(other, 1, None, None)


def test_unknown_parameters_are_refused() -> None:
    model = tiny_model()
    model.model.layers[0].mlp.gate_proj.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigError, match=r"gate_proj\.scale' is not known"):
        width.weight_importance(model)
