"""Initial parameters: their distributions (standard parametrisation), and that no layout changes them."""

import functools
import math
import re
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.mup.initialization import (
    VOCABULARY_BLOCK,
    blocks_of,
    initial_values,
    initialize_parameters,
    named_global_parameters,
    partition,
)
from archscale_megatron.mup.rules import Parametrization
from tests.model.building import build

pytestmark = pytest.mark.usefixtures("one_process")

SEED = 3407
SP = Parametrization()
DEPTH = 8


def architecture(tied: bool = True, family: str = "sambay") -> Architecture:
    """SambaY has every kind of parameter but those of Mamba-2 and gated delta nets."""
    return build_architecture(
        family, DEPTH, aspect_ratio=16, head_dim=16, num_kv_heads=4, vocab_size=512, tied_embeddings=tied
    )


@functools.cache
def initialised(
    tied: bool = True, dtype: torch.dtype = torch.float32, seed: int = SEED, family: str = "sambay"
) -> dict[str, Tensor]:
    return values_of(build(architecture(tied, family), dtype, seed))


def values_of(model: HybridModel) -> dict[str, Tensor]:
    return {name: p.detach().float().cpu() for name, p in named_global_parameters(model)}


# --- distributions ------------------------------------------------------------------------------------------


def normal(std: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.special.ndtr(x / std)


def uniform(low: float, high: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (x - low) / (high - low)


def assert_drawn_from(values: Tensor, distribution: Callable[[Tensor], Tensor]) -> None:
    """Kolmogorov-Smirnov's distance between the empirical and the true distribution function, and the extremes.

    A distance of more than 2.3 / sqrt(n) has a probability of 5e-5, an extreme value with more than 10 / n beyond
    it one of e^-10. A standard deviation that is 5% off makes a distance of 0.012, a factor sqrt(2) one of 0.08.
    """
    n = values.numel()
    expected = distribution(values.double().flatten().sort().values)
    assert 0 <= expected[0] < 10 / n and 0 <= 1 - expected[-1] < 10 / n
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = max((steps[1:] - expected).max(), (expected - steps[:-1]).max())
    assert distance < 2.3 / math.sqrt(n), f"{distance:.4f} with {n} values"


MATRICES = ("linear_qkv.weight", "linear_q.weight", "linear_fc1.weight", "in_proj.weight", "x_proj.weight",
            "dt_proj.weight")  # fmt: skip
LAST_OF_A_LAYER = ("linear_proj.weight", "linear_fc2.weight", "out_proj.weight")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_parameter_is_drawn_as_archscale_s(tied: bool) -> None:
    """The SP column of ArchScale e77b786's initialisation, with PyTorch's default for the convolution."""
    kinds: dict[str, list[Tensor]] = {}  # all layers together: the more values, the sharper
    for name, values in initialised(tied).items():
        kinds.setdefault(re.sub(r"\d+", "#", name, count=1), []).append(values)
    assert ("output_layer.weight" in kinds) is not tied
    unknown = []
    for name, values in ((name, torch.cat(values)) for name, values in kinds.items()):
        if name == "embedding.word_embeddings.weight":
            assert_drawn_from(values, normal(0.02 if tied else 1e-4))
        elif name == "output_layer.weight" or name.endswith(MATRICES):
            assert_drawn_from(values, normal(0.02))
        elif name.endswith(LAST_OF_A_LAYER):
            assert_drawn_from(values, normal(0.02 / math.sqrt(2 * DEPTH)))
        elif name.endswith(("conv1d.weight", "conv1d.bias")):
            assert_drawn_from(values, uniform(-0.5, 0.5))
        elif name.endswith("dt_proj.bias"):
            step = torch.nn.functional.softplus(values.double())
            assert step.min() > 1e-3 * (1 - 1e-4) and step.max() < 0.1 * (1 + 1e-4)  # fp32's rounding
            assert_drawn_from(step.log().clamp(math.log(1e-3), math.log(0.1)), uniform(math.log(1e-3), math.log(0.1)))
        elif name.endswith("A_log"):
            expected = torch.tensor([math.log(n) for n in range(1, 17)])
            torch.testing.assert_close(values, expected.expand_as(values), rtol=2e-7, atol=0)
        elif name.endswith(("norm.weight", "mixer.D")):
            assert (values == 1).all()
        else:
            unknown.append(name)
    assert not unknown


@pytest.mark.parametrize(("family", "lowest"), [("sambay2", 1.0), ("sgdny", 0.0)])
def test_parameters_of_heads(family: str, lowest: float) -> None:
    """Of Mamba-2 and gated delta nets, in more heads than a model has."""

    def draw(name: str) -> Tensor:
        generator = torch.Generator().manual_seed(SEED)
        return initial_values(f"decoder.layers.0.mixer.{name}", (10_000,), architecture(family=family), SP, generator)

    assert_drawn_from(draw("A_log").double().exp().clamp(lowest, 16), uniform(lowest, 16))
    step = torch.nn.functional.softplus(draw("dt_bias").double()).log()
    assert_drawn_from(step.clamp(math.log(1e-3), math.log(0.1)), uniform(math.log(1e-3), math.log(0.1)))
    assert (draw("norm.weight") == 1).all() and (draw("D") == 1).all()


def test_parameters_of_options_are_drawn_as_archscale_s() -> None:
    options = ("attention_gate", "qk_norm", "qkv_bias", "attention_output_bias", "linear_bias")
    numbers = {"aspect_ratio": 16, "head_dim": 64, "num_heads": 8, "num_kv_heads": 4, "vocab_size": 64}
    parameters: dict[str, Tensor] = {}
    for family, option in (("sambay", "differential_attention"), ("transformer", "attention_sink")):
        arch = build_architecture(family, DEPTH, **numbers, **dict.fromkeys((*options, option), True))
        parameters |= {f"{family} {name}": values for name, values in values_of(build(arch, seed=SEED)).items()}

    def of(*ends: str) -> Tensor:
        return torch.cat([values.flatten() for name, values in parameters.items() if name.endswith(ends)])

    vectors = "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"
    assert of(*vectors).numel() == 4 * 64 * (DEPTH // 2)
    assert_drawn_from(of(*vectors), normal(0.1))
    assert_drawn_from(of("linear_gate.weight"), normal(0.02))
    assert (of("sub_norm.weight", "q_layernorm.weight", "k_layernorm.weight") == 1).all()
    projections = (
        "linear_qkv",
        "linear_q",
        "linear_gate",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
        "in_proj",
        "out_proj",
    )
    for name in ("core_attention.sink", *(f"{projection}.bias" for projection in projections)):
        assert not of(name).any()


def test_the_distributions_are_told_apart() -> None:
    """The test above would notice 5% of standard deviation, and a uniform of the same standard deviation."""
    values = initialised()["decoder.layers.1.mixer.linear_fc1.weight"]
    assert_drawn_from(values, normal(0.02))
    bound = 0.02 * math.sqrt(3)
    for wrong in (normal(0.019), normal(0.021), uniform(-bound, bound)):
        with pytest.raises(AssertionError):
            assert_drawn_from(values, wrong)


def test_bf16_parameters_are_the_fp32_ones_rounded() -> None:
    fp32, bf16 = initialised(), initialised(dtype=torch.bfloat16)
    for name, values in bf16.items():
        kept = name.endswith(("A_log", "mixer.D", "dt_proj.bias"))
        assert torch.equal(values, fp32[name] if kept else fp32[name].bfloat16().float()), name


# --- what a draw depends on ---------------------------------------------------------------------------------


def is_constant(name: str) -> bool:
    return name.endswith(("norm.weight", "mixer.D", "A_log"))


def test_same_seed_same_values_other_seed_others() -> None:
    again = values_of(build(architecture(), seed=SEED))
    other = initialised(seed=SEED + 1)
    for name, values in initialised().items():
        assert torch.equal(values, again[name]), name
        # Every value: a shared stream would make some of them equal.
        assert is_constant(name) or (values != other[name]).float().mean() > 0.99, name


def test_no_two_parameters_are_alike() -> None:
    starts = {}
    for name, values in initialised().items():
        if not is_constant(name):
            standard = values.flatten()[:64]
            starts[name] = standard - standard.mean()
    correlation = torch.corrcoef(torch.stack(list(starts.values()))).fill_diagonal_(0).abs()
    assert correlation.max() < 0.7  # of 64 independent pairs: 5.6 standard deviations


def test_global_random_state_is_neither_used_nor_changed() -> None:
    model = unfilled_rank(1)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    initialize_parameters(model, architecture(), SP, SEED)
    assert torch.equal(torch.get_rng_state(), before)
    for name, values in values_of(model).items():
        assert torch.equal(values, initialised()[name]), name


# --- layouts ------------------------------------------------------------------------------------------------


def joined(parts: list[Tensor], dim: int, blocks: tuple[int, ...]) -> Tensor:
    """The inverse of `partition`: of each block, all ranks' slices, block after block."""
    begins = [sum(blocks[:i]) // len(parts) for i in range(len(blocks) + 1)]
    cuts = [slice(begin, end) for begin, end in pairwise(begins)]
    return torch.cat([part.movedim(dim, 0)[cut] for cut in cuts for part in parts]).movedim(0, dim)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("dim", "blocks"), [(0, (16,)), (1, (24,)), (0, (8, 8)), (1, (12, 12)), (1, (4, 12, 8))])
def test_partition_reassembles(size: int, dim: int, blocks: tuple[int, ...]) -> None:
    values = torch.arange(16.0 * 24).view(16, 24)
    parts = [partition(values, dim, blocks, size, rank) for rank in range(size)]
    assert all(part.shape[dim] == values.shape[dim] // size for part in parts)
    assert torch.equal(joined(parts, dim, blocks), values)


def test_partition_of_unequal_blocks() -> None:
    """Rank 1 of 2 holds the second half of the first block, then the second half of the second."""
    assert partition(torch.arange(10), 0, (4, 6), 2, 1).tolist() == [2, 3, 7, 8, 9]


@pytest.mark.parametrize("family", ["sambay", "sambay2"])
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_ranks_hold_the_parts_of_one_draw(
    size: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank's parameters, drawn in this process: the whole model's layers, cut to the rank's shapes."""
    expected, ranks = initialised(family=family), []
    for rank in range(size):
        model = unfilled_rank(size, family)
        with monkeypatch.context() as patch:
            patch.setattr(parallel_state, "get_tensor_model_parallel_world_size", lambda: size)
            patch.setattr(parallel_state, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
            initialize_parameters(model, architecture(family=family), SP, SEED)
        ranks.append(dict(named_global_parameters(model)))
    for name, whole in expected.items():
        parts = [parameters[name] for parameters in ranks]
        if getattr(parts[0], "tensor_model_parallel", False):
            parts = [joined([p.data for p in parts], parts[0].partition_dim, blocks_of(parts[0], size))]
        for part in parts:
            assert torch.equal(part, whole), name


def unfilled_rank(size: int, family: str = "sambay") -> HybridModel:
    """A model with the parameter shapes of one of `size` tensor-parallel ranks, and nothing in them."""
    model = build(architecture(family=family))
    for parameter in model.parameters():
        shape = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            shape[parameter.partition_dim] //= size
        parameter.data = torch.full(shape, math.nan, device=parameter.device)
    return model


@pytest.mark.parametrize("name", ["embedding.word_embeddings.weight", "output_layer.weight"])
def test_padding_of_the_vocabulary_changes_no_other_row(name: str) -> None:
    """To a multiple of the block, which is the multiple that vocabularies are padded to."""

    device = torch.empty(0, device="cuda").device  # a GPU's generator numbers its values otherwise than the CPU's

    def rows(count: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(3)
        return initial_values(name, (count, 40), architecture(tied=False), SP, generator)

    longest = rows(8 * VOCABULARY_BLOCK)
    for blocks in range(1, 8):
        assert torch.equal(rows(blocks * VOCABULARY_BLOCK), longest[: blocks * VOCABULARY_BLOCK])
