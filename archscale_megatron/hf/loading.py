"""A model and its tokenizer to generate with, from a training checkpoint of any layout or from an exported folder.

No code of a folder is run: what transformers does not know itself, our own model class computes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archscale_megatron.archs.architecture import Architecture
from archscale_megatron.checkpoint.resume import find_checkpoint
from archscale_megatron.checkpoint.tensors import CheckpointTensors
from archscale_megatron.hf import archscale, export
from archscale_megatron.hf.configuration_archscale import ArchScaleConfig
from archscale_megatron.hf.folder import CONFIG, HFError, HFFolder
from archscale_megatron.hf.importing import described
from archscale_megatron.hf.kinds import Map
from archscale_megatron.hf.modeling_archscale import ArchScaleForCausalLM

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Loaded:
    """
    Attributes:
        model: of transformers, with `generate`, in evaluation mode.
        tokenizer: a fast tokenizer of transformers.
        end: ids after which a text has ended.
    """

    model: Any
    tokenizer: Any
    end: tuple[int, ...]


def load(
    path: Path, *, dtype: torch.dtype | None = None, device: str = "cpu", tokenizer_model: str | None = None
) -> Loaded:
    """What a run directory, one checkpoint, or an exported folder holds.

    Args:
        dtype: of the weights; None is what is stored.
        tokenizer_model: where the tokenizer is now, if it was moved.
    Raises:
        CheckpointError, HFError: it cannot be used; the message is one line.
    """
    of = _of_folder if (path / CONFIG).exists() else _of_checkpoint
    loaded = of(path, dtype, tokenizer_model)
    loaded.model.to(device).eval()
    return loaded


def _of_checkpoint(path: Path, dtype: torch.dtype | None, tokenizer_model: str | None) -> Loaded:
    checkpoint = find_checkpoint(path)
    tensors = CheckpointTensors(checkpoint)
    arch = tensors.architecture
    maps = archscale.maps(arch)
    export.check_tensors(maps, tensors, checkpoint)
    entries = [entry for one in maps for entry in export.exported(one, tensors, dtype)]
    model = _filled(archscale.config(arch, tensors.run), export.converted(maps, tensors, entries, "load"))
    return Loaded(model, *tokenizer_of_run(tensors.run, path, tokenizer_model))


def tokenizer_of(path: Path, tokenizer_model: str | None = None) -> Any:
    """The tokenizer alone of what `load` loads."""
    if (path / CONFIG).exists():
        return _tokenizer(tokenizer_model or path, path)
    return tokenizer_of_run(CheckpointTensors(find_checkpoint(path)).run, path, tokenizer_model)[0]


def tokenizer_of_run(run: dict[str, Any], path: Path, tokenizer_model: str | None) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer of `run.json`, and the ids after which a text has ended; raises HFError, which names `path`."""
    with tempfile.TemporaryDirectory() as directory:
        special = export.write_tokenizer_of_run(Path(directory), run, tokenizer_model)
        return _tokenizer(directory, path), _ids(special.eos_token_id)


def _of_folder(path: Path, dtype: torch.dtype | None, tokenizer_model: str | None) -> Loaded:
    folder = HFFolder(path)
    _, arch, maps = described(folder)
    folder.check({name: shape for one in maps for name, shape in one.hf_shapes().items()})
    model = _filled(archscale.config(arch, {"options": folder.config}), _as_archscale(folder, maps, arch, dtype))
    ends = folder.config | (folder.json(GENERATION_CONFIG) if folder.has(GENERATION_CONFIG) else {})
    return Loaded(model, _tokenizer(tokenizer_model or path, path), _ids(ends.get("eos_token_id")))


def _as_archscale(
    folder: HFFolder, maps: Sequence[Map], arch: Architecture, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a folder under the names of our model class."""
    megatron: dict[str, Tensor] = {}
    for one in maps:
        megatron |= zip(one.megatron, one.to_megatron([folder.read(name) for name in one.hf]), strict=True)
    for one in archscale.maps(arch):
        kept = dtype is None or one.megatron[0].endswith(export.KEPT_IN_FP32)
        for name, tensor in zip(one.hf, one.to_hf([megatron.pop(name) for name in one.megatron]), strict=True):
            yield name, tensor if kept else tensor.to(dtype)


def _filled(config: dict[str, Any], tensors: Iterable[tuple[str, Tensor]]) -> ArchScaleForCausalLM:
    """The model of a config.json with these weights, which it holds itself."""
    with torch.device("meta"):
        model = ArchScaleForCausalLM(ArchScaleConfig(**config))
    state = {name: tensor.contiguous() for name, tensor in tensors}
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _tokenizer(directory: str | Path, path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise HFError(
            f"{path}: its tokenizer cannot be loaded ({next(iter(str(error).splitlines()), error)})"
        ) from None
    if not tokenizer.is_fast:
        raise HFError(f"{path}: its tokenizer has no tokenizer.json")
    return tokenizer


def _ids(end: int | list[int] | None) -> tuple[int, ...]:
    return () if end is None else tuple(end) if isinstance(end, list) else (end,)
