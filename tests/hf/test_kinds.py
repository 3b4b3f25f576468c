"""Every kind of map against loops over rows, both ways, bit for bit."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from archscale_megatron.hf.kinds import (
    QKV,
    Experts,
    Map,
    Scaled,
    Vocabulary,
    copied,
    joined,
    scaled,
    split,
    stacked,
)

size = st.integers(1, 5)
rests = st.sampled_from([(), (3,), (1, 4)])
quick = settings(max_examples=40, deadline=None)


def numbered(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    """Random tensors of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes.values()]


def there_and_back(one: Map) -> tuple[list[Tensor], list[Tensor]]:
    """(tensors of the checkpoint, of the export), after both ways are checked against the shapes and each other."""
    before = numbered(one.megatron_shapes())
    exported = one.to_hf(before)
    assert tuple(one.megatron_shapes()) == one.megatron and tuple(one.hf_shapes()) == one.hf
    assert [tuple(tensor.shape) for tensor in exported] == list(one.hf_shapes().values())
    for tensor, back in zip(before, one.to_megatron(exported), strict=True):
        assert torch.equal(tensor, back)
    others = numbered(one.hf_shapes(), seed=1)
    imported = one.to_megatron(others)
    assert [tuple(tensor.shape) for tensor in imported] == list(one.megatron_shapes().values())
    for tensor, back in zip(others, one.to_hf(imported), strict=True):
        assert torch.equal(tensor, back)
    return before, exported


@quick
@given(rows=size, rest=rests)
def test_copied(rows: int, rest: tuple[int, ...]) -> None:
    (before,), (after,) = there_and_back(copied("a", "b", (rows, *rest)))
    assert torch.equal(before, after)


@quick
@given(parts=st.integers(2, 3), rows=size, rest=rests)
def test_split(parts: int, rows: int, rest: tuple[int, ...]) -> None:
    (fused,), after = there_and_back(split("fused", [f"part{i}" for i in range(parts)], rows, rest))
    for i, row in enumerate(fused):
        assert torch.equal(after[i // rows][i % rows], row)


@quick
@given(rows=st.lists(size, min_size=1, max_size=6), rest=rests)
def test_joined(rows: list[int], rest: tuple[int, ...]) -> None:
    one = joined("in_proj.weight", {f"block{i}": count for i, count in enumerate(rows)}, "whole", rest)
    assert one.megatron[0] == "in_proj.weight.block0"
    before, (after,) = there_and_back(one)
    expected = [row for block in before for row in block]
    assert all(torch.equal(row, want) for row, want in zip(after, expected, strict=True))


def test_qkv_of_a_known_layout() -> None:
    """Megatron: transformer/attention.py, `SelfAttention.get_query_key_value_tensors`: [groups, (queries + 2) d]."""
    fused = torch.tensor([0, 1, 20, 30, 2, 3, 21, 31])  # two groups of two queries, heads of one channel
    q, k, v = QKV(("qkv",), ("q", "k", "v"), heads=4, groups=2, head_dim=1).to_hf([fused])
    assert (q.tolist(), k.tolist(), v.tolist()) == ([0, 1, 2, 3], [20, 21], [30, 31])


@quick
@given(groups=size, queries=st.integers(1, 4), head_dim=size, rest=rests)
def test_qkv(groups: int, queries: int, head_dim: int, rest: tuple[int, ...]) -> None:
    one = QKV(("qkv",), ("q", "k", "v"), groups * queries, groups, head_dim, rest)
    (fused,), (q, k, v) = there_and_back(one)
    row = 0
    for group in range(groups):
        places = [(q, group * queries + i) for i in range(queries)] + [(k, group), (v, group)]
        for tensor, head in places:
            for channel in range(head_dim):
                assert torch.equal(tensor[head * head_dim + channel], fused[row])
                row += 1
    assert row == len(fused)


@quick
@given(rows=size, columns=size, padding=st.integers(0, 3))
def test_vocabulary(rows: int, columns: int, padding: int) -> None:
    one = Vocabulary(("embedding",), ("embed_tokens",), rows, columns)
    (before,), _ = there_and_back(one)
    padded = torch.cat([before, torch.full((padding, columns), torch.nan)])
    assert torch.equal(one.to_hf([padded])[0], before)


@quick
@given(experts=size, parts=st.integers(1, 2), rows=size, columns=size)
def test_experts(experts: int, parts: int, rows: int, columns: int) -> None:
    names = tuple(f"experts.{e}.{part}" for e in range(experts) for part in range(parts))
    (together,), after = there_and_back(Experts(("experts",), names, experts, rows, columns))
    for e in range(experts):
        for row in range(parts * rows):
            assert torch.equal(after[e * parts + row // rows][row % rows], together[e, row])


@quick
@given(power=st.integers(-8, 8), factor=st.floats(0.01, 100), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_scaled(power: int, factor: float, dtype: torch.dtype) -> None:
    inner = QKV(("qkv",), ("q", "k", "v"), 4, 2, 3, (5,))
    there_and_back(scaled(inner, 2.0**power, 1.0, 1.0))  # exact
    fused = numbered(inner.megatron_shapes())[0].to(dtype)
    plain, by_factor = inner.to_hf([fused]), scaled(inner, factor, 1.0, 1.0).to_hf([fused])
    assert all(tensor.dtype == dtype for tensor in by_factor)
    torch.testing.assert_close(by_factor[0].double(), plain[0].double() * factor, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(by_factor[1], plain[1]) and torch.equal(by_factor[2], plain[2])
    back = scaled(inner, factor, 1.0, 1.0).to_megatron(by_factor)[0]
    torch.testing.assert_close(back, fused, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_factors_of_1_are_left_out() -> None:
    inner = copied("a", "b", (2,))
    assert scaled(inner, 1.0) is inner and isinstance(scaled(inner, 0.5), Scaled)


@quick
@given(groups=size, queries=st.integers(1, 3), rest=rests, factor=st.sampled_from([1.0, 0.25]))
def test_stacked(groups: int, queries: int, rest: tuple[int, ...], factor: float) -> None:
    """[Q | K | V] as one tensor, with a factor of its queries."""
    inner = QKV(("qkv",), ("q", "k", "v"), groups * queries, groups, 2, rest)
    (fused,), (together,) = there_and_back(stacked(scaled(inner, factor, 1.0, 1.0), "Wqkv"))
    q, k, v = inner.to_hf([fused])
    expected = [row * factor for row in q] + list(k) + list(v)
    assert all(torch.equal(row, want) for row, want in zip(together, expected, strict=True))
