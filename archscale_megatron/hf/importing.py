"""A Hugging Face folder as a training checkpoint, from which `pretrain_archscale.py --load` goes on at any layout.

Nothing of the folder is run: its config says which of `FORMATS` it has, and its weights are safetensors.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from archscale_megatron import single_process
from archscale_megatron.archs.architecture import WINDOW_ATTENTION, Architecture
from archscale_megatron.archs.counts import parameters
from archscale_megatron.archs.families import FAMILIES
from archscale_megatron.checkpoint import run_description
from archscale_megatron.checkpoint.new_directory import check_new
from archscale_megatron.checkpoint.tensors import write_release
from archscale_megatron.hf.export import DTYPES, FORMATS, KEPT_IN_FP32
from archscale_megatron.hf.folder import CONFIG, HFError, HFFolder
from archscale_megatron.hf.kinds import Map
from archscale_megatron.hf.tokenizer import training_tokenizer
from archscale_megatron.mup.rules import NAMES, Parametrization

NUMBERS = {
    "hidden_size": "--hidden-size", "ffn_hidden_size": "--ffn-hidden-size", "num_attention_heads": "--num-heads",
    "num_query_groups": "--num-kv-heads", "head_dim": "--head-dim", "vocab_size": "--vocab-size",
}  # fmt: skip
"""Fields of Architecture that training is always told."""
SWITCHES = {
    "differential_attention": "--differential-attention", "attention_gate": "--attention-gate",
    "attention_sink": "--attention-sink", "attention_output_bias": "--attention-output-bias",
    "linear_bias": "--linear-bias", "shared_expert": "--shared-expert", "sqrt_gate": "--sqrt-gate",
    "qk_norm": "--qk-layernorm", "qkv_bias": "--add-qkv-bias",
}  # fmt: skip
CONTEXT_LENGTH = 2048  # what transformers takes where a Llama config does not say
LARGEST = 2**31 - 1
COUNTS = {"depth": 0, "num_hidden_layers": 0} | dict.fromkeys(
    ("hidden_size", "intermediate_size", "ffn_hidden_size", "num_attention_heads", "num_key_value_heads",
     "num_query_groups", "head_dim", "vocab_size", "max_position_embeddings"),
    LARGEST,
)  # fmt: skip
"""Numbers of a config.json, which may hold anything -> the largest that is taken; 0 is as many as the folder has
tensors."""
MULTIPLIERS = ("logit_multiplier", "residual_multiplier", "router_multiplier", "softmax_scale")


def import_folder(input: Path, output: Path, dtype: torch.dtype | None = None) -> tuple[Architecture, list[str]]:
    """Write the model of the folder `input` into the new run directory `output`, which appears whole or not at all.

    Args:
        dtype: of the weights; None is what the folder has.
    Returns:
        the architecture, and the options with which training goes on.
    Raises:
        HFError: the folder cannot be used, describes what is not trained here, or has other tensors than its config
            asks for; or `output` is there.
    """
    check_new(output)
    folder = HFFolder(input)
    module, arch, maps = described(folder)
    folder.check({name: shape for one in maps for name, shape in one.hf_shapes().items()})
    options = training_options(arch, folder.config)
    single_process.prepare()
    write_release(output, arch, _converted(maps, folder, dtype), _run_description(folder, module))
    tokenizer = training_tokenizer(folder)
    options += ["--tokenizer-type", tokenizer["type"]]
    return arch, [*options, "--tokenizer-model", tokenizer["model"]] if tokenizer["model"] else options


def described(folder: HFFolder) -> tuple[ModuleType, Architecture, list[Map]]:
    """The format of a folder, the architecture, and its maps; raises HFError."""
    path = folder.path / CONFIG
    config = {name: value for name, value in folder.config.items() if value is not None or name not in COUNTS}
    module = next((module for module in FORMATS.values() if config.get("model_type") == module.NAME), None)
    if module is None:
        raise HFError(f"{path}: model_type is {config.get('model_type')!r}; import knows {', '.join(FORMATS)}")
    for name, limit in COUNTS.items():
        limit = limit or len(folder.names())
        if name in config and not (type(config[name]) is int and 0 < config[name] <= limit):
            raise HFError(f"{path}: {name} is {config[name]!r}; here it is a number from 1 to {limit:,}")
    try:
        arch = module.architecture(config)
        for field in dataclasses.fields(arch):
            value, kinds = getattr(arch, field.name), str(field.type).split(" | ")
            kind = "None" if value is None else type(value).__name__
            if kind not in kinds and not (kind == "int" and "float" in kinds):
                raise ValueError(f"{field.name} is {value!r}, which is no {kinds[0]}")
        if arch.family not in FAMILIES or not module.fits(arch):
            raise ValueError(f"{module.NAME} has no such model here")
        return module, arch, module.maps(arch)
    except (ValueError, TypeError, ArithmeticError, LookupError) as error:  # whatever a value of no sense leads to
        raise HFError(f"{path}: {str(error).removeprefix('config.json: ')}") from None


def training_options(arch: Architecture, config: dict[str, Any]) -> list[str]:
    """The options of `pretrain_archscale.py` that say what the model is."""
    family = FAMILIES[arch.family](arch.depth)
    options = ["--train-model", arch.family, "--depth", str(arch.depth)]
    for field, option in NUMBERS.items():
        options += [option, str(getattr(arch, field))]
    if arch.norm_epsilon != Architecture.norm_epsilon:
        options += ["--norm-epsilon", str(arch.norm_epsilon)]
    if WINDOW_ATTENTION in arch.pattern:
        options += ["--local-window", str(arch.window)]
    if arch.rotary_base is not None:
        options += ["--rotary-base", str(arch.rotary_base)]
    if family.rope != (arch.rotary_base is not None):
        options += ["--position-embedding-type", "rope" if arch.rotary_base is not None else "none"]
    if arch.top_k:
        options += ["--sparsity", str(arch.sparsity), "--top-k", str(arch.top_k)]
    if arch.normalization != family.normalization:
        options += ["--normalization", arch.normalization]
    options += [option for field, option in SWITCHES.items() if getattr(arch, field) and not getattr(family, field)]
    if not arch.tied_embeddings:
        options.append("--untie-embeddings-and-output-weights")
    length = 2 * arch.full_window if arch.full_window else config.get("max_position_embeddings", CONTEXT_LENGTH)
    return [*options, "--seq-length", str(length), *_parametrization(arch)]


def _parametrization(arch: Architecture) -> list[str]:
    """Of a model without multipliers, or with those of a parametrisation's own base; the user knows about another."""
    plain = dataclasses.replace(arch, **{name: getattr(Architecture, name) for name in MULTIPLIERS})
    for name in NAMES:
        if Parametrization(name).apply(plain) == arch:
            return [] if name == "sp" else ["--parametrization", name]
    return []


def _converted(maps: Sequence[Map], folder: HFFolder, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    with tqdm(total=len(maps), unit="map", desc="import", disable=None) as progress:
        for one in maps:
            tensors = one.to_megatron([folder.read(name) for name in one.hf])
            for name, tensor in zip(one.megatron, tensors, strict=True):
                kept = torch.float32 if name.endswith(KEPT_IN_FP32) else dtype
                yield name, tensor if dtype is None else tensor.to(kept)
            progress.update()


def _run_description(folder: HFFolder, module: ModuleType) -> dict[str, Any]:
    """What `run.json` says of an imported model."""
    return {
        "format": run_description.FORMAT,
        "iteration": 0,
        "consumed_samples": 0,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "options": {"max_position_embeddings": folder.config.get("max_position_embeddings")},
        "tokenizer": training_tokenizer(folder),
        "imported": {"folder": str(folder.path.resolve()), "format": module.NAME},
    }


def add_commands(commands: Any) -> None:
    """`import`."""
    parser = commands.add_parser("import", help="a Hugging Face folder as a training checkpoint", description=__doc__)
    parser.add_argument("--input", required=True, type=Path, metavar="DIR", help="config.json and safetensors")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new run directory")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (as in the folder)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    arch, options = import_folder(args.input, args.output, DTYPES.get(args.dtype))
    print(f"{args.output}: {arch.family}, {parameters(arch):,} parameters; train on with")
    print(f"pretrain_archscale.py --load {shlex.join([str(args.output), *options])} ...")
    if any(getattr(arch, name) != getattr(Architecture, name) for name in MULTIPLIERS):
        print("and with the --parametrization and --base-hps.* of the run that the model comes from")
