"""The maps of a format are those of the model class, and a config.json says the whole architecture."""

import dataclasses
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.hf import archscale, llama
from archscale_megatron.hf.configuration_archscale import ArchScaleConfig
from archscale_megatron.hf.modeling_archscale import ArchScaleForCausalLM
from tests.hf.cases import architecture
from tests.hf.logits import CASES, Case

RUN = {"options": {"seq_length": 77}}


def name(case: Case) -> str:
    return f"{case[0]}-{'tied' if case[1] else 'untied'}"


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("case", CASES, ids=name)
def test_archscale(case: Case) -> None:
    arch = architecture(*case)
    config = json.loads(json.dumps(archscale.config(arch, RUN)))
    assert archscale.architecture(config) == arch
    assert config["max_position_embeddings"] == 77
    with torch.device("meta"):
        model = ArchScaleForCausalLM(ArchScaleConfig.from_dict(config))
    shapes = [one.hf_shapes() for one in archscale.maps(arch)]
    assert {name: shape for one in shapes for name, shape in one.items()} == shapes_of(model)
    assert sum(map(len, shapes)) == len(shapes_of(model))  # none is there twice


@pytest.mark.parametrize("case", [case for case in CASES if llama.fits(architecture(*case))], ids=name)
def test_llama(case: Case) -> None:
    arch = architecture(*case)
    config = json.loads(json.dumps(llama.config(arch, RUN)))
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    assert {name: shape for one in llama.maps(arch) for name, shape in one.hf_shapes().items()} == shapes_of(model)
    # What is folded is no longer there.
    plain = {"logit_multiplier": 1.0, "residual_multiplier": 1.0, "router_multiplier": 1.0, "softmax_scale": None}
    absent = {"window": 128, "mamba2_head_dim": 64, "mamba2_state_size": 128, "gdn_head_dim": 256}
    assert llama.architecture(config) == dataclasses.replace(arch, **plain, **absent, family="transformer")


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_sink": True},
        {"attention_gate": True},
        {"qk_norm": True},
        {"differential_attention": True},
        {"qkv_bias": True},
        {"attention_output_bias": True},
        {"normalization": "LayerNorm"},
        {"rotary_base": None},
        {"full_window": 9},
        {"pattern": "W-*-*-*-"},
        {"pattern": "*E*-*-*-"},
    ],
    ids=str,
)
def test_what_llama_has_not(changes: dict) -> None:
    arch: Architecture = architecture("transformer", True)
    assert llama.fits(arch)
    assert not llama.fits(dataclasses.replace(arch, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; Llama models are trained here with 'silu'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling is .*; Llama models are trained here with None"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5; a base is a whole number here"),
        ({"rope_parameters": {"rope_theta": 0.5}}, "rope_theta is 0.5; a base is a whole number here"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters is .*; Llama models are .* with plain RoPE"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters is .* plain RoPE"),
        ({"rope_parameters": "default"}, "rope_parameters is 'default'; Llama models are trained here with plain RoPE"),
        ({"vocab_size": None}, "config.json lacks vocab_size"),
    ],
)
def test_llama_configs_that_are_refused(changes: dict, message: str) -> None:
    config = llama.config(architecture("transformer", True), RUN) | changes
    config = {name: value for name, value in config.items() if changes.get(name, 1) is not None}
    with pytest.raises(ValueError, match=message):
        llama.architecture(config)


def test_rope_base_of_newer_configs() -> None:
    """transformers 5 writes it in `rope_parameters`."""
    config = llama.config(architecture("transformer", True), RUN)
    del config["rope_theta"], config["rope_scaling"]
    assert llama.architecture(config).rotary_base == 10_000
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    assert llama.architecture(config | {"rope_parameters": rope}).rotary_base == 500_000


def test_an_archscale_config_without_a_field() -> None:
    config = archscale.config(architecture("sambay", True), RUN)
    del config["window"]
    with pytest.raises(ValueError, match="config.json lacks window"):
        archscale.architecture(config)
