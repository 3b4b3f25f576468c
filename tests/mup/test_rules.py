"""The tables of SP, μP, μP++ and HyperP against ArchScale's code and paper, written down a second time here."""

import dataclasses
import math

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig, _get_param_groups

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.mup import classes
from archscale_megatron.mup.classes import MATRICES, ParameterClass, parameter_class
from archscale_megatron.mup.initialization import initial_values, named_global_parameters
from archscale_megatron.mup.overrides import optimizer_overrides
from archscale_megatron.mup.rules import NAMES, RELEASES, TABLES, Parametrization
from tests.model.building import build
from tests.parallel.layouts import OWN, TINY, tiny

pytestmark = pytest.mark.usefixtures("one_process")

OPTIONS = {
    "transformer": ("attention_sink", "attention_gate", "qk_norm", "qkv_bias", "attention_output_bias", "linear_bias"),
    "sambay": ("differential_attention", "attention_gate", "qk_norm", "qkv_bias", "linear_bias"),
    "sambay2": ("linear_bias", "attention_output_bias"),
}


def models() -> dict[str, Architecture]:
    """Every family, and every option, tied and untied."""
    found = {f"{name} {tied}": tiny(name, tied) for name in FAMILIES for tied in (True, False)}
    for family, options in OPTIONS.items():
        numbers = TINY | OWN.get(family, {}) | {"num_heads": 8, "num_kv_heads": 4}
        found[f"{family} with options"] = build_architecture(
            family, **numbers, normalization="LayerNorm", **dict.fromkeys(options, True)
        )
    return found


@pytest.mark.parametrize("model", models())
def test_every_parameter_is_in_one_class_and_archscale_s_group(model: str) -> None:
    """ArchScale's matrices are what has "weight" in its name and none of these words, after its own names."""
    chunk = build(models()[model], init_model_with_meta_device=True)
    for name, parameter in named_global_parameters(chunk):
        kind = parameter_class(name)
        vector = "weight" not in name or any(word in name for word in ("conv1d", "embedding", "output_layer", "norm"))
        assert (kind not in MATRICES) is vector, f"{name} is a {kind}"
        assert kind not in MATRICES or parameter.dim() == 2


def test_experts_of_a_grouped_product() -> None:
    assert parameter_class("decoder.layers.1.mixer.experts.linear_fc1.weight12") is ParameterClass.MATRIX
    assert parameter_class("decoder.layers.1.mixer.experts.linear_fc2.weight0") is ParameterClass.LAST_MATRIX


@pytest.mark.parametrize("name", ["decoder.layers.3.mixer.in_proj.weights", "decoder.layers.0.mixer.A", "weight", ""])
def test_a_parameter_without_a_class_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"parameter {name} is in no class; mup/classes.py"):
        parameter_class(name)


def test_a_parameter_in_two_classes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    both = classes._PATTERNS | {ParameterClass.SKIP: classes._PATTERNS[ParameterClass.DECAY]}
    monkeypatch.setattr(classes, "_PATTERNS", both)
    with pytest.raises(ValueError, match="mixer.A_log is in the classes state decay, skip"):
        parameter_class("decoder.layers.0.mixer.A_log")


# Of facts on e77b786: the standard deviation of each kind of weight, hidden size 64 (kernel 4, depth 8).
FC1, FC2 = "decoder.layers.1.mixer.linear_fc1.weight", "decoder.layers.1.mixer.linear_fc2.weight"
DT = "decoder.layers.0.mixer.dt_proj.weight"
SHAPES = {
    "embedding.word_embeddings.weight": (96, 64), "output_layer.weight": (96, 64), FC1: (512, 64), FC2: (64, 256),
    DT: (128, 4), "decoder.layers.0.mixer.conv1d.bias": (128,), "decoder.layers.0.mixer.conv1d.weight": (128, 1, 4),
}  # fmt: skip
THIRD = 1 / math.sqrt(3)
CONV = 0.5 * THIRD
EXPECTED = {
    # (parametrisation, tied): embedding, output layer, fc1, fc2, dt_proj, conv bias, conv weight
    ("sp", True): (0.02, None, 0.02, 0.02 / 4, 0.02, CONV, CONV),
    ("sp", False): (1e-4, 0.02, 0.02, 0.02 / 4, 0.02, CONV, CONV),
    ("mup", True): (0.02, None, THIRD / 8, THIRD / 16 / 4, THIRD / 2, CONV, CONV),
    ("mup++", True): (0.02, None, THIRD / 8, THIRD / 16 / 4, THIRD / 2, CONV, CONV),
    ("mup++", False): (1e-4, 0.0, THIRD / 8, THIRD / 16, THIRD / 2, CONV, CONV),
    ("mup", False): (1e-4, 0.0, THIRD / 8, THIRD / 16, THIRD / 2, CONV, CONV),
    ("hyperp", False): (1e-4, 0.02, THIRD / 8, THIRD / 16, THIRD / 2, CONV, CONV),
}


@pytest.mark.parametrize(("name", "tied"), EXPECTED)
def test_standard_deviations(name: str, tied: bool) -> None:
    """What the table says, and what is drawn."""
    arch = tiny("sambay", tied)
    for (parameter, shape), std in zip(SHAPES.items(), EXPECTED[name, tied], strict=True):
        if std is None:
            continue
        run = Parametrization(name, width_ratio=2.0)
        assert math.isclose(run.initial(parameter, shape, arch).std, std, rel_tol=1e-12)
        drawn = initial_values(parameter, shape, arch, run, torch.Generator().manual_seed(1)).double().std(correction=0)
        assert abs(drawn - std) <= 3 * std / math.sqrt(math.prod(shape)), parameter  # of a normal: 4 deviations


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("release", RELEASES)
def test_printed_standard_deviations_are_those_of_the_draws(name: str, release: str) -> None:
    """Of every class and of all three kinds of A_log, 200,000 values each."""
    run = Parametrization(name, release=release)
    for family in ("sambay2", "sgdny", "sambayda"):
        arch = tiny(family, tied=False)
        for parameter, value in named_global_parameters(build(arch, init_model_with_meta_device=True)):
            if parameter.startswith("decoder.layers.") and not parameter.startswith(
                ("decoder.layers.0", "decoder.layers.1.")
            ):
                continue
            shape = (200_000 // (value.numel() // len(value)), *value.shape[1:])
            drawn = initial_values(parameter, shape, arch, run, torch.Generator().manual_seed(1)).double()
            std = run.initial(parameter, shape, arch).std
            assert abs(drawn.std(correction=0) - std) <= 0.01 * std + 1e-12, parameter


def test_bound_follows_init_scale_and_the_release_its_changes() -> None:
    arch = tiny("sambay", tied=False)
    assert math.isclose(Parametrization("mup++", init_scale=0.5).initial(FC1, (512, 64), arch).std, THIRD / 16)
    bias = "decoder.layers.0.mixer.conv1d.bias"
    of_2026 = Parametrization("mup++", release="2026-03")
    assert of_2026.initial(bias, (128,), arch).std == 0
    assert of_2026.initial(bias.replace("bias", "weight"), (128, 1, 4), arch).std == CONV
    assert of_2026.initial("output_layer.weight", (96, 64), arch).std == 0.02


def test_tables_have_every_class() -> None:
    assert set(TABLES) == set(NAMES)
    for table in TABLES.values():
        assert set(table) == set(ParameterClass)


# (learning rate of matrices, decay of vectors, decay of matrices, logits, residual, softmax, router)
W = 2.5
SCALES = {
    ("sp", False, "2025-07"): (1, True, True, 1, 1, None, 1),
    ("mup", False, "2025-07"): (1 / W, True, True, 1 / W, 1, math.sqrt(128) / 8, 1 / W),
    ("mup++", False, "2025-07"): (1 / W, False, True, 1 / W, 1 / 4, math.sqrt(128) / 8, 1 / W),
    ("mup++", True, "2025-07"): (1 / W, False, True, 1 / W, 1 / 4, math.sqrt(128) / 8, 1),
    ("mup++", True, "2026-03"): (1, False, True, 1 / W, 1 / 4, math.sqrt(128) / 8, 1),
    ("hyperp", True, "2026-03"): (1, False, False, 1, 1 / 4, math.sqrt(128) / 8, 1),
}


@pytest.mark.parametrize(("name", "muon", "release"), SCALES)
def test_multipliers_and_groups(name: str, muon: bool, release: str) -> None:
    rate, vectors_decay, matrices_decay, *multipliers = SCALES[name, muon, release]
    run = Parametrization(name, width_ratio=W, muon=muon, release=release)
    arch = run.apply(tiny("sambay_gqa4_moe"))
    found = arch.logit_multiplier, arch.residual_multiplier, arch.softmax_scale, arch.router_multiplier
    assert found == tuple(multipliers)
    assert dataclasses.replace(
        arch, logit_multiplier=1.0, residual_multiplier=1.0, softmax_scale=None, router_multiplier=1.0
    ) == tiny("sambay_gqa4_moe")
    for kind in ParameterClass:
        matrix = kind in MATRICES
        assert run.learning_rate_multiplier(kind) == (rate if matrix else 1)
        assert run.decays(kind) is (matrices_decay if matrix else vectors_decay)


@pytest.mark.parametrize("name", NAMES)
def test_megatron_makes_the_groups(name: str) -> None:
    """Every parameter in one group, with the rate and the decay of its class; the logged rate is that of vectors."""
    run = Parametrization(name, width_ratio=W)
    chunk = build(tiny("sambay_gqa4_moe", tied=False))
    config = OptimizerConfig(optimizer="adam", lr=0.5, min_lr=0.05, weight_decay=0.1, adam_eps=1e-8)
    groups = _get_param_groups([chunk], config, optimizer_overrides(run, config))
    seen = {id(parameter): group for group in groups for parameter in group["params"]}
    parameters = dict(named_global_parameters(chunk))
    assert len(seen) == sum(len(group["params"]) for group in groups) == len(parameters)
    for parameter, value in parameters.items():
        group, kind = seen[id(value)], parameter_class(parameter)
        multiplier = run.learning_rate_multiplier(kind)
        assert (group["max_lr"], group["min_lr"]) == (0.5 * multiplier, 0.05 * multiplier)
        assert group["wd_mult"] == run.decays(kind)
        assert "eps" not in group
        assert group["default_config"] is (multiplier == 1)
