"""Phi4Flash exports against `phi4flash_reference.py`, and the public config against the family."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.hf import phi4flash
from tests.hf.phi4flash_reference import logits
from tests.hf.test_folder import assert_bitwise
from tests.model.building import build
from tests.model.test_reference import randomise

MULTIPLIERS = {"logit_multiplier": 0.7, "residual_multiplier": 0.4, "softmax_scale": 0.6}
EXACT = {"logit_multiplier": 0.5, "residual_multiplier": 0.25, "softmax_scale": 2 / math.sqrt(8)}
RUN = {"options": {"seq_length": 24}}
# As published, without what concerns generation alone.
PUBLIC: dict[str, Any] = {
    "model_type": "phi4flash", "architectures": ["Phi4FlashForCausalLM"], "vocab_size": 200064, "hidden_size": 2560,
    "intermediate_size": 10240, "num_hidden_layers": 32, "num_attention_heads": 40, "num_key_value_heads": 20,
    "max_position_embeddings": 262144, "sliding_window": 512, "hidden_act": "silu", "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "mb_per_layer": 2, "mamba_d_state": 16, "mamba_d_conv": 4,
    "mamba_expand": 2, "mamba_dt_rank": "auto", "mamba_conv_bias": True, "mamba_proj_bias": False,
}  # fmt: skip
IN_LAYERS = [512 if layer < 16 and layer % 2 else None for layer in range(32)]  # as the original class writes it


def architecture(tied: bool = True, **changes: Any) -> Architecture:
    """Depth 8, width 64: 8 heads of 8 channels, 4 key-value heads, a window of 5."""
    arch = build_architecture(
        "phi4miniflash", 8, aspect_ratio=8, head_dim=8, num_heads=8, num_kv_heads=4, local_window=5, vocab_size=96,
        tied_embeddings=tied,
    )  # fmt: skip
    return dataclasses.replace(arch, **changes)


def exported(arch: Architecture, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor
        for one in phi4flash.maps(arch)
        for name, tensor in zip(one.hf, one.to_hf([parameters[key] for key in one.megatron]), strict=True)
    }


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("tied", [True, False])
def test_the_public_model_computes_the_same(tied: bool) -> None:
    arch = architecture(tied, **MULTIPLIERS)
    model = build(arch)
    randomise(model)
    tokens = torch.randint(96, (24,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        got = model(tokens[None].cuda(), torch.arange(24)[None].cuda(), None)[0].cpu()
    parameters = {name: p.detach().cpu().double() for name, p in model.named_parameters()}
    weights = exported(arch, parameters)
    config = phi4flash.config(arch, RUN)
    expected = logits(config, weights, tokens)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    for mistake in ("window", "lambda"):
        assert (got - logits(config, weights, tokens, mistake)).abs().max() > 5e-3 * expected.abs().max()
    for name in ("embed_tokens.weight", "out_proj.bias", "Wqkv.bias", "fc2.weight", "final_layernorm.bias"):
        other = weights | {n: 1.1 * w for n, w in weights.items() if n.endswith(name)}
        assert (got - logits(config, other, tokens)).abs().max() > 5e-3 * expected.abs().max(), name
    assert set(parameters) == {name for one in phi4flash.maps(arch) for name in one.megatron}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("multipliers", [{}, EXACT], ids=["plain", "powers of 2"])
def test_every_map_goes_both_ways(tied: bool, multipliers: dict[str, float]) -> None:
    arch = architecture(tied, **multipliers)
    draw = torch.Generator().manual_seed(3)
    for one in phi4flash.maps(arch):
        there = [torch.randn(shape, generator=draw) for shape in one.megatron_shapes().values()]
        hf = one.to_hf(there)
        assert [tuple(tensor.shape) for tensor in hf] == list(one.hf_shapes().values())
        for back, tensor in zip(one.to_megatron(hf), there, strict=True):
            assert_bitwise(back, tensor)


def test_names_are_the_public_ones() -> None:
    names = {name for one in phi4flash.maps(architecture()) for name in one.hf}
    mamba = ("in_proj", "x_proj", "dt_proj", "out_proj", "conv1d")
    lambdas = {f"inner_cross_attn.lambda_{which}" for which in ("q1", "k1", "q2", "k2")}
    heads = {"Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias", "inner_cross_attn.subln.weight", *lambdas}
    norms = {f"{norm}.{p}" for norm in ("input_layernorm", "post_attention_layernorm") for p in ("weight", "bias")}
    expected = {"model.embed_tokens.weight", "model.final_layernorm.weight", "model.final_layernorm.bias"}
    for layer in range(8):
        if layer % 2:
            mixer = heads
        elif layer <= 4:
            mixer = {f"{name}.weight" for name in mamba} | {"conv1d.bias", "dt_proj.bias", "A_log", "D"}
        else:
            mixer = {"in_proj.weight", "out_proj.weight"}
        rest = {"mlp.fc1.weight", "mlp.fc2.weight", *norms, *(f"attn.{name}" for name in mixer)}
        expected |= {f"model.layers.{layer}.{name}" for name in rest}
    assert names == expected


@pytest.mark.parametrize("windows", [512, IN_LAYERS])
def test_the_published_config_is_the_family_at_depth_32(windows: object) -> None:
    arch = phi4flash.architecture(PUBLIC | {"sliding_window": windows})
    assert arch == build_architecture("phi4miniflash", 32)
    assert phi4flash.fits(arch)
    written = phi4flash.config(arch, {"options": {"seq_length": 262144}})
    assert {name: written[name] for name in PUBLIC if name != "torch_dtype"} == {
        name: value for name, value in PUBLIC.items() if name != "torch_dtype"
    }
    assert [kind == "sliding_attention" for kind in written["layer_types"]] == [w is not None for w in IN_LAYERS]
    assert phi4flash.architecture(written) == arch


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_hidden_layers", 30), ("num_attention_heads", 39), ("num_key_value_heads", 3), ("hidden_act", "gelu"),
        ("mb_per_layer", 4), ("mamba_d_state", 8), ("mamba_d_conv", 3), ("mamba_expand", 1), ("mamba_dt_rank", 64),
        ("mamba_proj_bias", True), ("layer_norm_eps", 1e-6), ("sliding_window", None), ("sliding_window", [512] * 32),
        ("layer_types", ["sliding_attention"] * 32),
    ],
)  # fmt: skip
def test_refuses_a_config_of_another_model(field: str, value: object) -> None:
    message = "key-value heads" if field == "num_key_value_heads" else field
    with pytest.raises(ValueError, match=message) as error:
        phi4flash.architecture(PUBLIC | {field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", [name for name in phi4flash.NEEDED])
def test_names_a_missing_field(field: str) -> None:
    with pytest.raises(ValueError, match=f"config.json lacks {field}"):
        phi4flash.architecture({name: value for name, value in PUBLIC.items() if name != field})


CHANGES: list[Callable[[Architecture], dict[str, Any]]] = [
    lambda arch: {"head_dim": 16},
    lambda arch: {"rotary_base": 10000},
    lambda arch: {"full_window": 12},
    lambda arch: {"normalization": "RMSNorm"},
    lambda arch: {"pattern": arch.pattern.replace("U", "X")},
    lambda arch: {"pattern": arch.pattern.replace("W", "*")},
    lambda arch: {"memory_source": "*"},
    lambda arch: {"norm_epsilon": 1e-6},
    lambda arch: {"state_size": 8},
    *[
        (lambda arch, name=name: {name: not getattr(arch, name)})  # type: ignore[misc]
        for name in (
            "differential_attention", "qkv_bias", "attention_output_bias", "linear_bias", "attention_gate",
            "attention_sink", "qk_norm",
        )
    ],
]  # fmt: skip


def test_fits_what_the_public_code_can_express() -> None:
    arch = architecture(**MULTIPLIERS)
    assert phi4flash.fits(arch) and phi4flash.fits(architecture(tied=False))
    for change in CHANGES:
        assert not phi4flash.fits(dataclasses.replace(arch, **change(arch))), change(arch)
    for family in FAMILIES:
        assert phi4flash.fits(build_architecture(family, 16)) == (family == "phi4miniflash")
