"""A training checkpoint as a Hugging Face folder, in one process, with about one shard in memory."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import math
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from archscale_megatron.checkpoint import manifest
from archscale_megatron.checkpoint.new_directory import check_new, new_directory
from archscale_megatron.checkpoint.resume import find_checkpoint
from archscale_megatron.checkpoint.tensors import CheckpointTensors
from archscale_megatron.hf import archscale, llama, phi4flash
from archscale_megatron.hf.folder import CONFIG, HFError
from archscale_megatron.hf.kinds import Map, Vocabulary
from archscale_megatron.hf.shards import MAX_SHARD_BYTES, Entry, write_json, write_shards
from archscale_megatron.hf.tokenizer import SpecialIds, write_tokenizer

FORMATS: dict[str, ModuleType] = {module.NAME: module for module in (llama, phi4flash, archscale)}
"""In the order in which `auto` tries them."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT_IN_FP32 = (".A_log", ".D", ".dt_bias", ".dt_proj.bias")
"""Parameters that a scan is sensitive to (`layers.recurrent`); no `dtype` makes them half."""
READERS = 2
"""Threads that read a checkpoint."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def export(
    load: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    format: str = "auto",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_model: str | None = None,
) -> str:
    """Write the model of a checkpoint into the new directory `output`, which appears whole or not at all.

    Args:
        load: a run directory or one checkpoint, of any layout.
        dtype: of the weights; None is what the checkpoint has.
        format: a key of `FORMATS`, or `auto`: the first that the architecture fits.
        tokenizer_model: where the tokenizer is now, if it was moved.
    Returns:
        the format.
    Raises:
        CheckpointError: the checkpoint is not whole, or its tensors are not those of its architecture.
        HFError: `output` is there, the format does not fit, or the tokenizer cannot be exported.
    """
    check_new(output)
    checkpoint = find_checkpoint(load)
    tensors = CheckpointTensors(checkpoint)
    module = chosen_format(format, tensors)
    maps: list[Map] = module.maps(tensors.architecture)
    check_tensors(maps, tensors, checkpoint)
    entries = [entry for one in maps for entry in exported(one, tensors, dtype)]
    with new_directory(output) as directory, verified(checkpoint):
        special = write_tokenizer_of_run(directory, tensors.run, tokenizer_model)
        write_configs(directory, module, tensors, entries[0][2], special)
        write_shards(directory, converted(maps, tensors, entries, "export"), entries, max_shard_bytes)
    return module.NAME


@contextlib.contextmanager
def verified(checkpoint: Path) -> Iterator[None]:
    """Verify a checkpoint while the block reads it; its damage is raised in the place of what came of it."""
    if not (checkpoint / manifest.FILE_NAME).is_file():
        print(f"hf: {checkpoint} has no {manifest.FILE_NAME}; its files are not verified", file=sys.stderr)
        yield
        return
    with ThreadPoolExecutor(1) as pool:
        verification = pool.submit(manifest.verify, checkpoint)
        try:
            yield
        finally:
            verification.result()


def chosen_format(format: str, tensors: CheckpointTensors) -> ModuleType:
    """The module of `format`; raises HFError if it cannot hold the architecture."""
    if format == "auto":
        return next(module for module in FORMATS.values() if module.fits(tensors.architecture))
    if not FORMATS[format].fits(tensors.architecture):
        family = tensors.architecture.family
        raise HFError(f"--format {format}: cannot hold a {family} model with its options; use auto")
    return FORMATS[format]


def check_tensors(maps: Sequence[Map], tensors: CheckpointTensors, checkpoint: Path) -> None:
    """Raise HFError unless the checkpoint has exactly the tensors of the maps."""
    expected = {name: (shape, one) for one in maps for name, shape in one.megatron_shapes().items()}
    names = set(tensors.names())
    for what, wrong in {"lacks": expected.keys() - names, "also has": names - expected.keys()}.items():
        if wrong:
            raise HFError(f"{checkpoint} {what} {sorted(wrong)[0]}, and is not of its architecture ({len(wrong)} such)")
    for name, (shape, one) in expected.items():
        got = tensors.shape(name)
        padded = isinstance(one, Vocabulary) and got[0] >= shape[0] and got[1:] == shape[1:]
        if got != shape and not padded:
            raise HFError(f"{checkpoint}: {name} is {list(got)}; its architecture says {list(shape)}")


def exported(one: Map, tensors: CheckpointTensors, dtype: torch.dtype | None) -> list[Entry]:
    """Name, shape and dtype of what a map exports."""
    stored = tensors.dtype(one.megatron[0])
    if dtype is not None:
        stored = torch.float32 if one.megatron[0].endswith(KEPT_IN_FP32) else dtype
    return [(name, shape, stored) for name, shape in one.hf_shapes().items()]


def converted(
    maps: Sequence[Map], tensors: CheckpointTensors, entries: Sequence[Entry], what: str
) -> Iterator[tuple[str, Tensor]]:
    """The exported tensors, in the order of `entries`, with a bar that says `what`.

    While one map's tensors are used, those of the next ones are read.
    """
    dtypes = {name: dtype for name, _, dtype in entries}
    total = sum(math.prod(shape) * dtype.itemsize for _, shape, dtype in entries)
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None) as progress,
        ThreadPoolExecutor(READERS) as pool,
    ):
        following, coming = iter(maps), deque[Future[list[Tensor]]]()
        for one in maps:
            for later in itertools.islice(following, READERS + 1 - len(coming)):
                coming.append(pool.submit(_converted_by, later, tensors, dtypes))
            results = coming.popleft().result()
            for name in one.hf:
                tensor = results.pop(0)
                yield name, tensor
                progress.update(tensor.nbytes)


def _converted_by(one: Map, tensors: CheckpointTensors, dtypes: Mapping[str, torch.dtype]) -> list[Tensor]:
    # A factor is applied in the wider of both dtypes.
    wide = torch.promote_types(dtypes[one.hf[0]], tensors.dtype(one.megatron[0]))
    results = one.to_hf([tensors.read(name).to(wide) for name in one.megatron])
    return [tensor.to(dtypes[name]) for name, tensor in zip(one.hf, results, strict=True)]


def write_configs(
    directory: Path, module: ModuleType, tensors: CheckpointTensors, dtype: torch.dtype, special: SpecialIds
) -> None:
    """config.json, generation_config.json and the model's own code."""
    named = {
        "bos_token_id": special.bos_token_id,
        "eos_token_id": special.eos_token_id,
        "pad_token_id": special.pad_token_id,
    }
    version = {"transformers_version": importlib.metadata.version("transformers")}
    config: dict[str, Any] = module.config(tensors.architecture, tensors.run)
    write_json(directory / CONFIG, config | named | {"torch_dtype": str(dtype).removeprefix("torch."), **version})
    ids = {name: value for name, value in named.items() if value is not None}
    write_json(directory / "generation_config.json", {"_from_model_config": True} | ids | version)
    for name in module.FILES:
        shutil.copyfile(Path(__file__).with_name(name), directory / name)


def write_tokenizer_of_run(directory: Path, run: dict[str, Any], model: str | None) -> SpecialIds:
    described = run.get("tokenizer")
    if described is None:
        print("hf: the checkpoint does not say what its tokenizer is; the export has none", file=sys.stderr)
        return SpecialIds()
    return write_tokenizer(directory, described["type"], model or described["model"], run.get("options"))


def add_commands(commands: Any) -> None:
    """`export`."""
    parser = commands.add_parser("export", help="a training checkpoint as a Hugging Face folder", description=__doc__)
    parser.add_argument("--load", required=True, type=Path, metavar="DIR", help="a run directory or one checkpoint")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new directory")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (as in the checkpoint)")
    parser.add_argument(
        "--format", choices=("auto", *FORMATS), default="auto", help="auto takes the first that holds the model"
    )
    parser.add_argument(
        "--max-shard-size", type=_bytes, default=MAX_SHARD_BYTES, metavar="SIZE", help="of a file of weights (5GB)"
    )
    parser.add_argument("--tokenizer-model", metavar="PATH", help="where the tokenizer is now, if it was moved")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    format = export(
        args.load,
        args.output,
        dtype=DTYPES.get(args.dtype),
        format=args.format,
        max_shard_bytes=args.max_shard_size,
        tokenizer_model=args.tokenizer_model,
    )
    print(f"{args.output}: {format}")


def _bytes(text: str) -> int:
    """5GB -> 5_000_000_000."""
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = int(float(number) * UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number and one of {', '.join(UNITS)}, such as 5GB")
    return size
