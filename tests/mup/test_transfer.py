"""Transfer laws against the paper's table and against ArchScale's formulas, written out again."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from archscale_megatron.archs.build import build_architecture
from archscale_megatron.mup.rules import Parametrization
from archscale_megatron.mup.transfer import (
    BASES,
    BaseHyperparameters,
    Hyperparameters,
    parameters,
    rounded_batch,
    target_tokens,
    transfer,
)

JULY, MARCH = BASES["2025-07"], BASES["2026-03"]
DEPTHS = (8, 12, 16, 20, 24)


def found(run: Parametrization, depth: int, base: BaseHyperparameters = JULY, **given: Any) -> Hyperparameters:
    given = {"batch_tokens": 2**21, "train_tokens": 10**11} | given
    run = replace(run, width_ratio=depth / base.d0)
    return transfer(base, run, build_architecture("transformer", depth), **given)


# Table 7 of arXiv 2507.06607 with more digits: depth -> vector and matrix learning rate, logit multiplier, residual
# multiplier, tokens and steps of the transformer, and of SambaY.
TABLE = {
    8: ("5.6569e-04", "1.1314e-03", "2.0000", "0.2500", "12.50", 5960, "12.67", 6041),
    12: ("4.6188e-04", "6.1584e-04", "1.3333", "0.2041", "42.19", 20116, "42.76", 20390),
    16: ("4.0000e-04", "4.0000e-04", "1.0000", "0.1768", "100.00", 47683, "101.36", 48334),
    20: ("3.5777e-04", "2.8622e-04", "0.8000", "0.1581", "195.31", 93132, "197.98", 94402),
    24: ("3.2660e-04", "2.1773e-04", "0.6667", "0.1443", "337.50", 160932, "342.10", 163127),
}
MORE_TOKENS = {
    "sambayoco": ("12.66", "42.71", "101.25", "197.75", "341.71"),
    "samba": ("12.77", "43.11", "102.19", "199.60", "344.90"),
}
# df4e070, README: 50 tokens a parameter, untied.
MOE_TOKENS = ("10.40", "28.49", "61.88", "115.59", "194.67")


@pytest.mark.parametrize("depth", DEPTHS)
def test_table_of_the_paper(depth: int) -> None:
    run = Parametrization("mup++", width_ratio=depth / 16)
    hps = found(run, depth, batch_tokens=rounded_batch(JULY.b0, 8 * 2 * 4096, "2025-07"))
    multiplied = run.apply(build_architecture("sambay", depth))
    row = [f"{hps.learning_rate:.4e}", f"{hps.matrix_learning_rate:.4e}"]
    row += [f"{multiplied.logit_multiplier:.4f}", f"{multiplied.residual_multiplier:.4f}"]
    for family in ("transformer", "sambay"):
        tokens = target_tokens(JULY, build_architecture(family, depth), "2025-07")
        row += [f"{tokens / 1e9:.2f}", tokens // 2**21]  # type: ignore[list-item]
    assert tuple(row) == TABLE[depth]
    index = DEPTHS.index(depth)
    for family, expected in MORE_TOKENS.items():
        assert f"{target_tokens(JULY, build_architecture(family, depth), '2025-07') / 1e9:.2f}" == expected[index]
    moe = build_architecture("transformer_gqa4_h2_moe", depth, tied_embeddings=False)
    base = replace(MARCH, t0=10_400_000_000)
    assert f"{target_tokens(base, moe, '2026-03', count_embeddings=True) / 1e9:.2f}" == MOE_TOKENS[index]


@pytest.mark.parametrize(
    ("family", "aspect_ratio", "law"),
    [
        ("transformer", 128, lambda r: 14.5 * r**2),
        ("transformerls", 128, lambda r: 14.5 * r**2),
        ("samba", 122, lambda r: 15 * r**2 + 160 * r),
        *((family, 124, lambda r: 14.5 * r**2 + 144 * r) for family in ("sambay", "sambayda", "sambay2")),
        ("phi4miniflash", 80, lambda r: 14.5 * r**2 + 144 * r),
        *((f, 126, lambda r: 13.5 * r**2 + 208 * r) for f in ("sambayoco", "sambayattn", "sambayattnall")),
        *((family, 120, lambda r: 16 * r**2 + 64 * r) for family in ("mambay", "mambay2", "gdny")),
        ("sgdny", 126, lambda r: 16 * r**2 + 64 * r),
        ("sambaymlp", 120, lambda r: 15.5 * r**2 + 144 * r),
    ],
)
def test_parameters_of_july(family: str, aspect_ratio: int, law: Any) -> None:
    assert parameters(build_architecture(family, 16), "2025-07") == law(aspect_ratio) * 16**3
    if family not in ("transformer", "transformerls", "phi4miniflash"):
        assert parameters(build_architecture(family, 8, aspect_ratio=10), "2025-07") == law(10) * 8**3


def test_parameters_of_march() -> None:
    """Transformers by their heads; what July knows otherwise; and the base model is the same family's."""
    transformer = build_architecture("transformer_gqa4_h2", 12)
    width, heads = 128 * 12, 2 * 12 * 128
    assert parameters(transformer, "2026-03") == 12 * (12 * width**2 + 2 * width * (heads + 4 * 128))
    assert parameters(build_architecture("swayoco", 8), "2026-03") == (12 * 130**2 + 288 * 130) * 8**3
    sambay = build_architecture("sambay_gqa4_moe", 16)
    assert parameters(sambay, "2026-03") == parameters(build_architecture("sambay", 16), "2025-07")
    assert target_tokens(MARCH, sambay, "2026-03") == 8 * 9_500_000_000
    tied, untied = (build_architecture("sambay", 16, tied_embeddings=tied) for tied in (True, False))
    n, m = 14.5 * 124**2 + 144 * 124, 124 * 32000
    for arch, copies in ((tied, 1), (untied, 2)):
        expected = 9.5e9 * (n * 16**3 + copies * m * 16) / (n * 8**3 + copies * m * 8)
        assert target_tokens(MARCH, arch, "2026-03", count_embeddings=True) == int(expected)


@pytest.mark.parametrize(
    ("family", "depth", "options", "release", "what"),
    [
        ("mamba", 8, {}, "2025-07", "mamba; there is one for transformer, .*, sambaymlp"),
        ("mamba", 8, {}, "2026-03", "mamba; there is one for .*, swayoco, other transformers"),
        ("swayoco", 8, {}, "2025-07", "swayoco; there is one for .*, sambaymlp"),
        ("samba", 10, {}, "2025-07", "samba at depth 10, which is no multiple of 4"),
        ("sambay", 8, {"head_dim": 64}, "2025-07", "sambay with 8 heads and 2 key-value heads of 64"),
        ("transformer", 8, {"num_kv_heads": 8}, "2026-03", "transformer with 8 heads and 8 key-value heads of 128"),
    ],
)
def test_no_law(family: str, depth: int, options: dict[str, int], release: Any, what: str) -> None:
    with pytest.raises(ValueError, match=f"^ArchScale {release} has no law .* of {what}: give --max-tokens$"):
        target_tokens(BASES[release], build_architecture(family, depth, **options), release)


def test_learning_rates() -> None:
    """By batch and depth in all; by width, of matrices; by tokens, in HyperP."""
    base = replace(JULY, eta0=1e-3, b0=1000, d0=4, t0=10**6)
    given = {"batch_tokens": 4000, "train_tokens": 16 * 10**6}
    expected = {
        "sp": (2e-3, 2e-3),
        "mup": (2e-3, 1e-3),
        "mup++": (2e-3 * math.sqrt(0.5), 1e-3 * math.sqrt(0.5)),
        "hyperp": (2e-3 * math.sqrt(0.5) * 16**-0.32, 2e-3 * math.sqrt(0.5) * 16**-0.32),
    }
    for name, rates in expected.items():
        run = Parametrization(name)  # type: ignore[arg-type]
        hps = found(run, 8, base, **given)
        assert (hps.learning_rate, hps.matrix_learning_rate) == pytest.approx(rates, rel=1e-12)
        own = found(run, 8, base, learning_rate=0.5, **given)
        assert own.learning_rate == 0.5
        assert own.matrix_learning_rate == pytest.approx(0.5 * rates[1] / rates[0], rel=1e-12)
    assert found(Parametrization("mup++"), 16, MARCH).learning_rate == pytest.approx(4.2426e-4, rel=1e-4)
    assert found(Parametrization("mup++"), 16, MARCH).matrix_learning_rate == pytest.approx(2.1213e-4, rel=1e-4)


def test_what_does_not_scale_and_what_goes_with_a_parametrisation() -> None:
    base = replace(JULY, warmup_tokens0=77, weight_decay0=0.3, eps0=1e-9, beta1_0=0.8, beta2_0=0.9, muon_beta_0=0.7)
    hps = found(Parametrization("mup++"), 8, base)
    assert (hps.warmup_tokens, hps.weight_decay, hps.matrix_weight_decay) == (77, 0.3, 0.3)
    assert (hps.adam_eps, hps.adam_beta1, hps.adam_beta2, hps.muon_momentum) == (1e-9, 0.8, 0.9, 0.7)
    assert (hps.global_batch_tokens, hps.train_tokens, hps.min_learning_rate) == (2**21, 10**11, 0.0)
    hps = found(Parametrization("hyperp"), 8, base)
    assert (hps.warmup_tokens, hps.weight_decay) == (0, 0.0)
    hps = found(Parametrization("mup++", muon=True, release="2026-03"), 24, base)
    assert (hps.warmup_tokens, hps.weight_decay) == (0, pytest.approx(0.3 * 16 / 24))
    assert hps.matrix_learning_rate == hps.learning_rate
    hps = found(Parametrization("mup++", muon=True), 24, base)
    assert (hps.warmup_tokens, hps.weight_decay) == (77, 0.3)
    assert found(Parametrization(), 8, replace(base, min_lr0=1e-5)).min_learning_rate == 1e-5
    assert found(Parametrization(), 8, replace(base, min_lr_mult=0.1)).min_learning_rate == pytest.approx(4e-5)


def test_independent_weight_decay() -> None:
    """A step at the peak takes as much of every class, at every depth and learning rate."""
    base = replace(JULY, weight_decay0=4e-5)
    for depth in (8, 24):
        for eta0 in (1e-4, 1e-3):
            run = Parametrization("mup++", independent_weight_decay=True)
            hps = found(run, depth, replace(base, eta0=eta0))
            assert hps.learning_rate * hps.weight_decay == pytest.approx(4e-5)
            assert hps.matrix_learning_rate * hps.matrix_weight_decay == pytest.approx(4e-5)


def test_rounding_of_batches() -> None:
    assert [rounded_batch(n, 100, "2025-07") for n in (100, 149, 150, 199)] == [100, 100, 100, 100]
    assert [rounded_batch(n, 100, "2026-03") for n in (60, 149, 150, 199)] == [100, 100, 200, 200]
    for tokens, release in ((99, "2025-07"), (49, "2026-03")):
        with pytest.raises(ValueError, match=rf"^a batch of {tokens} tokens is less than one micro batch .*100 tokens"):
            rounded_batch(tokens, 100, release)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eta0": 0.0}, "--base-hps.eta0 0.0: must be more than 0"),
        ({"d0": -1}, "--base-hps.d0 -1: must be more than 0"),
        ({"beta1_0": 1.0}, "--base-hps.beta1-0 1.0: must be 0 or more and less than 1"),
        ({"min_lr_mult": 2.0}, "--base-hps.min-lr-mult 2.0: must be from 0 to 1"),
        ({"min_lr0": 1e-5, "min_lr_mult": 0.1}, "--base-hps.min-lr0 and --base-hps.min-lr-mult say the same"),
    ],
)
def test_base_values_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BaseHyperparameters(**values)


def test_an_end_above_the_peak() -> None:
    with pytest.raises(ValueError, match="--base-hps.min-lr0 0.01: is more than the peak of the learning rate, 0.0004"):
        found(Parametrization(), 16, replace(JULY, min_lr0=0.01))
