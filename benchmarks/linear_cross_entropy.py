"""Time and memory of `linear_cross_entropy` against Megatron's loss from whole logits.

    python benchmarks/linear_cross_entropy.py [--threads 2] [--repeats 5]

Prints a markdown table. Times are medians of forward and backward over rounds in which both take turns, so that other
load falls on both alike. Memory is the growth of the process's peak over its size before the call, gradients included,
each in a process of its own.
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
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from archscale_megatron import cpu

cpu.install()

from megatron.core.tensor_parallel import vocab_parallel_cross_entropy  # noqa: E402

from archscale_megatron.ops.linear_cross_entropy import linear_cross_entropy  # noqa: E402

TOKENS = 2048
SIZES = ((32_000, 64), (32_000, 512), (200_064, 64), (200_064, 512))  # vocabulary, hidden size


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return vocab_parallel_cross_entropy(hidden @ weight.t(), labels, tp_group=dist.group.WORLD)


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, vocab_size=len(weight))


VARIANTS: dict[str, Callable[..., Tensor]] = {"plain": plain, "chunked": chunked}


def make_inputs(tokens: int, vocabulary: int, hidden_size: int) -> list[Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, 1, hidden_size, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size).mul_(hidden_size**-0.5).requires_grad_()
    return [hidden, weight, torch.randint(vocabulary, (tokens, 1))]


def run(variant: str, inputs: list[Tensor]) -> None:
    torch.autograd.grad(VARIANTS[variant](*inputs).mean(), inputs[:2])


def median_seconds(vocabulary: int, hidden_size: int, repeats: int) -> dict[str, float]:
    inputs = make_inputs(TOKENS, vocabulary, hidden_size)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(repeats + 1):
        for name, values in times.items():
            start = time.perf_counter()
            run(name, inputs)
            values.append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def peak_mib(variant: str, vocabulary: int, hidden_size: int, threads: int) -> float:
    numbers = [str(number) for number in (vocabulary, hidden_size)]
    command = [sys.executable, __file__, "--peak-of", variant, *numbers, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def print_peak_growth(variant: str, vocabulary: int, hidden_size: int) -> None:
    run(variant, make_inputs(8, 64, hidden_size))  # torch's own start-up is not counted
    inputs = make_inputs(TOKENS, vocabulary, hidden_size)
    before = memory_kib("VmRSS")
    run(variant, inputs)
    print((memory_kib("VmHWM") - before) / 1024)


def memory_kib(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if options.peak_of:
        variant, *numbers = options.peak_of
        print_peak_growth(variant, *map(int, numbers))
        return

    print(f"Python {platform.python_version()}, torch {torch.__version__}, {options.threads} threads, ", end="")
    print(f"{TOKENS} tokens, fp32, medians of {options.repeats}\n")
    print("| vocabulary | hidden size | loss | ms | of plain | peak memory MiB | of plain |")
    print("|---|---|---|---|---|---|---|")
    for vocabulary, hidden_size in SIZES:
        seconds = median_seconds(vocabulary, hidden_size, options.repeats)
        memory = {name: peak_mib(name, vocabulary, hidden_size, options.threads) for name in VARIANTS}
        for name in VARIANTS:
            print(f"| {vocabulary:,} | {hidden_size} | {name} | {1e3 * seconds[name]:.0f} ", end="")
            print(f"| {seconds[name] / seconds['plain']:.2f} ", end="")
            print(f"| {memory[name]:.0f} | {memory[name] / memory['plain']:.3f} |", flush=True)


if __name__ == "__main__":
    main()
