"""attention against a dense float64 reference: outputs and gradients, windows, groups, documents, memory."""

import json
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from archscale_megatron.ops import flash_attention
from archscale_megatron.ops.attention import attention


def reference(query, key, value, softmax_scale, window=None, document_starts=None, sink=None):
    """Every row and head apart, every pair of positions asked whether it sees the other."""
    s, b, n_q, _ = query.shape
    group = n_q // key.shape[2]
    rows = []
    for row in range(b):
        visible = torch.zeros(s, s, dtype=torch.bool)
        begin = 0
        for i in range(s):
            if document_starts is not None and document_starts[i, row]:
                begin = i
            for j in range(begin, i + 1):
                visible[i, j] = window is None or i - j < window
        heads = []
        for head in range(n_q):
            logits = softmax_scale * query[:, row, head] @ key[:, row, head // group].t()
            logits = logits.masked_fill(~visible, float("-inf"))
            if sink is None:
                weights = logits.softmax(-1)
            else:
                weights = logits.exp() / (logits.exp().sum(-1, keepdim=True) + sink[head].exp())
            heads.append(weights @ value[:, row, head // group])
        rows.append(torch.stack(heads, 1))
    return torch.stack(rows, 1)


def inputs(s, b, n_q, n_kv, d, d_v, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(s + d)
    shapes = (s, b, n_q, d), (s, b, n_kv, d), (s, b, n_kv, d_v), (s, b, n_q, d_v)
    query, key, value, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return [x.requires_grad_() for x in (query, key, value)], grad


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error over the largest expected number, or over 1 where all are 0 (window 1: no gradient)."""
    return (actual.cpu().double() - expected).abs().max().item() / (expected.abs().max().item() or 1.0)


def assert_matches_reference(leaves, grad, tolerance=1e-5, **options):
    """`leaves` are query, key, value and, as the case may be, sink."""

    def split(given):
        on_its_device = {k: v.to(given[0].device) if torch.is_tensor(v) else v for k, v in options.items()}
        return given[:3], dict(zip(["sink"], given[3:], strict=False)) | on_its_device

    arguments, actual_options = split(leaves)
    actual = attention(*arguments, softmax_scale=0.3, **actual_options)
    exact = [x.detach().cpu().double().requires_grad_() for x in leaves]
    arguments, expected_options = split(exact)
    expected = reference(*arguments, 0.3, **expected_options)
    assert actual.dtype == leaves[0].dtype
    assert difference(actual, expected) < tolerance
    actual_grads = torch.autograd.grad(actual, leaves, grad)
    expected_grads = torch.autograd.grad(expected, exact, grad.cpu().double())
    for a, e in zip(actual_grads, expected_grads, strict=True):
        assert difference(a, e) < tolerance
    return actual


def kernels_behind(output: torch.Tensor) -> set[str]:
    """Names of the operations whose gradients lead to `output`."""
    names, nodes = set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(node.name())
            nodes += [earlier for earlier, _ in node.next_functions]
    return names


HEADS = [(4, 4, 8, 8), (8, 2, 8, 8), (8, 2, 8, 16), (4, 1, 16, 8)]  # n_q, n_kv, d, d_v


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 1, 2, 7, 32, 199, 200, 1000])
def test_one_document(heads, window) -> None:
    assert_matches_reference(*inputs(200, 2, *heads), window=window)


def test_window_wider_than_the_smallest_block() -> None:
    assert_matches_reference(*inputs(500, 1, 4, 2, 8, 8), window=150)


@pytest.mark.parametrize("s", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 2])
def test_few_tokens(s, window) -> None:
    assert_matches_reference(*inputs(s, 1, 4, 2, 8, 8), window=window)


def two_rows_of_documents(s: int) -> torch.Tensor:
    """Documents of length 1 at begin, middle and end; one row begins unmarked; boundaries differ by row."""
    starts = torch.zeros(s, 2, dtype=torch.bool)
    starts[[0, 1, 40, 41, 42, 130, s - 1], 0] = True
    starts[[17, 100], 1] = True
    return starts


@pytest.mark.parametrize("heads", [(8, 2, 8, 16), (4, 4, 8, 8)])
@pytest.mark.parametrize("window", [None, 1, 3, 20, 150])
def test_documents(heads, window) -> None:
    assert_matches_reference(*inputs(200, 2, *heads), window=window, document_starts=two_rows_of_documents(200))


@pytest.mark.parametrize("window", [None, 20])
def test_every_document_equals_itself_alone(window) -> None:
    leaves, _ = inputs(200, 2, 8, 2, 8, 16)
    starts = two_rows_of_documents(200)
    packed = attention(*leaves, softmax_scale=0.3, window=window, document_starts=starts)
    for row in range(2):
        bounds = sorted({0, 200, *starts[:, row].nonzero().flatten().tolist()})
        for begin, end in zip(bounds, bounds[1:], strict=False):
            alone = attention(*(x[begin:end, row : row + 1] for x in leaves), softmax_scale=0.3, window=window)
            torch.testing.assert_close(packed[begin:end, row : row + 1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("documents", [False, True])
def test_sink(heads, documents) -> None:
    leaves, grad = inputs(200, 2, *heads)
    sink = torch.linspace(-2, 3, heads[0]).requires_grad_()  # no two heads alike
    starts = two_rows_of_documents(200) if documents else None
    assert_matches_reference([*leaves, sink], grad, document_starts=starts)


def test_sink_of_minus_infinity_takes_nothing() -> None:
    leaves, _ = inputs(50, 2, 8, 2, 8, 8)
    options = {"softmax_scale": 0.3, "document_starts": torch.arange(50)[:, None].expand(50, 2) % 20 == 0}
    torch.testing.assert_close(
        attention(*leaves, sink=torch.full((8,), -1e4), **options), attention(*leaves, **options), rtol=1e-6, atol=1e-6
    )


def test_bf16() -> None:
    # one rounding to bf16 is 2^-8; a gradient passes several
    assert_matches_reference(
        *inputs(200, 2, 8, 2, 16, 32, torch.bfloat16),
        tolerance=1e-2,
        window=50,
        document_starts=two_rows_of_documents(200),
    )


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("with_documents", [False, True])
def test_cpu_takes_only_the_fused_kernel(window, with_documents) -> None:
    leaves, grad = inputs(200, 2, 8, 2, 8, 16)
    starts = two_rows_of_documents(200) if with_documents else None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # torch raises where the kernel does not serve
        attention(*leaves, softmax_scale=0.3, window=window, document_starts=starts).backward(grad)
        if window is None:
            attention(*leaves, softmax_scale=0.3, document_starts=starts, sink=torch.ones(8)).backward(grad)


@pytest.mark.parametrize("window", [None, 5])
def test_dropout_drops_the_stated_share_and_keeps_the_mean(window) -> None:
    s = 64
    query = key = torch.zeros(s, 1, 1, s)  # equal weights on all visible tokens
    value = torch.eye(s).view(s, 1, 1, s)  # so that the output is the weights
    torch.manual_seed(0)
    samples = torch.stack(
        [attention(query, key, value, softmax_scale=1.0, window=window, dropout_p=0.25).squeeze() for _ in range(400)]
    )
    plain = attention(query, key, value, softmax_scale=1.0, window=window).squeeze()
    visible = plain > 0
    assert (samples[:, visible] == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(samples.mean(0)[visible], plain[visible], rtol=0.15, atol=0)
    assert not samples[:, ~visible].any()


MEASURE = """
import json, resource, sys, torch
from pathlib import Path
from archscale_megatron.ops.attention import attention
torch.set_num_threads(1)
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # fail early where memory is not linear
peaks = []
for s in (256, 8192, 32768):
    q, k, v = (torch.randn(s, 1, heads, 32, requires_grad=True) for heads in (2, 1, 1))
    starts = torch.arange(s)[:, None] % 4000 == 0 if sys.argv[1] == "documents" else None
    attention(q, k, v, softmax_scale=0.2, window=128, document_starts=starts).sum().backward()
    status = Path("/proc/self/status").read_text()  # not ru_maxrss, which begins with the parent's
    peaks.append(int(status.split("VmHWM:")[1].split()[0]))  # KiB
print(json.dumps(peaks))
"""


@pytest.mark.parametrize("packing", ["one", "documents"])
def test_memory_of_a_window_is_linear_in_length(packing) -> None:
    command = [sys.executable, "-c", MEASURE, packing]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    base, short, long = json.loads(run.stdout)
    # Four times the tokens: 4 when linear, 16 when quadratic. Both are well above the allocator's noise.
    assert short - base > 4 * 1024
    assert (long - base) / (short - base) < 6


def test_wrong_arguments_are_refused() -> None:
    (query, key, value), _ = inputs(6, 2, 4, 2, 8, 8)
    starts = torch.zeros(6, 2, dtype=torch.bool)
    for arguments, options, message in [
        ((query[:, :, :3], key, value), {}, "n_q a multiple of n_kv"),
        ((query, key[..., :4], value), {}, "give query"),
        ((query, key, value[:5]), {}, "give query"),
        ((query[0], key[0], value[0]), {}, "heads, head_dim"),
        ((query, key, value), {"window": 0}, "at least 1"),
        ((query, key, value), {"window": 3, "sink": torch.zeros(4)}, "and no window"),
        ((query, key, value), {"sink": torch.zeros(2)}, "one logit for each of the 4 query heads"),
        ((query, key, value), {"document_starts": starts.t()}, "document_starts"),
        ((query, key, value), {"document_starts": starts.int()}, "document_starts"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(*arguments, softmax_scale=1.0, **options)


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda"


@pytest.fixture(params=["torch", "flash_attn"])
def flash(request, monkeypatch, cuda) -> str:
    """The name of the gradient of torch's flash kernel, and of the package's."""
    if request.param == "torch":
        monkeypatch.setattr(flash_attention, "optional", lambda name: None)
        return "FlashAttentionBackward0"
    if flash_attention.optional("flash_attn") is None:
        pytest.skip("no package flash-attn that loads")
    return "FlashAttn"


GPU_HEADS = [(8, 2, 64, 64), (4, 4, 128, 128), (4, 2, 64, 128), (4, 1, 128, 256)]
GPU_BF16 = 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("heads", GPU_HEADS)
@pytest.mark.parametrize("s", [128, 256])
def test_cudnn(cuda, heads, s) -> None:
    out = assert_matches_reference(*inputs(s, 2, *heads, torch.bfloat16, cuda), tolerance=GPU_BF16)
    assert "ScaledDotProductCudnnAttentionBackward0" in kernels_behind(out)
    assert out.is_contiguous()  # so that its heads are flattened in place


@pytest.mark.gpu
@pytest.mark.parametrize("heads", GPU_HEADS)
@pytest.mark.parametrize("window", [None, 1, 50, 1000])
@pytest.mark.parametrize("with_documents", [False, True])
def test_flash(flash, heads, window, with_documents) -> None:
    starts = two_rows_of_documents(200).cuda() if with_documents else None
    leaves, grad = inputs(200, 2, *heads, torch.bfloat16, "cuda")
    out = assert_matches_reference(leaves, grad, GPU_BF16, window=window, document_starts=starts)
    assert any(name.startswith(flash) for name in kernels_behind(out))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", GPU_HEADS[:3])
@pytest.mark.parametrize("with_documents", [False, True])
def test_flash_with_a_sink(flash, heads, with_documents) -> None:
    leaves, grad = inputs(200, 2, *heads, torch.bfloat16, "cuda")
    sink = torch.linspace(-2, 3, heads[0], dtype=torch.bfloat16, device="cuda").requires_grad_()
    starts = two_rows_of_documents(200).cuda() if with_documents else None
    out = assert_matches_reference([*leaves, sink], grad, GPU_BF16, document_starts=starts)
    assert any(name.startswith(flash) for name in kernels_behind(out))


@pytest.mark.gpu
@pytest.mark.parametrize("s", [1, 2])
@pytest.mark.parametrize("window", [None, 1])
def test_flash_of_few_tokens(flash, s, window) -> None:
    assert_matches_reference(*inputs(s, 2, 4, 2, 64, 64, torch.bfloat16, "cuda"), tolerance=GPU_BF16, window=window)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_flash_drops_the_same_weights_in_both_passes(flash, window) -> None:
    s = 64
    query = key = torch.zeros(s, 1, 1, s, dtype=torch.bfloat16, device="cuda")
    value = torch.eye(s, dtype=torch.bfloat16, device="cuda").view(s, 1, 1, s).requires_grad_()
    grad = torch.randn(s, 1, 1, s, device="cuda").bfloat16()
    kept = []
    for _ in range(100):
        weights = attention(query, key, value, softmax_scale=1.0, window=window, dropout_p=0.25)
        (value_grad,) = torch.autograd.grad(weights, value, grad)
        expected = weights.squeeze().double().t() @ grad.squeeze().double()
        assert difference(value_grad.squeeze(), expected.cpu()) < GPU_BF16
        kept.append(weights.squeeze() > 0)
    visible = attention(query, key, value, softmax_scale=1.0, window=window).squeeze() > 0
    assert torch.stack(kept)[:, visible].double().mean().item() == pytest.approx(0.75, abs=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", GPU_HEADS[::2])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("with_documents", [False, True])
def test_fp32_on_a_gpu(cuda, heads, window, with_documents) -> None:
    starts = two_rows_of_documents(200).cuda() if with_documents else None
    assert_matches_reference(*inputs(200, 2, *heads, device=cuda), window=window, document_starts=starts)
