"""The chunked loss against the formula in plain torch: values, gradients, tensor-parallel ranks, peak memory.

As a program, this module is the worker of its tests in processes of their own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from archscale_megatron.ops.linear_cross_entropy import linear_cross_entropy
from tests.launch import ROOT, torchrun

TOLERANCE = 1e-5
LARGE = {"tokens": 2048, "vocab_size": 200_064, "hidden_size": 64}


def reference(hidden, weight, labels, *, vocab_size, label_smoothing=0.0):
    log_p = torch.log_softmax(hidden @ weight.t(), dim=-1)
    nll = -log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (1 - label_smoothing) * nll - label_smoothing * log_p[..., :vocab_size].mean(-1)


def inputs(shape, rows, vocab_size, hidden_size=8, dtype=torch.float64, scale=1.0):
    """hidden [*shape, h], weight [rows, h], labels and the gradient of the losses [*shape]."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(*shape, hidden_size, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab_size, shape, generator=generator)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, grad


def with_gradients(function, hidden, weight, labels, grad, **options):
    losses = function(hidden, weight, labels, **options)
    return losses.detach(), *torch.autograd.grad(losses, (hidden, weight), grad.to(losses.dtype))


def difference(values, expected):
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(values, expected, strict=True))


CASES = {
    "one_block": ((5, 3), 40, 40, 40, 0.0),
    "blocks": ((5, 3), 40, 40, 8, 0.0),
    "last_block_shorter": ((5, 3), 40, 40, 7, 0.0),
    "one_row": ((4, 2), 11, 11, 1, 0.1),
    "one_token": ((1, 1), 40, 40, 16, 0.1),
    "one_dimension": ((6,), 40, 40, 16, 0.1),
    "smoothed": ((5, 3), 40, 40, 7, 0.1),
    "padded": ((5, 3), 48, 40, 7, 0.1),
    "last_block_all_padding": ((5, 3), 48, 40, 16, 0.3),
    "block_chosen": ((5, 3), 300, 290, None, 0.1),
}


@pytest.mark.parametrize(("shape", "rows", "vocab_size", "block", "smoothing"), CASES.values(), ids=CASES)
def test_losses_and_gradients(shape, rows, vocab_size, block, smoothing) -> None:
    options = {"vocab_size": vocab_size, "label_smoothing": smoothing}
    expected = with_gradients(reference, *inputs(shape, rows, vocab_size), **options)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        given = inputs(shape, rows, vocab_size, dtype=dtype)
        found = with_gradients(linear_cross_entropy, *given, **options, block_size=block)
        assert [v.dtype for v in found] == [dtype] * 3
        assert difference(found, expected) < tolerance


def test_smoothing_is_that_of_torch() -> None:
    hidden, weight, labels, _ = inputs((9,), 40, 40)
    found = linear_cross_entropy(hidden, weight, labels, vocab_size=40, label_smoothing=0.2, block_size=7)
    expected = F.cross_entropy(hidden @ weight.t(), labels, label_smoothing=0.2, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_huge_logits() -> None:
    """Logits of 1e5 overflow every exponential that is not taken relative to the maximum of all blocks."""
    expected = with_gradients(reference, *inputs((5, 3), 40, 40, scale=3e4), vocab_size=40)
    given = inputs((5, 3), 40, 40, dtype=torch.float32, scale=3e4)
    found = with_gradients(linear_cross_entropy, *given, vocab_size=40, block_size=7)
    assert difference(found, expected) < TOLERANCE


def test_half_precision_is_computed_in_fp32() -> None:
    """bf16 inputs: fp32 losses as exact as of fp32 inputs, and gradients that are rounded once."""
    given = inputs((64, 2), 300, 300, dtype=torch.bfloat16)
    exact = [v.detach().double().requires_grad_() for v in given[:2]]
    expected = with_gradients(reference, *exact, *given[2:], vocab_size=300)
    found = with_gradients(linear_cross_entropy, *given, vocab_size=300, block_size=64)
    assert [v.dtype for v in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert difference(found[:1], expected[:1]) < 1e-6
    for value, exact_value in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(value.double(), exact_value, rtol=2**-8, atol=1e-5)


def test_tensor_parallel_ranks() -> None:
    torchrun(2, "-m", "tests.ops.test_linear_cross_entropy", "parallel")


def test_peak_memory_of_a_large_vocabulary() -> None:
    """At most an eighth of what Megatron's loss from whole logits takes, with the same gradients."""
    command = [sys.executable, "-m", "tests.ops.test_linear_cross_entropy", "peak"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
    measured = json.loads(output.splitlines()[-1])
    assert measured["difference"] < TOLERANCE, measured
    logits = LARGE["tokens"] * LARGE["vocab_size"] * 4
    assert measured["plain"] > logits, "the measure misses the logits"
    assert measured["chunked"] <= measured["plain"] / 8, measured


def parallel() -> None:
    """Each rank has half of the rows; what it makes of them equals the whole reference's part."""
    dist.init_process_group("gloo")
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    for vocab_size in (48, 40, 20):  # no padding, some, and a rank with nothing else
        for smoothing in (0.0, 0.1):
            for block in (5, 8, 100):
                options = {"vocab_size": vocab_size, "label_smoothing": smoothing}
                given = inputs((5, 3), 48, vocab_size)
                losses, grad_hidden, grad_weight = with_gradients(reference, *given, **options)
                hidden, weight, labels, grad = given
                local = weight.detach().chunk(size)[rank].clone().requires_grad_()
                options |= {"tp_group": group, "block_size": block}
                found = with_gradients(linear_cross_entropy, hidden, local, labels, grad, **options)
                dist.all_reduce(found[1], group=group)
                expected = (losses, grad_hidden, grad_weight.chunk(size)[rank])
                assert difference(found, expected) < 1e-13, (vocab_size, smoothing, block)
    dist.destroy_process_group()


def peak() -> None:
    """Print the growth of this process's peak memory (bytes) with each loss, forward and backward."""
    from archscale_megatron import cpu

    cpu.install()
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def plain(hidden, weight, labels, *, vocab_size):
        return vocab_parallel_cross_entropy(hidden @ weight.t(), labels, tp_group=dist.group.WORLD)

    def measure(function, tokens, vocab_size, hidden_size):
        given = inputs((tokens, 1), vocab_size, vocab_size, hidden_size, torch.float32)
        before = memory("VmRSS")
        values = with_gradients(function, *given, vocab_size=vocab_size)
        return memory("VmHWM") - before, values

    for function in (linear_cross_entropy, plain):
        measure(function, 8, 64, 64)  # torch's own start-up is not counted
    chunked, found = measure(linear_cross_entropy, **LARGE)
    whole, expected = measure(plain, **LARGE)  # second: a peak is only seen where it is higher than those before
    result = {"chunked": chunked, "plain": whole, "difference": difference(found, [v.double() for v in expected])}
    print("\n" + json.dumps(result))


def memory(field: str) -> int:
    """Bytes of this process; "VmHWM" is the peak of "VmRSS"."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return 1024 * int(match[1])


if __name__ == "__main__":
    {"parallel": parallel, "peak": peak}[sys.argv[1]]()
