"""32,768 tokens of one sample, in many documents: no tensor and no peak of memory grows faster than the length."""

import functools
from dataclasses import replace

import pytest
import torch

from archscale_megatron.archs.architecture import MOE
from archscale_megatron.archs.build import build_architecture
from archscale_megatron.archs.families import FAMILIES
from tests.memory import MemoryRecorder
from tests.model.building import build

pytestmark = pytest.mark.usefixtures("one_process")

LENGTH = 32768
DEPTH = {"samba": 2, "sambay": 8, "mambay2": 4, "gdny": 4}  # between them, a layer of every kind
LARGEST = 256  # elements a token; the most is 152, the output of a Mamba-2's input projection


@functools.cache
def recorded(family: str, length: int) -> MemoryRecorder:
    """Forward and backward pass of a tiny model; half of the sequence is one document, the others are short."""
    arch = build_architecture(
        family, DEPTH[family], aspect_ratio=8 // DEPTH[family], head_dim=8, num_heads=2, num_kv_heads=1,
        local_window=128, vocab_size=32,
    )  # fmt: skip
    model = build(replace(arch, mamba2_state_size=8, mamba2_head_dim=8, gdn_head_dim=8))
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(arch.vocab_size, (1, length), generator=generator).cuda()
    starts = torch.rand(length, 1, generator=generator).cuda() < 1 / 100
    starts[length // 4 : 3 * length // 4] = False
    with MemoryRecorder() as recorder:
        model(tokens, torch.arange(length, device=tokens.device)[None], starts, labels=tokens).sum().backward()
    return recorder


def test_every_kind_of_layer_is_here() -> None:
    assert {s for f in FAMILIES.values() for s in f(8).pattern} - {MOE} == {
        s for f in DEPTH for s in FAMILIES[f](8).pattern
    }


@pytest.mark.parametrize("family", DEPTH)
def test_no_tensor_has_a_row_for_each_pair_of_tokens(family: str) -> None:
    """A mask or scores of all pairs would have 32,768 elements a token."""
    assert recorded(family, LENGTH).largest <= LARGEST * LENGTH * 4


def test_peak_memory_is_linear_with_windows() -> None:
    peaks = [recorded("samba", length).peak for length in (LENGTH // 4, LENGTH // 2, LENGTH)]
    assert peaks[1] / peaks[0] == pytest.approx(2, rel=0.05)
    assert peaks[2] / peaks[1] == pytest.approx(2, rel=0.05)


def test_peak_is_what_lives_at_once() -> None:
    """Of the recorder itself: 6 MB made one after the other, of which 4 are needed together."""
    with MemoryRecorder() as recorder:
        x = torch.ones(1 << 19, requires_grad=True)  # 2 MB
        for _ in range(2):
            x.detach().exp()
    assert (recorder.largest, recorder.peak) == (2 << 20, 4 << 20)
