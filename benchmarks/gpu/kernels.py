"""Our kernels against their rivals, forward and backward: `python -m benchmarks.gpu.kernels RESULTS [--rehearse]`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROUNDS = 15
BATCH, D_INNER, D_STATE = 4, 3968, 16  # of sambay at depth 16
HEADS, KV_HEADS, HEAD_DIM, WINDOW = 16, 4, 128, 128
DOCUMENT_LENGTH = 1024

Variant = Callable[..., Tensor]


def scan_inputs(length: int, batch: int, d: int, device: str) -> list[Tensor]:
    """With Mamba's initial decays and steps; x is half of a projection, B and C are parts of one."""
    A = -torch.arange(1.0, D_STATE + 1).repeat(d, 1)
    dt_bias = torch.empty(d).uniform_(1e-3, 0.1).expm1().log()
    x, dt = (torch.randn(length, batch, d, dtype=torch.bfloat16) for _ in range(2))
    B, C = torch.randn(length, batch, 2 * D_STATE, dtype=torch.bfloat16).split(D_STATE, -1)
    return [v.to(device) for v in (x, dt, A, B, C, torch.ones(d), dt_bias)]


def scans(batch: int) -> dict[str, Variant]:
    from archscale_megatron.ops.selective_scan import selective_scan

    def starts(x: Tensor) -> Tensor:
        return (torch.arange(len(x), device=x.device) % DOCUMENT_LENGTH == 0).unsqueeze(1).expand(-1, batch)

    def with_starts(*inputs: Tensor, **options: Any) -> Tensor:
        return selective_scan(*inputs, document_starts=starts(inputs[0]), **options)

    return {
        "mamba_ssm": lambda *inputs: selective_scan(*inputs, backend="mamba_ssm"),
        "Triton": lambda *inputs: selective_scan(*inputs, backend="triton"),
        "Triton, documents": lambda *inputs: with_starts(*inputs, backend="triton"),
    }


def attentions(window: int | None) -> dict[str, Variant]:
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from archscale_megatron.ops.attention import attention

    def sdpa(backend: SDPBackend) -> Variant:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)

        return run

    def documents(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        starts = (torch.arange(len(q), device=q.device) % DOCUMENT_LENGTH == 0).unsqueeze(1).expand(-1, q.shape[1])
        return attention(q, k, v, softmax_scale=HEAD_DIM**-0.5, window=window, document_starts=starts.contiguous())

    ours = {
        "ours": lambda q, k, v: attention(q, k, v, softmax_scale=HEAD_DIM**-0.5, window=window),
        "ours, documents": documents,
    }
    if window is not None:
        return ours
    return ours | {
        "SDPA, flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "SDPA, cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    }


def milliseconds(function: Variant, inputs: list[Tensor], rounds: int) -> tuple[float, float, float]:
    """Medians of forward, of backward, and MiB at most allocated beyond the inputs."""
    leaves = [v.detach().requires_grad_() for v in inputs]
    grad = torch.randn_like(function(*leaves))
    cuda = grad.is_cuda
    times: list[tuple[float, float]] = []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    for _ in range(rounds):
        start = mark(cuda)
        y = function(*leaves)
        middle = mark(cuda)
        torch.autograd.grad(y, leaves, grad)
        times.append((elapsed(start, middle), elapsed(middle, mark(cuda))))
        del y
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else 0.0
    forward, backward = (statistics.median(column) for column in zip(*times[2:], strict=True))
    return forward, backward, peak


def mark(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start: Any, end: Any) -> float:
    """Milliseconds between two marks; waits for the second."""
    if isinstance(start, float):
        return 1e3 * (end - start)
    end.synchronize()
    return start.elapsed_time(end)


def ceilings(device: str, rehearse: bool) -> dict[str, float]:
    """What this card gives: bytes/s of a copy, read and written; FLOP/s of a bf16 product."""
    n = 256 if rehearse else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(n * n * 4, device=device)
    target = torch.empty_like(source)
    found = {}
    for name, run, work in (
        ("product_flops", lambda: a @ b, 2 * n**3),
        ("copy_bytes", lambda: target.copy_(source), 2 * source.numel() * 4),
    ):
        times = []
        for _ in range(10):
            start = mark(a.is_cuda)
            run()
            times.append(elapsed(start, mark(a.is_cuda)) / 1e3)
        found[name] = work / statistics.median(times[3:])
    return found


def main(results: Path, rehearse: bool) -> None:
    device = "cpu" if rehearse else "cuda"
    rounds = 3 if rehearse else ROUNDS

    def write(**row: Any) -> None:
        print(row, flush=True)
        with results.open("a") as file:
            file.write(json.dumps({"part": "kernels", **row}) + "\n")

    write(name="ceilings", **ceilings(device, rehearse))
    torch.manual_seed(0)
    shapes = [(64, 2), (70, 1)] if rehearse else [(4096, BATCH), (8192, 2), (32768, 1)]
    for length, batch in shapes:
        inputs = scan_inputs(length, batch, 32 if rehearse else D_INNER, device)
        qkv = [
            torch.randn(length, batch, heads, HEAD_DIM, dtype=torch.bfloat16, device=device)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]
        groups = {
            "selective scan": (scans(batch), inputs),
            "full attention": (attentions(None), qkv),
            f"attention, window {WINDOW}": (attentions(min(WINDOW, length // 2)), qkv),
        }
        for op, (variants, values) in groups.items():
            for name, variant in variants.items():
                row: dict[str, Any] = {"op": op, "name": name, "length": length, "batch": batch}
                try:
                    forward, backward, peak = milliseconds(variant, values, rounds)
                    row |= {"forward_ms": forward, "backward_ms": backward, "peak_mib": peak}
                except Exception as error:  # whatever a kernel raises is a result
                    row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
                write(**row)


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--rehearse" in sys.argv[2:])
