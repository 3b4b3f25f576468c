"""Time of a training step against Hugging Face's LlamaForCausalLM of the same shape, on a CPU.

    python benchmarks/step.py [--threads 2] [--steps 30]

Prints a markdown table. Ours is what `pretrain_archscale.py` runs for each iteration: Megatron's `train_step`, with its
arguments, distributed optimizer and gradient buffers, in one process. Theirs is a plain loop with torch's AdamW. Each
lives in a process of its own; they take turns step by step, so that other load falls on all alike, and a ratio is the
median over the turns. CPU time is that of all threads, which other load changes less, except that OpenMP's threads wait
in a loop where OMP_WAIT_POLICY is not `passive`.
"""

import argparse
import contextlib
import importlib.metadata
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
HIDDEN, DEPTH, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCABULARY = 256, 8, 4, 2, 64, 1024, 8192
BATCH, LENGTH = 4, 512
LEARNING_RATE, WEIGHT_DECAY, CLIP, EPSILON = 1e-3, 0.1, 1.0, 1e-8
WARM_UP = 3
# glibc gives large tensors back to the system and asks for them again; these keep them.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}

Step = Callable[[], float]
"""Trains on the next batch, and returns its loss."""


def hugging_face() -> tuple[Step, int]:
    """The step, and the number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=HIDDEN, num_hidden_layers=DEPTH, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM, intermediate_size=FFN, vocab_size=VOCABULARY, max_position_embeddings=LENGTH,
        tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    # foreach: the faster of torch's AdamW here that is not fused.
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY, foreach=True
    )
    batches = random_batches()
    ones = torch.ones(BATCH, LENGTH, dtype=torch.int64)

    def step() -> float:
        tokens = next(batches)
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        optimizer.zero_grad()
        # With a mask of ones it takes SDPA's causal path; without one it makes a mask, and is slower.
        loss = model(inputs, attention_mask=ones, labels=labels, shift_labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
        optimizer.step()
        return loss.item()

    return step, sum(p.numel() for p in model.parameters())


def ours(family: str) -> tuple[Step, int]:
    """The step, and the number of parameters."""
    from archscale_megatron import cpu

    cpu.install()

    from archscale_megatron import megatron_patches

    megatron_patches.apply()
    from archscale_megatron.training.arguments import parse_arguments

    sys.argv = f"""pretrain_archscale.py
        --train-model {family} --depth {DEPTH} --aspect-ratio {HIDDEN // DEPTH} --num-heads {HEADS}
        --num-kv-heads {KV_HEADS} --head-dim {HEAD_DIM} --vocab-size {VOCABULARY}
        --untie-embeddings-and-output-weights --use-distributed-optimizer
        --mock-data --tokenizer-type NullTokenizer --seq-length {LENGTH} --micro-batch-size {BATCH}
        --global-batch-size {BATCH} --train-iters 1000000 --lr {LEARNING_RATE} --min-lr {LEARNING_RATE}
        --weight-decay {WEIGHT_DECAY} --clip-grad {CLIP} --adam-eps {EPSILON}""".split()
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    parse_arguments()

    import torch
    from megatron.core.enums import ModelType
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer, train_step

    from archscale_megatron.training.step import forward_step, model_provider

    initialize_megatron(allow_no_cuda=True)
    model, optimizer, scheduler = setup_model_and_optimizer(ModelType.encoder_or_decoder, model_provider)
    config = model[0].config

    def samples():
        for tokens in random_batches():
            yield {
                "tokens": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "position_ids": torch.arange(LENGTH).expand(BATCH, -1),
                "loss_mask": torch.ones(BATCH, LENGTH),
            }

    batches = RerunDataIterator(samples())

    def step() -> float:
        losses, *_ = train_step(
            forward_step, batches, model, optimizer, scheduler, config, get_forward_backward_func(), iteration=0
        )
        return losses["lm loss"].item()

    return step, sum(p.numel() for p in model[0].parameters())


def random_batches():
    """Endless token ids [BATCH, LENGTH + 1], the same for all."""
    import torch

    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)


VARIANTS: dict[str, Callable[[], tuple[Step, int]]] = {
    "Hugging Face Llama": hugging_face,
    "ours, transformer": lambda: ours("transformer"),
    "ours, sambay": lambda: ours("sambay"),
}


def serve(name: str, connection: Connection) -> None:
    """In a process of its own: send the number of parameters, then for each request the seconds, CPU seconds and
    loss of a step."""
    sys.path.insert(0, str(ROOT))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        step, parameters = VARIANTS[name]()
        connection.send(parameters)
        while connection.recv():
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = step()
            connection.send((time.perf_counter() - start, time.process_time() - cpu_start, loss))


class Result(NamedTuple):
    """Of one variant; a number for each step."""

    parameters: int
    seconds: list[float]
    cpu_seconds: list[float]
    losses: list[float]


def measure(steps: int) -> dict[str, Result]:
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    for name in VARIANTS:
        connections[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
    results = {name: Result(connection.recv(), [], [], []) for name, connection in connections.items()}
    for i in range(WARM_UP + steps):
        for name, connection in connections.items():
            connection.send(True)
            measured = connection.recv()
            if i >= WARM_UP:
                for values, value in zip(results[name][1:], measured, strict=True):
                    values.append(value)
    for connection in connections.values():
        connection.send(False)
    for process in processes:
        process.join()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "PYTHONWARNINGS": "ignore"}  # for the processes to come

    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "megatron-core", "transformers"))
    print(f"Python {platform.python_version()}, {versions}, {options.threads} threads,")
    print(f"{BATCH} x {LENGTH} tokens, fp32, medians of {options.steps} steps\n")
    print("| allocator | model | parameters | ms per step | fastest | tokens/s | of Hugging Face | CPU ms ", end="")
    print("| last loss |\n|---|---|---|---|---|---|---|---|---|")
    for allocator, environment in {"glibc": {}, "glibc, keeps memory": KEEP_MEMORY}.items():
        os.environ |= environment
        results = measure(options.steps)
        baseline = results["Hugging Face Llama"].seconds
        for name, result in results.items():
            median, cpu = statistics.median(result.seconds), statistics.median(result.cpu_seconds)
            ratio = statistics.median(b / t for b, t in zip(baseline, result.seconds, strict=True))
            print(f"| {allocator} | {name} | {result.parameters:,} | {1e3 * median:.0f} ", end="")
            print(f"| {1e3 * min(result.seconds):.0f} | {BATCH * LENGTH / median:,.0f} | {ratio:.3f} ", end="")
            print(f"| {1e3 * cpu:.0f} | {result.losses[-1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
