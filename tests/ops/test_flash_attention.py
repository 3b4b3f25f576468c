"""What reaches the flash kernels, and what comes of it: stand-ins on a CPU that ask what the kernels ask.

Torch's operation stands under its own name, so that its schema and its gradient are torch's. On a GPU the kernels
themselves are compared in test_attention.py.
"""

import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.nn.attention import SDPBackend

from archscale_megatron.ops import attention as attention_module
from archscale_megatron.ops import flash_attention as module
from archscale_megatron.ops.attention import attention
from tests.ops.test_attention import (
    assert_matches_reference,
    inputs,
    kernels_behind,
    reference,
    two_rows_of_documents,
)


def check(q, k, v, ends_q, ends_k, max_q, max_k, left, right):
    """The conditions of mha_fwd, mha_bwd and their varlen forms (torch's flash_attn/flash_api.cpp)."""
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    assert k.shape == v.shape and q.shape[:-2] == k.shape[:-2] and q.shape[-1] == k.shape[-1]
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and q.shape[-2] % k.shape[-2] == 0
    for x in (q, k, v):
        assert x.stride(-1) == 1 and all(stride % 8 == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    assert right == 0 and (left is None or left >= -1)
    if ends_q is None:
        assert ends_k is None and q.dim() == 4 and (max_q, max_k) == (q.shape[1], k.shape[1])
        return
    assert ends_k is ends_q or ends_k.equal(ends_q)
    assert q.dim() == 3 and ends_q.dtype == torch.int32 and ends_q.is_contiguous()
    assert ends_q[0] == 0 and ends_q[-1] == len(q) and (ends_q.diff() > 0).all()
    assert max_q == max_k == ends_q.diff().max()


def compute(q, k, v, ends, scale, left):
    """In float64, one sequence after the other: [b, s, heads, d], or [tokens, heads, d] with `ends`."""
    window = None if left in (None, -1) else left + 1
    q, k, v = (x.double() for x in (q, k, v))
    if ends is None:
        return reference(*(x.transpose(0, 1) for x in (q, k, v)), scale, window).transpose(0, 1)
    lengths = ends.diff().tolist()
    documents = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([reference(*(x.unsqueeze(1) for x in d), scale, window).squeeze(1) for d in documents])


@pytest.fixture
def torch_flash(monkeypatch):
    """aten's flash operations on a CPU; the list of their calls."""
    calls = []

    def forward(
        q, k, v, ends_q, ends_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
        *, scale=None, window_size_left=None, window_size_right=None, **rest,
    ):  # fmt: skip
        check(q, k, v, ends_q, ends_k, max_q, max_k, window_size_left, window_size_right)
        assert is_causal and not return_debug_mask and not any(value is not None for value in rest.values())
        calls.append((q, k, v, ends_q, window_size_left, dropout_p))
        out = torch.empty_like(q).copy_(compute(q, k, v, ends_q, scale, window_size_left))
        tokens = q.shape[-3]
        lse = torch.empty((q.shape[-2], tokens) if ends_q is not None else (len(q), q.shape[-2], tokens))
        state = torch.tensor([7, len(calls)], dtype=torch.uint64)
        return out, lse, state, torch.empty((), dtype=torch.uint64), torch.empty(0, dtype=q.dtype)

    def backward(
        grad, q, k, v, out, lse, ends_q, ends_k, max_q, max_k, dropout_p, is_causal, state, unused,
        *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        check(q, k, v, ends_q, ends_k, max_q, max_k, window_size_left, window_size_right)
        call = calls[int(state[1]) - 1]
        assert is_causal and call[4:] == (window_size_left, dropout_p) and lse.dtype == torch.float32
        # The kernel's own copies of these would be made in vain.
        assert out.is_contiguous() and grad.is_contiguous()

        def differentiate():
            leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
            return torch.autograd.grad(compute(*leaves, ends_q, scale, window_size_left), leaves, grad.double())

        with ThreadPoolExecutor(1) as another:  # in this one, torch is below autograd
            grads = another.submit(differentiate).result()
        return tuple(torch.empty_like(x).copy_(g) for x, g in zip((q, k, v), grads, strict=True))

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
    monkeypatch.setattr(attention_module, "flash_serves", lambda query, head_dim: True)
    monkeypatch.setattr(module, "optional", lambda name: None)
    yield calls
    library._destroy()


HEADS = [(8, 2, 64, 64), (4, 4, 128, 128), (4, 2, 64, 128), (4, 1, 16, 8)]  # n_q, n_kv, d, d_v


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 50, 139, 140, 1000])
def test_torch_flash_with_windows(torch_flash, heads, window):
    leaves, grad = inputs(140, 2, *heads, torch.bfloat16)
    assert_matches_reference(leaves, grad, tolerance=1e-2, window=window)
    ((q, *_, left, _),) = torch_flash
    assert left == (-1 if window in (None, 140, 1000) else window - 1)
    assert q.shape == (1, 140, 2 * heads[0], max(heads[2:]))


@pytest.mark.parametrize("heads", HEADS[::2])
@pytest.mark.parametrize("window", [None, 1, 50, 1000])
def test_torch_flash_with_documents(torch_flash, heads, window):
    starts = two_rows_of_documents(140)
    leaves, grad = inputs(140, 2, *heads, torch.bfloat16)
    assert_matches_reference(leaves, grad, tolerance=1e-2, window=window, document_starts=starts)
    assert torch_flash[0][3].tolist() == [0, 1, 40, 41, 42, 130, 139, 140, 157, 240, 280]


@pytest.mark.parametrize("with_documents", [False, True])
def test_torch_flash_with_a_sink(torch_flash, with_documents):
    leaves, grad = inputs(140, 2, 4, 2, 64, 64, torch.bfloat16)
    sink = torch.linspace(-2, 3, 4).bfloat16().requires_grad_()
    starts = two_rows_of_documents(140) if with_documents else None
    assert_matches_reference([*leaves, sink], grad, tolerance=1e-2, document_starts=starts)
    assert torch_flash[0][0].shape[-1] == 72  # one channel for the sink, in a multiple of 8


@pytest.mark.parametrize("s", [1, 2, 128, 256])
def test_one_document_goes_to_cudnn_in_whole_tiles(torch_flash, monkeypatch, s):
    asked = []
    with_kernels = module.sdpa_kernel
    monkeypatch.setattr(module, "sdpa_kernel", lambda *args, **o: asked.append((args, o)) or with_kernels(*args, **o))
    leaves, grad = inputs(s, 2, 4, 2, 64, 64, torch.bfloat16)
    assert_matches_reference(leaves, grad, tolerance=1e-2)
    if s % 128:
        assert len(torch_flash) == 1 and not asked
    else:
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        assert not torch_flash and asked == [((order,), {"set_priority": True})]


def test_dropout_reaches_forward_and_backward(torch_flash):
    leaves, grad = inputs(128, 1, 4, 2, 64, 64, torch.bfloat16)
    attention(*leaves, softmax_scale=0.3, dropout_p=0.25).backward(grad)  # not by cuDNN, whose shares are coarser
    assert torch_flash[0][5] == 0.25


def test_nothing_is_copied(torch_flash):
    """Keys and values as they leave the projection of all three: slices of rows."""
    query = torch.randn(130, 2, 4, 64).bfloat16()
    key, value = torch.randn(130, 2, 2, 3 * 64).bfloat16().split([64, 2 * 64], dim=-1)
    value = value[..., 64:]
    out = attention(query, key, value, softmax_scale=0.3, window=20)
    for given, seen in zip((query, key, value), torch_flash[0][:3], strict=True):
        assert seen.data_ptr() == given.data_ptr()
    assert out.is_contiguous()


@pytest.mark.parametrize("cut", [lambda x: x[..., 1:65], lambda x: x[..., ::2][..., :64]])
def test_heads_out_of_place_are_copied(torch_flash, cut):
    leaves = [cut(torch.randn(70, 1, 2, 132).bfloat16()).detach().requires_grad_() for _ in range(3)]
    assert_matches_reference(leaves, torch.randn(70, 1, 2, 64).bfloat16(), tolerance=1e-2, window=20)


def test_gradients_are_those_of_torch(torch_flash):
    leaves, _ = inputs(70, 1, 4, 2, 64, 64, torch.bfloat16)
    assert "FlashAttentionBackward0" in kernels_behind(attention(*leaves, softmax_scale=0.3))


@pytest.fixture
def flash_attn(monkeypatch):
    """A package flash-attn of its signatures; the calls of its two functions."""
    calls = []

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False
    ):
        left, right = window_size
        check(q, k, v, None, None, q.shape[1], k.shape[1], left, 0 if window_size == (-1, -1) else right)
        assert causal and dropout_p == 0
        calls.append("dense")
        return compute(q, k, v, None, softmax_scale, left).to(q.dtype)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False,
    ):  # fmt: skip
        left, right = window_size
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        check(q, k, v, *ends, left, 0 if window_size == (-1, -1) else right)
        assert causal and dropout_p == 0
        calls.append("varlen")
        return compute(q, k, v, cu_seqlens_q, softmax_scale, left).to(q.dtype)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention_module, "flash_serves", lambda query, head_dim: True)
    monkeypatch.setattr(module, "optional", lambda name: package)
    return calls


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("with_documents", [False, True])
def test_flash_attn_comes_first(flash_attn, window, with_documents):
    starts = two_rows_of_documents(140) if with_documents else None
    leaves, grad = inputs(140, 2, 8, 2, 64, 64, torch.bfloat16)
    assert_matches_reference(leaves, grad, tolerance=1e-2, window=window, document_starts=starts)
    assert flash_attn == ["varlen" if with_documents else "dense"]


@pytest.mark.parametrize("dtype, head_dim", [(torch.float32, 64), (torch.bfloat16, 264), (torch.bfloat16, 64)])
def test_cpus_fp32_and_wide_heads_are_for_others(dtype, head_dim):
    assert not module.flash_serves(torch.zeros(1, dtype=dtype), head_dim)
