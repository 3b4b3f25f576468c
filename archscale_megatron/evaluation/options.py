"""Which model is evaluated, and what computes it: options that all commands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archscale_megatron.evaluation.engine import Engine

DTYPES = ("fp32", "bf16", "fp16")
BATCH_SIZE = 8


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Options that `open_engine` reads."""
    parser.add_argument(
        "--load",
        required=True,
        type=Path,
        metavar="DIR",
        help="what training had as --save, a checkpoint, or an export",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (as they are stored)")
    parser.add_argument("--device", help="cpu or cuda (cuda where there is one)")
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"as many tokens at once as N sequences of --max-length have ({BATCH_SIZE}; fewer on a CPU)",
    )
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a sequence (the trained context)")
    parser.add_argument("--tokenizer-model", metavar="PATH", help="where the tokenizer is now, if it was moved")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N", help="under torchrun (1)")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N", help="under torchrun (1)")


def open_engine(args: argparse.Namespace) -> Engine:
    """The engine of `add_engine_options`: Megatron's model where it is split, transformers' elsewhere.

    Raises:
        CheckpointError, HFError, ValueError: it cannot be; the message is one line.
    """
    for name in ("batch_size", "max_length", "tensor_model_parallel_size", "pipeline_model_parallel_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if not args.load.is_dir():
        raise ValueError(f"--load {args.load}: no such directory")

    from archscale_megatron.hf.export import DTYPES as TORCH

    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    common = {
        "dtype": TORCH.get(args.dtype),
        "max_length": args.max_length,
        "tokenizer_model": args.tokenizer_model,
    }
    if tensor * pipeline == 1:
        from archscale_megatron.evaluation.transformers_engine import TransformersEngine

        return TransformersEngine(args.load, device=args.device, batch_size=args.batch_size, **common)
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) % (tensor * pipeline):
        raise ValueError(
            f"a model on {tensor} x {pipeline} processes, but there are {processes}; start it with torchrun "
            f"--nproc-per-node {tensor * pipeline}, or a multiple"
        )
    from archscale_megatron.evaluation.megatron_engine import open_checkpoint

    batch_size = args.batch_size or BATCH_SIZE
    return open_checkpoint(args.load, tensor=tensor, pipeline=pipeline, batch_size=batch_size, **common)
