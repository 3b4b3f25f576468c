"""One model's training step on one GPU: tokens/s, MFU, peak memory, and the time of each kind of kernel.

A process for each model, started by `benchmarks.gpu`: `python -m benchmarks.gpu.steps NAME SETTINGS RESULTS`.
The step is what `pretrain_archscale.py` runs: Megatron's `train_step` with its optimizer and gradient buffers.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BF16_PEAK = 989e12  # FLOP/s of an H100 or H200 without sparsity, by the datasheet
TOP_KERNELS, TOP_GAPS = 40, 20
# Kind -> what the names of its kernels hold; the first that fits.
KINDS = {
    "attention": r"flash|fmha|sdpa|cudnn.*attn|attention",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma",
    "scan": r"scan|ssd|chunk_",
    "convolution": r"conv_",
    "optimizer": r"adam|multi_tensor|foreach",
    "elementwise": r"^triton_",  # what torch.compile made
    "copies": r"copy|memcpy|memset|catarray|transpose|fill",
}


@dataclasses.dataclass
class Settings:
    """What is measured: a model, its batch, and further options of training."""

    family: str
    depth: int
    length: int = 4096
    micro_batch: int = 4
    micro_batches: int = 2
    options: tuple[str, ...] = ()
    document_length: int = 0  # tokens on average; 0 is one document
    scan: str = "triton"  # backend of the selective scan
    warm_up: int = 3
    steps: int = 7
    profiled: bool = True
    seconds: int = 90  # after which it is given up


def measure(settings: Settings) -> dict[str, Any]:
    """Build, train, measure."""
    from archscale_megatron import cpu

    cpu.install()

    from archscale_megatron import megatron_patches

    megatron_patches.apply()

    import torch
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.training import get_args, get_tokenizer
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer, train_step

    from archscale_megatron.archs.counts import training_flops
    from archscale_megatron.ops import selective_scan
    from archscale_megatron.training.arguments import parse_arguments
    from archscale_megatron.training.step import forward_step, model_provider

    sequences = settings.micro_batch * settings.micro_batches
    documents = ["--reset-at-eod"] if settings.document_length else []
    sys.argv = (
        f"""pretrain_archscale.py --train-model {settings.family} --depth {settings.depth} --mock-data
        --tokenizer-type NullTokenizer --seq-length {settings.length} --micro-batch-size {settings.micro_batch}
        --global-batch-size {sequences} --train-iters 1000 --lr 1e-4 --weight-decay 0.1 --clip-grad 1.0
        --use-distributed-optimizer --bf16""".split()
        + [*documents, *settings.options]
    )
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    if not cpu.ACTIVE:
        selective_scan._usable_backends = lambda x, with_starts: [settings.scan]
    parse_arguments()
    torch.backends.cuda.matmul.allow_tf32 = True  # as pretrain_archscale.py has it for bf16
    initialize_megatron(allow_no_cuda=cpu.ACTIVE)
    model, optimizer, scheduler = setup_model_and_optimizer(ModelType.encoder_or_decoder, model_provider)
    config, end_of_document = model[0].config, get_tokenizer().eod
    generator = torch.Generator().manual_seed(1)

    def samples() -> Iterator[dict[str, torch.Tensor]]:
        shape = (settings.micro_batch, settings.length + 1)
        while True:
            tokens = torch.randint(get_args().architecture.vocab_size - 1, shape, generator=generator)
            if settings.document_length:
                tokens[torch.rand(shape, generator=generator) < 1 / settings.document_length] = end_of_document
            yield {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "position_ids": torch.arange(settings.length).expand(settings.micro_batch, -1),
                "loss_mask": torch.ones(settings.micro_batch, settings.length),
            }

    batches = RerunDataIterator(samples())

    def step() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        losses, *_ = train_step(
            forward_step, batches, model, optimizer, scheduler, config, get_forward_backward_func(), iteration=0
        )
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        return losses["lm loss"].item()

    seconds: list[float] = []
    start = time.perf_counter()
    losses = [step() for _ in range(settings.warm_up)]
    warm_up = time.perf_counter() - start
    seconds.clear()
    torch.cuda.reset_peak_memory_stats()
    losses += [step() for _ in range(settings.steps)]
    median, tokens = statistics.median(seconds), sequences * settings.length
    flops = training_flops(get_args().architecture, settings.length)
    result = {
        "parameters": sum(p.numel() for p in model[0].parameters()),
        "seconds": seconds[:],
        "tokens_per_second": tokens / median,
        "tflops": flops * tokens / median / 1e12,
        "mfu": flops * tokens / median / BF16_PEAK,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "warm_up_seconds": warm_up,
        "losses": losses,
    }
    if settings.profiled and not cpu.ACTIVE:
        try:
            result |= profile(step)
        except RuntimeError as error:
            result["profile_error"] = str(error)
    return result


def profile(step: Any) -> dict[str, Any]:
    """Milliseconds of one step's kernels by kind, and the longest of them by name."""
    import torch
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time_total / 1e3
            calls[event.name] += 1
    kinds: Counter[str] = Counter()
    for name, ms in times.items():
        kinds[kind_of(name)] += ms
    gaps = idle(profiler.events())
    top = [[name[:160], round(ms, 3), calls[name]] for name, ms in times.most_common(TOP_KERNELS)]
    return {
        "kernel_ms": dict(kinds.most_common()),
        "kernel_ms_sum": sum(times.values()),
        "top_kernels": top,
        "gaps": gaps,
    }


def idle(events: Any) -> list[list[Any]]:
    """The longest times in which the GPU had nothing to do: milliseconds, and the kernels before and behind."""
    import torch

    cuda = torch.autograd.DeviceType.CUDA
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events if e.device_type == cuda)
    gaps: list[list[Any]] = []
    end, last = (spans[0][0], "") if spans else (0, "")
    for start, stop, name in spans:
        if start > end:
            gaps.append([round((start - end) / 1e3, 3), last[:100], name[:100]])
        if stop > end:
            end, last = stop, name
    longest = sorted(gaps, key=lambda gap: -gap[0])[:TOP_GAPS]
    return [[round(sum(gap[0] for gap in gaps), 3), "all", f"{len(gaps)} gaps"], *longest]


def kind_of(kernel: str) -> str:
    """Of a kernel, by its name; what has no other kind is elementwise work, norms and sums."""
    return next((kind for kind, names in KINDS.items() if re.search(names, kernel, re.IGNORECASE)), "elementwise")


def give_up(*_: Any) -> None:
    raise TimeoutError("not done in time")


def main(name: str, settings: Settings, results: Path) -> None:

    from archscale_megatron import cpu

    cpu.install()
    import megatron.training  # noqa: F401

    with open(results.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the GPU is one model's at a time
        signal.signal(signal.SIGALRM, give_up)
        signal.alarm(settings.seconds)
        start = time.perf_counter()
        try:
            result = measure(settings)
        except (Exception, SystemExit) as error:
            result = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
            raise
        finally:
            row = {"part": "steps", "name": name, "settings": dataclasses.asdict(settings), **result}
            row["wall_seconds"] = time.perf_counter() - start
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Settings(**json.loads(sys.argv[2])), Path(sys.argv[3]))
