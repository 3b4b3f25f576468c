"""Time of saving and loading a training checkpoint, against torch.save and torch.load of the same bytes.

    python benchmarks/checkpoint.py [--runs 10] [--directory .] [--without-stock]

Prints a markdown table. A model of about 100M parameters, fp32, with Adam's state: 1.6 GB with the optimizer's copy of
the parameters. Ours and "Megatron's" are `save_checkpoint` and `load_checkpoint` as `pretrain` calls them, fully
reshardable, after training steps; Megatron's without those of our patches that concern checkpoints. The variants take
turns, so that other load falls on all alike. Files are deleted, and the disk is idle, before the next turn. What is
loaded was just written: it comes from the page cache.

The stall of an asynchronous save is the time that training waits: in `save_checkpoint`, and in the call that finds the
worker done and finishes the checkpoint.
"""

import argparse
import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FAMILY, DEPTH, ASPECT_RATIO, VOCABULARY, LENGTH = "sambay", 12, 56, 16384, 64
# What makes saving and loading ours; without them it is Megatron's.
CHECKPOINT_PATCHES = (
    "_synchronous_save_without_manager", "_optimizer_state_without_gathering", "_save_without_copies",
    "_asynchronous_save_of_a_snapshot", "_checkpoint_worker_outlives_sigterm", "_checkpoints_with_digests",
    "_saves_end_on_all_ranks", "_load_newest_whole_checkpoint", "_no_code_in_checkpoints",
)  # fmt: skip
STOCK = "BENCHMARK_OF_STOCK_CHECKPOINTS"

if __name__ == "__mp_main__":  # in the processes that are measured, and in Megatron's checkpoint worker
    sys.path.insert(0, str(ROOT))
    from archscale_megatron import cpu

    cpu.install()
    from archscale_megatron import megatron_patches

    for patch in CHECKPOINT_PATCHES if STOCK in os.environ else ():
        if hasattr(megatron_patches, patch):
            setattr(megatron_patches, patch, lambda: None)
    megatron_patches.apply()

Measurements = dict[str, Callable[[], float]]
"""What is measured -> a function that does it and returns its seconds."""


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def sized(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def torchs(directory: Path, rank: int, processes: int) -> tuple[Measurements, int]:
    import torch

    from archscale_megatron.archs.build import build_architecture
    from archscale_megatron.archs.counts import parameters

    arch = build_architecture(FAMILY, DEPTH, aspect_ratio=ASPECT_RATIO, vocab_size=VOCABULARY)
    # Parameter, the optimizer's parameter, and its two moments; as many tensors as there.
    state = [list(torch.randn(parameters(arch)).split(1_000_000)) for _ in range(4)]
    state = [[tensor.clone() for tensor in tensors] for tensors in state]
    path = directory / "state.pt"

    def save() -> None:
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def load() -> None:
        assert len(torch.load(path)) == 4

    return {"save": lambda: seconds(save), "load": lambda: seconds(load)}, parameters(arch)


def megatrons(directory: Path, rank: int, processes: int) -> tuple[Measurements, int]:
    from archscale_megatron.training.arguments import parse_arguments

    stock = STOCK in os.environ
    sys.argv = f"""pretrain_archscale.py
        --train-model {FAMILY} --depth {DEPTH} --aspect-ratio {ASPECT_RATIO} --vocab-size {VOCABULARY}
        --use-distributed-optimizer --mock-data --tokenizer-type NullTokenizer --seq-length {LENGTH}
        --micro-batch-size 1 --global-batch-size {processes} --train-iters 1000000 --lr 1e-3 --min-lr 1e-3
        --save {directory} --load {directory} {"" if stock else "--async-save --async-strategy mcore"}""".split()
    args = parse_arguments()

    import torch
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.training import async_utils, training
    from megatron.training.initialize import initialize_megatron

    from archscale_megatron.training.step import forward_step, model_provider

    initialize_megatron(allow_no_cuda=True)
    args.load, load_from = None, args.load
    model, optimizer, scheduler = training.setup_model_and_optimizer(ModelType.encoder_or_decoder, model_provider)
    args.load = load_from
    tokens = torch.randint(VOCABULARY, (1, LENGTH + 1), generator=torch.Generator().manual_seed(rank))
    sample = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "position_ids": torch.arange(LENGTH).expand(1, -1),
        "loss_mask": torch.ones(1, LENGTH),
    }
    batches = RerunDataIterator(iter([sample] * 2))
    for _ in range(2):  # Adam's moments are not zero
        training.train_step(
            forward_step,
            batches,
            model,
            optimizer,
            scheduler,
            model[0].config,
            get_forward_backward_func(),
            iteration=0,
        )
    contexts: dict[bool, dict[str, Any]] = {False: {}, True: {}}
    iteration = 0

    def save(asynchronous: bool) -> float:
        nonlocal iteration
        iteration += 1
        args.async_save = asynchronous
        context = contexts[asynchronous]
        return seconds(lambda: training.save_checkpoint(iteration, model, optimizer, scheduler, 0, context))

    def stall() -> float:
        waited = save(asynchronous=True)
        while not async_utils.is_empty_async_queue():
            time.sleep(0.1)
            call = seconds(lambda: training.maybe_finalize_async_save(blocking=False))
            if async_utils.is_empty_async_queue():
                waited += call
        return waited

    def load() -> float:
        args.consumed_train_samples = args.consumed_valid_samples = 0  # Megatron asserts that nothing was loaded
        args.ckpt_step = None  # the checkpoint that was chosen the last time
        return seconds(lambda: training.load_checkpoint(model, optimizer, scheduler))

    measurements: Measurements = {"save": lambda: save(asynchronous=False), "load": load}
    if not stock:
        measurements = {"stall": stall, **measurements}
    return measurements, sum(p.numel() for p in model[0].parameters())


def serve(
    build: Callable[[Path, int, int], tuple[Measurements, int]],
    directory: Path,
    rank: int,
    processes: int,
    port: int,
    connection: Connection,
) -> None:
    """In a process of its own: send the number of parameters, then the seconds of each measurement asked for."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        measurements, parameters = build(directory, rank, processes)
        connection.send(parameters)
        while name := connection.recv():
            connection.send(measurements[name]())


class Variant:
    """Something that saves and loads, in one process or several."""

    def __init__(self, build: Any, directory: Path, processes: int = 1, stock: bool = False) -> None:
        self.directory = directory
        directory.mkdir()
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        if stock:
            os.environ[STOCK] = "1"
        self.connections, self.processes = [], []
        for rank in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(build, directory, rank, processes, port, theirs))
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        os.environ.pop(STOCK, None)
        self.parameters = [connection.recv() for connection in self.connections][0]
        self.results: dict[str, list[float]] = {}
        self.bytes = 0

    def measure(self, name: str) -> None:
        if name in ("save", "stall"):
            for old in self.directory.iterdir():
                if old.is_dir():
                    shutil.rmtree(old)
        os.sync()
        for connection in self.connections:
            connection.send(name)
        self.results.setdefault(name, []).append(max(connection.recv() for connection in self.connections))
        self.bytes = sized(self.directory)

    def close(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):  # it ended with an error
                connection.send("")
        for process in self.processes:
            process.join(60)
            process.kill()


def measure(variants: dict[str, Variant], runs: int) -> None:
    for run in range(1 + runs):
        for name in ("stall", "save", "load"):
            for label, variant in variants.items():
                if name != "stall" or label in ("ours", "two"):
                    variant.measure(name)
        if run == 0:  # the first one finds memory that was never touched
            for variant in variants.values():
                variant.results.clear()


def row(what: str, times: list[float], reference: list[float], size: int = 0) -> str:
    median, ratio = statistics.median(times), statistics.median(t / r for t, r in zip(times, reference, strict=True))
    rate = f"{size / median / 1e6:,.0f}" if size else ""
    return f"| {what} | {median:.2f} | {min(times):.2f} to {max(times):.2f} | {rate} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", default=".", help="on the disk that is measured")
    parser.add_argument("--without-stock", action="store_true", help="not Megatron's own")
    parser.add_argument("--two", action="store_true", help="two data-parallel processes as well")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "PYTHONWARNINGS": "ignore"}  # for the processes to come

    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        variants = {"torch": Variant(torchs, Path(folder, "torch")), "ours": Variant(megatrons, Path(folder, "ours"))}
        if not options.without_stock:
            variants["stock"] = Variant(megatrons, Path(folder, "stock"), stock=True)
        if options.two:
            variants["two"] = Variant(megatrons, Path(folder, "two"), processes=2)
        try:
            measure(variants, options.runs)
        finally:
            for variant in variants.values():
                variant.close()

    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "megatron-core"))
    torch, ours = variants["torch"], variants["ours"]
    print(f"Python {platform.python_version()}, {versions}, {options.threads} thread(s) a process,")
    print(f"{ours.parameters:,} parameters, {ours.bytes:,} bytes, {options.runs} runs in turns\n")
    print("| | median s | fastest to slowest | MB/s | ratio |\n|---|---|---|---|---|")
    print(row("torch.save + fsync", torch.results["save"], torch.results["save"], torch.bytes))
    labels = {"ours": "ours", "stock": "Megatron's", "two": "ours, 2 processes"}
    for name, label in labels.items():
        if name in variants:
            variant = variants[name]
            print(row(f"synchronous save, {label}", variant.results["save"], torch.results["save"], variant.bytes))
    for name, label in labels.items():
        if name in variants and "stall" in variants[name].results:
            variant = variants[name]
            print(row(f"stall of an asynchronous save, {label}", variant.results["stall"], variant.results["save"]))
    print(row("torch.load", torch.results["load"], torch.results["load"], torch.bytes))
    for name, label in labels.items():
        if name in variants:
            print(row(f"load, {label}", variants[name].results["load"], torch.results["load"], variants[name].bytes))
    print(
        "\nRatios are medians over the runs: of saves to torch.save, of stalls to the save of the same kind, of loads"
    )
    print("to torch.load.")


if __name__ == "__main__":
    main()
