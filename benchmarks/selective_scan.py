"""Time and memory of `selective_scan` against autograd through the plain loop over steps.

    python benchmarks/selective_scan.py [--threads 2] [--repeats 7]

Prints a markdown table. Times are medians over rounds in which all variants take turns, so that other load falls on all
of them alike. Memory is the growth of the process's peak over its size before the first call, each variant in a process
of its own; on a GPU, that of torch's allocator.
"""

import argparse
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from archscale_megatron.ops import selective_scan as scan

BATCH, D_INNER, D_STATE = 1, 512, 16
LENGTHS = (256, 512, 1024, 2048)
DOCUMENT_LENGTH = 128


def sequential(x, dt, A, B, C, D, dt_bias) -> Tensor:
    """Autograd through the recurrence, step by step. Unbound steps: indexing makes the backward pass quadratic."""
    delta = F.softplus(dt + dt_bias)
    h = x.new_zeros(*x.shape[1:], A.shape[1])
    outputs = []
    for x_t, delta_t, B_t, C_t in zip(x.unbind(), delta.unbind(), B.unbind(), C.unbind(), strict=True):
        h = torch.exp(delta_t.unsqueeze(-1) * A) * h + (delta_t * x_t).unsqueeze(-1) * B_t.unsqueeze(1)
        outputs.append((h * C_t.unsqueeze(1)).sum(-1) + D * x_t)
    return torch.stack(outputs)


def with_documents(*args) -> Tensor:
    starts = torch.arange(len(args[0]), device=args[0].device) % DOCUMENT_LENGTH == 0
    return scan.selective_scan(*args, document_starts=starts.unsqueeze(1).expand(-1, BATCH))


def backend(name: str) -> Callable[..., Tensor]:
    return lambda *args: scan.selective_scan(*args, backend=name)


VARIANTS: dict[str, Callable[..., Tensor]] = {
    "sequential autograd": sequential,
    "ours, torch": backend("torch"),
    f"ours, torch, documents of {DOCUMENT_LENGTH}": with_documents,
}
GPU_VARIANTS = {"ours, Triton": backend("triton"), "mamba_ssm": backend("mamba_ssm")}


def make_inputs(length: int, device: str) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    A = -torch.arange(1.0, D_STATE + 1).repeat(D_INNER, 1)  # Mamba's initial values, as is the range of steps
    dt_bias = torch.empty(D_INNER).uniform_(1e-3, 0.1).expm1().log()
    x, dt, weight = (torch.randn(length, BATCH, D_INNER) for _ in range(3))
    B, C = (torch.randn(length, BATCH, D_STATE) for _ in range(2))
    inputs = [x, dt, A, B, C, torch.ones(D_INNER), dt_bias]
    return [v.to(device).requires_grad_() for v in inputs], weight.to(device)


def forward_and_backward(function: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> None:
    torch.autograd.grad(function(*inputs), inputs, weight)


def forward(function: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> None:
    with torch.no_grad():
        function(*inputs)


def median_ms(functions: dict[str, Callable[..., Tensor]], length: int, device: str, repeats: int, run) -> dict:
    inputs, weight = make_inputs(length, device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            run(function, inputs, weight)  # pays for memory that the previous variant left in pieces
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            run(function, inputs, weight)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mib(name: str, length: int, threads: int) -> float:
    command = [sys.executable, __file__, "--peak-of", name, "--length", str(length), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_growth(function: Callable[..., Tensor], length: int) -> None:
    forward_and_backward(function, *make_inputs(4, "cpu"))  # torch's own start-up is not counted
    inputs, weight = make_inputs(length, "cpu")
    before = memory_kib("VmRSS")
    forward_and_backward(function, inputs, weight)
    print((memory_kib("VmHWM") - before) / 1024)


def memory_kib(field: str) -> int:
    """Of this process. (getrusage's peak is no use here: a child process starts with that of its parent.)"""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--peak-of", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        print_peak_growth(VARIANTS[options.peak_of], options.length)
        return

    print(f"Python {platform.python_version()}, torch {torch.__version__}, {options.threads} threads, ", end="")
    print(f"batch {BATCH}, d_inner {D_INNER}, d_state {D_STATE}, fp32, medians of {options.repeats}\n")
    print("| length | variant | forward ms | forward + backward ms | times faster | peak memory MiB | of sequential |")
    print("|---|---|---|---|---|---|---|")
    for length in LENGTHS:
        fwd = median_ms(VARIANTS, length, "cpu", options.repeats, forward)
        both = median_ms(VARIANTS, length, "cpu", options.repeats, forward_and_backward)
        memory = {name: peak_mib(name, length, options.threads) for name in VARIANTS}
        slow, large = both["sequential autograd"], memory["sequential autograd"]
        for name in VARIANTS:
            print(f"| {length} | {name} | {fwd[name]:.1f} | {both[name]:.1f} | {slow / both[name]:.1f} ", end="")
            print(f"| {memory[name]:.0f} | {memory[name] / large:.2f} |", flush=True)
    for name, function in GPU_VARIANTS.items():
        if not torch.cuda.is_available():
            print(f"| {LENGTHS[0]} to {LENGTHS[-1]} | {name} | no GPU here | | | | |")
            continue
        for length in LENGTHS:
            try:
                fwd, both = (
                    median_ms({name: function}, length, "cuda", options.repeats, run)[name]
                    for run in (forward, forward_and_backward)
                )
            except ValueError as error:
                print(f"| {length} | {name} | {error} | | | | |")
                continue
            torch.cuda.reset_peak_memory_stats()
            inputs, weight = make_inputs(length, "cuda")
            before = torch.cuda.memory_allocated()
            forward_and_backward(function, inputs, weight)
            memory_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
            print(
                f"| {length} | {name}, {torch.cuda.get_device_name()} | {fwd:.2f} | {both:.2f} | | {memory_mib:.0f} | |"
            )


if __name__ == "__main__":
    main()
